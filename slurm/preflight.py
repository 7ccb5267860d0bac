"""What is looked at on every node before a job starts, so that a bad node is named and not met
hours later."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NodeError(RuntimeError):
    """A node can't do its part. The job is requeued and may get another."""

    def __init__(self, problem: str):
        super().__init__(f"node {socket.gethostname()} is unfit: {problem}")


def check_node(folder: Path, bytes_to_write: int, shards: str | None, *, gpus: bool) -> None:
    """Looks at this rank's device, the disk below `folder` and the shards.

    Raises:
        NodeError: naming the node and what is wrong there.
    """
    _check_device(int(os.environ["LOCAL_RANK"]), gpus=gpus)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < bytes_to_write:
        raise NodeError(
            f"{folder} has {free / 1e9:.1f} GB free, and two checkpoints take "
            f"{bytes_to_write / 1e9:.1f} GB"
        )
    if shards is not None and "://" not in shards:
        try:
            os.listdir(shards)
        except OSError as error:
            raise NodeError(f"the shards {shards} can't be read: {error.strerror}") from error


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
