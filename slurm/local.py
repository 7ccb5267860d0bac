"""--local: the same job on this machine, a process a rank."""

import json
import logging
import os
import pickle
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from submitit.helpers import clean_env

from slurm import submission
from slurm.job import Job, port
from slurm.job_record import read_outcome
from slurm.tasks import Task
from tarflow_dist.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import SubprocessContext

EXIT_CODES = {"finished": 0, "interrupted": os.EX_TEMPFAIL, "refused": 2, "crashed": 1}


def here(chain: Sequence[Task]) -> list[Task]:
    """The tasks on this machine: on all its GPUs, or one rank on the CPU, unless they say how many.

    Raises:
        UserError: they are more than this machine has.
    """
    asked = chain[0].resources
    if asked.nodes > 1:
        raise UserError(f"--local has one node, not --nodes {asked.nodes}")
    import torch

    there = torch.cuda.device_count()
    if "gpus_per_node" not in asked.model_fields_set:
        kind = f"{there} GPU{'s' * (there > 1)}" if there else "the CPU"
        print(f"--local: on {kind}; --gpus-per-node and --tasks-per-node choose otherwise")
        return [task.asking(gpus_per_node=there) for task in chain]
    if asked.gpus_per_node > there:
        raise UserError(
            f"--local: {asked.gpus_per_node} GPUs were asked for, and this machine has {there}: "
            f"give --gpus-per-node {there}"
        )
    return list(chain)


def run(chain: Sequence[Task]) -> int:
    """Runs the tasks one after another and shows rank 0's log. Ctrl-C saves and ends.

    Returns:
        The exit code: 0 finished, 75 interrupted and saved, 2 a mistake of the user's, 1 a crash.
    """
    for task in chain:
        job = submission.prepare(task, submission.new_folder(task))
        resources = task.resources
        ranks = start(job)
        print(f"logs in {Path(ranks.stdouts[0]).parents[1]}", flush=True)
        state = watch(ranks, job, seconds=60 * resources.minutes - resources.signal_delay)
        if state != "finished":
            return EXIT_CODES[state]
    return 0


def start(job: Job) -> "SubprocessContext":
    """Starts the ranks of the job, in sessions of their own, which Ctrl-C doesn't reach.

    Raises:
        UserError: a shell line of its setup fails.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, SubprocessContext

    resources = job.task.resources
    file = job.folder / "job.pkl"
    file.write_bytes(pickle.dumps(job))
    ranks = range(resources.ranks_per_node)
    common = _environment(job) | {
        "WORLD_SIZE": str(len(ranks)),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port(os.getpid())),
        "TORCHELASTIC_RUN_ID": "logs",  # torch begins the name of their folder with it
    }
    if not resources.gpus_per_node:
        common["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"  # not SIGHUP: nohup has it ignored
    logging.disable(logging.ERROR)  # torch's words on a rank that fails: we have our own
    with clean_env():
        context = SubprocessContext(
            "rank",
            resources.python or sys.executable,
            args=dict.fromkeys(ranks, ("-P", "-u", "-m", "slurm.job", str(file))),
            envs={rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
            logs_specs=DefaultLogsSpecs(str(job.folder), redirects=Std.ALL, tee={0: Std.ALL}),
            log_line_prefixes={0: ""},
        )
        context.start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return context


def _environment(job: Job) -> dict[str, str]:
    """The variables of all ranks, as the job's setup leaves them."""
    resources, file = job.task.resources, job.folder / "environment"
    path = f"export {submission.code_first(job.folder)}"
    tell = "import json, os, sys; json.dump(dict(os.environ), sys.stdout)"
    told = f"{shlex.join([sys.executable, '-IS', '-c', tell])} >{shlex.quote(str(file))}"
    lines = [path, *submission.environment(resources), told]
    with clean_env():
        if subprocess.run(["/bin/bash", "-c", " &&\n".join(lines)]).returncode:
            raise UserError(f"setup fails: {' && '.join(resources.setup)}")
    variables = json.loads(file.read_bytes())
    file.unlink()  # there may be keys in it
    return variables


def watch(ranks: "SubprocessContext", job: Job, *, seconds: float) -> str:
    """Waits for the ranks; once one has failed, torch ends the others. Ctrl-C, SIGTERM and the end
    of `seconds` have them save.

    Returns:
        The outcome.
    """
    asked, ended = False, None
    while ended is None:
        with suppress(KeyboardInterrupt):
            ended = ranks.wait(-1 if asked else seconds, period=0.1)
        if ended is None:
            asked = True
            for handler in ranks.subprocess_handlers.values():
                handler.proc.send_signal(signal.SIGTERM)
    outcome = read_outcome(job.folder)
    first = next(iter(ended.failures.values()), None)
    killed = first is not None and first.exitcode < 0
    if outcome is None or (killed and not asked and outcome["state"] != "finished"):
        outcome = {"state": "interrupted" if asked else "crashed", "reason": ""}
        if first is not None and not asked:
            outcome["reason"] = (
                f"rank {first.local_rank} was the first to end, without a word, as one that is "
                f"killed for want of memory (exit code {first.exitcode})"
            )
    if outcome["reason"]:  # of whichever rank was first, and the log that was shown is rank 0's
        print(f"{outcome['state']}: {outcome['reason']}", file=sys.stderr)
    return str(outcome["state"])
