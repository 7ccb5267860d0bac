"""Run under torchrun by test_health.py: trains with something going wrong in the middle.

bad_hour_worker.py INJECTION CONFIG [key=value …]
"""

import math
import time
from pathlib import Path

from torch import Tensor
from torch.nn import Module

from tarflow_dist import config_file as configs
from tarflow_dist import distributed
from tarflow_dist.errors import run_command
from tarflow_dist.flow.model import Flow
from tarflow_dist.training import loop, setup
from tarflow_dist.training.checkpoint import RunState
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.step import Stepper

BAD_STEPS = (7, 8)
BLOCK = 1


def inject(what: str, engine: Engine) -> None:
    """Makes the steps of BAD_STEPS (counted in this process, from 1) go wrong, on the last rank."""
    step, last = 0, distributed.world_size() - 1
    flow = engine.flow
    original = Stepper.step

    def counted(self: Stepper, state: RunState) -> str | None:
        nonlocal step
        step += 1
        here = step in BAD_STEPS and distributed.rank() == last
        if what == "weights" and step == BAD_STEPS[0]:
            # the fp32 ones, as a broken memory would: they stay so
            for _, parameter in flow.blocks[BLOCK].named_parameters():
                engine._zero_state.share(parameter, None)[1].data.fill_(math.nan)
            engine._zero_state.spread()
        if what == "hang" and here:
            time.sleep(600)
        return original(self, state)

    def is_bad() -> bool:
        return step in BAD_STEPS and distributed.rank() == last

    def watch(layer: Module, given: tuple, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(spoil)

    def spoil(gradient: Tensor) -> Tensor:
        """Of one image, at one place."""
        if is_bad():
            gradient = gradient.clone()
            gradient[0, 5, 3] = math.inf
        return gradient

    Stepper.step = counted  # type: ignore[method-assign]
    if what == "loss":
        loss = Flow.loss
        Flow.loss = lambda *a: loss(*a) * (math.nan if is_bad() else 1)  # type: ignore[method-assign]
    if what == "gradient":
        layer = flow.blocks[BLOCK].attn_blocks[-1].mlp.main[0]
        layer.register_forward_hook(watch)
    if what == "spike":
        loss = Flow.loss
        Flow.loss = lambda *a: loss(*a) + (9 if is_bad() else 0)  # type: ignore[method-assign]


def main(argv: list[str]) -> int:
    what, file, *overrides = argv
    config = configs.load(Path(file), overrides)
    device = distributed.init()
    build = setup.build_engine

    def build_badly(*arguments: object) -> Engine:
        engine = build(*arguments)  # type: ignore[arg-type]
        inject(what, engine)
        return engine

    loop.build_engine = build_badly  # type: ignore[assignment]
    finished = loop.train(config, device)
    distributed.shutdown()
    return 0 if finished else 75


if __name__ == "__main__":
    run_command(main)
