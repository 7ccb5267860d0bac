"""The files of a model's folder, and how config.json and the weights that it describes are read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, read_sealed, regular

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
POLICY_FILE = "sampling.json"
"""What `calibrate` found, if there is one."""
VERSION = 1
"""Of config.json."""


def read_config(file: Path) -> dict[str, Any]:
    """What the config.json `file` says.

    Raises:
        UserError: it is missing, damaged, or not a TARFlow's.
    """
    if not file.exists():
        raise UserError(
            f"{file.parent} holds no model ({CONFIG_FILE} is missing): make one with "
            "python -m tarflow_dist.convert"
        )
    try:
        saved = read_sealed(file, version=VERSION)
        if isinstance(saved.get("model"), dict):
            return saved
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from error
    raise UserError(f"{file} is not a TARFlow's: it has no entry 'model'")


def read_weights(file: Path, described: dict[str, Any] | None) -> "dict[str, Tensor]":
    """The tensors of `file`. Arguments and errors as of `check_weights`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_weights(file, described)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from error


def check_weights(file: Path, described: dict[str, Any] | None) -> None:
    """Holds `file` against what config.json says of it, if it does.

    Raises:
        UserError: it is missing, damaged, or another one.
    """
    try:
        whole = described in (None, describe(regular(file)))
    except OSError as error:
        raise UserError(f"{file} is missing or damaged: {error}") from error
    if not whole:
        raise UserError(
            f"{file} is damaged, or not the one that {CONFIG_FILE} was written with: fetch it "
            f"again, or if it is meant, take the entry weights out of {CONFIG_FILE}"
        )
