"""DeepSpeed ZeRO around a flow: the only room that imports deepspeed."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.flow.model import Flow
from tarflow_dist.training.ema import DECAY, EMA, track_ema

# Otherwise DeepSpeed compiles a C++ extension on CPU machines that serves inference alone.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

WEIGHTS = "weights"
OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq", EMA)
BUFFERS = "buffers"


class Engine:
    """Backward passes and optimiser steps of `flow` under ZeRO, and its fp32 state by name.

    Args:
        flow: on this rank's device, the same weights on every rank. It is trained in place.
        config: the run's.
        micro_batch_size: images a rank and pass.
    """

    def __init__(self, flow: Flow, config: Config, micro_batch_size: int):
        self.flow = flow
        world_size = distributed.world_size()
        self.accumulation_steps = config.train.batch_size // (micro_batch_size * world_size)
        optimizer = torch.optim.AdamW(
            flow.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        track_ema(optimizer)
        with redirect_stdout(StringIO()):  # it prints its memory there
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=flow,
                optimizer=optimizer,
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": micro_batch_size,
                    "gradient_accumulation_steps": self.accumulation_steps,
                    "gradient_clipping": config.optimizer.clip_grad_norm or 0.0,
                    "zero_optimization": {"stage": config.train.zero_stage, "overlap_comm": False},
                    "bf16": {"enabled": config.train.precision == "bf16"},
                    # gradients are summed in fp32, over passes and over ranks
                    "data_types": {"grad_accum_dtype": "fp32"},
                    "communication_data_type": "fp32",
                    "steps_per_print": None,
                },
            )
        self._optimizer = optimizer
        # DeepSpeed casts buffers with the weights, but a running mean needs float32
        flow.var = flow.var.float()
        self._create_optimizer_states()

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The flow's forward pass: see `Flow.forward`."""
        return self._engine(x, y)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a pass's mean loss to the step's."""
        self._engine.backward(loss)

    def step(self, *, lr: float, ema_decay: float) -> None:
        """Ends a pass; the last of a step's passes clips, updates the weights and their average."""
        for group in self._optimizer.param_groups:
            group["lr"], group[DECAY] = lr, ema_decay
        self._engine.step()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def step_was_applied(self) -> bool:
        """Whether the last step changed the weights: DeepSpeed leaves out those with an infinite
        gradient. The same on all ranks."""
        return self._engine.was_step_applied()

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has taken, as its bias correction counts them."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    def tensors(self) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
        """Everything a checkpoint holds: key, number of values, and a function that assembles the
        whole fp32 tensor. The function is collective: every rank calls it, in this order."""
        for name, parameter in self.flow.named_parameters():
            size = parameter.numel()
            yield f"{WEIGHTS}/{name}", size, partial(safe_get_full_fp32_param, parameter)
            for key in OPTIMIZER_STATES:
                assemble = partial(safe_get_full_optimizer_state, parameter, key)
                yield f"{key}/{name}", size, assemble
        for name, buffer in self.flow.named_buffers():
            yield f"{BUFFERS}/{name}", buffer.numel(), buffer.detach

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor], optimizer_steps: int) -> None:
        """Takes over the state that `read` returns for each key of `tensors`, at any ZeRO stage and
        world size: each rank keeps its own part of the whole tensors."""
        for name, parameter in self.flow.named_parameters():
            weights = read(f"{WEIGHTS}/{name}").to(parameter.device)
            parameter.copy_(weights)
            safe_set_full_fp32_param(parameter, weights)
            for key in OPTIMIZER_STATES:
                state = read(f"{key}/{name}").to(parameter.device)
                safe_set_full_optimizer_state(parameter, state, key)
        for name, buffer in self.flow.named_buffers():
            buffer.copy_(read(f"{BUFFERS}/{name}"))
        for state in self._optimizer.state.values():
            state["step"].fill_(optimizer_steps)

    @torch.no_grad()
    def _create_optimizer_states(self) -> None:
        """Adam's moments and the average from the start, so that they can be loaded before the
        first step. The parameter groups hold this rank's flat fp32 partitions by now."""
        for group in self._optimizer.param_groups:
            for partition in group["params"]:
                self._optimizer.state[partition] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(partition),
                    "exp_avg_sq": torch.zeros_like(partition),
                    EMA: partition.detach().clone(),
                }
        self._zero._lazy_init_hp_params_optimizer_state()
