"""Run by test_plan.py: trains a small flow on some ranks through the engine, for each cell of
settings, and prints as JSON lines the bytes that rank 0's CPU allocator handed out."""

import gc
import json
import multiprocessing
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tarflow_dist import config as configs
from tarflow_dist import distributed
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


def peak_bytes(events: Any, start: str) -> int:
    """The largest sum of allocations less releases from the first event named `start` on, counted
    from the beginning of the profile."""
    begin = next(event.start_ns() for event in events if event.name() == start)
    live, peak = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, live)
    return peak


def step(engine: Engine, config: configs.Config, micro: int) -> None:
    flow = engine.flow
    for _ in range(engine.accumulation_steps):
        loss = flow.loss(*engine(torch.randn(micro, *flow.image_shape), None))
        engine.backward(loss)
        engine.step(lr=1e-3, ema_decay=0.9)


def measure(config: configs.Config) -> dict[str, int]:
    micro = config.micro_batch(distributed.world_size())
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine = Engine(Flow(**config.model.model_dump()), config, micro)
        step(engine, config, micro)
        gc.collect()
        with record_function("second step"):
            step(engine, config, micro)
    return {
        "states": live_bytes() - before,
        "peak": peak_bytes(profiled.profiler.kineto_results.events(), "second step"),
        "checkpoint": 4 * sum(size for _, size, _ in engine.tensors()),
    }


def train(rank: int, ranks: int, port: int, config: configs.Config) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    distributed.init()
    measured = measure(config)
    if distributed.is_main():
        print(json.dumps(measured), flush=True)
    distributed.shutdown()


def main(ranks: str, config_file: str, *cells: str) -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # imports once, and nothing left of other cells
    for cell in cells:
        config = configs.load(Path(config_file), cell.split())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = [
            context.Process(target=train, args=(rank, int(ranks), port, config))
            for rank in range(int(ranks))
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"failed: {cell}")


if __name__ == "__main__":
    main(*sys.argv[1:])
