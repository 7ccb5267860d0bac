"""The extractors: values, and what they say of a bad weights file."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.features import (
    InceptionFeatures,
    PixelFeatures,
    check_features,
    make_extractor,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published format with random weights: `load_state_dict` is left out while
    torch-fidelity builds the network, and the network's own weights are saved."""
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None
        )
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3(
            "random", ["2048"], feature_extractor_weights_path=str(file)
        )
    for weight in network.parameters():
        if weight.dim() > 1:  # so that an image's features are not all but nothing
            torch.nn.init.kaiming_normal_(weight)
    torch.save(network.state_dict(), file)
    return file


def some_images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_pixels_are_scaled_and_flattened() -> None:
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    extractor = PixelFeatures((2, 1, 2))
    features = extractor(images).pooled
    assert features.dtype == torch.float64
    assert extractor.dim == features.shape[1]
    torch.testing.assert_close(features, torch.tensor([[-1, 1, -0.6, -0.2]], dtype=torch.float64))


def test_pixels_of_large_images_are_refused() -> None:
    with pytest.raises(UserError, match="use inception"):
        make_extractor("pixels", image_shape=(3, 64, 64))


def test_inception_equals_torch_fidelity(weights: Path) -> None:
    images = some_images(4, 3, 16, 16)
    reference = fidelity.FeatureExtractorInceptionV3(
        "reference", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    pooled, logits = reference(images)
    extractor = InceptionFeatures(weights)
    features = extractor(images)
    assert features.pooled.shape == (4, extractor.dim)
    assert features.logits is not None
    assert features.logits.shape == (4, 1008)
    assert pooled.std() > 0.1
    torch.testing.assert_close(features.pooled, pooled, rtol=0, atol=0)
    torch.testing.assert_close(features.logits, logits, rtol=0, atol=0)
    assert extractor.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_spatial_features_are_adms(weights: Path) -> None:
    """mixed_6/conv of the published graph, (B, 17, 17, channels), [..., :7], flattened: layer by
    layer. The published converter's name for it is Mixed_6d.branch1x1."""
    images = some_images(2, 3, 16, 16)
    network = fidelity.FeatureExtractorInceptionV3(
        "reference", ["2048"], feature_extractor_weights_path=str(weights)
    )
    x = fidelity.interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    layers = (
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 "
        "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
    )
    x = (x - 128) / 128
    for layer in layers.split():
        x = getattr(network, layer)(x)
    expected = network.Mixed_6d.branch1x1(x).permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    extractor = InceptionFeatures(weights)
    spatial = extractor(images).spatial
    assert spatial is not None
    assert spatial.shape == (2, extractor.spatial_dim) == (2, 2023)
    assert spatial.std() > 0.1
    torch.testing.assert_close(spatial, expected, rtol=1e-5, atol=1e-5)


def test_grey_images_are_repeated(weights: Path) -> None:
    grey = some_images(1, 1, 16, 16)
    extractor = InceptionFeatures(weights)
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_the_file_of_pytorch_fid(tmp_path: Path) -> None:
    """Its network is torchvision's with 1008 classes, so its file has torchvision's names."""
    from torchvision.models import inception_v3

    network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "pt_inception.pth")
    features = InceptionFeatures(tmp_path / "pt_inception.pth")(some_images(1, 3, 8, 8))
    assert features.pooled.shape == (1, 2048)


@pytest.mark.parametrize("path", [None, Path("nowhere.pth")])
def test_missing_weights(path: Path | None) -> None:
    with pytest.raises(UserError, match=r"pt_inception-2015-12-05-6726825d\.pth"):
        check_features(["inception"], path)


def test_damaged_weights(weights: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.pth is damaged"):
        InceptionFeatures(cut)


class Trap:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_weights_that_hold_code_are_not_run(tmp_path: Path) -> None:
    trap, mark = tmp_path / "trap.pth", tmp_path / "sprung"
    torch.save({"fc.weight": Trap(mark)}, trap)
    with pytest.raises(UserError, match="holds more than tensors"):
        InceptionFeatures(trap)
    trap.write_bytes(pickle.dumps(Trap(mark), protocol=2))
    with pytest.raises(UserError, match="holds more than tensors"):
        InceptionFeatures(trap)
    assert not mark.exists()


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(3)}, [1, 2], torch.zeros(3)])
def test_weights_of_another_network(content: object, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save(content, file)
    with pytest.raises(UserError, match="other weights than FID's Inception"):
        InceptionFeatures(file)
