"""What is lost when very many ranks sum their gradients in bf16.

    python -m benchmarks.reduce_precision [--ranks 64 512] [--steps 0 400]

One image a rank; a small flow on the digits, at its start and later. A ring adds one rank after
another; rings that sum within nodes of 8 first add fewer. Against the sum in float64.
"""

import argparse
from collections.abc import Iterable
from functools import reduce
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from tarflow_dist import config_file as configs
from tarflow_dist.flow.model import Flow

NODE = 8


def added(gradients: Iterable[Tensor]) -> Tensor:
    """One after another, rounded each time."""
    return reduce(torch.add, gradients)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 400])
    args = parser.parse_args()
    config = configs.load(Path(__file__).parents[1] / "configs" / "digits.yaml")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    flow = Flow(**config.model.to_json())
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (size,))
        noise = config.model.sigma * torch.randn(size, *images.shape[1:])
        return images[chosen] + noise, labels[chosen]

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        parts = torch.autograd.grad(flow.loss(*flow(x, y)), list(flow.parameters()))
        return torch.cat([part.flatten() for part in parts])

    print("| steps | ranks | way | error / norm | cosine |")
    print("|---|---|---|---|---|")
    for step in range(max(args.steps) + 1):
        if step in args.steps:
            x, y = batch(max(args.ranks))
            each = [gradient(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
            for ranks in args.ranks:
                exact = added(g.double() for g in each[:ranks])
                sent = [g.bfloat16() for g in each[:ranks]]
                nodes = [added(sent[i : i + NODE]) for i in range(0, ranks, NODE)]
                for way, total in (("one ring", added(sent)), ("nodes first", added(nodes))):
                    error = (total.double() - exact).norm() / exact.norm()
                    cosine = torch.nn.functional.cosine_similarity(total.double(), exact, dim=0)
                    print(f"| {step} | {ranks} | {way} | {error:.4f} | {cosine:.5f} |", flush=True)
        optimizer.zero_grad()
        flow.loss(*flow(*batch(64))).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
