"""The flow that a run would leave if it ended now."""

import torch

from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.training.engine import Engine


def averaged_flow(engine: Engine, dtype: torch.dtype) -> TarFlow:
    """A copy of the flow with the averaged weights, whole on every rank. Collective."""
    with torch.device("meta"):
        flow = TarFlow(**engine.flow.config.to_json())
    average = {name: tensor.to(dtype) for name, tensor in engine.average()}
    flow.load_state_dict(average, assign=True)
    return flow.requires_grad_(False)
