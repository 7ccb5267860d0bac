"""tarflow COMMAND … is python -m tarflow_dist.COMMAND …; tarflow COMMAND --help explains it.
On several ranks: torchrun … -m tarflow_dist COMMAND …"""

import difflib
from importlib import import_module
from typing import Any

from tarflow_dist.errors import UserError, run_command

COMMANDS = (
    *("train", "plan", "convert", "sample", "calibrate", "sample-fid", "reference"),
    *("evaluate-bpd", "push", "recipe", "demo"),
)


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n")
        for command in COMMANDS:
            about = _module(command).__doc__ or ""
            print(f"  {command:<14}{about.splitlines()[0]}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {argv[0]}: {hint}")
    return _module(name).main(argv[1:])


def _module(command: str) -> Any:
    return import_module(f"tarflow_dist.{command.replace('-', '_')}")


def run() -> None:
    run_command(main)


if __name__ == "__main__":
    run()
