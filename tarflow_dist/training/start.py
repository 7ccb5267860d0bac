"""What a run starts from: its data, its weights, its newest checkpoint."""

import ctypes

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import find_card
from tarflow_dist.data.shards import Shards, open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.flow.counts import Counts
from tarflow_dist.flow.model import Flow
from tarflow_dist.telemetry.pace import Pace
from tarflow_dist.training.checkpoint import FOLDER, newest_whole
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.state import RunState

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names and numbers of malloc.h."""


def open_data(config: Config) -> Shards:
    """The training shards.

    Raises:
        UserError: they are missing, or hold other images than the model takes.
    """
    model = config.model
    data = config.data
    shards = open_shards(
        data.path,
        "train",
        cache=data.cache,
        cache_limit=data.cache_limit,
        window=data.shuffle_window,
    )
    shape = (model.in_channels, model.image_size, model.image_size)
    if shards.image_shape != shape:
        raise UserError(
            f"{config.data.path} holds images of (channels, height, width) {shards.image_shape}, "
            f"but model.in_channels and model.image_size say {shape}"
        )
    if model.num_classes and shards.num_classes > model.num_classes:
        raise UserError(
            f"{config.data.path} holds {shards.num_classes} classes, but model.num_classes is "
            f"{model.num_classes}"
        )
    return shards


def build_engine(config: Config, micro_batch_size: int, device: torch.device) -> Engine:
    """The flow with its first weights, the same on every rank, under DeepSpeed."""
    if device.type == "cpu":
        _keep_freed_memory()
    torch.manual_seed(config.seed)
    flow = Flow(**config.model.model_dump()).to(device)
    return Engine(flow, config, micro_batch_size)


def _keep_freed_memory() -> None:
    """Has glibc keep the memory of a step's activations for the next step, which would otherwise
    spend 5 to 10 % of its time on page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def restore(config: Config, engine: Engine) -> RunState:
    """Loads the run's newest whole checkpoint into `engine`, at whatever world size and ZeRO stage
    it was written; a run without one starts at 0 images.

    Raises:
        UserError: no checkpoint is whole, or it is of another model.
    """
    saved = newest_whole(config.run / FOLDER)
    if saved is None:
        return RunState()
    for key, value in engine.flow.config.items():
        if saved.model.get(key) != value:
            raise UserError(
                f"{saved.folder} is of another model: its {key} is {saved.model.get(key)}, the "
                f"config's {value}"
            )
    engine.load(saved.read, saved.state.optimizer_steps)
    return saved.state


def start_pace(config: Config, device: torch.device, images: int) -> Pace:
    """Measures the run's speed from `images` seen on, against the peak of the GPU if its data sheet
    is known."""
    peak = None
    known = find_card(distributed.device_name(device))
    if known is not None:
        peak = known.fp32_flops if config.train.precision == "fp32" else known.bf16_flops
    flops = Counts(**config.model.model_dump()).training_flops
    return Pace(device, images, flops=flops, peak=peak)
