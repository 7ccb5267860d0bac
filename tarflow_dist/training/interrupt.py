"""Ctrl-C, SIGTERM and SIGUSR2 as a request to save and leave, taken up at a step's end."""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupt:
    """While entered, a signal sets `requested`. A second Ctrl-C acts as ever; the others,
    which launchers may send several times, keep on asking."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._handlers = {s: signal.signal(s, self._request) for s in SIGNALS}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self._handlers[signal.SIGINT])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
