"""ZeRO 1 and 2 whose messages travel while the GPU computes.

DeepSpeed all-reduces gradients, twice the bytes that its ranks need, and waits for the new weights.
Here each parameter group is a bucket: as soon as its last gradient is there it is reduce-scattered,
while the backward pass goes on, and its weights are gathered while the next forward pass begins.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from tarflow_dist.cost.memory import IN_FLIGHT
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.transformer import TransformerLayer


def buckets(parameters: Iterable[nn.Parameter], size: int) -> list[dict[str, list[nn.Parameter]]]:
    """Parameter groups of at least `size` values, but for the last, of parameters that follow one
    another."""
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if sum(p.numel() for p in groups[-1]) >= size:
            groups.append([])
        groups[-1].append(parameter)
    return [{"params": group} for group in groups]


class _Reduction(NamedTuple):
    """A bucket on its way: what is sent, this rank's part of the sum, and the wait for it."""

    group: int
    sent: Tensor
    part: Tensor
    work: Any


class OverlappedZero(stage_1_and_2.DeepSpeedZeroOptimizer):
    """DeepSpeed's optimiser of ZeRO 1 and 2 with other messages; its groups are to be `buckets` in
    the order in which the forward pass takes the weights.

    Gradients are summed over ranks in `communication_data_type`, over passes in fp32. The ranks
    send buckets in the same order, last one first, whatever the order of their gradients.
    """

    ready_for_gradients: bool

    def __init__(self, *args: Any, **kwargs: Any):
        self._reductions: deque[_Reduction] = deque()
        self._gathers: dict[int, Any] = {}
        super().__init__(*args, **{**kwargs, "gradient_accumulation_dtype": torch.float32})
        self._group_of = {p: i for i, group in enumerate(self.bit16_groups) for p in group}
        self._begin_pass()

    # gradients

    def _begin_pass(self) -> None:
        self._sent: dict[int, Tensor] = {}
        self._missing = [len(parameters) for parameters in self.bit16_groups]
        self._next = len(self.bit16_groups) - 1

    def setup_buckets(self) -> None:
        """Without DeepSpeed's own buffer."""
        if not self.ready_for_gradients:
            self.micro_step_id += 1
            self.ready_for_gradients = True

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """The gradient of `param`, of group `i`, is there."""
        self.setup_buckets()
        if self.use_grad_accum_attribute:  # bf16 weights at stage 1
            self._fill_param_grad_accum_attribute(param)
        if self.partition_gradients or self.is_gradient_accumulation_boundary():
            self.reduce_ready_partitions_and_remove_grads(param, i)

    @torch.no_grad()
    def reduce_ready_partitions_and_remove_grads(self, param: Any, i: int) -> None:
        """Puts the gradient into its bucket, and sends those that are full."""
        offset = self.round_robin_bit16_offsets[i][param.param_idx_in_group]
        gradient = self.get_gradient_for_reduction(param)
        self._bucket(i)[offset:][: param.numel()] = gradient.view(-1)
        self.clear_grad_attribute(param)
        self._missing[i] -= 1
        while self._next >= 0 and not self._missing[self._next]:
            self._send()

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """At the end of a pass: sends what is left, and waits for all."""
        while self._next >= 0:
            self._send()
        while self._reductions:
            self._receive()
        self._begin_pass()
        if self.cpu_offload:
            for group, parameters in enumerate(self.params_in_partition):
                for parameter in parameters:
                    self.copy_grads_in_partition(parameter, group)

    def _bucket(self, group: int) -> Tensor:
        if group not in self._sent:
            like = self.bit16_groups_flat[group]
            self._sent[group] = torch.zeros_like(like, dtype=self.communication_data_type)
        return self._sent[group]

    def _send(self) -> None:
        if len(self._reductions) == IN_FLIGHT:
            self._receive()
        group, self._next = self._next, self._next - 1
        sent = self._bucket(group)
        del self._sent[group]
        part = sent.new_empty(self.partition_size[group])
        work = dist.reduce_scatter_tensor(part, sent, group=self.dp_process_group, async_op=True)
        self._reductions.append(_Reduction(group, sent, part, work))

    def _receive(self) -> None:
        """Has the device wait for the oldest reduction, and adds it to the sum over passes."""
        reduction = self._reductions.popleft()
        reduction.work.wait()
        total = self._get_compact_grad_partition_buffer(reduction.group).flat_partition
        total.add_(reduction.part, alpha=1 / dist.get_world_size(self.dp_process_group))

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        """A rank keeps one flat tensor of its part of the gradients, whatever the weights' type."""
        return True

    # the step

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """The norm tells it, without another exchange."""
        if self.cpu_offload:
            super().check_overflow(partition_gradients)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Over all groups in one exchange."""
        if self.cpu_offload:
            return super().scaled_global_norm(norm_type)
        parts = [gradients.flat_partition for gradients in self.averaged_gradients.values()]
        square = get_total_norm(parts).square()
        dist.all_reduce(square, group=self.dp_process_group)
        return square.sqrt()

    def step(self, closure: None = None) -> None:
        """Returns before the new weights are there: see `wait_for`."""
        gather = stage_1_and_2.all_gather_dp_groups
        stage_1_and_2.all_gather_dp_groups = self._start_gathering
        try:
            super().step()
        finally:
            stage_1_and_2.all_gather_dp_groups = gather

    def _start_gathering(self, **_: Any) -> None:
        if dist.get_world_size(self.dp_process_group) == 1:
            return
        rank = dist.get_rank(self.dp_process_group)
        self._gathers = {
            group: dist.all_gather_into_tensor(
                flat,
                self.parallel_partitioned_bit16_groups[group][rank],
                group=self.dp_process_group,
                async_op=True,
            )
            for group, flat in enumerate(self.bit16_groups_flat)
        }

    # weights

    def wait_for(self, parameters: Iterable[nn.Parameter]) -> None:
        """Has the device wait until these weights are those of the last step."""
        for group in {self._group_of[parameter] for parameter in parameters}:
            if (work := self._gathers.pop(group, None)) is not None:
                work.wait()

    def update_lp_params(self) -> None:
        """Casts and gathers the weights anew, from the fp32 ones."""
        self.wait_for(self._group_of)  # or the last step's would follow
        super().update_lp_params()

    def wait_before_use(self, flow: Flow) -> None:
        """From now on the forward pass of each module waits for the weights that it takes."""
        for module, parameters in _owners(flow):
            module.register_forward_pre_hook(self._waiting(parameters))

    def _waiting(self, parameters: list[nn.Parameter]) -> Callable[..., None]:
        return lambda *_: self.wait_for(parameters)


def _owners(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules of a flow whose forward pass takes weights, with those; a transformer layer,
    which may be compiled, takes all of its own at once."""
    if isinstance(module, TransformerLayer):
        yield module, list(module.parameters())
        return
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        yield from _owners(child)
