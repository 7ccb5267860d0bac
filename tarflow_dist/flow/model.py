"""The stack of autoregressive flows: likelihood one way, samples the other."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.denoise import score_denoise
from tarflow_dist.flow.guidance import Guidance, Guide, Rule
from tarflow_dist.flow.inverse import SEQUENTIAL, Solver, invert_block
from tarflow_dist.flow.patches import patchify, unpatchify
from tarflow_dist.flow.sizes import Noise, check_sizes, layers_of_blocks
from tarflow_dist.flow.transformer import accurate_dtype

DENOISE_MEMORY = 4 * 2**30
"""Bytes."""
FLOATS_KEPT = 20
"""By autograd for the backward pass, for each patch, layer and channel (counted: 10 to 19)."""


class Flow(nn.Module):
    """TARFlow (arXiv 2412.06329).

    B images of C channels are cut into N patches of D values; flow block t sees them in image order
    (t even) or reversed (t odd). Images and latents are at least float32 whatever the weights are.

    Args:
        image_size: height and width in pixels, a multiple of `patch_size`.
        patch_size: side of a patch.
        in_channels: C.
        width: channels of the transformers, a multiple of `head_dim`.
        num_blocks: T, flow blocks.
        layers_per_block: transformer layers a block: one number, or T numbers in the order of the
            forward pass.
        head_dim: channels an attention head.
        num_classes: 0 for an unconditional model.
        volume_preserving: α = 0; the prior's variance is learned instead (`var`).
        noise: the noise it is trained with, which fixes the pixel map (flow/noise.py).
        sigma: std of the Gaussian noise; None with uniform noise.

    Raises:
        ValueError: sizes that do not fit together.
    """

    var: Tensor
    PRIOR_RATE = 0.1

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int = 3,
        width: int,
        num_blocks: int,
        layers_per_block: int | list[int],
        head_dim: int = 64,
        num_classes: int = 0,
        volume_preserving: bool = False,
        noise: Noise = "gaussian",
        sigma: float | None = None,
    ):
        super().__init__()
        check_sizes(
            image_size=image_size,
            patch_size=patch_size,
            in_channels=in_channels,
            width=width,
            head_dim=head_dim,
            num_blocks=num_blocks,
            layers_per_block=layers_per_block,
            num_classes=num_classes,
            noise=noise,
            sigma=sigma,
        )
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "width": width,
            "num_blocks": num_blocks,
            "layers_per_block": layers_per_block,
            "head_dim": head_dim,
            "num_classes": num_classes,
            "volume_preserving": volume_preserving,
            "noise": noise,
            "sigma": sigma,
        }
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.num_classes = num_classes
        self.noise, self.sigma = noise, sigma
        self.volume_preserving = volume_preserving
        self.num_patches = (image_size // patch_size) ** 2
        self.patch_dim = in_channels * patch_size**2
        self.num_dims = self.num_patches * self.patch_dim
        self.blocks = nn.ModuleList(
            FlowBlock(
                num_patches=self.num_patches,
                patch_dim=self.patch_dim,
                width=width,
                num_layers=num_layers,
                head_dim=head_dim,
                num_classes=num_classes,
                reverse=t % 2 == 1,
                volume_preserving=volume_preserving,
            )
            for t, num_layers in enumerate(layers_of_blocks(num_blocks, layers_per_block))
        )
        self.register_buffer("var", torch.ones(self.num_patches, self.patch_dim))

    @property
    def dtype(self) -> torch.dtype:
        """The type of images and latents: float32, or float64 for a float64 model."""
        return accurate_dtype(next(self.parameters()).dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_channels, self.image_size, self.image_size

    @property
    def device(self) -> torch.device:
        return self.var.device

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images to latents, as training needs them.

        Args:
            x: (B, C, H, W) in [−1, 1], with noise.
            y: (B,) int64 class ids, −1 for a dropped label; None for an unconditional model.

        Returns:
            z (B, N, D), not divided by √var, and each block's log|det| (T, B) in nats.
        """
        z = patchify(x.to(self.dtype), self.patch_size)
        logdets = []
        for block in self.blocks:
            z, logdet = block(z, y)
            logdets.append(logdet)
        return z, torch.stack(logdets)

    def loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        """0.5·mean(z²) + Σ_t mean(αᵗ): the negative log-likelihood under the unit prior in nats a
        dimension, less the constant 0.5·log 2π. Takes what `forward` returns."""
        return 0.5 * z.square().mean() - logdets.sum(dim=0).mean() / self.num_dims

    @torch.no_grad()
    def update_prior(self, mean_square: Tensor) -> None:
        """One step of the prior's running variance (volume-preserving mode): `mean_square` (N, D)
        is z² averaged over the global batch."""
        self.var.lerp_(mean_square.to(self.var.dtype), self.PRIOR_RATE)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] → prior space (B, N, D), standard normal under the model.
        y: (B,) int64, −1 = no label, None for an unconditional model.

        Raises:
            ValueError: shapes that are not this model's, or labels out of range.
        """
        self._check_images(x, y)
        z, _ = self(x, y)
        return z / self._prior_std()

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x | y) (B,) in nats, all constants included. Arguments and errors as `encode`."""
        self._check_images(x, y)
        z, logdets = self(x, y)
        var = self.var.to(self.dtype)
        prior = -0.5 * (z.square() / var + torch.log(2 * math.pi * var)).sum(dim=(1, 2))
        return prior + logdets.sum(dim=0)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        y: Tensor | None = None,
        *,
        guidance: float = 0.0,
        annealed: bool = False,
        guide: Guide = "both",
        attn_temp: float = 1.0,
        rule: Rule = "linear",
        guide_blocks: Sequence[int] | None = None,
        solvers: Sequence[Solver] | None = None,
        on_block: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Prior space (B, N, D) → images (B, C, H, W): the exact inverse of `encode` at guidance 0.

        Args:
            guidance, annealed, guide, attn_temp, rule, guide_blocks: see `Guidance`.
            solvers: how each of the T blocks is inverted; None asks `solvers_for`.
            on_block: called after each block, last to first, with what it gave, (B, N, D).

        Raises:
            ValueError: shapes that are not this model's, labels out of range, or a guidance that
                this model can't have (`Guidance`).
        """
        guided = Guidance(guidance, annealed, guide, attn_temp, rule, guide_blocks)
        guided.check(conditional=y is not None, volume_preserving=self.volume_preserving)
        guidances = guided.per_block(len(self.blocks))
        self._check_latents(z, y)
        if solvers is None:
            solvers = self.solvers_for(len(z), guided)
        if len(solvers) != len(self.blocks):
            raise ValueError(f"{len(solvers)} solvers were given for {len(self.blocks)} blocks")
        x = z.to(self.dtype) * self._prior_std()
        for t in reversed(range(len(self.blocks))):
            block = self.blocks[t]
            assert isinstance(block, FlowBlock)
            x = invert_block(block, x, y, guidances[t], solvers[t])
            if on_block is not None:
                on_block(x)
        return unpatchify(x, self.patch_size, self.image_size)

    def solvers_for(self, batch: int, guidance: Guidance) -> list[Solver]:
        """How `decode` inverts the blocks for `batch` samples: one patch at a time, exactly."""
        return [SEQUENTIAL] * len(self.blocks)

    def denoise(self, x: Tensor, y: Tensor | None = None, sigma: float | None = None) -> Tensor:
        """x + σ²·∇ log p(x | y) with the unit prior, one step; σ is the model's own unless given.
        As many images are taken at once as fit in about `DENOISE_MEMORY`.

        Raises:
            ValueError: a uniform-noise model has no σ of its own; else as `encode`.
        """
        self._check_images(x, y)
        sigma = self.sigma if sigma is None else sigma
        if sigma is None:
            raise ValueError("this model was trained with uniform noise and has no sigma: give one")

        def unit_prior_log_prob(x: Tensor, y: Tensor | None) -> Tensor:
            z, logdets = self(x, y)
            return -0.5 * z.square().sum(dim=(1, 2)) + logdets.sum(dim=0)

        layers = sum(layers_of_blocks(self.config["num_blocks"], self.config["layers_per_block"]))
        kept = self.num_patches * self.config["width"] * layers * FLOATS_KEPT
        batch = max(1, DENOISE_MEMORY // (kept * next(self.parameters()).element_size()))
        return score_denoise(unit_prior_log_prob, x.to(self.dtype), y, sigma, batch=batch)

    def _prior_std(self) -> Tensor:
        return self.var.to(self.dtype).sqrt()

    def _check_images(self, x: Tensor, y: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            raise ValueError(
                f"images have the shape {tuple(x.shape)}, but should have "
                f"(B, {', '.join(map(str, self.image_shape))})"
            )
        self._check_labels(y, len(x))

    def _check_latents(self, z: Tensor, y: Tensor | None) -> None:
        if z.ndim != 3 or z.shape[1:] != (self.num_patches, self.patch_dim):
            raise ValueError(
                f"latents have the shape {tuple(z.shape)}, but should have "
                f"(B, {self.num_patches}, {self.patch_dim})"
            )
        self._check_labels(y, len(z))

    def _check_labels(self, y: Tensor | None, batch: int) -> None:
        if y is None:
            return
        if not self.num_classes:
            raise ValueError("this model is unconditional: it takes no labels")
        if y.shape != (batch,) or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(
                f"labels should be {batch} whole numbers, one a sample; "
                f"got {tuple(y.shape)} of {y.dtype}".replace("torch.", "")
            )
        if y.numel() and not -1 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(
                f"labels must lie in 0…{self.num_classes - 1}, or be -1 for no label; "
                f"got {int(y.min())}…{int(y.max())}"
            )
