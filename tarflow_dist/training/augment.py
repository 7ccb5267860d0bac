"""A batch of pixels to what the flow trains on: flips, noise and dropped labels, on the device.

All of it is a function of (seed, epoch, image index), never of rank, world size or batch.
"""

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.config import Config
from tarflow_dist.data.loader import Batch
from tarflow_dist.models.likelihood import with_noise


def augment(
    batch: Batch, config: Config, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """uint8 images (B, C, H, W) → noisy images (B, C, H, W) float32; labels (B,) int64 with −1
    where dropped, or None for an unconditional model; the images' noise levels (B,) float32, or
    None where the level is no condition."""
    pixels = batch.images.to(device, non_blocking=True)
    index = batch.index.to(device, non_blocking=True)
    epoch = batch.epoch.to(device, non_blocking=True)

    def uniform(shape: tuple[int, ...], purpose: str) -> Tensor:
        return rng.uniform(shape, seed=config.seed, purpose=purpose, index=index, epoch=epoch)

    if config.data.flip:
        mirrored = uniform((1, 1, 1), "flip") < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    model = config.model
    x, levels = with_noise(
        pixels,
        model,
        config.train.noise_levels,
        seed=config.seed,
        purpose="noise",
        index=index,
        epoch=epoch,
    )
    if not model.num_classes:
        return x.float(), None, levels
    labels = batch.labels.to(device, non_blocking=True)
    if config.train.label_drop:
        labels = labels.masked_fill(uniform((), "label drop") < config.train.label_drop, -1)
    return x.float(), labels, levels
