"""DeepSpeed's fp32 state by parameter: whole tensors out of, and into, the parts that ranks hold.

At ZeRO stage 0 every rank holds everything; at stages 1 and 2 a slice of one flat tensor of all
weights; at stage 3 an equal part of every weight, the last ones padded.
"""

from typing import Any, Literal

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from tarflow_dist import distributed

Stage = Literal[0, 1, 2, 3]


class ZeroState:
    """The fp32 weights and optimiser states behind `optimizer`, under DeepSpeed's `zero`.

    Args:
        stage: ZeRO's.
        zero: DeepSpeed's optimiser, of no use at stage 0.
        optimizer: torch's inside it.
    """

    def __init__(self, stage: Stage, zero: Any, optimizer: torch.optim.Optimizer):
        self._stage, self._zero, self._optimizer = stage, zero, optimizer

    @torch.no_grad()
    def create(self, ema: str) -> None:
        """Adam's moments, and the average under the name `ema`, from the start, so that they can be
        loaded before the first step."""
        for partition in self._partitions():
            self._optimizer.state[partition] = {
                "step": torch.zeros((), device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
                ema: partition.detach().clone(),
            }
        if self._stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

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

    def weights(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 weights. Collective."""
        if self._stage == 0:
            return parameter.detach()
        return safe_get_full_fp32_param(parameter)

    def optimizer_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The whole fp32 state `key` of a parameter. Collective."""
        if self._stage == 0:
            return self._optimizer.state[parameter][key]
        return safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def set_weights(self, parameter: nn.Parameter, weights: Tensor) -> None:
        """Takes this rank's part of the whole `weights`, in fp32 and in the type the model has."""
        if self._stage == 3:
            held: Any = parameter
            part = self._own_part(parameter, weights)
            safe_set_local_fp32_param(parameter, part)
            held.ds_tensor.copy_(part)
            if held.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay assembled
                parameter.copy_(weights)
        else:
            if self._stage:
                self._zero.wait_for([parameter])  # or the last step's would follow
            parameter.copy_(weights)
            if self._stage:
                safe_set_full_fp32_param(parameter, weights)

    @torch.no_grad()
    def set_optimizer_state(self, parameter: nn.Parameter, key: str, state: Tensor) -> None:
        """Takes this rank's part of the whole `state`."""
        if self._stage == 0:
            self._optimizer.state[parameter][key].copy_(state)
        elif self._stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, state), key)
        else:
            safe_set_full_optimizer_state(parameter, state, key)

    def _partitions(self) -> list[Tensor]:
        """The tensors that the optimiser steps on."""
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @staticmethod
    def _own_part(parameter: Any, whole: Tensor) -> Tensor:
        size = parameter.ds_tensor.numel()
        padded = whole.new_zeros(size * distributed.world_size())
        padded[: whole.numel()] = whole.flatten()
        return padded[size * distributed.rank() :][:size]
