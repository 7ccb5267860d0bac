"""What a job will be, before it is submitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.resources import Resources
from slurm.tasks import Task
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import card
from tarflow_dist.cost.estimate import checkpoint_bytes, does_not_fit, estimate
from tarflow_dist.flow.counts import Counts

ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Outlook:
    """`text` is the plan; `problem` a sentence on what seems not to fit, empty if nothing."""

    text: str
    problem: str


def describe(chain: Sequence[Task], resources: Resources) -> Outlook:
    """The plan of the tasks.

    Raises:
        UserError: the batch can't be cut over the ranks.
    """
    task = chain[0]
    rows = {"task": " then ".join(t.name for t in chain), "folder": str(task.folder)}
    one_rank = task.one_rank
    kind = "GPUs" if resources.gpus_per_node else "CPU ranks"
    if one_rank:
        rows["nodes"] = "1, 1 process with its own workers"
    else:
        rows["nodes"] = (
            f"{resources.nodes} x {resources.ranks_per_node} {kind}, {resources.world_size} ranks"
        )
    rows["cores"] = f"{resources.cpus or task.workers + 2} a rank"
    rows["time limit"] = f"{resources.time}, saved {resources.signal_delay} s before, then requeued"
    problem = ""
    if task.config is not None:
        more, problem = _training_rows(task.config, resources)
        rows |= more
    if not problem and task.shards and "://" not in task.shards and not Path(task.shards).is_dir():
        problem = f"there are no shards {task.shards} on this machine"
    return Outlook("\n".join(f"{name:<16}{text}" for name, text in rows.items()), problem)


def bytes_to_write(task: Task) -> int:
    """What must be free on disk: two checkpoints of a training."""
    if task.config is None:
        return 0
    return 2 * checkpoint_bytes(Counts(**task.config.model.model_dump()))


def _training_rows(config: Config, resources: Resources) -> tuple[dict[str, str], str]:
    world_size, batch = resources.world_size, config.train.batch_size
    micro = config.micro_batch(world_size)
    passes = batch // (world_size * micro)
    latest = config.run / "checkpoints" / "latest"
    start = int(latest.read_text()) if latest.exists() else 0
    steps = -(-config.train.images // batch)
    rows = {
        "batch": f"{batch} images: {batch // world_size} a rank, in {passes} passes of {micro}",
        "length": f"{config.train.images:,} images, {steps:,} steps",
        "starts": f"from its checkpoint at {start:,} images" if start else "new",
        "precision": f"{config.train.precision}, ZeRO {config.train.zero_stage}",
    }
    if resources.gpu is None:
        return rows | {"memory": "not estimated: name the GPU with --gpu h100"}, ""
    expected = estimate(config, card(resources.gpu), world_size, mfu=ASSUMED_MFU)
    recomputing = config.train.activation_checkpointing
    speed = expected.checkpointed if recomputing else expected.plain
    rows["memory"] = f"{expected.chosen.memory.peak / 2**30:.1f} GiB on each {resources.gpu}"
    rows["speed"] = (
        f"{3600 * speed.images_per_second:,.0f} images an hour, {speed.days:.2f} days, at an MFU "
        f"of {ASSUMED_MFU:g}"
    )
    return rows, "" if expected.chosen.fits else does_not_fit(expected, resources.gpu)
