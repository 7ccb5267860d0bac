"""One point of a sweep, or the only one, on its way through the stages of `sample_fid`."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tarflow_dist import distributed
from tarflow_dist.evaluation.image_sets import Samples


class Stages:
    """Seconds that each stage took, said aloud when one begins that shows no progress itself."""

    def __init__(self, seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        self.seconds = dict(seconds)

    @contextmanager
    def stage(self, name: str, announce: str = "") -> Iterator[None]:
        """The body is the stage `name`, or a further part of it."""
        if announce and distributed.is_main():
            print(announce, file=sys.stderr, flush=True)
        began = time.perf_counter()
        yield
        spent = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.seconds[name] = round(spent, 3)


@dataclass(frozen=True)
class Point:
    """Samples to be measured.

    Attributes:
        folder: of its files.
        facts: what a result says of its samples, as JSON values.
    """

    name: str
    folder: Path
    samples: Samples
    facts: dict[str, Any]
    stages: Stages = field(default_factory=Stages)


def given(path: Path, samples: Samples, out: Path) -> Point:
    """The samples of `path`, which another program drew, with its results in `out`."""
    return Point("", out, samples, {"samples": str(path), "num_samples": len(samples)})
