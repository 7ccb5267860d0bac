"""What a job will be, before it is submitted."""

from collections.abc import Sequence
from pathlib import Path

from slurm.resources import Resources
from slurm.tasks import Task
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import card
from tarflow_dist.cost.estimate import does_not_fit, estimate
from tarflow_dist.cost.network import advised, network, network_estimate, waiting
from tarflow_dist.models import hub
from tarflow_dist.training import latest_checkpoint

MFU = 0.4  # assumed for the images an hour


def describe(chain: Sequence[Task]) -> tuple[str, str]:
    """The plan of the tasks, and a sentence on what seems not to fit, empty if nothing.

    Raises:
        UserError: the batch can't be cut over the ranks.
    """
    task, resources = chain[0], chain[0].resources
    ranks = f"{resources.ranks_per_node} {'GPUs' if resources.gpus_per_node else 'CPU ranks'}"
    rows = {
        "task": " then ".join(t.name for t in chain),
        "folder": str(task.folder),
        "nodes": f"{resources.nodes} x {ranks}, {resources.world_size} ranks",
        "cores": f"{resources.cpus} a rank",
        "time limit": f"{resources.time}, saved {resources.signal_delay} s before, then requeued",
    }
    problem = ""
    if task.config is not None:
        more, problem = _training_rows(task.config, resources)
        rows |= more
    plan = "\n".join(f"{name:<16}{text}" for name, text in rows.items())
    return plan, problem or _missing(task)


def _missing(task: Task) -> str:
    """What the task begins with and is not on this machine, in a sentence; empty if nothing."""
    init = task.config and task.config.init
    if init and not (_newest(task.folder) or init.exists() or hub.is_name(init)):
        return f"there is no model {init} to start from on this machine"
    if task.shards and "://" not in task.shards and not Path(task.shards).exists():
        return f"there are no shards {task.shards} on this machine"
    return ""


def _newest(run: Path) -> Path | None:
    return latest_checkpoint.newest(run / latest_checkpoint.FOLDER)


def _training_rows(config: Config, resources: Resources) -> tuple[dict[str, str], str]:
    """What the plan says of a training, and what seems not to fit."""
    train, world_size = config.train, resources.world_size
    gpu = card(resources.gpu)
    cost = estimate(config, gpu, world_size, mfu=MFU) if resources.gpus_per_node else None
    micro = cost.micro_batch if cost else config.micro_batch(world_size)
    share = train.batch_size // world_size
    passes = f"in {share // micro} passes of {micro}"
    newest = _newest(config.run)
    starts = "new" if config.init is None else f"new, from the weights of {config.init}"
    if newest:
        starts = f"from its checkpoint at {int(newest.name):,} images"
    if newest and int(newest.name) >= train.images:
        starts = "no more: it is finished; a larger train.images trains it further"
    steps = -(-train.images // train.batch_size)
    rows = {
        "batch": f"{train.batch_size} images: {share} a rank, {passes}",
        "length": f"{train.images:,} images, {steps:,} steps",
        "starts": starts,
        "precision": f"{train.precision}, ZeRO {train.zero_stage}",
    }
    if cost is None:
        return rows, ""
    need, there = cost.chosen.memory.peak / 2**30, gpu.memory / 2**30
    speed = cost.checkpointed if train.activation_checkpointing else cost.plain
    rows["memory"] = f"{need:.1f} GiB of {there:.0f} on each {resources.gpu}"
    rows["speed"] = (
        f"{speed.images_per_second * 3600:,.0f} images an hour, {speed.days:,.1f} days, at an MFU "
        f"of {MFU:.0%}"
    )
    if resources.network is not None:
        told = network_estimate(
            config,
            gpu,
            network(resources.network),
            nodes=resources.nodes,
            gpus_per_node=resources.ranks_per_node,
            mfu=MFU,
        )
        rows["a step"] = waiting(told.chosen)
        if told.advice is not None:
            rows["recommended"] = advised(told.advice)
    rows["checkpoint"] = f"{cost.checkpoint_bytes / 1e9:.1f} GB"
    return rows, "" if cost.chosen.fits else does_not_fit(cost, resources.gpu)
