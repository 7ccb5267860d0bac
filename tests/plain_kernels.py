"""What the kernels of tarflow_dist/flow/triton_kernels.py compute, in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow_dist.flow.guidance import Guidance


@torch.library.custom_op("plain::attend", mutates_args={"cache"})
def attend(qkv: Tensor, cache: Tensor, place: Tensor, logit_scale: Tensor) -> Tensor:
    _, batch, heads, length, head_dim = cache.shape
    q, k, v = qkv.view(batch, 3, heads, 1, head_dim).unbind(1)
    cache[0].index_copy_(2, place, k)
    cache[1].index_copy_(2, place, v)
    seen = torch.arange(length, device=qkv.device) <= place
    q = q.to(logit_scale.dtype) * logit_scale[:, None, None, None]
    logits = q @ cache[0].to(q.dtype).transpose(2, 3)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    values = torch.where(seen[:, None], cache[1].to(q.dtype), 0)
    return (weights @ values).to(qkv.dtype).transpose(1, 2).reshape(batch, 1, heads * head_dim)


@torch.library.custom_op("plain::add_norm", mutates_args=())
def add_norm(
    x: Tensor, change: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + change
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


@torch.library.custom_op("plain::solve_patch", mutates_args=())
def solve_patch(
    out: Tensor, z: Tensor, weight: Tensor, rule: str, guide: str
) -> tuple[Tensor, Tensor]:
    alpha, mu = out.to(z.dtype).tensor_split([out.shape[-1] - z.shape[-1]], dim=-1)
    alpha = alpha if alpha.numel() else torch.zeros_like(mu)
    if len(out) == len(z):
        scale = alpha.exp()
    else:
        guidance = Guidance(float(weight), rule=rule, guide=guide)
        mu, scale = guidance.combine(mu, alpha, 1, 2)
    x = torch.addcmul(mu, z[:, None], scale)
    return x[:, 0].clone(), x.to(out.dtype).repeat(len(out) // len(z), 1, 1)


KERNELS = {"attend": attend, "add_norm": add_norm, "solve_patch": solve_patch}
