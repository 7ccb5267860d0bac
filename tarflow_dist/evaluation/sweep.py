"""One point of a sweep, or the only one, on its way through the stages of `sample_fid`: all that
its samples depend on, and then the samples with what is known of them."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow_dist import distributed, rng
from tarflow_dist.evaluation.image_sets import Samples
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


def sample_labels(
    rule: str,
    index: Tensor,
    *,
    num_classes: int,
    seed: int,
    class_counts: Sequence[int] | None = None,
) -> Tensor:
    """Class ids (B,) of the samples `index` (B,).

    Args:
        rule: "random": independent and uniform over the K classes, as ADM and most of the field
            do; "balanced": i mod K, each class equally often, which gives a slightly lower FID;
            "reference": independent, each class as likely as its share of `class_counts`; or class
            ids, "3,7", which take turns.
    """
    if rule == "balanced":
        return index % num_classes
    if rule in ("random", "reference"):
        uniform = rng.uniform((), seed=seed, purpose="sample label", index=index)
        if rule == "random":
            return (uniform * num_classes).long()
        ends = torch.tensor(class_counts, dtype=torch.float64).cumsum(dim=0)
        return torch.searchsorted(ends, uniform.double() * ends[-1], right=True)
    given = torch.tensor([int(label) for label in rule.split(",")])
    return given[index % len(given)]


@dataclass(frozen=True)
class Point:
    """Samples to be measured.

    Attributes:
        folder: of its files.
        facts: what a result says of its samples, as JSON values.
        seconds: that each stage took.
    """

    name: str
    folder: Path
    samples: Samples
    facts: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def stage(seconds: dict[str, float], name: str, announce: str = "") -> Iterator[None]:
    """The body is the stage `name`, or a further part of it, and its time goes into `seconds`. One
    that shows no progress itself is announced."""
    if announce and distributed.is_main():
        print(announce, file=sys.stderr, flush=True)
    began = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - began, 3)
