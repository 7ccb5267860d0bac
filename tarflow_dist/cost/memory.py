"""Memory that training takes on a GPU, in bytes.

What lives between steps follows from how DeepSpeed 0.19 keeps weights, gradients and optimiser
state under the settings of training/engine.py; activations are what autograd saves in flow/. Both
are held against measured runs in tests/test_plan.py. Padding, labels and pixels are left out: less
than one part in a hundred of any model worth planning.
"""

from dataclasses import dataclass, replace

from tarflow_dist.config import Config, Precision
from tarflow_dist.flow.flops import FlowCost

FP32 = 4
# Stages 1 and 2, see training/overlapped_zero.py: values that travel between the ranks at once,
# enough for a network's full rate, few enough that the last ones, which nothing hides, are a small
# part of all; and how many such buckets are on their way while another fills.
BUCKET = 32_000_000
IN_FLIGHT = 2
# DeepSpeed's own sizes at stage 3, in values: of the buffer that gradients are reduced through, how
# many weights it assembles for a pass and fetches ahead, and below which a parameter stays whole.
REDUCE_BUCKET = 500_000_000
LIVE_WEIGHTS = 1_000_000_000
PREFETCHED_WEIGHTS = 50_000_000
KEPT_WHOLE = 100_000
# width-sized vectors a patch at work in a layer's backward pass beside what autograd saved;
# measured: 6 in fp32, 8 in bf16
WORKING_VECTORS = 8


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. The peak is in the backward pass or in the update after it, whichever is
    larger.

    Attributes:
        weights: as the model multiplies with them.
        masters: fp32 copies that the optimiser steps on.
        optimiser: Adam's two moments and the moving average, fp32.
        gradients: held from one pass to the next.
        buffers: to reduce gradients and assemble weights.
        activations: saved for the backward pass, and those at work.
        late: what grows while activations shrink, at its end: gradients on their way.
        update: gradients that the optimiser steps with, beyond `gradients`.
        host: on the host, a GPU (offload).
    """

    weights: float
    masters: float
    optimiser: float
    gradients: float
    buffers: float
    activations: float
    late: float
    update: float
    host: float = 0.0

    @property
    def states(self) -> float:
        """What stays between steps, gradients included."""
        return self.weights + self.masters + self.optimiser + self.gradients

    @property
    def peak(self) -> float:
        passes = self.buffers + max(self.activations, self.late)
        return self.states + max(passes, self.update)


def training_memory(config: Config, gpus: int, micro_batch: int) -> Memory:
    """Memory of the run of `config` on one of `gpus`, with `micro_batch` images a GPU and pass."""
    train, counts = config.train, FlowCost(config.model)
    precision, stage = train.precision, train.zero_stage
    accumulating = micro_batch < train.batch_size // gpus
    P = counts.num_parameters
    bf16 = precision == "bf16"
    weight = 2 if bf16 else FP32
    own = P / gpus
    every = train.activation_checkpointing
    activations = micro_batch * image_activations(counts, precision, every)
    if precision == "bf16_autocast":
        activations += 2 * P  # the weights' bf16 copies

    update: float
    held, buffers, late = 0.0, 0.0, 0.0
    if stage == 0:
        held = FP32 * P if accumulating else 0
        reduced = FP32 * min(P, REDUCE_BUCKET) if gpus > 1 else 0
        late = FP32 * P - held + reduced
        update = FP32 * P - held
    elif stage in (1, 2):  # each gradient goes into its bucket and is gone
        sent = FP32 if train.reduce_precision == "fp32" else 2
        bucket, flying = min(P, BUCKET), min(P, (IN_FLIGHT + 1) * BUCKET)
        held = FP32 * (P if stage == 1 else own) if accumulating else 0
        buffers = sent * bucket
        late = FP32 * own + sent * (flying - bucket + flying / gpus) - held
        update = FP32 * own - held
    else:
        held = FP32 * own
        assembled = min(P, LIVE_WEIGHTS) + min(P, PREFETCHED_WEIGHTS)
        buffers = FP32 * REDUCE_BUCKET + weight * assembled
        late = (weight + FP32) * min(P, REDUCE_BUCKET)
        update = FP32 * own

    weights: float = weight * P
    if stage == 3:
        small = sum(size for size in counts.parameters.values() if size < KEPT_WHOLE)
        weights = weight * (own + (small if gpus > 1 else 0))
    memory = Memory(
        weights=weights,
        masters=FP32 * own if stage else 0,
        optimiser=3 * FP32 * (own if stage else P),
        gradients=held,
        buffers=buffers,
        activations=activations,
        late=late,
        update=update,
    )
    if not train.offload or stage < 2:
        return memory
    # on the host, with a buffer there through which the new weights go back
    moved = memory.masters + memory.optimiser + max(memory.gradients, memory.masters)
    on_host = moved + weight * own
    return replace(memory, masters=0, optimiser=0, gradients=0, update=0, host=on_host)


def image_activations(counts: FlowCost, precision: Precision, checkpoint_every: int) -> float:
    """Bytes of activations an image at the start of the backward pass: all that autograd saved, and
    what the first layers back work with. A checkpointed layer saves its input alone; one at a time
    has its activations again."""
    N, w = counts.num_patches, counts.width
    value = FP32 if precision == "fp32" else 2
    stream = 2 if precision == "bf16" else FP32
    total = sum(counts.layers)
    recomputed = total // checkpoint_every if checkpoint_every else 0
    layer = layer_activations(counts, precision)
    saved = (total - recomputed) * layer + recomputed * stream * N * w
    if recomputed:
        saved += layer
    # around the layers: what proj_in and proj_out multiply, x − μ and exp(−α), and the last z
    D = counts.config.patch_dim
    affine = FP32 * N * D * (1 if counts.config.volume_preserving else 2)
    saved += (
        counts.config.num_blocks * (value * N * D + affine + value * (N - 1) * w) + FP32 * N * D
    )
    return saved + WORKING_VECTORS * value * N * w


def layer_activations(counts: FlowCost, precision: Precision) -> int:
    """Bytes an image that autograd saves in one transformer layer: inputs of the two norms, with
    means and deviations in fp32; in the type of the products what they feed (2 widths), q, k, v
    (3), attention's output (1) and log-sums, and the MLP before and after its GELU (8)."""
    N, w = counts.num_patches, counts.width
    value = FP32 if precision == "fp32" else 2
    stream = 2 if precision == "bf16" else FP32
    norms = 2 * N * (stream * w + FP32 * 2)
    return norms + 14 * value * N * w + FP32 * N * (w // counts.config.head_dim)
