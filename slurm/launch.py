"""Submits a training run to Slurm, one rank a GPU. The same command again goes on
with the run. Time limits, preemption and lost nodes requeue the job under its id, from its newest
checkpoint.

    python slurm/launch.py --nodes 8 configs/in256.yaml
    python slurm/launch.py --nodes 8 configs/in256.yaml \\
        --then 'sample_fid --num-samples 50000 --guidance 1.5 --inception-weights W.pth'
    python slurm/launch.py --task sample_fid --nodes 2 -- --model models/in256 --reference …
    python slurm/launch.py status RUN
    python slurm/launch.py stop RUN
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, not this folder

from slurm import local, monitor, submission, tasks
from slurm.resources import Resources, add_options, read_options
from slurm.tasks import Task
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import card
from tarflow_dist.cost.estimate import does_not_fit, estimate
from tarflow_dist.cost.network import network, network_estimate
from tarflow_dist.errors import UserError, run_command
from tarflow_dist.models import hub
from tarflow_dist.training import latest_checkpoint

MFU = 0.4  # assumed for the images an hour
COMMANDS = {"status": monitor.status, "stop": monitor.stop}


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        command = COMMANDS[argv[0]]
        parser = argparse.ArgumentParser(
            prog=f"python slurm/launch.py {argv[0]}", description=command.__doc__
        )
        parser.add_argument("run", type=Path, metavar="RUN", help="its folder, such as runs/in256")
        command(parser.parse_args(argv[1:]).run)
        return 0
    return _launch(argv)


def _launch(argv: list[str]) -> int:
    own, words = _split(argv)
    arguments = _parser().parse_intermixed_args(own)
    resources = read_options(arguments)
    chain = [tasks.make(arguments.task, [*arguments.arguments, *words], resources)]
    if arguments.then is not None:
        if arguments.task != "train":
            raise UserError("--then comes after training: leave out --task")
        chain.append(tasks.after_training(arguments.then, chain[0], resources))
    if arguments.local:
        chain = local.here(chain)
    elif not arguments.dry_run:
        submission.check_partition(resources)

    plan, problem = _describe(chain)
    print(plan, flush=True)
    if arguments.dry_run:
        _show_scripts(chain)
        if problem:
            print(f"would be refused: {problem}", file=sys.stderr)
        return 0
    if problem and not arguments.force:
        raise UserError(f"{problem}; --force takes it nevertheless")
    if arguments.local:
        return local.run(chain)
    submission.submit(chain, command=shlex.join(["slurm/launch.py", *argv]))
    print(f"python slurm/launch.py status {shlex.quote(str(chain[0].folder))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python slurm/launch.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "arguments",
        nargs="*",
        metavar="CONFIG [key=value …]",
        help="as tarflow_dist.train takes them; for another task its command line, after --",
    )
    add("--task", choices=tasks.MODULES, default="train", help="default train")
    add(
        "--then",
        metavar="'TASK …'",
        help="sample_fid or evaluate_bpd with its options, for when the training is finished",
    )
    add("--dry-run", action="store_true", help="print plan and script; needs no Slurm")
    add("--local", action="store_true", help="run the job on this machine, now")
    add("--force", action="store_true", help="submit what seems not to fit")
    add_options(parser.add_argument_group("resources"))
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first --."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _show_scripts(chain: Sequence[Task]) -> None:
    first, *later = chain
    for task in (first, *(submission.after(task, "ID") for task in later)):
        folder = submission.new_folder(task)
        print(f"\n----- {folder / 'ID_submission.sh'}")
        print(submission.make_executor(task, folder).script())
    sys.stdout.flush()


def _describe(chain: Sequence[Task]) -> tuple[str, str]:
    """The plan of the tasks, and a sentence on what seems not to fit, empty if nothing."""
    task, resources = chain[0], chain[0].resources
    ranks = f"{resources.ranks_per_node} {'GPUs' if resources.gpus_per_node else 'CPU ranks'}"
    rows = {
        "task": " then ".join(t.name for t in chain),
        "folder": str(task.folder),
        "nodes": f"{resources.nodes} x {ranks}, {resources.world_size} ranks",
        "cores": f"{resources.cpus} a rank",
        "time limit": f"{resources.time}, saved {resources.signal_delay} s before, then requeued",
    }
    problem = ""
    if task.config is not None:
        more, problem = _training_rows(task.config, resources)
        rows |= more
    plan = "\n".join(f"{name:<16}{text}" for name, text in rows.items())
    return plan, problem or _missing(task)


def _missing(task: Task) -> str:
    """What the task begins with and is not on this machine, in a sentence; empty if nothing."""
    init = task.config and task.config.init
    if init and not (_newest(task.folder) or init.exists() or hub.is_name(init)):
        return f"there is no model {init} to start from on this machine"
    if task.shards and "://" not in task.shards and not Path(task.shards).exists():
        return f"there are no shards {task.shards} on this machine"
    return ""


def _newest(run: Path) -> Path | None:
    return latest_checkpoint.newest(run / latest_checkpoint.FOLDER)


def _training_rows(config: Config, resources: Resources) -> tuple[dict[str, str], str]:
    """What the plan says of a training, and what seems not to fit."""
    train, world_size = config.train, resources.world_size
    gpu = card(resources.gpu)
    cost = estimate(config, gpu, world_size, mfu=MFU) if resources.gpus_per_node else None
    micro = cost.micro_batch if cost else config.micro_batch(world_size)
    share = train.batch_size // world_size
    passes = f"in {share // micro} passes of {micro}"
    newest = _newest(config.run)
    starts = "new" if config.init is None else f"new, from the weights of {config.init}"
    if newest:
        starts = f"from its checkpoint at {int(newest.name):,} images"
    if newest and int(newest.name) >= train.images:
        starts = "no more: it is finished; a larger train.images trains it further"
    steps = -(-train.images // train.batch_size)
    rows = {
        "batch": f"{train.batch_size} images: {share} a rank, {passes}",
        "length": f"{train.images:,} images, {steps:,} steps",
        "starts": starts,
        "precision": f"{train.precision}, ZeRO {train.zero_stage}",
    }
    if cost is None:
        return rows, ""
    need, there = cost.chosen.memory.peak / 2**30, gpu.memory / 2**30
    speed = cost.checkpointed if train.activation_checkpointing else cost.plain
    rows["memory"] = f"{need:.1f} GiB of {there:.0f} on each {resources.gpu}"
    rows["speed"] = (
        f"{speed.images_per_second * 3600:,.0f} images an hour, {speed.days:,.1f} days, at an MFU "
        f"of {MFU:.0%}"
    )
    if resources.network is not None:
        told = network_estimate(
            config,
            gpu,
            network(resources.network),
            nodes=resources.nodes,
            gpus_per_node=resources.ranks_per_node,
            mfu=MFU,
        )
        rows |= told.in_words()
    rows["checkpoint"] = f"{cost.checkpoint_bytes / 1e9:.1f} GB"
    return rows, "" if cost.chosen.fits else does_not_fit(cost, resources.gpu)


if __name__ == "__main__":
    run_command(main)
