"""The CPU's kernel against torch's own operations in float64."""

import ctypes
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from tarflow_dist.flow import native
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.kv_cache import TorchTransformer, cached_transformer
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.native import NativeTransformer, build

Model = TypeVar("Model", bound=nn.Module)
COMPILE = "from tarflow_dist.flow.native import build; assert build.library() is not None"
PATCH_DIM, CLASSES = 3, 4
INSTRUCTIONS = ("DEFAULT", "AVX2", "AVX512")
pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tarflow_dist"


def compile_anew() -> ctypes.CDLL | None:
    """As a new process would."""
    return build.library.__wrapped__()


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of CPU that this one can stand in for."""
    here = torch.backends.cpu.get_cpu_capability()
    known = INSTRUCTIONS[: INSTRUCTIONS.index(here) + 1] if here in INSTRUCTIONS else ("DEFAULT",)
    if request.param not in known:
        pytest.skip(f"this CPU has {here} only")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    found = compile_anew()
    assert found is not None
    monkeypatch.setattr(native, "library", lambda: found)
    return request.param


def randomized(model: Model) -> Model:
    for parameter in model.requires_grad_(False).parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_block(*, width: int, head_dim: int, num_layers: int = 2, places: int = 40) -> FlowBlock:
    torch.manual_seed(width + head_dim)
    return randomized(
        FlowBlock(
            num_patches=places,
            patch_dim=PATCH_DIM,
            width=width,
            num_layers=num_layers,
            head_dim=head_dim,
            num_classes=CLASSES,
            reverse=True,
            volume_preserving=False,
        )
    )


def windows(chance: random.Random, rows: int, places: int) -> Iterator[Tensor]:
    """Where tokens go, call by call, (rows, S): each sequence starts where it likes, goes back at
    times, and has no gaps."""
    reached = [0] * rows
    while min(reached) < places:
        size = chance.randint(1, 9)
        starts = [max(0, min(r - chance.randint(0, 2), places - size)) for r in reached]
        reached = [max(r, start + size) for r, start in zip(reached, starts, strict=True)]
        yield torch.tensor([list(range(start, start + size)) for start in starts])


@pytest.mark.parametrize(("width", "head_dim"), [(16, 8), (72, 24), (128, 64), (192, 96)])
def test_tokens_come_out_as_from_torch(instructions: str, width: int, head_dim: int) -> None:
    block, rows, places = random_block(width=width, head_dim=head_dim), 5, 40
    temperature = torch.tensor([1.0, 1.0, 0.7, 1.5, 1.0]).view(rows, 1, 1, 1)
    y = torch.tensor([0, 3, -1, 2, -1])
    fast = NativeTransformer(block, block.condition(y), rows, temperature)
    block = block.double()
    reference = TorchTransformer(block, block.condition(y), rows, temperature.double())
    for at in windows(random.Random(width), rows, places):
        x = torch.randn(rows, at.shape[1], PATCH_DIM)
        expected = reference(x.double(), at, int(at.max()) + 1)
        result = fast(x, at, int(at.max()) + 1)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=3e-5)


def test_single_tokens() -> None:
    block, rows = random_block(width=64, head_dim=32), 4
    y = torch.tensor([2, 1, 0, -1])
    fast = NativeTransformer(block, block.condition(y), rows, None)
    block = block.double()
    reference = TorchTransformer(block, block.condition(y), rows, None)
    for i in range(40):
        x = torch.randn(rows, 1, PATCH_DIM)
        expected = reference(x.double(), i, i + 1)
        torch.testing.assert_close(fast(x, i, i + 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_bits_depend_neither_on_batch_nor_window_nor_threads() -> None:
    block, places = random_block(width=128, head_dim=64), 40
    x = torch.randn(7, places, PATCH_DIM)
    at = torch.arange(places).expand(7, places)
    together = NativeTransformer(block, None, 7, None)(x, at, places)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        alone = NativeTransformer(block, None, 1, None)
    finally:
        torch.set_num_threads(threads)
    one_by_one = [alone(x[3:4, i : i + 1], i, i + 1) for i in range(places)]
    assert torch.equal(torch.cat(one_by_one, dim=1), together[3:4])


def test_inputs_that_are_not_finite_stay_in_their_sequence() -> None:
    block = random_block(width=64, head_dim=32)
    x = torch.randn(3, 1, PATCH_DIM)
    clean = NativeTransformer(block, None, 3, None)(x, 0, 1)
    x[1, 0, 1] = torch.nan
    result = NativeTransformer(block, None, 3, None)(x, 0, 1)
    assert result[1].isnan().all()
    assert torch.equal(result[::2], clean[::2])


def test_large_activations() -> None:
    """GELU far from 0 is 0 or its argument, and a softmax with one large logit is a choice."""
    block = random_block(width=64, head_dim=32)
    for parameter in block.parameters():
        parameter.mul_(5)
    x = 50 * torch.randn(2, 8, PATCH_DIM)
    at = torch.arange(8).expand(2, 8)
    result = NativeTransformer(block, None, 2, None)(x, at, 8)
    expected = TorchTransformer(block.double(), None, 2, None)(x.double(), at, 8)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)


def small_flow() -> Flow:
    torch.manual_seed(0)
    sizes = {"image_size": 4, "patch_size": 2, "width": 16, "head_dim": 8, "sigma": 0.1}
    return randomized(Flow(**sizes, num_blocks=1, layers_per_block=1))


def test_only_float32_takes_the_kernel() -> None:
    (block,) = small_flow().blocks
    assert isinstance(block, FlowBlock)
    assert isinstance(cached_transformer(block, None, 1, None), NativeTransformer)
    block.attn_blocks.double()
    assert isinstance(cached_transformer(block, None, 1, None), TorchTransformer)
    assert isinstance(cached_transformer(block.bfloat16(), None, 1, None), TorchTransformer)


def test_torchs_defaults_for_new_tensors_change_nothing() -> None:
    flow = small_flow()
    z = torch.randn(3, 4, 12)
    expected = flow.decode(z)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(flow.decode(z), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", "ended with 1$"),
        ("true", ""),
        ("/no/such/compiler --at-all", "there is no C\\+\\+ compiler /no/such/compiler"),
        ("c++ '", "No closing quotation"),
        ("sh -c 'echo what is wrong >&2; echo and where >&2; exit 3'", "what is wrong\nand where"),
    ],
)
def test_a_cpu_without_a_compiler_says_so_and_samples(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(
        UserWarning, match=f"several times slower .* can't be compiled: (.|\n)*{reason}"
    ):
        assert compile_anew() is None
    monkeypatch.setattr(native, "library", lambda: None)
    flow = small_flow()
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-5)


def test_what_was_compiled_serves_later_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_anew() is not None
    monkeypatch.setenv("CXX", "false")
    assert compile_anew() is not None


@pytest.mark.parametrize("damaged", [b"no library", b""])
def test_a_damaged_library_is_made_anew(own_cache: Path, damaged: bytes) -> None:
    subprocess.run([sys.executable, "-c", COMPILE], check=True)
    (file,) = own_cache.iterdir()
    file.write_bytes(damaged)
    assert compile_anew() is not None
    assert len(file.read_bytes()) > len(damaged)


def test_processes_that_compile_at_once_leave_one_library(own_cache: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", COMPILE]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list(own_cache.iterdir())) == 1


def test_a_cache_that_others_write_to_is_not_used(own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    assert compile_anew() is not None
    assert list(own_cache.iterdir()) == []
