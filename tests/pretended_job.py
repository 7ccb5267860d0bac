"""A pretended GPU (pretended_cuda) for a rank of a job: its streams, and what DeepSpeed asks of it.
Collectives are gloo's."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pretended_cuda import FREE_MEMORY, TOTAL_MEMORY, Card, CudaTensor, pretended_cuda
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

LOWER = (F.linear, torch.matmul, F.scaled_dot_product_attention)
ACCURATE = (F.layer_norm, torch.exp)


class Stream:
    """All work of the pretended card is done when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nothing


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def zero(*args: Any, **kwargs: Any) -> int:
    return 0


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Objects travel as the host's bytes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class Autocast(TorchFunctionMode):
    """CUDA's, as far as a flow needs it: torch's own doesn't take a pretended tensor for CUDA's."""

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, **others: Any):
        super().__init__()
        lower = dict.fromkeys(LOWER, dtype) | dict.fromkeys(ACCURATE, torch.float32)
        self._dtypes = lower if enabled else {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def cast(given: Any) -> Any:
            is_cast = isinstance(given, torch.Tensor) and given.is_floating_point()
            return given.to(self._dtypes[function]) if is_cast else given

        given = (args, kwargs or {})
        args, kwargs = tree_map(cast, given) if function in self._dtypes else given
        return function(*args, **kwargs)


@contextmanager
def pretended_job() -> Iterator[Card]:
    """`pretended_cuda` for all that a rank does."""
    stream = Stream()
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
        "stream": lambda stream: nullcontext(),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: SimpleNamespace(
            major=9, minor=0, total_memory=TOTAL_MEMORY, multi_processor_count=132
        ),
        "memory_stats": lambda *args: {},
        "mem_get_info": lambda *args: (FREE_MEMORY, TOTAL_MEMORY),
        "is_current_stream_capturing": lambda: False,
    }
    init = dist.init_process_group

    def init_gloo(backend: str, **kwargs: Any) -> None:
        kwargs.pop("device_id")
        init("gloo", **kwargs)

    with ExitStack() as patches:
        enter = patches.enter_context
        enter(mock.patch.dict(os.environ, DS_ACCELERATOR="cuda"))
        card = enter(pretended_cuda())
        enter(mock.patch.multiple(torch.cuda, **there))
        enter(mock.patch.object(CudaTensor, "record_stream", nothing))
        enter(mock.patch.object(torch.Tensor, "pin_memory", lambda self, *args: self))
        enter(mock.patch.object(dist, "init_process_group", init_gloo))
        for name in ("all_gather_object", "broadcast_object_list", "gather_object"):
            enter(mock.patch.object(dist, name, on_host(getattr(dist, name))))
        enter(mock.patch.object(torch, "autocast", Autocast))
        yield card
