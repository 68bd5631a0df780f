"""Which of a model's tensors a manager averages, and which tensors those are now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..pairs.pairing import difference, plain_tensors

Select = Callable[[str, Tensor], bool]


class Selection:
    """Parameters, and with `buffers` "average" also the persistent buffers, that are real or complex and that `select`
    takes, by name without the segments of wrappers.

    A buffer that is not persistent (a mask, a table of frequencies) is made by the model and in no checkpoint: it is
    never averaged.

    Args: see `fused_ema.EMA`.
    """

    def __init__(self, model: nn.Module, buffers: str, select: Select | None) -> None:
        if select is not None and not callable(select):
            raise TypeError(f"select: expected a function of a name and a tensor, found {type(select).__name__}")
        self._buffers = buffers
        candidates = self._candidates(model)
        taken = {
            id(tensor)  # of tied names, one is enough
            for name, tensor in candidates.items()
            if (tensor.is_floating_point() or tensor.is_complex()) and (select is None or bool(select(name, tensor)))
        }
        self._known = {name: id(tensor) in taken for name, tensor in candidates.items()}
        if self._known and not taken:
            names = f"{list(self._known)[:5]} ..."
            raise ValueError(
                f"select: expected some of the model's {len(self._known)} tensors, found none chosen: {names}"
            )

    def chosen(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors that are averaged. Raises where the model's names have changed since the manager was made."""
        candidates = self._candidates(model)
        if differ := difference(candidates, self._known, "the model"):
            raise ValueError(
                f"model: expected the names it had when the manager was made; {differ}; "
                "make a new fused_ema.EMA, and load the state of this one if it fits"
            )
        return {name: tensor for name, tensor in candidates.items() if self._known[name]}

    def left_out(self) -> list[str]:
        """The names that are not averaged."""
        return [name for name, taken in self._known.items() if not taken]

    def to_plain(self) -> dict[str, Any]:
        """What a pickle of a manager holds."""
        return {"buffers": self._buffers, "known": self._known}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Selection:
        self = cls.__new__(cls)
        self._buffers, self._known = plain["buffers"], plain["known"]
        return self

    def _candidates(self, model: nn.Module) -> dict[str, Tensor]:
        found = plain_tensors("model", model)
        if self._buffers != "average":
            return {name: tensor for name, (tensor, parameter) in found.items() if parameter}
        fleeting = fleeting_buffers(model)
        return {name: tensor for name, (tensor, parameter) in found.items() if parameter or id(tensor) not in fleeting}


def fleeting_buffers(model: nn.Module) -> set[int]:
    """The ids of the buffers that are not persistent."""
    return {id(child._buffers.get(name)) for child in model.modules() for name in child._non_persistent_buffers_set}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors by name, without the segments of wrappers."""
    return {name: tensor for name, (tensor, _) in plain_tensors("model", model).items()}
