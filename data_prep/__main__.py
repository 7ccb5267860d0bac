"""`python -m data_prep {imagenet,folder,digits,verify,show} …`"""

from tarflow_dist.errors import run_command


def main(argv: list[str]) -> int | None:
    # here, because it takes a while: Ctrl-C is heard meanwhile, and workers do without
    from data_prep.commands import run

    return run(argv)


if __name__ == "__main__":
    run_command(main)
