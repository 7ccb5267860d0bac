"""A run's config as a YAML file, or a recipe's name, plus `key=value` overrides."""

import difflib
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tarflow_dist.config import Config, Section
from tarflow_dist.errors import UserError
from tarflow_dist.files import read_regular, take_version
from tarflow_dist.flow.config import FlowConfig

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # a key, to pydantic
# A run goes on with these as they were; everything else may change from one start to the next.
FIXED_IN_A_RUN = ("model", "seed", "init")
SAVED_FILE = "config.yaml"  # in the run's folder
VERSION = 1  # of a config file, which may say it


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, or the recipe of that name, and applies `key=value` overrides, whose
    values are YAML.

    Raises:
        UserError: one sentence that names the key, and the nearest one if the key is unknown.
    """
    tree = _read_tree(find(path))
    for override in overrides:
        _apply_override(tree, override)
    return _validated(tree, path)


def recipes() -> dict[str, Path]:
    """The configs that come with this package, in a checkout those of configs/, by their names."""
    files = sorted(Path(__file__).with_name("recipes").glob("*.yaml"))
    return {file.stem: file for file in files}


def find(path: Path) -> Path:
    """The file `path`, or if there is none and it is a recipe's name, with or without .yaml, that
    recipe's file."""
    recipe = recipes().get(path.name.removesuffix(".yaml"))
    return recipe if recipe and path.parent == Path() and not path.is_file() else path


def read_yaml(path: Path, keys: str) -> dict[str, Any]:
    """What the YAML file `path` says of its keys, some of which are named in `keys`.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is damaged, or has no keys.
    """
    try:
        tree = yaml.safe_load(read_regular(path).decode())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a config: it should hold keys such as {keys}")
    return tree


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path, "model and data")
    except FileNotFoundError as error:
        raise UserError(
            f"there is no config {path}: name a YAML file, or one of the recipes "
            f"{', '.join(recipes())}"
        ) from error
    try:
        take_version(tree, newest=VERSION)
    except ValueError as error:
        raise UserError(f"{path} is of {error}") from error
    return tree


def _validated(tree: dict[str, Any], path: Path) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            f"{path}: {first_problem(error, [key for key, _, _ in fields(Config)])}"
        ) from error


def load_saved(run: Path) -> tuple[Config, dict[str, Any]]:
    """The config that a run was last started with, by whatever version, and the settings in it that
    there are no more. What is absent has its default.

    Raises:
        UserError: it is damaged, or one of those is of a kind that can't change in a run.
    """
    path = run / SAVED_FILE
    tree: Any = _read_tree(path)
    gone: dict[str, Any] = {}
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] in UNKNOWN:
                *sections, name = problem["loc"]
                gone[".".join(map(str, problem["loc"]))] = reduce(getitem, sections, tree).pop(name)
    for key, value in gone.items():
        if key.partition(".")[0] in FIXED_IN_A_RUN and value:
            raise UserError(
                f"{path} has {key} {value}, which this version of tarflow_dist does not know: go "
                "on with the one that wrote it"
            )
    return _validated(tree, path), gone


def dump(config: Config) -> str:
    """The whole tree as YAML, as `load` reads it."""
    return yaml.safe_dump({"version": VERSION, **config.model_dump(mode="json")}, sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """Dotted keys and their values."""
    tree = config.model_dump(mode="json")
    return {key: reduce(getitem, key.split("."), tree) for key, _, _ in fields(Config)}


def fields(
    section: type[Section] | type[FlowConfig], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Every field below `section`: dotted key, default as text, description."""
    schema = TypeAdapter(section).json_schema()
    kinds = get_type_hints(section)
    for name, about in schema["properties"].items():
        if isinstance(kinds[name], type) and issubclass(kinds[name], Section | FlowConfig):
            yield from fields(kinds[name], f"{prefix}{name}.")
        else:
            required = name in schema.get("required", ())
            default = "required" if required else f"default {about.get('default')}"
            yield f"{prefix}{name}", default, " ".join(about.get("description", "").split())


def help_text() -> str:
    """All fields with their defaults and descriptions, for a command's --help."""
    return "\n".join(f"  {key} ({default})\n      {text}" for key, default, text in fields(Config))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} should look like key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML") from error
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {'.'.join(parents)} has no keys below it")
    node[last] = value


def first_problem(error: ValidationError, known: list[str]) -> str:
    """A sentence on what is wrong with a tree whose keys, dotted, are `known`."""
    # a misspelt key is both unknown and, under its right name, missing: tell the former
    problem = min(error.errors(), key=lambda p: p["type"] not in UNKNOWN)
    path = ".".join(str(part) for part in problem["loc"])
    # pydantic names a union's branches in the path: keep the part that is a field
    key = next((k for k in known if path == k or path.startswith(f"{k}.")), path)
    if problem["type"] in UNKNOWN:
        return f"unknown key {path}; did you mean {_nearest(path, known)}?"
    if problem["type"] == "missing":
        return f"{key} is missing"
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    return f"{key} is {problem['input']!r}: {reason[0].lower()}{reason[1:]}"


def _nearest(path: str, known: list[str]) -> str:
    """The key or section meant by `path`: one with its last word, or else the most alike, in the
    section that it names if there is such a one."""
    parent, _, last = path.rpartition(".")
    if same := [key for key in known if key.rpartition(".")[2] == last]:
        return same[0]
    sections = sorted({key.rpartition(".")[0] for key in known} - {""})
    beside = [key for key in known if parent and key.startswith(f"{parent}.")]
    return difflib.get_close_matches(path, beside or known + sections, n=1, cutoff=0.0)[0]
