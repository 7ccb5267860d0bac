"""Costs against the built model and torch's counters, memory against what training allocates."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, run
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tarflow_dist import config_file as configs
from tarflow_dist.cost import network as networks
from tarflow_dist.cost.cards import CARDS, card, find_card
from tarflow_dist.cost.estimate import Estimate, estimate, fitting_micro_batch
from tarflow_dist.cost.memory import image_activations
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.flow.flops import FlowCost
from tarflow_dist.flow.model import Flow

HERE = Path(__file__).parent
DIGITS = ROOT / "configs" / "digits.yaml"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
BASE = {
    "image_size": 16,
    "patch_size": 4,
    "width": 64,
    "head_dim": 32,
    "num_blocks": 3,
    "layers_per_block": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "unconditional": BASE | {"sigma": 0.1},
    "conditional": BASE | {"sigma": 0.1, "num_classes": 5},
    "volume-preserving": BASE | {"sigma": 0.1, "volume_preserving": True},
    "grey, uniform noise": BASE | {"in_channels": 1, "noise": "uniform"},
    "deep-shallow": BASE | {"sigma": 0.1, "layers_per_block": [1, 1, 4]},
}
BATCH = 2
models = pytest.mark.parametrize("sizes", MODELS.values(), ids=list(MODELS))


def batch(flow: Flow) -> tuple[Tensor, Tensor | None]:
    y = torch.tensor([-1, 2]) if flow.num_classes else None
    return torch.randn(BATCH, *flow.image_shape), y


def causal_flops(work: Callable[[], object], num_patches: int) -> float:
    """Operations of `work`, as torch counts them, but for attention. There torch counts all N²
    pairs of patches, and in the backward pass five products, one of them the scores once more."""
    with FlopCounterMode(display=False) as counter:
        work()
    total = 0.0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if "attention" in str(operation):
            flops *= (num_patches + 1) / (2 * num_patches)
            flops *= 4 / 5 if "backward" in str(operation) else 1
        total += flops
    return total


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parameters_of_the_recipes_are_exact(path: Path) -> None:
    sizes = configs.load(path).model.to_json()
    with torch.device("meta"):
        flow = Flow(**sizes)
    counted = FlowCost(FlowConfig(**sizes))
    assert counted.parameters == {name: p.numel() for name, p in flow.named_parameters()}
    assert counted.num_patches * counted.config.patch_dim == flow.num_dims


@models
def test_parameters_and_flops_are_exact(sizes: dict[str, Any]) -> None:
    flow = Flow(**sizes)
    counted = FlowCost(flow.config)
    assert counted.num_parameters == sum(p.numel() for p in flow.parameters())
    x, y = batch(flow)

    def flops(work: Callable[[], object]) -> float:
        return causal_flops(work, flow.num_patches) / BATCH

    assert flops(lambda: flow(x, y)) == counted.forward_flops
    assert flops(lambda: flow.loss(*flow(x, y)).backward()) == counted.training_flops
    # the score: a gradient for the images alone
    flow.requires_grad_(False)
    x.requires_grad_()
    assert flops(lambda: flow.loss(*flow(x, y)).backward()) == counted.denoising_flops


def test_flops_of_recomputation_are_exact() -> None:
    flow = Flow(**MODELS["unconditional"])
    counted = FlowCost(flow.config)
    checkpoint_layers(flow, every=2)
    x, _ = batch(flow)
    flops = causal_flops(lambda: flow.loss(*flow(x)).backward(), flow.num_patches) / BATCH
    assert flops == counted.training_flops + 3 * counted.recomputed_layer_flops


def test_cost_of_guided_samples_is_what_decoding_does() -> None:
    config = configs.load(DIGITS, ["model.width=128"])
    flow = Flow(**config.model.to_json()).double()  # by torch's operations, which are counted
    counted = FlowCost(flow.config)
    sampling = estimate(config, card("h100"), 1, mfu=0.5).sampling
    z = torch.randn(BATCH, flow.num_patches, flow.patch_dim)
    with FlopCounterMode(display=False) as counter:
        flow.decode(z, torch.tensor([1, 2]), guidance=1.5)
    decoding = {str(name): n / BATCH for name, n in counter.get_flop_counts()["Global"].items()}
    assert sum(decoding.values()) == sampling.flops - counted.denoising_flops
    attention = sum(n for name, n in decoding.items() if "attention" in name)
    # a query meets each cached key, and each cached value, in one multiply-add a number of 2 bytes
    assert sampling.cache_bytes == attention / 2 * 2


def checkpoint_layers(flow: Flow, every: int) -> None:
    layers = [layer for block in flow.blocks for layer in block.attn_blocks]  # type: ignore[union-attr]
    for layer in layers[every - 1 :: every]:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_activations_are_what_the_allocator_holds(precision: Any, every: int) -> None:
    sizes = BASE | {"image_size": 32, "sigma": 0.1}  # longer sequences, so that little is constant
    flow = Flow(**sizes).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    flow.var = flow.var.float()
    if every:
        checkpoint_layers(flow, every)
    x = torch.randn(16, *flow.image_shape)
    gc.collect()  # or what earlier tests left would be released in between
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        loss = flow.loss(*flow(x))
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = sum(event.nbytes() for event in events)
    loss.backward()
    counted = FlowCost(flow.config)
    # the share of the layer at work in the backward pass is not held yet
    value = 4 if precision == "fp32" else 2
    at_work = 8 * value * counted.num_patches * counted.width
    if every:
        none, all_layers = (image_activations(counted, precision, k) for k in (0, 1))
        stream = (2 if precision == "bf16" else 4) * counted.num_patches * counted.width
        at_work += (none - all_layers + 6 * stream) / 5  # one layer's, of which 5 are saved
    expected = 16 * (image_activations(counted, precision, every) - at_work)
    expected += 2 * counted.num_parameters if precision == "bf16_autocast" else 0
    assert held == pytest.approx(expected, rel=0.03)


CELLS = {
    1: [
        "train.precision=fp32 train.zero_stage=1",
        "train.precision=bf16 train.zero_stage=1 train.activation_checkpointing=1",
    ],
    2: [
        "train.precision=bf16_autocast train.zero_stage=0",
        "train.precision=bf16 train.zero_stage=1 train.micro_batch_size=2",
        "train.precision=bf16 train.zero_stage=1 train.reduce_precision=bf16",
        "train.precision=bf16 train.zero_stage=2 train.micro_batch_size=2",
        "train.precision=bf16 train.zero_stage=3",
    ],
}
SMALL = (
    "data.path=none model.image_size=32 model.patch_size=4 model.in_channels=3 model.width=128 "
    "model.num_classes=0 train.label_drop=0 train.batch_size=8 "
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_what_training_allocates(ranks: int) -> None:
    cells = [SMALL + cell for cell in CELLS[ranks]]
    command = [sys.executable, HERE / "memory_worker.py", ranks, DIGITS, *cells]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(measured) == len(cells)
    for cell, seen in zip(cells, measured, strict=True):
        config = configs.load(DIGITS, cell.split())
        train = config.train
        whole = estimate(config, card("h100"), ranks, mfu=0.4)
        memory = whole.chosen.memory
        # between steps, only ZeRO 3 keeps gradients
        between = memory.states - (0 if train.zero_stage == 3 else memory.gradients)
        assert seen["states"] == pytest.approx(between, rel=0.03), cell
        if train.zero_stage < 3:  # where releases escape the profiler
            expected, found = memory.peak - memory.buffers, seen["peak"] - memory.buffers
            assert found == pytest.approx(expected, rel=0.03), cell
        assert seen["checkpoint"] == whole.checkpoint_bytes


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla V100-PCIE-32GB", "v100-32"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_cards_are_found_by_cudas_names(name: str, known: str) -> None:
    assert find_card(name) is CARDS[known]


def test_an_unknown_card_is_none() -> None:
    assert find_card("NVIDIA GH200 480GB") is None


def plan(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return run("tarflow_dist.plan", *arguments, check=False)


def test_the_command_prints_a_table_and_the_same_as_json() -> None:
    arguments = (ROOT / "configs" / "in256.yaml", "--nodes", 8, "train.activation_checkpointing=1")
    table, whole = plan(*arguments), plan(*arguments, "--json")
    assert (table.returncode, whole.returncode) == (0, 0)
    told = json.loads(whole.stdout)
    assert told["gpus"] == 64
    assert f"{told['parameters'] / 1e6:,.1f} M" in table.stdout
    assert [line for line in table.stdout.splitlines() if line.startswith("*")]
    assert sum(layout["chosen"] for layout in told["layouts"]) == 1


def test_a_run_that_cannot_fit_is_told_what_would() -> None:
    arguments = (ROOT / "configs" / "in256.yaml", "--gpu", "rtx4090", "train.micro_batch_size=96")
    done = plan(*arguments)
    assert done.returncode == 1
    assert "can't fit" in done.stderr
    advice = next(word for word in done.stderr.split() if word.startswith("train.micro_batch_size"))
    assert plan(*arguments, advice).returncode == 0
    assert plan(*arguments, "--memory", 1000).returncode == 0
    doubled = advice.replace("=", "=2*").split("2*")
    assert plan(*arguments, f"{doubled[0]}{2 * int(doubled[1])}").returncode == 1


@pytest.mark.parametrize("gib", [16, 24, 80])
def test_a_micro_batch_that_is_not_given_is_the_largest_that_fits(gib: int) -> None:
    gpu, file = replace(card("a10"), memory=gib << 30), ROOT / "configs" / "images64.yaml"

    def with_batch(*override: str) -> Estimate:
        return estimate(configs.load(file, override), gpu, 1, mfu=0.4)

    chosen = with_batch()
    size = chosen.micro_batch
    assert size == fitting_micro_batch(configs.load(file), gib << 30, 1)
    assert (size, chosen.passes) == {16: (64, 4), 24: (128, 2), 80: (256, 1)}[gib]
    assert with_batch(f"train.micro_batch_size={size}").chosen.fits
    if size < 256:
        assert not with_batch(f"train.micro_batch_size={2 * size}").chosen.fits


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpu", "h10"), "unknown GPU h10; did you mean h100?"),
        (("--mfu", "1.5"), "--mfu is 1.5"),
        (("--memory", "-2"), "--memory is -2"),
        (("--nodes", "0"), "--nodes and --gpus-per-node must be at least 1"),
        (("--network", "fast"), "the network fast is neither GB/s a node"),
        (("--network", "0x200"), "the network 0x200 is neither GB/s a node"),
        (("--gpus-per-node", "3"), "is not divisible by world size (3)"),
        (("model.widht=1",), "did you mean model.width?"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = plan(DIGITS, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def pipeline(ready: list[float], seconds: float) -> float:
    """When the last of some messages is through that are ready then, one after another."""
    end = 0.0
    for time in ready:
        end = max(end, time) + seconds
    return end


@pytest.mark.parametrize("gb_per_second", [1, 8, 20, 60, 400])
@pytest.mark.parametrize(("stage", "passes"), [(1, 1), (1, 2), (2, 2)])
def test_a_step_waits_as_messages_one_after_another_do(
    stage: Any, passes: int, gb_per_second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.load(
        ROOT / "configs" / "in256.yaml",
        [f"train.micro_batch_size={12 // passes}", f"train.zero_stage={stage}"],
    )
    counts, buckets = FlowCost(config.model), 8
    monkeypatch.setattr(networks, "BUCKET", counts.num_parameters / buckets)
    between = networks.network(str(gb_per_second))
    step = networks.training_step(config, card("h100"), between, 8, 0.5, nodes=8)
    flops = 0.5 * 989e12
    forward = 12 / passes * counts.forward_flops / flops
    backward = 12 / passes * (counts.training_flops - counts.forward_flops) / flops
    assert step.compute == pytest.approx(passes * (forward + backward))

    a_byte = 63 / 64 / (gb_per_second * 1e9)
    to_reduce, to_gather = (n * counts.num_parameters * a_byte / buckets for n in (4, 2))
    # a bucket is full after each eighth of the backward pass
    full = [(k + 1) * backward / buckets for k in range(buckets)]
    waited = (passes if stage == 2 else 1) * (pipeline(full, to_reduce) - backward)
    # each eighth of the forward pass begins when its weights are there
    there = [(k + 1) * to_gather for k in range(buckets)]
    waited += pipeline(there, forward / buckets) - forward
    assert step.waited == pytest.approx(waited)
    reductions = passes if stage == 2 else 1
    assert step.sent == pytest.approx((4 * reductions + 2) * counts.num_parameters)


@pytest.mark.parametrize(("name", "share"), [("8x400", 0.04), ("2x200", 0.15)])
def test_in256_on_8_nodes_waits_little(name: str, share: float) -> None:
    done = plan(ROOT / "configs" / "in256.yaml", "--nodes", 8, "--network", name, "--json")
    told = json.loads(done.stdout)["network"]
    step = told["advice"]["step"]
    assert step["waited"] / (step["compute"] + step["waited"]) < share
    assert [step["nodes"] for step in told["scaling"]] == [1, 2, 4, 8, 16, 32]
    assert told["scaling"][0]["waited"] == 0


def test_a_step_sends_in_as_many_passes_as_the_memory_asks_for() -> None:
    done = plan(ROOT / "configs" / "in256.yaml", "--nodes", 8, "--network", 45, "--json",
                "--memory", 24)  # fmt: skip
    told = json.loads(done.stdout)
    assert told["passes"] > 1
    sent = told["network"]["chosen"]["sent"]  # ZeRO 2 reduces after each pass
    assert sent == pytest.approx((4 * told["passes"] + 2) * told["parameters"])


def test_a_slow_network_gets_gradients_in_bf16() -> None:
    done = plan(ROOT / "configs" / "in256.yaml", "--nodes", 8, "--network", "2x100")
    assert "recommended     train.zero_stage=1 train.reduce_precision=bf16" in done.stdout
    assert "not on 64 nodes: train.batch_size 768 can't be cut" in done.stdout


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys\nfrom tarflow_dist import plan\nplan.main([sys.argv[1]])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(DIGITS)]).returncode == 0
