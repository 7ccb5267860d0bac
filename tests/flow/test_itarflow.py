"""The noise level as a condition, against vectors that the published iTARFlow computed."""

import math

import pytest
import torch
from golden_model import golden_flow, golden_vectors, settings

from tarflow_dist.flow.denoise import Denoising, denoise_in_steps
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import Solver
from tarflow_dist.models.tarflow import TarFlow

CASE = "itarflow"
REVERSES = settings(CASE)["reverse"]
# whose published code broadcasts wrongly: the first sample's variances weigh the means of all
BROADCAST = "gaussian_top_block"
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.fixture(params=list(DTYPES), ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=DTYPES[dtype])


@pytest.mark.parametrize(("prefix", "labels"), [("forward", "y"), ("forward_drop", "y_drop")])
def test_forward(prefix: str, labels: str, dtype: torch.dtype) -> None:
    flow, v = golden_flow(CASE, dtype), golden_vectors(CASE)
    per_block = []
    for block in flow.blocks:
        block.register_forward_hook(lambda module, args, output: per_block.append(output[0]))
    z, logdets = flow(v["x"].to(dtype), v[labels], v["sigma"])
    assert_close(z, v[f"{prefix}.z"], dtype)
    assert_close(logdets.sum(0) / flow.num_dims, v[f"{prefix}.logdet_per_dim"], dtype)
    if prefix == "forward":
        for t, output in enumerate(per_block):
            assert_close(output, v[f"forward.block{t}"], dtype)
        weight = v["sigma"].to(dtype)
        assert_close(flow.loss(z, logdets, weight).reshape(1), v["forward.loss_weighted"], dtype)
        assert_close(flow.loss(z, logdets).reshape(1), v["forward.loss_unweighted"], dtype)


@pytest.mark.parametrize("label", REVERSES)
def test_reverse(label: str, dtype: torch.dtype) -> None:
    flow, v = golden_flow(CASE, dtype), golden_vectors(CASE)
    x = flow.decode(v["noise"].to(dtype), v["y"], **REVERSES[label])
    alike = slice(1) if label == BROADCAST else slice(None)
    assert_close(x[alike], v[f"reverse.{label}"][alike], dtype)


def test_the_gaussian_rule_as_it_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other samples of that vector are, which ours are not: a sample depends on no
    other."""

    def combine(
        self: Guidance, mu: torch.Tensor, alpha: torch.Tensor, *_: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (mu, mu_unguided), (alpha, alpha_unguided) = mu.chunk(2), alpha.chunk(2)
        w, s = self.weight, (2 * (alpha - alpha_unguided)).exp().clamp(max=1)
        precision = 1 + w - w * s
        first = ((1 + w) * mu - w * s[:1] * mu_unguided) / precision[:1]
        return first, alpha.exp() / precision.sqrt()

    monkeypatch.setattr(Guidance, "combine", combine)
    flow, v = golden_flow(CASE, torch.float64), golden_vectors(CASE)
    x = flow.decode(v["noise"], v["y"], **REVERSES[BROADCAST])
    assert_close(x, v[f"reverse.{BROADCAST}"], torch.float64)


@pytest.mark.parametrize("label", REVERSES)
def test_reverse_in_windows(label: str) -> None:
    flow, v = golden_flow(CASE, torch.float64), golden_vectors(CASE)
    solvers = [Solver(4, 1e-11), Solver(), Solver(1000, 1e-11)]
    x = flow.decode(v["noise"], v["y"], **REVERSES[label], solvers=solvers)
    alike = slice(1) if label == BROADCAST else slice(None)
    expected = v[f"reverse.{label}"][alike]
    torch.testing.assert_close(x[alike], expected, rtol=0, atol=1e-9)


def test_denoise(dtype: torch.dtype) -> None:
    flow, v = golden_flow(CASE, dtype), golden_vectors(CASE)
    x, y = v["denoise.start"].to(dtype), v["y"]
    assert_close(flow.denoise(x, y, sigma=0.3), v["denoise.score_at_t1"], dtype)
    assert_close(flow.denoise(x, y, steps=4), v["denoise.steps4"], dtype)
    assert_close(flow.denoise(x, y, steps=4, clip=True), v["denoise.steps4_clipped"], dtype)
    assert_close(flow.denoise(x, y), v["denoise.default_steps"], dtype)


def test_training_losses(dtype: torch.dtype) -> None:
    flow, v = golden_flow(CASE, dtype), golden_vectors(CASE)
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    losses = []
    for _ in range(6):
        loss = flow.loss(*flow(v["x"].to(dtype), v["y_drop"], v["sigma"]), v["sigma"].to(dtype))
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(torch.stack(losses), v["train.losses"], dtype)


def test_noise_levels_are_asked_for_where_they_are_a_condition() -> None:
    flow, plain = golden_flow(CASE, torch.float64), golden_flow("cond", torch.float64)
    x, y = golden_vectors(CASE)["x"], golden_vectors(CASE)["y"]
    with pytest.raises(ValueError, match=r"give sigma, the std of .* from 0\.01 to 0\.3"):
        flow.encode(x, y)
    with pytest.raises(ValueError, match="5 of them, one an image; got"):
        flow.log_prob(x, y, sigma=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="a number above 0"):
        flow.denoise(x, y, sigma=0)
    with pytest.raises(ValueError, match="steps is 0"):
        flow.denoise(x, y, steps=0)
    with pytest.raises(ValueError, match="order is 3"):
        flow.denoise(x, y, order=3)
    with pytest.raises(ValueError, match="stochastic steps are of order 1"):
        flow.denoise(x, y, order=2, normal=lambda step: x)
    with pytest.raises(ValueError, match="leave them out, or sigma"):
        flow.denoise(x, y, sigma=0.1, steps=3)
    own = golden_vectors("cond")
    with pytest.raises(ValueError, match="leave sigma out"):
        plain.log_prob(own["x"], own["y"], sigma=0.1)
    with pytest.raises(ValueError, match="leave them out"):
        plain.denoise(own["x"], own["y"], clip=True)


def test_one_level_for_all_is_the_same_as_each_of_its_own() -> None:
    flow, v = golden_flow(CASE, torch.float64), golden_vectors(CASE)
    x, y = v["x"], v["y"]
    one = flow.log_prob(x, y, sigma=0.2)
    assert torch.equal(flow.log_prob(x, y, sigma=torch.full((5,), 0.2, dtype=torch.float64)), one)
    assert (flow.log_prob(x, y, sigma=0.1) - one).abs().min() > 1e-3
    z = flow.encode(x, y, sigma=v["sigma"])
    assert (flow.decode(z, y, sigma=v["sigma"]) - x).abs().max() < 1e-9


def test_stochastic_steps_keep_the_noise_at_its_level() -> None:
    """Of images that are all one colour a, x̂ = a is the best answer: x then stays a + σ·ε."""
    levels, a = [0.5, 0.3, 0.1], 0.25
    seen = []

    def score_step(x: torch.Tensor, sigma: float) -> torch.Tensor:
        seen.append(float((x - a).std()))
        return torch.full_like(x, a)

    torch.manual_seed(0)
    x = a + levels[0] * torch.randn(10, 3, 64, 64)
    normal = lambda step: torch.randn(10, 3, 64, 64)  # noqa: E731
    x = denoise_in_steps(score_step, x, levels, clip=False, normal=normal)
    assert seen == pytest.approx(levels, rel=0.02)
    assert torch.equal(x, torch.full_like(x, a))


def test_the_error_of_order_2_falls_with_the_square_of_the_steps() -> None:
    """Of images that are N(0, s²) in each pixel, x̂ = x·s²/(s² + σ²), and the way down leads to
    x·√((s² + σ_min²)/(s² + σ_max²)), less the noise of σ_min, which the last step takes off."""
    s, least, largest = 0.5, 0.02, 0.8

    def score_step(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * s**2 / (s**2 + sigma**2)

    def error(order: int, steps: int) -> float:
        start = torch.ones(1, dtype=torch.float64)
        levels = Denoising(order=order).levels(least, largest, steps)
        assert (levels[0], levels[-1], len(levels)) == pytest.approx((largest, least, steps))
        x = denoise_in_steps(score_step, start, levels, clip=False, order=order)
        exact = score_step(start * math.sqrt((s**2 + least**2) / (s**2 + largest**2)), least)
        return float((x - exact).abs())

    for order in (1, 2):
        ratio = error(order, 40) / error(order, 80)
        assert 0.9 * 2**order < ratio < 1.2 * 2**order
    assert error(2, 7) < error(1, 20)


def a_sampler() -> TarFlow:
    flow = golden_flow(CASE, torch.float64)
    sampler = TarFlow(**flow.config.to_json()).double()
    sampler.load_state_dict(flow.state_dict())
    return sampler.requires_grad_(False)


def test_samples_are_decoded_at_the_largest_level_and_denoised_in_steps() -> None:
    flow, y = a_sampler(), golden_vectors(CASE)["y"]
    index = torch.arange(len(y))
    x = flow.decode(flow.noise_of(index, seed=3), y, sigma=0.3)
    for sigma, lower in [(0.3, 0.155), (0.155, 0.01), (0.01, 0.0)]:
        part = x.requires_grad_()
        score = torch.autograd.grad(flow.log_prob(part, y, sigma).sum(), part)[0]
        clean = (x + sigma**2 * score).detach().clamp(-1, 1)
        x = clean + lower / sigma * (x.detach() - clean)
    expected = ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    images = flow.sample(y, seed=3, denoise_steps=3, denoise_clip=True)
    assert (images - expected).abs().max() <= 1
    assert (images == expected).double().mean() > 0.999


def test_noise_added_on_the_way_belongs_to_the_sample() -> None:
    flow, y = a_sampler(), golden_vectors(CASE)["y"]
    stochastic = flow.sample(y, denoise_steps=4, denoise_stochastic=True)
    part = flow.sample(y[2:4], index=torch.tensor([2, 3]), denoise_steps=4, denoise_stochastic=True)
    assert torch.equal(part, stochastic[2:4])
    assert not torch.equal(flow.sample(y, denoise_steps=4), stochastic)
