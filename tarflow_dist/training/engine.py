"""DeepSpeed ZeRO around a flow."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.cost.memory import BUCKET
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.transformer import TransformerLayer
from tarflow_dist.training.checkpoint import Piece, Read
from tarflow_dist.training.overlapped_zero import OverlappedZero, buckets
from tarflow_dist.training.zero import DECAY, EMA, ZeroState

# DeepSpeed has no setting for the class it takes at stages 1 and 2.
deepspeed.runtime.engine.DeepSpeedZeroOptimizer = OverlappedZero
# Otherwise DeepSpeed compiles a C++ extension on CPU machines that serves inference alone.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

BUFFERS = "buffers"
"""Kind of the flow's buffers in a checkpoint: the prior's variance."""
KINDS = {"weights": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", EMA: EMA}
"""What a checkpoint has of each parameter, and its key in the optimiser's state."""


class Engine:
    """Backward passes and optimiser steps of `flow` under ZeRO, and its fp32 state by name.

    A step whose gradient is not finite on some rank is left out on all.

    Args:
        flow: on this rank's device, the same weights on every rank. It is trained in place.
        config: the run's.
        micro_batch_size: images a rank and pass.
    """

    def __init__(self, flow: Flow, config: Config, micro_batch_size: int):
        self.flow = flow
        self.accumulation_steps = config.train.batch_size // (
            micro_batch_size * distributed.world_size()
        )
        _prepare_layers(
            flow,
            compile=config.train.compile,
            checkpoint_every=config.train.activation_checkpointing,
        )
        stage = config.train.zero_stage
        clip_norm = config.optimizer.clip_grad_norm or 0.0
        adamw = partial(_CheckedAdamW, max_norm=clip_norm or math.inf)
        optimizer = (torch.optim.AdamW if stage else adamw)(
            buckets(flow.parameters(), BUCKET) if stage in (1, 2) else flow.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        with redirect_stdout(StringIO()):  # it prints its memory there
            self._engine, zero, _, _ = deepspeed.initialize(
                model=flow,
                optimizer=optimizer,
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": micro_batch_size,
                    "gradient_accumulation_steps": self.accumulation_steps,
                    "gradient_clipping": clip_norm if stage else 0.0,
                    "zero_optimization": {
                        "stage": stage,
                        "overlap_comm": False,
                        "offload_optimizer": {"device": "cpu" if config.train.offload else "none"},
                    },
                    "zero_force_ds_cpu_optimizer": False,
                    "bf16": {"enabled": config.train.precision == "bf16"},
                    "torch_autocast": {
                        "enabled": config.train.precision == "bf16_autocast",
                        "dtype": "bfloat16",
                        "lower_precision_safe_modules": [],  # whose gradients it would send in bf16
                    },
                    # over passes gradients are summed in fp32; so does OverlappedZero, which
                    # DeepSpeed would not take for bf16 weights at stage 1 if this said so
                    "data_types": {"grad_accum_dtype": None if stage == 1 else "fp32"},
                    "communication_data_type": config.train.reduce_precision,
                    "steps_per_print": None,
                    # from the third step on it would wait for the device twice a pass
                    "timers": {"throughput": {"enabled": False}},
                },
            )
        # DeepSpeed casts buffers with the weights, but a running mean needs float32
        flow.var = flow.var.float()
        self._optimizer = optimizer
        # a single rank has nothing to sum: DeepSpeed would flatten its gradients and copy them back
        alone = stage == 0 and distributed.world_size() == 1
        self._reduced = self._engine.no_sync if alone else nullcontext
        self._zero_state = ZeroState(stage, zero, optimizer)
        if isinstance(zero, OverlappedZero):
            zero.wait_before_use(flow)

    def __call__(
        self, x: Tensor, y: Tensor | None, sigma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The flow's forward pass: see `Flow.forward`."""
        return self._engine(x, y, sigma)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a pass's mean loss to the step's."""
        with self._reduced():
            self._engine.backward(loss)

    def step(self, *, lr: float, ema_decay: float) -> None:
        """Ends a pass; the last of a step's passes clips, updates the weights and their average."""
        for group in self._optimizer.param_groups:
            group["lr"], group[DECAY] = lr, ema_decay
        self._engine.step()

    def grad_norm(self) -> float | Tensor:
        """Norm of the last step's gradient over all parameters, before clipping; it may be on the
        device still."""
        return self._engine.get_global_grad_norm()

    def step_was_applied(self) -> bool:
        """Whether the last step changed the weights, or was left out because its gradient was not
        finite. The same on all ranks."""
        return self._engine.was_step_applied()

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has taken, as its bias correction counts them."""
        return self._zero_state.steps

    def pieces(self) -> Iterator[Piece]:
        """What this rank adds to a checkpoint: of every parameter and buffer a piece, which may be
        empty."""
        for name, parameter in self.flow.named_parameters():
            start, values = 0, {}
            for kind, key in KINDS.items():
                start, share = self._zero_state.share(parameter, key)
                values[kind] = share.detach()
            yield Piece(name, getattr(parameter, "ds_shape", parameter.shape), start, values)
        for name, buffer in self.flow.named_buffers():
            held = buffer.flatten()[: None if distributed.is_main() else 0]
            yield Piece(name, buffer.shape, 0, {BUFFERS: held})

    def average(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights, and the buffers, whole and by name. Collective: every rank takes
        all of them."""
        for name, parameter in self.flow.named_parameters():
            yield name, self._zero_state.whole(parameter, EMA)
        yield from self.flow.named_buffers()

    def is_finite(self) -> bool:
        """Whether all weights are finite. Collective."""
        return not distributed.any_rank(not self._zero_state.is_finite())

    @torch.no_grad()
    def load(self, read: Read, optimizer_steps: int) -> None:
        """Takes over the state that `read` gives parts of, from any ZeRO stage and world size: each
        rank reads its own share, and the buffers. Collective."""
        for name, parameter in self.flow.named_parameters():
            for kind, key in KINDS.items():
                start, share = self._zero_state.share(parameter, key)
                share.copy_(read(f"{kind}/{name}", start, start + share.numel()))
        for name, buffer in self.flow.named_buffers():
            buffer.copy_(read(f"{BUFFERS}/{name}", 0, buffer.numel()).view_as(buffer))
        self._zero_state.spread()
        self._zero_state.steps = optimizer_steps


def _prepare_layers(flow: Flow, *, compile: bool, checkpoint_every: int) -> None:
    """Compiles each transformer layer, and lets every `checkpoint_every`-th one of the whole stack
    recompute its activations in the backward pass (0: none); names of parameters stay."""
    layers = [module for module in flow.modules() if isinstance(module, TransformerLayer)]
    for number, layer in enumerate(layers, start=1):
        if compile:
            layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
        if checkpoint_every and number % checkpoint_every == 0:
            layer.forward = partial(  # type: ignore[method-assign]
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )


class _CheckedAdamW(torch.optim.AdamW):
    """AdamW that clips, and leaves out steps that are not finite, as DeepSpeed's own optimisers do
    at the other ZeRO stages. `overflow` and `_global_grad_norm` are what DeepSpeed asks of them."""

    def __init__(self, *args: Any, max_norm: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_norm = max_norm

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._global_grad_norm = get_total_norm(gradients)
        self.overflow = not self._global_grad_norm.isfinite()
        if self.overflow:
            return
        if self._global_grad_norm > self._max_norm:
            clip_grads_with_norm_(parameters, self._max_norm, self._global_grad_norm)
        super().step()
