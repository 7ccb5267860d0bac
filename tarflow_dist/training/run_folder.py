"""The run's folder: what a run was started with, and whether it may go on with another config."""

import json
import time

from tarflow_dist import config as configs
from tarflow_dist.config import Config
from tarflow_dist.errors import UserError
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.environment import describe_environment


def changes_since_start(config: Config) -> list[str]:
    """Compares the config with the one that the run's folder was last started with, if any.

    Returns:
        A sentence for every setting that differs.

    Raises:
        UserError: a setting changed that can't change in a run.
    """
    saved = config.run / "config.yaml"
    if not saved.exists():
        return []
    before, now = configs.flat(configs.load(saved)), configs.flat(config)
    changes = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
    for key, (old, new) in changes.items():
        if key.partition(".")[0] in configs.FIXED_IN_A_RUN:
            raise UserError(
                f"{config.run} was started with {key} {old} and can't go on with {new}: "
                "give it back its value, or start another run (run=…)"
            )
    return [f"{key} changed from {old} to {new}" for key, (old, new) in changes.items()]


def record_start(config: Config) -> None:
    """Writes config.yaml and environment.json into the run's folder."""
    with write_whole(config.run / "config.yaml") as part:
        part.write_text(configs.dump(config))
    with write_whole(config.run / "environment.json") as part:
        part.write_text(json.dumps(describe_environment(), indent=2) + "\n")


def record_status(
    config: Config, *, state: str, images: int, images_per_second: float, error: str | None
) -> None:
    """Writes status.json.

    Args:
        state: running, finished, interrupted or failed.
        images: seen so far.
        images_per_second: of late; 0 where not known yet.
        error: what ended a failed run.
    """
    left = max(config.train.images - images, 0)
    status = {
        "state": state,
        "images": images,
        "total_images": config.train.images,
        "images_per_second": images_per_second,
        "eta_seconds": left / images_per_second if images_per_second else None,
        "updated": time.time(),
        "error": error,
    }
    with write_whole(config.run / "status.json") as part:
        part.write_text(json.dumps(status, indent=2) + "\n")
