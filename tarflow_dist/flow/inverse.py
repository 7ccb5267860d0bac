"""Inverting a flow block: x_i = z_i · exp(α_i(x_<i)) + μ_i(x_<i), patch by patch."""

import torch
from torch import Tensor

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance


@torch.no_grad()
def invert_block(block: FlowBlock, z: Tensor, y: Tensor | None, guidance: Guidance) -> Tensor:
    """Latent to data through one block, exact, one patch at a time with a KV cache.

    With guidance, the conditional and the unguided pass run as one batch of 2B.

    Args:
        z: (B, N, D) in image order, at least float32.
        y: (B,) int64 class ids, −1 for none; None for no label at all.

    Returns:
        x (B, N, D) in image order.
    """
    B, N, _ = z.shape
    x = block.permute(z).clone()
    positions = block.permuted_positions()
    copies = 2 if guidance.active else 1
    temperature = None
    if guidance.active:
        if y is not None:
            y = torch.cat([y, torch.full_like(y, -1)])
        if guidance.attn_temp != 1:
            temperature = z.new_ones(2 * B, 1, 1, 1)
            temperature[B:] = guidance.attn_temp
    caches = block.new_caches(copies * B)
    for i in range(1, N):
        previous = x[:, i - 1 : i].repeat(copies, 1, 1)
        h = block.embed(previous, positions[i - 1 : i], y)
        for layer, cache in zip(block.attn_blocks, caches, strict=True):
            h = layer(h, cache, temperature)
        mu, alpha = block.mu_alpha(h)
        if guidance.active:
            mu, alpha = guidance.combine(mu, alpha, i, N)
        x[:, i] = x[:, i] * alpha[:, 0].exp() + mu[:, 0]
    return block.permute(x)
