"""The stack of autoregressive flows: likelihood one way, samples the other."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.flow.cuda_graphs import GraphedInverse
from tarflow_dist.flow.denoise import Denoising, denoise_in_steps, score_denoise
from tarflow_dist.flow.guidance import Guidance, Guide, Rule
from tarflow_dist.flow.inverse import invert_block
from tarflow_dist.flow.jacobi import SEQUENTIAL, Solver
from tarflow_dist.flow.patches import patchify, unpatchify
from tarflow_dist.flow.permutation import is_reversed
from tarflow_dist.flow.transformer import accurate_dtype

DENOISE_MEMORY = 4 * 2**30
"""Bytes, on a CPU."""
DENOISE_SHARE = 4
"""On a GPU a quarter of its memory: of all, not of what is free, because a batch of another size
can take other kernels, and samples shall have the same bits every time."""
FLOATS_KEPT = 20
"""By autograd for the backward pass, for each patch, layer and channel (counted: 10 to 19)."""

Labels = Tensor | Sequence[int]
"""Class ids, one a sample."""
NoiseLevel = float | Tensor
"""σ of all images, or of each, (B,)."""


class Flow(nn.Module):
    """TARFlow (arXiv 2412.06329), or iTARFlow, which has the noise level as a second condition.

    B images of C channels are cut into N patches of D values; flow block t sees them in image order
    (t even) or reversed (t odd). Images and latents are at least float32 whatever the weights are.

    Args:
        fields: those of `FlowConfig`.

    Raises:
        ValueError: fields that do not fit together.
    """

    var: Tensor
    PRIOR_RATE = 0.1

    def __init__(self, **fields: Any):
        super().__init__()
        self.config = config = FlowConfig(**fields)
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.num_classes, self.noise = config.num_classes, config.noise
        self.sigma, self.sigma_range = config.sigma, config.sigma_range
        self.volume_preserving = config.volume_preserving
        self.num_patches, self.patch_dim = config.num_patches, config.patch_dim
        self.num_dims = self.num_patches * self.patch_dim
        self.blocks = nn.ModuleList(
            FlowBlock(
                num_patches=config.num_patches,
                patch_dim=config.patch_dim,
                width=config.width,
                num_layers=num_layers,
                head_dim=config.head_dim,
                num_classes=config.num_classes,
                noise_conditional=config.sigma_range is not None,
                reverse=is_reversed(t),
                volume_preserving=config.volume_preserving,
            )
            for t, num_layers in enumerate(config.layers)
        )
        self.graphed = GraphedInverse()
        self.register_buffer("var", torch.ones(self.num_patches, self.patch_dim))

    @property
    def dtype(self) -> torch.dtype:
        """The type of images and latents: float32, or float64 for a float64 model."""
        return accurate_dtype(next(self.parameters()).dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.config.in_channels, self.image_size, self.image_size

    @property
    def device(self) -> torch.device:
        return self.var.device

    def forward(
        self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images to latents, as training needs them.

        Args:
            x: (B, C, H, W) in [−1, 1], with noise.
            y: (B,) int64 class ids, −1 for a dropped label; None for an unconditional model.
            sigma: (B,), the noise level of each image, for an iTARFlow.

        Returns:
            z (B, N, D), not divided by √var, and each block's log|det| (T, B) in nats.
        """
        z = patchify(x.to(self.dtype), self.patch_size)
        logdets = []
        for block in self.blocks:
            z, logdet = block(z, y, sigma)
            logdets.append(logdet)
        return z, torch.stack(logdets)

    def loss(self, z: Tensor, logdets: Tensor, weight: Tensor | None = None) -> Tensor:
        """0.5·mean(z²) + Σ_t mean(αᵗ): the negative log-likelihood under the unit prior in nats a
        dimension, less the constant 0.5·log 2π. Takes what `forward` returns, and the `weight` (B,)
        of each image in the mean over them; None weighs all alike."""
        if weight is None:
            return 0.5 * z.square().mean() - logdets.sum(dim=0).mean() / self.num_dims
        return (weight * self.losses(z, logdets)).mean()

    def losses(self, z: Tensor, logdets: Tensor) -> Tensor:
        """The loss of each image (B,), without weights."""
        return 0.5 * z.square().mean(dim=(1, 2)) - logdets.sum(dim=0) / self.num_dims

    @torch.no_grad()
    def update_prior(self, mean_square: Tensor) -> None:
        """One step of the prior's running variance (volume-preserving mode): `mean_square` (N, D)
        is z² averaged over the global batch."""
        self.var.lerp_(mean_square.to(self.var.dtype), self.PRIOR_RATE)

    def encode(self, x: Tensor, y: Labels | None = None, sigma: NoiseLevel | None = None) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] → prior space (B, N, D), standard normal under the model.

        Args:
            y: (B,) whole numbers, −1 = no label, None for an unconditional model.
            sigma: std of the noise in the images, one number or (B,): of an iTARFlow, and of none
                other. All are moved to the model's device.

        Raises:
            ValueError: shapes that are not this model's, labels out of range, or a noise level that
                is missing, not wanted, or not above 0.
        """
        x, y = self._given_images(x, y)
        z, _ = self(x, y, self._noise_levels(sigma, len(x)))
        return z / self._prior_std()

    def log_prob(
        self, x: Tensor, y: Labels | None = None, sigma: NoiseLevel | None = None
    ) -> Tensor:
        """log p(x | y) (B,) in nats, all constants included. Arguments and errors as `encode`."""
        x, y = self._given_images(x, y)
        z, logdets = self(x, y, self._noise_levels(sigma, len(x)))
        var = self.var.to(self.dtype)
        prior = -0.5 * (z.square() / var + torch.log(2 * math.pi * var)).sum(dim=(1, 2))
        return prior + logdets.sum(dim=0)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        y: Labels | None = None,
        *,
        guidance: float = 0.0,
        annealed: bool = False,
        guide: Guide = "both",
        attn_temp: float = 1.0,
        rule: Rule = "linear",
        guide_blocks: Sequence[int] | None = None,
        sigma: NoiseLevel | None = None,
        solvers: Sequence[Solver] | None = None,
        on_block: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Prior space (B, N, D) → images (B, C, H, W): the exact inverse of `encode` at guidance 0.
        Latents and labels are moved to the model's device.

        Args:
            guidance, annealed, guide, attn_temp, rule, guide_blocks: see `Guidance`.
            sigma: noise level of the images, of an iTARFlow alone; None is its largest.
            solvers: how each of the T blocks is inverted; None asks `solvers_for`.
            on_block: called after each block, last to first, with what it gave, (B, N, D).

        Raises:
            ValueError: as `encode`, or a guidance that this model can't have (`Guidance`).
        """
        guided = Guidance(guidance, annealed, guide, attn_temp, rule, guide_blocks)
        guided.check(conditional=y is not None, volume_preserving=self.volume_preserving)
        guidances = guided.per_block(len(self.blocks))
        z, y = self._given_latents(z, y)
        if solvers is None:
            solvers = self.solvers_for(len(z), guided)
        if len(solvers) != len(self.blocks):
            raise ValueError(f"{len(solvers)} solvers were given for {len(self.blocks)} blocks")
        if sigma is None and self.sigma_range is not None:
            sigma = self.sigma_range[1]
        levels = self._noise_levels(sigma, len(z))
        x = z.to(self.dtype) * self._prior_std()
        for t in reversed(range(len(self.blocks))):
            block = self.blocks[t]
            assert isinstance(block, FlowBlock)
            x = invert_block(block, x, y, guidances[t], solvers[t], levels, self.graphed)
            if on_block is not None:
                on_block(x)
        return unpatchify(x, self.patch_size, self.image_size)

    def solvers_for(self, batch: int, guidance: Guidance) -> list[Solver]:
        """How `decode` inverts the blocks for `batch` samples: one patch at a time, exactly."""
        return [SEQUENTIAL] * len(self.blocks)

    def denoise(
        self,
        x: Tensor,
        y: Labels | None = None,
        sigma: float | None = None,
        *,
        steps: int | None = None,
        clip: bool = False,
        order: int = 1,
        normal: Callable[[int], Tensor] | None = None,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Removes the training noise from samples, with the unit prior.

        A TARFlow takes one score step, x + σ²·∇ log p(x | y); σ is the model's own unless given. So
        does an iTARFlow at a given σ. Else it goes from its largest noise level to its least in
        `steps` of them, by default one each 0.01, and from there to 0.

        Args:
            x: (B, C, H, W).
            y: (B,) int64, −1 = no label, None for an unconditional model.
            steps, clip, order: of an iTARFlow alone; see `Denoising`.
            normal: standard normal numbers like x for each step, which make it stochastic.
            on_step: called with the images after each step.

        Raises:
            ValueError: a uniform-noise model has no σ of its own; steps, clipping or an order where
                one step is taken, or that there can't be; else as `encode`.
        """
        x, y = self._given_images(x, y)
        x = x.to(self.dtype)
        how = Denoising(steps, clip, normal is not None, order)
        if self.sigma_range is None or sigma is not None:
            if how != Denoising():
                raise ValueError(
                    "steps, clip, order and normal are for the steps down from an iTARFlow's "
                    "largest noise level: leave them out, or sigma"
                )
            sigma = self.sigma if sigma is None else sigma
            if sigma is None:
                raise ValueError(
                    "this model was trained with uniform noise and has no sigma: give one"
                )
            x = self._score_step(x, y, sigma)
            if on_step is not None:
                on_step(x)
            return x
        return denoise_in_steps(
            lambda x, sigma: self._score_step(x, y, sigma),
            x,
            how.levels(*self.sigma_range, self.config.denoising_steps),
            clip=clip,
            order=order,
            normal=normal,
            on_step=on_step,
        )

    def _score_step(self, x: Tensor, y: Tensor | None, sigma: float) -> Tensor:
        """As many images are taken at once as fit in about a quarter of a GPU's memory, or in
        `DENOISE_MEMORY`."""

        def unit_prior_log_prob(x: Tensor, y: Tensor | None) -> Tensor:
            levels = None if self.sigma_range is None else self._noise_levels(sigma, len(x))
            z, logdets = self(x, y, levels)
            return -0.5 * z.square().sum(dim=(1, 2)) + logdets.sum(dim=0)

        kept = self.num_patches * self.config.width * sum(self.config.layers) * FLOATS_KEPT
        memory = DENOISE_MEMORY
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[1] // DENOISE_SHARE
        batch = max(1, memory // (kept * next(self.parameters()).element_size()))
        return score_denoise(unit_prior_log_prob, x, y, sigma, batch=batch)

    def _prior_std(self) -> Tensor:
        return self.var.to(self.dtype).sqrt()

    def _noise_levels(self, sigma: NoiseLevel | None, batch: int) -> Tensor | None:
        """(B,) for the transformers, or None where the noise level is no condition."""
        if self.sigma_range is None:
            if sigma is not None:
                raise ValueError("this model has one noise level, its own: leave sigma out")
            return None
        if sigma is None:
            raise ValueError(
                "this model has the noise level as a condition: give sigma, the std of the noise "
                f"in the images, from {self.sigma_range[0]:g} to {self.sigma_range[1]:g}"
            )
        levels = torch.as_tensor(sigma, dtype=self.dtype)  # a number is judged without the device
        if levels.shape not in ((), (batch,)) or not (levels > 0).all():
            raise ValueError(
                f"sigma should be a number above 0, or {batch} of them, one an image; got "
                f"{tuple(levels.shape)}, from {float(levels.min()):g}"
            )
        return levels.to(self.device).expand(batch)

    def _given_images(self, x: Tensor, y: Labels | None) -> tuple[Tensor, Tensor | None]:
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            raise ValueError(
                f"images have the shape {tuple(x.shape)}, but should have "
                f"(B, {', '.join(map(str, self.image_shape))})"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"images are {x.dtype}, but should be numbers in [-1, 1], as flow.noise makes of "
                "pixels".replace("torch.", "")
            )
        return x.to(self.device), self.labels(y, len(x))

    def _given_latents(self, z: Tensor, y: Labels | None) -> tuple[Tensor, Tensor | None]:
        if z.ndim != 3 or z.shape[1:] != (self.num_patches, self.patch_dim):
            raise ValueError(
                f"latents have the shape {tuple(z.shape)}, but should have "
                f"(B, {self.num_patches}, {self.patch_dim})"
            )
        return z.to(self.device), self.labels(y, len(z))

    def labels(self, y: Labels | None, batch: int) -> Tensor | None:
        """`y` as a tensor (`batch`,) on the model's device.

        Raises:
            ValueError: the model takes no labels, or not these.
        """
        if y is None:
            return None
        if not self.num_classes:
            raise ValueError("this model is unconditional: it takes no labels")
        y = torch.as_tensor(y)
        if y.shape != (batch,) or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(
                f"labels should be {batch} whole numbers, one a sample; "
                f"got {tuple(y.shape)} of {y.dtype}".replace("torch.", "")
            )
        if batch:
            lowest, highest = torch.stack(y.aminmax()).tolist()  # waits for the device once
            if not -1 <= lowest <= highest < self.num_classes:
                raise ValueError(
                    f"labels must lie in 0…{self.num_classes - 1}, or be -1 for no label; "
                    f"got {lowest}…{highest}"
                )
        return y.to(self.device)
