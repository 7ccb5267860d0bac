"""What a job will be, before it is submitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.resources import Resources
from slurm.tasks import Task
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import card
from tarflow_dist.cost.estimate import (
    checkpoint_bytes,
    does_not_fit,
    estimate,
    fitting_micro_batch,
)
from tarflow_dist.cost.network import advised, network, network_estimate, waiting
from tarflow_dist.flow.flops import FlowCost
from tarflow_dist.models import hub
from tarflow_dist.training import latest_checkpoint

MFU = 0.4  # assumed for the images an hour


@dataclass(frozen=True)
class Summary:
    """`text` is the plan; `problem` a sentence on what seems not to fit, empty if nothing."""

    text: str
    problem: str


def describe(chain: Sequence[Task], resources: Resources) -> Summary:
    """The plan of the tasks.

    Raises:
        UserError: the batch can't be cut over the ranks.
    """
    task = chain[0]
    rows = {"task": " then ".join(t.name for t in chain), "folder": str(task.folder)}
    kind = "GPUs" if resources.gpus_per_node and not task.apart else "CPU ranks"
    per_node = task.ranks_a_node(resources)
    rows["nodes"] = f"{resources.nodes} x {per_node} {kind}, {resources.nodes * per_node} ranks"
    rows["cores"] = f"{resources.cpus or task.workers + 2} a rank"
    rows["time limit"] = f"{resources.time}, saved {resources.signal_delay} s before, then requeued"
    problem = ""
    if task.config is not None:
        more, problem = _training_rows(task.config, resources)
        rows |= more
    if not problem and task.config is not None:
        problem = _missing_model(task.config)
    if not problem and task.shards and "://" not in task.shards and not Path(task.shards).is_dir():
        problem = f"there are no shards {task.shards} on this machine"
    return Summary("\n".join(f"{name:<16}{text}" for name, text in rows.items()), problem)


def _new(config: Config) -> str:
    return "new" if config.init is None else f"new, from the weights of {config.init}"


def _missing_model(config: Config) -> str:
    if config.init is None or latest_checkpoint.newest(config.run / latest_checkpoint.FOLDER):
        return ""
    if config.init.exists() or hub.is_name(config.init):
        return ""
    return f"there is no model {config.init} to start from on this machine"


def bytes_to_write(task: Task) -> int:
    """What must be free on disk: two checkpoints of a training."""
    return 0 if task.config is None else 2 * checkpoint_bytes(FlowCost(task.config.model))


def _training_rows(config: Config, resources: Resources) -> tuple[dict[str, str], str]:
    world_size, batch = resources.world_size, config.train.batch_size
    gpu = card(resources.gpu)
    micro = config.micro_batch(world_size)
    if resources.gpus_per_node:
        micro = fitting_micro_batch(config, gpu.memory, world_size)
    passes = batch // (world_size * micro)
    newest = latest_checkpoint.newest(config.run / latest_checkpoint.FOLDER)
    start = int(newest.name) if newest else 0
    steps = -(-config.train.images // batch)
    rows = {
        "batch": f"{batch} images: {batch // world_size} a rank, in {passes} passes of {micro}",
        "length": f"{config.train.images:,} images, {steps:,} steps",
        "starts": f"from its checkpoint at {start:,} images" if start else _new(config),
        "precision": f"{config.train.precision}, ZeRO {config.train.zero_stage}",
    }
    if start >= config.train.images:
        rows["starts"] = "no more: it is finished; a larger train.images trains it further"
    if not resources.gpus_per_node:
        return rows, ""
    cost = estimate(config, gpu, world_size, mfu=MFU)
    need, there = cost.chosen.memory.peak / 2**30, gpu.memory / 2**30
    speed = cost.checkpointed if config.train.activation_checkpointing else cost.plain
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
    if cost.chosen.fits:
        return rows, ""
    return rows, does_not_fit(cost, resources.gpu)
