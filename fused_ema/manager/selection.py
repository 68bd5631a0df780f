"""Which of a model's tensors a manager averages, and which tensors those are now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        if not taken and (select is None or not candidates):
            raise ValueError(
                f"model: expected parameters to average, found none that are real or complex in {type(model).__name__};"
                " make the manager once the model has its layers"
            )
        if not taken:
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


def as_module(model: nn.Module | Mapping[str, Tensor]) -> nn.Module:
    """A module as it is; a dict of tensors as a module whose parameters are that very dict, as it is at each call."""
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, dict):
        hint = "; wrap it in dict()" if isinstance(model, Mapping) else ""
        raise TypeError(
            f"model: expected a torch.nn.Module or a dict of names to tensors, found {type(model).__name__}{hint}"
        )
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            found = f"{type(name).__name__} and {type(tensor).__name__}"
            raise TypeError(f"model[{name!r}]: expected a name (str) and a tensor, found {found}")
    module = nn.Module()
    module._parameters = model
    return module


def fleeting_buffers(model: nn.Module) -> set[int]:
    """The ids of the buffers that are not persistent."""
    return {id(child._buffers.get(name)) for child in model.modules() for name in child._non_persistent_buffers_set}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors by name, without the segments of wrappers."""
    return {name: tensor for name, (tensor, _) in plain_tensors("model", model).items()}
