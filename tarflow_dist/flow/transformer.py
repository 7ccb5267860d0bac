"""The causal transformer inside a flow block: pre-norm attention and MLP, and a KV cache.

Parameter names are those of the published checkpoints, so weights go both ways unchanged.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that norms and affine arithmetic run in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class LayerNorm(nn.LayerNorm):
    """Layer norm worked out in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = accurate_dtype(x.dtype)
        y = F.layer_norm(
            x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
        )
        return y.to(x.dtype)


class KVCache:
    """Keys and values of the tokens one layer has seen, in memory taken once.

    Args:
        shape: (B, heads, N, head_dim).
    """

    def __init__(
        self, shape: tuple[int, int, int, int], *, device: torch.device, dtype: torch.dtype
    ):
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the (B, heads, S, head_dim) keys and values of the next S tokens in place and
        returns views of all tokens so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Multi-head causal self-attention. `qkv` packs the q of all heads, then k, then v."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.num_heads = width // head_dim
        self.norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, temperature: Tensor | None = None
    ) -> Tensor:
        """(B, S, width) → (B, S, width).

        Args:
            x: the whole sequence without a cache, or the single next token (S = 1) with one.
            temperature: (B, 1, 1, 1), at least float32, divides each sample's attention logits.
        """
        B, S, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        if temperature is not None:
            q = (q.to(temperature.dtype) / temperature).to(q.dtype)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            assert S == 1, "the cache is filled one token at a time"
            out = F.scaled_dot_product_attention(q, *cache.append(k, v))
        return self.proj(out.transpose(1, 2).reshape(B, S, width))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(width)
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

    def forward(
        self, x: Tensor, cache: KVCache | None = None, temperature: Tensor | None = None
    ) -> Tensor:
        x = x + self.attention(x, cache, temperature)
        return x + self.mlp(x)
