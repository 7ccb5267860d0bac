"""What launch.py shows and refuses without a Slurm, and --local."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from strikes import ROOT, TINY

from slurm import requeue
from slurm.job import NodeError, check_node
from slurm.job_record import JobRecord
from slurm.resources import Resources, parse_minutes
from slurm.tasks import Task


def launch(*arguments: object, code: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "slurm" / "launch.py", *map(str, arguments)],
        cwd=cwd,
        # no sbatch, squeue, … to be found, whether Slurm is installed or not
        env={**os.environ, "PATH": str(Path(sys.executable).parent), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def sbatch_options(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line}


def test_a_dry_run_shows_plan_and_script() -> None:
    shown = launch("--nodes", 8, "configs/in256.yaml", "data.path=/nowhere", "--dry-run")
    assert re.search(r"nodes +8 x 8 GPUs, 64 ranks", shown)
    assert re.search(r"batch +768 images: 12 a rank", shown)
    assert re.search(r"length +409,973,440 images, 533,820 steps", shown)
    assert sbatch_options(shown) >= {
        "--nodes=8",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--requeue",
        "--signal=USR2@300",
        "--time=1440",
        "--open-mode=append",
    }
    assert "wckey" not in shown
    (srun,) = re.findall(r"^srun .*", shown, re.MULTILINE)
    for option in ("--kill-on-bad-exit=1", "--cpus-per-task=10", "--cpu-bind=none"):
        assert option in srun
    script = shown[shown.index("#!/bin/bash") :]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "would be refused: there are no shards /nowhere" in shown
    assert not (ROOT / "runs" / "in256").exists()


def test_every_sbatch_option_reaches_the_script(tmp_path: Path) -> None:
    given = {
        "partition": "a,b",
        "account": "me",
        "qos": "high",
        "constraint": "h100&ib",
        "nodelist": "n[1-8]",
        "exclude": "n9",
        "reservation": "talk",
        "dependency": "afterok:7",
        "comment": "two words",
        "mail-type": "END",
        "mail-user": "me@here",
        "mem": "500G",
        "wckey": "key",
    }
    options = [f"--{name}={value}" for name, value in given.items()]
    extra = ["--exclusive", "--slurm=licenses=scratch", "--slurm=hold", "--srun-args=--mpi=none"]
    shown = launch(*options, *extra, "--nodes=8", "configs/in256.yaml", "--dry-run")
    # quotes as in sbatch's reading of a #SBATCH line
    told = {option.replace("'", "") for option in sbatch_options(shown)}
    assert told >= {f"--{name}={value}" for name, value in given.items()}
    assert told >= {"--exclusive", "--licenses=scratch", "--hold"}
    assert "--mpi=none" in re.findall(r"^srun .*", shown, re.MULTILINE)[0]


def test_options_come_on_top_of_the_clusters_file(tmp_path: Path) -> None:
    cluster = tmp_path / "mine.yaml"
    cluster.write_text("{partition: low, time: '2-00', setup: [module load a], env: {A: one two}}")
    shown = launch(
        *("--setup=module load b", "--partition=high", "--env=B=2"),
        *("--nodes=8", "configs/in256.yaml", "--dry-run"),
        TARFLOW_CLUSTER=str(cluster),
    )
    assert sbatch_options(shown) >= {"--partition=high", "--time=2880"}
    lines = shown.splitlines()
    order = ["export A='one two'", "export B=2", "module load a", "module load b", "# command"]
    assert [line for line in lines if line in order] == order


@pytest.mark.parametrize("name", ["h100-conda", "a100-pyxis"])
def test_the_examples_of_clusters_work(name: str) -> None:
    shown = launch("--cluster", name, "--nodes=16", "configs/in256.yaml", "--dry-run")
    ranks = {"h100-conda": 128, "a100-pyxis": 64}[name]
    assert f"{ranks} ranks" in shown
    starts = re.findall(r"^srun .*", shown, re.MULTILINE)
    # in a container, what decides on the requeue runs there, too, and scontrol outside
    assert len(starts) == (2 if name == "a100-pyxis" else 1)
    assert all(("--container-image=" in start) == (name == "a100-pyxis") for start in starts)
    assert f"{ROOT}:{ROOT}" in shown or name != "a100-pyxis"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes=7", "configs/in256.yaml"], "768 is not divisible by world size (56)"),
        (["configs/in256.yaml", "train.batchsize=8"], "did you mean train.batch_size?"),
        (["configs/nowhere.yaml"], "there is no config configs/nowhere.yaml"),
        ([], "CONFIG is missing"),
        (["--time=tomorrow", "configs/in256.yaml"], "time 'tomorrow' is not Slurm's"),
        (["--time=5", "configs/in256.yaml"], "signal_delay 300 s is not shorter than time 5"),
        (["--nodes=many", "configs/in256.yaml"], "nodes is 'many'"),
        (["--cluster=mars", "configs/in256.yaml"], "there is no cluster file"),
        (["--env=A", "configs/in256.yaml"], "--env A should look like NAME=VALUE"),
        (["--then=train", "configs/in256.yaml"], "only sample_fid or evaluate_bpd"),
        (["--local", "--nodes=2", "configs/digits.yaml"], "--local has one node"),
        (["--local", "--gpus-per-node=3", "configs/digits.yaml"], "this machine has 0: give --gp"),
        (["--task=data_prep", "--", "folder", "a", "b", "--size=-5"], "--size is -5"),
        (["--task=data_prep", "--", "digits", "b", "--workers=-5"], "--workers is -5"),
        (["--task=data_prep", "--nodes=2", "--", "digits", "s3://b/x"], "one rank alone can write"),
        (["--task=sample_fid", "--", "--model=x", "--reference=y", "--num-samples=9"], "folder x"),
        (["--then=evaluate_bpd --draws 0", "configs/in256.yaml"], "must be at least 1"),
        (["--then=evaluate_bpd 'a", "configs/in256.yaml"], "no closing quotation"),
        (["--then=evaluate_bpd --model=x", "configs/in256.yaml"], "leave --model out"),
        (["--then=", "configs/in256.yaml"], "only sample_fid or evaluate_bpd"),
        (["--task=evaluate_bpd", "--", "--model=x", "--data=y"], "folder x"),
        (["--env==x", "configs/in256.yaml"], "--env =x should look like NAME=VALUE"),
        (["--slurm=", "configs/in256.yaml"], "--slurm  should look like NAME=VALUE"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[str], sentence: str) -> None:
    told = launch("--dry-run", *arguments, code=2)
    assert sentence in told
    assert "Traceback" not in told


def test_the_plan_is_of_what_will_run(tmp_path: Path) -> None:
    """Here, and as many processes as a preparation was told."""
    shown = launch("--local", "configs/digits.yaml", "--dry-run")
    assert "--local: on the CPU" in shown
    assert re.search(r"nodes +1 x 1 CPU ranks, 1 ranks", shown)
    options = ["--nodes=8", "--task=data_prep", "--dry-run"]
    shown = launch(*options, "--", "digits", "b", "--workers=32")
    assert re.search(r"nodes +8 x 1 CPU ranks, 8 ranks", shown)
    assert sbatch_options(shown) >= {"--nodes=8", "--ntasks-per-node=1"}
    assert re.search(r"cores +34 a rank", shown)
    assert "--cpus-per-task=34" in shown
    shown = launch("--cluster=a100-pyxis", "in64_tune", f"init={tmp_path / 'model'}", "--dry-run")
    assert f"would be refused: there is no model {tmp_path / 'model'}" in shown
    assert f"{tmp_path / 'model'}:{tmp_path / 'model'}" in shown  # a mount


def test_a_run_that_is_finished_and_was_not_submitted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "00000080000").mkdir(parents=True)
    shown = launch("configs/digits.yaml", f"run={run}", "--dry-run")
    assert re.search(r"starts +no more: it is finished", shown)
    assert "no job was submitted for" in launch("status", run, code=2)
    (run / "config.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    (run / "status.json").write_text('{"state": "finished", "images": 80000}')
    told = launch("status", run)
    assert re.search(r"state +finished", told)
    assert re.search(r"images +80,000 of 80,000 \(100.0%\)", told)
    assert "none of Slurm's" in told


def test_without_slurm_it_says_what_else_there_is() -> None:
    told = launch("--nodes=8", "configs/in256.yaml", "--force", code=2)
    assert "there is no Slurm on this machine" in told
    assert "--dry-run" in told


@pytest.fixture
def slurm_is_down(tmp_path: Path) -> Path:
    """A folder of Slurm's programs, of which only squeue answers."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sinfo", "sacct", "scancel"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
    (programs / "squeue").write_text("#!/bin/sh\necho 'RUNNING|None|n1|N/A'\n")
    for file in programs.iterdir():
        file.chmod(0o755)
    return programs


def test_when_slurm_refuses_or_does_not_answer(slurm_is_down: Path, tmp_path: Path) -> None:
    told = launch("--force", "configs/in256.yaml", code=2, PATH=str(slurm_is_down))
    assert told.endswith("error: Slurm does not answer: wait until sinfo does\n")
    job = tmp_path / "run" / "slurm" / "job"
    job.mkdir(parents=True)
    JobRecord(job, tmp_path / "run", "train", attempts=3, command="", job_id="7").write()
    assert "job 7 RUNNING (n1)" in launch("status", tmp_path / "run", PATH=str(slurm_is_down))
    told = launch("stop", tmp_path / "run", code=2, PATH=str(slurm_is_down))
    assert told == "error: job 7 goes on, since scancel fails: is it another user's?\n"
    assert not (job / "stop").exists()


def test_a_time_without_quotes_is_caught(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("time: 24:00:00\n")
    told = launch("--cluster", tmp_path / "mine.yaml", "configs/in256.yaml", code=2)
    assert "put it in quotes" in told


@pytest.mark.parametrize(
    ("content", "option", "sentence"),
    [
        ("env:", "--env=A=1", "env is None: input should be a valid dictionary"),
        ("setup: module load a", "--setup=b", "setup is 'module load a'"),
    ],
)
def test_what_a_cluster_file_has_of_another_kind_is_told(
    content: str, option: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    told = launch("--cluster", tmp_path / "mine.yaml", option, "configs/in256.yaml", code=2)
    assert sentence in told
    assert "Traceback" not in told


def test_samples_are_measured_against_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, reference = tmp_path / "drawn", tmp_path / "VIRTUAL.npz"
    samples.mkdir()
    reference.touch()
    arguments = ["--samples", samples, "--reference", reference, "--features", "pixels"]
    options = ["--gpus-per-node=0", "--task=sample_fid", "--dry-run"]
    shown = launch(*options, "--", *arguments, "--out", tmp_path / "out")
    assert re.search(r"folder +jobs/sample_fid-drawn", shown)
    assert "would be refused" not in shown
    assert not (tmp_path / "out").exists()  # nothing is done yet

    resources = Resources(gpus_per_node=0)
    task = Task("sample_fid", (), tmp_path / "job", resources, str(reference))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    check_node(task)
    reference.unlink()
    with pytest.raises(NodeError, match=r"VIRTUAL\.npz can't be read: No such file"):
        check_node(task)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("02:30:00", 150),
        ("1:00:01", 61),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("1-00:00:30", 1441),
    ],
)
def test_times_are_read_as_slurm_does(time: str, minutes: int) -> None:
    assert parse_minutes(time) == minutes


def test_a_job_goes_on_while_there_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, job = tmp_path / "run", tmp_path / "run" / "slurm" / "job"
    job.mkdir(parents=True)
    JobRecord(job, run, "train", attempts=3, command="").write()

    def end(code: int, checkpoint: int | None, outcome: dict | None = None) -> int:
        (job / "outcome.json").unlink(missing_ok=True)
        if outcome is not None:
            (job / "outcome.json").write_text(json.dumps(outcome))
        if checkpoint is not None:
            (run / "checkpoints" / f"{checkpoint:011d}").mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / "latest").write_text(f"{checkpoint:011d}\n")
        return requeue.main([str(job), str(code)])

    again = 75
    assert [end(137, None), end(137, None)] == [again, again]
    crash = {"state": "crashed", "reason": "RuntimeError: of its own"}
    for checkpoint in (10, 20, 30):  # whatever happens, it gets further
        assert end(1, checkpoint, crash) == again
    assert end(0, 30, {"state": "interrupted", "reason": ""}) == again
    (job / "0_log.err").write_text("")
    (job / "7_1_log.err").write_text("torch.OutOfMemoryError: 3 GiB\n")
    (run / "status.json").write_text('{"state": "running", "images": 30}')
    assert end(137, 30) == 1
    status = json.loads((run / "status.json").read_text())
    assert status["images"] == 30
    assert status["state"] == "failed"
    assert status["error"] == (
        "ended 3 times in a row without progress (checkpoint 00000000030), last: srun ended with "
        "137 (signal 9): torch.OutOfMemoryError: 3 GiB"
    )
    assert end(2, 40, {"state": "refused", "reason": "a wrong key"}) == 2
    assert end(0, 50, {"state": "finished", "reason": ""}) == 0
    (job / "stop").touch()
    assert end(0, 60, {"state": "interrupted", "reason": ""}) == 1


@pytest.mark.e2e
def test_local_runs_the_same_job_from_a_snapshot(digits: Path, tmp_path: Path) -> None:
    """Two ranks, then the likelihood of what they trained."""
    run = tmp_path / "run"
    arguments = [
        *("--local", "--gpus-per-node=0", "--tasks-per-node=2", "--then=evaluate_bpd"),
        *TINY,
        f"run={run}",
        f"data.path={digits / 'mds'}",
        "train.images=320",
    ]
    shown = launch(*arguments)
    assert "nats a dimension" in shown
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    (code,) = run.glob("slurm/*-train/code")
    assert (code / "tarflow_dist" / "train.py").read_text() == (
        ROOT / "tarflow_dist" / "train.py"
    ).read_text()
    told = launch(*arguments, "model.num_blocks=3", code=2)
    assert "was started with model.num_blocks 2" in told
