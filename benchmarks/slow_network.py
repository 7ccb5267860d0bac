"""A training step behind a slow link: each bucket waited for at once, and beside the computing.

    python -m benchmarks.slow_network [--rates 50 100 200 400] [--steps 3] [key=value …]

Two CPU ranks of one thread in network namespaces, joined by a link of so many Mbit/s each way: this
takes root, and Linux's ip and tc. Beside the measured seconds those that `plan` expects, of the
computing that a step takes without a limit and of the bytes that go over the link: gloo makes an
all-reduce of a reduce-scatter, which sends the gradients twice.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
MODEL = ("model.width=256", "model.num_blocks=2", "model.layers_per_block=2")
BUCKET = 500_000  # several of so small a model
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


@dataclass
class Waits:
    """For buckets of gradients and weights: how many, and seconds that the host spent in them."""

    count: int = 0
    seconds: float = 0.0


@contextmanager
def buckets(*, at_once: bool) -> Iterator[Waits]:
    """Watches the waits for buckets. With `at_once` nothing is computed while one is on its way."""
    import torch.distributed as dist

    waits = Waits()

    class Work:
        def __init__(self, work: Any):
            self._work = work

        def wait(self) -> None:
            began = time.perf_counter()
            self._work.wait()
            waits.count += 1
            waits.seconds += time.perf_counter() - began

    def watched(start: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            work = start(*args, **kwargs)
            if work is None:  # not one of ours
                return None
            if at_once:
                work.wait()
            return Work(work)

        return call

    with ExitStack() as patches:
        for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
            patches.enter_context(mock.patch.object(dist, name, watched(getattr(dist, name))))
        yield waits


def refusal() -> str | None:
    """Why no link can be made here, if so."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"there is no {' and no '.join(missing)} here, which is in iproute2: install it"
    return None if os.geteuid() == 0 else "only root may make network namespaces: run it as root"


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def two_nodes() -> Iterator[list[str]]:
    """Names of two network namespaces, with one link between them and nothing else."""
    names = [f"slow-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for name in names:
            run(f"ip netns add {name}")
        run(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for rank, name in enumerate(names):
            run(f"ip -n {name} addr add 10.99.0.{rank + 1}/24 dev eth0")
            for device in ("eth0", "lo"):
                run(f"ip -n {name} link set {device} up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def limit(rate: int) -> None:
    """What this namespace sends, in Mbit/s; the other one does the same."""
    run(f"tc qdisc replace dev eth0 root tbf rate {rate}mbit burst 256kb latency 50ms")


def measure(rates: list[int], steps: int, overrides: list[str]) -> None:
    """One of the ranks; the first one prints the table."""
    import torch

    from benchmarks.train_step import Ours
    from tarflow_dist import config_file as configs
    from tarflow_dist import distributed
    from tarflow_dist.training import engine

    torch.set_num_threads(1)
    engine.BUCKET = BUCKET
    config = configs.load(
        CONFIG,
        [
            *(*MODEL, "train.zero_stage=1", "train.batch_size=128", "optimizer.lr=1e-4"),
            *("train.micro_batch_size=64", "log.wandb=disabled", *overrides),
        ],
    )
    step = Ours(config, distributed.init()).step

    def seconds(*, at_once: bool = False) -> list[float]:
        """Of each step; the one before them leaves no bucket of another kind on its way."""
        with buckets(at_once=at_once):
            step()
            times = []
            for _ in range(steps):
                began = time.perf_counter()
                step()
                times.append(time.perf_counter() - began)
        return times

    step()  # the first one is slower
    alone = statistics.median(seconds())
    rows = []
    for rate in rates:
        limit(rate)
        before = int(SENT.read_text())
        first, second, third, fourth = (seconds(at_once=kind) for kind in (True, False) * 2)
        sent = (int(SENT.read_text()) - before) / (4 * (steps + 1))
        waited, beside = statistics.median(first + third), statistics.median(second + fourth)
        rows.append((rate, sent, waited, beside, *expected(config, rate, sent, alone)))
    if distributed.is_main():
        print(f"{alone:.2f} s a step without a limit\n")
        print("| Mbit/s | MB sent | at once, s | `plan` | beside, s | `plan` |")
        print("|---|---|---|---|---|---|")
        for rate, sent, waited, beside, all_of_it, rest in rows:
            print(
                f"| {rate} | {sent / 1e6:.1f} | {waited:.2f} | {all_of_it:.2f} | {beside:.2f} | "
                f"{rest:.2f} |"
            )
    distributed.shutdown()


def expected(config: Any, rate: int, sent: float, alone: float) -> tuple[float, float]:
    """Seconds of a step by `plan`: if it waits for all that it sends, and as it is."""
    from tarflow_dist.cost import network
    from tarflow_dist.cost.cards import Card
    from tarflow_dist.flow.flops import FlowCost

    flops = FlowCost(config.model).training_flops * config.train.micro_batch_size / alone
    card = Card((), flops, flops, 2**40, 1.0)
    with mock.patch.object(network, "BUCKET", BUCKET):

        def step(bandwidth: float) -> network.Step:
            link = network.Network("", bandwidth)
            return network.training_step(config, card, link, 1, 1.0, nodes=2)

        whole = step(1.0)  # seconds at 1 byte a second: what one of two ranks sends
        found = step(rate * 1e6 / 8 * whole.communication / sent)
    return found.compute + found.communication, found.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if "RANK" in os.environ:
        measure(args.rates, args.steps, args.overrides)
        return
    if problem := refusal():
        sys.exit(f"error: {problem}")
    alike = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    alike |= {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
    alike |= {"CUDA_VISIBLE_DEVICES": ""}
    with two_nodes() as names:
        command = [sys.executable, "-m", "benchmarks.slow_network", *sys.argv[1:]]
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=os.environ | alike | {"RANK": str(rank)},
            )
            for rank, name in enumerate(names)
        ]
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
