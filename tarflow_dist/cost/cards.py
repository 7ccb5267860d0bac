"""GPUs and what their data sheets promise."""

import difflib
from dataclasses import dataclass

from tarflow_dist.errors import UserError


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        match: words that all stand in the name that CUDA gives it.
        bf16_flops: peak of dense (not sparse) bf16 matrix products with fp32 sums, a second.
        fp32_flops: peak in fp32 proper, not TF32, a second.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
    """

    match: tuple[str, ...]
    bf16_flops: float
    fp32_flops: float
    memory: int
    bandwidth: float

    def peak_flops(self, precision: str) -> float:
        """Of `train.precision`: all but fp32 multiply in bf16."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


def _card(match: str, bf16_tflops: float, fp32_tflops: float, gigabytes: int, gb_s: int) -> Card:
    # what data sheets call GB is within 1 % of a GiB for all of them
    return Card(
        tuple(match.split()), bf16_tflops * 1e12, fp32_tflops * 1e12, gigabytes << 30, gb_s * 1e9
    )


# NVIDIA's data sheets; SXM boards where there are several. A card comes before those whose words
# its name contains too.
CARDS = {
    "a100-40": _card("A100 40GB", 312, 19.5, 40, 1555),
    "a100-80": _card("A100 80GB", 312, 19.5, 80, 2039),
    "h100-pcie": _card("H100 PCIe", 756, 51, 80, 2000),
    "h100-nvl": _card("H100 NVL", 835, 60, 94, 3900),
    "h100": _card("H100", 989, 67, 80, 3350),
    "h200-nvl": _card("H200 NVL", 835, 60, 141, 4800),
    "h200": _card("H200", 989, 67, 141, 4800),
    "b200": _card("B200", 2250, 75, 180, 8000),
    "a10": _card("A10", 125, 31.2, 24, 600),
    "l4": _card("L4", 121, 30.3, 24, 300),
    "l40s": _card("L40S", 362, 91.6, 48, 864),
    "a6000": _card("RTX A6000", 154.8, 38.7, 48, 768),
    "rtx4090": _card("RTX 4090", 165.2, 82.6, 24, 1008),
    "rtx3090": _card("RTX 3090", 71, 35.6, 24, 936),
    # without units for bf16, which is no faster there than fp32
    "v100-32": _card("V100 32GB", 15.7, 15.7, 32, 900),
    "v100": _card("V100 16GB", 15.7, 15.7, 16, 900),
    "t4": _card("T4", 8.1, 8.1, 16, 320),
}


def card(name: str) -> Card:
    """The card of that name in `CARDS`.

    Raises:
        UserError: there is none; names the nearest and all.
    """
    if name not in CARDS:
        nearest = difflib.get_close_matches(name.lower(), CARDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown GPU {name}; did you mean {nearest}? Known are {', '.join(CARDS)}")
    return CARDS[name]


def find_card(device_name: str) -> Card | None:
    """The card that CUDA calls `device_name` (torch.cuda.get_device_name), such as "NVIDIA H100
    80GB HBM3"; None if it is not among `CARDS`."""
    words = set(device_name.replace("-", " ").split())
    return next((known for known in CARDS.values() if words.issuperset(known.match)), None)
