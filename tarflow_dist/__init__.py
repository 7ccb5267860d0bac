"""Train TARFlow (arXiv 2412.06329) at scale. `from tarflow_dist import TarFlow` is the public face;
importing the package alone loads no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow_dist.models.tarflow import TarFlow

__all__ = ["TarFlow"]


def __getattr__(name: str) -> Any:
    if name == "TarFlow":
        from tarflow_dist.models.tarflow import TarFlow

        return TarFlow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
