"""One autoregressive flow: a causal transformer predicts each patch's μ and α from those before."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow_dist.flow.condition import (
    EMBEDDING_STD,
    NoiseLevelEmbedding,
    condition,
    new_class_embed,
)
from tarflow_dist.flow.permutation import image_place, permute
from tarflow_dist.flow.transformer import TransformerLayer, accurate_dtype


class FlowBlock(nn.Module):
    """z_i = (x_i − μ_i(x_<i)) · exp(−α_i(x_<i)), with μ = α = 0 at the first patch.

    Args:
        num_patches: N, the length of the sequence.
        patch_dim: D, values a patch.
        width, num_layers, head_dim: size of the transformer.
        num_classes: 0 for an unconditional model.
        noise_conditional: the noise level is a condition as well.
        reverse: the block sees the patches last to first.
        volume_preserving: α = 0 everywhere.
    """

    def __init__(
        self,
        *,
        num_patches: int,
        patch_dim: int,
        width: int,
        num_layers: int,
        head_dim: int,
        num_classes: int,
        noise_conditional: bool = False,
        reverse: bool,
        volume_preserving: bool,
    ):
        super().__init__()
        self.reverse = reverse
        self.volume_preserving = volume_preserving
        self.head_dim = head_dim
        self.proj_in = nn.Linear(patch_dim, width)
        self.pos_embed = nn.Parameter(torch.randn(num_patches, width) * EMBEDDING_STD)
        self.class_embed = new_class_embed(num_classes, width)
        self.time_embed = NoiseLevelEmbedding(width) if noise_conditional else None
        self.attn_blocks = nn.ModuleList(
            TransformerLayer(width, head_dim) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(width, patch_dim if volume_preserving else 2 * patch_dim)
        nn.init.zeros_(self.proj_out.weight)  # training starts (nearly) at the identity

    def forward(
        self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data to latent.

        Args:
            x: (B, N, D) patches in image order, at least float32.
            y: (B,) int64 class ids, −1 for a dropped label; None drops all.
            sigma: (B,) noise levels, where they are a condition.

        Returns:
            z (B, N, D) in image order, and log|det dz/dx| (B,) in nats.
        """
        x = self.permute(x)
        h = self.embed(x, self.permuted_positions(), self.condition(y, sigma))
        for layer in self.attn_blocks:
            h = layer(h)
        mu, alpha = self.mu_alpha(self.proj_out(h[:, :-1]))
        mu, alpha = F.pad(mu, (0, 0, 1, 0)), F.pad(alpha, (0, 0, 1, 0))
        z = (x - mu) * torch.exp(-alpha)
        return self.permute(z), -alpha.sum(dim=(1, 2))

    def permute(self, x: Tensor) -> Tensor:
        """Image order to the block's own order, or back: (B, N, D)."""
        return permute(x, reverse=self.reverse)

    def permuted_positions(self) -> Tensor:
        """Position embeddings (N, width) in the block's own order."""
        return permute(self.pos_embed, reverse=self.reverse, dim=0)

    def positions_at(self, places: int | Tensor) -> Tensor:
        """Position embeddings (…, width) at `places` (…) of the block's own order."""
        return self.pos_embed[image_place(places, len(self.pos_embed), reverse=self.reverse)]

    def condition(self, y: Tensor | None, sigma: Tensor | None = None) -> Tensor | None:
        """Class ids (B,), −1 for none, and noise levels (B,) → what is added to every token:
        (B, 1, width), or (1, width) if it is the same for all; None for a model of neither."""
        return condition(self.class_embed, self.time_embed, y, sigma)

    def embed(self, x: Tensor, positions: Tensor, condition: Tensor | None) -> Tensor:
        """Patches (B, S, D) at `positions` (S, width) → the transformer's input (B, S, width)."""
        h = self.proj_in(x.to(self.proj_in.weight.dtype)) + positions
        return h if condition is None else h + condition

    def mu_alpha(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The output projection (B, S, 2D) at patches i → μ and α (B, S, D) of patches i + 1, at
        least float32. A volume-preserving block's is μ alone, (B, S, D)."""
        out = out.to(accurate_dtype(out.dtype))
        if self.volume_preserving:
            return out, torch.zeros_like(out)
        alpha, mu = out.chunk(2, dim=-1)
        return mu, alpha
