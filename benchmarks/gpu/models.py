"""What the sections have in common: the device, models of the recipes' sizes, a clock."""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tarflow_dist import TarFlow
from tarflow_dist import config_file as configs
from tarflow_dist.config import Config

ROOT = Path(__file__).parents[2]
GIB = 2**30
RECIPES = ("in64", "in128", "in256")
TINY = {"image_size": 16, "patch_size": 4, "width": 64, "num_classes": 10, "sigma": 0.1}
MICRO_BATCH = {"in64": 32, "in128": 24, "in256": 12}  # as on the GPUs of the published runs


@dataclass(frozen=True)
class Bench:
    """How it is measured.

    Attributes:
        device: cuda or cpu.
        tiny: models and numbers for a laptop.
        published: checkout of apple/ml-tarflow to compare with.
    """

    device: str
    tiny: bool
    published: Path | None

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def median(self, work: Callable[[], Any]) -> float:
        """Seconds, of up to 3 runs, as many as begin in 2 seconds."""
        took = [self.seconds(work)]
        while len(took) < 3 and sum(took) < 2:
            took.append(self.seconds(work))
        return median(took)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives back the memory of what went before, and begins to watch its peak anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return round(torch.cuda.max_memory_allocated() / GIB, 3) if self.cuda else 0.0

    def flow(
        self, recipe: str, *, blocks: int, dtype: torch.dtype = torch.bfloat16, **sizes: Any
    ) -> TarFlow:
        """A flow of the recipe's size but for `sizes`, `blocks` flow blocks deep, whose random
        weights keep samples near 1."""
        model = configs.load(ROOT / f"configs/{recipe}.yaml").model.to_json() | sizes
        sizes = {**model, **TINY, "layers_per_block": 2} if self.tiny else model
        layers = sizes["layers_per_block"]
        depth = layers if isinstance(layers, int) else layers[0]
        torch.manual_seed(0)
        with torch.device(self.device):
            flow = TarFlow(**sizes | {"num_blocks": blocks, "layers_per_block": depth})
            for name, parameter in flow.named_parameters():
                if name.endswith("proj_out.weight"):
                    torch.nn.init.normal_(parameter, std=0.2 * flow.config.width**-0.5)
        return flow.to(dtype).requires_grad_(False).eval()

    def config(self, recipe: str, *overrides: str, blocks: int = 2) -> Config:
        """The recipe's training, `blocks` flow blocks deep, on one device."""
        name = "digits" if self.tiny else recipe
        more = [f"model.num_blocks={blocks}", f"run={tempfile.gettempdir()}/benchmarks-gpu"]
        more += ["log.wandb=disabled", "preview.every_images=null"]
        if not self.tiny:
            more.append(f"train.batch_size={MICRO_BATCH[recipe]}")
        return configs.load(ROOT / f"configs/{name}.yaml", [*more, *overrides])


class Problem(str):
    """What went wrong, in words."""


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or a `Problem`: one failure leaves a section's rest."""
    try:
        return work()
    except Exception as error:
        return Problem(f"{type(error).__name__}: {str(error)[:300]}")


def problems(found: Any) -> list[str]:
    """All that went wrong in what a section found, False being something that should hold."""
    if isinstance(found, dict):
        return [
            f"{key}: {problem}".removesuffix(": ")
            for key, value in found.items()
            for problem in problems(value)
        ]
    if isinstance(found, Problem):
        return [str(found)]
    return ["does not hold"] if found is False else []


def see_only(device: str) -> None:
    """Raises `RuntimeError` if there is no card, where one is asked for."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here: --device cpu --tiny shows that all of it runs")


def device_name(device: str) -> str:
    if device == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
