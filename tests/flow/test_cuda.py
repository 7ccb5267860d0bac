"""Every public method on a GPU, as far as a pretended one tells (tests/pretended_cuda.py)."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from golden_model import CASES, golden_flow, golden_vectors, settings
from pretended_cuda import CudaTensor, pretended_cuda
from torch import Tensor

from tarflow_dist.flow import native
from tarflow_dist.flow.jacobi import Solver
from tarflow_dist.models.tarflow import TarFlow

LABELS = [1, 2, -1, 4, 9]
GUIDANCES = {
    "none": {},
    "annealed": {"guidance": 1.5, "annealed": True},
    "temperature": {"guidance": 1.0, "attn_temp": 0.7, "guide": "mu"},
    "gaussian": {"guidance": 2.0, "rule": "gaussian", "guide_blocks": [0, 2]},
}
WINDOWS = [Solver(4, 1e-3)] * 3


def small_flow() -> TarFlow:
    torch.manual_seed(0)
    flow = TarFlow(
        image_size=16,
        patch_size=4,
        width=32,
        num_blocks=3,
        layers_per_block=2,
        head_dim=16,
        num_classes=10,
        sigma=0.1,
    )
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    return flow.requires_grad_(False)


def images() -> Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents() -> Tensor:
    return torch.randn(5, 16, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("given", [list, torch.tensor], ids=["list", "tensor"])
@pytest.mark.parametrize(
    "call",
    [
        lambda flow, y: flow.encode(images(), y),
        lambda flow, y: flow.log_prob(images(), y),
        lambda flow, y: flow.denoise(images(), y),
        lambda flow, y: flow.decode(latents(), y),
        lambda flow, y: flow.sample(y, guidance=1.0, seed=3),
    ],
    ids=["encode", "log_prob", "denoise", "decode", "sample"],
)
def test_what_is_given_on_the_host_is_moved_to_the_model(
    call: Callable[[TarFlow, object], Tensor], given: Callable
) -> None:
    expected = call(small_flow(), torch.tensor(LABELS))
    flow = small_flow()
    with pretended_cuda():
        result = call(flow.to("cuda"), given(LABELS))
        assert isinstance(result, CudaTensor)
    if result.dtype == torch.uint8:
        assert (result.host.int() - expected.int()).abs().max() <= 1
    else:
        torch.testing.assert_close(result.host, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("solvers", [None, WINDOWS], ids=["sequential", "windows"])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_recorded_decoding_is_the_plain_one(
    guidance: dict, solvers: list[Solver] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "can_run", lambda block: False)
    flow = small_flow()
    expected = flow.decode(latents(), LABELS, **guidance, solvers=solvers)
    with pretended_cuda() as card:
        result = flow.to("cuda").decode(latents(), LABELS, **guidance, solvers=solvers)
        assert card.graphs
    torch.testing.assert_close(result.host, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_patch_takes_8_kernels_a_layer_and_4(dtype: torch.dtype, guidance: dict) -> None:
    with pretended_cuda() as card:
        small_flow().to("cuda", dtype).decode(latents(), LABELS, **guidance)
    patches, layers = 15, 2
    for graph in card.graphs:
        kernels = graph.kernels()
        for_all_patches = kernels.total() - patches * (8 * layers + 4)
        assert for_all_patches <= 12, kernels


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_decoding_is_the_published_one(case: str) -> None:
    vectors = golden_vectors(case)
    with pretended_cuda() as card:
        flow = golden_flow(case, torch.float64).to("cuda")
        for label, arguments in settings(case)["reverse"].items():
            x = flow.decode(vectors["noise"], vectors.get("y"), **arguments)
            assert (x.host - vectors[f"reverse.{label}"]).abs().max() < 1e-10
        assert card.graphs


def test_a_sequential_decoding_waits_for_its_labels_alone() -> None:
    with pretended_cuda() as card:
        flow, z, y = small_flow().to("cuda"), latents().to("cuda"), torch.tensor(LABELS).to("cuda")
        card.waits.clear()
        flow.decode(z, y, guidance=1.0)
    assert card.waits.total() == 1, card.waits


@pytest.mark.parametrize(("gigabytes", "parts"), [(80, 1), (0, 5)])
def test_denoising_takes_as_many_images_as_the_card_holds(gigabytes: int, parts: int) -> None:
    memory = mock.Mock(return_value=(0, gigabytes * 2**30))
    with pretended_cuda(), mock.patch("torch.cuda.mem_get_info", memory):
        flow, seen = small_flow().to("cuda"), []
        flow.blocks[0].register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
        flow.denoise(images(), LABELS)
    assert len(seen) == parts


def test_the_pretended_card_refuses_what_a_card_refuses() -> None:
    with pretended_cuda() as card:
        there = torch.ones(3).to("cuda")
        with pytest.raises(RuntimeError, match="mixes devices"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="not allowed in a recording"):
            card.record(lambda: print(float(there.sum())), [there])
