"""A preparation that is killed, refused or out of disk goes on, and ends as an unbroken one."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from commands import FRESH
from PIL import Image

from data_prep import encode
from data_prep import prepare as preparation
from data_prep.__main__ import main
from data_prep.prepare import help_prepare, prepare
from data_prep.settings import Settings
from data_prep.sources import open_source
from tarflow_dist.errors import UserError, run_command

COUNT = 1200


def run_apart(
    src: Path, out: Path, workers: int, said: Path, env: dict[str, str], ranks: tuple[int, int]
) -> None:
    """A rank of a preparation as a command of its own, what it says in the file `said`."""
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= env

    def command(_: list[str]) -> None:
        settings = Settings(size=32, shard_bytes=40_000)
        formats, (rank, world_size) = ["mds", "wds"], ranks
        if rank:
            share = {"rank": rank, "world_size": world_size}
            help_prepare(src, out, formats, settings, workers=workers, **share)
        else:
            source = open_source(src, layout="folder", val_fraction=0.1, seed=0)
            prepare(source, out, formats, settings, workers=workers, world_size=world_size)

    run_command(command)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in four classes, a few of them bad."""
    root = tmp_path_factory.mktemp("src")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))
    for i in range(COUNT):
        file = root / "abcd"[i % 4] / f"{i:04d}.jpg"
        file.parent.mkdir(exist_ok=True)
        if i % 200 == 7:
            file.write_text("this is no image")
        else:
            left = i // 6
            noise.crop((left, 0, left + 100, 100)).save(file, quality=50)
    return root


def contents(out: Path) -> dict[str, bytes]:
    return {
        file.relative_to(out).as_posix(): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != "timing.json"
    }


@pytest.fixture(scope="module")
def unbroken(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker makes of it, in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    with started(src, out, 1) as process:
        process.join()
    assert process.exitcode == 0
    found = contents(out)
    assert sum(name.endswith((".mds", ".tar")) for name in found) > 60
    return found


@contextmanager
def started(
    src: Path, out: Path, workers: int, ranks: tuple[int, int] = (0, 1), **env: str
) -> Iterator[BaseProcess]:
    arguments = (src, out, workers, out.with_suffix(".said"), env, ranks)
    process = FRESH.Process(target=run_apart, args=arguments)
    process.start()
    yield process
    process.join(120)
    process.kill()  # if it still waits for something
    process.join()


def last_words(out: Path) -> str:
    return out.with_suffix(".said").read_text().splitlines()[-1]


def progress(out: Path) -> int:
    """Shards that are done."""
    return len(list((out / ".partial" / "done").glob("[0-9]*.json")))


def processes_with(marker: str) -> list[str]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in environ.read_bytes():
                found.append(environ.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.e2e
def test_killed_at_fifteen_random_moments(
    src: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    """Of one preparation, on one to four nodes; other moments every time the test is run. A shard
    that is done is not done again, and no image is on the disk twice."""
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    shard_count = sum(name.endswith(".mds") for name in unbroken)
    marker = f"KILL_TEST_{os.getpid()}"
    out = tmp_path / "out"
    made: dict[str, int] = {}
    history = [0]
    for target in sorted(draw.sample(range(shard_count), 15)):
        nodes = draw.choice([1, 2, 4])
        with ExitStack() as stack:
            node = partial(started, src, out, draw.choice([1, 2]), **{marker: "1"})
            ranks = [stack.enter_context(node(ranks=(rank, nodes))) for rank in range(nodes)]
            while progress(out) < target and ranks[0].is_alive():
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
            for rank in draw.sample(ranks, nodes):
                rank.kill()
        assert ranks[0].exitcode == -signal.SIGKILL, f"seed {seed}: {history}"
        files = {f.name: f.stat().st_mtime_ns for f in (out / ".partial" / "done").glob("*.json")}
        assert made.items() <= files.items(), f"seed {seed}: {history}"
        made = files
        history.append(len(files))
    size = sum(file.stat().st_size for file in out.rglob("*.*") if file.is_file())
    assert size < 1.1 * sum(map(len, unbroken.values()))
    with started(src, out, 2, **{marker: "1"}):
        pass
    assert contents(out) == unbroken, f"seed {seed}: {history}"
    deadline = time.monotonic() + 30
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_with(marker)  # the killed ones' workers ended, too


@pytest.mark.parametrize("there", ["begun.json", "done/000001.json"])
def test_ctrl_c_is_one_sentence(there: str, src: Path, tmp_path: Path) -> None:
    """In all processes of the terminal, as the run begins and with its workers at work."""
    args = command(src, tmp_path / "out", "--workers", "2", "--encode", "webp")
    with subprocess.Popen(
        [sys.executable, "-m", "data_prep", *args],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        file = tmp_path / "out" / ".partial" / there
        while not (file.exists() and file.stat().st_size):
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
    assert process.returncode == 130, said
    assert said[-1].startswith("interrupted")
    assert all("img/s" in line for line in said[:-1]), said


@pytest.mark.parametrize(("nodes", "workers"), [(1, 3), (2, 2), (4, 1)])
def test_workers_and_nodes_change_no_byte(
    nodes: int, workers: int, src: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(started(src, out, workers, (rank, nodes)))
            for rank in reversed(range(nodes))
        ]
    assert [rank.exitcode for rank in ranks] == [0] * nodes
    assert contents(out) == unbroken
    assert [entry.name for entry in sorted(out.iterdir())] == ["mds", "wds"]


def test_a_rank_of_another_preparation_is_refused(src: Path, few: Path, unfinished: Path) -> None:
    """By the settings; the source is the first rank's to look at."""
    with started(few, unfinished, 1, (1, 2)) as process:
        pass
    assert process.exitcode == 2
    assert "is an unfinished run's, with size 8" in last_words(unfinished)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    for i in range(12):
        file = tmp_path / "few" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 0, 0)).save(file)
    return tmp_path / "few"


def command(src: Path, out: Path, *more: str) -> list[str]:
    return ["folder", str(src), str(out), "--size", "8", "--workers", "1", *more]


def refused(src: Path, out: Path, *more: str) -> str:
    before = contents(out)
    with pytest.raises(UserError) as caught:
        main(command(src, out, *more))
    assert contents(out) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def unfinished(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder where a run was interrupted with its shards done."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "describe_sets", interrupt)
        assert main(command(few, tmp_path / "out")) == 130
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [".partial"]
    return tmp_path / "out"


def test_what_is_done_is_not_done_again(
    few: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "prepare_image", None)  # decodes nothing
    (unfinished / ".partial" / "parts" / "n1-99").write_bytes(b"what a kill left of a shard")
    main(command(few, unfinished))
    monkeypatch.undo()
    main(command(few, tmp_path / "again"))
    assert contents(unfinished) == contents(tmp_path / "again")
    timing = json.loads((unfinished / "mds" / "timing.json").read_text())
    assert (timing["images_before"], timing["workers"]) == (12, 1)


def test_an_unfinished_run_with_other_settings_is_refused(few: Path, unfinished: Path) -> None:
    partial = unfinished / ".partial"
    end = "finish that with its own command, or remove the folder"
    said = refused(few, unfinished, "--encode", "webp")
    assert said == f"{partial} is an unfinished run's, with encode png: {end}"
    assert "with seed 0" in refused(few, unfinished, "--seed", "1")
    assert "with formats ['mds']" in refused(few, unfinished, "--format", "both")
    assert "with other images" in refused(few, unfinished, "--val-fraction", "0.5")
    shutil.copytree(few, few.parent / "else" / "few")
    assert "with other images" in refused(few.parent / "else" / "few", unfinished)
    (few / "a" / "new.png").touch()
    assert "with other images" in refused(few, unfinished)
    (few / "a" / "new.png").unlink()
    main(command(few, unfinished, "--max-errors", "0.5"))


def cut(content: bytearray) -> bytearray:
    return content[:-3]


def flip(content: bytearray) -> bytearray:
    content[40] ^= 0x81  # is no UTF-8
    return content


@pytest.mark.parametrize("name", ["plan.parquet", "begun.json"])
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_plan_is_refused(
    few: Path, unfinished: Path, name: str, damage: Callable[[bytearray], bytearray]
) -> None:
    file = unfinished / ".partial" / name
    file.write_bytes(damage(bytearray(file.read_bytes())))
    with pytest.raises(UserError, match="is damaged: remove it to start over"):
        main(command(few, unfinished))
    assert not (unfinished / "mds").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("done/000000.json", cut),
        ("done/000000.json", flip),
        ("done/000000.parquet", cut),
        ("done/000000.parquet", flip),
        ("mds/train/shard.00000.mds", cut),
    ],
)
def test_a_shard_that_is_not_whole_is_made_again(
    few: Path,
    unfinished: Path,
    name: str,
    damage: Callable[[bytearray], bytearray],
    tmp_path: Path,
) -> None:
    file = unfinished / ".partial" / name
    file.write_bytes(damage(bytearray(file.read_bytes())))
    main(command(few, unfinished))
    main(command(few, tmp_path / "again"))
    assert contents(unfinished) == contents(tmp_path / "again")
    assert json.loads((unfinished / "mds" / "timing.json").read_text())["images_before"] == 2


def test_what_is_said_of_another_shard_does_not_count(
    few: Path, unfinished: Path, tmp_path: Path
) -> None:
    done = unfinished / ".partial" / "done"
    for suffix in (".json", ".parquet"):
        shutil.copy(done / f"000001{suffix}", done / f"000000{suffix}")
    main(command(few, unfinished))
    main(command(few, tmp_path / "again"))
    assert contents(unfinished) == contents(tmp_path / "again")


def test_a_finished_preparation_is_finished(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command says so again, and any other is refused."""
    out = tmp_path / "out"
    assert main(command(few, out)) == 0
    said, before = capsys.readouterr().out, contents(out)
    assert main(command(few, out)) == 0
    assert capsys.readouterr().out == said
    end = "already holds a set: remove it or choose another"
    assert refused(few, out, "--seed", "1") == f"{out}/mds {end}"
    assert refused(few, out, "--format", "both") == f"{out}/mds {end}"
    (few / "a" / "0.png").rename(few / "a" / "00.png")
    assert refused(few, out) == f"{out}/mds {end}"
    assert contents(out) == before


def test_a_kill_between_two_formats(few: Path, tmp_path: Path) -> None:
    """The first is there already: the run goes on with the second, and ends what was done."""
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    for count in (1, 2):
        publish = iter([preparation.publish_folder] * count)

        def once(*args: Path, publish: Iterator = publish) -> None:
            next(publish, kill)(*args)

        def kill(*args: object) -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preparation, "publish_folder", once)
            if count == 2:
                patch.setattr(preparation.shutil, "rmtree", kill)
            with pytest.raises(Killed):
                main(command(few, out, "--format", "both"))
        assert len(list(out.glob("[mw]ds"))) == count
    main(command(few, out, "--format", "both"))
    main(command(few, tmp_path / "again", "--format", "both"))
    assert contents(out) == contents(tmp_path / "again")


def test_a_second_run_is_refused(few: Path, unfinished: Path) -> None:
    with (unfinished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refused(few, unfinished)
        assert said == (
            f"another run is writing to {unfinished}: wait for it, or choose another folder"
        )
    main(command(few, unfinished))  # a lock file without a run does no harm
    assert [entry.name for entry in unfinished.iterdir()] == ["mds"]


def test_two_runs_at_once(src: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with started(src, out, 1) as first:
        while not progress(out):
            assert first.is_alive()
            time.sleep(0.01)
        with started(src, out, 1) as second:
            pass
        assert second.exitcode == 2
        assert "another run is writing to" in last_words(out)
    assert first.exitcode == 0
    assert contents(out) == unbroken


def test_a_killed_worker_is_one_sentence(
    src: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with started(src, out, 2) as process:
        while not progress(out):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [child for child in children if "spawn_main" in cmdline(child)]
        os.kill(int(workers[0]), signal.SIGKILL)
    assert process.exitcode == 2
    assert last_words(out).startswith("error: a worker process was killed")
    with started(src, out, 2):
        pass
    assert contents(out) == unbroken


def cmdline(process: str) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


@pytest.mark.parametrize("fill", [3.9, 3.2, 2.6])
def test_a_full_disk(small_disk: Path, tmp_path: Path, fill: float) -> None:
    """It is met early, later, or while shards are written; with room made, the run goes on."""
    rng = np.random.default_rng(0)
    for i in range(300):
        file = tmp_path / "src" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
    out = small_disk / "out"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(int(fill * 2**20)))
    command = ["folder", f"{tmp_path}/src", str(out), "--size", "40", "--workers", "1"]
    with pytest.raises(UserError, match=f"^can't write to {out}: No space left on device$"):
        main(command)
    assert not (out / "mds").exists()
    ballast.unlink()
    main(command)
    again = tmp_path / "again"
    main(["folder", f"{tmp_path}/src", str(again), "--size", "40", "--workers", "1"])
    assert contents(out) == contents(again)


def test_a_folder_that_may_not_be_written_to(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "closed"
    out.mkdir()
    out.chmod(0o555)
    closing = ["chattr", "+i", str(out)]  # root may write anywhere else
    if os.access(out, os.W_OK) and subprocess.run(closing, capture_output=True).returncode:
        pytest.skip("nothing is closed to root here")
    try:
        with pytest.raises(UserError, match=f"can't write to {out}: .* not permitted|denied"):
            main(command(few, out))
        assert list(out.iterdir()) == []
    finally:
        subprocess.run(["chattr", "-i", str(out)], capture_output=True)
