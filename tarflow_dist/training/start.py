"""What a run starts from: its data, its weights, its newest checkpoint."""

import torch

from tarflow_dist.config import Config
from tarflow_dist.data.shards import Shards, open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.flow.model import Flow
from tarflow_dist.training import checkpoint
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.state import RunState


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
    torch.manual_seed(config.seed)
    flow = Flow(**config.model.model_dump()).to(device)
    return Engine(flow, config, micro_batch_size)


def restore(config: Config, engine: Engine) -> RunState:
    """Loads the run's newest checkpoint into `engine`, at whatever world size and ZeRO stage it was
    written; a run without one starts at 0 images.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    folder = checkpoint.newest(config.run / checkpoint.FOLDER)
    if folder is None:
        return RunState()
    saved = checkpoint.Checkpoint(folder)
    if saved.model != engine.flow.config:
        raise UserError(f"{folder} is of another model than the config's: {saved.model}")
    engine.load_tensors(saved.read)
    engine.optimizer_steps = saved.state.optimizer_steps
    return saved.state
