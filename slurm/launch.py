"""Submits training, and what follows it, to Slurm.

python slurm/launch.py --nodes 8 configs/in256.yaml
python slurm/launch.py status runs/in256
python slurm/launch.py stop runs/in256
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, not this folder

from slurm import monitor, submit  # noqa: E402
from tarflow_dist.errors import run_command  # noqa: E402

COMMANDS = {"status": monitor.status, "stop": monitor.stop}


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return submit.main(argv)


if __name__ == "__main__":
    run_command(main)
