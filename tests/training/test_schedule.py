import math

import pytest

from tarflow_dist.config import OptimizerConfig
from tarflow_dist.training.schedule import ema_decay, learning_rate

TOTAL = 10_000


def config(**changes: object) -> OptimizerConfig:
    return OptimizerConfig(lr=1.0, min_lr=0.1, warmup_images=1000, **changes)


def test_warm_up_is_linear() -> None:
    assert learning_rate(config(), 250, TOTAL) == pytest.approx(0.25)
    assert learning_rate(config(), 1000, TOTAL) == pytest.approx(1.0)


def test_cosine_ends_at_its_lowest() -> None:
    assert learning_rate(config(), 5500, TOTAL) == pytest.approx(0.55)
    assert learning_rate(config(), TOTAL, TOTAL) == pytest.approx(0.1)
    assert learning_rate(config(), TOTAL + 99, TOTAL) == pytest.approx(0.1)


def test_constant_stays() -> None:
    for images in (1000, 5500, TOTAL):
        assert learning_rate(config(schedule="constant"), images, TOTAL) == 1.0


def test_average_halves_in_a_halflife_at_any_batch_size() -> None:
    c = config(ema_halflife_images=800)
    for batch in (50, 100, 400):
        kept = math.prod(ema_decay(c, 100_000 + n, batch) for n in range(batch, 801, batch))
        assert kept == pytest.approx(0.5)


def test_average_looks_back_little_early_on() -> None:
    assert ema_decay(config(), 100, 5) == pytest.approx(0.5)  # half-life 5 of 100 images
