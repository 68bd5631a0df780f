"""Classes that take the place of other packages' averages; each is loaded, with that package, when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .averaged_model import AveragedModel as AveragedModel
    from .ema_model import EMAModel as EMAModel


def __getattr__(name: str) -> Any:
    if name == "AveragedModel":
        from .averaged_model import AveragedModel

        return AveragedModel
    if name == "EMAModel":
        from .ema_model import EMAModel

        return EMAModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
