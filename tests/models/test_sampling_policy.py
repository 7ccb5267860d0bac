"""sampling.json: what is measured is used, just there, and damage is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from tarflow_dist import TarFlow, calibrate, sample
from tarflow_dist.errors import UserError
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import SEQUENTIAL, Solver
from tarflow_dist.models.sampling_policy import Calibration, Policy, fingerprint_of, read_policy
from tarflow_dist.telemetry.pictures import NAME_WIDTH

GUIDED = Guidance(1.0, annealed=True)


def a_flow(**changes: object) -> TarFlow:
    torch.manual_seed(0)
    sizes = {
        "image_size": 8, "patch_size": 2, "width": 16, "head_dim": 8, "num_blocks": 2,
        "layers_per_block": 1, "num_classes": 3, "sigma": 0.1,
    }  # fmt: skip
    flow = TarFlow(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


CPU = f"cpu ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def calibration(batch: int, *windows: int, **changes: object) -> Calibration:
    solvers = tuple(Solver(w, 1e-3 if w > 1 else 0.0) for w in windows)
    settings = {"device": CPU, "dtype": "float32", "guidance": GUIDED, **changes}
    return Calibration(batch=batch, solvers=solvers, **settings)


def saved(folder: Path, *calibrations: Calibration) -> TarFlow:
    flow = a_flow()
    flow.save_pretrained(folder)
    Policy(fingerprint_of(flow.state_dict()), calibrations).write(folder)
    return TarFlow.from_pretrained(folder)


def test_a_policy_is_read_as_it_was_written(tmp_path: Path) -> None:
    guidance = Guidance(2.0, rule="gaussian", blocks=(0, 1))
    one = calibration(4, 8, 1, guidance=guidance, measured={"seconds": 0.5})
    flow = saved(tmp_path, one, calibration(16, 1, 1))
    assert flow.policy == Policy(fingerprint_of(flow.state_dict()), (one, calibration(16, 1, 1)))


def test_it_is_used_where_it_was_measured_and_nowhere_else(tmp_path: Path) -> None:
    flow = saved(tmp_path, calibration(4, 8, 1), calibration(1, 4, 16))
    sequential, threads = [SEQUENTIAL] * 2, torch.get_num_threads()

    def windows(batch: int, guidance: Guidance = GUIDED) -> list[int]:
        return [solver.window for solver in flow.solvers_for(batch, guidance)]

    assert windows(1) == [4, 16]
    assert windows(2) == windows(4) == [8, 1]
    assert flow.solvers_for(5, GUIDED) == sequential
    assert flow.solvers_for(1, Guidance(1.0)) == sequential
    assert flow.sampler(4, GUIDED) == "windows of 8 (to 0.001), 1 patches"
    assert flow.sampler(5, GUIDED) == "sequential"
    torch.set_num_threads(threads + 1)
    try:
        assert flow.solvers_for(1, GUIDED) == sequential
    finally:
        torch.set_num_threads(threads)
    assert flow.double().solvers_for(1, GUIDED) == sequential


def test_decode_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = saved(tmp_path, calibration(2, 8, 8))
    widths, mu_alpha = [], FlowBlock.mu_alpha

    def spy(block: FlowBlock, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        widths.append(out.shape[1])
        return mu_alpha(block, out)

    monkeypatch.setattr(FlowBlock, "mu_alpha", spy)
    z = torch.randn(2, flow.num_patches, flow.patch_dim)
    y = torch.tensor([0, 1])
    x = flow.decode(z, y, **GUIDED.arguments())
    assert max(widths) == 8
    widths.clear()
    exact = flow.decode(z, y, **GUIDED.arguments(), solvers=[SEQUENTIAL] * 2)
    assert max(widths) == 1
    assert (x - exact).abs().max() < 1e-2


def test_a_new_measurement_takes_the_place_of_the_old() -> None:
    policy = Policy("f", (calibration(1, 4, 4), calibration(4, 8, 8)))
    assert policy.with_calibration(calibration(1, 1, 1)) == Policy(
        "f", (calibration(4, 8, 8), calibration(1, 1, 1))
    )


@pytest.mark.parametrize(
    "damage",
    ["cut", "not json", "a list", "no entry", "bad window", "other blocks", "nan", "extra"],
)
def test_damage_is_told_in_a_sentence(damage: str, tmp_path: Path) -> None:
    saved(tmp_path, calibration(1, 4, 4))
    file = tmp_path / "sampling.json"
    tree = json.loads(file.read_text())
    solver = tree["calibrations"][0]["solvers"][0]
    if damage == "bad window":
        solver["window"] = "many"
    elif damage == "extra":
        solver["clamp"] = 3
    elif damage == "nan":
        solver["tolerance"] = float("nan")
    elif damage == "other blocks":
        del tree["calibrations"][0]["solvers"][0]
    elif damage == "no entry":
        del tree["calibrations"][0]["guidance"]
    text = json.dumps(tree)
    texts = {"cut": text[:-9], "not json": "sampling", "a list": "[1, 2]"}
    file.write_text(texts.get(damage, text))
    with pytest.raises(UserError, match=r"sampling\.json is no sampling policy") as caught:
        TarFlow.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert f"tarflow_dist.calibrate {tmp_path}" in str(caught.value)


def test_the_policy_of_other_weights_is_refused(tmp_path: Path) -> None:
    flow = saved(tmp_path, calibration(1, 4, 4))
    with torch.no_grad():
        flow.blocks[1].proj_out.weight += 1e-3
    flow.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="made for other weights: remove it"):
        TarFlow.from_pretrained(tmp_path)
    (tmp_path / "sampling.json").unlink()
    assert read_policy(tmp_path, fingerprint="f", num_blocks=2) == Policy("f")


@pytest.mark.e2e
def test_what_calibrate_finds_is_what_sample_uses(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out.png"
    a_flow().save_pretrained(model)
    (model / "sampling.json").write_text("of no use any more")
    guided = ("--guidance", 1, "--annealed")
    done = run("tarflow_dist.calibrate", model, "--batch-sizes", 1, 2, *guided)
    assert "of the uint8 values are equal" in done.stdout
    assert "starting anew" in done.stderr
    flow = TarFlow.from_pretrained(model)
    assert flow.policy is not None
    assert [found.batch for found in flow.policy.calibrations] == [1, 2]
    for found in flow.policy.calibrations:
        assert found.guidance == GUIDED
        assert found.measured["share_equal"] >= 0.999
        assert found.measured["largest_difference"] <= 1
        assert found.measured["seconds"] <= found.measured["sequential_seconds"]

    done = run("tarflow_dist.sample", model, "--labels", "2", *guided, "--out", out)
    assert f"sampler: {flow.sampler(1, GUIDED)}" in done.stdout
    (drawn,) = cells(out, 1, left=NAME_WIDTH)
    assert torch.equal(drawn, flow.sample([2], **GUIDED.arguments())[0])


def test_samples_that_are_not_finite_are_no_measure(tmp_path: Path) -> None:
    flow = a_flow()
    flow.blocks[0].proj_out.weight.data[0] = torch.nan
    flow.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not all finite"):
        calibrate.main([str(tmp_path), "--device", "cpu"])
    assert not (tmp_path / "sampling.json").exists()


def test_memory_that_is_too_small_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    a_flow().save_pretrained(tmp_path)
    monkeypatch.setattr(TarFlow, "decode", decode)
    with pytest.raises(UserError, match="device's memory: ask for fewer images"):
        sample.main([str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "out.png")])
    with pytest.raises(UserError, match="device's memory: lower --images"):
        calibrate.main([str(tmp_path), "--device", "cpu"])


def test_given_images_are_read_as_data_prep_reads_them(tmp_path: Path) -> None:
    """Sixteen bits scaled to eight, transparency on white."""
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    images = sample.read_images(a_flow(), [tmp_path / "deep.png", tmp_path / "clear.png"])
    expected = torch.from_numpy(deep / 65535 * 2 - 1).float()
    assert (images[0] - expected).abs().max() <= 1 / 255
    assert (images[1] == 1).all()


def test_traces_and_ways_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    flow = a_flow()
    flow.save_pretrained(tmp_path)
    sample.main([str(tmp_path), "--labels", "0,1", "--trace", "--out", str(out)])
    steps = cells(out, 8, left=NAME_WIDTH)  # two rows of noise, two blocks, denoised
    images = flow.sample([0, 1])
    assert torch.equal(torch.stack([steps[3], steps[7]]), images)

    given = []
    for name in ("a.png", "b.png"):
        Image.effect_noise((20, 16), 90).save(tmp_path / name)
        given.append(str(tmp_path / name))
    sample.main([str(tmp_path), "--reconstruct", *given, "--out", str(out)])
    assert float(capsys.readouterr().out.splitlines()[-2].split()[-1]) < 1e-4
    rows = cells(out, 6)
    assert torch.equal(rows[0], rows[2])
    sample.main([str(tmp_path), "--interpolate", *given, "--steps", "5", "--out", str(out)])
    between = cells(out, 5)
    assert torch.equal(between[0], rows[0])
    assert torch.equal(between[4], rows[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "7"], "--labels 7: class ids go from 0 to 2, or -1 for none"),
        (["--guidance", "-1"], "0 or more"),
        (["--guidance", "1", "--guide-blocks", "5"], "0 to 1"),
        (["--reconstruct", "none.png"], "no image that can be read"),
        (["--reconstruct", "none.png", "--labels", "0,1"], "2 labels were given for 1 images"),
        (["--out", "out.jpg"], r"should end in \.png"),
        (["--out", "nowhere/out.png"], "there is no folder"),
        (["--count", "0"], "--count must be 1 or more"),
        (["--device", "abacus"], "--device abacus"),
        (["--denoise-steps", "3"], "and this model has one noise level: leave them out"),
        (["--denoise-order", "2", "--no-denoise"], "and nothing is: leave them out"),
        (["--denoise-steps", "0"], "steps is 0, but must be 1 or more"),
    ],
)
def test_what_sample_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    a_flow().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        sample.main([str(tmp_path), *arguments])
    assert "\n" not in str(caught.value)


def cells(file: Path, count: int, left: int = 0, top: int = 0) -> torch.Tensor:
    """The first `count` images, row by row, of a grid of 8 x 8 images: uint8 (count, 8, 8, 3).
    Names take `left` pixels beside them, or `top` above."""
    sheet = torch.from_numpy(np.array(Image.open(file)))[top:, left:]
    side = 8 * 8 + 4
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    found = [
        sheet[r * side : r * side + 64 : 8, c * side : c * side + 64 : 8]
        for r in range(rows)
        for c in range(columns)
    ]
    assert len(found) == count
    return torch.stack(found)


def test_windows_are_judged_within_the_noise_of_the_models_type() -> None:
    """In bf16 the sequential way itself is off by more than the float32 rule would allow: by that
    rule no windows would be faithful, by the noise of the type they are. (A CPU's own bf16
    arithmetic moves these numbers by 0.006 and 2, so the goal is that much wider here.)"""
    flow = a_flow(image_size=16, width=64, head_dim=64, layers_per_block=2).bfloat16()
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.05)
    bf16 = calibrate.Calibrator(flow, GUIDED, images=8, seed=0)
    share, largest = bf16.closeness
    assert share < 0.999
    assert largest > 1

    def judged(closeness: tuple[float, float]) -> list[int]:
        bf16.closeness = closeness
        solvers, _ = bf16.faithful([Solver(8, 1.0)] * 2)
        return [solver.window for solver in solvers]

    assert judged((share - 0.02, largest + 4)) == [8, 8]
    assert judged((1.0, 0.0)) == [1, 1]
    fp32 = calibrate.Calibrator(flow.float(), GUIDED, images=8, seed=0)
    assert fp32.closeness == (1.0, 0.0)
    assert (fp32.exact.int() - bf16.exact.int()).abs().max() <= 1


@pytest.mark.parametrize(("option", "dtype"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_the_type_that_is_computed_in(
    option: str | None, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_flow().save_pretrained(tmp_path)
    more = [] if option is None else ["--dtype", option]
    command = [str(tmp_path), "--device", "cpu", "--batch-sizes", "1", "--images", "2", *more]
    calibrate.main(command)
    (found,) = json.loads((tmp_path / "sampling.json").read_text())["calibrations"]
    assert found["dtype"] == dtype
    sample.main([str(tmp_path), "--labels", "1", "--out", str(tmp_path / "a.png"), *more])
