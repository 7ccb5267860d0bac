"""Ranks that start at once: each is forked from a server that has imported what they need."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SECONDS = 300
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(
    [
        *(
            "tarflow_dist.evaluation.draw",
            "tarflow_dist.evaluation.report",
            "tarflow_dist.evaluate_bpd",
            "torch._dynamo",
        ),
        *("torch_fidelity.metric_kid", "matplotlib.figure", "pyarrow.parquet"),
    ]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(work: Callable[..., None], *arguments: Any, ranks: int = 1) -> list[BaseProcess]:
    """`work(*arguments)` in each of `ranks` processes, one thread each, in an environment as
    torchrun's."""
    alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    alike |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    processes = []
    for rank in range(ranks):
        environment = {k: str(v) for k, v in (alike | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(_fork.Process(target=_rank, args=(environment, work, arguments)))
        processes[-1].start()
    return processes


def wait(processes: list[BaseProcess]) -> None:
    """Fails the test if one of them failed."""
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0, f"exit code {process.exitcode}: see above"


def run(work: Callable[..., None], *arguments: Any, ranks: int = 1) -> None:
    wait(start(work, *arguments, ranks=ranks))


def start_command(log: Path, module: str, *arguments: object, ranks: int = 1) -> list[BaseProcess]:
    """`python -m module arguments…`; what rank 0 prints goes to `log`."""
    return start(_command, log, module, [str(argument) for argument in arguments], ranks=ranks)


def run_command(log: Path, module: str, *arguments: object, ranks: int = 1) -> str:
    """The same, waited for; returns what rank 0 printed."""
    wait(start_command(log, module, *arguments, ranks=ranks))
    return log.read_text()


def _rank(environment: dict[str, str], work: Callable[..., None], arguments: tuple) -> None:
    import torch

    os.environ |= environment
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default where the command starts
    work(*arguments)


def _command(log: Path, module: str, argv: list[str]) -> None:
    target = log if os.environ["RANK"] == "0" else Path(os.devnull)
    with target.open("w") as output, redirect_stdout(output), redirect_stderr(output):
        import_module(module).main(argv)
