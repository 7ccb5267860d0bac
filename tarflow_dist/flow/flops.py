"""Parameters and floating point operations of a TARFlow, from its sizes alone. Imports no torch.

Operations are those of matrix products, two a multiply-add, of one image; all else is below one in
a thousand. Attention counts only the pairs of patches that causality leaves, N(N + 1)/2 of N², as
its kernels skip the others.
"""

from tarflow_dist.flow.config import FlowConfig


class FlowCost:
    """What the flow of `config` costs.

    Attributes:
        num_patches, width: as in `config`.
        layers: transformer layers of each flow block.
        parameters: number of values of each parameter, by the name it has in the model.
    """

    def __init__(self, config: FlowConfig):
        self.config = config
        self.num_patches, self.width, self.layers = config.num_patches, config.width, config.layers
        self.parameters = self._parameters()

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def forward_flops(self) -> int:
        """Of images to latents."""
        return sum(self.layers) * self.layer_flops + self.config.num_blocks * (
            self._proj_in_flops + self._proj_out_flops
        )

    @property
    def training_flops(self) -> int:
        """Of a forward and a backward pass, which is what a training step must do: the numerator of
        model FLOPs utilisation (MFU). The backward pass is two products for each one of the forward
        pass, but for the gradient of the images, which nobody asks for."""
        return 3 * self.forward_flops - self._proj_in_flops

    @property
    def denoising_flops(self) -> int:
        """Of the score ∇ log p(x): a forward pass, and a backward pass to the images only. Without
        the weights' gradients, each linear layer costs one product there, attention two."""
        return 2 * self.forward_flops + sum(self.layers) * self._attention_flops

    @property
    def layer_flops(self) -> int:
        """Of one transformer layer's forward pass: 24·N·width² in its linear layers, and the
        attention."""
        return 24 * self.num_patches * self.width**2 + self._attention_flops

    @property
    def recomputed_layer_flops(self) -> int:
        """Of one checkpointed layer's second forward pass, which stops before its last product:
        nothing in the backward pass needs that one's result."""
        return self.layer_flops - 8 * self.num_patches * self.width**2

    def recomputed_flops(self, checkpoint_every: int) -> int:
        """Of all second forward passes, where each `checkpoint_every`-th layer is checkpointed; 0
        is none."""
        checkpointed = sum(self.layers) // checkpoint_every if checkpoint_every else 0
        return checkpointed * self.recomputed_layer_flops

    @property
    def _attention_flops(self) -> int:
        return 2 * self.num_patches * (self.num_patches + 1) * self.width

    @property
    def _proj_in_flops(self) -> int:
        return 2 * self.num_patches * self.config.patch_dim * self.width

    @property
    def _proj_out_flops(self) -> int:
        return 2 * (self.num_patches - 1) * self.width * self._out_dim

    @property
    def _out_dim(self) -> int:
        return self.config.patch_dim * (1 if self.config.volume_preserving else 2)

    def _parameters(self) -> dict[str, int]:
        w = self.width
        sizes: dict[str, int] = {}
        linear = {"qkv": (w, 3 * w), "proj": (w, w), "main.0": (w, 4 * w), "main.2": (4 * w, w)}
        for t, num_layers in enumerate(self.layers):
            block = f"blocks.{t}"
            sizes[f"{block}.pos_embed"] = self.num_patches * w
            if self.config.num_classes:
                sizes[f"{block}.class_embed"] = self.config.num_classes * w
            sizes |= _linear(f"{block}.proj_in", self.config.patch_dim, w)
            if self.config.sigma_range is not None:
                sizes |= _linear(f"{block}.time_embed.mlp.0", w, 4 * w)
                sizes |= _linear(f"{block}.time_embed.mlp.2", 4 * w, w)
            for k in range(num_layers):
                for part, names in (("attention", ("qkv", "proj")), ("mlp", ("main.0", "main.2"))):
                    prefix = f"{block}.attn_blocks.{k}.{part}"
                    sizes |= {f"{prefix}.norm.weight": w, f"{prefix}.norm.bias": w}
                    for name in names:
                        sizes |= _linear(f"{prefix}.{name}", *linear[name])
            sizes |= _linear(f"{block}.proj_out", w, self._out_dim)
        return sizes


def _linear(name: str, inputs: int, outputs: int) -> dict[str, int]:
    return {f"{name}.weight": inputs * outputs, f"{name}.bias": outputs}
