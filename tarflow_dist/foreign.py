"""Other people's checkpoints: published TARFlow .pth files and plain DeepSpeed ZeRO checkpoints.

Both hold just weights, under the published names; the model's size is read off their shapes.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow_dist.errors import UserError

# what DistributedDataParallel and torch.compile put into a parameter's name
WRAPPERS = ("module", "_orig_mod")


def read_published(file: Path) -> dict[str, Tensor]:
    """The weights of a published .pth file. Nothing but tensors is unpickled.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors.
    """
    try:
        # files of before torch 1.6 can't be mapped into memory
        mappable = zipfile.is_zipfile(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # of which kind depends on the damage
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} is no file of plain tensors, or is damaged: {reason}") from error
    return _clean(weights, file)


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """The fp32 weights of a DeepSpeed ZeRO checkpoint, put together by DeepSpeed's own reader. It
    unpickles: only for files one trusts.

    Raises:
        UserError: DeepSpeed can't read it.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    except Exception as error:  # DeepSpeed's reader raises bare exceptions of many kinds
        raise UserError(f"{folder} can't be read as a DeepSpeed checkpoint: {error}") from error
    return _clean(weights, folder)


def infer_config(weights: dict[str, Tensor], *, in_channels: int, source: Path) -> dict[str, Any]:
    """The arguments of `Flow` that the shapes tell: all but the noise and the heads.

    Raises:
        UserError: the weights are no TARFlow's, or not with that number of channels.
    """
    try:
        num_blocks = 1 + max(_number(name, "blocks") for name in weights if "blocks." in name)
        width, patch_dim = weights["blocks.0.proj_in.weight"].shape
        num_patches = weights["blocks.0.pos_embed"].shape[0]
        output_dim = weights["blocks.0.proj_out.weight"].shape[0]
        layers = [_count_layers(weights, t) for t in range(num_blocks)]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source} holds no TARFlow: its tensors are not named and shaped like one's"
        ) from error
    if in_channels < 1:
        raise UserError(f"--in-channels is {in_channels}, but must be 1 or more")
    patch_size = math.isqrt(patch_dim // in_channels)
    if in_channels * patch_size**2 != patch_dim:
        raise UserError(
            f"{source} has {patch_dim} values a patch, which no square patch of {in_channels} "
            "channels has: name the right number with --in-channels"
        )
    classes = weights.get("blocks.0.class_embed")
    return {
        "image_size": math.isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "width": width,
        "num_blocks": num_blocks,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "num_classes": 0 if classes is None else classes.shape[0],
        "volume_preserving": output_dim == patch_dim,
    }


def _clean(weights: Any, source: Path) -> dict[str, Tensor]:
    """Names without wrappers' words, and without the causal masks, which are no weights."""
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{source} holds no plain state dict of tensors")
    cleaned = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in weights.items()
    }
    return {name: tensor for name, tensor in cleaned.items() if not name.endswith("attn_mask")}


def _count_layers(weights: dict[str, Tensor], block: int) -> int:
    prefix = f"blocks.{block}.attn_blocks."
    return 1 + max(_number(name, "attn_blocks") for name in weights if name.startswith(prefix))


def _number(name: str, module: str) -> int:
    """The number behind `module` in a parameter's name: 3 for blocks in blocks.3.pos_embed."""
    parts = name.split(".")
    return int(parts[parts.index(module) + 1])
