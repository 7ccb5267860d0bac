"""Signals and a time budget as requests to save and leave, taken up at a step's end."""

import signal
import time
from datetime import timedelta
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupt:
    """While entered, a signal, or the end of the time budget `after`, sets `requested`. A second
    Ctrl-C acts as ever; the other signals, which launchers may send several times, keep on asking.
    """

    def __init__(self, after: timedelta | None = None) -> None:
        self._signalled = False
        self._deadline = None if after is None else time.monotonic() + after.total_seconds()
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._signalled or late

    def __enter__(self) -> "Interrupt":
        self._handlers = {s: signal.signal(s, self._request) for s in SIGNALS}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(number, self._handlers[signal.SIGINT])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
