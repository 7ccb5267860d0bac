"""A log-likelihood in the units that people quote."""

import math

# log2 128: an 8-bit bin is 1/128 wide in x = (k + u)/128 − 1
BIN_BITS = 7


def loss_of(log_prob: float) -> float:
    """The training loss 0.5·mean(z²) + Σ_t mean(αᵗ) that goes with a log-likelihood in nats a
    dimension: its negative, without the constant 0.5·log 2π."""
    return -log_prob - 0.5 * math.log(2 * math.pi)


def log_prob_of(loss: float) -> float:
    """The log-likelihood in nats a dimension that goes with a training loss: `loss_of` undone."""
    return -loss - 0.5 * math.log(2 * math.pi)


def bits_per_dim(log_prob: float) -> float:
    """Bits a dimension of 8-bit images, from the log-likelihood of a uniform-noise model in nats a
    dimension: −log p(x)/ln 2 + 7."""
    return -log_prob / math.log(2) + BIN_BITS
