"""Runs what is compared in turn, so that whatever else the machine does meets all alike."""

from collections.abc import Callable, Mapping
from statistics import median


def alternate(runs: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """What each returns, a figure a round. Every other round goes backwards, so that none always
    comes after the same one."""
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            figures[name].append(runs[name]())
    return figures


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))
