"""A grid of samples from the averaged weights, as the run goes."""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.pictures import picture_grid
from tarflow_dist.training.averaged import averaged_flow
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.objective import Objective

FOLDER = "previews"


def draw_preview(engine: Engine, objective: Objective, config: Config, images: int) -> Path | str:
    """Draws `config.preview` at `images` seen, each rank a share of the samples. Collective.

    Returns:
        The PNG, or why the samples can't be shown: a young model's may not be finite, and there may
        not be the memory beside training, or the room on the disk.
    """
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    flow = averaged_flow(engine, dtype)
    count = config.preview.count
    index = torch.arange(count)
    mine = slice(distributed.rank(), None, distributed.world_size())
    own: NDArray[np.uint8] | str
    try:
        own = objective.draw(flow, index[mine], count)
    except (ValueError, torch.OutOfMemoryError) as error:
        own = str(error)
    drawn = distributed.gather(own)
    if problems := [share for share in drawn if isinstance(share, str)]:
        return problems[0]
    samples = np.empty((count, *drawn[0].shape[1:]), np.uint8)  # type: ignore[union-attr]
    for rank, share in enumerate(drawn):
        samples[rank :: distributed.world_size()] = share
    file = config.run / FOLDER / f"{images:011d}.png"
    if distributed.is_main():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(file) as part:
                columns = math.ceil(math.sqrt(count))
                rows = [samples[i : i + columns] for i in range(0, count, columns)]
                picture_grid(rows).save(part, "PNG")
        except OSError as error:
            return f"{file} can't be written ({error.strerror})"
    return file
