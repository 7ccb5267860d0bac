"""Models at the Hugging Face hub, or at another that speaks its protocol (HF_ENDPOINT).

Of what lies there, config.json, sampling.json and model.safetensors are fetched, into the hub's own
cache, and nothing else: none of them can run code.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tarflow_dist.errors import UserError
from tarflow_dist.models.folder import CONFIG_FILE, POLICY_FILE, WEIGHTS_FILE, read_config

NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>.+))?", re.ASCII)


class Found(NamedTuple):
    """A model's folder, and what to call it: its path, or its name at the hub with the commit."""

    folder: Path
    name: str


def find(model: str | Path) -> Found:
    """The folder `model`, or if there is none, the model of that name at the hub, USER/MODEL or
    USER/MODEL@REVISION (a branch, a tag or a commit), fetched unless it is in the cache already.

    Raises:
        UserError: it is neither, or can't be fetched.
    """
    check(model)
    if Path(model).exists():
        return Found(Path(model), str(model))
    parts = NAME.fullmatch(str(model))
    assert parts is not None
    repo, revision = parts["repo"], parts["revision"]
    with told(f"there is no folder {model}, and the hub gives no such model"):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=CONFIG_FILE))
        read_config(folder / CONFIG_FILE)  # before gigabytes are fetched for nothing
        rest = [WEIGHTS_FILE, POLICY_FILE]
        snapshot_download(repo, revision=folder.name, allow_patterns=rest)
    return Found(folder, f"{repo}@{folder.name}")


def find_on_all_ranks(model: str | Path) -> Found:
    """The same: one rank asks the hub what the name means, and all take that commit. Collective."""
    from tarflow_dist import distributed

    found = distributed.from_main(find(model) if distributed.is_main() else None)
    assert found is not None
    return found if found.folder.exists() else find(found.name)


def is_name(model: str | Path) -> bool:
    """Whether `model` could be a name at the hub."""
    return NAME.fullmatch(str(model)) is not None


def check(model: str | Path) -> None:
    """Raises `UserError` if `model` neither exists nor could be a name at the hub."""
    if not Path(model).exists() and not is_name(model):
        raise UserError(
            f"there is no folder {model}, nor is that a name at the hub, which would be USER/MODEL "
            "or USER/MODEL@REVISION"
        )


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raises `UserError`, `what` and why, if huggingface_hub is missing or fails in the body."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        if error.name != "huggingface_hub":
            raise
        raise UserError(
            f"{what}, since huggingface_hub is not installed: pip install 'tarflow_dist[hub]'"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of an upload
        raise UserError(f"{what}: {_why(error)}") from error


def _why(error: Exception) -> str:
    import requests  # huggingface_hub's
    from huggingface_hub import constants, errors

    here = constants.ENDPOINT
    log_in = "log in with `hf auth login`"
    match error:
        case errors.GatedRepoError():
            return f"{here} shows it to those who accepted its terms there: do, and {log_in}"
        case errors.RepositoryNotFoundError():
            return f"{here} doesn't know it, or keeps it private: {log_in} if it does"
        case errors.RevisionNotFoundError():
            return f"{here} has it, but not in this revision"
        case errors.LocalEntryNotFoundError():
            return f"{here} can't be reached, and the cache {constants.HF_HUB_CACHE} lacks it"
        case requests.ConnectionError() | requests.Timeout() | errors.OfflineModeIsEnabled():
            return f"{here} can't be reached"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{here} refuses: {log_in}, as someone who may do that"
        case errors.HfHubHTTPError():
            said = error.server_message or error
            return f"{here} answers {error.response.status_code}: {' '.join(str(said).split())}"
    return " ".join(f"{type(error).__name__}: {error}".split())
