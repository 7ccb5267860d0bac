"""The run's folder: what a run was started with, and whether it may go on with another config."""

import json
from pathlib import Path
from typing import Any

from tarflow_dist import config_file as configs
from tarflow_dist.config import Config
from tarflow_dist.errors import UserError
from tarflow_dist.files import read_sealed, write_sealed, write_whole
from tarflow_dist.telemetry.environment import describe_environment
from tarflow_dist.training import latest_checkpoint

ENVIRONMENT_FILE = "environment.json"
STATUS_FILE = "status.json"
STATUS_VERSION = 1


def changes_since_start(config: Config) -> list[str]:
    """Compares the config with the one that the run's folder was last started with, if any.

    Returns:
        A sentence for every setting that differs.

    Raises:
        UserError: a setting changed that can't change in a run.
    """
    if not (config.run / configs.SAVED_FILE).exists():
        return []
    saved, gone = configs.load_saved(config.run)
    before, now = configs.flat(saved), configs.flat(config)
    changes = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
    for key, (old, new) in changes.items():
        if key.partition(".")[0] in configs.FIXED_IN_A_RUN:
            raise UserError(
                f"{config.run} was started with {key} {old} and can't go on with {new}: "
                "give it back its value, or start another run (run=…)"
            )
    return [
        *(f"{key} changed from {old} to {new}" for key, (old, new) in changes.items()),
        *(f"{key}, which was {value}, is no setting any more" for key, value in gone.items()),
    ]


def record_start(config: Config, images: int) -> None:
    """Writes config.yaml and environment.json into the run's folder, and gives up the checkpoints
    past the one at `images` seen, from which the run goes on. Nothing can refuse the start now."""
    checkpoint = config.run / latest_checkpoint.FOLDER / f"{images:011d}"
    if checkpoint.is_dir():
        latest_checkpoint.give_up_after(checkpoint)
    with write_whole(config.run / configs.SAVED_FILE) as part:
        part.write_text(configs.dump(config))
    with write_whole(config.run / ENVIRONMENT_FILE) as part:
        part.write_text(json.dumps(describe_environment(), indent=2) + "\n")


def write_status(run: Path, status: dict[str, Any]) -> None:
    """Writes status.json; "state" is running, finished, interrupted or failed."""
    write_sealed(run / STATUS_FILE, status, version=STATUS_VERSION)


def read_status(run: Path) -> dict[str, Any]:
    """What status.json says; nothing, if there is none.

    Raises:
        UserError: it is damaged.
    """
    file = run / STATUS_FILE
    try:
        return read_sealed(file, version=STATUS_VERSION)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}): the run writes it anew") from error
