"""Other people's checkpoints: published .pth files, what trainers make of them, DeepSpeed's.

They hold weights under the published names, alone or among other things; the model's size is read
off their shapes.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow_dist.errors import UserError

# what wrappers put into a parameter's name: DistributedDataParallel, compile, FSDP, checkpointing
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
FIRST = "blocks.0.proj_in.weight"  # of every TARFlow
DEEPEST = 4  # dictionaries in dictionaries that are looked into
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAME = re.compile(r"blocks\.\d+\.|var$")
LAYERS = re.compile(r"\.head_blocks\.")  # iTARFlow's name for attn_blocks
LAYER = re.compile(r"blocks\.(\d+)\.attn_blocks\.(\d+)\.")


def read_published(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a .pth file. Nothing but plain values and tensors is unpickled.

    Args:
        key: which state dict in it, where there are several: such as model or ema.model.

    Raises:
        UserError: the file is missing, damaged, or holds other objects; it has no TARFlow in it, or
            several and no `key`.
    """
    try:
        # files of before torch 1.6 can't be mapped into memory
        mappable = zipfile.is_zipfile(file)
        if mappable:
            with zipfile.ZipFile(file) as archive:  # torch doesn't look at its checksums
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} fails its checksum")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object ({found[1]})" if found else "objects"
        raise UserError(
            f"{file} holds {what} besides tensors, or is damaged; reading such can run code hidden "
            "in it: save the state dict alone"
        ) from error
    except Exception as error:  # of which kind depends on the damage
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} is no file of plain tensors, or is damaged: {reason}") from error
    return _choose(content, file, key)


def read_deepspeed(folder: Path, key: str | None = None) -> dict[str, Tensor]:
    """The fp32 weights of a DeepSpeed checkpoint of any ZeRO stage, put together by DeepSpeed's own
    reader. It unpickles: only for files one trusts. Arguments and errors as `read_published`."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        tag = folder / (folder / "latest").read_text().strip()
        if any(tag.glob("*_optim_states.pt")):
            content = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        else:  # stage 0, where no rank has a part of its own
            content = torch.load(tag / "mp_rank_00_model_states.pt", "cpu", weights_only=False)
            content = content["module"]
    except Exception as error:  # DeepSpeed's reader raises bare exceptions of many kinds
        raise UserError(f"{folder} can't be read as a DeepSpeed checkpoint: {error}") from error
    return _choose(content, folder, key)


def infer_config(weights: dict[str, Tensor], *, in_channels: int, source: Path) -> dict[str, Any]:
    """The arguments of `Flow` that the shapes tell: all but the noise and the heads.

    Raises:
        UserError: the weights are no TARFlow's, or not with that number of channels.
    """
    try:
        layers: dict[int, int] = {}  # of each block
        for found in filter(None, map(LAYER.match, weights)):
            block, layer = map(int, found.groups())
            layers[block] = max(layers.get(block, 0), layer + 1)
        counts = [layers[block] for block in range(len(layers))]
        width, patch_dim = weights[FIRST].shape
        num_patches = weights["blocks.0.pos_embed"].shape[0]
        output_dim = weights["blocks.0.proj_out.weight"].shape[0]
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
        "num_blocks": len(counts),
        "layers_per_block": counts[0] if len(set(counts)) == 1 else counts,
        "num_classes": 0 if classes is None else classes.shape[0],
        "volume_preserving": output_dim == patch_dim,
    }


def _choose(content: Any, source: Path, key: str | None) -> dict[str, Tensor]:
    """The one TARFlow in `content`, or that of `key`."""
    found = dict(_state_dicts(content))
    if not found:
        raise UserError(
            f"{source} holds no TARFlow: no tensors in it are named and shaped like one's"
        )
    if key is None and len(found) > 1:
        raise UserError(f"{source} holds several models: choose one with --key, {_listed(found)}")
    if key is not None and key not in found:
        raise UserError(f"{source} has no model under --key {key}: there is {_listed(found)}")
    return _plain(found[key] if key is not None else next(iter(found.values())), source)


def _listed(found: Mapping[str, Any]) -> str:
    return " or ".join(map(repr, found))


def _state_dicts(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict]]:
    """Each TARFlow's state dict in nested dictionaries and lists, with published names, under where
    it stands: the keys on the way and what comes before its names, with dots between."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping) or depth > DEEPEST:
        return
    names = {name: _unwrapped(name) for name in content if isinstance(name, str)}
    for prefix in sorted(n.removesuffix(FIRST) for n in names.values() if n.endswith(FIRST)):
        weights = {
            LAYERS.sub(".attn_blocks.", name.removeprefix(prefix)): content[original]
            for original, name in names.items()
            if name.startswith(prefix) and NAME.match(name.removeprefix(prefix))
        }
        here = ".".join(filter(None, (path, prefix.rstrip("."))))
        yield here, {n: w for n, w in weights.items() if not n.endswith("attn_mask")}
    for name, inner in content.items():
        below = ".".join(filter(None, (path, str(name))))
        yield from _state_dicts(inner, below, depth + 1)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _plain(weights: dict[str, Any], source: Path) -> dict[str, Tensor]:
    """`weights`, each in memory of its own.

    Raises:
        UserError: one of them is no plain tensor of numbers.
    """
    for name, tensor in weights.items():
        if kind := _oddity(tensor):
            raise UserError(f"{source} can't be converted: its {name} is {kind}")
    return {name: tensor.clone() for name, tensor in weights.items()}  # some are tied


def _oddity(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"no tensor, but {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_meta:
        return "a tensor without values"
    if tensor.dtype not in FLOATS:
        return f"of {tensor.dtype}".replace("torch.", "")
    return ""
