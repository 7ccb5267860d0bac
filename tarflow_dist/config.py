"""The one config tree of a training run.

Every field is documented where it is defined, and `python -m tarflow_dist.train --help` prints them
all. Amounts of training are counted in images, so they hold at any batch size and world size.
"""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from tarflow_dist.errors import UserError
from tarflow_dist.flow.config import FlowConfig, NoiseLevels
from tarflow_dist.flow.guidance import Guidance

Share = Annotated[float, Field(ge=0, le=1)]
LossWeight = Literal["none", "sigma", "sigma_squared"]
Precision = Literal["fp32", "bf16", "bf16_autocast"]
Stage = Literal[0, 1, 2, 3]
"""ZeRO's."""
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """The shards, as data_prep writes them."""

    path: str
    """A SHARDS folder with train/ and val/, MDS or WebDataset tar (read from what lies there), or
    the address of one in an object store (s3://bucket/shards/mds)."""
    cache: Path | None = None
    """Folder on a local disk where shards of an object store are kept, shared by the ranks of a
    machine; null: one in the temporary folder."""
    cache_limit: PositiveInt = 100_000_000_000
    """Bytes that the cache may hold; the longest unused shards make room."""
    flip: bool = False
    """Mirror images left to right at random."""
    shuffle_window: PositiveInt = 16
    """Shards whose images are shuffled together, over all groups, each of which has one at least;
    shards themselves are shuffled every epoch."""
    groups: PositiveInt | None = None
    """Groups that the set is dealt to; each batch has as many images of each, and a node reads the
    shards of its ranks' groups alone, each of which it downloads as a whole from an object store.
    Null: a run goes on with those that it began with; a new one takes 64, or the largest number
    that divides 64 and the batch, if its shards are in an object store, else 1."""
    num_workers: NonNegativeInt = 4
    """Processes a rank that read and decode; 0 reads in the training process."""


class OptimizerConfig(Section):
    """AdamW and its learning rate; the defaults are the paper's."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to min_lr over the run, or constant."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate grows linearly to its peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW's decoupled weight decay."""
    clip_grad_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient; null leaves it alone."""
    ema_halflife_images: PositiveInt = 500_000
    """Half-life of the weights' moving average, in images; shorter early in the run."""

    @model_validator(mode="after")
    def _min_below_peak(self) -> Self:
        if self.schedule == "cosine" and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class TrainConfig(Section):
    """How much is trained, and how it is spread over ranks."""

    images: PositiveInt
    """Length of the run in images; the last step may go past it."""
    batch_size: PositiveInt
    """Images an optimiser step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Images a rank takes through the model at once; null: its whole share of the batch, or on a
    GPU as large a part of it as fits into the memory by tarflow_dist.plan. Gradients are
    accumulated over batch_size / (micro_batch_size x ranks) passes, and the curve is the same but
    for rounding."""
    precision: Precision = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32; bf16_autocast keeps fp32
    weights and multiplies matrices in bf16."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over the ranks. bf16 halves what they send, for a slow network,
    and rounds each rank's gradient and the sum on its way; over passes they are summed in fp32."""
    zero_stage: Stage = 1
    """DeepSpeed ZeRO: 0 keeps everything on every rank, 1 shards the optimiser state over the
    ranks, 2 the gradients too, 3 the weights too."""
    offload: bool = False
    """Keep the optimiser's state in host memory and take its steps there (ZeRO 2 and 3): saves GPU
    memory, costs time."""
    activation_checkpointing: NonNegativeInt = 0
    """Recompute every k-th transformer layer in the backward pass instead of keeping its
    activations: 0 none, 1 every layer."""
    deterministic: bool = False
    """On a GPU, take only kernels that give the same bits every time, so that a resumed run equals
    an unbroken one there too; they are slower. A CPU's are such."""
    compile: bool = False
    """Compile each transformer layer with torch.compile. At zero_stage 3 little is gained: there
    the gathering of weights breaks each layer's graph."""
    label_drop: Share = 0.0
    """Share of images whose label is dropped, so that the model learns to do without (guidance)."""
    noise_levels: NoiseLevels = "uniform"
    """How an iTARFlow's noise level is drawn for each image: uniform in model.sigma_range,
    uniform_squared (its square is), or lognormal (the exponential of a normal number of mean -1.2
    and std 1, whatever the range)."""
    loss_weight: LossWeight = "none"
    """What an iTARFlow's loss of each image is multiplied by: its noise level, as published, or its
    square; none weighs all alike."""
    stop_after: Annotated[timedelta, Field(gt=timedelta(0))] | None = None
    """Wall time (3:30:00, or seconds) after which the run saves and leaves as if interrupted."""

    @model_validator(mode="after")
    def _stage_can_do_it(self) -> Self:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "DeepSpeed computes precision bf16 wrongly at zero_stage 0: "
                "choose bf16_autocast, or zero_stage 1"
            )
        if self.precision == "fp32" and self.reduce_precision == "bf16":
            raise ValueError(
                "precision fp32 promises gradients in fp32, reduce_precision bf16 rounds them: "
                "choose one of the two"
            )
        if self.offload and self.zero_stage < 2:
            raise ValueError(f"offload needs zero_stage 2 or 3, not {self.zero_stage}")
        return self


class CheckpointConfig(Section):
    """When the run is saved. A run also saves at its end and when it is interrupted."""

    every_images: PositiveInt
    """Images from one checkpoint to the next."""
    keep: PositiveInt = 3
    """Checkpoints kept; older ones are deleted."""
    permanent_every_images: PositiveInt | None = None
    """Of the checkpoints, the first one past each multiple of this is never deleted."""
    keep_best: bool = False
    """Keep the one with the least held-out loss as well; needs eval.every_images."""


class HealthConfig(Section):
    """What a run does in a bad hour."""

    max_skipped: PositiveInt = 10
    """Steps in a row that may be left out because loss or gradient is not finite; then the run goes
    back to its last checkpoint, and on with the images that follow. After the second time it
    stops."""
    loss_spike: PositiveFloat | None = None
    """Leave out a step whose loss is this much (nats a dimension) above its recent average; null
    takes all."""
    first_step_timeout: PositiveFloat = 1800
    """Seconds until the first step must be done, compilation included; else every rank dumps its
    stacks and exits."""
    step_timeout: PositiveFloat = 600
    """The same for each later step, with its checkpoint or preview, and for each batch of held-out
    images."""


class EvalConfig(Section):
    """The loss on held-out images as the run goes: in nats a dimension, of the averaged weights in
    fp32, always under the same noise."""

    every_images: PositiveInt | None = None
    """Images from one measurement to the next, with one at the run's end; null measures none."""
    count: PositiveInt | None = None
    """Images that are taken, evenly spread over the val split; null takes all."""


class PreviewConfig(Section):
    """Pictures of a run's samples as it goes: a grid from the averaged weights, always of the same
    noise and labels."""

    every_images: PositiveInt | None = None
    """Images from one preview to the next; null draws none."""
    count: PositiveInt = 16
    """Samples in the grid."""
    guidance: NonNegativeFloat = 0.0
    """Guidance weight; an unconditional model's needs attn_temp too."""
    annealed: bool = False
    """Anneal the guidance along the sequence, as the published results do."""
    attn_temp: PositiveFloat = 1.0
    """Attention temperature of the pass that guides an unconditional model."""


class LogConfig(Section):
    """What is written down while training."""

    every_images: PositiveInt
    """Images from one row of metrics.jsonl to the next."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: offline writes into the run folder and needs no account."""
    tensorboard: bool = False
    """Write the same for TensorBoard (pip install 'tarflow_dist[tensorboard]'), into the folder
    tensorboard of the run's."""
    wandb_project: str = "tarflow_dist"
    """The project that online runs appear under."""


class Config(Section):
    """A training run."""

    run: Path
    """The run's folder. The same command on an existing folder goes on where it stopped."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the order of images, noise, dropped labels and flips."""
    init: Path | None = None
    """A model's folder, its name at the Hugging Face hub (USER/MODEL or USER/MODEL@REVISION) or a
    run's folder, to start from: its weights (a run's moving average) are taken before the first
    step. Classes that go by the same name in the data and there keep what was learned of them,
    others start anew; the rest of `model` must be the same, but for the noise."""
    model: FlowConfig
    """The flow. None of it can change in a run."""
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig
    health: HealthConfig = HealthConfig()
    eval: EvalConfig = EvalConfig()
    preview: PreviewConfig = PreviewConfig()
    log: LogConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.model.sigma_range is None:
            for name, default in (("noise_levels", "uniform"), ("loss_weight", "none")):
                if getattr(self.train, name) != default:
                    raise ValueError(
                        f"train.{name} is for an iTARFlow, whose noise level varies: give "
                        "model.sigma_range instead of model.sigma"
                    )
        if self.train.label_drop and not self.model.num_classes:
            raise ValueError("train.label_drop is above 0, but model.num_classes is 0: no labels")
        if self.data.groups is not None and self.train.batch_size % self.data.groups:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} can't have as many images of each of "
                f"data.groups {self.data.groups}: give a divisor of it, or leave data.groups out"
            )
        if self.optimizer.warmup_images > self.train.images:
            raise ValueError(
                f"optimizer.warmup_images {self.optimizer.warmup_images} is longer than "
                f"train.images {self.train.images}"
            )
        if self.checkpoint.keep_best:
            every = self.eval.every_images
            if every is None or self.checkpoint.every_images % every:
                raise ValueError(
                    "checkpoint.keep_best needs the held-out loss of each checkpoint: "
                    "checkpoint.every_images must be a multiple of eval.every_images"
                )
        preview = self.preview
        try:
            Guidance(preview.guidance, preview.annealed, attn_temp=preview.attn_temp).check(
                conditional=self.model.num_classes > 0,
                volume_preserving=self.model.volume_preserving,
            )
        except ValueError as error:
            raise ValueError(f"preview: {error}") from error
        return self

    def micro_batch(self, world_size: int) -> int:
        """Images a rank takes through the model at once, on `world_size` ranks of any memory.

        Raises:
            UserError: the global batch can't be cut that way.
        """
        batch, micro = self.train.batch_size, self.train.micro_batch_size
        if micro is None and batch % world_size == 0:
            return batch // world_size
        if micro is None or batch % (world_size * micro):
            needs = "world size" if micro is None else "world size x train.micro_batch_size"
            shown = world_size if micro is None else f"{world_size} x {micro}"
            raise UserError(f"train.batch_size {batch} is not divisible by {needs} ({shown})")
        return micro
