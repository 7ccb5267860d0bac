"""The card of a model at the hub: what it is, how to use it, how good its samples are."""

from pathlib import Path
from typing import Any

from tarflow_dist.files import from_saved
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.flow.flops import FlowCost
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.models.classes import Classes, some

TASK = "unconditional-image-generation"
"""The hub's name of it; it has none for images of classes."""
WEIGHTS = {"ema": "moving average", "raw": "as trained"}


def model_card(
    repo: str, saved: dict[str, Any], result: dict[str, Any] | None, *, license: str | None
) -> str:
    """README.md, its metadata in YAML first.

    Args:
        repo: the model's name at the hub.
        saved: its config.json.
        result: the result.json of its samples, whose grid.png stands beside the card.
    """
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
        template_path=str(Path(__file__).with_suffix(".md.jinja")),
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
