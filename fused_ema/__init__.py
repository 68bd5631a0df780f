"""The exponential moving average of a model's weights, in one kernel launch."""

from . import checkpoints, posthoc, schedules
from ._version import __version__
from .ema import EMA
from .functional import Binding, backend, bind, copy_, get_ema_multi_avg_fn, swap_, update

__all__ = [
    "EMA",
    "Binding",
    "__version__",
    "backend",
    "bind",
    "checkpoints",
    "copy_",
    "get_ema_multi_avg_fn",
    "posthoc",
    "schedules",
    "swap_",
    "update",
]


def __dir__() -> list[str]:
    return sorted(__all__)
