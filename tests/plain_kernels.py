"""What the kernels of tarflow_dist/flow/triton_kernels.py compute, in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
