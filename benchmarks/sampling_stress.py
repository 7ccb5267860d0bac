"""200 random models, guidances, windows and batches: windows against the sequential inverse.

python benchmarks/sampling_stress.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "flow"))
from test_inverse import random_case

worst = 0.0
for seed in range(200):
    flow, z, y, arguments, solvers = random_case(seed)
    exact = flow.decode(z, y, **arguments)
    x = flow.decode(z, y, **arguments, solvers=solvers)
    error = float((x - exact).abs().max() / max(1.0, exact.abs().max()))
    if not error <= 1e-8:  # NaN too
        sys.exit(f"seed {seed}: error {error:.2g} with {solvers}, {arguments}")
    worst = max(worst, error)
print(f"200 combinations in {torch.float64}: the largest error is {worst:.2g}")
