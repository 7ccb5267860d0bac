"""Inversion in windows against the sequential one, and guidance against its definition."""

import copy
import math
import random
from collections.abc import Callable, Sequence

import plain_kernels
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Normal

from tarflow_dist.flow import cuda_graphs as graphs
from tarflow_dist.flow import inverse
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import Solver, Windows
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.predictor import Predictor, guided_condition


def random_flow(chance: random.Random, **changes: object) -> Flow:
    """A small float64 flow of random size, whose weights are all random."""
    torch.manual_seed(chance.randrange(1000))
    sizes = {
        "image_size": 2 * chance.randint(2, 4),
        "patch_size": 2,
        "in_channels": chance.randint(1, 3),
        "width": 16,
        "head_dim": 8,
        "num_blocks": chance.randint(1, 3),
        "layers_per_block": chance.randint(1, 2),
        "num_classes": chance.choice([0, 4]),
        "volume_preserving": chance.random() < 0.25,
        "sigma": 0.1,
        **changes,
    }
    flow = Flow(**sizes).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        flow.var.uniform_(0.5, 2.0)
    return flow


def random_solver(chance: random.Random, tolerance: float) -> Solver:
    return Solver(chance.randint(1, 20), chance.choice([0.0, tolerance]))


def random_case(seed: int) -> tuple[Flow, torch.Tensor, torch.Tensor | None, dict, list[Solver]]:
    chance = random.Random(seed)
    flow = random_flow(chance)
    batch = chance.randint(1, 4)
    z = torch.randn(batch, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    y = torch.randint(-1, 4, (batch,)) if flow.num_classes else None
    arguments: dict = {}
    if chance.random() < 0.75:
        arguments = {
            "guidance": chance.uniform(0.1, 2),
            "annealed": chance.random() < 0.5,
            "guide": chance.choice(["both", "mu"]),
            "attn_temp": chance.choice([0.7, 1.5] if y is None else [1.0, 0.7, 1.5]),
            "rule": chance.choice(["linear", "gaussian"]),
            "guide_blocks": chance.choice([None, [0]]),
        }
    solvers = [random_solver(chance, 1e-10) for _ in flow.blocks]
    return flow, z, y, arguments, solvers


@pytest.mark.parametrize("seed", range(30))
def test_windows_give_what_the_sequential_inverse_gives(seed: int) -> None:
    flow, z, y, arguments, solvers = random_case(seed)
    expected = flow.decode(z, y, **arguments)
    x = flow.decode(z, y, **arguments, solvers=solvers)
    scale = max(1.0, float(expected.abs().max()))
    assert (x - expected).abs().max() < 1e-8 * scale


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list:
    """The road of a GPU but for the recording and its kernels, which need one: all that is recorded
    comes here."""
    recorded = []

    def record(work: Callable[[], None], changes: Sequence[torch.Tensor]) -> Callable[[], None]:
        before = [tensor.clone() for tensor in changes]
        work()  # as it is warmed up
        for tensor, was in zip(changes, before, strict=True):
            tensor.copy_(was)
        recorded.append(work)
        return work

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(inverse, "has_graphs", lambda device: True)
    for kernel, here in plain_kernels.KERNELS.items():
        monkeypatch.setattr(f"tarflow_dist.flow.triton_kernels.{kernel}", here)
    return recorded


@pytest.mark.parametrize("seed", range(30, 45))
def test_what_a_gpu_repeats_is_the_sequential_inverse(
    seed: int, recorded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, z, y, arguments, solvers = random_case(seed)
    with monkeypatch.context() as without:
        without.setattr(inverse, "has_graphs", lambda device: False)
        expected = flow.decode(z, y, **arguments)
    bound = max(1.0, float(expected.abs().max()))
    assert (flow.decode(z, y, **arguments) - expected).abs().max() < 1e-10 * bound
    x = flow.decode(z, y, **arguments, solvers=solvers)
    assert (x - expected).abs().max() < 1e-8 * bound


def test_windows_are_recorded_once(recorded: list) -> None:
    """A graph for each eighth of the sequence; what others left in the cache is never seen."""
    flow = random_flow(random.Random(5), image_size=12, num_classes=0, num_blocks=2)
    solvers = [Solver(8, 1e-9)] * 2
    z = torch.randn(3, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    flow.decode(z * math.nan)
    count = len(recorded)
    x = flow.decode(z, solvers=solvers)
    assert (flow.encode(x) - z).abs().max() < 1e-6
    assert count < len(recorded) <= count + 2 * graphs.CACHE_LENGTHS
    count = len(recorded)
    flow.decode(z * math.nan, solvers=solvers)
    assert torch.equal(flow.decode(z, solvers=solvers), x)
    assert len(recorded) == count
    flow.decode(z, solvers=[Solver(8, 1e-3)] * 2)
    assert len(recorded) > count


def test_a_block_is_recorded_once(recorded: list) -> None:
    """For other latents, labels and values of weights; anew for another batch, guidance or type, of
    which the last alone is kept; a copy of the model records its own."""
    flow = random_flow(random.Random(1), num_blocks=2, num_classes=4)

    def new_recordings(batch: int, which: Flow = flow, **arguments: object) -> int:
        z = torch.randn(batch, flow.num_patches, flow.patch_dim, dtype=torch.float64)
        y = torch.randint(-1, 4, (batch,))
        before = len(recorded)
        x = which.decode(z, y, **arguments)
        assert (which.encode(x, y) - z).abs().max() < 1e-8 or arguments
        return len(recorded) - before

    assert new_recordings(3) == 2
    assert new_recordings(3) == 0
    with torch.no_grad():
        flow.blocks[0].pos_embed.add_(0.1)
        flow.blocks[1].pos_embed.add_(0.1)
    assert new_recordings(3) == 0
    assert new_recordings(2) == 2
    assert new_recordings(3) == 2
    assert new_recordings(3, guidance=1.0, guide_blocks=[0]) == 1
    assert new_recordings(3, guidance=1.0, guide_blocks=[0]) == 1  # of block 1, in the longer cache
    assert new_recordings(3, guidance=1.0, guide_blocks=[0]) == 0
    assert new_recordings(3, copy.deepcopy(flow)) == 2
    flow.float().double()  # its weights lie elsewhere
    assert new_recordings(3) == 2


def test_what_is_recorded_in_inference_mode_serves_outside(recorded: list) -> None:
    flow = random_flow(random.Random(2), num_classes=4)
    z = torch.randn(2, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    with torch.inference_mode():
        inside = flow.decode(z, [1, 2], guidance=1.0)
    count = len(recorded)
    assert torch.equal(flow.decode(z, [1, 2], guidance=1.0), inside)
    assert len(recorded) == count


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(),
        Guidance(2.0, annealed=True),
        Guidance(2.0, annealed=True, rule="gaussian"),
        Guidance(1.0, guide="mu", attn_temp=0.7),
    ],
)
def test_a_sweep_on_a_gpu_never_waits_for_the_host(
    guidance: Guidance, window: int, dtype: torch.dtype
) -> None:
    """So it can be recorded. Tensors without values stand for those of a GPU: asking for a value or
    mixing devices is an error."""
    with torch.no_grad(), FakeTensorMode(), torch.device("cuda"):
        block = FlowBlock(
            num_patches=16,
            patch_dim=3,
            width=16,
            num_layers=2,
            head_dim=8,
            num_classes=4,
            reverse=True,
            volume_preserving=False,
        )
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(dtype)))
        x, z = torch.randn(2, 3, 16, 3)
        condition = guided_condition(block, torch.arange(3), None, guidance)
        predict = Predictor(block, condition, len(x), guidance)
        windows = Windows(predict, z, x, Solver(window, 1e-3))
        windows.sweep(8)
        with pytest.raises(DataDependentOutputException):
            windows.settled.max().item()


def test_a_coarse_tolerance_stops_early_and_is_kept() -> None:
    flow = random_flow(random.Random(3), image_size=16, num_blocks=1, layers_per_block=1)
    block = flow.blocks[0]
    tokens = []
    block.attn_blocks[0].mlp.register_forward_hook(lambda m, a, out: tokens.append(out.shape[1]))
    z = torch.randn(2, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    swept = {}
    for tolerance in (0.0, 1e-9, 1e-4):
        tokens.clear()
        x = flow.decode(z, solvers=[Solver(64, tolerance)])
        swept[tolerance] = sum(tokens)
        assert (x - flow.decode(z)).abs().max() <= 10 * tolerance + 1e-12
    assert swept[1e-4] < swept[1e-9] < swept[0.0] == 63 * 63


def test_a_sample_stops_by_itself_alone() -> None:
    """One that converges at once is the same beside one that needs many sweeps."""
    flow = random_flow(random.Random(5), image_size=12, num_classes=0)
    easy, hard = torch.randn(2, 1, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    solvers = [Solver(35, 1e-2)] * len(flow.blocks)
    beside_itself = flow.decode(torch.cat([easy, easy]), solvers=solvers)
    beside_another = flow.decode(torch.cat([easy, 5 * hard]), solvers=solvers)
    assert (beside_another[0] - beside_itself[0]).abs().max() < 1e-12


def test_guesses_that_overflow_do_not_reach_the_answer() -> None:
    """α is so steep in x that the first sweeps overflow, where the answer itself is finite."""
    flow = random_flow(random.Random(7), image_size=12, num_blocks=1, volume_preserving=False)
    with torch.no_grad():
        flow.blocks[0].proj_out.weight.mul_(4)
    generator = torch.Generator().manual_seed(0)
    shape = (3, flow.num_patches, flow.patch_dim)
    z = 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    expected = flow.decode(z)
    assert expected.isfinite().all()
    for window in (4, 100):
        x = flow.decode(z, solvers=[Solver(window, 1e-10)])
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-8)


def test_an_answer_that_runs_away_stays() -> None:
    """At the end of the sequence too, where it stands in a window more than once: it is for whoever
    draws to see, and to draw again."""
    flow = random_flow(random.Random(3), image_size=8, num_blocks=1, volume_preserving=False)
    (block,) = flow.blocks
    with torch.no_grad():
        block.pos_embed[-2, 0] = 1e3  # seen by the last patch's predecessor
        block.proj_out.weight[: flow.patch_dim, 0] += 0.05
    z = torch.randn(2, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    y = torch.tensor([0, -1]) if flow.num_classes else None
    expected = flow.decode(z, y)
    assert expected.abs().max() > 1e10
    for window in (4, 8):
        x = flow.decode(z, y, solvers=[Solver(window, 1e-3)])
        assert x.abs().max() == pytest.approx(float(expected.abs().max()), rel=0.1)


def test_the_gaussian_rule_multiplies_densities() -> None:
    """p_c^(1+w) · p_u^(−w) up to a constant, wherever the unguided density is the wider."""
    mu, alpha = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    alpha[1] = alpha[0] + alpha[1].abs()
    guided_mu, guided_scale = Guidance(1.7, rule="gaussian").combine(
        mu.flatten(0, 0), alpha.flatten(0, 0), 1, 6
    )
    c, u = (Normal(mu[i], alpha[i].exp()) for i in (0, 1))
    guided = Normal(guided_mu[0], guided_scale[0])
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    constant = 2.7 * c.log_prob(x) - 1.7 * u.log_prob(x) - guided.log_prob(x)
    assert (constant - constant[:1]).abs().max() < 1e-10


def test_the_gaussian_rule_where_the_unguided_density_is_narrower() -> None:
    """It is held to the conditional's width, and only the mean moves."""
    mu = torch.tensor([[[1.0]], [[0.5]]])
    alpha = torch.tensor([[[0.0]], [[-1.0]]])
    guided_mu, guided_scale = Guidance(2.0, rule="gaussian").combine(mu, alpha, 1, 2)
    assert float(guided_mu) == pytest.approx(3 * 1.0 - 2 * 0.5)
    assert float(guided_scale) == pytest.approx(1.0)


def test_only_the_blocks_named_are_guided() -> None:
    flow = random_flow(random.Random(1), num_blocks=2, num_classes=4)
    z = torch.randn(2, flow.num_patches, flow.patch_dim, dtype=torch.float64)
    y = torch.tensor([0, 3])
    steps: dict[str, list[torch.Tensor]] = {"guided": [], "none": [], "first": []}
    flow.decode(z, y, guidance=1.0, on_block=steps["guided"].append)
    flow.decode(z, y, on_block=steps["none"].append)
    flow.decode(z, y, guidance=1.0, guide_blocks=[0], on_block=steps["first"].append)
    assert torch.equal(steps["first"][0], steps["none"][0])  # block 1 comes first
    assert not torch.equal(steps["first"][1], steps["none"][1])
    assert not torch.equal(steps["first"][1], steps["guided"][1])


def test_denoising_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = random_flow(random.Random(2), num_classes=4)
    x = torch.rand(5, *flow.image_shape, dtype=torch.float64)
    y = torch.tensor([0, 1, -1, 2, 3])
    whole = flow.denoise(x, y)
    monkeypatch.setattr("tarflow_dist.flow.model.DENOISE_MEMORY", 1)
    torch.testing.assert_close(flow.denoise(x, y), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": 2.5}, "window is 2.5"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
    ],
)
def test_solvers_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(**arguments)


@pytest.mark.parametrize(
    ("z_shape", "y", "arguments", "message"),
    [
        ((2, 9), None, {}, "latents have the shape"),
        ((2, 9, 5), None, {}, "latents have the shape"),
        ((2, 9, 4), [0], {}, "2 whole numbers, one a sample"),
        ((2, 9, 4), [0.0, 1.0], {}, "whole numbers"),
        ((2, 9, 4), [0, 4], {}, "labels must lie in"),
        ((2, 9, 4), [0, 1], {"guidance": 1.0, "guide_blocks": [2]}, "0 to 1"),
        ((2, 9, 4), [0, 1], {"guidance": 1.0, "rule": "cubic"}, "linear, gaussian"),
        ((2, 9, 4), [0, 1], {"guide_blocks": [0]}, "guidance above 0"),
        ((2, 9, 4), [0, 1], {"solvers": [Solver()]}, "1 solvers were given for 2 blocks"),
    ],
)
def test_what_decode_refuses(z_shape: tuple, y: list | None, arguments: dict, message: str) -> None:
    flow = random_flow(
        random.Random(0), image_size=6, in_channels=1, num_blocks=2, num_classes=4
    )  # fmt: skip
    labels = None if y is None else torch.tensor(y)
    with pytest.raises(ValueError, match=message):
        flow.decode(torch.zeros(z_shape), labels, **arguments)


def test_images_of_another_shape_are_refused() -> None:
    flow = random_flow(random.Random(0), image_size=6, in_channels=1)
    for shape in ((6, 6), (1, 3, 6, 6), (1, 1, 6, 8)):
        for method in (flow.encode, flow.log_prob, flow.denoise):
            with pytest.raises(ValueError, match=r"should have \(B, 1, 6, 6\)"):
                method(torch.zeros(shape))
