"""What is done to the model's transformer layers from outside: compilation, activation
checkpointing. Parameter names stay as they are."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
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


def owners(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules of a flow whose forward pass takes weights, with those; a transformer layer,
    which may be compiled, takes all of its own at once."""
    if isinstance(module, TransformerLayer):
        yield module, list(module.parameters())
        return
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        yield from owners(child)
