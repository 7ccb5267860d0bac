"""Run under torchrun by test_convert.py: another program's training, in plain DeepSpeed. It saves a
ZeRO checkpoint its own way, and beside it the weights that must come out."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from tarflow_dist import distributed
from tarflow_dist.flow.model import Flow

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
distributed.init()
saved, stage = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
flow = Flow(
    image_size=8,
    patch_size=2,
    in_channels=1,
    width=64,
    num_blocks=2,
    layers_per_block=[1, 2],
    num_classes=3,
    sigma=0.1,
)
flow.blocks[1].class_embed = flow.blocks[0].class_embed  # tied, which other programs may do
engine, _, _, _ = deepspeed.initialize(
    model=flow,
    optimizer=torch.optim.AdamW(flow.parameters(), lr=1e-2),
    config={
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    },
)
for _ in range(2):
    engine.backward(flow.loss(*engine(torch.randn(2, 1, 8, 8), torch.tensor([0, -1]))))
    engine.step()
engine.save_checkpoint(str(saved))
weights = {
    name: safe_get_full_fp32_param(p) if stage else p.detach()
    for name, p in flow.named_parameters(remove_duplicate=False)
}
if torch.distributed.get_rank() == 0:
    torch.save({**weights, "var": flow.var}, saved.parent / "expected.pt")
distributed.shutdown()
