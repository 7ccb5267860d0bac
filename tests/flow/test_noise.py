import torch

from tarflow_dist.flow.noise import add_gaussian, dequantise, scale_pixels, to_pixels

ALL = torch.arange(256, dtype=torch.uint8)


def test_every_pixel_comes_back_from_the_gaussian_map() -> None:
    x = scale_pixels(ALL)
    assert x[0] == -1
    assert x[255] == 1
    assert torch.equal(to_pixels(x, "gaussian"), ALL)
    half_a_level = 0.49 / 127.5
    assert torch.equal(to_pixels(x + half_a_level, "gaussian"), ALL)


def test_every_bin_of_the_uniform_map_holds_its_pixel() -> None:
    for u in (0.0, 0.5, 0.999):
        x = dequantise(ALL, torch.full((256,), u))
        assert torch.equal(to_pixels(x, "uniform"), ALL)
    assert dequantise(ALL, torch.zeros(256))[0] == -1


def test_values_outside_are_clipped() -> None:
    x = torch.tensor([-3.0, 3.0])
    for noise in ("gaussian", "uniform"):
        assert to_pixels(x, noise).tolist() == [0, 255]


def test_gaussian_noise_has_the_std_asked_for() -> None:
    normal = torch.randn(256, dtype=torch.float64)
    x = add_gaussian(ALL, normal, 0.3)
    torch.testing.assert_close(x - scale_pixels(ALL, torch.float64), 0.3 * normal)
