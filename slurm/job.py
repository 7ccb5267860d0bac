"""What every rank of a job runs: submitit pickles a `Job` and calls it there."""

import importlib
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from submitit.helpers import TorchDistributedEnvironment

from slurm import preflight
from slurm.tasks import MODULES, Task
from tarflow_dist.errors import REFUSED_BY_MACHINE, UserError
from tarflow_dist.train import EXIT_INTERRUPTED

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Job:
    """A task on all ranks.

    Attributes:
        folder: the job's, with its code, config and logs.
        gpus: whether each rank should see a GPU.
        bytes_to_write: what must be free in the task's folder.
    """

    folder: Path
    task: Task
    gpus: bool
    bytes_to_write: int

    def __call__(self) -> None:
        """Runs the task, and leaves its outcome for `slurm.requeue` to read.

        Raises:
            SystemExit: with code 2 after a user error.
        """
        environment = TorchDistributedEnvironment()
        if os.environ["SUBMITIT_EXECUTOR"] == "local":
            environment.master_addr = "127.0.0.1"
        if "MASTER_PORT" not in os.environ:
            # below those that Linux gives the near ends of connections, which may be in use
            environment.master_port = 20_000 + environment.master_port % 12_000
        # DeepSpeed picks the GPU by LOCAL_RANK, and needs to see those of the whole node for it
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        # instead of submitit's handlers, which know rank 0 alone. Training puts its own in their
        # place while there is something to save; before that, and elsewhere, leaving is enough
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._leave)
        try:
            interrupted = self._run()
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in REFUSED_BY_MACHINE:
                self._note_crash(error)
                raise
            if self._note("refused", str(error)):
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except BaseException as error:
            self._note_crash(error)
            raise
        if interrupted or os.environ["RANK"] == "0":  # others may be done long before the task is
            self._note("interrupted" if interrupted else "finished")

    def _run(self) -> bool:
        """Whether the task was interrupted."""
        task, arguments = self.task, list(self.task.arguments)
        preflight.check_node(task.folder, self.bytes_to_write, task.shards, gpus=self.gpus)
        if not task.apart:
            with preflight.ranks_together():
                if task.of_run:
                    arguments = [*_newest_model(task), *arguments]
        code = importlib.import_module(MODULES[task.name]).main(arguments) or 0
        if code not in (0, EXIT_INTERRUPTED):
            raise UserError(f"{task.name} ended with exit code {code}: see {self.folder}")
        return bool(code)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self._note("interrupted")
        os._exit(EXIT_INTERRUPTED)

    def _note_crash(self, error: BaseException) -> None:
        sentence = " ".join(f"{type(error).__name__}: {error}".split())
        self._note("crashed", f"rank {os.environ['RANK']} on {socket.gethostname()}: {sentence}")

    def _note(self, state: str, reason: str = "") -> bool:
        """Writes the outcome, unless another rank was first: a first error's victims come later."""
        outcome = {"state": state, "reason": reason, "rank": int(os.environ["RANK"])}
        try:
            with (self.folder / OUTCOME).open("x") as file:
                json.dump(outcome, file)
        except FileExistsError:
            return False
        return True


def _newest_model(task: Task) -> list[str]:
    """Converts the run's newest checkpoint, if that has not been done, and returns the options that
    name the model and a place for what is made with it. Collective."""
    from tarflow_dist import convert, distributed
    from tarflow_dist.training import latest_checkpoint

    run = task.folder
    newest = distributed.from_main(latest_checkpoint.newest(run / latest_checkpoint.FOLDER))
    if newest is None:
        raise UserError(f"the run {run} has no checkpoint yet")
    model = run / "models" / newest.name
    if distributed.is_main() and not (model / "model.safetensors").exists():
        convert.main([str(newest), str(model)])
    distributed.barrier()
    options = ["--model", str(model)]
    if task.name == "sample_fid" and "--out" not in task.arguments:
        options += ["--out", str(run / "samples" / newest.name)]
    return options
