"""Which block of a flow the numbers of a step stopped being finite in."""

from typing import Any

import torch
from torch import Tensor, nn

from tarflow_dist import distributed
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.model import Flow


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
            # all that goes wrong on the way back through a block comes down to its first weight
            block.proj_in.weight.register_hook(self._see_gradient(self._gradients[t]))

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
