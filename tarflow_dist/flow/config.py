"""What a flow is made of. Imports no torch, so that a config is checked at once."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

Noise = Literal["gaussian", "uniform"]
NoiseLevels = Literal["uniform", "uniform_squared", "lognormal"]
# where sizes end that no machine holds: larger ones are mistakes or damage
MOST_PIXELS, MOST_WIDTH, MOST_LAYERS, MOST_CLASSES = 1 << 16, 1 << 17, 1 << 12, 1 << 24
SIGMA_STEP = 0.01
"""From one noise level to the next, where the number of denoising steps is not given."""
LIMITS = {
    "image_size": MOST_PIXELS,
    "patch_size": MOST_PIXELS,
    "in_channels": MOST_PIXELS,
    "width": MOST_WIDTH,
    "head_dim": MOST_WIDTH,
    "num_blocks": MOST_LAYERS,
}


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The arguments of `Flow`: a TARFlow, or with a sigma_range an iTARFlow.

    Raises:
        ValueError: sizes that do not fit together, in a sentence that names the field.
    """

    # for the config of a training run, whose `model` this is
    __pydantic_config__: ClassVar = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "allow_inf_nan": False,
    }

    image_size: int
    """Height and width of the images in pixels."""
    patch_size: int
    """Side of a patch in pixels; divides image_size."""
    in_channels: int = 3
    """Channels of the images: 3 for colour, 1 for grey."""
    width: int
    """Channels of the transformers; a multiple of head_dim."""
    num_blocks: int
    """Autoregressive flow blocks (T)."""
    layers_per_block: int | list[int]
    """Transformer layers a block (K): one number, or a list with one for each block, in the order
    of the forward pass."""
    head_dim: int = 64
    """Channels an attention head."""
    num_classes: int = 0
    """Classes of a class-conditional model; 0 trains without labels."""
    volume_preserving: bool = False
    """No scale in the flow (alpha = 0); the prior's variance is learned instead."""
    noise: Noise = "gaussian"
    """Training noise: gaussian to generate, uniform (within the 8-bit bins) for likelihoods."""
    sigma: float | None = None
    """Std of the gaussian noise, for images in [-1, 1]."""
    sigma_range: tuple[float, float] | None = None
    """Instead of sigma, the least and the largest noise level of an iTARFlow, which has the level
    as a condition."""

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            _check_count(name, getattr(self, name), 1, limit)
        _check_count("num_classes", self.num_classes, 0, MOST_CLASSES)
        if not isinstance(self.volume_preserving, bool):
            raise ValueError(f"volume_preserving is {self.volume_preserving!r}, not true or false")
        self._check_layers()
        image, patch = self.image_size, self.patch_size
        if image % patch:
            raise ValueError(f"image_size {image} is not a multiple of patch_size {patch}")
        if image == patch:
            raise ValueError(f"image_size {image} is a single patch: make patch_size smaller")
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")
        if self.noise not in get_args(Noise):
            known = ", ".join(get_args(Noise))
            raise ValueError(f"noise is {self.noise!r}, but must be one of {known}")
        self._check_sigma()

    def _check_layers(self) -> None:
        layers = self.layers_per_block
        if isinstance(layers, list | tuple):
            object.__setattr__(self, "layers_per_block", list(layers))
            if len(layers) != self.num_blocks:
                raise ValueError(
                    f"layers_per_block has {len(layers)} entries, but num_blocks is "
                    f"{self.num_blocks}"
                )
        for count in self.layers:
            _check_count("layers_per_block", count, 1, MOST_LAYERS)
        if sum(self.layers) > MOST_LAYERS:
            raise ValueError(f"layers_per_block makes {sum(self.layers)} layers: too many")

    def _check_sigma(self) -> None:
        if self.sigma is not None:
            _check_level("sigma", self.sigma)
        if self.sigma_range is not None:
            levels = self.sigma_range
            if not isinstance(levels, list | tuple) or len(levels) != 2:
                raise ValueError(
                    f"sigma_range is {levels!r}, but must be two numbers, the least and the "
                    "largest noise level"
                )
            for level in levels:
                _check_level("sigma_range", level)
            object.__setattr__(self, "sigma_range", tuple(levels))
            if levels[0] >= levels[1]:
                raise ValueError(f"sigma_range {list(levels)} should go from less to more")
            if self.sigma is not None or self.noise != "gaussian":
                raise ValueError("sigma_range is for gaussian noise alone, and instead of sigma")
            if self.width % 2:
                raise ValueError(f"width {self.width} must be even where there is a sigma_range")
        elif self.noise == "gaussian" and self.sigma is None:
            raise ValueError("noise is gaussian, which needs a sigma")
        if self.noise == "uniform" and self.sigma is not None:
            raise ValueError(f"sigma is {self.sigma}, but noise is uniform, which has none")

    @property
    def layers(self) -> list[int]:
        """Transformer layers of each flow block."""
        if isinstance(self.layers_per_block, list):
            return self.layers_per_block
        return [self.layers_per_block] * self.num_blocks

    @property
    def denoising_steps(self) -> int:
        """Score steps that a sample is denoised in, unless told otherwise."""
        if self.sigma_range is not None:
            return int(self.sigma_range[1] / SIGMA_STEP)
        return 1 if self.noise == "gaussian" else 0

    @property
    def num_patches(self) -> int:
        """N, the length of the sequence."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """D, values a patch."""
        return self.in_channels * self.patch_size**2

    def to_json(self) -> dict[str, Any]:
        """All fields but a sigma_range that isn't there: a TARFlow's are what they always were."""
        saved = asdict(self)
        if self.sigma_range is None:
            del saved["sigma_range"]
        return saved


def _check_count(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, but must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}, but must be {least} or more")
    if value > most:
        raise ValueError(f"{name} is {value}, but must be {most} or less")


def _check_level(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, but must be a number above 0")
