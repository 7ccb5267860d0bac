"""sampling.json: how a model's blocks are best inverted, as `calibrate` measured it."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow_dist.distributed import device_name
from tarflow_dist.errors import UserError
from tarflow_dist.files import from_saved, read_sealed, write_sealed
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import Solver
from tarflow_dist.models.folder import POLICY_FILE

VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What was best for one batch size and guidance on one device.

    Attributes:
        device: the GPU's name, or cpu and its number of threads.
        dtype: of the weights.
        solvers: one a block, in the order of the forward pass.
        measured: figures for people.
    """

    device: str
    dtype: str
    batch: int
    guidance: Guidance
    solvers: tuple[Solver, ...]
    measured: Mapping[str, float] = field(default_factory=dict)

    def key(self) -> tuple[str, str, int, Guidance]:
        """Of two calibrations with one key the later counts."""
        return self.device, self.dtype, self.batch, self.guidance


@dataclass(frozen=True)
class Policy:
    """The calibrations of one model; `fingerprint` says of which."""

    fingerprint: str
    calibrations: tuple[Calibration, ...] = ()

    def find(
        self, device: torch.device, dtype: torch.dtype, batch: int, guidance: Guidance
    ) -> Calibration | None:
        """The calibration for the smallest batch that is not below `batch`: what pays in a large
        batch pays in a smaller one, and the reverse is not so."""
        machine = (machine_name(device), dtype_name(dtype), guidance)
        fitting = [
            c
            for c in self.calibrations
            if (c.device, c.dtype, c.guidance) == machine and c.batch >= batch
        ]
        return min(fitting, key=lambda c: c.batch, default=None)

    def with_calibration(self, new: Calibration) -> "Policy":
        others = tuple(c for c in self.calibrations if c.key() != new.key())
        return Policy(self.fingerprint, (*others, new))

    def write(self, folder: Path) -> None:
        write_sealed(folder / POLICY_FILE, asdict(self), version=VERSION)


def read_policy(folder: Path, *, fingerprint: str, num_blocks: int) -> Policy:
    """The policy in the model's `folder`, an empty one if there is none.

    Raises:
        UserError: the file is broken, or of another model.
    """
    file = folder / POLICY_FILE
    command = shlex.join(["python", "-m", "tarflow_dist.calibrate", str(folder)])
    advice = f"remove it, or make it anew with {command}"
    if not file.exists():
        return Policy(fingerprint)
    try:
        saved = read_sealed(file, version=VERSION)
        calibrations = tuple(_calibration(entry) for entry in saved["calibrations"])
        if any(len(c.solvers) != num_blocks for c in calibrations):
            raise ValueError(f"it should have {num_blocks} solvers, one a block")
        found = saved["fingerprint"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is no sampling policy ({reason}): {advice}") from error
    if found != fingerprint:
        raise UserError(f"{file} was made for other weights: {advice}")
    return Policy(fingerprint, calibrations)


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """Tells models apart by their output projections, which every step of training changes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        if name.endswith(("proj_out.weight", "proj_out.bias")):
            tensor = weights[name].cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def machine_name(device: torch.device) -> str:
    """The device, and a CPU's number of threads, which decides what is fast there."""
    name = device_name(device)
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _calibration(entry: dict[str, Any]) -> Calibration:
    typed = {
        "guidance": Guidance(**entry["guidance"]),
        "solvers": tuple(Solver(**solver) for solver in entry["solvers"]),
    }
    return from_saved(Calibration, {**entry, **typed})
