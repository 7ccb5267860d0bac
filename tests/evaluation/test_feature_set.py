"""Files of statistics: ours, ADM's, pytorch-fid's, and what is no such thing."""

import pickle
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.feature_set import FeatureSet, Gaussian
from tarflow_dist.evaluation.features import Features, PixelFeatures
from tarflow_dist.evaluation.image_sets import NpzImages
from tarflow_dist.evaluation.measure import measure_reference
from tarflow_dist.evaluation.reference_set import Reference, open_reference
from tarflow_dist.files import sha256

SHAPE = (3, 2, 2)
DIM = 12


def moments(dim: int = DIM) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"mu": rng.normal(size=dim), "sigma": np.cov(rng.normal(size=(40, dim)), rowvar=False)}


def images(count: int = 25) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)


def opened(file: Path, extractor: Any = None, shape: tuple[int, int, int] = SHAPE) -> Reference:
    return open_reference(
        str(file),
        "train",
        image_shape=shape,
        num_classes=0,
        extractors=[extractor or PixelFeatures(shape)],
    )


def measured(file: Path, extractor: Any = None) -> FeatureSet:
    extractor = extractor or PixelFeatures(SHAPE)
    reference = opened(file, extractor)
    found = measure_reference(reference, extractor, batch_size=10, device=torch.device("cpu"))
    assert found is not None
    return found


def test_ours_comes_back_as_it_was(tmp_path: Path) -> None:
    pooled = Gaussian(*moments().values())
    features = np.ones((3, DIM), np.float32)
    about = {"count": 7, "features": "pixels", "features_sha256": None, "class_names": ["a", "ü"]}
    FeatureSet(pooled, pooled, features, [1.0, 2.5], about).save(tmp_path / "a.npz")
    there = FeatureSet.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(there.pooled.covariance, pooled.covariance)
    np.testing.assert_array_equal(there.spatial.mean, pooled.mean)  # type: ignore[union-attr]
    np.testing.assert_array_equal(there.features, features)  # type: ignore[arg-type]
    assert (there.split_scores, there.about) == ([1.0, 2.5], about)


def test_pytorch_fids_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "fid.npz", **moments())
    there = measured(tmp_path / "fid.npz")
    np.testing.assert_array_equal(there.pooled.mean, moments()["mu"])
    assert (there.spatial, there.features, there.about["count"]) == (None, None, None)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_adms_file(tmp_path: Path, save: Any) -> None:
    """Moments of the training set for the distances, images for precision and recall."""
    file = tmp_path / "VIRTUAL.npz"
    spatial = {f"{name}_s": value for name, value in moments(5).items()}
    save(file, arr_0=images(), arr_1=np.zeros(25, np.int64), **moments(), **spatial)
    there = measured(file)
    np.testing.assert_array_equal(there.pooled.covariance, moments()["sigma"])
    np.testing.assert_array_equal(there.spatial.mean, spatial["mu_s"])  # type: ignore[union-attr]
    pixels = images().transpose(0, 3, 1, 2).reshape(25, -1) / 127.5 - 1
    np.testing.assert_allclose(there.features, pixels, atol=1e-6)  # type: ignore[arg-type]
    reference = opened(file)
    assert reference.about == {
        "reference": str(file),
        "reference_split": None,
        "reference_images": None,
        "reference_sha256": sha256(file),
    }


def test_images_alone_are_measured(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=images())
    there = measured(tmp_path / "samples.npz")
    pixels = images().transpose(0, 3, 1, 2).reshape(25, -1) / 127.5 - 1
    np.testing.assert_allclose(there.pooled.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(there.pooled.covariance, np.cov(pixels, rowvar=False), rtol=1e-9)
    assert there.about["count"] == 25


def test_grey_images_of_three_channels(tmp_path: Path) -> None:
    """As ADM's files have them, our own samples.npz among them."""
    file, grey, shape = tmp_path / "a.npz", images()[..., :1], (1, 2, 2)
    device = torch.device("cpu")
    np.savez(file, arr_0=grey.repeat(3, axis=3))
    extractor = PixelFeatures(shape)
    reference = opened(file, extractor, shape)
    there = measure_reference(reference, extractor, batch_size=10, device=device)
    assert there is not None
    pixels = grey.reshape(25, 4) / 127.5 - 1
    np.testing.assert_allclose(there.pooled.mean, pixels.mean(0), rtol=1e-12)
    np.savez(file, arr_0=images())
    reference = opened(file, extractor, shape)
    with pytest.raises(UserError, match="colour images and the model's are grey"):
        measure_reference(reference, extractor, batch_size=10, device=device)


def test_a_full_disk_is_named(small_disk: Path) -> None:
    pooled, many = Gaussian(*moments().values()), np.ones((10_000, DIM), np.float32)
    with pytest.raises(OSError, match=r"No space left on device: '.*/samples\.npz'"):
        FeatureSet(pooled, features=many).save(small_disk / "samples.npz")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ranks_share_the_images(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.npz"
    save(file, arr_0=images())
    there = NpzImages(file)
    assert (len(there), there.image_shape) == (25, (3, 2, 2))
    found = []
    monkeypatch.setattr("tarflow_dist.evaluation.image_sets.world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("tarflow_dist.evaluation.image_sets.rank", lambda rank=rank: rank)
        found += list(there.batches(4))
    assert sorted(torch.cat([index for index, _ in found]).tolist()) == list(range(25))
    for index, batch in found:
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), images()[index.tolist()])
    np.testing.assert_array_equal(there.images([7, 3]), images()[[7, 3]])


class Trap:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("whole", [False, True])
def test_pickles_are_not_opened(tmp_path: Path, whole: bool) -> None:
    file, mark = tmp_path / "trap.npz", tmp_path / "sprung"
    if whole:
        file.write_bytes(pickle.dumps({"mu": Trap(mark)}))
    else:
        np.savez(file, mu=np.array([Trap(mark)], object), sigma=np.eye(1))
    with pytest.raises(UserError, match="is no .npz" if whole else "holds pickled objects, and"):
        measured(file)
    assert not mark.exists()


def test_damaged_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **moments())
    data = (tmp_path / "a.npz").read_bytes()
    file = tmp_path / "bad.npz"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for bad in (data[:300], b"", b"no zip", bytes(flipped)):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"bad\.npz (is no \.npz, or|is) damaged"):
            measured(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sigma": np.eye(DIM) * 1e200}, "out of all bounds"),
        ({"sigma": -np.eye(DIM)}, "holds no covariance"),
        ({"sigma": np.triu(np.ones((DIM, DIM)))}, "holds no covariance"),
        ({"sigma": 5 - 4 * np.eye(DIM)}, "holds no covariance"),
        ({"mu": np.zeros(DIM, complex)}, "its mean are complex128, and not real numbers"),
        ({"mu": np.full(DIM, "text")}, "its mean are <U4, and not real numbers"),
        ({"mu": np.zeros((1, DIM))}, "its mean is"),
        ({"features": np.zeros((3, 5))}, r"holds features \(3, 5\) and moments of 12"),
        ({"features": np.full((3, DIM), np.nan)}, "holds features that are not finite"),
        ({"split_scores": np.full(10, np.inf)}, "holds split_scores that are not finite"),
        ({"about": np.array("[]")}, "what makes no sense"),
        ({"about": np.array('{"version": 2}')}, "is of version 2, and this tarflow_dist knows"),
        ({"about": np.array('{"count": "many"}')}, "what makes no sense"),
        ({"about": np.array('{"image_shape": 7}')}, "what makes no sense"),
        ({"about": np.array('{"class_names": ["a", 7]}')}, "what makes no sense"),
        ({"about": np.array('{"class_counts": ["7", "8"]}')}, "what makes no sense"),
        ({"about": np.array("[" * 100_000)}, "is damaged"),
        ({"arr_0": np.zeros((0, 2, 2, 3), np.uint8)}, "holds 0 images, and a comparison needs two"),
    ],
)
def test_numbers_that_no_images_have(tmp_path: Path, change: dict, said: str) -> None:
    np.savez(tmp_path / "a.npz", **(moments() | change))
    with pytest.raises(UserError, match=said):
        measured(tmp_path / "a.npz")


def test_no_room_is_made_for_what_is_not_there(tmp_path: Path) -> None:
    """A header of 10¹² numbers, and none after it."""
    header = BytesIO()
    about = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
    np.lib.format.write_array_header_1_0(header, about)
    np.savez(tmp_path / "a.npz", sigma=np.eye(1))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("mu.npy", header.getvalue())
    with pytest.raises(UserError, match="is damaged"):
        measured(tmp_path / "a.npz")


def test_images_with_a_flipped_bit(tmp_path: Path) -> None:
    """Their checksum tells, and is not looked at where images are read from the middle."""
    file = tmp_path / "a.npz"
    np.savez(file, arr_0=images(24))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        NpzImages(file)


def test_images_that_are_not_there(tmp_path: Path) -> None:
    header = BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (25, 2, 2, 3)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + images(24).tobytes())
    with pytest.raises(UserError, match="is damaged"):
        measured(tmp_path / "a.npz")


def test_files_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, weights=np.zeros(3))
    with pytest.raises(UserError, match=r"holds weights and no statistics of features"):
        measured(file)
    np.savez(file, mu=np.zeros(3), sigma=np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"its mean is \(3,\) and its covariance \(4, 4\)"):
        measured(file)
    np.savez(file, mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(UserError, match="not finite"):
        measured(file)
    np.savez(file, **moments(2048))
    with pytest.raises(UserError, match=r"holds 2048 features .* with 12 \(pixels\)"):
        measured(file)
    np.savez(file, arr_0=np.zeros((5, 4, 4, 3), np.uint8), **moments())
    with pytest.raises(UserError, match="3×4×4 and the model's are 3×2×2"):
        measured(file)
    np.savez(file, arr_0=np.zeros((5, 2, 2, 3)), **moments())
    with pytest.raises(UserError, match="images are uint8"):
        measured(file)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"features": "others"}, "choose --features to match"),
        ({"features": "pixels", "features_sha256": "abc"}, "other weights"),
        ({"image_shape": [3, 4, 4]}, "3×4×4 and the model's are 3×2×2"),
    ],
)
def test_ours_of_something_else(tmp_path: Path, about: dict, message: str) -> None:
    pooled = Gaussian(*moments().values())
    FeatureSet(pooled, about={"count": 3, **about}).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match=message):
        measured(tmp_path / "a.npz")


def test_a_new_extractor_is_a_small_class(tmp_path: Path) -> None:
    class Means:
        name = "means"
        weights_sha256 = None
        dim, spatial_dim = 3, 0

        def __call__(self, images: torch.Tensor) -> Features:
            return Features(images.double().mean(dim=(2, 3)))

    np.savez(tmp_path / "a.npz", arr_0=images())
    there = measured(tmp_path / "a.npz", Means())
    np.testing.assert_allclose(there.pooled.mean, images().mean((0, 1, 2)))


def test_the_file_is_a_plain_zip_of_arrays(tmp_path: Path) -> None:
    pooled = Gaussian(*moments().values())
    FeatureSet(pooled, about={"count": 3}).save(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert sorted(archive.namelist()) == ["about.npy", "mu.npy", "sigma.npy"]
