"""A training step beside the published one, alternating, each in a process of its own.

    python benchmarks/train_step.py CONFIG [key=value …] --published ml-tarflow

CONFIG's model, on random pixels: our whole step (flips, noise and dropped labels, passes through
DeepSpeed, clipping, AdamW, moving average, figures) against the published training script's (noise,
dropped labels, AdamW), in the published precision: bf16 autocast on a GPU with Gaussian noise, else
fp32. `--published` is a checkout of github.com/apple/ml-tarflow. Start it as one process, or under
torchrun to time ours alone on several GPUs.

Prints medians and the ratio; MFU and memory beside `plan`'s where the card is known; what the
moving average and watching the gradients cost; how long training waits for a checkpoint, and how
much slower it is while one is written.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tarflow_dist import config_file as configs
from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import card, find_card
from tarflow_dist.cost.estimate import estimate
from tarflow_dist.data.loader import Batch
from tarflow_dist.flow.flops import FlowCost
from tarflow_dist.flow.noise import scale_pixels
from tarflow_dist.telemetry.throughput import Throughput
from tarflow_dist.training.checkpoint import RunState
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.maximum_likelihood import MaximumLikelihood
from tarflow_dist.training.saver import Saver
from tarflow_dist.training.setup import build_engine
from tarflow_dist.training.step import Stepper
from tarflow_dist.training.zero import DECAY, EMA, track_ema

GIB = 2**30


def random_batches(config: Config, size: int) -> Iterator[Batch]:
    """The same random images for ever, `size` at a time."""
    model = config.model
    shape = (size, model.image_size, model.image_size, model.in_channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(0, max(model.num_classes, 1), (size,))
    batch = Batch(images, labels, torch.arange(size), torch.zeros(size, dtype=torch.int64))
    while True:
        yield batch


class Ours:
    """The step of training/loop.py."""

    def __init__(self, config: Config, device: torch.device):
        micro_batch = config.micro_batch(distributed.world_size())
        self.engine: Engine = build_engine(config, micro_batch, device)
        self.state = RunState(images=config.optimizer.warmup_images)
        self._batch_size = config.train.batch_size
        throughput = Throughput(config, device, 0)
        batches = random_batches(config, micro_batch)
        objective = MaximumLikelihood(self.engine, config)
        self.stepper = Stepper(self.engine, objective, batches, config, throughput)

    def step(self) -> None:
        self.stepper.step(self.state)
        self.state.images += self._batch_size


class Published:
    """The step of the published train.py, on one device."""

    def __init__(self, config: Config, device: torch.device, checkout: Path):
        sys.path.insert(0, str(checkout))
        import transformer_flow  # type: ignore[import-not-found]

        torch.manual_seed(config.seed)
        model, optimizer = config.model, config.optimizer
        self._model = transformer_flow.Model(
            in_channels=model.in_channels,
            img_size=model.image_size,
            patch_size=model.patch_size,
            channels=model.width,
            num_blocks=model.num_blocks,
            layers_per_block=model.layers_per_block,
            num_classes=model.num_classes,
        ).to(device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), betas=(0.9, 0.95), lr=optimizer.lr, weight_decay=1e-4
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self._config, self._device = config, device
        self._batches = random_batches(config, config.train.batch_size)

    def step(self) -> None:
        config, device = self._config, self._device
        batch = next(self._batches)
        x, y = scale_pixels(batch.images).to(device), batch.labels.to(device)
        gaussian = config.model.noise == "gaussian"
        if gaussian:
            x = x + config.model.sigma * torch.randn_like(x)
        else:
            x = ((x + 1) * (255 / 2) + torch.rand_like(x)) / 256 * 2 - 1
        if config.model.num_classes:
            dropped = (torch.rand(len(y), device=device) < config.train.label_drop).int()
            y = (1 - dropped) * y - dropped
        self._optimizer.zero_grad()
        autocast = gaussian and device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            z, _, logdets = self._model(x, y if config.model.num_classes else None)
            loss = self._model.get_loss(z, logdets)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        _ = loss, 0.5 * (z**2).mean(), logdets.mean()  # its metrics


class Elsewhere:
    """The published step in a process of its own, whose memory is its own too."""

    def __init__(self, *args: Any):
        context = torch.multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        context.Process(target=_answer, args=(there, *args), daemon=True).start()

    def step(self) -> None:
        self._connection.send(None)
        self._connection.recv()


def _answer(connection: Connection, config: Config, device: torch.device, checkout: Path) -> None:
    published = Published(config, device, checkout)
    with suppress(EOFError):  # when the other process ends
        while True:
            connection.recv()
            connection.send(seconds(published.step, device))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(
    works: dict[str, Callable[[], None]], device: torch.device, *, warmup: int, repeats: int
) -> dict[str, float]:
    """The median time of each, in seconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warmup + repeats):
        for name, work in works.items():
            taken = seconds(work, device)
            if number >= warmup:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def average_cost(flow: torch.nn.Module, device: torch.device, repeats: int) -> float:
    """Seconds that the moving average adds to a step of AdamW over as many weights as `flow` has
    here, in one flat tensor as ZeRO keeps them."""
    count = sum(getattr(p, "ds_numel", p.numel()) for p in flow.parameters())
    count //= distributed.world_size()
    works = {}
    for name in ("plain", "averaged"):
        weights = torch.zeros(count, device=device, requires_grad=True)
        weights.grad = torch.zeros_like(weights)
        optimizer = torch.optim.AdamW([{"params": [weights], DECAY: 0.999}])
        optimizer.step()
        if name == "averaged":
            optimizer.state[weights][EMA] = torch.zeros_like(weights)
            track_ema(optimizer)
        works[name] = optimizer.step
    times = medians(works, device, warmup=2, repeats=repeats)
    return times["averaged"] - times["plain"]


def watching_cost(ours: Ours, device: torch.device, repeats: int) -> float:
    """How much longer a step takes for seeing in which block a gradient is not finite."""
    hooks = [parameter._backward_hooks for parameter in ours.engine.flow.parameters()]
    watched = [(there, dict(there)) for there in hooks if there]

    def unwatched_step() -> None:
        for there, _ in watched:
            there.clear()
        ours.step()
        for there, all_of_them in watched:
            there.update(all_of_them)

    works = {"watched": ours.step, "not": unwatched_step}
    times = medians(works, device, warmup=2, repeats=repeats)
    return times["watched"] / times["not"] - 1


def checkpoint_cost(ours: Ours, config: Config, device: torch.device, step: float) -> str:
    """How long training stands still for a checkpoint, and how much slower its steps are while the
    rest of it is written."""
    with tempfile.TemporaryDirectory(
        dir=config.run.parent if config.run.parent.is_dir() else None
    ) as folder:
        saver = Saver(Path(folder), config.checkpoint, ours.engine.flow.config)
        saver.save(ours.engine.pieces(), ours.state)
        meanwhile = []
        while saver.writing:
            meanwhile.append(seconds(ours.step, device))
        saver.publish()
        slower = sum(meanwhile) - step * len(meanwhile)
        lost = saver.stall_seconds + max(slower, 0.0)
        between = config.checkpoint.every_images / config.train.batch_size * step
        return (
            f"checkpoint: {saver.stall_seconds:.3f} s still, {len(meanwhile)} steps while it is "
            f"written take {slower:+.3f} s more; {lost / between:.2%} of the time at one every "
            f"{config.checkpoint.every_images:,} images"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=Path)
    add("overrides", nargs="*", metavar="key=value")
    add("--published", type=Path, help="checkout of apple/ml-tarflow; without it, ours alone")
    add("--repeats", type=int, default=15, help="steps timed of each")
    add("--warmup", type=int, default=3)
    args = parser.parse_intermixed_args()
    config = configs.load(args.config, args.overrides)
    device = distributed.init()
    torch.manual_seed(0)

    ours = Ours(config, device)
    works: dict[str, Callable[[], None]] = {"ours": ours.step}
    ours.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ours.step()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    if args.published:
        works["published"] = Elsewhere(config, device, args.published).step
    times = medians(works, device, warmup=args.warmup, repeats=args.repeats)
    watching = watching_cost(ours, device, args.repeats)
    ema = average_cost(ours.engine.flow, device, args.repeats)
    checkpoint = checkpoint_cost(ours, config, device, times["ours"])
    if distributed.is_main():
        print("\n".join(report(config, device, times, peak)))
        print(f"moving average: {ema * 1e3:.2f} ms a step, {ema / times['ours']:.2%}")
        print(f"gradients watched: {watching:+.2%} of a step")
        print(checkpoint)
    distributed.shutdown()


def report(
    config: Config, device: torch.device, times: dict[str, float], peak: int | None
) -> Iterator[str]:
    train, ranks = config.train, distributed.world_size()
    counts = FlowCost(config.model)
    name = distributed.device_name(device)
    known = find_card(name)
    yield (
        f"{ranks} x {name}, {counts.num_parameters / 1e6:.1f} M parameters, batch "
        f"{train.batch_size}, {train.precision}, ZeRO {train.zero_stage}, "
        f"activation checkpointing {train.activation_checkpointing}, compile {train.compile}"
    )
    for side, step in times.items():
        rate = train.batch_size / step
        achieved = rate * counts.training_flops / ranks
        share = f", MFU {achieved / known.bf16_flops:.1%}" if known else ""
        yield (
            f"{side:<10}{step * 1e3:9.1f} ms a step {rate:9.2f} images/s "
            f"{achieved / 1e12:9.4f} TFLOP/s{share}"
        )
    if "published" in times:
        yield f"published / ours: {times['published'] / times['ours']:.3f}"
    if peak is not None:
        # which card it is decides nothing but the speed
        planned = estimate(config, known or card("h100"), ranks, mfu=1.0).chosen.memory
        yield f"peak memory {peak / GIB:.2f} GiB, planned {planned.peak / GIB:.2f}"


if __name__ == "__main__":
    main()
