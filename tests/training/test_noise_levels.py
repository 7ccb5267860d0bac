"""The noise level of each image, and the loss by it."""

import numpy as np
import pytest
import torch
from commands import ROOT
from scipy.stats import kstest, lognorm

from tarflow_dist import config_file as configs
from tarflow_dist.config import Config
from tarflow_dist.data.loader import Batch
from tarflow_dist.training.maximum_likelihood import augment, loss_weight
from tarflow_dist.training.step_metrics import NoiseBands

DIGITS = ROOT / "configs" / "digits.yaml"
CPU = torch.device("cpu")
DISTRIBUTIONS = {
    "uniform": lambda s: (s - 0.1) / 0.3,
    "uniform_squared": lambda s: (s**2 - 0.01) / 0.15,
    "lognormal": lognorm(s=1, scale=np.exp(-1.2)).cdf,
}


def a_config(rule: str = "uniform") -> Config:
    changes = ["model.sigma=null", "model.sigma_range=[0.1, 0.4]", f"train.noise_levels={rule}"]
    return configs.load(DIGITS, changes)


def a_batch(index: torch.Tensor, epoch: int = 0) -> Batch:
    grey = torch.full((len(index), 1, 8, 8), 100, dtype=torch.uint8)
    return Batch(grey, index % 10, index, torch.full_like(index, epoch))


@pytest.mark.parametrize("rule", DISTRIBUTIONS)
def test_each_image_has_noise_of_a_level_of_its_own(rule: str) -> None:
    x, _, sigma = augment(a_batch(torch.arange(4000)), a_config(rule), CPU)
    assert sigma is not None
    assert kstest(sigma.numpy(), DISTRIBUTIONS[rule]).pvalue > 0.01
    noise = (x - (100 / 127.5 - 1)) / sigma[:, None, None, None]
    assert float(noise.std()) == pytest.approx(1, abs=0.005)
    assert noise.flatten(1).std(dim=1).min() > 0.6


def test_it_is_a_function_of_image_and_epoch() -> None:
    index = torch.arange(50)
    _, _, sigma = augment(a_batch(index), a_config(), CPU)
    _, _, others = augment(a_batch(index.flip(0)[10:]), a_config(), CPU)
    assert torch.equal(sigma.flip(0)[10:], others)
    _, _, later = augment(a_batch(index, epoch=1), a_config(), CPU)
    assert (sigma != later).all()


def test_the_loss_of_four_bands() -> None:
    sigma = torch.tensor([0.1, 0.12, 0.2, 0.399, 0.4, 2.0, 0.01])
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0])
    bands = NoiseBands((0.1, 0.4), CPU)
    bands.add(sigma[:3], losses[:3])
    bands.add(sigma[3:], losses[3:])
    assert bands.figures() == {
        "loss/sigma0.1-0.175": pytest.approx(4.0),
        "loss/sigma0.175-0.25": pytest.approx(3.0),
        "loss/sigma0.325-0.4": pytest.approx(5.0),
    }


def test_weights() -> None:
    sigma = torch.tensor([0.1, 0.3])
    assert loss_weight("none", sigma).tolist() == [1, 1]
    assert loss_weight("sigma", sigma).tolist() == pytest.approx([0.1, 0.3])
    assert loss_weight("sigma_squared", sigma).tolist() == pytest.approx([0.01, 0.09])
