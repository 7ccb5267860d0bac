"""Training steps: speed beside the published step, memory beside `plan`'s, where the time goes."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.models import GIB, RECIPES, Bench, attempt, device_name
from benchmarks.slow_network import buckets
from benchmarks.train_step import Ours, Published, watching_cost
from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import find_card
from tarflow_dist.cost.memory import training_memory
from tarflow_dist.flow.flops import FlowCost
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.training import engine
from tarflow_dist.training.saver import Saver

VARIANTS = {
    "plain": [],
    "compiled": ["train.compile=true"],
    "checkpointing": ["train.activation_checkpointing=1"],
}
# ZeRO stage, every how many layers are recomputed, precision
LAYOUTS = ((1, 0, "bf16"), (2, 0, "bf16"), (3, 0, "bf16"), (2, 1, "bf16"), (0, 0, "bf16_autocast"))


def steps(bench: Bench) -> Iterator[dict[str, Any]]:
    """Images a second and MFU of two flow blocks, and of the published step."""
    for recipe in RECIPES[:1] if bench.tiny else RECIPES:
        for name, overrides in VARIANTS.items():
            if bench.tiny and name == "compiled":
                continue  # a minute of a laptop's, which the tests of the engine take already
            bench.free()
            config = bench.config(recipe, *overrides)
            yield {f"{recipe}, {name}": attempt(partial(speed, bench, config, ours))}
        if bench.published:
            bench.free()
            config = bench.config(recipe)
            yield {f"{recipe}, published": attempt(partial(speed, bench, config, published))}


def ours(bench: Bench, config: Config) -> Callable[[], None]:
    return started(bench, config).step


def started(bench: Bench, config: Config) -> Ours:
    device = torch.device(bench.device, 0) if bench.cuda else torch.device("cpu")
    if not torch.distributed.is_initialized():
        device = distributed.init()
    return Ours(config, device)


def published(bench: Bench, config: Config) -> Callable[[], None]:
    assert bench.published is not None
    return Published(config, torch.device(bench.device), bench.published).step


def speed(
    bench: Bench, config: Config, start: Callable[[Bench, Config], Callable[[], None]]
) -> dict[str, Any]:
    step = start(bench, config)
    first = bench.seconds(step)
    step()
    took = statistics.median(bench.seconds(step) for _ in range(1 if bench.tiny else 7))
    flops = FlowCost(config.model).training_flops * config.train.batch_size / took
    card = find_card(device_name(bench.device)) if bench.cuda else None
    return {
        "images/s": round(config.train.batch_size / took, 2),
        "milliseconds": round(1e3 * took, 2),
        "first": round(first, 2),
        "TFLOP/s": round(flops / 1e12, 3),
        "MFU": round(flops / card.bf16_flops, 4) if card else None,
        "peak_gib": bench.peak_gib(),
    }


def memory(bench: Bench) -> Iterator[dict[str, Any]]:
    """Peak of a training step beside what `plan` says."""
    for stage, every, precision in LAYOUTS[:1] if bench.tiny else LAYOUTS:
        bench.free()
        settings = [f"train.zero_stage={stage}", f"train.activation_checkpointing={every}"]
        config = bench.config("in64", *settings, f"train.precision={precision}")
        key = f"ZeRO {stage}, {precision}, recomputing {'every layer' if every else 'none'}"
        yield {key: attempt(partial(peak_and_plan, bench, config))}


def peak_and_plan(bench: Bench, config: Config) -> dict[str, float]:
    before = torch.cuda.memory_allocated() / GIB if bench.cuda else 0.0
    step = ours(bench, config)
    step()
    step()
    planned = training_memory(config, 1, config.train.batch_size)
    measured = bench.peak_gib() - before
    return {"gib": round(measured, 3), "planned": round(planned.peak / GIB, 3)}


def overlap(bench: Bench) -> Iterator[dict[str, Any]]:
    """ZeRO 1 and 2, whose buckets travel beside the computing: the losses of ZeRO 0, and steps that
    wait for each bucket at once."""
    if bench.tiny:
        engine.BUCKET = 20_000  # several, of so small a model
    losses: list[float] = []
    for stage in (0, 1, 2):
        bench.free()
        settings = [f"train.zero_stage={stage}", "train.precision=fp32"]
        config = bench.config("in64", *settings, "optimizer.lr=1e-4")
        yield {f"ZeRO {stage}": attempt(partial(overlapped, bench, config, losses))}


def overlapped(bench: Bench, config: Config, losses: list[float]) -> dict[str, Any]:
    """`losses` are those of ZeRO 0, which comes first."""
    run, own = started(bench, config), []
    for _ in range(4 if bench.tiny else 10):
        run.step()
        own.append(run.stepper.figures()["loss"])
    losses += [] if losses else own
    difference = max(abs(a - b) for a, b in zip(own, losses, strict=True))
    found: dict[str, Any] = {"difference": difference, "within": difference < 1e-5}
    for name, at_once in (("beside", False), ("at once", True)):
        with buckets(at_once=at_once) as waits:
            took = [bench.seconds(run.step) for _ in range(2 if bench.tiny else 7)]
        found |= {f"{name}, milliseconds": round(1e3 * statistics.median(took), 2)}
        found |= {f"{name}, waits": waits.count // len(took)}
        found |= {f"{name}, host waits": round(1e3 * waits.seconds / len(took), 3)}
    return found


def profiles(bench: Bench) -> Iterator[dict[str, Any]]:
    """The kernels that take most of a decoding and of a step, and the share of idle time."""
    flow = bench.flow("in64", blocks=1)
    for batch in (1,) if bench.tiny else (1, 64):
        index = torch.arange(batch, device=flow.device)
        z, y = flow.noise_of(index, seed=1), index % flow.num_classes
        decode = partial(flow.decode, z, y, **Guidance(1.5).arguments())
        decode()
        yield {f"decode, batch {batch}": attempt(partial(busiest, bench, decode))}
    run = started(bench, bench.config("in64"))
    run.step()
    yield {"step": attempt(partial(busiest, bench, run.step))}
    yield {"gradients watched": attempt(partial(watched, bench, run))}


def watched(bench: Bench, run: Ours) -> dict[str, float]:
    cost = watching_cost(run, torch.device(bench.device), repeats=1 if bench.tiny else 7)
    return {"of a step": round(cost, 4)}


def busiest(bench: Bench, work: Callable[[], Any]) -> dict[str, Any]:
    activity = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    cost = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    plain = bench.seconds(work)
    with profile(activities=[activity]) as seen:
        work()
        bench.wait()
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, cost))
    busy = sum(getattr(event, cost) for event in events) / 1e6
    return {
        "seconds": round(plain, 4),
        "idle": round(1 - min(1.0, busy / plain), 3),
        "kernels": sum(event.count for event in events),
        "most": [[e.key[:80], round(getattr(e, cost) / 1e3, 2), e.count] for e in events[:8]],
    }


def checkpoint_stall(bench: Bench) -> Iterator[dict[str, Any]]:
    """Seconds that training stands still for a checkpoint, and that the rest of it is written."""
    config = bench.config("in64")
    run = started(bench, config)
    run.step()
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), config.checkpoint, run.engine.flow.config)
        still = bench.seconds(lambda: saver.save(run.engine.pieces(), run.state))
        written = bench.seconds(saver.publish)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    yield {"checkpoint": {"still": round(still, 3), "written": round(written, 3), "bytes": size}}
