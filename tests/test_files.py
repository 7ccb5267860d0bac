"""What stands in files is read within bounds, and names out of them stay in their folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.files import inside, lock_folder, open_regular, read_json
from tarflow_dist.models.sampling_policy import read_policy
from tarflow_dist.models.tarflow import TarFlow

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["a", "train/a.mds", "a..b", ".hidden"])
def test_names_inside(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["/a", "//a", "..", "../a", "a/../../b", "a/..", "", ".", "a\0"])
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leads out of|is no file name"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", [None, 7, ["a"], b"a"])
def test_what_is_no_name(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file name"):
        inside(tmp_path, name)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(file)


@pytest.mark.parametrize("said", [NESTED, "{", "\ud800", ""])
def test_json_that_is_none(said: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(said.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"nested|Expect|codec"):
        read_json(file)


def test_a_lock_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    """Removed in the midst of a run, alone or with its folder; or another run's by now."""
    run = tmp_path / "run"
    for remove in ((run / ".lock").unlink, lambda: shutil.rmtree(run)):
        run.mkdir(exist_ok=True)
        with lock_folder(run):
            remove()
    run.mkdir()
    with lock_folder(run):
        (run / ".lock").unlink()
        with lock_folder(run):
            pass
        (run / ".lock").touch()
    assert (run / ".lock").exists()


def test_nested_without_end_is_a_sentence_everywhere(tmp_path: Path) -> None:
    for name in ("config.json", "sampling.json", "settings.json"):
        (tmp_path / name).write_text(NESTED)
    (tmp_path / "samples-000000.parquet").touch()
    with pytest.raises(ValueError, match="nested too deeply"):
        TarFlow.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_policy(tmp_path, fingerprint="", num_blocks=1)
    with pytest.raises(ValueError, match=r"settings\.json can't be read"):
        SampleStore(tmp_path, {"num_samples": 1, "chunk_size": 1})


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_models_are_as_readable_as_other_files(umask: int, mode: int, tmp_path: Path) -> None:
    """safetensors alone would write them for their owner."""
    code = (
        "import sys; from tarflow_dist import TarFlow; TarFlow(image_size=4, patch_size=2, "
        "width=64, num_blocks=1, layers_per_block=1, sigma=0.1).save_pretrained(sys.argv[1])"
    )
    command = ["bash", "-c", f'umask {umask:03o}; exec "$0" "$@"', sys.executable, "-c", code]
    subprocess.run([*command, str(tmp_path / "model")], check=True)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert modes == {"config.json": mode, "model.safetensors": mode}
