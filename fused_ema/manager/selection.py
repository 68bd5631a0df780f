"""Which of a model's tensors a manager averages, and which tensors those are now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .._warning import warn
from ..pairs.arguments import Buffers, use_of
from ..pairs.pairing import difference, listed, plain_tensors

Select = Callable[[str, Tensor], bool]


class Selection:
    """Parameters, and the persistent buffers for which `buffers` says "average", that are real or complex and that
    `select` takes, by name without the segments of wrappers.

    A buffer that is not persistent (a mask, a table of frequencies) is made by the model and in no checkpoint: it is
    never averaged. Nor are the vectors of spectral norm's power iteration.

    Args: see `fused_ema.EMA`.
    """

    def __init__(self, model: nn.Module, buffers: Buffers, select: Select | None) -> None:
        if select is not None and not callable(select):
            raise TypeError(f"select: expected a function of a name and a tensor, found {type(select).__name__}")
        self._buffers = buffers
        self._select = select
        self._forgot_select = False
        candidates = self._candidates(model)
        taken = {
            id(tensor)  # of tied names, one is enough
            for name, tensor in candidates.items()
            if (tensor.is_floating_point() or tensor.is_complex()) and (select is None or bool(select(name, tensor)))
        }
        self._known = {name: id(tensor) in taken for name, tensor in candidates.items()}
        # Those that `select` turned down while they were frozen; it may take them once they train.
        self._frozen = {
            name for name in candidates if select and not (self._known[name] or candidates[name].requires_grad)
        }
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
                f"model: expected the names it had when the manager was made; {differ}; call ema.reselect(), which "
                "takes in what is new, as a copy, and drops what is gone"
            )
        self._warn_of_unfrozen(candidates)
        return {name: tensor for name, tensor in candidates.items() if self._known[name]}

    def again(self, model: nn.Module, select: Select | None) -> Selection:
        """The selection from the model as it is now, by another `select` where one is given."""
        if select is None and self._forgot_select:
            raise ValueError(
                "EMA.reselect: expected the manager's `select`, which neither a pickle nor a deep copy of it keeps; "
                "pass it: ema.reselect(select)"
            )
        return Selection(model, self._buffers, self._select if select is None else select)

    def look(self, model: nn.Module) -> None:
        """Warns, once, where `select` would now take a parameter that it turned down while that was frozen."""
        if self._frozen:
            self._warn_of_unfrozen(tensors_of(model))

    def _warn_of_unfrozen(self, tensors: Mapping[str, Tensor]) -> None:
        trained = [name for name in self._frozen if name in tensors and tensors[name].requires_grad]
        self._frozen.difference_update(trained)
        if self._select and (missed := sorted(name for name in trained if self._select(name, tensors[name]))):
            self._frozen.clear()
            warn(
                f"EMA: {listed(missed)} had requires_grad=False when `select` turned them down, and now "
                "train without being averaged; call ema.reselect(), which begins their averages as copies"
            )

    def to_plain(self) -> dict[str, Any]:
        """What a pickle of a manager holds."""
        return {"buffers": self._buffers, "known": self._known, "select": self._select is not None}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Selection:
        self = cls.__new__(cls)
        self._buffers, self._known = plain["buffers"], plain["known"]
        self._select, self._frozen = None, set()
        self._forgot_select = plain.get("select", True)
        return self

    def _candidates(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, (tensor, kind) in plain_tensors("model", model).items()
            if kind == "parameter" or (kind == "buffer" and use_of(self._buffers, name, tensor) == "average")
        }


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


def fleeting(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not persistent, by name, without the segments of wrappers."""
    return {name: tensor for name, (tensor, kind) in plain_tensors("model", model).items() if kind == "fleeting"}


def lasting(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers, by name, without the segments of wrappers."""
    found = plain_tensors("model", model).items()
    return {name: tensor for name, (tensor, kind) in found if kind not in ("parameter", "fleeting")}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors by name, without the segments of wrappers."""
    return {name: tensor for name, (tensor, _) in plain_tensors("model", model).items()}
