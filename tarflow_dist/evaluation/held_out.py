"""The loss on images that the model was not trained on."""

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.noise import add_gaussian


@torch.no_grad()
def held_out_loss(flow: Flow, images: Tensor, labels: Tensor | None, *, draws: int = 5) -> float:
    """The training loss under the model's own Gaussian noise, in nats a dimension, as the mean over
    `draws` of the noise.

    Args:
        flow: trained with Gaussian noise.
        images: uint8 (B, C, H, W).
        labels: (B,) int64, or None for an unconditional model.
    """
    assert flow.sigma is not None, "the loss of a uniform-noise model is its bits per dimension"
    index = torch.arange(len(images))
    losses = []
    for draw in range(draws):
        normal = rng.normal(
            tuple(images.shape[1:]), seed=0, purpose="held out noise", index=index, epoch=draw
        )
        x = add_gaussian(images, normal, flow.sigma)
        losses.append(flow.loss(*flow(x, labels)).item())
    return sum(losses) / draws
