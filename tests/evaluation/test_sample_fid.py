"""The command: what it refuses before it draws, and whole runs on one and two ranks."""

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from commands import run
from PIL import Image

from tarflow_dist import sample_fid
from tarflow_dist.data.shards import open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation import features, report, result
from tarflow_dist.evaluation.draw import sample_labels
from tarflow_dist.evaluation.feature_set import FeatureSet, Gaussian
from tarflow_dist.evaluation.features import Features, PixelFeatures
from tarflow_dist.evaluation.image_sets import check_image_shape
from tarflow_dist.evaluation.metrics import FIGURES
from tarflow_dist.evaluation.reference_set import open_reference
from tarflow_dist.evaluation.sample_store import open_samples
from tarflow_dist.files import lock_folder, sha256
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.sample_fid import check_arguments, main, parse_arguments, sweep_settings

COMMAND = "tarflow_dist.sample_fid"


def save_model(
    folder: Path,
    num_classes: int,
    sigma_range: tuple[float, float] | None = None,
    spread: float = 0.1,
) -> TarFlow:
    """A model of the digits' size with random weights, by a `spread` of 0.1 so far from the
    identity that labels differ and one in thirty samples runs away."""
    torch.manual_seed(0)
    flow = TarFlow(
        image_size=8,
        patch_size=2,
        in_channels=1,
        width=16,
        head_dim=8,
        num_blocks=2,
        layers_per_block=1,
        num_classes=num_classes,
        sigma=None if sigma_range else 0.1,
        sigma_range=sigma_range,
    )
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=spread)
    flow.save_pretrained(folder)
    return flow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, num_classes=10)
    return folder


def arguments(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--reference", str(model), "--num-samples", "10", *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-samples", "1"], "--num-samples must be at least 2"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--reference", "nowhere"], "--reference nowhere is not there"),
        (["--wandb", "nowhere"], "--wandb nowhere is not the folder of a training run"),
        (["--features", "inception"], "need their weights on disk"),
        (["--inception-weights", "nowhere.pth"], r"nowhere\.pth is not a file"),
        (["--features", "pixels", "--inception-weights", "a.pth"], "pixels takes no --inception"),
    ],
)
def test_bad_arguments(model: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_arguments(parse_arguments(arguments(model, *more)))


def test_a_folder_of_something_else_takes_no_samples(model: Path) -> None:
    with pytest.raises(UserError, match="is the folder of a model: choose another"):
        check_arguments(parse_arguments(arguments(model, "--out", str(model))))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--guidance", "1,x"], "can't read '1,x'"),
        (["--guidance", "1,1.0"], "'1,1.0' names one twice"),
        (["--denoise", "2"], "can't read '2'"),
        (["--write", "gif"], "can't read 'gif'"),
    ],
)
def test_lists_that_make_no_sense(
    model: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments(model, *more))
    assert caught.value.code == 2
    assert f"error: argument {more[0]}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_classes", "more", "message"),
    [
        (0, ["--guidance", "1"], "guidance needs class labels"),
        (10, ["--attn-temp", "0.9"], "give a guidance above 0"),
        (10, ["--guidance", "-1"], "must be a number, 0 or more"),
        (10, ["--guidance", "1", "--guide-blocks", "0,2"], "the model's blocks, 0 to 1"),
        (10, ["--guide-blocks", "0"], "and guide_blocks say how to guide: give a guidance above 0"),
        (10, ["--guidance", "1,1.0000001"], "two weights that are alike"),
        (0, ["--labels", "balanced"], "leave --labels out"),
        (10, ["--labels", "3,x"], "--labels 3,x: 'x' is no class id, and the model does not know"),
        (10, ["--labels", ""], "'' is no class id"),
        (10, ["--labels", "3,10"], "--labels 3,10: class ids go from 0 to 9"),
    ],
)
def test_options_the_model_cannot_have(
    tmp_path: Path, num_classes: int, more: list[str], message: str
) -> None:
    flow = save_model(tmp_path, num_classes)
    with pytest.raises(UserError, match=message):
        sweep_settings(parse_arguments(arguments(tmp_path, *more)), flow, "")


def test_settings_follow_the_model(model: Path) -> None:
    flow = TarFlow.from_pretrained(model)
    points = sweep_settings(parse_arguments(arguments(model, "--denoise", "0")), flow, "abc")
    assert list(points) == [""]
    settings = points[""].to_json()
    assert settings["weights_sha256"] == "abc"
    assert (settings["labels"], settings["denoise"]) == ("random", False)
    assert settings["sampler"] == "sequential"
    assert json.loads(json.dumps(settings)) == settings


def test_the_mix_of_the_reference(model: Path) -> None:
    flow = TarFlow.from_pretrained(model)
    args = parse_arguments(arguments(model, "--labels", "reference"))
    (settings,) = sweep_settings(args, flow, "", (3, *[1] * 9)).values()
    assert settings.to_json()["class_counts"] == [3, *[1] * 9]
    with pytest.raises(UserError, match="doesn't say how many images each class has"):
        sweep_settings(args, flow, "")
    assert result.another_mix("random", (9, 131)) == [
        "labels are drawn evenly, and the reference's classes have 9 to 131 images: --labels "
        "reference draws its mix"
    ]
    assert result.another_mix("random", (70, 131)) == []
    assert result.another_mix("reference", (9, 131)) == []


def test_the_policy_in_force_is_a_setting(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = TarFlow.from_pretrained(model)
    monkeypatch.setattr(TarFlow, "sampler", lambda _, batch, rule: f"{batch} at {rule.weight}")
    points = sweep_settings(parse_arguments(arguments(model, "--guidance", "0,2")), flow, "")
    assert [point.sampler for point in points.values()] == ["100 at 0.0", "100 at 2.0"]


def test_points_of_a_sweep(model: Path) -> None:
    flow = TarFlow.from_pretrained(model)
    guided = ("--attn-temp", "0.9", "--rule", "gaussian", "--guide-blocks", "1,0")
    args = parse_arguments(arguments(model, "--guidance", "0,1.5", "--denoise", "0,1", *guided))
    points = sweep_settings(args, flow, "")
    assert list(points) == [f"guidance-{w}-denoise-{d}" for w in ("0", "1.5") for d in (0, 1)]
    saved = [point.to_json() for point in points.values()]
    shown = [(p["guidance"], p["denoise"], p["attn_temp"]) for p in saved]
    assert shown == [(0.0, False, 1.0), (0.0, True, 1.0), (1.5, False, 0.9), (1.5, True, 0.9)]
    shown = [(p["rule"], p["guide_blocks"]) for p in saved]
    assert shown == [("linear", None)] * 2 + [("gaussian", [0, 1])] * 2


def test_points_of_a_sweep_over_denoising_steps(tmp_path: Path) -> None:
    flow = save_model(tmp_path, 10, sigma_range=(0.02, 0.2))
    more = ("--denoise", "0,1", "--denoise-steps", "3,7", "--denoise-order", "2")
    points = sweep_settings(parse_arguments(arguments(tmp_path, *more)), flow, "")
    assert list(points) == [
        "guidance-0-denoise-0",
        "guidance-0-denoise-1-steps-3",
        "guidance-0-denoise-1-steps-7",
    ]
    none, three, seven = (point.to_json() for point in points.values())
    assert not [name for name in none if name.startswith("denoise_")]
    assert (three["denoise_steps"], seven["denoise_steps"]) == (3, 7)
    assert {three["denoise_order"], seven["denoise_order"]} == {2}
    (alone,) = sweep_settings(parse_arguments(arguments(tmp_path)), flow, "").values()
    assert alone.to_json()["denoise_steps"] == 20
    args = parse_arguments(arguments(tmp_path, "--denoise", "0", "--denoise-clip"))
    with pytest.raises(UserError, match="and nothing is: leave them out"):
        sweep_settings(args, flow, "")


@pytest.mark.parametrize("num_classes", [7, 12])
def test_a_model_of_other_classes_is_refused_before_any_work(
    num_classes: int, digits: Path, tmp_path: Path
) -> None:
    flow = save_model(tmp_path / "model", num_classes)
    extractor = PixelFeatures(flow.image_shape)
    told = f"holds 10 classes, and the model has {num_classes}"
    about = {"count": 297, "class_names": list("0123456789")}
    moments = Gaussian(np.zeros(extractor.dim), np.eye(extractor.dim))
    FeatureSet(moments, about=about).save(tmp_path / "a.npz")
    for reference in (digits / "mds", tmp_path / "a.npz"):
        with pytest.raises(UserError, match=told):
            open_reference(
                str(reference),
                "val",
                image_shape=flow.image_shape,
                num_classes=num_classes,
                extractors=[extractor],
            )
    with pytest.raises(UserError, match=told):
        open_shards(digits / "mds", "val").check_classes(num_classes)


def draw_without_pictures(command: list[str]) -> None:
    def fail(*args: object) -> None:
        raise OSError("no pictures today")

    report.write_grid = fail
    with pytest.raises(OSError, match="no pictures today"):
        main(command)


def test_figures_are_there_even_if_the_pictures_fail(
    model: Path, digits: Path, tmp_path: Path
) -> None:
    command = ["--model", str(model), "--reference", str(digits / "mds"), "--split", "val"]
    command += ["--features", "pixels", "--num-samples", "10", "--out", str(tmp_path)]
    ranks.run(draw_without_pictures, command)
    assert json.loads((tmp_path / "result.json").read_text())["frechet_distance"] > 0


class RowMeans:
    """Instead of Inception, whose weights are not here."""

    name, weights_sha256 = "row means", None
    dim, spatial_dim = 8, 0

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images.double().mean(dim=(1, 2)))


def run_with_row_means(command: list[str]) -> None:
    make = features.make_extractor
    features.make_extractor = lambda name, *options: (
        RowMeans() if name == "inception" else make(name, *options)
    )
    sample_fid.check_features = lambda *_: None
    main(command)


def test_several_features_of_one_draw(model: Path, digits: Path, tmp_path: Path) -> None:
    """Each as if it had been alone, over one set of samples."""
    reference = ["--reference", str(digits / "mds"), "--split", "val"]
    draw = ["--model", str(model), *reference, "--num-samples", "40"]
    folders = {names: tmp_path / names for names in ("pixels,inception", "pixels", "inception")}
    for names, out in folders.items():
        ranks.run(run_with_row_means, [*draw, "--features", names, "--out", str(out)])
    both, *alone = map(outcome, folders.values())
    assert both["chunks_drawn"] == 1
    assert len({result["samples_sha256"] for result in (both, *alone)}) == 1
    (more,) = both["more_features"]
    assert (both["features"], more["features"]) == ("pixels", "row means")
    for found, expected in zip((both, more), alone, strict=True):
        assert [found[name] for name in FIGURES] == [expected[name] for name in FIGURES]
    assert "on row means" in (folders["pixels,inception"] / "report.html").read_text()


def test_reference_of_another_shape() -> None:
    with pytest.raises(UserError, match="are 3×32×32 and the model's are 1×8×8"):
        check_image_shape(Path("shards"), (3, 32, 32), (1, 8, 8))


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(COMMAND, *arguments(tmp_path / "nowhere"), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: there is no folder {tmp_path / 'nowhere'}, nor ")
    assert done.stderr.count("\n") == 1


def options(model: Path, digits: Path, out: Path, *more: object) -> list[object]:
    return [
        *("--model", model, "--reference", digits / "mds", "--features", "pixels", "--out", out),
        *("--num-samples", 50, "--batch-size", 16, "--guidance", 1, "--annealed", *more),
    ]


def times_lost(model: Path, count: int) -> int:
    """How many of the samples that `options` ask for run away in their first attempt, written
    out."""
    flow, index = TarFlow.from_pretrained(model).requires_grad_(False), torch.arange(count)
    y = sample_labels("random", index, num_classes=10, seed=0)
    x = flow.denoise(flow.decode(flow.noise_of(index, seed=0), y, guidance=1, annealed=True), y)
    return int((~(x.abs() < 100)).flatten(1).any(dim=1).sum())


def outcome(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


@pytest.mark.e2e
def test_two_jobs_do_not_share_a_folder(model: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with lock_folder(out):
        done = run(COMMAND, *options(model, digits, out), check=False)
        assert list(out.iterdir()) == [out / ".lock"]
    assert done.returncode == 2
    assert f"error: another run is writing to {out}: wait for it" in done.stderr
    run(COMMAND, *options(model, digits, out))
    assert not (out / ".lock").exists()


@pytest.mark.e2e
def test_the_point_of_a_sweep_that_runs_away_is_named(
    model: Path, digits: Path, tmp_path: Path
) -> None:
    done = run(COMMAND, *options(model, digits, tmp_path, "--guidance", "0,1e9"), check=False)
    assert done.returncode == 2
    assert f"error: {tmp_path}/guidance-1e+09-denoise-1: samples [" in done.stderr
    assert len(list((tmp_path / "guidance-0-denoise-1").glob("samples-*"))) == 4


@pytest.mark.e2e
def test_any_number_of_ranks_and_a_resumed_run_agree(
    model: Path, digits: Path, tmp_path: Path
) -> None:
    two, four, log = tmp_path / "two", tmp_path / "four", tmp_path / "log"
    run(COMMAND, *options(model, digits, two, "--write", "npz"), ranks=2)
    result = outcome(two)
    ranks.run_command(log, COMMAND, *options(model, digits, four), ranks=4)
    result_four = outcome(four)
    assert result_four["samples_sha256"] == result["samples_sha256"]
    assert (result["world_size"], result_four["world_size"]) == (2, 4)
    assert result["redrawn_samples"] == result_four["redrawn_samples"] == times_lost(model, 50) > 0
    for name in ("frechet_distance", "frechet_distance_error", "precision", "kernel_distance"):
        assert result_four[name] == pytest.approx(result[name], rel=1e-6)
    images_there = json.loads((digits / "mds" / "summary.json").read_text())["images"]["train"]
    assert result_four["reference_images"] == images_there
    assert result["reference_sha256"] == sha256(digits / "mds" / "manifest.parquet")
    assert result["weights_sha256"] == sha256(model / "model.safetensors")

    with np.load(two / "samples.npz", allow_pickle=False) as npz:
        images, labels = npz["arr_0"], npz["arr_1"]
    assert images.shape == (50, 8, 8, 3)
    assert len(np.unique(labels)) > 5

    (four / "samples-000002.parquet").unlink()
    ranks.run_command(log, COMMAND, *options(model, digits, four))
    resumed = outcome(four)
    assert (resumed["chunks_drawn"], resumed["world_size"]) == (1, 1)
    assert resumed["redrawn_samples"] == result["redrawn_samples"]
    assert resumed["samples_sha256"] == result["samples_sha256"]
    assert resumed["frechet_distance"] == pytest.approx(result["frechet_distance"], rel=1e-9)


@pytest.mark.e2e
def test_killed_again_and_again_the_samples_are_the_same(digits: Path, tmp_path: Path) -> None:
    """The whole is in benchmarks/sample_kills.py. Kills −9 while chunks are being written, on
    changing numbers of ranks; an iTARFlow's denoising adds noise of its own."""
    model, whole, killed, log = (tmp_path / name for name in ("model", "whole", "killed", "log"))
    save_model(model, num_classes=10, sigma_range=(0.02, 0.2), spread=0.03)
    denoising = ("--denoise-steps", 3, "--denoise-stochastic")
    more = ("--num-samples", 1600, "--batch-size", 8, *denoising)
    ranks.run_command(log, COMMAND, *options(model, digits, whole, *more))
    found = []
    for count in (2, 1):
        processes = ranks.start_command(
            log, COMMAND, *options(model, digits, killed, *more), ranks=count
        )
        before = len(list(killed.glob("samples-*")))
        while processes[0].is_alive() and len(list(killed.glob("samples-*"))) < before + 8:
            time.sleep(0.01)
        time.sleep(random.Random(count).random() * 0.1)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        found.append(len(list(killed.glob("samples-*"))))
    assert 0 < found[0] < found[1] < 200
    ranks.run_command(log, COMMAND, *options(model, digits, killed, *more), ranks=2)
    result, unbroken = outcome(killed), outcome(whole)
    assert result["samples_sha256"] == unbroken["samples_sha256"]
    assert result["chunks_drawn"] == 200 - found[1]
    assert result["redrawn_samples"] == unbroken["redrawn_samples"]


@pytest.mark.e2e
def test_a_sweep_resumes_and_reuses_the_reference_file(
    model: Path, digits: Path, tmp_path: Path
) -> None:
    reference, out = tmp_path / "digits.npz", tmp_path / "out"
    log, pixels = tmp_path / "log", ("--features", "pixels")
    ranks.run_command(log, "tarflow_dist.reference", digits / "mds", reference, *pixels, ranks=2)
    sweep = ("--reference", reference, "--guidance", "0,2", "--denoise", "0,1")
    ranks.run_command(log, COMMAND, *options(model, digits, out, *sweep))
    first = outcome(out)
    (out / "guidance-2-denoise-1" / "samples-000000.parquet").unlink()
    (out / "guidance-0-denoise-1" / "features.npz").write_text("damaged")
    ranks.run_command(log, COMMAND, *options(model, digits, out, *sweep))
    again = outcome(out)
    assert len(again["points"]) == 4
    drawn = {name: point["chunks_drawn"] for name, point in again["points"].items()}
    assert drawn.pop("guidance-2-denoise-1") == 1
    assert set(drawn.values()) == {0}
    for name, point in again["points"].items():
        before = first["points"][name]
        assert point["samples_sha256"] == before["samples_sha256"]
        assert point["frechet_distance"] == pytest.approx(before["frechet_distance"], rel=1e-9)
        assert point["reference_sha256"] == sha256(reference)
    # the same noise and labels: at another weight the images are close to, but not, the same
    assert len({point["samples_sha256"] for point in again["points"].values()}) == 4
    best = min(again["points"], key=lambda name: again["points"][name]["frechet_distance"])
    assert again["best"] == best
    assert {"sweep.csv", "sweep.png", "report.html"} <= {file.name for file in out.iterdir()}


def test_what_another_program_drew_is_measured(model: Path, digits: Path, tmp_path: Path) -> None:
    """The same samples in every form have the same figures, and nothing is asked of them."""
    drawn, log = tmp_path / "drawn", tmp_path / "log"
    reference = ("--reference", digits / "mds", "--split", "val", "--features", "pixels")
    draw = ("--model", model, "--num-samples", 40, "--write", "npz,folder", "--out", drawn)
    ranks.run_command(log, COMMAND, *draw, *reference)
    expected = outcome(drawn)
    for form in (drawn, drawn / "samples.npz", drawn / "png"):
        out = tmp_path / f"of-{form.name}"
        # an .npz of ADM's has grey images in three channels
        where = ("--reference", drawn / "samples.npz") if form.suffix else reference[:4]
        ranks.run_command(log, COMMAND, "--samples", form, *where, *reference[4:], "--out", out)
        found = outcome(out)
        assert found["num_samples"] == 40
        assert found["samples"] == str(form)
        assert "guidance" not in found
        if form.suffix:
            assert found["frechet_distance"] == pytest.approx(0, abs=1e-6)
        else:
            for name in ("frechet_distance", "precision", "kernel_distance"):
                assert found[name] == pytest.approx(expected[name], rel=1e-9)
        assert "40 images of" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "3", "--labels", "1"], "leave out --labels, --seed, which are for those of a"),
        (["--write", "npz"], "leave out --write"),
        (["--model", "m"], "not allowed with argument"),
    ],
)
def test_nothing_is_asked_of_samples_that_are_there(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--samples", "there", "--reference", "shards", *more])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_pictures_that_are_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 0 pictures: two or more"):
        open_samples(tmp_path)
    for name, size in (("a.png", (4, 4)), ("b.png", (4, 4)), ("c.png", (5, 4))):
        Image.new("L", size).save(tmp_path / name)
    pictures = open_samples(tmp_path)
    assert pictures.image_shape == (1, 4, 4)
    assert pictures.images([0, 1]).shape == (2, 4, 4, 1)
    with pytest.raises(UserError, match=r"c.png is 5×4 and .*a.png is 4×4"):
        list(pictures.batches(2))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png is not an image that Pillow knows$"):
        open_samples(tmp_path)


def test_pictures_that_lie_on_their_side(tmp_path: Path) -> None:
    """As telephones write them: turned by what their EXIF says."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a.png", "b.png"):
        Image.new("L", (6, 4)).save(tmp_path / name, exif=turned)
    pictures = open_samples(tmp_path)
    assert pictures.image_shape == (1, 6, 4)
    assert pictures.images([0, 1]).shape == (2, 6, 4, 1)


def test_interrupted_says_what_stays(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tarflow_dist.sample_fid.run", interrupted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(model, "--features", "pixels", "--out", "there"))
    assert capsys.readouterr().err == (
        "interrupted: what is drawn stays in there, and the same command goes on from there\n"
    )
