"""report.html: a result for people, in one file that needs nothing else."""

import base64
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from tarflow_dist.evaluation.grid import LARGEST, class_name, class_rows
from tarflow_dist.evaluation.image_sets import Samples
from tarflow_dist.evaluation.metrics import FIGURES, METRICS
from tarflow_dist.evaluation.neighbours import NeighboursOf
from tarflow_dist.evaluation.result import denoising, figures, samples
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.pictures import strip

CLASSES, SAMPLES_A_CLASS = 20, 10

SHOWN_ELSEWHERE = {
    *FIGURES,
    *("not_measured", "warnings", "command", "samples_sha256", "seconds", "environment"),
}


def write_report(
    file: Path,
    results: list[dict[str, Any]],
    best: int,
    *,
    drawn: Samples,
    class_names: list[str] | None,
    neighbours: list[NeighboursOf],
    sweep_plot: Path | None,
) -> None:
    """Writes the report of one result or of a sweep's.

    Args:
        results: as in result.json.
        best: the place of the one that is shown in full.
        drawn: its samples.
        neighbours: of some of its samples; empty if the reference has no images.
        sweep_plot: a PNG.
    """
    environment = Environment(
        loader=PackageLoader("tarflow_dist.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = data_url
    shown = results[best]
    page = environment.get_template("report.html.jinja").render(
        results=results,
        best=shown,
        source=shown.get("model") or shown["samples"],
        figures=figures,
        denoising=denoising,
        samples=samples,
        meanings={metric.title_on(shown["features"]): metric.meaning for metric in METRICS},
        dependencies={k: v for k, v in shown.items() if k not in SHOWN_ELSEWHERE}
        | shown["environment"],
        rows=list(_rows(drawn, class_names)),
        neighbours=neighbours,
        strip=partial(strip, largest=LARGEST),
        sweep_plot=sweep_plot and Image.open(sweep_plot),
    )
    with write_whole(file) as part:
        part.write_text(page, encoding="utf-8")


def _rows(drawn: Samples, class_names: list[str] | None) -> Iterator[tuple[str, Image.Image]]:
    """A name and a strip of samples for each class that is shown."""
    for label, indexes in class_rows(drawn.labels(), CLASSES, SAMPLES_A_CLASS):
        name = "" if label is None else class_name(label, class_names)
        yield name, strip(drawn.images(indexes), LARGEST)


def data_url(picture: Image.Image) -> Markup:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
