"""What a run must remember besides its tensors."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass
class RunState:
    """Progress of a run. Schedules, the data's position and all random numbers follow from it.

    Attributes:
        images: images trained on so far, and with it the position in the order of images.
        optimizer_steps: steps that Adam has taken.
        skipped: steps left out so far, because they were not finite or their loss jumped.
        skipped_in_a_row: of these, the ones since the last step that was taken.
        mean_loss: recent average of the loss, where spikes are watched for; None before the first.
        wandb_id: the run's id at Weights & Biases; empty before it has one.
    """

    images: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    mean_loss: float | None = None
    wandb_id: str = ""

    def passed(self, every: int | None, batch_size: int) -> bool:
        """Whether the last step, of `batch_size` images, reached a multiple of `every`."""
        if every is None:
            return False
        return self.images // every > (self.images - batch_size) // every

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        return cls(**{field.name: saved[field.name] for field in fields(cls)})
