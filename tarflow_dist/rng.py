"""Random numbers as a function of (seed, purpose, epoch, image index), on any device.

A counter-based generator (Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). The key is a hash of seed and purpose; the counter holds the position inside
the image, the epoch and the image's index as separate words, so no two images share numbers and
none of it knows of ranks, batches or world size.
"""

import hashlib
import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on four int64 tensors that each hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply(_MULTIPLIERS[0], c0)
        hi1, lo1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b. The product of two unsigned 32-bit words overflows int64 into
    its sign bit but not beyond 64 bits, so masking after the shift recovers both halves."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def random_words(
    shape: tuple[int, ...], *, seed: int, purpose: str, index: Tensor, epoch: Tensor | int = 0
) -> Tensor:
    """Unsigned 32-bit words in int64, of shape (B, *shape), for the B images of `index`.

    Args:
        shape: the shape of one image's numbers.
        seed: any integer.
        purpose: what the numbers are for; each purpose has a stream of its own.
        index: (B,) int64 image indexes; its device is where the numbers are made.
        epoch: (B,) int64 or an int below 2^32.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
    count = math.prod(shape)
    position = torch.arange((count + 3) // 4, device=index.device)
    index = index[:, None]
    epoch = torch.as_tensor(epoch, device=index.device).reshape(-1, 1)
    counter = torch.broadcast_tensors(position, epoch & _MASK, index & _MASK, index >> 32)
    words = torch.stack(philox4x32(counter, key), dim=-1)
    return words.flatten(1)[:, :count].reshape(-1, *shape)


def uniform(
    shape: tuple[int, ...], *, seed: int, purpose: str, index: Tensor, epoch: Tensor | int = 0
) -> Tensor:
    """float64 numbers in [0, 1), multiples of 2^-32, of shape (B, *shape): see `random_words`."""
    words = random_words(shape, seed=seed, purpose=purpose, index=index, epoch=epoch)
    return words.double() * 2.0**-32


def normal(
    shape: tuple[int, ...], *, seed: int, purpose: str, index: Tensor, epoch: Tensor | int = 0
) -> Tensor:
    """float64 standard normal numbers by Box and Muller, of shape (B, *shape): see `random_words`.

    Worked out in float64 so that a last-bit difference between devices' logarithms is lost when
    the caller rounds to float32.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    u = uniform((2, pairs), seed=seed, purpose=purpose, index=index, epoch=epoch)
    radius = (-2.0 * (1.0 - u[:, 0]).log()).sqrt()  # 1 - u lies in (0, 1]
    angle = 2.0 * math.pi * u[:, 1]
    values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return values[:, :count].reshape(-1, *shape)
