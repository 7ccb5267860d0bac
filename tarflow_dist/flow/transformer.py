"""The causal transformer inside a flow block: pre-norm attention and MLP, and a KV cache.

Parameter names are those of the published checkpoints, so weights go both ways unchanged.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that affine arithmetic runs in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def write_cache(
    cache: Tensor, keys_values: Tensor, at: int | Tensor, stop: int
) -> tuple[Tensor, Tensor]:
    """Puts the keys and values (2, B, heads, S, head_dim) of the tokens `at` in their place in
    `cache` (2, B, heads, N, head_dim), and returns views of those of all tokens before `stop`.

    Args:
        at: the place of a single token (S = 1), or (B, S), each sequence's own.
    """
    if isinstance(at, int):
        cache[:, :, :, at : at + 1] = keys_values
    else:
        sequence = torch.arange(cache.shape[1], device=cache.device)[:, None]
        cache[:, sequence, :, at] = keys_values.permute(1, 3, 0, 2, 4)
    keys, values = cache[:, :, :, :stop].unbind()
    return keys, values


class Attention(nn.Module):
    """Multi-head causal self-attention. `qkv` packs the q of all heads, then k, then v."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.num_heads = width // head_dim
        self.norm = nn.LayerNorm(width)  # in bf16, torch works it out in float32
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence: (B, N, width) → (B, N, width)."""
        # taken apart before they are transposed, so that backward puts them together in one copy
        q, k, v = (heads.transpose(1, 2) for heads in self._heads(x).unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def extend(
        self,
        x: Tensor,
        cache: Tensor,
        at: int | Tensor,
        stop: int,
        mask: Tensor | None,
        temperature: Tensor | None,
    ) -> Tensor:
        """See `TransformerLayer.extend`."""
        heads = self._heads(x).permute(2, 0, 3, 1, 4)
        q = heads[0]
        if temperature is not None:
            q = (q.to(temperature.dtype) / temperature).to(q.dtype)
        keys, values = write_cache(cache, heads[1:], at, stop)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, width) → q, k, v of the heads, (B, S, 3, heads, head_dim)."""
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)  # in bf16, torch works it out in float32
        self.main = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.norm(x))


class TransformerLayer(nn.Module):
    """x + attention(x), then x + MLP(x). The unit of compilation and activation checkpointing."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence: (B, N, width) → (B, N, width)."""
        x = x + self.attention(x)
        return x + self.mlp(x)

    def extend(
        self,
        x: Tensor,
        cache: Tensor,
        at: int | Tensor,
        stop: int,
        mask: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Some tokens after those in the cache: (B, S, width) → (B, S, width).

        Args:
            x: the S tokens; their keys and values are written to the cache.
            at: the place of a single one (S = 1), or (B, S), each sequence's own.
            stop: above all of `at`.
            mask: (B, 1, S, stop) bool, the tokens that each may see; None for all before `stop`.
            temperature: (B, 1, 1, 1), at least float32, divides each sample's attention logits.
        """
        x = x + self.attention.extend(x, cache, at, stop, mask, temperature)
        return x + self.mlp(x)
