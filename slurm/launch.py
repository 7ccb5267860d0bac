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

from slurm import local, monitor, submission, summary, tasks
from slurm.resources import add_options, read_options
from slurm.tasks import Task
from tarflow_dist.errors import UserError, run_command

COMMANDS = {"status": monitor.status, "stop": monitor.stop}


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return _launch(argv)


def _launch(argv: list[str]) -> int:
    own, words = _split(argv)
    arguments = _parser().parse_intermixed_args(own)
    resources = read_options(arguments)
    chain = [tasks.make(arguments.task, [*arguments.arguments, *words], resources)]
    if arguments.then:
        if arguments.task != "train":
            raise UserError("--then comes after training: leave out --task")
        chain.append(tasks.after_training(shlex.split(arguments.then), chain[0], resources))
    if arguments.local:
        chain = local.here(chain)
    elif not arguments.dry_run:
        submission.check_partition(resources)

    plan, problem = summary.describe(chain)
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
        print(submission.make_executor(task, folder).script(), end="")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
