"""The short commands: one list, and each the same as its module."""

import argparse
from importlib import import_module
from pathlib import Path

import pytest
from commands import run

from tarflow_dist.__main__ import COMMANDS

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


class ParserBuiltError(Exception):
    """Instead of an answer, the parser itself."""


@pytest.mark.parametrize("command", [*COMMANDS, "data_prep", "launch"])
def test_help_tells_each_option_and_its_default(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise ParserBuiltError(parser)

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    elsewhere = {"data_prep": "data_prep.commands", "launch": "slurm.launch"}
    module = elsewhere.get(command, f"tarflow_dist.{command.replace('-', '_')}")
    main = "parse" if command == "data_prep" else "main"
    with pytest.raises(ParserBuiltError) as caught:
        getattr(import_module(module), main)([])
    parsers = [caught.value.args[0]]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    for parser in parsers:
        for action in parser._actions:
            if action.option_strings:
                text = parser._get_formatter()._expand_help(action).lower() if action.help else ""
                assert text, f"{action.option_strings} has no help"
                unset = action.default in (None, False, "", argparse.SUPPRESS)
                assert unset or action.required or "default" in text, action.option_strings


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
