"""The exponential moving average of a model's weights, in one kernel launch."""

from typing import TYPE_CHECKING, Any

from . import checkpoints, merging, posthoc, schedules
from ._version import __version__
from .functional import Binding, EMAMultiAvgFn, backend, bind, copy_, get_ema_multi_avg_fn, swap_, update
from .manager.ema import EMA
from .merging import merge

if TYPE_CHECKING:
    from .dropin.averaged_model import AveragedModel

__all__ = [
    "EMA",
    "AveragedModel",
    "Binding",
    "__version__",
    "backend",
    "bind",
    "checkpoints",
    "copy_",
    "get_ema_multi_avg_fn",
    "merge",
    "merging",
    "posthoc",
    "schedules",
    "swap_",
    "update",
]

for _public in (EMA, Binding, EMAMultiAvgFn, backend, bind, copy_, get_ema_multi_avg_fn, merge, swap_, update):
    _public.__module__ = __name__  # so that pickles and errors name this package, not its submodules
del _public


def __getattr__(name: str) -> Any:
    if name == "AveragedModel":  # loaded when it is asked for
        from .dropin.averaged_model import AveragedModel

        return AveragedModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
