"""A run that starts from a model (`init`)."""

import shutil
from pathlib import Path

import pytest
import ranks
import torch
from sklearn.datasets import load_digits

from tarflow_dist import TarFlow
from tarflow_dist import config_file as configs
from tarflow_dist.config import Config
from tarflow_dist.errors import UserError
from tarflow_dist.flow.model import Flow
from tarflow_dist.models.classes import Classes
from tarflow_dist.training.checkpoint import Checkpoint
from tarflow_dist.training.latest_checkpoint import newest
from tarflow_dist.training.warm_start import warm_start

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
SMALL = ["model.num_blocks=2", "model.layers_per_block=1", "model.width=32", "model.head_dim=16"]
SIZES = {"image_size": 8, "patch_size": 2, "in_channels": 1, "width": 32, "head_dim": 16}
SIZES |= {"num_blocks": 2, "layers_per_block": 1}


def save_model(folder: Path, names: list[str], **changes: object) -> TarFlow:
    """A model with something in all its weights."""
    torch.manual_seed(0)
    flow = TarFlow(**SIZES, **{"num_classes": len(names), "sigma": 0.1, **changes})
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow.classes = Classes(names)
    flow.save_pretrained(folder)
    return flow


def config_for(init: Path, num_classes: int, *more: str) -> Config:
    drop = "train.label_drop=0"
    overrides = [*SMALL, f"init={init}", f"model.num_classes={num_classes}", drop, *more]
    return configs.load(DIGITS, overrides)


def start(config: Config, classes: Classes) -> tuple[Flow, str]:
    """The flow of the run before its first step, and what the run says of it."""
    read, said = warm_start(config, classes)
    flow = Flow(**config.model.to_json())
    shapes = {name: tensor.shape for name, tensor in flow.state_dict().items()}

    def whole(kind: str, name: str) -> torch.Tensor:
        """Of two parts."""
        count = shapes[name].numel()
        key, middle = f"{kind}/{name}", count // 3
        parts = read(key, 0, middle), read(key, middle, count)
        return torch.cat(parts).view(shapes[name])

    weights = {name: whole("weights", name) for name in shapes if name != "var"}
    flow.load_state_dict(weights | {"var": whole("buffers", "var")})
    for name, values in weights.items():
        assert torch.equal(whole("ema", name), values)
        assert not whole("exp_avg", name).any()
    return flow, "; ".join(said)


@torch.no_grad()
def test_a_class_of_the_same_name_stays_what_it_was(tmp_path: Path) -> None:
    there = save_model(tmp_path, ["ant", "bee", "cow", "dog"])
    flow, said = start(config_for(tmp_path, 3), Classes(["dog", "eel", "bee"]))
    x = torch.randn(5, 1, 8, 8)
    for mine, theirs in ((0, 3), (2, 1)):
        now = flow.log_prob(x, torch.full((5,), mine))
        assert torch.equal(now, there.log_prob(x, torch.full((5,), theirs)))
    for now, before in zip(flow.blocks, there.blocks, strict=True):
        unlabelled = before.class_embed.mean(dim=0)
        assert 0.005 < (now.class_embed[1] - unlabelled).std() < 0.02 < unlabelled.std()
    assert said.endswith("so are 2 of its 3 classes, by their names; new: eel")


@torch.no_grad()
def test_a_run_without_classes_starts_at_the_pass_without_labels(tmp_path: Path) -> None:
    there = save_model(tmp_path, ["ant", "bee"])
    flow, _ = start(config_for(tmp_path, 0), Classes())
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(flow.log_prob(x), there.log_prob(x, [-1] * 5))


@pytest.mark.parametrize(
    ("theirs", "mine", "sentence"),
    [
        (["a", "b"], ["a", "b"], "so are all its classes, by their names"),
        (["a", "b"], ["c", "d", "e"], "all its classes are new"),
        ([], ["a", "b"], "doesn't say what its own are called"),
        (["a", "a"], ["a", "b"], "all its classes are new"),
    ],
)
def test_what_becomes_of_classes_is_said(
    theirs: list[str], mine: list[str], sentence: str, tmp_path: Path
) -> None:
    save_model(tmp_path, theirs, num_classes=2)
    _, said = start(config_for(tmp_path, len(mine)), Classes(mine))
    assert sentence in said


def test_another_model_is_refused_by_its_fields(tmp_path: Path) -> None:
    save_model(tmp_path, ["a"])
    other = config_for(tmp_path, 1, "model.width=64", "model.patch_size=4")
    with pytest.raises(UserError, match=r"has patch_size 2 and not 4, width 32 and not 64: give"):
        warm_start(other, Classes(["a"]))
    itarflow = config_for(tmp_path, 1, "model.sigma=null", "model.sigma_range=[0.01,0.3]")
    with pytest.raises(UserError, match=r"has sigma_range None and not \(0.01, 0.3\)"):
        warm_start(itarflow, Classes(["a"]))
    with pytest.raises(UserError, match=r"no folder .*none, nor is that a name at the hub"):
        warm_start(config_for(tmp_path / "none", 1), Classes(["a"]))
    per_block = config_for(tmp_path, 1, "model.layers_per_block=[1,1]", "model.sigma=0.2")
    _, said = warm_start(per_block, Classes(["a"]))
    assert said[-1] == "its sigma is 0.2, there it was 0.1"


def test_a_run_takes_it_before_its_first_step_alone(digits: Path, tmp_path: Path) -> None:
    """On two ranks that share the weights; going on, it no longer needs the model."""
    names = [str(number) for number in range(10)]
    model = dict(save_model(tmp_path / "model", names).named_parameters())
    where = [f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}", f"init={tmp_path / 'model'}"]
    train = [DIGITS, *SMALL, *where, "train.zero_stage=3", "train.precision=bf16"]
    train += ["optimizer.lr=1e-9", "optimizer.min_lr=0", "optimizer.warmup_images=0"]
    train += ["log.wandb=disabled", "log.every_images=64"]
    log = tmp_path / "log"
    said = ranks.run_command(log, "tarflow_dist.train", *train, "train.images=64", ranks=2)
    assert "so are all its classes, by their names" in said
    first = newest(tmp_path / "run" / "checkpoints")
    assert first is not None
    for kind in ("weights", "ema"):
        for name, tensor in Checkpoint(first).read_all(kind).items():
            torch.testing.assert_close(tensor, model[name].detach(), rtol=0, atol=1e-6)
    shutil.rmtree(tmp_path / "model")
    said = ranks.run_command(log, "tarflow_dist.train", *train, "train.images=128")
    assert "going on at 64 images" in said
    assert "its weights are those of" not in said


def test_tuning_reaches_a_fresh_starts_loss_in_a_third_of_the_images(tmp_path: Path) -> None:
    """On digits 5 to 9, from a model of digits 0 to 4."""
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)

    def fit(flow: Flow, here: torch.Tensor, steps: int) -> float:
        """The held-out loss after `steps` steps on the digits that are `here`, a fifth held out."""
        x, y = images[here], labels[here] % 5
        held_out = torch.arange(len(x)) % 5 == 0
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(flow.parameters(), 3e-3)
        for _ in range(steps):
            pick = torch.randint(int((~held_out).sum()), (32,), generator=generator)
            noise = 0.1 * torch.randn(32, 1, 8, 8, generator=generator)
            loss = flow.loss(*flow(x[~held_out][pick] + noise, y[~held_out][pick]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            generator.manual_seed(1)
            noise = 0.1 * torch.randn(x[held_out].shape, generator=generator)
            return float(flow.loss(*flow(x[held_out] + noise, y[held_out])))

    torch.manual_seed(0)
    low = TarFlow(**SIZES, num_classes=5, sigma=0.1)
    fit(low, labels < 5, steps=120)
    low.classes = Classes(["0", "1", "2", "3", "4"])
    low.save_pretrained(tmp_path)
    tuned, _ = start(config_for(tmp_path, 5), Classes(["5", "6", "7", "8", "9"]))
    torch.manual_seed(1)
    fresh = Flow(**SIZES, num_classes=5, sigma=0.1)
    after_fresh, after_tuning = fit(fresh, labels >= 5, 60), fit(tuned, labels >= 5, 20)
    assert after_tuning < after_fresh
