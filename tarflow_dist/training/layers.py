"""What is done to the model's transformer layers from outside: compilation, activation
checkpointing. Parameter names stay as they are."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.transformer import TransformerLayer


def prepare_layers(flow: Flow, *, compile: bool, checkpoint_every: int) -> None:
    """Compiles each transformer layer, and lets every `checkpoint_every`-th one of the whole stack
    recompute its activations in the backward pass (0: none)."""
    layers = [module for module in flow.modules() if isinstance(module, TransformerLayer)]
    for number, layer in enumerate(layers, start=1):
        if compile:
            layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
        if checkpoint_every and number % checkpoint_every == 0:
            layer.forward = partial(  # type: ignore[method-assign]
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
