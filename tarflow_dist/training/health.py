"""Steps that are not finite: which block began it, and when a run goes back to its checkpoint."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.errors import UserError
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.model import Flow
from tarflow_dist.training.checkpoint import newest_whole
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.pointer import FOLDER
from tarflow_dist.training.state import RunState


class BlockMonitor:
    """Watches the flow's blocks from outside, through hooks, without waiting for the device.

    Attributes:
        mean_z2: (T,) float64, this rank's sums over passes of each block's mean z².
    """

    def __init__(self, flow: Flow):
        count = len(flow.blocks)
        self.mean_z2 = torch.zeros(count, dtype=torch.float64, device=flow.device)
        self._gradients = torch.zeros(count, dtype=torch.float32, device=flow.device)
        for t, block in enumerate(flow.blocks):
            assert isinstance(block, FlowBlock)
            block.register_forward_hook(self._see_output(t))
            see_gradient = self._see_gradient(self._gradients[t])
            for layer in block.modules():
                if isinstance(layer, nn.Linear):  # what reaches another weight reaches these too
                    layer.weight.register_hook(see_gradient)

    def reset(self) -> None:
        """Begins a step."""
        self.mean_z2.zero_()
        self._gradients.zero_()

    def _see_output(self, t: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            self.mean_z2[t] += output[0].detach().square().mean()

        return hook

    def _see_gradient(self, total: Tensor) -> Any:
        def hook(gradient: Tensor) -> None:
            total.add_(torch.linalg.vector_norm(gradient, ord=1, dtype=torch.float32))

        return hook

    def offender(self, loss: Tensor) -> str:
        """Where the numbers of the last step first stopped being finite, over all ranks: forward
        through the blocks, then the `loss`, then backward. Collective."""
        forward = torch.nonzero(~self.mean_z2.isfinite()).flatten().tolist()
        backward = torch.nonzero(~self._gradients.isfinite()).flatten().tolist()
        here = None
        if forward:
            here = f"the output of block {forward[0]}"
        elif not loss.isfinite():
            here = "the loss"
        elif backward:
            here = f"the gradient of block {backward[-1]}"
        found = [(rank, what) for rank, what in enumerate(distributed.gather(here)) if what]
        return "{1} on rank {0}".format(*found[0]) if found else "the gradient's norm"


class Health:
    """Counts the steps that were left out and goes back to the last checkpoint when there are too
    many in a row."""

    def __init__(self, config: Config, engine: Engine):
        self._config, self._engine = config, engine
        self._rollbacks = 0

    def judge(self, problem: str | None, state: RunState) -> str | None:
        """Notes in `state` whether the last step was taken, or left out for a `problem`.

        Returns:
            Why the run should go back to its last checkpoint; None if it shouldn't.
        """
        if problem is None:
            state.skipped_in_a_row = 0
            return None
        state.skipped += 1
        state.skipped_in_a_row += 1
        self._say(f"left out the step to {state.images} images: {problem}")
        if state.skipped_in_a_row < self._config.health.max_skipped:
            return None
        return f"{state.skipped_in_a_row} steps in a row were left out"

    def go_back(self, state: RunState, why: str) -> None:
        """Takes over weights, average and optimiser of the last checkpoint. The position in the
        data stays, so that the images that did the harm are behind.

        Raises:
            UserError: there is none, or it has been done `health.max_rollbacks` times.
        """
        limit, total = self._config.health.max_rollbacks, self._config.train.images
        if self._rollbacks >= limit or state.images >= total:
            when = f"after going back {self._rollbacks} times" if limit else ""
            raise UserError(
                f"{why} at {state.images} images {when}: the same command goes on from the last "
                "checkpoint, with a lower optimizer.lr"
            )
        saved = newest_whole(self._config.run / FOLDER)
        if saved is None:
            raise UserError(
                f"{why} at {state.images} images, before the first checkpoint: lower optimizer.lr"
            )
        self._engine.load(saved.read, saved.state.optimizer_steps)
        self._rollbacks += 1
        state.skipped_in_a_row = 0
        self._say(f"{why}: back to the weights of {saved.folder}, on from {state.images} images")

    def _say(self, what: str) -> None:
        if distributed.is_main():
            print(f"{self._config.run}: {what}", file=sys.stderr, flush=True)
