"""Run by test_pretended_cuda.py: training steps of the real engine on a pretended GPU, a ZeRO stage
a process. Writes the losses, and the waits of each step, as JSON.

    pretended_worker.py CONFIG OUT DEVICE OVERRIDE…
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pretended_cuda import FREE_MEMORY, TOTAL_MEMORY, CudaTensor, pretended_cuda

from tarflow_dist import config_file as configs
from tarflow_dist import distributed

STEPS = 3


class Stream(SimpleNamespace):
    """All work of the pretended card is done when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def alone(out: Any = None, source: Any = None, *args: Any, **kwargs: Any) -> Any:
    """all_gather and reduce_scatter of a single rank: a copy."""
    out = kwargs.get("output_tensor", kwargs.get("output", out))
    source = kwargs.get("input_tensor", kwargs.get("input", source))
    assert isinstance(out, CudaTensor) == isinstance(source, CudaTensor)
    out.view(-1)[: source.numel()].copy_(source.reshape(-1))
    work = SimpleNamespace(wait=lambda *a: True, is_completed=lambda: True)
    return work if kwargs.get("async_op") else None


def pretend(patches: contextlib.ExitStack) -> None:
    """What DeepSpeed asks of a card beyond `pretended_cuda`."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    stream = Stream()
    nothing = lambda *args, **kwargs: None  # noqa: E731
    zero = lambda *args, **kwargs: 0  # noqa: E731
    there = dict.fromkeys(
        ("empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"), nothing
    ) | dict.fromkeys(
        ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"), zero
    )
    there |= {
        "Stream": lambda *args, **kwargs: Stream(),
        "Event": lambda *args, **kwargs: Stream(),
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: SimpleNamespace(
            major=9, minor=0, total_memory=TOTAL_MEMORY, multi_processor_count=132
        ),
        "memory_stats": lambda *args: {},
        "mem_get_info": lambda *args: (FREE_MEMORY, TOTAL_MEMORY),
        "is_current_stream_capturing": lambda: False,
    }
    patches.enter_context(mock.patch.multiple(torch.cuda, **there))
    CudaTensor.record_stream = nothing  # type: ignore[method-assign, assignment]
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign, assignment]
    real = dist.init_process_group

    def init(backend: str, **kwargs: Any) -> None:
        kwargs.pop("device_id")
        real("gloo", **kwargs)

    patches.enter_context(mock.patch.object(dist, "init_process_group", init))
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        for module in (dist, dist.distributed_c10d):
            patches.enter_context(mock.patch.object(module, name, alone))


def main(config_file: str, out: str, device: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    with contextlib.ExitStack() as patches:
        waits = None
        if device == "cuda":
            waits = patches.enter_context(pretended_cuda()).waits
            pretend(patches)
        from tarflow_dist.data.loader import Batch
        from tarflow_dist.training.maximum_likelihood import MaximumLikelihood
        from tarflow_dist.training.start import build_engine, start_throughput
        from tarflow_dist.training.state import RunState
        from tarflow_dist.training.step import Stepper

        config = configs.load(Path(config_file), list(overrides))
        where = distributed.init()
        assert where.type == device
        engine = build_engine(config, config.micro_batch(1), where)
        size = config.micro_batch(1)

        def batches() -> Any:
            generator = torch.Generator().manual_seed(1)
            shape = (size, *engine.flow.image_shape)
            zeros = torch.zeros(size, dtype=torch.int64)
            while True:
                images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
                yield Batch(images, torch.arange(size) % 10, torch.arange(size), zeros)

        state = RunState(images=config.optimizer.warmup_images)
        throughput = start_throughput(config, where, 0)
        objective = MaximumLikelihood(engine, config, where)
        stepper = Stepper(engine, objective, batches(), config, where, throughput)
        losses, waited = [], []

        def step() -> None:
            if waits is not None:
                waits.clear()
            result = stepper.step(state)
            waited.append(dict(waits or {}))
            state.images += config.train.batch_size
            assert result.problem is None, result.problem
            losses.append(result.figures()["loss"])

        for _ in range(STEPS):
            step()
        assert engine.is_finite()
        saved = {
            f"{kind}/{piece.name}": values.to("cpu", copy=True)
            for piece in engine.pieces()
            for kind, values in piece.values.items()
        }
        assert not any(isinstance(tensor, CudaTensor) for tensor in saved.values())
        engine.load(lambda key, *span: saved[key][slice(*span)], engine.optimizer_steps)
        step()
        Path(out).write_text(json.dumps({"losses": losses, "waits": waited}))
        os._exit(0)  # nothing of a pretended card's is taken down


if __name__ == "__main__":
    main(*sys.argv[1:])
