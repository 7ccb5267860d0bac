"""Properties of the flow that need no reference: inverse, Jacobian, densities, refusals."""

import math

import pytest
import torch

from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.patches import patchify, unpatchify


def random_flow(**changes: object) -> Flow:
    """A small flow whose weights are all random, the zero-initialised projections too."""
    torch.manual_seed(0)
    sizes = {
        "image_size": 6,
        "patch_size": 2,
        "in_channels": 2,
        "width": 32,
        "head_dim": 16,
        "num_blocks": 3,
        "layers_per_block": [1, 2, 1],
        "num_classes": 5,
        "sigma": 0.1,
        **changes,
    }
    flow = Flow(**sizes).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        flow.var.uniform_(0.5, 2.0)
    return flow


def images(flow: Flow, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, flow.config.in_channels, flow.image_size, flow.image_size)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


@pytest.mark.parametrize("volume_preserving", [False, True])
@pytest.mark.parametrize("labels", [[0, 3, -1, 4], None])
def test_decode_inverts_encode(volume_preserving: bool, labels: list[int] | None) -> None:
    flow = random_flow(volume_preserving=volume_preserving)
    y = None if labels is None else torch.tensor(labels)
    x = images(flow)
    assert (flow.decode(flow.encode(x, y), y) - x).abs().max() < 1e-9
    z = torch.randn(4, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    assert (flow.encode(flow.decode(z, y), y) - z).abs().max() < 1e-9


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_log_prob_is_the_change_of_variables(volume_preserving: bool) -> None:
    """Against the determinant of the full Jacobian of `encode`, by autograd."""
    flow = random_flow(volume_preserving=volume_preserving)
    x, y = images(flow, 2), torch.tensor([1, -1])
    for n in range(2):

        def encode(image: torch.Tensor, n: int = n) -> torch.Tensor:
            return flow.encode(image[None], y[n : n + 1]).flatten()

        jacobian = torch.autograd.functional.jacobian(encode, x[n])
        jacobian = jacobian.reshape(flow.num_dims, flow.num_dims)
        z = encode(x[n])
        expected = (
            -0.5 * z.square().sum()
            - 0.5 * flow.num_dims * math.log(2 * math.pi)
            + torch.linalg.slogdet(jacobian).logabsdet
        )
        assert abs(flow.log_prob(x[n : n + 1], y[n : n + 1]) - expected) < 1e-9


def test_loss_is_log_prob_without_its_constant() -> None:
    flow = random_flow()
    flow.var.fill_(1.0)
    x, y = images(flow), torch.tensor([0, 1, 2, -1])
    expected = -flow.log_prob(x, y).mean() / flow.num_dims - 0.5 * math.log(2 * math.pi)
    assert abs(flow.loss(*flow(x, y)) - expected) < 1e-12


def test_a_new_flow_is_nearly_the_identity() -> None:
    torch.manual_seed(0)
    flow = Flow(
        image_size=6, patch_size=2, width=64, num_blocks=2, layers_per_block=1, sigma=0.1
    ).double()
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    x = images(flow)
    assert torch.equal(flow.encode(x), patchify(x, 2))


def test_patches_are_cut_like_unfold() -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    assert torch.equal(patchify(x, 4), expected)
    assert torch.equal(unpatchify(expected, 4, 8), x)


def test_each_patch_depends_on_those_before_alone() -> None:
    flow = random_flow(num_blocks=2, layers_per_block=1)
    for block in flow.blocks:
        z = torch.randn(1, 9, flow.patch_dim, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda z, b=block: b(z)[0], z)
        strength = jacobian.abs().amax(dim=(0, 2, 3, 5))  # (to, from)
        reached = strength > 0
        lower = torch.ones(9, 9, dtype=torch.bool).tril()
        assert torch.equal(reached, lower.T if block.reverse else lower)


def test_denoise_follows_a_known_score() -> None:
    """A flow that is the identity has p = N(0, 1), whose score is −x."""
    flow = Flow(image_size=4, patch_size=2, width=64, num_blocks=2, layers_per_block=1, sigma=0.1)
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(flow.denoise(x, sigma=0.3), x * (1 - 0.3**2))
    torch.testing.assert_close(flow.denoise(x), x * (1 - 0.1**2))


def test_prior_variance_is_a_running_mean() -> None:
    flow = random_flow(volume_preserving=True)
    before = flow.var.clone()
    mean_square = torch.rand_like(before)
    flow.update_prior(mean_square)
    torch.testing.assert_close(flow.var, 0.9 * before + 0.1 * mean_square)


def test_bf16_weights_keep_the_affine_arithmetic_in_float32() -> None:
    flow = random_flow()
    x, y = images(flow), torch.tensor([0, 1, 2, -1])
    exact = flow.encode(x, y)
    flow.var = flow.var.float()
    low = flow.bfloat16().encode(x, y)
    assert low.dtype == torch.float32
    assert (low - exact).abs().max() < 0.1
    # where the network says nothing, no bit of x is lost
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.weight)
        torch.nn.init.zeros_(block.proj_out.bias)
    flow.var.fill_(1.0)
    assert torch.equal(flow.encode(x, y), patchify(x.float(), 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": -1.0}, "0 or more"),
        ({"guidance": math.nan}, "must be a number"),
        ({"guidance": 1.0, "guide": "ab"}, "both, mu, alpha"),
        ({"guidance": 1.0, "attn_temp": 0.0}, "above 0"),
        ({"attn_temp": 0.5}, "guidance above 0"),
        ({"guidance": 1.0}, "needs class labels"),
    ],
)
def test_guidance_that_cannot_be_had(arguments: dict, message: str) -> None:
    flow = random_flow(num_classes=0)
    z = torch.zeros(1, flow.num_patches, flow.patch_dim)
    with pytest.raises(ValueError, match=message):
        flow.decode(z, **arguments)


def test_alpha_of_a_volume_preserving_model_cannot_be_guided() -> None:
    flow = random_flow(volume_preserving=True)
    z = torch.zeros(1, flow.num_patches, flow.patch_dim)
    with pytest.raises(ValueError, match="no alpha to guide"):
        flow.decode(z, torch.tensor([1]), guidance=1.0, guide="alpha")


def test_labels_that_cannot_be_had() -> None:
    conditional, unconditional = random_flow(), random_flow(num_classes=0)
    x = images(conditional, 1)
    with pytest.raises(ValueError, match="unconditional"):
        unconditional.encode(x, torch.tensor([0]))
    for label in (5, -2):
        with pytest.raises(ValueError, match="labels must lie in"):
            conditional.log_prob(x, torch.tensor([label]))


def test_uniform_noise_models_have_no_sigma_to_denoise_with() -> None:
    flow = random_flow(noise="uniform", sigma=None)
    with pytest.raises(ValueError, match="uniform noise"):
        flow.denoise(images(flow))
