# mypy: disable-error-code="no-untyped-def"
"""Kernels for one token on a GPU, in Triton: attention to a KV cache whose length only the device
knows, a residual with the norm that follows it, and what follows the output projection."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Values of keys that a program holds at once."""
PROGRAMS = 512
"""Enough to fill any GPU. Few sequences have their keys shared out among as many."""


def attend(qkv: Tensor, cache: Tensor, place: Tensor, logit_scale: Tensor) -> Tensor:
    """softmax(logit_scale · q·kᵀ)·v of one token a sequence, which sees itself and all before it.

    Args:
        qkv: (B, 1, 3·width), contiguous: the q of all heads, then k, then v.
        cache: (2, B, heads, N, head_dim), contiguous: the keys and values of the tokens before; the
            token's own are written to it.
        place: (1,) int64, where the token stands, on the device.
        logit_scale: (B,), at least float32.

    Returns:
        (B, 1, width).
    """
    _, batch, heads, length, head_dim = cache.shape
    dims = triton.next_power_of_2(head_dim)
    keys = min(max(TILE // dims, 16), triton.next_power_of_2(length))
    parts = min(max(PROGRAMS // (batch * heads), 1), triton.cdiv(length, keys))
    parts = triton.next_power_of_2(parts)  # the last may have no keys at all
    out = qkv.new_empty(batch, 1, heads * head_dim)
    # what each part found, to be combined
    found = out if parts == 1 else logit_scale.new_empty(batch * heads, parts, dims + 2)
    sizes = {"dims": dims, "parts": parts}
    _attend[batch * heads, parts](
        *(qkv, cache, place, logit_scale, found, out, heads, length, head_dim), tile=keys, **sizes
    )
    if parts > 1:
        _combine[(batch * heads,)](found, out, head_dim, **sizes)
    return out


@triton.jit
def _attend(
    qkv,
    cache,
    place,
    logit_scale,
    found,
    out,
    heads,
    length,
    head_dim,
    tile: tl.constexpr,
    dims: tl.constexpr,
    parts: tl.constexpr,
):
    """A part of one head's keys: the largest logit, and with weights relative to it their sum and
    that of the values; the output, if it is the only part. The first has the token itself."""
    sequence, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = sequence // heads, sequence % heads
    dim = tl.arange(0, dims)
    real = dim < head_dim
    at = tl.load(place).to(tl.int32)
    scale = tl.load(logit_scale + row)
    token = qkv + (3 * row * heads + head) * head_dim + dim
    q = tl.load(token, real, 0.0).to(scale.dtype) * scale
    keys = cache + sequence * length * head_dim
    values = keys + tl.num_programs(0).to(tl.int64) * length * head_dim
    mine = dim < tl.where(part == 0, head_dim, 0)
    key = tl.load(token + heads * head_dim, mine, 0.0)
    value = tl.load(token + 2 * heads * head_dim, mine, 0.0)
    tl.store(keys + at * head_dim + dim, key, mine)
    tl.store(values + at * head_dim + dim, value, mine)
    largest = tl.where(part == 0, tl.sum(q * key.to(scale.dtype)), float("-inf"))
    total = tl.where(part == 0, 1.0, 0.0).to(scale.dtype)
    mixed = value.to(scale.dtype)
    for start in range(part * tile, at, parts * tile):
        before = start + tl.arange(0, tile)
        where = before[:, None] * head_dim + dim
        there = (before < at)[:, None] & real
        logits = tl.sum(q * tl.load(keys + where, there, 0.0).to(scale.dtype), axis=1)
        logits = tl.where(before < at, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits))
        weights = tl.exp(logits - new_largest)
        fade = tl.exp(largest - new_largest)
        mixed = mixed * fade + tl.sum(
            weights[:, None] * tl.load(values + where, there, 0.0).to(scale.dtype), axis=0
        )
        total = total * fade + tl.sum(weights)
        largest = new_largest
    if parts == 1:
        tl.store(out + sequence * head_dim + dim, mixed / total, real)
    else:
        found += (sequence * parts + part) * (dims + 2)
        tl.store(found + dim, mixed)
        tl.store(found + dims, total)
        tl.store(found + dims + 1, largest)


@triton.jit
def _combine(found, out, head_dim, dims: tl.constexpr, parts: tl.constexpr):
    """The parts of one head's keys to its output."""
    sequence = tl.program_id(0).to(tl.int64)
    dim, part = tl.arange(0, dims), tl.arange(0, parts)
    found += (sequence * parts + part) * (dims + 2)
    largest = tl.load(found + dims + 1)
    weights = tl.exp(largest - tl.max(largest))
    total = tl.sum(weights * tl.load(found + dims))
    mixed = tl.sum(weights[:, None] * tl.load(found[:, None] + dim), axis=0)
    tl.store(out + sequence * head_dim + dim, mixed / total, dim < head_dim)


def add_norm(
    x: Tensor, change: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + change (B, 1, width), and its layer norm."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    _add_norm[(len(x),)](
        *(x, change, weight, bias, total, normed, width, eps),
        padded=triton.next_power_of_2(width),
        accurate=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )
    return total, normed


@triton.jit
def _add_norm(
    x,
    change,
    weight,
    bias,
    total,
    normed,
    width,
    eps,
    padded: tl.constexpr,
    accurate: tl.constexpr,
):
    """One token. The norm is that of the rounded sum."""
    channel = tl.arange(0, padded)
    real = channel < width
    at = tl.program_id(0).to(tl.int64) * width + channel
    value = tl.load(x + at, real, 0.0).to(accurate) + tl.load(change + at, real, 0.0).to(accurate)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + at, rounded, real)
    value = rounded.to(accurate)
    off = tl.where(real, value - tl.sum(value) / width, 0.0)
    unit = off / tl.sqrt(tl.sum(off * off) / width + eps)
    scale = tl.load(weight + channel, real, 0.0).to(accurate)
    shift = tl.load(bias + channel, real, 0.0).to(accurate)
    tl.store(normed + at, unit * scale + shift, real)


def solve_patch(
    out: Tensor, z: Tensor, weight: Tensor, rule: str, guide: str
) -> tuple[Tensor, Tensor]:
    """x = z · exp(α) + μ of one patch a sequence, guided as `flow.guidance.Guidance.combine` does.

    Args:
        out: the output projection, (B, 1, 2D), or (B, 1, D) of a volume-preserving block; under
            guidance 2B of them, first the conditional, then the unguided ones. Contiguous.
        z: (B, D), at least float32, contiguous.
        weight: (1,), of the guidance; like z.
        rule: as in `Guidance`, and `guide`.

    Returns:
        x (B, D), and once more as the next input (B or 2B, 1, D), in the type of `out`.
    """
    batch, dim = z.shape
    x, token = torch.empty_like(z), out.new_empty(len(out), 1, dim)
    _solve_patch[(batch,)](
        *(out, z, weight, x, token, batch, dim),
        guided=len(out) > batch,
        has_alpha=out.shape[-1] > dim,
        rule=rule,
        guide=guide,
        padded=triton.next_power_of_2(dim),
    )
    return x, token


@triton.jit
def _solve_patch(
    out,
    z,
    weight,
    x,
    token,
    batch,
    dim,
    guided: tl.constexpr,
    has_alpha: tl.constexpr,
    rule: tl.constexpr,
    guide: tl.constexpr,
    padded: tl.constexpr,
):
    """One sequence."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, padded)
    real = channel < dim
    latent = tl.load(z + row * dim + channel, real, 0.0)
    mu, alpha = _mu_alpha(out, row, dim, channel, latent.dtype, has_alpha)
    scale = tl.exp(alpha)
    if guided:
        w = tl.load(weight)
        mu_un, alpha_un = _mu_alpha(out, row + batch, dim, channel, latent.dtype, has_alpha)
        if rule == "gaussian":
            ws = w * tl.exp(2 * tl.where(alpha > alpha_un, 0.0, alpha - alpha_un))
            precision = 1 + w - ws
            guided_mu = ((1 + w) * mu - ws * mu_un) / precision
            guided_scale = tl.exp(alpha - 0.5 * tl.log(precision))
        else:
            guided_mu = mu + w * (mu - mu_un)
            if rule == "linear":
                guided_scale = tl.exp(alpha + w * (alpha - alpha_un))
            else:
                guided_scale = scale + w * (scale - tl.exp(alpha_un))
        mu = guided_mu if guide != "alpha" else mu
        scale = guided_scale if guide != "mu" else scale
    new = mu + latent * scale
    tl.store(x + row * dim + channel, new, real)
    tl.store(token + row * dim + channel, new, real)
    if guided:
        tl.store(token + (row + batch) * dim + channel, new, real)


@triton.jit
def _mu_alpha(out, row, dim, channel, accurate: tl.constexpr, has_alpha: tl.constexpr):
    """`FlowBlock.mu_alpha` of one token."""
    real = channel < dim
    if has_alpha:
        alpha = tl.load(out + 2 * row * dim + channel, real, 0.0).to(accurate)
        mu = tl.load(out + (2 * row + 1) * dim + channel, real, 0.0).to(accurate)
    else:
        mu = tl.load(out + row * dim + channel, real, 0.0).to(accurate)
        alpha = tl.zeros_like(mu)
    return mu, alpha
