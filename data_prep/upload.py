"""Sets in an object store: written on a local disk first, then uploaded by streaming."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Source
from data_prep.sources.storage import damage_named
from tarflow_dist.errors import UserError
from tarflow_dist.files import read_json, write_whole
from tarflow_dist.telemetry.progress import Progress

LAST = "summary.json"  # a set is there once this is


def is_remote(out: str | Path) -> bool:
    return "://" in str(out)


def prepare_and_upload(
    source: Source, url: str, formats: Sequence[str], settings: Settings, *, workers: int
) -> dict[str, Any]:
    """`prepare.prepare` for the address `url`. The sets wait in a folder below the temporary one
    (TMPDIR), which must have room for them; the same command finds it again, and goes on.

    Raises:
        UserError: as `prepare`; something lies at `url` already; the store can't be reached.
    """
    url = url.rstrip("/")
    staged = staging_folder(source, url, formats, settings)
    done = staged / "summary.json"  # beside the sets, once all are there
    if not staged.exists():
        _check_free(url, formats)
    if not done.exists():
        summary = prepare(source, staged, formats, settings, workers=workers)
        with write_whole(done) as part:
            part.write_text(json.dumps(summary))
    with damage_named(f"{done} is damaged", f"remove {staged} to start over"):
        summary = read_json(done)
    for form in formats:
        upload(staged / form, f"{url}/{form}")
    shutil.rmtree(staged)
    return summary


def staging_folder(source: Source, url: str, formats: Sequence[str], settings: Settings) -> Path:
    """Another folder for all that makes another set."""
    about = [url, source.fingerprint(), list(formats), settings.identity()]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"data_prep-{key}")


def upload(folder: Path, url: str) -> None:
    """Uploads a set and removes it here, a file at a time: what is still here is what is left to
    do, should this be killed.

    Raises:
        UserError: the store can't be reached or refuses.
    """
    if not folder.exists():
        return
    uploader = _uploader(folder, url)
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    names.sort(key=lambda name: (name == LAST, name))
    with Progress(f"upload {folder.name}", len(names), unit="file") as progress:
        for name in names:
            try:
                uploader.upload_file(name)
            except Exception as error:  # each kind of store has its own errors
                raise _unreachable(f"{url}/{name}", error) from error
            progress.update(1)
    shutil.rmtree(folder)


def _check_free(url: str, formats: Sequence[str]) -> None:
    """Raises `UserError` if something lies at `url`, or it can't be reached: before any work."""
    with tempfile.TemporaryDirectory() as empty:
        for form in formats:
            if _uploader(Path(empty, form), f"{url}/{form}").list_objects(""):
                raise UserError(f"{url}/{form} already holds a set: remove it or choose another")


def _uploader(folder: Path, url: str) -> Any:
    from streaming.base.storage.upload import CloudUploader, logger

    logger.setLevel("ERROR")  # it warns of folders with files in them, which is what we upload
    try:
        return CloudUploader.get((str(folder), url), exist_ok=True)
    except Exception as error:  # each kind of store has its own errors
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"can't write to {url} ({reason}): check the address, the credentials and, for a store "
        "that is not Amazon's, S3_ENDPOINT_URL"
    )
