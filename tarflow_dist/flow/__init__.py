"""The mathematics of TARFlow ("Normalizing Flows are Capable Generative Models", arXiv 2412.06329).

Torch only: no files, no ranks, no config objects, no logging. Wrong arguments raise `ValueError`.
"""

from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.model import Flow

__all__ = ["Flow", "Guidance"]
