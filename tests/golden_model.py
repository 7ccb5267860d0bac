"""The published model's golden vectors (tests/golden/README.md) and our model with its weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tarflow_dist.flow.model import Flow

GOLDEN = Path(__file__).parent / "golden"
CASES = ["cond", "uncond", "volume_preserving"]


def settings(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def golden_flow(case: str, dtype: torch.dtype) -> Flow:
    s = settings(case)
    flow = Flow(
        image_size=s["img_size"],
        patch_size=s["patch_size"],
        in_channels=s["in_channels"],
        width=s["channels"],
        num_blocks=s.get("num_blocks", 3),
        layers_per_block=s["layers_per_block"],
        num_classes=s["num_classes"],
        volume_preserving=not s.get("nvp", True),
        sigma=s.get("sigma"),
        sigma_range=(s["sigma_min"], s["sigma_max"]) if "sigma_min" in s else None,
    ).double()
    weights = load_file(GOLDEN / f"{case}.weights.safetensors")
    flow.load_state_dict(
        {
            k.replace(".head_blocks.", ".attn_blocks."): v
            for k, v in weights.items()
            if not k.endswith("attn_mask")
        }
    )
    return flow.to(dtype)


def golden_vectors(case: str) -> dict[str, torch.Tensor]:
    vectors = load_file(GOLDEN / f"{case}.vectors.safetensors")
    if not settings(case)["num_classes"]:
        vectors = {k: v for k, v in vectors.items() if k not in ("y", "y_drop")}
    return vectors
