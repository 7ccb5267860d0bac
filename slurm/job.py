"""What every rank of a job runs: submitit pickles a `Job` and calls it there, or --local starts

    python -m slurm.job FILE

First each node is looked at, so that a bad one is named and not met hours later.
"""

import importlib
import os
import pickle
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from submitit.helpers import TorchDistributedEnvironment

from slurm.job_record import note_outcome
from slurm.tasks import MODULES, Task
from tarflow_dist.cost.estimate import checkpoint_bytes
from tarflow_dist.errors import UserError, end_with_torchrun, refusal
from tarflow_dist.flow.flops import FlowCost


@dataclass(frozen=True)
class Job:
    """A task on all ranks. `folder` is the job's, with its code, config and logs."""

    folder: Path
    task: Task

    def __call__(self) -> None:
        """`run` as one of submitit's ranks."""
        environment = TorchDistributedEnvironment()
        if "MASTER_PORT" not in os.environ:
            environment.master_port = port(environment.master_port)
        # DeepSpeed picks the GPU by LOCAL_RANK, and needs to see those of the whole node for it
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        self.run()

    def run(self) -> None:
        """Runs the task, and leaves its outcome for `slurm.requeue` to read.

        Raises:
            SystemExit: with code 2 after a user error.
        """
        # instead of submitit's handlers, which know rank 0 alone. Training puts its own in their
        # place while there is something to save; before that, and elsewhere, leaving is enough
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._leave)
        try:
            interrupted = self._run()
        except BaseException as error:
            if (sentence := refusal(error)) is None:
                what = " ".join(f"{type(error).__name__}: {error}".split())
                rank = f"rank {os.environ['RANK']} on {socket.gethostname()}"
                note_outcome(self.folder, "crashed", f"{rank}: {what}")
                raise
            if note_outcome(self.folder, "refused", sentence):
                print(f"error: {sentence}", file=sys.stderr)
            sys.exit(2)
        if interrupted or os.environ["RANK"] == "0":  # others may be done long before the task is
            note_outcome(self.folder, "interrupted" if interrupted else "finished")

    def _run(self) -> bool:
        """Whether the task was interrupted."""
        task, arguments = self.task, list(self.task.arguments)
        check_node(task)
        if task.name != "data_prep":  # whose ranks don't wait for one another
            with ranks_together():
                if task.of_run:
                    arguments = [*_newest_model(task), *arguments]
        code = importlib.import_module(MODULES[task.name]).main(arguments) or 0
        if code not in (0, os.EX_TEMPFAIL):
            raise UserError(f"{task.name} ended with exit code {code}: see {self.folder}")
        return bool(code)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        note_outcome(self.folder, "interrupted")
        os._exit(os.EX_TEMPFAIL)


def port(number: int) -> int:
    """A port for the ranks to meet at, one of many by `number`, below those that Linux gives the
    near ends of connections, which may be in use."""
    return 20_000 + number % 12_000


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
    with distributed.together(f"{model} can't be written"):
        if distributed.is_main() and not (model / "model.safetensors").exists():
            convert.main([str(newest), str(model)])
    options = ["--model", str(model)]
    if task.name == "sample_fid" and "--out" not in task.arguments:
        options += ["--out", str(run / "samples" / newest.name)]
    return options


class NodeError(RuntimeError):
    """A node can't do its part. The job is requeued and may get another."""

    def __init__(self, problem: str):
        super().__init__(f"node {socket.gethostname()} is unfit: {problem}")


def check_node(task: Task) -> None:
    """Looks at this rank's device, the disk below the task's folder and its shards.

    Raises:
        NodeError: naming the node and what is wrong there.
    """
    _check_device(int(os.environ["LOCAL_RANK"]), gpus=task.resources.gpus_per_node > 0)
    task.folder.mkdir(parents=True, exist_ok=True)
    if task.config is not None:
        free = shutil.disk_usage(task.folder).free
        needed = 2 * checkpoint_bytes(FlowCost(task.config.model))
        if free < needed:
            raise NodeError(
                f"{task.folder} has {free / 1e9:.1f} GB free, and two checkpoints take "
                f"{needed / 1e9:.1f} GB"
            )
    if task.shards is not None and "://" not in task.shards:
        try:  # a reference to compare with may be a file
            os.listdir(task.shards) if os.path.isdir(task.shards) else os.stat(task.shards)
        except OSError as error:
            raise NodeError(f"the shards {task.shards} can't be read: {error.strerror}") from error


def _check_device(local_rank: int, *, gpus: bool) -> None:
    import torch

    if gpus and torch.cuda.device_count() <= local_rank:
        raise NodeError(
            f"rank {os.environ['RANK']} needs GPU {local_rank}, but {torch.cuda.device_count()} "
            f"are visible (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')})"
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    numbers = torch.Generator().manual_seed(0)
    a, b = torch.randint(-8, 9, (2, 256, 256), generator=numbers)
    try:
        product = (a.to(device, torch.float32) @ b.to(device, torch.float32)).cpu()
    except RuntimeError as error:
        raise NodeError(f"{device} fails a matrix product: {error}") from error
    if not torch.equal(product.long(), a @ b):  # integers this small are exact in TF32, too
        raise NodeError(f"{device} computes a matrix product wrongly")


@contextmanager
def ranks_together() -> Iterator[None]:
    """A process group around the body, after a sum over all ranks. The task makes its own later, on
    another port: this one's may not be free again by then.

    Raises:
        NodeError: the sum is wrong.
    """
    import torch

    from tarflow_dist import distributed

    port = os.environ["MASTER_PORT"]
    os.environ["MASTER_PORT"] = str(int(port) + 1)
    device = distributed.init()
    os.environ["MASTER_PORT"] = port
    rank, world_size = distributed.rank(), distributed.world_size()
    total = distributed.sum_over_ranks(torch.full((), rank + 1, device=device)).item()
    if total != world_size * (world_size + 1) // 2:
        raise NodeError(f"an all-reduce over {world_size} ranks gives {total}")
    nodes = sorted(set(distributed.gather(socket.gethostname())))
    if distributed.is_main():
        print(f"{world_size} ranks on {', '.join(nodes)} can start", file=sys.stderr)
    yield
    distributed.shutdown()


if __name__ == "__main__":
    end_with_torchrun()  # here with --local's launch.py, killed or hung up
    pickle.loads(Path(sys.argv[1]).read_bytes()).run()
