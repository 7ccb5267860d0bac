"""The weights' moving average, kept as one more state of the optimiser.

The optimiser sees whatever a rank owns (under ZeRO its fp32 partition), so each rank averages just
its own share, and the average is saved and restored like Adam's moments.
"""

from typing import Any

import torch

EMA = "ema"
DECAY = "ema_decay"


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
