"""Likelihoods against closed forms, and the command on one and two ranks."""

import math
from pathlib import Path

import pytest
import ranks
import torch
from golden_model import golden_flow
from safetensors.torch import load_file

from tarflow_dist import TarFlow
from tarflow_dist.data.loader import Batch
from tarflow_dist.flow.bits_per_dim import bits_per_dim, loss_of
from tarflow_dist.models.likelihood import mean_log_prob

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "width": 64,
    "num_blocks": 1,
    "layers_per_block": 1,
}


def scaling_flow(mu: float, alpha: float, **noise: object) -> TarFlow:
    """z = (x − μ)·exp(−α) with constants in every patch but the first, which stays as it is: x is
    made of independent Gaussians of known mean and standard deviation."""
    flow = TarFlow(**SIZES, **noise)
    (block,) = flow.blocks
    with torch.no_grad():
        block.proj_out.bias[:4], block.proj_out.bias[4:] = alpha, mu
    return flow


def batches(images: torch.Tensor, size: int) -> list[Batch]:
    index = torch.arange(len(images))
    whole = Batch(images, torch.zeros_like(index), index, torch.zeros_like(index))
    parts = zip(*(tensor.split(size) for tensor in vars(whole).values()), strict=True)
    return [Batch(*part) for part in parts]


def log_normal(x: float, mean: float, std: float) -> float:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def test_uniform_noise_gives_the_bits_of_the_closed_form() -> None:
    """Pixels of one value k: the mean over u of −log2 of the density at (k + u)/128 − 1, plus 7."""
    k, mu, alpha = 200, 0.4, -1.0
    flow = scaling_flow(mu, alpha, noise="uniform", sigma=None)
    images = torch.full((300, 1, 8, 8), k, dtype=torch.uint8)
    grid = [(k + (i + 0.5) / 1000) / 128 - 1 for i in range(1000)]
    first = sum(log_normal(x, 0, 1) for x in grid) / 1000
    rest = sum(log_normal(x, mu, math.exp(alpha)) for x in grid) / 1000
    expected = -(first + 15 * rest) / 16 / math.log(2) + 7
    found = bits_per_dim(mean_log_prob(flow, batches(images, 64), draws=2, seed=0))
    assert found == pytest.approx(expected, abs=1e-4)


def test_bits_are_the_entropy_where_model_and_data_agree() -> None:
    """8-bit values of a Gaussian: −Σ p log2 p of the discretised Gaussian is what it costs."""
    mean, std = 0.1, 0.2
    flow = scaling_flow(mean, math.log(std), noise="uniform", sigma=None)
    edges = torch.arange(257, dtype=torch.float64) / 128 - 1
    cdf = 0.5 * (1 + torch.erf((edges - mean) / (std * math.sqrt(2))))
    p = cdf.diff() / cdf.diff().sum()
    entropy = float(-(p * p.log2()).nan_to_num().sum())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(p, 2000 * 64, replacement=True, generator=generator)
    images = drawn.reshape(2000, 1, 8, 8).to(torch.uint8)
    log_prob = mean_log_prob(flow, batches(images, 500), draws=1, seed=0)
    # the first patch is under N(0, 1): take its known cost out
    u = (torch.arange(256, dtype=torch.float64)[:, None] + (torch.arange(64) + 0.5) / 64) / 128 - 1
    standard = (-0.5 * u.square() - 0.5 * math.log(2 * math.pi)).mean(dim=1)
    first = float((p * standard).sum())
    rest = (16 * log_prob - first) / 15
    assert bits_per_dim(rest) == pytest.approx(entropy, abs=0.01)


def test_bits_are_the_published_models() -> None:
    """What its evaluate_bpd.py prints for the golden images, from the latents it computed: each
    dimension's −log2 of the unit normal and of 1/128, less log2 of the determinant."""
    golden = Path(__file__).parents[1] / "golden"
    vectors = load_file(golden / "uncond.vectors.safetensors")
    z, logdet = vectors["forward.z"], vectors["forward.logdet_per_dim"]
    prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).mean(dim=1) - math.log(128)
    published = (-prior - logdet).mean() / math.log(2)
    flow = golden_flow("uncond", torch.float64)
    log_prob = flow.log_prob(vectors["x"]).detach().mean() / flow.num_dims
    assert bits_per_dim(float(log_prob)) == pytest.approx(float(published), abs=1e-9)


def test_gaussian_noise_gives_the_training_loss() -> None:
    flow = scaling_flow(0.0, 0.3, noise="gaussian", sigma=0.5)
    images = torch.full((400, 1, 8, 8), 255, dtype=torch.uint8)  # x = 1 + 0.5·noise
    first = 0.5 * (1 + 0.25)
    rest = 0.5 * (1 + 0.25) * math.exp(-0.6) + 0.3
    found = loss_of(mean_log_prob(flow, batches(images, 150), draws=3, seed=0))
    assert found == pytest.approx((first + 15 * rest) / 16, abs=0.01)


def test_how_images_are_batched_does_not_matter() -> None:
    flow = scaling_flow(0.2, -0.5, noise="uniform", sigma=None)
    images = torch.randint(256, (37, 1, 8, 8), dtype=torch.uint8)
    values = [mean_log_prob(flow, batches(images, n), draws=1, seed=0) for n in (1, 8, 37)]
    assert values == pytest.approx([values[0]] * 3, abs=1e-6)


@pytest.mark.e2e
def test_the_command_on_any_number_of_ranks(digits: Path, tmp_path: Path) -> None:
    scaling_flow(0.2, -0.5, noise="uniform", sigma=None).save_pretrained(tmp_path)
    arguments = ["--model", tmp_path, "--data", digits / "mds", "--batch-size", 64]
    one, two = (
        ranks.run_command(tmp_path / "log", "tarflow_dist.evaluate_bpd", *arguments, ranks=n)
        for n in (1, 2)
    )
    one, two = (text[text.index("297 images") :] for text in (one, two))
    assert "297 images" in one
    assert "bits per dim" in one
    assert one == two
