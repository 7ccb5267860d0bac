"""One progress display for every long command: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts `unit`s towards `total`, with rate, ETA and any figures worth seeing.

    Use as a context manager. Only rank 0 should show one (`enabled`).
    """

    def __init__(
        self, label: str, total: int, *, unit: str = "img", start: int = 0, enabled: bool = True
    ):
        self._label, self._total, self._unit = label, total, unit
        self._done = self._start = start
        self._enabled = enabled
        self._began = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, initial=start, unit=unit, unit_scale=True, smoothing=0.1
            )

    def update(self, count: int, figures: Mapping[str, float] | None = None) -> None:
        """`count` more are done; `figures` are shown beside the rate."""
        self._done += count
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
        elif self._enabled:
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY_SECONDS or self._done >= self._total:
                self._last_line = now
                self._print_line(now, figures or {})

    def _print_line(self, now: float, figures: Mapping[str, float]) -> None:
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        eta = tqdm.format_interval(max(0, self._total - self._done) / rate) if rate else "?"
        shown = "".join(f"  {name} {value:.4g}" for name, value in figures.items())
        print(
            f"{self._label}: {self._done}/{self._total} {self._unit}"
            f"  {rate:.4g} {self._unit}/s  ETA {eta}{shown}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
