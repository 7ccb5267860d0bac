"""Trains a TARFlow: python -m tarflow_dist.train CONFIG [key=value …], also under torchrun.

The same command again goes on from the run's newest checkpoint.
"""

import os
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from tarflow_dist import config_file as configs
from tarflow_dist.errors import run_command
from tarflow_dist.options import command_parser


def main(argv: list[str]) -> int:
    parser = command_parser("train", __doc__, epilog=f"config fields:\n{configs.help_text()}")
    parser.add_argument("config", type=Path, help="a YAML file, or a recipe's name, such as digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    arguments = parser.parse_args(argv)
    config = configs.load(arguments.config, arguments.overrides)

    if config.train.deterministic:  # cuBLAS reads it when it is loaded
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from tarflow_dist import distributed
    from tarflow_dist.training.loop import train

    # longer than the watchdog waits, which says more
    patience = 2 * max(config.health.first_step_timeout, config.health.step_timeout)
    device = distributed.init(timedelta(seconds=patience))
    finished = train(config, device)
    if distributed.is_main():
        if finished:
            convert = ["python", "-m", "tarflow_dist.convert", str(config.run), "OUT"]
            print(f"{config.run}: finished; {shlex.join(convert)}")
        else:
            print(f"{config.run}: interrupted and saved; the same command goes on", file=sys.stderr)
    distributed.shutdown()
    return 0 if finished else os.EX_TEMPFAIL


if __name__ == "__main__":
    run_command(main)
