"""The whole cost of a run: does it fit, how long does it take, what does it read and write."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tarflow_dist.config import Config, Stage
from tarflow_dist.cost.cards import Card
from tarflow_dist.cost.memory import FP32, Memory, training_memory
from tarflow_dist.files import read_json
from tarflow_dist.flow.flops import FlowCost

# Share of a card's memory that is left for CUDA's context, NCCL, cuBLAS and fragmentation: ours,
# not measured.
HEADROOM = 0.08
# fp32 numbers a checkpoint holds of each parameter: weights, two moments, moving average
CHECKPOINT_COPIES = 4


@dataclass(frozen=True)
class Layout:
    """One way to train the run.

    Attributes:
        stage: ZeRO's.
        checkpoint_every: every k-th layer is recomputed; 0: none.
        chosen: the config's own.
        memory: on each GPU.
        fits: within the card's memory less the headroom.
        largest_micro_batch: images a GPU and pass that would fit; 0 if none.
    """

    stage: Stage
    checkpoint_every: int
    chosen: bool
    memory: Memory
    fits: bool
    largest_micro_batch: int


@dataclass(frozen=True)
class Speed:
    """Training at the stated utilisation, recomputation counted as work.

    Attributes:
        flops: operations an image, with those done twice.
        images_per_second: over all GPUs.
        days: for the whole run.
        read_per_second: bytes of shards, over all GPUs.
    """

    flops: int
    images_per_second: float
    days: float
    read_per_second: float


@dataclass(frozen=True)
class Sampling:
    """Guided samples by the sequential inverse, weights and caches in bf16.

    Attributes:
        flops: operations a sample, denoising included.
        denoising_steps: score steps a sample.
        cache_bytes: keys and values read a sample.
        weight_bytes: weights read a sample, shared by a batch.
        gpu_hours: for all samples, at the card's full bandwidth, and denoising at the stated MFU:
            less than any run will need.
    """

    count: int
    batch_size: int
    flops: int
    denoising_steps: int
    cache_bytes: int
    weight_bytes: float
    gpu_hours: float


@dataclass(frozen=True)
class Estimate:
    """What `python -m tarflow_dist.plan` prints. Bytes, seconds, operations.

    Attributes:
        micro_batch: images a GPU and pass, in `passes` passes a step.
        image_bytes: of a stored image; `image_bytes_measured` if the data's own summary says so,
            else those of raw pixels.
        checkpoint_bytes: of one checkpoint.
    """

    gpus: int
    micro_batch: int
    passes: int
    parameters: int
    forward_flops: int
    training_flops: int
    layouts: list[Layout]
    plain: Speed
    checkpointed: Speed
    image_bytes: float
    image_bytes_measured: bool
    checkpoint_bytes: int
    sampling: Sampling

    @property
    def chosen(self) -> Layout:
        """How the config trains."""
        return next(layout for layout in self.layouts if layout.chosen)


def estimate(config: Config, card: Card, gpus: int, *, mfu: float) -> Estimate:
    """The cost of the run of `config` on `gpus` of `card`, at model FLOPs utilisation `mfu`.

    Raises:
        UserError: the batch can't be cut over that many GPUs.
    """
    counts = FlowCost(config.model)
    micro_batch = fitting_micro_batch(config, card.memory, gpus)
    passes = config.train.batch_size // (micro_batch * gpus)
    every = config.train.activation_checkpointing
    image_bytes = _stored_image_bytes(config)
    raw_bytes = config.model.in_channels * config.model.image_size**2
    peak = card.peak_flops(config.train.precision)

    def speed(checkpoint_every: int) -> Speed:
        flops = counts.training_flops + counts.recomputed_flops(checkpoint_every)
        rate = mfu * peak * gpus / flops
        days = config.train.images / rate / 86_400
        return Speed(flops, rate, days, rate * (image_bytes or raw_bytes))

    return Estimate(
        gpus=gpus,
        micro_batch=micro_batch,
        passes=passes,
        parameters=counts.num_parameters,
        forward_flops=counts.forward_flops,
        training_flops=counts.training_flops,
        layouts=list(_layouts(config, card, gpus, micro_batch)),
        plain=speed(0),
        checkpointed=speed(every or 1),
        image_bytes=image_bytes or raw_bytes,
        image_bytes_measured=image_bytes is not None,
        checkpoint_bytes=checkpoint_bytes(counts),
        sampling=_sampling(counts, card, mfu),
    )


def fitting_micro_batch(config: Config, memory: int, gpus: int) -> int:
    """Images a GPU takes through the model at once: what the config says, or else the largest part
    of its share of the batch that fits into `memory` bytes; 1 if none does.

    Raises:
        UserError: the batch can't be cut over that many GPUs.
    """
    micro_batch = config.micro_batch(gpus)
    if config.train.micro_batch_size is not None:
        return micro_batch
    return _largest_micro_batch(config, memory, gpus) or 1


def checkpoint_bytes(counts: FlowCost) -> int:
    """Size of one checkpoint of that model."""
    prior = counts.num_patches * counts.config.patch_dim
    return FP32 * (CHECKPOINT_COPIES * counts.num_parameters + prior)


def does_not_fit(result: Estimate, gpu: str) -> str:
    """A sentence that says so of the config's own layout, and what would fit into `gpu`."""
    chosen = result.chosen
    need = f"this run needs {chosen.memory.peak / 2**30:.1f} GiB on each {gpu} and can't fit"
    if chosen.largest_micro_batch:
        return f"{need}: train.micro_batch_size={chosen.largest_micro_batch} would"
    for layout in result.layouts:
        if layout.largest_micro_batch:
            return (
                f"{need}: train.zero_stage={layout.stage} with "
                f"train.activation_checkpointing={layout.checkpoint_every} and "
                f"train.micro_batch_size={layout.largest_micro_batch} would"
            )
    return f"{need}: it takes a larger card, more GPUs or train.offload=true at ZeRO 3"


def _layouts(config: Config, card: Card, gpus: int, micro_batch: int) -> Iterator[Layout]:
    train = config.train
    for stage in get_args(Stage):
        if stage == 0 and train.precision == "bf16":
            continue  # refused by the config
        for every in (0, train.activation_checkpointing or 1):
            other = with_training(config, zero_stage=stage, activation_checkpointing=every)
            memory = training_memory(other, gpus, micro_batch)
            yield Layout(
                stage=stage,
                checkpoint_every=every,
                chosen=other == config,
                memory=memory,
                fits=memory.peak <= card.memory * (1 - HEADROOM),
                largest_micro_batch=_largest_micro_batch(other, card.memory, gpus),
            )


def with_training(config: Config, **settings: Any) -> Config:
    """`config` with other settings in `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def _largest_micro_batch(config: Config, memory: int, gpus: int) -> int:
    """0 if none fits into `memory` less the headroom."""
    share, room = config.train.batch_size // gpus, memory * (1 - HEADROOM)
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    return next((s for s in sizes if training_memory(config, gpus, s).peak <= room), 0)


def _stored_image_bytes(config: Config) -> float | None:
    """Mean size of a training image in the shards, if they lie here."""
    folder = Path(config.data.path)
    try:
        images = read_json(folder / "summary.json")["images"]["train"]
        return sum(file.stat().st_size for file in (folder / "train").iterdir()) / images
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return None


def _sampling(counts: FlowCost, card: Card, mfu: float) -> Sampling:
    count, batch_size, passes = 50_000, 100, 2  # sample_fid's batch; with and without the label
    steps = counts.num_patches - 1  # the last patch is predicted, never an input
    layers = sum(counts.layers)
    w = counts.width
    keys_read = steps * (steps + 1) // 2
    cache_bytes = passes * layers * keys_read * 2 * w * 2
    linear = sum(
        size
        for name, size in counts.parameters.items()
        if not name.endswith(("pos_embed", "class_embed", "norm.weight", "bias"))
    )
    weight_bytes = steps * linear * 2 / batch_size
    decode = passes * (2 * steps * linear + layers * 4 * keys_read * w)
    seconds = (cache_bytes + weight_bytes) / card.bandwidth
    denoising_steps = counts.config.denoising_steps
    denoising_flops = denoising_steps * counts.denoising_flops
    seconds += denoising_flops / (mfu * card.bf16_flops)
    return Sampling(
        count,
        batch_size,
        decode + denoising_flops,
        denoising_steps,
        cache_bytes,
        weight_bytes,
        count * seconds / 3600,
    )
