"""What the samples of each point of a sweep, or of the only one, depend on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tarflow_dist.errors import UserError
from tarflow_dist.flow.denoise import Denoising
from tarflow_dist.flow.guidance import Guidance

UINT8_RULES = {  # flow/noise.py, to_pixels
    "gaussian": "round((x + 1) * 127.5), clipped",
    "uniform": "floor((x + 1) * 128), clipped",
}


@dataclass(frozen=True)
class SampleSettings:
    """A sample store is kept by these: equal settings give equal samples.

    Attributes:
        chunk_size: samples drawn at once, and in a file.
        labels: a rule of `sample_labels`, or None for an unconditional model.
        class_counts: images of each class, for the rule "reference".
        sampler: how the flow is inverted, in words.
        denoising: None leaves the training noise in; its steps are None for a TARFlow, which takes
            one.
    """

    weights_sha256: str
    config_sha256: str
    dtype: str
    num_samples: int
    chunk_size: int
    seed: int
    labels: str | None
    uint8_rule: str
    sampler: str
    guidance: Guidance
    denoising: Denoising | None
    class_counts: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As settings.json and result.json have them."""
        saved = {**vars(self), **self.guidance.arguments(), "denoise": self.denoising is not None}
        del saved["denoising"]
        if self.class_counts is None:
            del saved["class_counts"]
        else:
            saved["class_counts"] = list(self.class_counts)
        if self.denoising is not None and self.denoising.steps is not None:
            saved |= self.denoising.arguments()
        return saved


def named(points: Sequence[SampleSettings]) -> dict[str, SampleSettings]:
    """The points of a sweep, which differ in guidance and denoising, by the names of their folders:
    "" for a single one.

    Raises:
        UserError: two weights have one name.
    """
    if len(points) == 1:
        return {"": points[0]}
    steps = {point.denoising.steps for point in points if point.denoising is not None}
    names = []
    for point in points:
        name = f"guidance-{point.guidance.weight:g}-denoise-{point.denoising is not None:d}"
        if point.denoising is not None and len(steps) > 1:
            name += f"-steps-{point.denoising.steps}"
        names.append(name)
    if len(set(names)) < len(names):
        raise UserError("--guidance has two weights that are alike in six digits")
    return dict(zip(names, points, strict=True))
