"""`TarFlow`: the flow with its files, and sampling from labels to uint8 images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.errors import UserError
from tarflow_dist.files import write_whole
from tarflow_dist.flow.guidance import Guide
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.noise import to_pixels

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class TarFlow(Flow):
    """A TARFlow that loads, saves and samples. See `Flow` for its arguments and its mathematics.

    `provenance` says where the weights come from; it is kept in config.json.
    """

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.provenance: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "TarFlow":
        """Loads a folder of model.safetensors and config.json, in the type it was saved in.

        Raises:
            UserError: a file is missing, damaged, or the weights are of another model size.
        """
        path = Path(path)
        saved = _read_config(path / CONFIG_FILE)
        with torch.device("meta"):
            try:
                flow = cls(**saved["model"])
            except (TypeError, ValueError) as error:
                raise UserError(f"{path / CONFIG_FILE} describes no TARFlow: {error}") from error
        flow.provenance = saved.get("provenance", {})
        flow.load_weights(_read_weights(path / WEIGHTS_FILE), source=path / WEIGHTS_FILE)
        return flow.eval()

    def load_weights(self, weights: dict[str, Tensor], *, source: Path) -> None:
        """Takes the tensors of `weights` as this model's own, their type and device included.

        Raises:
            UserError: they are not exactly this model's; `source` is named.
        """
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        for name, shape in expected.items():
            if name not in weights:
                raise UserError(f"{source} is of another model: it lacks {name}")
            if weights[name].shape != shape:
                raise UserError(
                    f"{source} is of another model size: {name} is {tuple(weights[name].shape)}, "
                    f"its config says {tuple(shape)}"
                )
        if extra := sorted(weights.keys() - expected.keys()):
            raise UserError(f"{source} is of another model: it has {extra[0]} and this one has not")
        self.load_state_dict(weights, assign=True)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes model.safetensors and config.json into the folder `path`, each whole or not at
        all."""
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        config = {"model": self.config, "provenance": self.provenance}
        with write_whole(path / CONFIG_FILE) as part:
            part.write_text(json.dumps(config, indent=2) + "\n")
        # last: where there are weights, the model is whole
        with write_whole(path / WEIGHTS_FILE) as part:
            save_file(weights, part, metadata={"format": "pt"})

    def sample(
        self,
        y: Tensor | Sequence[int] | None = None,
        *,
        guidance: float = 0.0,
        annealed: bool = False,
        guide: Guide = "both",
        attn_temp: float = 1.0,
        denoise: bool = True,
        seed: int = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """Draws one batch of images.

        Args:
            y: B class ids, −1 for no label; None for an unconditional model.
            guidance, annealed, guide, attn_temp: see `Guidance`.
            denoise: take the score step, which removes the training noise; models trained with
                uniform noise have none to remove.
            seed: of the noise.
            index: (B,) int64 sample indexes; sample i is the same image in every batch.
                0…B−1 unless given.

        Returns:
            uint8 (B, H, W, C).

        Raises:
            ValueError: labels or guidance that this model can't have, or samples that are not
                finite.
        """
        if y is not None:
            y = torch.as_tensor(y, dtype=torch.int64, device=self.device)
        if index is None:
            index = torch.arange(1 if y is None else len(y))
        index = index.cpu()
        noise = rng.normal(
            (self.num_patches, self.patch_dim),
            seed=seed,
            purpose="sample noise",
            index=index.to(self.device),
        )
        x = self.decode(
            noise.to(self.dtype),
            y,
            guidance=guidance,
            annealed=annealed,
            guide=guide,
            attn_temp=attn_temp,
        )
        if denoise and self.sigma is not None:
            x = self.denoise(x, y)
        finite = x.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            lost = index[~finite.cpu()].tolist()
            shown = f"{lost[:5]} and {len(lost) - 5} more" if len(lost) > 5 else lost
            raise ValueError(f"samples {shown} are not finite: lower the guidance, or train longer")
        return to_pixels(x, self.noise).permute(0, 2, 3, 1)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(
            f"{file.parent} holds no model ({CONFIG_FILE} is missing): make one with "
            "python -m tarflow_dist.convert"
        )
    try:
        saved = json.loads(file.read_text())
        if isinstance(saved, dict) and isinstance(saved.get("model"), dict):
            return saved
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from error
    raise UserError(f"{file} is not a TARFlow's: it has no entry 'model'")


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from error
