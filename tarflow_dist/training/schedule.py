"""Learning rate and weight averaging as functions of the images seen."""

import math

from tarflow_dist.config import OptimizerConfig

# Early in a run the average looks back over this share of it at most, so that it soon forgets the
# random weights (the ramp-up of Karras et al., arXiv 2206.00364).
EMA_RAMPUP = 0.05


def learning_rate(config: OptimizerConfig, images: int, total_images: int) -> float:
    """The learning rate of the step that ends at `images` seen, in a run of `total_images`."""
    if images < config.warmup_images:
        return config.lr * images / config.warmup_images
    if config.schedule == "constant":
        return config.lr
    progress = (images - config.warmup_images) / max(total_images - config.warmup_images, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def ema_decay(config: OptimizerConfig, images: int, batch_size: int) -> float:
    """The decay of the weights' moving average in the step of `batch_size` ending at `images`."""
    halflife = min(config.ema_halflife_images, EMA_RAMPUP * images)
    return 0.5 ** (batch_size / halflife)
