"""One progress display for every long command: a bar on a terminal, plain lines in a log file."""

import sys
from collections.abc import Mapping

from tqdm import tqdm

LINE_EVERY_SECONDS = 15.0
LINE = "{desc}: {n}/{total} {unit}  {rate_fmt}  ETA {remaining}{postfix}"


class Progress(tqdm):
    """Counts `unit`s towards `total`, with rate, ETA and any figures worth seeing.

    Use as a context manager. Only rank 0 should show one (`enabled`).
    """

    monitor_interval = 0  # no thread of tqdm's beside the command's own

    def __init__(
        self, label: str, total: int, *, unit: str = "img", start: int = 0, enabled: bool = True
    ):
        form: dict[str, object] = {"smoothing": 0.1, "unit_scale": True}
        if not sys.stderr.isatty():
            form = {"smoothing": 0, "bar_format": LINE, "mininterval": LINE_EVERY_SECONDS}
            form |= {"file": _LogFile(), "delay": 1e-3, "leave": False}  # no line unless one is due
        super().__init__(
            desc=label,
            total=total,
            initial=start,
            unit=unit,
            miniters=1,
            disable=not enabled,
            **form,
        )

    def update(self, count: int, figures: Mapping[str, float] | None = None) -> None:
        """`count` more are done; `figures` are shown beside the rate."""
        shown = {name: f"{value:.4g}" for name, value in (figures or {}).items()}
        self.set_postfix(shown, refresh=False)
        shown_now = super().update(count)
        if not shown_now and not self.leave and self.n >= self.total:
            self.refresh()


class _LogFile:
    """Standard error, where nothing can be written over what is there: each text is a line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
