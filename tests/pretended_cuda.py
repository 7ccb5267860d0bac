"""A pretended GPU: tensors that say cuda:0 and are computed on the CPU.

Mixing devices is an error, as on a card; what would wait for the card is counted with its line; and
graphs are recorded and replayed as a list of operations, in which a wait is an error. It knows no
streams, no NCCL, and no kernels of CUDA's own: bits are the CPU's.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import plain_kernels
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FREE_MEMORY, TOTAL_MEMORY = 70 * 2**30, 80 * 2**30
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index_put.default),
}
FREE = {aten._unsafe_view.default, aten.promote_types.default}  # and views: nothing is launched
WAITING = {  # their result, or its shape, must be known to the host
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default),
    *(aten.masked_select.default, aten.bincount.default),
}


@dataclass
class Card:
    """What the pretended card has seen since the last `waits.clear()`."""

    waits: Counter[str] = field(default_factory=Counter)
    """What waited, and the line of the project that it was in."""
    graphs: list["Graph"] = field(default_factory=list)
    recording: list[tuple] | None = None

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {_line()}"] += 1
        if self.recording is not None:
            raise RuntimeError(f"{what} at {_line()} is not allowed in a recording")

    def record(self, work: Callable[[], None], changes: Sequence[Tensor]) -> Callable[[], None]:
        """Stands in for `tarflow_dist.flow.cuda_graphs.record`."""
        before = [tensor.clone() for tensor in changes]
        self.recording = []
        try:
            work()
            graph = Graph(self.recording)
        finally:
            self.recording = None
        for tensor, was in zip(changes, before, strict=True):
            tensor.copy_(was)
        self.graphs.append(graph)
        return graph.replay


class Graph:
    """Operations with their very tensors: each replay writes its results where the first did."""

    def __init__(self, operations: list[tuple]):
        self._operations = [operation for operation in operations if not _is_view(operation[0])]

    def kernels(self) -> Counter[str]:
        """How often each operation that launches one is done."""
        return Counter(str(function) for function, *_ in self._operations if function not in FREE)

    def replay(self) -> None:
        for function, args, kwargs, results in self._operations:
            again = function(*args, **kwargs)
            for was, now in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(was, Tensor) and was.data_ptr() != now.data_ptr():
                    was.copy_(now)


_card = Card()


class CudaTensor(Tensor):
    """`host` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "CudaTensor":
        outside = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")
        made = Tensor._make_subclass(cls, outside, host.requires_grad, device_for_backend_keys=CPU)
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _compute(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, CudaTensor):
            raise RuntimeError(f"data of another device is set at {_line()}")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.host = new.host

    def _read(self) -> Tensor:
        _card.wait("a read")
        return self.host

    def tolist(self) -> Any:
        return self._read().tolist()

    def item(self) -> Any:
        return self._read().item()

    def __float__(self) -> float:
        return float(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def __bool__(self) -> bool:
        return bool(self._read())

    def __index__(self) -> int:
        return self._read().__index__()

    def numpy(self) -> Any:
        raise TypeError("a cuda tensor has no numpy array")

    def __repr__(self) -> str:
        return f"CudaTensor({tuple(self.shape)})"


class _Pretending(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _compute(function, args, kwargs or {})


@contextmanager
def pretended_cuda() -> Iterator[Card]:
    """While it lasts there is one card, and no other."""
    global _card
    _card = Card()
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    there = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda *device: _card.wait("synchronize"),
        "get_device_name": lambda *device: "NVIDIA H100 80GB HBM3",
        "mem_get_info": lambda *device: (FREE_MEMORY, TOTAL_MEMORY),
        "_lazy_init": lambda: None,
    }
    with (
        mock.patch.multiple(torch.cuda, **there),
        mock.patch.object(nn.Module, "to", _module_to),
        mock.patch("tarflow_dist.flow.cuda_graphs.record", lambda *given: _card.record(*given)),
        mock.patch.multiple("tarflow_dist.flow.triton_kernels", **plain_kernels.KERNELS),
        _Pretending(),
    ):
        try:
            yield _card
        finally:
            torch._C._set_only_lift_cpu_tensors(False)  # type: ignore[attr-defined]


_real_module_to = nn.Module.to


def _module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    # a parameter can't become a tensor of another class in place
    there = any(isinstance(parameter, CudaTensor) for parameter in module.parameters())
    torch.__future__.set_overwrite_module_params_on_conversion(not there)
    try:
        return _real_module_to(module, *args, **kwargs)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _compute(function: Any, args: tuple, kwargs: dict) -> Any:
    if function is torch.ops.prim.device.default:
        return CUDA
    flat, structure = tree_flatten((args, kwargs))
    on_card = [a for a in flat if isinstance(a, CudaTensor)]
    on_host = [a for a in flat if isinstance(a, Tensor) and not isinstance(a, CudaTensor)]
    if on_card and function not in COPIES | INDEXING and any(a.dim() for a in on_host):
        raise RuntimeError(f"{function} mixes devices at {_line()}")
    asked = next((torch.device(a) for a in flat if isinstance(a, torch.device)), None)
    if function in COPIES:
        on_cuda = isinstance(args[0], CudaTensor) if asked is None else asked.type != "cpu"
    else:
        on_cuda = bool(on_card) if asked is None else asked.type != "cpu"
    if why := _waits(function, args, kwargs, on_card, on_cuda):
        _card.wait(why)
    host = [
        a.host if isinstance(a, CudaTensor) else CPU if isinstance(a, torch.device) else a
        for a in flat
    ]
    host_args, host_kwargs = tree_unflatten(host, structure)
    host_kwargs.pop("pin_memory", None)
    result = function(*host_args, **host_kwargs)
    if function.namespace == "c10d":  # a card's streams would wait for it
        for work in tree_leaves(result):
            if isinstance(work, torch.ScriptObject):
                work.wait()
    if _card.recording is not None:
        _card.recording.append((function, host_args, host_kwargs, result))
    given = {id(a.host): a for a in on_card}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on_cuda:
            return value
        return given[id(value)] if id(value) in given else CudaTensor(value)

    return tree_map(wrap, result)


def _waits(
    function: Any, args: tuple, kwargs: dict, on_card: list[CudaTensor], on_cuda: bool
) -> str | None:
    """Why the host waits for the card here, if it does."""
    if function in WAITING and on_card:
        return str(function)
    if function in INDEXING and on_card:
        index = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in index):
            return "indexing by a mask"
        if any(i.dim() and not isinstance(i, CudaTensor) for i in index):
            return "indexing from the host"
    if function not in COPIES:
        return None
    source = args[1] if function is aten.copy_.default else args[0]
    queued = on_cuda and (kwargs.get("non_blocking") or True in args[2:])
    if isinstance(source, CudaTensor) == on_cuda or queued:
        return None
    return f"a copy {'to' if on_cuda else 'from'} the card"


def _is_view(function: Any) -> bool:
    results = function._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in results)


def _line() -> str:
    """The innermost line of the project."""
    for frame in reversed(traceback.extract_stack()):
        before, found, after = frame.filename.rpartition("/tarflow_dist/")
        if found and "site-packages" not in before:
            return f"{after}:{frame.lineno}"
    return "a test"
