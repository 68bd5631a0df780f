"""Classes that take the place of other packages' averages; each is loaded, with that package, when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ema_model import EMAModel as EMAModel


def __getattr__(name: str) -> Any:
    if name == "EMAModel":
        from .ema_model import EMAModel

        return EMAModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
