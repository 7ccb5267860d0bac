"""Lists the recipes (configs that come with tarflow_dist), or copies one to be changed.

    python -m tarflow_dist.recipe
    python -m tarflow_dist.recipe images64 mine.yaml

Where a config is asked for, a recipe's name will do: python -m tarflow_dist.train digits
"""

from pathlib import Path

from tarflow_dist import config_file as configs
from tarflow_dist.errors import UserError, run_command
from tarflow_dist.files import write_whole
from tarflow_dist.options import check_writable, command_parser


def main(argv: list[str]) -> None:
    parser = command_parser("recipe", __doc__)
    parser.add_argument("name", nargs="?", help="the recipe's; without one all are listed")
    parser.add_argument("out", nargs="?", type=Path, help="the file to write; default NAME.yaml")
    args = parser.parse_args(argv)
    recipes = configs.recipes()
    if args.name is None:
        for name, file in recipes.items():
            about = file.read_text().splitlines()[0]
            print(f"{name:<18}{about.removeprefix('# ')}")
        return
    if args.name not in recipes:
        raise UserError(f"there is no recipe {args.name}: there are {', '.join(recipes)}")
    out = args.out or Path(f"{args.name}.yaml")
    if out.exists():
        raise UserError(f"{out} is there already: choose another name")
    check_writable(out)
    with write_whole(out) as part:
        part.write_bytes(recipes[args.name].read_bytes())
    print(out)


if __name__ == "__main__":
    run_command(main)
