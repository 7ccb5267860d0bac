import subprocess
import sys
from pathlib import Path

import pytest

from tarflow_dist import config_file as configs
from tarflow_dist import recipe
from tarflow_dist.config import Config
from tarflow_dist.errors import UserError

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_load(path: Path) -> None:
    assert configs.load(path).model.patch_size > 0


def test_a_recipe_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # shards, say
    assert configs.load(Path("digits")) == configs.load(Path("digits.yaml")) == configs.load(DIGITS)
    with pytest.raises(UserError, match=r"there is no config x/digits: .* one of the recipes afhq"):
        configs.load(Path("x/digits"))
    recipe.main(["digits", "mine.yaml"])
    assert Path("mine.yaml").read_bytes() == DIGITS.read_bytes()
    with pytest.raises(UserError, match=r"mine.yaml is there already"):
        recipe.main(["digits", "mine.yaml"])
    with pytest.raises(UserError, match="there is no recipe digit: there are afhq256, digits"):
        recipe.main(["digit"])
    Path("in64.yaml").write_text(DIGITS.read_text())  # one's own comes first
    assert configs.load(Path("in64.yaml")).model.image_size == 8


def test_overrides_are_yaml_values() -> None:
    config = configs.load(
        DIGITS, ["optimizer.lr=1e-3", "model.layers_per_block=[1, 2, 3, 4]", "data.flip=true"]
    )
    assert config.optimizer.lr == 1e-3
    assert config.model.layers_per_block == [1, 2, 3, 4]
    assert config.data.flip is True


def test_what_is_dumped_loads_again(tmp_path: Path) -> None:
    config = configs.load(DIGITS, ["optimizer.clip_grad_norm=null"])
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    assert configs.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.widht=32", "unknown key model.widht; did you mean model.width?"),
        ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer?"),
        ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
        ("train.batch_size=abc", "train.batch_size is 'abc'"),
        ("model.layers_per_block=[1,a,2,2]", "model.layers_per_block is"),
        ("train.precision=fp16", "train.precision is 'fp16'"),
        ("model.image_size=9", "image_size 9 is not a multiple of patch_size 2"),
        ("model.width=100", "width 100 is not a multiple of head_dim 64"),
        ("model.layers_per_block=[1,2]", "has 2 entries, but num_blocks is 4"),
        ("model.noise=uniform", "sigma is 0.1, but noise is uniform"),
        ("train.loss_weight=sigma", "give model.sigma_range instead of model.sigma"),
        ("train.noise_levels=lognormal", "train.noise_levels is for an iTARFlow"),
        ("model.sigma=null", "noise is gaussian, which needs a sigma"),
        ("model.num_classes=0", "train.label_drop is above 0, but model.num_classes is 0"),
        ("checkpoint.keep_best=true", "must be a multiple of eval.every_images"),
        ("preview.annealed=true", "preview: annealed, guide, attn_temp"),
        ("preview.attn_temp=0.5", "preview: annealed, guide, attn_temp"),
        ("optimizer.min_lr=1", "min_lr 1.0 is above lr"),
        ("optimizer.warmup_images=1_000_000", "is longer than train.images"),
        ("log.wandb=off", "log.wandb is False"),
        ("train.images=-3", "train.images is -3"),
        ("train.bf16=true", "did you mean train."),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas is"),
        ("optimizer.lr=.inf", "optimizer.lr is inf"),
        ("seed=99999999999999999999", "seed is 99999999999999999999"),
        ("model.patch_size=8", "image_size 8 is a single patch"),
        ("train.reduce_precision=bf16", "precision fp32 promises gradients in fp32"),
        ("seed", "should look like key=value"),
        ("seed.a=1", "seed is {'a': 1}"),
        ("model.width.a=1", "model.width has no keys below it"),
        ("model.width=[", "is not YAML"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        configs.load(DIGITS, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preview_that_the_model_cannot_have() -> None:
    unconditional = ["model.num_classes=0", "train.label_drop=0", "preview.guidance=1"]
    with pytest.raises(UserError, match="preview: guidance needs class labels"):
        configs.load(DIGITS, unconditional)
    configs.load(DIGITS, [*unconditional, "preview.attn_temp=0.5"])


def test_a_misspelt_section_is_told_before_the_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(DIGITS.read_text().replace("model:", "modle:"))
    with pytest.raises(UserError, match="unknown key modle; did you mean model"):
        configs.load(path)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\x00"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml is not"):
        configs.load(path)


def test_batches_that_can_be_cut() -> None:
    whole = configs.load(DIGITS, ["train.batch_size=128"])
    assert whole.micro_batch(2) == 64
    assert configs.load(DIGITS, ["train.micro_batch_size=16"]).micro_batch(2) == 16
    with pytest.raises(UserError, match=r"batch_size 128 is not divisible by world size \(3\)"):
        whole.micro_batch(3)
    with pytest.raises(UserError, match=r"batch_size 64 is not divisible by .* \(2 x 48\)"):
        configs.load(DIGITS, ["train.micro_batch_size=48"]).micro_batch(2)


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tarflow_dist.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_tells_mistakes_with_exit_code_2() -> None:
    done = train(str(DIGITS), "model.widht=3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {DIGITS}: unknown key model.widht; did you mean model.width?"
    ]


def test_help_shows_every_field() -> None:
    text = train("--help").stdout
    for key, _, description in configs.fields(Config):
        assert f"\n  {key} (" in text
        assert description
        assert description in text


def test_config_mistakes_and_help_load_no_torch() -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tarflow_dist import config_file as config, train\n"
        "config.load(Path(sys.argv[1]))\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(DIGITS)]).returncode == 0
