"""Computes or compiles the kernels: see tests/flow/test_triton_kernels.py."""

import sys
from itertools import product
from typing import get_args
from unittest import mock

import plain_kernels
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tarflow_dist.flow import cuda_graphs, cuda_sequential, inverse, native, triton_kernels
from tarflow_dist.flow.guidance import Guide, Rule
from tarflow_dist.flow.model import Flow

ATTENDED = [  # batch, heads, N, head_dim, place
    *[(3, 2, 16, 16, 0), (3, 2, 16, 16, 7), (2, 3, 70, 64, 65)],
    (1, 2, 300, 24, 299),  # several parts, and channels that are no power of two
]
BOUNDS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-2}
SOLVED = [  # whether there is guidance and α, the rule, what is guided
    *product((True,), (True, False), get_args(Rule), get_args(Guide)),
    *product((False,), (True, False), ("linear",), ("both",)),
]
TYPES = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32"}  # of values, of sums


def assert_close(result: Tensor, expected: Tensor) -> None:
    bound = BOUNDS[expected.dtype]
    torch.testing.assert_close(result, expected, rtol=bound, atol=bound)


def compute() -> None:
    torch.manual_seed(0)
    for dtype, (batch, heads, length, head_dim, place) in product(BOUNDS, ATTENDED):
        qkv = torch.randn(batch, 1, 3 * heads * head_dim).to(dtype)
        cache = torch.randn(2, batch, heads, length, head_dim).to(dtype)
        cache[:, :, :, place:] = torch.nan  # what is not there yet is never seen
        scale = torch.rand(batch).to(torch.promote_types(dtype, torch.float32))
        caches = cache.clone(), cache.clone()
        given = torch.tensor([place]), scale
        out = triton_kernels.attend(qkv, caches[0], *given)
        assert_close(out, plain_kernels.attend(qkv, caches[1], *given))
        assert torch.equal(caches[0][:, :, :, : place + 1], caches[1][:, :, :, : place + 1])
        assert caches[0][:, :, :, place + 1 :].isnan().all()
    for dtype in BOUNDS:
        x, change = torch.randn(2, 4, 1, 48).to(dtype)
        weight, bias = torch.randn(2, 48).to(dtype)
        results = triton_kernels.add_norm(x, change, weight, bias, 1e-5)
        expected = plain_kernels.add_norm(x, change, weight, bias, 1e-5)
        for result, plain in zip(results, expected, strict=True):
            assert_close(result, plain)
    for dtype, (guided, has_alpha, *how) in product(BOUNDS, SOLVED):
        batch, dim = 3, 12
        out = torch.randn(batch * (1 + guided), 1, dim * (1 + has_alpha)).to(dtype)
        accurate = torch.promote_types(dtype, torch.float32)
        z, weight = torch.randn(batch, dim, dtype=accurate), torch.tensor([1.7], dtype=accurate)
        results = triton_kernels.solve_patch(out, z, weight, *how)
        expected = plain_kernels.solve_patch(out, z, weight, *how)
        for result, plain in zip(results, expected, strict=True):
            assert_close(result, plain)
    for dtype, guidance in product((torch.float64, torch.float32), (0.0, 1.5)):
        decode(dtype, guidance)
    print(len(BOUNDS) * (len(ATTENDED) + 1 + len(SOLVED)) + 4, "cases agree")


def decode(dtype: torch.dtype, guidance: float) -> None:
    """A model's sequential inverse by these kernels, what a card would replay done at once."""
    flow = Flow(
        image_size=12,
        patch_size=3,
        width=32,
        num_blocks=2,
        layers_per_block=2,
        head_dim=16,
        num_classes=3 if guidance else 0,
        sigma=0.1,
    )
    flow = flow.to(dtype).requires_grad_(False)
    for parameter in flow.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    z, y = torch.randn(3, 16, 27, dtype=dtype), [0, 2, -1] if guidance else None
    with (
        mock.patch.object(inverse, "has_graphs", return_value=True),
        mock.patch.object(cuda_graphs, "record", lambda work, changes: work),
        mock.patch.object(cuda_sequential, "PATCHES", 4),
    ):
        x = flow.decode(z, y, guidance=guidance)
    with mock.patch.object(native, "can_run", return_value=False):
        assert_close(x, flow.decode(z, y, guidance=guidance))


def compile_() -> None:
    compiled = 0
    for (dtype, accurate), parts, capability in product(TYPES.items(), (1, 16), (80, 90)):
        value, sum_, number = f"*{dtype}", f"*{accurate}", "i32"
        found = {"found": sum_, "out": value, "head_dim": number}
        cache = {"qkv": value, "cache": value, "place": "*i64", "logit_scale": sum_}
        rows = dict.fromkeys(("x", "change", "weight", "bias", "total", "normed"), value)
        kind = tl.float64 if accurate == "fp64" else tl.float32
        sizes = {"dims": 64, "parts": parts}
        for name, arguments, constants in (
            ("_attend", cache | found | dict.fromkeys(("heads", "length"), number), {"tile": 64}),
            ("_combine", found, {}),
            ("_add_norm", rows | {"width": number, "eps": "fp32"}, {"accurate": kind}),
        ):
            constants = constants | ({"padded": 1024} if name == "_add_norm" else sizes)
            compiled += compiles(name, arguments, constants, capability)
    for (dtype, accurate), capability, how in product(TYPES.items(), (80, 90), SOLVED):
        values = {"out": f"*{dtype}", "token": f"*{dtype}", "batch": "i32", "dim": "i32"}
        values |= dict.fromkeys(("z", "weight", "x"), f"*{accurate}")
        names = ("guided", "has_alpha", "rule", "guide")
        constants = dict(zip(names, how, strict=True)) | {"padded": 16}
        compiled += compiles("_solve_patch", values, constants, capability)
    print(compiled, "kernels compiled")


def compiles(name: str, arguments: dict, constants: dict, capability: int) -> bool:
    kernel = getattr(triton_kernels, name)
    given = arguments | dict.fromkeys(constants, "constexpr")
    signature = {argument: given[argument] for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return bool(binary.asm["cubin"])


{"compute": compute, "compile": compile_}[sys.argv[1]]()
