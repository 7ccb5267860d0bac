"""Ends a rank that is stuck, as in a collective that another rank never joins."""

import faulthandler

from tarflow_dist.config import HealthConfig


class Watchdog:
    """While entered, dumps the stacks of all threads to stderr and exits with code 1 when no step
    has been done for too long. It runs outside Python, so a stuck call can't keep it from it."""

    def __init__(self, config: HealthConfig):
        self._config = config

    def __enter__(self) -> "Watchdog":
        faulthandler.dump_traceback_later(self._config.first_step_timeout, exit=True)
        return self

    def step_done(self) -> None:
        """The clock starts anew."""
        faulthandler.dump_traceback_later(self._config.step_timeout, exit=True)

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
