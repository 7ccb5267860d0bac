import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tarflow_dist import TarFlow
from tarflow_dist.errors import UserError, refusal
from tarflow_dist.flow.noise import scale_pixels

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "width": 32,
    "num_blocks": 2,
    "layers_per_block": 1,
    "head_dim": 16,
    "num_classes": 3,
    "sigma": 0.1,
}


def small_flow(**changes: object) -> TarFlow:
    torch.manual_seed(0)
    flow = TarFlow(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    flow = small_flow().to(dtype)
    flow.provenance = {"images": 5}
    flow.save_pretrained(tmp_path)
    loaded = TarFlow.from_pretrained(tmp_path)
    assert loaded.config == flow.config
    assert loaded.provenance == {"images": 5}
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, flow.state_dict()[name])
    loaded.to(torch.device("cpu")).double()


def test_a_full_disk_is_named_and_nothing_is_left(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as raised:
        small_flow(width=512).save_pretrained(small_disk)
    assert str(refusal(raised.value)).startswith(f"{small_disk / 'model.safetensors'}: ")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        *("cut", "no weights", "no config", "bad config", "other size", "other network"),
        *("two types", "whole numbers"),
    ],
)
def test_damage_is_told_in_a_sentence(damage: str, tmp_path: Path) -> None:
    small_flow().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    saved = json.loads(config.read_text())
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "bad config":
        config.write_text('{"model": {"width": 32, "depth": 3}}')
    elif damage in ("two types", "whole numbers"):
        tensors = load_file(weights)
        if damage == "two types":
            tensors["blocks.0.proj_in.weight"] = tensors["blocks.0.proj_in.weight"].half()
        else:
            tensors = {name: tensor.long() for name, tensor in tensors.items()}
        save_file(tensors, weights)
    elif damage == "other size":
        config.write_text(json.dumps(saved | {"model": saved["model"] | {"width": 64}}))
    else:
        config.write_text(json.dumps(saved | {"model": saved["model"] | {"num_blocks": 1}}))
    with pytest.raises(UserError) as caught:
        TarFlow.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sample_is_the_same_in_every_batch() -> None:
    flow = small_flow().double()
    together = flow.sample([0, 1, 2], guidance=1.0, index=torch.tensor([5, 9, 2]))
    assert together.shape == (3, 8, 8, 1)
    assert together.dtype == torch.uint8
    for row, (label, index) in enumerate([(0, 5), (1, 9), (2, 2)]):
        alone = flow.sample([label], guidance=1.0, index=torch.tensor([index]))
        assert torch.equal(alone[0], together[row])
    other = flow.sample([0, 1, 2], guidance=1.0, index=torch.tensor([5, 9, 2]), seed=1)
    assert not torch.equal(other, together)


def test_sampling_is_noise_decode_denoise_round() -> None:
    from tarflow_dist import rng

    flow = small_flow()
    y = torch.tensor([0, 2])
    noise = rng.normal((16, 4), seed=7, purpose="sample noise", index=torch.arange(2)).float()
    x = flow.denoise(flow.decode(noise, y, guidance=0.5), y)
    images = flow.sample(y, guidance=0.5, seed=7).permute(0, 3, 1, 2)
    clipped = x.clamp(-1, 1)
    assert (scale_pixels(images) - clipped).abs().max() <= 0.5 / 127.5 + 1e-6
    rough = flow.sample(y, guidance=0.5, seed=7, denoise=False)
    assert not torch.equal(rough.permute(0, 3, 1, 2), images)


def test_unconditional_and_uniform_models_sample() -> None:
    flow = small_flow(num_classes=0, noise="uniform", sigma=None)
    assert flow.sample(index=torch.arange(4)).shape == (4, 8, 8, 1)


def test_samples_that_are_not_finite_are_named() -> None:
    flow = small_flow()
    with torch.no_grad():
        flow.blocks[0].class_embed[1] = torch.nan
    with pytest.raises(ValueError, match=r"samples \[9\] are not finite .* in 5 attempts"):
        flow.sample([0, 1, 2], index=torch.tensor([5, 9, 2]))


def test_only_samples_that_ran_away_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample 9 overflows once and sample 2 twice; what they become depends on themselves alone."""
    flow = small_flow()
    expected = flow.sample([0, 1, 2], index=torch.tensor([5, 9, 2]))
    decode, calls, shapes = flow.decode, [], []

    def faulty(z: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(z)
        x = decode(z, *args, **kwargs)
        shapes.append(x.shape)
        for row, times in faults.items():
            if len(calls) <= times:
                x[row, 0, 3, 3] = torch.inf if row == 1 else 1e5
        return x

    monkeypatch.setattr(flow, "decode", faulty)
    faults = {1: 1, 2: 2}
    images = flow.sample([0, 1, 2], index=torch.tensor([5, 9, 2]))
    assert flow.redrawn == 2
    assert torch.equal(images[0], expected[0])
    assert not torch.equal(images[1], expected[1])
    assert len(set(shapes)) == 1
    assert torch.equal(calls[2][2], flow.noise_of(torch.tensor([2]), seed=0, attempt=2)[0])
    calls.clear()
    faults = {0: 1}
    alone = flow.sample([1], index=torch.tensor([9]))
    assert torch.equal(alone[0], images[1])


def test_one_number_is_no_list_of_labels() -> None:
    with pytest.raises(ValueError, match=r"give \[4\]"):
        small_flow(num_classes=10).sample(4)  # type: ignore[arg-type]


def test_no_samples_are_an_empty_batch() -> None:
    """As a rank may draw of a grid that is smaller than the number of ranks."""
    flow = small_flow()
    assert flow.sample(torch.arange(0), seed=0).shape == (0, 8, 8, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 10**6),
        ("layers_per_block", 10**7),
        ("width", 6.4e9),
        ("width", 6_400_000_000),
        ("image_size", "32"),
        ("image_size", True),
        ("num_classes", 10**12),
        ("layers_per_block", [1, 10**9]),
        ("layers_per_block", []),
        ("sigma", "0.1"),
        ("sigma", float("nan")),
        ("sigma_range", [0.3, 0.1]),
        ("sigma_range", 7),
        ("volume_preserving", 1),
    ],
)
def test_sizes_out_of_all_bounds_are_refused_at_once(
    field: str, value: object, tmp_path: Path
) -> None:
    small_flow().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["xxh3_128"]
    content["model"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"describes no TARFlow: {field} "):
        TarFlow.from_pretrained(tmp_path)
