"""The one config tree of a training run: a YAML file plus `key=value` overrides.

Every field is documented where it is defined, and `python -m tarflow_dist.train --help` prints them
all. Amounts of training are counted in images, so they hold at any batch size and world size.
"""

import difflib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from tarflow_dist.errors import UserError
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.sizes import Noise, check_sizes

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """The TARFlow: the arguments of `Flow`. None of it can change in a run."""

    image_size: PositiveInt
    """Height and width of the images in pixels."""
    patch_size: PositiveInt
    """Side of a patch in pixels; divides image_size."""
    in_channels: PositiveInt = 3
    """Channels of the images: 3 for colour, 1 for grey."""
    width: PositiveInt
    """Channels of the transformers; a multiple of head_dim."""
    num_blocks: PositiveInt
    """Autoregressive flow blocks (T)."""
    layers_per_block: PositiveInt | list[PositiveInt]
    """Transformer layers a block (K): one number, or a list with one for each block."""
    head_dim: PositiveInt = 64
    """Channels an attention head."""
    num_classes: NonNegativeInt = 0
    """Classes of a class-conditional model; 0 trains without labels."""
    volume_preserving: bool = False
    """No scale in the flow (alpha = 0); the prior's variance is learned instead."""
    noise: Noise = "gaussian"
    """Training noise: gaussian to generate, uniform (within the 8-bit bins) for likelihoods."""
    sigma: PositiveFloat | None = None
    """Std of the gaussian noise, for images in [-1, 1]."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        check_sizes(
            image_size=self.image_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            width=self.width,
            head_dim=self.head_dim,
            num_blocks=self.num_blocks,
            layers_per_block=self.layers_per_block,
            num_classes=self.num_classes,
            noise=self.noise,
            sigma=self.sigma,
        )
        return self


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
    """Shards whose images are shuffled together; shards themselves are shuffled every epoch."""
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
    """Images a rank takes through the model at once; null: its whole share of the batch. Gradients
    are accumulated over batch_size / (micro_batch_size x ranks) passes."""
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32; bf16_autocast keeps fp32
    weights and multiplies matrices in bf16."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 keeps everything on every rank, 1 shards the optimiser state over the
    ranks, 2 the gradients too, 3 the weights too."""
    offload: bool = False
    """Keep the optimiser's state in host memory and take its steps there (ZeRO 2 and 3): saves GPU
    memory, costs time."""
    activation_checkpointing: NonNegativeInt = 0
    """Recompute every k-th transformer layer in the backward pass instead of keeping its
    activations: 0 none, 1 every layer."""
    compile: bool = False
    """Compile each transformer layer with torch.compile."""
    label_drop: Share = 0.0
    """Share of images whose label is dropped, so that the model learns to do without (guidance)."""
    stop_after: Annotated[timedelta, Field(gt=timedelta(0))] | None = None
    """Wall time (3:30:00, or seconds) after which the run saves and leaves as if interrupted."""

    @model_validator(mode="after")
    def _stage_can_do_it(self) -> Self:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "DeepSpeed computes precision bf16 wrongly at zero_stage 0: "
                "choose bf16_autocast, or zero_stage 1"
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
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint can't be written, as on a full disk: stop the run, or train on and try
    again at the next one."""


class HealthConfig(Section):
    """What a run does in a bad hour."""

    max_skipped: PositiveInt = 10
    """Steps in a row that may be left out because loss or gradient is not finite; then the run goes
    back to its last checkpoint, and on with the images that follow."""
    max_rollbacks: NonNegativeInt = 2
    """Times that a start of the run may go back so; then it stops."""
    loss_spike: PositiveFloat | None = None
    """Leave out a step whose loss is this much (nats a dimension) above its recent average; null
    takes all."""
    first_step_timeout: PositiveFloat = 1800
    """Seconds until the first step must be done, compilation included; else every rank dumps its
    stacks and exits."""
    step_timeout: PositiveFloat = 600
    """The same for each later step, with its checkpoint or preview."""


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
    wandb_project: str = "tarflow_dist"
    """The project that online runs appear under."""


class Config(Section):
    """A training run."""

    run: Path
    """The run's folder. The same command on an existing folder goes on where it stopped."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the order of images, noise, dropped labels and flips."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig
    health: HealthConfig = HealthConfig()
    preview: PreviewConfig = PreviewConfig()
    log: LogConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.train.label_drop and not self.model.num_classes:
            raise ValueError("train.label_drop is above 0, but model.num_classes is 0: no labels")
        if self.optimizer.warmup_images > self.train.images:
            raise ValueError(
                f"optimizer.warmup_images {self.optimizer.warmup_images} is longer than "
                f"train.images {self.train.images}"
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
        """Images a rank takes through the model at once, on `world_size` ranks.

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


# A run goes on with these as they were; everything else may change from one start to the next.
FIXED_IN_A_RUN = ("model", "seed")


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies `key=value` overrides, whose values are YAML.

    Raises:
        UserError: one sentence that names the key, and the nearest one if the key is unknown.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no config {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a config: it should hold keys such as model and data")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error


def dump(config: Config) -> str:
    """The whole tree as YAML, as `load` reads it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """Dotted keys and their values."""
    tree = config.model_dump(mode="json")
    return {key: _lookup(tree, key) for key, _, _ in fields(Config)}


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every field below `section`: dotted key, default as text, description."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if info.is_required() else f"default {info.default}"
            yield f"{prefix}{name}", default, " ".join((info.description or "").split())


def help_text() -> str:
    """All fields with their defaults and descriptions, for a command's --help."""
    return "\n".join(f"  {key} ({default})\n      {text}" for key, default, text in fields(Config))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} should look like key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML") from error
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {'.'.join(parents)} has no keys below it")
    node[last] = value


def _first_problem(error: ValidationError) -> str:
    # a misspelt key is both unknown and, under its right name, missing: tell the former
    problem = min(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    known = [key for key, _, _ in fields(Config)]
    path = ".".join(str(part) for part in problem["loc"])
    # pydantic names a union's branches in the path: keep the part that is a field
    key = next((k for k in known if path == k or path.startswith(f"{k}.")), path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path}; did you mean {_nearest(path, known)}?"
    if problem["type"] == "missing":
        return f"{key} is missing"
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    return f"{key} is {problem['input']!r}: {reason[0].lower()}{reason[1:]}"


def _nearest(path: str, known: list[str]) -> str:
    """The key or section meant by `path`: one with its last word, or else the most alike, in the
    section that it names if there is such a one."""
    parent, _, last = path.rpartition(".")
    if same := [key for key in known if key.rpartition(".")[2] == last]:
        return same[0]
    sections = sorted({key.rpartition(".")[0] for key in known} - {""})
    beside = [key for key in known if parent and key.startswith(f"{parent}.")]
    return difflib.get_close_matches(path, beside or known + sections, n=1, cutoff=0.0)[0]


def _lookup(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
