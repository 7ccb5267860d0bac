"""The short commands: one list, and each the same as its module."""

from pathlib import Path

from commands import run

ROOT = Path(__file__).parents[1]


def test_every_command_is_listed_and_none_else() -> None:
    """A command is a module that ends in run_command."""
    said = run("tarflow_dist").stdout
    assert said == run("tarflow_dist", "--help").stdout
    listed = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    modules = [
        file.stem.replace("_", "-")
        for file in (ROOT / "tarflow_dist").glob("*.py")
        if file.read_text().endswith("    run_command(main)\n")
    ]
    assert sorted(listed) == sorted(modules)


def test_a_short_command_is_its_module() -> None:
    arguments = ["configs/digits.yaml", "--gpus-per-node", 1, "--gpu", "h100"]
    assert (
        run("tarflow_dist", "plan", *arguments).stdout
        == run("tarflow_dist.plan", *arguments).stdout
    )
    short, long = (
        run(*command, "--num-samples", 4, check=False)
        for command in (("tarflow_dist", "sample_fid"), ("tarflow_dist.sample_fid",))
    )
    assert short.returncode == long.returncode == 2
    assert short.stderr == long.stderr


def test_a_command_that_there_is_not() -> None:
    done = run("tarflow_dist", "sampel", check=False)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command sampel: did you mean sample?\n"
