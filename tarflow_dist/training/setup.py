"""What a run starts from: its data, its weights, its newest checkpoint."""

import math
from dataclasses import fields

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.cost.estimate import fitting_micro_batch
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards, open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.flow.model import Flow
from tarflow_dist.training import latest_checkpoint
from tarflow_dist.training.checkpoint import RunState, newest_whole
from tarflow_dist.training.engine import Engine

GROUPS = 64  # so that each of as many nodes, or of a divisor of them, has groups to itself


def open_data(config: Config, split: str) -> Shards:
    """The shards of `split`, train or val.

    Raises:
        UserError: they are missing, or hold other images than the model takes.
    """
    model = config.model
    data = config.data
    shards = open_shards(data.path, split, cache=data.cache, cache_limit=data.cache_limit)
    shape = (model.in_channels, model.image_size, model.image_size)
    if shards.image_shape != shape:
        raise UserError(
            f"{config.data.path} holds images of (channels, height, width) {shards.image_shape}, "
            f"but model.in_channels and model.image_size say {shape}"
        )
    shards.check_classes(model.num_classes)
    return shards


def choose_micro_batch(config: Config, device: torch.device) -> int:
    """Images a rank takes through the model at once, the same on all ranks: what the config says,
    or else what fits into the smallest of their GPUs. Collective.

    Raises:
        UserError: the batch can't be cut that way.
    """
    ranks = distributed.world_size()
    if device.type != "cuda":
        return config.micro_batch(ranks)
    memory = torch.cuda.mem_get_info(device)[1]  # of all, whatever else is in there
    return fitting_micro_batch(config, min(distributed.gather(memory)), ranks)


def recognise_data(state: RunState, shards: Shards) -> list[str]:
    """Notes in `state` which images the run trains on, and says so if they are others than before
    its checkpoint: a position in their order has another meaning then."""
    before, state.data = state.data, shards.fingerprint
    if before in ("", state.data):
        return []
    return ["the data are others than before: the set was written anew, or another one is there"]


def image_order(config: Config, state: RunState, shards: Shards) -> ImageOrder:
    """The order of the run's images, in the groups that it began with, which `state` notes.

    Raises:
        UserError: the config gives other groups, or the shards at hand are too many for the cache.
    """
    data = config.data
    if state.images == 0:
        even = math.gcd(config.train.batch_size, GROUPS)
        state.groups = data.groups or (even if shards.downloaded else 1)
    elif data.groups not in (None, state.groups):
        raise UserError(
            f"{config.run} began with data.groups {state.groups} and can't go on with "
            f"{data.groups}, which would repeat images and miss others: leave data.groups out"
        )
    order = ImageOrder(
        shards.sizes, seed=config.seed, window=data.shuffle_window, groups=state.groups
    )
    shards.check_cache(order.shards_at_hand)
    return order


def build_engine(config: Config, micro_batch_size: int, device: torch.device) -> Engine:
    """The flow with its first weights, the same on every rank, under DeepSpeed."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    torch.manual_seed(config.seed)
    flow = Flow(**config.model.to_json()).to(device)
    return Engine(flow, config, micro_batch_size)


def restore(config: Config, engine: Engine) -> RunState:
    """Loads the run's newest whole checkpoint, written at whatever world size and ZeRO stage; a run
    without one starts at 0 images.

    Raises:
        UserError: no checkpoint is whole, or it is of another model.
    """
    saved = newest_whole(config.run / latest_checkpoint.FOLDER)
    if saved is None:
        return RunState()
    for field in fields(saved.model):
        was, now = (getattr(config, field.name) for config in (saved.model, engine.flow.config))
        if was != now:
            raise UserError(
                f"{saved.folder} is of another model: its {field.name} is {was}, the config's {now}"
            )
    engine.load(saved.read_part, saved.state.optimizer_steps)
    return saved.state
