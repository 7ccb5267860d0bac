"""What one of very many ranks sends, counted on one CPU: training, saving and resuming.

    python -m benchmarks.scale [--worlds 8 64 512] [--stages 0 1 2 3] [--json FILE] [key=value …]

Five minutes for all of it on two cores.

Rank 0 of each world runs the real training loop alone, on torch's "fake" process group, where every
other rank does as it does. Collectives are seen where torch dispatches them, whoever calls them.
Bytes are those of the whole tensor that a collective works on; on the wire, which is what a node
sends while the ranks form rings, an all-reduce counts twice.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
# matrices large enough for ZeRO 3 to spread them
MODEL = ("model.width=256", "model.num_blocks=2", "model.layers_per_block=2")
STEPS = 4
# measured in this order: a process that has seen DeepSpeed's torch_autocast keeps some of it
PRECISIONS = ("fp32", "bf16", "bf16_autocast")
OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "barrier": "barrier",
}
"""Of torch.ops.c10d; another one is an error."""
THROUGH_HOST = ("any_rank", "gather", "from_main", "to_main", "barrier")
"""Functions of tarflow_dist.distributed, whatever the device."""


@dataclass
class Sent:
    """What a rank sends in one phase of training.

    Attributes:
        calls: by operation and size of its group.
        bytes: the same.
        host_calls: collectives through host memory, in none of the others.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    host_calls: int = 0

    def summary(self, parameters: int) -> dict[str, Any]:
        """As JSON, with bytes a parameter, and those on the wire."""
        sizes = {kind: size / parameters for kind, size in self.bytes.items()}
        return {
            "calls": dict(self.calls),
            "bytes": sizes,
            "wire": sum(size * (1 + ("all_reduce" in kind)) for kind, size in sizes.items()),
            "host_calls": self.host_calls,
        }


class Watch:
    """Counts the collectives of the training loop, each phase by itself: step, log, save, resume
    and start, which is all else."""

    def __init__(self) -> None:
        self.sent: dict[str, Sent] = {}
        self.engine: Any = None
        self._phase, self._on_host = "start", False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from torch.utils._python_dispatch import TorchDispatchMode

        from tarflow_dist import distributed
        from tarflow_dist.training import loop, setup
        from tarflow_dist.training.engine import Engine
        from tarflow_dist.training.run_log import RunLog
        from tarflow_dist.training.saver import Saver
        from tarflow_dist.training.step import Stepper

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(mode, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: N805
                if op.namespace == "c10d":
                    self._see(op, args)
                return op(*args, **(kwargs or {}))

        phases = [(RunLog, "write_row", "log"), (Stepper, "figures", "log")]
        phases += [(loop, "restore", "resume"), (Engine, "is_finite", "save")]
        phases += [(Saver, name, "save") for name in ("save", "publish")]
        with ExitStack() as stack:

            def patch(*args: Any) -> None:
                stack.enter_context(mock.patch.object(*args))

            for owner, name, phase in phases:
                patch(owner, name, self.during(phase, getattr(owner, name)))
            for name in THROUGH_HOST:
                patch(distributed, name, self._through_host(getattr(distributed, name)))
            patch(setup, "Engine", self._keep(Engine))
            patch(distributed.AnyRank, "ask", self._begin_step(distributed.AnyRank.ask))
            stack.enter_context(Mode())
            yield

    def _see(self, op: Any, args: tuple) -> None:
        import torch
        import torch.distributed as dist
        from torch.utils._pytree import tree_leaves

        sent = self.sent.setdefault(self._phase, Sent())
        if self._on_host:
            sent.host_calls += 1
            return
        groups = [a for a in args if isinstance(a, torch.ScriptObject)]
        size = next(
            dist.ProcessGroup.unbox(g).size() for g in groups if "ProcessGroup" in str(g._type())
        )
        kind = f"{OPERATIONS[op.overloadpacket.__name__]} over {size}"
        sent.calls[kind] += 1
        sent.bytes[kind] += max(
            sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args
        )

    def during(self, phase: str, inner: Callable) -> Callable:
        def within(*args: Any, **kwargs: Any) -> Any:
            before, self._phase = self._phase, phase
            try:
                return inner(*args, **kwargs)
            finally:
                self._phase = before

        return within

    def _through_host(self, inner: Callable) -> Callable:
        def within(*args: Any, **kwargs: Any) -> Any:
            before, self._on_host = self._on_host, True
            try:
                return inner(*args, **kwargs)
            finally:
                self._on_host = before

        return within

    def _begin_step(self, inner: Callable) -> Callable:
        def ask(*args: Any, **kwargs: Any) -> Any:
            self._phase = "step"
            self.sent["step"] = Sent()  # of the last step alone
            return inner(*args, **kwargs)

        return ask

    def _keep(self, inner: Callable) -> Callable:
        def build(flow: Any, *args: Any) -> Any:
            # the ranks gather rank 0's part many times over: small weights stay harmless anywhere
            for parameter in flow.parameters():
                parameter.data.mul_(1e-3)
            self.engine = inner(flow, *args)
            return self.engine

        return build


def join(world: int) -> None:
    """This process becomes rank 0 of `world`, in which every other rank does as it does."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeProcessGroup, FakeStore

    torch.set_num_threads(1)
    options = FakeProcessGroup.Options()
    options.simulate_uniform_ranks = True
    store = FakeStore()
    dist.init_process_group("fake", rank=0, world_size=world, store=store, pg_options=options)


def measure(shards: Path, overrides: list[str]) -> dict[str, Any]:
    """What this rank sends in a run of STEPS steps under `overrides` of the digits' config."""
    import torch

    from tarflow_dist import config_file as configs
    from tarflow_dist import distributed
    from tarflow_dist.training import loop

    world = distributed.world_size()
    images = STEPS * world
    with tempfile.TemporaryDirectory() as folder:
        config = configs.load(
            CONFIG,
            [
                *(*MODEL, f"data.path={shards}", f"run={folder}/run", "log.wandb=disabled"),
                *("train.micro_batch_size=1", f"train.batch_size={world}"),
                *(f"train.images={images}", f"log.every_images={images}"),
                *("optimizer.warmup_images=0", f"checkpoint.every_images={images}"),
                *overrides,
            ],
        )
        watch = Watch()
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), watch():
            loop.train(config, torch.device("cpu"))
            engine = watch.engine
            assert engine.optimizer_steps == STEPS  # none was left out
            read = values_read(engine, watch)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.flow.parameters())
    phases = {
        phase: watch.sent.get(phase, Sent()).summary(parameters)
        for phase in ("step", "log", "save", "resume")
    }
    return {"world": world, **phases, "parameters": parameters, "read": 4 * read / parameters}


def values_read(engine: Any, watch: Watch) -> int:
    """How many values this rank reads to resume."""
    import torch

    read = 0

    def count(key: str, start: int, stop: int) -> torch.Tensor:
        nonlocal read
        read += stop - start
        return torch.zeros(stop - start)

    watch.during("resume", engine.load)(count, STEPS)
    return read


def measure_all(
    stages: list[int], precisions: list[str], shards: Path, overrides: list[str]
) -> list[dict[str, Any]]:
    """A result for each ZeRO stage and precision that the config allows."""
    return [
        {"stage": stage, "precision": precision}
        | measure(shards, [f"train.zero_stage={stage}", f"train.precision={precision}", *overrides])
        for precision in sorted(precisions, key=PRECISIONS.index)
        for stage in stages
        if (stage, precision) != (0, "bf16")
    ]


def join_and_measure(world: int, *of_what: Any) -> list[dict[str, Any]]:
    join(world)
    return measure_all(*of_what)


def rows(results: list[dict]) -> Iterator[str]:
    yield "| ranks | ZeRO | precision | a step, bytes a parameter (calls) | wire | host |"
    yield "|---|---|---|---|---|---|"
    for r in results:
        step = r["step"]
        sent = ", ".join(
            f"{kind} {step['bytes'][kind]:.2f} ({calls})" for kind, calls in step["calls"].items()
        )
        yield (
            f"| {r['world']} | {r['stage']} | {r['precision']} | {sent} | {step['wire']:.2f} | "
            f"{step['host_calls']} |"
        )
    yield ""
    yield "| ranks | ZeRO | precision | save: wire, calls, host | resume: read, wire, calls, host |"
    yield "|---|---|---|---|---|"
    for r in results:
        save, resume = r["save"], r["resume"]
        yield (
            f"| {r['world']} | {r['stage']} | {r['precision']} | {save['wire']:.2f}, "
            f"{sum(save['calls'].values())}, {save['host_calls']} | {r['read']:.3f}, "
            f"{resume['wire']:.2f}, {sum(resume['calls'].values())}, {resume['host_calls']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--shards", type=Path, help="the digits, prepared; else they are made")
    parser.add_argument("--json", type=Path, help="write the counts there")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.shards is None:
            from data_prep.__main__ import main as data_prep

            data_prep(["digits", f"{folder}/digits"])
        shards = args.shards or Path(folder) / "digits" / "mds"
        of_what = (args.stages, args.precisions, shards, args.overrides)
        # a process a world: DeepSpeed keeps the one that it was first used in
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            jobs = [pool.apply_async(join_and_measure, (world, *of_what)) for world in args.worlds]
            results = [result for job in jobs for result in job.get()]
    if args.json:
        args.json.write_text(json.dumps(results))
    print("\n".join(rows(results)))


if __name__ == "__main__":
    main()
