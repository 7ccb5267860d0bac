"""The whole road on the built-in digits: shard, train, convert, sample, measure (`make demo`).

Every step is a command that a user would type, and is shown. Steps that are done already are left
out, so a demo that was interrupted goes on; remove demo/ to start over.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tarflow_dist import config_file as configs
from tarflow_dist.errors import run_command
from tarflow_dist.files import read_json
from tarflow_dist.options import command_parser

RECIPE = "digits"
FOLDER = Path("demo")
SHARDS, RUN, MODEL = FOLDER / "shards", FOLDER / "run", FOLDER / "model"
SAMPLES = FOLDER / "samples"
GUIDED, UNGUIDED = (SAMPLES / f"guidance-{weight}-denoise-1" for weight in (1, 0))
NUM_SAMPLES = 2000
GUIDED_IS_FARTHER = """
The guided samples' distance is the larger one: guidance makes the samples of a class more alike and
exaggerates what tells the classes apart, so that more are recognised; the distance asks for the
spread of the data within and between classes. A smaller weight than 1 lies between the two."""


def main(argv: list[str]) -> None:
    parser = command_parser("demo", __doc__)
    parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    began = time.monotonic()
    ranks, precision = _machine()
    step("data_prep", ["digits", SHARDS], done=SHARDS / "wds" / "summary.json")
    step(
        "tarflow_dist.train",
        [RECIPE, f"run={RUN}", f"data.path={SHARDS / 'mds'}", f"train.precision={precision}"],
        ranks=ranks,
    )
    step("tarflow_dist.convert", [RUN, MODEL], done=MODEL / "model.safetensors")
    step("tarflow_dist.evaluate_bpd", ["--model", MODEL, "--data", SHARDS / "mds", "--draws", 5])
    step(
        "tarflow_dist.sample_fid",
        [
            *("--model", MODEL, "--reference", SHARDS / "mds", "--features", "pixels"),
            *("--num-samples", NUM_SAMPLES, "--guidance", "1,0", "--out", SAMPLES),
            *("--write", "npz"),
        ],
        ranks=ranks,
        done=SAMPLES / "report.html",  # the last that it writes
    )
    report(time.monotonic() - began)


def step(
    module: str, arguments: Sequence[object], *, ranks: int = 1, done: Path | None = None
) -> None:
    """Shows and runs `python -m module arguments`, under torchrun on several ranks, unless its
    result `done` is there. Leaves with the command's exit code if it fails, and ends it when it is
    interrupted."""
    command = ["-m", module, *map(str, arguments)]
    shown = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    print(f"\n$ {shlex.join([*shown, *command])}", flush=True)
    if done is not None and done.exists():
        print(f"({done} is there already)")
        return
    launcher = ["-m", "torch.distributed.run", *shown[1:]] if ranks > 1 else []
    # one thread a rank: more would spin against each other
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *launcher, *command], env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # torchrun passes it on, and training saves first
        process.wait()
        raise
    if code:
        sys.exit(code)


def report(seconds: float) -> None:
    """Measures the samples and prints a short table."""
    guided, unguided = (read_json(out / "result.json") for out in (GUIDED, UNGUIDED))
    rows = [
        ("unguided samples of the class asked for", _class_agreement(UNGUIDED)),
        ("guided samples of the class asked for", _class_agreement(GUIDED)),
        ("Fréchet distance in pixels, unguided", f"{unguided['frechet_distance']:.3f}"),
        ("Fréchet distance in pixels, guided", f"{guided['frechet_distance']:.3f}"),
        ("loss curve", str(RUN / "loss.png")),
        ("sample grid, a row a class", str(GUIDED / "grid.png")),
        ("time", f"{seconds:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if guided["frechet_distance"] > unguided["frechet_distance"]:
        print(GUIDED_IS_FARTHER)


def _machine() -> tuple[int, str]:
    """Ranks and precision: one rank a GPU in bf16, as many as divide the batch, or two on the CPU
    in fp32."""
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return 2, "fp32"
    batch_size = configs.load(Path(RECIPE)).train.batch_size
    return max(ranks for ranks in range(1, gpus + 1) if batch_size % ranks == 0), "bf16"


def _class_agreement(samples: Path) -> str:
    """The share of the samples that a classifier of the real digits (an SVC, which has 99 % on
    held-out ones) gives the class they were asked for."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits, drawn = load_digits(), np.load(samples / "samples.npz")
    pixels = drawn["arr_0"][..., 0].reshape(NUM_SAMPLES, -1) * (16 / 255)
    found = SVC(gamma=0.001).fit(digits.data, digits.target).predict(pixels)
    share = float((found == drawn["arr_1"]).mean())
    return f"{share:.1%} of {NUM_SAMPLES}"


if __name__ == "__main__":
    run_command(main)
