"""`TarFlow`: the flow with its files, and sampling from labels to uint8 images."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, from_saved, write_sealed, write_tensors, write_whole
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.flow.denoise import Denoising
from tarflow_dist.flow.guidance import Guidance, Guide, Rule
from tarflow_dist.flow.jacobi import Solver
from tarflow_dist.flow.model import Flow, Labels
from tarflow_dist.models import hub
from tarflow_dist.models.classes import NAMELESS, Classes
from tarflow_dist.models.folder import (
    CONFIG_FILE,
    VERSION,
    WEIGHTS_FILE,
    read_config,
    read_weights,
)
from tarflow_dist.models.redraw import Draws, draw_until_finite
from tarflow_dist.models.sampling_policy import Policy, dtype_name, fingerprint_of, read_policy
from tarflow_dist.telemetry.progress import Progress


class TarFlow(Flow):
    """A TARFlow that loads, saves and samples. See `Flow` for its arguments and its mathematics.

    `provenance` says where the weights come from, and `classes` what the classes are called; both
    are kept in config.json. `policy` is what `python -m tarflow_dist.calibrate` found, and
    `redrawn` counts the samples that had to be drawn again.
    """

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.provenance: dict[str, Any] = {}
        self.classes = NAMELESS
        self.policy: Policy | None = None
        self.redrawn = 0

    @property
    def class_names(self) -> list[str]:
        """What to call class 0, 1, …; empty where it isn't known, or there are no classes."""
        return self.classes.shown

    @classmethod
    def from_pretrained(cls, path: str | Path, *, calibrated: bool = True) -> "TarFlow":
        """Loads a folder of model.safetensors, config.json and, if there is one and `calibrated` is
        set, sampling.json, in the type it was saved in; or the same from the Hugging Face hub,
        where it is USER/MODEL or USER/MODEL@REVISION. A folder that exists comes first.

        Raises:
            UserError: a file is missing, damaged, or not of this model, or can't be fetched.
        """
        path = hub.find(path).folder
        saved = read_config(path / CONFIG_FILE)
        try:
            config = from_saved(FlowConfig, saved["model"])
            classes = from_saved(Classes, saved.get("classes", {}))
            if classes.names and len(classes.names) != config.num_classes:
                raise ValueError(f"it names {len(classes.names)} of {config.num_classes} classes")
        except ValueError as error:
            raise UserError(f"{path / CONFIG_FILE} describes no TARFlow: {error}") from error
        weights = read_weights(path / WEIGHTS_FILE, saved.get("weights"))
        flow = cls.with_weights(config, weights, source=path / WEIGHTS_FILE)
        flow.provenance = saved.get("provenance", {})
        flow.classes = classes
        flow.policy = Policy(fingerprint_of(weights))
        if calibrated:
            flow.policy = read_policy(
                path, fingerprint=flow.policy.fingerprint, num_blocks=len(flow.blocks)
            )
        return flow.eval()

    @classmethod
    def with_weights(
        cls, config: FlowConfig, weights: dict[str, Tensor], *, source: Path
    ) -> "TarFlow":
        """The model of `config` that has the tensors of `weights` as its own, their type and device
        included.

        Raises:
            UserError: they are not exactly this model's, or of several types or whole numbers;
                `source` is named.
        """
        with torch.device("meta"):
            flow = cls(**config.to_json())
        expected = {name: tuple(tensor.shape) for name, tensor in flow.state_dict().items()}
        there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for name in expected | there:
            if expected.get(name) != there.get(name):
                raise UserError(
                    f"{source} is of another model: its {name} is {there.get(name, 'missing')}, "
                    f"and {expected.get(name, 'missing')} in the model of its config"
                )
        types = {weights[name].dtype for name, _ in flow.named_parameters()}
        if len(types) > 1 or not all(dtype.is_floating_point for dtype in types):
            named = ", ".join(sorted(map(dtype_name, types)))
            raise UserError(f"{source} should hold weights of one floating type, and not {named}")
        flow.load_state_dict(weights, assign=True)
        return flow

    def save_pretrained(self, path: str | Path) -> None:
        """Writes model.safetensors and config.json into the folder `path`, each whole or not at
        all."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # the weights appear last: where they are, the model is whole
        with write_whole(path / WEIGHTS_FILE) as weights_part:
            write_tensors(weights_part, weights, metadata={"format": "pt"})
            content = {
                "model": self.config.to_json(),
                "classes": asdict(self.classes),
                "provenance": self.provenance,
                "weights": describe(weights_part),
            }
            write_sealed(path / CONFIG_FILE, content, version=VERSION)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Uploads this model to the Hugging Face hub as `repo`, USER/NAME, and returns its address.
        `options` and errors are those of `tarflow_dist.push.push`."""
        from tarflow_dist.push import push

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repo, **options)

    def solvers_for(self, batch: int, guidance: Guidance) -> list[Solver]:
        """How `decode` inverts the blocks for `batch` samples: as calibrated for this device, type
        and guidance, or else one patch at a time, exactly."""
        dtype = next(self.parameters()).dtype
        found = self.policy and self.policy.find(self.device, dtype, batch, guidance)
        return list(found.solvers) if found else super().solvers_for(batch, guidance)

    def sampler(self, batch: int, guidance: Guidance) -> str:
        """The same in words, which also tell two policies apart."""
        solvers = self.solvers_for(batch, guidance)
        if all(solver.window == 1 for solver in solvers):
            return "sequential"
        shown = ("1" if s.window == 1 else f"{s.window} (to {s.tolerance:g})" for s in solvers)
        return f"windows of {', '.join(shown)} patches"

    def sample(
        self,
        y: Labels | None = None,
        *,
        guidance: float = 0.0,
        annealed: bool = False,
        guide: Guide = "both",
        attn_temp: float = 1.0,
        rule: Rule = "linear",
        guide_blocks: Sequence[int] | None = None,
        denoise: bool = True,
        denoise_steps: int | None = None,
        denoise_clip: bool = False,
        denoise_stochastic: bool = False,
        denoise_order: int = 1,
        seed: int = 0,
        index: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draws one batch of images.

        A sample that is not finite or runs away is drawn again, with noise of (seed, index,
        attempt) in a batch of the same shape; `redrawn` counts them.

        Args:
            y: B class ids, −1 for no label; None for an unconditional model.
            guidance, annealed, guide, attn_temp, rule, guide_blocks: see `Guidance`.
            denoise: remove the training noise, as `denoise` does of its own; models trained with
                uniform noise have none to remove.
            denoise_steps, denoise_clip, denoise_stochastic, denoise_order: see `Denoising`.
            seed: of the noise.
            index: (B,) int64 sample indexes; sample i is the same image in every batch.
                0…B−1 unless given.
            progress: show the blocks done.

        Returns:
            uint8 (B, H, W, C).

        Raises:
            ValueError: labels or guidance that this model can't have, or samples that ran away each
                time.
        """
        if isinstance(y, int):
            raise ValueError(f"labels are a list, one a sample: give [{y}] for class {y}")
        if index is None:
            index = torch.arange(1 if y is None else len(y))
        how = Denoising(denoise_steps, denoise_clip, denoise_stochastic, denoise_order)
        (drawn,) = self.draw(
            y,
            [how if denoise else None],
            seed=seed,
            index=index,
            progress=progress,
            guidance=guidance,
            annealed=annealed,
            guide=guide,
            attn_temp=attn_temp,
            rule=rule,
            guide_blocks=guide_blocks,
        )
        self.redrawn += int(drawn.again.sum())
        return drawn.images

    def draw(
        self,
        y: Labels | None,
        ways: Sequence[Denoising | None],
        *,
        seed: int,
        index: Tensor,
        progress: bool = False,
        **guidance: Any,
    ) -> list[Draws]:
        """`sample` in several `ways` of denoising, None being none, all from one decoding.
        `guidance` are the arguments of `Guidance`."""
        labels = self.labels(y, len(index))
        index = index.cpu()

        @cache
        def decode(*attempts: int) -> Tensor:
            z = self.noise_of(index, seed=seed, attempt=torch.tensor(attempts, dtype=torch.int64))
            with Progress("sampling", len(self.blocks), unit="block", enabled=progress) as shown:
                return self.decode(z, labels, on_block=lambda _: shown.update(1), **guidance)

        def finished(way: Denoising | None, *attempts: int) -> Tensor:
            x = decode(*attempts)
            if way is None or self.noise == "uniform":
                return x
            return self.denoised(x, labels, way, index=index, seed=seed)

        return [draw_until_finite(partial(finished, way), index, self.noise) for way in ways]

    def denoised(
        self,
        x: Tensor,
        y: Tensor | None,
        denoising: Denoising,
        *,
        index: Tensor,
        seed: int,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """`denoise` for the samples `index`: noise that is added on the way is a function of
        (seed, index, step)."""

        def normal(step: int) -> Tensor:
            return rng.normal(
                self.image_shape,
                seed=seed,
                purpose="denoising noise",
                index=index.to(self.device),
                epoch=step,
            ).to(self.dtype)

        return self.denoise(
            x,
            y,
            steps=denoising.steps,
            clip=denoising.clip,
            order=denoising.order,
            normal=normal if denoising.stochastic else None,
            on_step=on_step,
        )

    def noise_of(self, index: Tensor, *, seed: int, attempt: Tensor | int = 0) -> Tensor:
        """The standard normal latents (B, N, D) of the samples `index` (B,) at `attempt` (B,)."""
        noise = rng.normal(
            (self.num_patches, self.patch_dim),
            seed=seed,
            purpose="sample noise",
            index=index.to(self.device),
            epoch=torch.as_tensor(attempt, device=self.device),
        )
        return noise.to(self.dtype)
