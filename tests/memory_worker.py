"""Run by test_plan.py: trains a small flow through the engine as rank 0 of some ranks, for each
cell of settings, and prints as JSON lines the bytes that the CPU allocator handed out. The other
ranks are pretended: when a thread of gloo's lets go of a bucket is chance, and hidden from the
profiler."""

import gc
import json
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from tarflow_dist import config_file as configs
from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.flow.model import Flow
from tarflow_dist.training.engine import Engine

BUCKETS = (2 * 500_000_000, 4 * 500_000_000)  # DeepSpeed's, far larger than the model


def live_bytes() -> int:
    """Bytes of all tensors that Python knows, but for DeepSpeed's buckets."""
    gc.collect()
    storages = {}
    warnings.simplefilter("ignore")
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in storages.values() if size not in BUCKETS)


def peak_bytes(events: Any, name: str) -> int:
    """The largest sum of allocations less releases, counted from the beginning of the profile,
    during the event `name`."""
    (span,) = (e for e in events if e.name() == name)
    begin, end = span.start_ns(), span.start_ns() + span.duration_ns()
    peak, live = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        if begin <= event.start_ns() <= end:
            peak = max(peak, live)
    return peak


def step(engine: Engine, config: Config, micro: int) -> None:
    flow = engine.flow
    for _ in range(engine.accumulation_steps):
        loss = flow.loss(*engine(torch.randn(micro, *flow.image_shape), None))
        engine.backward(loss)
        engine.step(lr=1e-3, ema_decay=0.9)


def measure(config: Config) -> dict[str, int]:
    micro = config.micro_batch(distributed.world_size())
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine = Engine(Flow(**config.model.to_json()), config, micro)
        step(engine, config, micro)
        gc.collect()
        with record_function("measured step"):
            step(engine, config, micro)
    return {
        "states": live_bytes() - before,
        "peak": peak_bytes(profiled.profiler.kineto_results.events(), "measured step"),
        "checkpoint": 4 * sum(p.shape.numel() * len(p.values) for p in engine.pieces()),
    }


def train(ranks: int, config: Config) -> None:
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    print(json.dumps(measure(config)), flush=True)


def main(ranks: str, config_file: str, *cells: str) -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # imports once, and nothing left of other cells
    for cell in cells:
        config = configs.load(Path(config_file), cell.split())
        process = context.Process(target=train, args=(int(ranks), config))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"failed: {cell}")


if __name__ == "__main__":
    main(*sys.argv[1:])
