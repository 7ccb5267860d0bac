"""calibrate and sample_fid on a GPU, as far as a pretended one tells: no mixed devices, few waits,
and the results of a CPU."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pretended_job import pretended_job

from tarflow_dist import TarFlow, calibrate, sample_fid

BATCH, CHUNKS, BLOCKS, REFERENCE = 20, 2, 2, 1500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "width": 32, "head_dim": 16}
    flow = TarFlow(**sizes, num_blocks=BLOCKS, layers_per_block=1, num_classes=10, sigma=0.1)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    folder = tmp_path_factory.mktemp("model")
    flow.save_pretrained(folder)
    return folder


def test_calibrate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "WINDOWS", (4, 8))
    monkeypatch.setattr(calibrate, "WORTHWHILE", 1e9)  # whatever the clock says
    with pretended_job() as card:
        calibrate.main([str(model), "--guidance", "1", "--batch-sizes", "2", "--images", "2"])
    assert card.graphs
    (found,) = json.loads((model / "sampling.json").read_text())["calibrations"]
    assert found["device"] == "NVIDIA H100 80GB HBM3"
    assert found["dtype"] == "bfloat16"
    assert {solver["window"] for solver in found["solvers"]} <= {4, 8}
    (model / "sampling.json").unlink()


def sample(model: Path, reference: Path, out: Path) -> tuple[dict, list[dict]]:
    words = ["--model", model, "--reference", reference, "--features", "pixels", "--guidance", 1]
    words += ["--num-samples", BATCH * CHUNKS, "--batch-size", BATCH, "--dtype", "float32"]
    sample_fid.main([*map(str, words), "--out", str(out)])
    files = sorted(out.glob("samples-*.parquet"))
    samples = pa.concat_tables(pq.read_table(f, columns=["index", "label"]) for f in files)
    return json.loads((out / "result.json").read_text()), samples.sort_by("index").to_pylist()


def test_sample_fid(model: Path, digits: Path, tmp_path: Path) -> None:
    with pretended_job() as card:
        on_card, samples = sample(model, digits / "mds", tmp_path / "card")
    waits = dict(card.waits)
    on_cpu, expected = sample(model, digits / "mds", tmp_path / "cpu")
    assert on_card["device"] == "NVIDIA H100 80GB HBM3"
    assert on_card["frechet_distance"] == pytest.approx(on_cpu["frechet_distance"], rel=1e-3)
    assert [row["label"] for row in samples] == [row["label"] for row in expected]

    def waited(*files: str) -> int:
        return sum(times for line, times in waits.items() if line.split()[-1].startswith(files))

    # a chunk: the start and end of each block, latents and labels there and images back, looks
    # whether they are finite
    assert waited("flow/", "pretrained", "evaluation/draw") <= CHUNKS * (6 * BLOCKS + 8), waits
    # a batch of images: there, and its features back
    batches = CHUNKS + -(-REFERENCE // BATCH)
    assert waited("evaluation/measure") <= 2 * batches + 2, waits
