import subprocess
import sys

import numpy as np
import pytest
import torch

from tarflow_dist import rng

WORD = 0xFFFFFFFF
# Random123's known answers for philox4x32-10 (kat_vectors): counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    words = rng.philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def draw(index: list[int], **kwargs: object) -> torch.Tensor:
    arguments = {"seed": 0, "purpose": "test", "epoch": 0, **kwargs}
    return rng.normal((3, 5, 5), index=torch.tensor(index), **arguments)


def test_an_image_has_its_own_numbers_in_every_batch() -> None:
    together = draw([7, 2, 900, 2**40 + 7])
    for row, index in enumerate([7, 2, 900, 2**40 + 7]):
        assert torch.equal(together[row], draw([index])[0])


def test_every_argument_gives_other_numbers() -> None:
    variants = [
        draw([7]),
        draw([8]),
        draw([7 + 2**32]),
        draw([7], seed=1),
        draw([7], purpose="other"),
        draw([7], epoch=1),
        draw([1], epoch=7),
        draw([0], seed=7),
    ]
    for i, first in enumerate(variants):
        for second in variants[:i]:
            assert not torch.isclose(first, second).any()


def test_epochs_may_differ_within_a_batch() -> None:
    mixed = draw([4, 4], epoch=torch.tensor([0, 3]))
    assert torch.equal(mixed[0], draw([4])[0])
    assert torch.equal(mixed[1], draw([4], epoch=3)[0])


def test_distributions() -> None:
    from scipy.stats import kstest

    index = torch.arange(400)
    normal = rng.normal((10, 10), seed=3, purpose="n", index=index).numpy().ravel()
    uniform = rng.uniform((10, 10), seed=3, purpose="u", index=index).numpy().ravel()
    assert kstest(normal, "norm").pvalue > 1e-3
    assert kstest(uniform, "uniform").pvalue > 1e-3
    assert uniform.min() >= 0
    assert uniform.max() < 1
    neighbours = np.corrcoef(normal[:-1], normal[1:])[0, 1]
    assert abs(neighbours) < 0.02


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, tarflow_dist; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
