"""What a run must remember besides its tensors."""

from dataclasses import dataclass


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
        data: the fingerprint of the images that it is trained on; empty if it isn't known.
        groups: into which the order of images deals the set; 1 before there were any.
        val_loss: the held-out loss at just this point, if it was measured here and is finite.
        rows_hash: of the rows of metrics up to here; empty if it isn't known.
    """

    images: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    mean_loss: float | None = None
    wandb_id: str = ""
    data: str = ""
    groups: int = 1
    rows_hash: str = ""
    val_loss: float | None = None

    def passed(self, every: int | None, batch_size: int) -> bool:
        """Whether the last step, of `batch_size` images, reached a multiple of `every`."""
        if every is None:
            return False
        return self.images // every > (self.images - batch_size) // every
