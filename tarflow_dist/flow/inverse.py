"""Inverting a flow block: x_i = z_i · exp(α_i(x_<i)) + μ_i(x_<i), patch by patch or in windows."""

import torch
from torch import Tensor

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.cuda_graphs import GraphedInverse, has_graphs
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import SEQUENTIAL, Solver, Windows
from tarflow_dist.flow.predictor import Predictor, guided_condition


@torch.no_grad()
def invert_block(
    block: FlowBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    solver: Solver = SEQUENTIAL,
    sigma: Tensor | None = None,
    graphed: GraphedInverse | None = None,
) -> Tensor:
    """Latent to data through one block. The others of a sample's batch change nothing but the
    rounding of batch shapes.

    Args:
        z: (B, N, D) in image order, at least float32.
        y: (B,) int64 class ids, −1 for none; None for no label at all.
        sigma: (B,) noise levels, where they are a condition.
        graphed: where a GPU keeps what it has recorded, for the next call; None records anew.

    Returns:
        x (B, N, D) in image order.
    """
    if len(z) == 0 or z.shape[1] == 1:  # the first patch is as it is
        return z
    z = block.permute(z)
    condition = guided_condition(block, y, sigma, guidance)
    if has_graphs(z.device):
        x = (graphed or GraphedInverse())(block, z, condition, guidance, solver)
    else:
        x = z.clone()
        predict = Predictor(block, condition, len(z), guidance)
        if solver.window == 1:
            _solve_in_sequence(predict, z, x)
        else:
            windows = Windows(predict, z, x, solver)
            windows.solve(windows.sweep)
    return block.permute(x)


def _solve_in_sequence(predict: Predictor, z: Tensor, x: Tensor) -> None:
    for i in range(z.shape[1] - 1):
        mu, scale = predict(x[:, i : i + 1], i, i + 1)
        torch.addcmul(mu, z[:, i + 1 : i + 2], scale, out=x[:, i + 1 : i + 2])
