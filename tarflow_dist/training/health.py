"""The bad hour: steps that were left out, until a run goes back to its checkpoint; ranks that are
stuck, as in a collective that another rank never joins; and requests to save and leave."""

import faulthandler
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

from tarflow_dist import distributed
from tarflow_dist.config import Config, HealthConfig
from tarflow_dist.errors import UserError
from tarflow_dist.training.checkpoint import RunState, newest_whole
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.latest_checkpoint import FOLDER

MAX_ROLLBACKS = 2  # in one start of a run
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Health:
    """Counts the steps that were left out and goes back to the last checkpoint when there are too
    many in a row."""

    def __init__(self, config: Config, engine: Engine):
        self._config, self._engine = config, engine
        self._rollbacks = 0

    def judge(self, problem: str | None, state: RunState) -> str | None:
        """Notes in `state` whether the last step was taken, or left out for a `problem`.

        Returns:
            Why the run should go back to its last checkpoint; None if it shouldn't.
        """
        if problem is None:
            state.skipped_in_a_row = 0
            return None
        state.skipped += 1
        state.skipped_in_a_row += 1
        run = self._config.run
        distributed.say(f"{run}: left out the step to {state.images} images: {problem}")
        if state.skipped_in_a_row < self._config.health.max_skipped:
            return None
        return f"{state.skipped_in_a_row} steps in a row were left out"

    def go_back(self, state: RunState, why: str) -> None:
        """Takes over weights, average and optimiser of the last checkpoint. The position in the
        data stays, so that the images that did the harm are behind.

        Raises:
            UserError: there is none, or it has been done MAX_ROLLBACKS times.
        """
        if self._rollbacks >= MAX_ROLLBACKS or state.images >= self._config.train.images:
            raise UserError(
                f"{why} at {state.images} images after going back {self._rollbacks} times: the "
                "same command goes on from the last checkpoint, with a lower optimizer.lr"
            )
        saved = newest_whole(self._config.run / FOLDER)
        if saved is None:
            raise UserError(
                f"{why} at {state.images} images, before the first checkpoint: lower optimizer.lr"
            )
        self._engine.load(saved.read_part, saved.state.optimizer_steps)
        self._rollbacks += 1
        state.skipped_in_a_row = 0
        back = f"back to the weights of {saved.folder}, on from {state.images} images"
        distributed.say(f"{self._config.run}: {why}: {back}")


@contextmanager
def watchdog(config: HealthConfig) -> Iterator[Callable[[], None]]:
    """While entered, dumps the stacks of all threads to stderr and exits with code 1 when what it
    yields, to be called after each step, has not been called for too long. It runs outside Python,
    so a stuck call can't keep it from it."""
    faulthandler.dump_traceback_later(config.first_step_timeout, exit=True)
    try:
        yield partial(faulthandler.dump_traceback_later, config.step_timeout, exit=True)
    finally:
        faulthandler.cancel_dump_traceback_later()


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
