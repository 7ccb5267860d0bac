"""Puts a model at the Hugging Face hub, with a card that says what it is.

    python -m tarflow_dist.push MODEL USER/NAME --license apache-2.0 --samples samples/MODEL

Log in first: hf auth login. config.json and result.json go as they are, with the paths in them.
"""

from pathlib import Path
from typing import Any

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.files import from_saved, read_json, sha256
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.flow.flops import FlowCost
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.models import hub
from tarflow_dist.models.classes import Classes, some
from tarflow_dist.models.folder import (
    CONFIG_FILE,
    POLICY_FILE,
    WEIGHTS_FILE,
    check_weights,
    read_config,
)
from tarflow_dist.options import command_parser

CARD, RESULT, GRID = "README.md", "result.json", "grid.png"
TASK = "unconditional-image-generation"
"""The hub's name of it; it has none for images of classes."""
WEIGHTS = {"ema": "moving average", "raw": "as trained"}


def main(argv: list[str]) -> None:
    parser = command_parser("push", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="MODEL", help="folder of model.safetensors and config.json")
    add("repo", metavar="USER/NAME", help="its name at the hub; made if there is none")
    add("--private", action="store_true", help="if it is made: for those alone whom you let in")
    add("--license", help="as the hub calls it, such as apache-2.0; the card says if there is none")
    add("--samples", type=Path, help="folder of sample_fid's result.json and grid.png, to be shown")
    add("--new-card", action="store_true", help="write the card anew, if one is there already")
    args = parser.parse_args(argv)
    print(f"{args.folder} is at {push(**vars(args))}")


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    samples: Path | None = None,
    new_card: bool = False,
) -> str:
    """Uploads the model in `folder` in one commit.

    Args:
        repo: USER/NAME, made at the hub unless it is there.
        private: whether it is made a private one.
        license: as the hub calls it; None states none.
        samples: `sample_fid`'s folder of samples of this model, whose figures and grid are shown.
        new_card: write the card anew where there is one; its text may be another's.

    Returns:
        The model's address.

    Raises:
        UserError: the model is damaged, the samples are another's, or the hub refuses.
    """
    if "@" in repo or not hub.is_name(repo):
        raise UserError(f"{repo} can't be a model's name at the hub, which looks like USER/NAME")
    saved = read_config(folder / CONFIG_FILE)
    check_weights(folder / WEIGHTS_FILE, saved.get("weights"))
    files = {n: folder / n for n in (CONFIG_FILE, POLICY_FILE) if (folder / n).exists()}
    result = None
    if samples is not None:
        result = _result(samples, folder)
        files |= {name: samples / name for name in (RESULT, GRID)}
    with hub.told(f"{repo} can't be written"):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(library_name="tarflow_dist")
        url = api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        operations.append(CommitOperationAdd(WEIGHTS_FILE, folder / WEIGHTS_FILE))
        if new_card or not api.file_exists(repo, CARD):
            card = _card(repo, saved, result, license=license)
            operations.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(repo, operations, commit_message="Model by tarflow_dist")
    return str(url)


def _result(samples: Path, folder: Path) -> dict[str, Any]:
    """What the samples' result.json says, if they are of the model in `folder`."""
    try:
        result = read_json(samples / RESULT)
    except (OSError, ValueError) as error:
        raise UserError(f"--samples {samples}: its {RESULT} can't be read: {error}") from error
    if "points" in result:
        raise UserError(f"--samples {samples} is a sweep: name a folder in it, {result['best']}")
    if result.get("weights_sha256") != sha256(folder / WEIGHTS_FILE):
        raise UserError(f"--samples {samples} are not of the model {folder}: its weights differ")
    return result


def _card(
    repo: str, saved: dict[str, Any], result: dict[str, Any] | None, *, license: str | None
) -> str:
    """What the model of the config.json `saved` is, how to use it, and how good its samples are, of
    whose `result` the grid stands beside the card; its metadata in YAML first."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from tarflow_dist.evaluation.result import described

    config = from_saved(FlowConfig, saved["model"])
    classes = from_saved(Classes, saved.get("classes", {}))
    provenance = saved.get("provenance", {})
    measured = None
    if result is not None:
        fid = result["features"].startswith("inception")
        measured = EvalResult(
            task_type=TASK,
            dataset_type="image-folder",
            dataset_name=result["reference"],
            metric_type="fid" if fid else "frechet_distance",
            metric_value=result["frechet_distance"],
        )
    data = ModelCardData(
        license=license,
        library_name="tarflow_dist",
        pipeline_tag=TASK,
        tags=["tarflow", "normalizing-flow", "arxiv:2412.06329"],
        model_name=repo.partition("/")[2],
        eval_results=measured,
    )
    call = ["[0]"] if config.num_classes else []
    if result:
        plain = Guidance().arguments().items()
        call += [f"{name}={result[name]!r}" for name, value in plain if result[name] != value]
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        repo=repo,
        config=config,
        kind="An iTARFlow" if config.sigma_range else "A TARFlow",
        grid=result is not None,
        call=", ".join(call),
        parameters=FlowCost(config).num_parameters,
        noise=_noise(config),
        images=provenance.get("images"),
        weights=WEIGHTS.get(provenance.get("weights", "")),
        names=some(classes.shown),
        figures=None if result is None else described(result),
        warnings=[] if result is None else result["warnings"],
        license=license,
    )
    return str(card)


def _noise(config: FlowConfig) -> str:
    if config.noise == "uniform":
        return "uniform, within the 8-bit bins"
    levels = config.sigma_range or (config.sigma,)
    return f"Gaussian, std {' to '.join(map(str, levels))} of images in [-1, 1]"


if __name__ == "__main__":
    run_command(main)
