"""DeepSpeed's fp32 state by parameter: the parts that ranks hold, which checkpoints are made of.

At ZeRO stage 0 every rank holds everything; at stages 1 and 2 a slice of one flat tensor of many
weights; at stage 3 an equal part of every weight, the last ones padded.
"""

from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor, nn

from tarflow_dist import distributed
from tarflow_dist.config import Stage

EMA = "ema"
"""The weights' moving average, as one more state of the optimiser: that sees what a rank owns, so
each rank averages its own share, and the average is saved and restored like Adam's moments."""
DECAY = "ema_decay"
"""Key of its decay in each parameter group."""


class ZeroState:
    """The fp32 weights and optimiser states behind `optimizer`, under DeepSpeed's `zero`: Adam's
    moments, made here so that they can be loaded before the first step, and the average, which
    moves at each step from now on.

    Args:
        stage: ZeRO's.
        zero: DeepSpeed's optimiser, of no use at stage 0.
        optimizer: torch's inside it.
    """

    def __init__(self, stage: Stage, zero: Any, optimizer: torch.optim.Optimizer):
        self._stage, self._zero, self._optimizer = stage, zero, optimizer
        self._owners: dict[Tensor, int] = {}  # at stage 0, who saves and loads each parameter
        if stage == 0:
            largest_first = sorted(self._partitions(), key=Tensor.numel, reverse=True)
            self._owners = dict(zip(largest_first, cycle(range(distributed.world_size()))))
        for partition in self._partitions():
            optimizer.state[partition] = {
                "step": torch.zeros((), device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
                EMA: partition.detach().clone(),
            }
        if stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()
        track_ema(optimizer)

    @property
    def steps(self) -> int:
        """Steps that Adam has taken, as its bias correction counts them."""
        return int(self._optimizer.state[self._partitions()[0]]["step"])

    @steps.setter
    def steps(self, steps: int) -> None:
        for partition in self._partitions():
            self._optimizer.state[partition]["step"].fill_(steps)

    def is_finite(self) -> bool:
        """Whether this rank's weights are all finite."""
        return all(bool(partition.isfinite().all()) for partition in self._partitions())

    def whole(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The whole fp32 state `key` of a parameter. Collective."""
        if self._stage == 0:
            return self._optimizer.state[parameter][key]
        return safe_get_full_optimizer_state(parameter, key)

    def share(self, parameter: Any, key: str | None) -> tuple[int, Tensor]:
        """What this rank saves and loads of a parameter's fp32 state `key` (None: the weights).
        The shares of all ranks make up the whole.

        Returns:
            Where it begins in the flattened tensor, and its values, which can be written to.
        """
        if self._stage == 0:
            whole = parameter if key is None else self._optimizer.state[parameter][key]
            mine = self._owners[parameter] == distributed.rank()
            return 0, whole.detach().view(-1)[: None if mine else 0]
        if self._stage == 3:
            part = self._part(parameter, key)
            start = min(part.numel() * distributed.rank(), parameter.ds_numel)
            return start, part[: parameter.ds_numel - start]
        fragment = parameter._hp_mapping
        if fragment is None:
            return 0, torch.empty(0)
        return fragment.lp_fragment_address.start, fragment.get_hp_fragment(key)

    @torch.no_grad()
    def spread(self) -> None:
        """After all ranks have written to their shares: gives each what else it needs, such as the
        weights that it computes with. Collective."""
        if self._stage == 0:
            for parameter, owner in self._owners.items():
                for tensor in (parameter, *self._optimizer.state[parameter].values()):
                    dist.broadcast(tensor, owner)
        elif self._stage == 3:
            self._zero.checkpoint_event_prologue()
            for parameter in (p for group in self._zero.fp16_groups for p in group):
                parameter.ds_tensor.copy_(self._part(parameter, None))
            self._zero.checkpoint_event_epilogue()  # small weights stay assembled
        else:
            self._zero.update_lp_params()

    def _part(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """At stage 3, padded."""
        return self._zero._get_fp32_opt_state_partition(parameter, False, key)[0]

    def _partitions(self) -> list[Tensor]:
        """The tensors that the optimiser steps on."""
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return [p for group in self._optimizer.param_groups for p in group["params"]]


def track_ema(optimizer: torch.optim.Optimizer) -> None:
    """From now on every step of `optimizer` ends with ema ← ema + (1 − decay)·(weights − ema), the
    decay taken from each parameter group's `ema_decay`."""
    optimizer.register_step_post_hook(_update)


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "overflow", False):  # the step was left out
        return
    for group in optimizer.param_groups:
        for weights in group["params"]:
            optimizer.state[weights][EMA].lerp_(weights, 1 - group[DECAY])
