"""Time that a training step waits for the network between the nodes.

Ranks form rings through all nodes, so that to reduce-scatter or to gather S bytes, each node sends
S, and to all-reduce them 2 S. What is sent beside computing takes no time of its own, but for the
first or last bucket. Latency, and the network inside a node, are left out.
"""

import re
from dataclasses import dataclass

from tarflow_dist.config import Config, Precision, Stage
from tarflow_dist.cost.cards import Card
from tarflow_dist.cost.estimate import estimate, fitting_micro_batch, with_training
from tarflow_dist.cost.memory import BUCKET, FP32, LIVE_WEIGHTS
from tarflow_dist.errors import UserError
from tarflow_dist.flow.flops import FlowCost

# Share of its cards' rate that a node sends at: ours, not measured.
EFFICIENCY = 0.9
NODES = (1, 2, 4, 8, 16, 32, 64)
# What is slower by no more than this is preferred if it is simpler.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Network:
    """Between the nodes: `name` as it was given, and bytes a second that each node sends."""

    name: str
    bandwidth: float


@dataclass(frozen=True)
class Step:
    """One step of the run on `nodes`, at the stated utilisation.

    Attributes:
        sent: bytes that a node sends.
        compute: seconds without a network.
        communication: seconds of sending.
        waited: those of them that are not hidden behind computing.
        images_per_second, days: of the run with such steps.
    """

    nodes: int
    gpus: int
    sent: float
    compute: float
    communication: float
    waited: float
    images_per_second: float
    days: float

    @property
    def seconds(self) -> float:
        return self.compute + self.waited

    @property
    def share(self) -> float:
        """Of the step, spent waiting."""
        return self.waited / self.seconds


@dataclass(frozen=True)
class Advice:
    """The settings with the shortest step; among those as short, the simplest."""

    zero_stage: Stage
    reduce_precision: Precision
    step: Step


@dataclass(frozen=True)
class NetworkEstimate:
    """What a network makes of the run.

    Attributes:
        chosen: a step as the config says.
        advice: None if no setting fits into the cards' memory.
        scaling: as `chosen`, for each of NODES that the batch can be cut over.
    """

    network: Network
    chosen: Step
    advice: Advice | None
    scaling: list[Step]

    def in_words(self) -> dict[str, str]:
        """What a step computes, sends and waits for, and the advice, each by its name."""
        step = self.chosen
        told = {
            "a step": f"{step.compute:.3f} s of computing; {step.sent / 1e9:.1f} GB from each node "
            f"in {step.communication:.3f} s, of which {step.waited:.3f} s are waited for, "
            f"{step.share:.1%} of the step"
        }
        if self.advice is not None:
            told["recommended"] = (
                f"train.zero_stage={self.advice.zero_stage} "
                f"train.reduce_precision={self.advice.reduce_precision}: "
                f"{self.advice.step.share:.1%} of a step waited for"
            )
        return told


def network(text: str) -> Network:
    """45 is 45 GB/s a node; 2x200 a node with two cards of 200 Gb/s.

    Raises:
        UserError: it is neither.
    """
    cards = re.fullmatch(r"(\d+)x(\d+)", text)
    if cards and (rate := int(cards[1]) * int(cards[2])):
        return Network(text, EFFICIENCY * rate * 1e9 / 8)
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text):
        return Network(text, float(text) * 1e9)
    raise UserError(
        f"the network {text} is neither GB/s a node, such as 45, nor its cards and their Gb/s, "
        "such as 2x200"
    )


def network_estimate(
    config: Config, card: Card, between: Network, *, nodes: int, gpus_per_node: int, mfu: float
) -> NetworkEstimate:
    """The steps of `config`, at model FLOPs utilisation `mfu` where nothing is waited for.

    Raises:
        UserError: the batch can't be cut over the GPUs.
    """

    def step(config: Config, nodes: int) -> Step:
        return training_step(config, card, between, gpus_per_node, mfu, nodes)

    every = config.train.activation_checkpointing
    layouts = estimate(config, card, nodes * gpus_per_node, mfu=mfu).layouts
    stages = [a.stage for a in layouts if a.fits and a.checkpoint_every == every]
    kinds: list[Precision] = ["fp32"] if config.train.precision == "fp32" else ["fp32", "bf16"]
    # the simplest first
    found = [
        Advice(at, kind, step(with_training(config, zero_stage=at, reduce_precision=kind), nodes))
        for kind in kinds
        for at in stages
    ]
    least = min((advice.step.seconds for advice in found), default=0.0)
    return NetworkEstimate(
        between,
        step(config, nodes),
        next((a for a in found if a.step.seconds <= (1 + TOLERANCE) * least), None),
        [step(config, n) for n in NODES if config.train.batch_size % (n * gpus_per_node) == 0],
    )


def training_step(
    config: Config,
    card: Card,
    between: Network,
    gpus_per_node: int,
    mfu: float,
    nodes: int,
) -> Step:
    """A step of the run of `config`."""
    train, counts, gpus = config.train, FlowCost(config.model), nodes * gpus_per_node
    micro_batch = fitting_micro_batch(config, card.memory, gpus)
    passes = train.batch_size // (gpus * micro_batch)
    peak = card.peak_flops(train.precision)
    twice = counts.recomputed_flops(train.activation_checkpointing)
    forward = micro_batch * counts.forward_flops / (mfu * peak)
    backward = micro_batch * (counts.training_flops - counts.forward_flops + twice) / (mfu * peak)

    P = counts.num_parameters
    # of a ring's S bytes, a rank keeps its own part
    rate = between.bandwidth / ((gpus - 1) / gpus) if nodes > 1 else float("inf")
    gradients = P * (FP32 if train.reduce_precision == "fp32" else 2)
    weights = P * (2 if train.precision == "bf16" else FP32)
    last = min(1.0, BUCKET / P)  # the share of all that is sent at once

    def beside(size: float, computing: float) -> float:
        """What is still to be waited for."""
        return max(size / rate - (1 - last) * computing, last * size / rate)

    stage = train.zero_stage
    if stage == 0:  # all-reduced after the last pass
        sent = 2.0 * gradients
        waited = sent / rate
    elif stage == 3:  # after each pass; weights are gathered before, and for the way back again
        sent = passes * (gradients + weights * (2 if P > LIVE_WEIGHTS else 1))
        waited = sent / rate
    else:
        reductions = passes if stage == 2 else 1
        sent = reductions * gradients + weights
        waited = reductions * beside(gradients, backward) + beside(weights, forward)
    compute = passes * (forward + backward)
    images_per_second = train.batch_size / (compute + waited)
    return Step(
        nodes=nodes,
        gpus=gpus,
        sent=sent if nodes > 1 else 0.0,
        compute=compute,
        communication=sent / rate,
        waited=waited,
        images_per_second=images_per_second,
        days=train.images / images_per_second / 86_400,
    )
