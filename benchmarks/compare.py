"""How much faster ranks compare features together, each with one thread, than one does alone.

    python -m benchmarks.compare [--samples 50000] [--reference 10000] [--ranks 2] [--rounds 3]

Synthetic features. Wall seconds, and those that the busiest rank computed for, which other work on
the machine disturbs less.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

DIM = 2048


def write_features(file: Path, count: int, seed: int) -> None:
    """As Inception's: not below 0, and most of their variance in few directions."""
    from tarflow_dist.evaluation.feature_set import FeatureSet, Gaussian

    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(6, DIM)).astype(np.float32)
    x = rng.normal(size=(count, 6)).astype(np.float32) @ mixing
    x = np.abs(x + 0.3 * rng.normal(size=(count, DIM)).astype(np.float32) + 0.05 * seed)
    moments = Gaussian(x.mean(0, dtype=np.float64), np.cov(x, rowvar=False, dtype=np.float64))
    FeatureSet(moments, features=x, about={"count": count}).save(file)


def compare(folder: Path, rank: int, ranks: int, port: int) -> None:
    """One of the ranks; the first one writes what it found."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    from tarflow_dist import distributed
    from tarflow_dist.evaluation import metrics
    from tarflow_dist.evaluation.feature_set import FeatureSet

    torch.set_num_threads(1)
    device = distributed.init()
    samples, reference = (FeatureSet.load(folder / f"{name}.npz") for name in ("x", "y"))
    distributed.barrier()
    began, computed = time.perf_counter(), time.process_time()
    figures = metrics.compare(samples, reference, device)
    seconds = time.perf_counter() - began
    busiest = max(distributed.gather(time.process_time() - computed))
    if distributed.is_main():
        found = {"seconds": seconds, "computing": busiest, "figures": figures}
        (folder / "found.json").write_text(json.dumps(found))
    distributed.shutdown()


def run(folder: Path, ranks: int) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    jobs = [start(target=compare, args=(folder, rank, ranks, port)) for rank in range(ranks)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    return json.loads((folder / "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of the ranks' numpy
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder / "x.npz", args.samples, 0)
        write_features(folder / "y.npz", args.reference, 1)
        ratios: dict[str, list[float]] = {"seconds": [], "computing": []}
        for _ in range(args.rounds):
            alone, together = run(folder, 1), run(folder, args.ranks)
            assert together["figures"] == alone["figures"]
            for kind, values in ratios.items():
                values.append(alone[kind] / together[kind])
            print(
                f"1 rank {alone['seconds']:.1f} s, computing {alone['computing']:.1f}; "
                f"{args.ranks} ranks {together['seconds']:.1f}, {together['computing']:.1f}",
                flush=True,
            )
    wall, computing = (statistics.median(ratios[kind]) for kind in ratios)
    print(f"{wall:.2f} times as fast, {computing:.2f} by computing time; the same figures")


if __name__ == "__main__":
    main()
