"""The layouts of other packages. One object for each holds all that is known about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..manager.ema import EMA
from ..manager.selection import tensors_of
from ..manager.timetable import Timetable
from ..pairs.arguments import whole_number
from ..pairs.pairing import first_few, listed, plain_name, unwrapped
from ..schedules import inverse_power, tf_warmup


class Layout:
    """Where the state of a package holds its averages and its count of steps, and what else it holds.

    A new layout subclasses `Named` or `Positional`, joins `BY_NAME` below, and gets a row in the table of the package's
    docstring.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]] = ()  # a state that has all of these keys has this layout
    count: ClassVar[str | None] = None  # the key of its count of steps or updates
    online: ClassVar[str | None] = None  # the prefix of the model's own weights, where a state may have them
    trained_only: ClassVar[bool] = False  # whether a state leaves out what requires no gradient

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a state looks like this layout."""
        return all(key in state for key in self.marks)

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """The values in a state, under the keys that `places` has and that errors name."""
        raise NotImplementedError

    def places(self, model: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        """For each key the tensor of the model that the value belongs to, or another entry of its state_dict."""
        raise NotImplementedError

    def averages(self, ema: EMA, index: int, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        """The part of an exported state that holds the averages."""
        raise NotImplementedError

    def scalars(self, ema: EMA, index: int) -> dict[str, Any]:
        """The rest of an exported state."""
        return {}

    def step(self, state: Mapping[str, Any], timetable: Timetable) -> int | None:
        """The manager's step for the count in a state; None where the state has no count."""
        if self.count is None:
            return None
        found = state[self.count]
        single = isinstance(found, Tensor) and found.numel() == 1
        count = whole_number(f"state[{self.count!r}]", found.item() if single else found, 0)
        return self.step_of(count, timetable) if count else 0

    def step_of(self, count: int, timetable: Timetable) -> int:
        """The manager's step for a count of 1 or more."""
        return count


# ---- Averages by name


class Named(Layout):
    """Averages under the names of the model's state_dict, each after a prefix."""

    prefix: ClassVar[str] = ""

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            found = "keys of other types" if isinstance(state, Mapping) else type(state).__name__
            raise TypeError(f"state: expected tensors by name, as in the layout {self.name!r}, found {found}")
        return {key.removeprefix(self.prefix): value for key, value in state.items() if key.startswith(self.prefix)}

    def places(self, model: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        return model.state_dict(keep_vars=True)

    def averages(self, ema: EMA, index: int, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        return {self.prefix + key: value for key, value in ema.averaged_state_dict(index).items()}


class AveragedModel(Named):
    """torch.optim.swa_utils.AveragedModel, whose first update copies the model and counts as one."""

    name, marks, count, prefix = "averaged_model", ("n_averaged",), "n_averaged", "module."

    def scalars(self, ema: EMA, index: int) -> dict[str, Any]:
        copied = 0 < ema.update_after_step <= ema.step
        return {"n_averaged": torch.tensor(ema.updates + copied)}

    def step_of(self, count: int, timetable: Timetable) -> int:
        return timetable.step_of(count - (timetable.update_after_step > 0))


class Timm(Named):
    """A checkpoint of timm, for ModelEmaV2 and V3. Its names are those of the innermost model."""

    name, marks = "timm", ("state_dict_ema",)

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return super().tensors(state["state_dict_ema"], model)

    def averages(self, ema: EMA, index: int, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        return {"state_dict_ema": unwrapped(ema.model, super().averages(ema, index, parameters))}


class EmaPytorch(Named):
    """ema_pytorch.EMA."""

    name, marks, count, prefix = "ema_pytorch", ("step", "initted"), "step", "ema_model."
    online = "online_model."

    def scalars(self, ema: EMA, index: int) -> dict[str, Any]:
        return {"initted": torch.tensor(True), "step": torch.tensor(ema.step)}


class LitEma(Named):
    """LitEma of CompVis' latent-diffusion and its descendants: by the names of the parameters that require a gradient,
    without their dots. With a count it warms up as `tf_warmup` does."""

    name, marks, count, trained_only = "lit_ema", ("decay", "num_updates"), "num_updates", True

    def fits(self, state: Mapping[str, Any]) -> bool:
        state = self._own(state)
        return super().fits(state) and "shadow_params" not in state  # which torch_ema's has

    def _own(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state of the LitEma in that of the LightningModule, or in its checkpoint."""
        inner = state.get("state_dict")
        inner = inner if isinstance(inner, Mapping) else state
        return {key[10:]: value for key, value in inner.items() if str(key).startswith("model_ema.")} or state

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        found = super().tensors(self._own(state), model)
        return {key: value for key, value in found.items() if key not in self.marks}

    def places(self, model: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        named = unwrapped(model, dict(model.named_parameters()))
        return {name.replace(".", ""): tensor for name, tensor in named.items()}

    def averages(self, ema: EMA, index: int, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        values, places = _by_tensor(ema, index), self.places(ema.model, parameters)
        return {name: values[id(tensor)] for name, tensor in places.items() if tensor.requires_grad}

    def scalars(self, ema: EMA, index: int) -> dict[str, Any]:
        decay, count = _tf_decay_and_count(ema, index)
        count = -1 if count is None else count
        return {"decay": torch.tensor(decay), "num_updates": torch.tensor(count, dtype=torch.int32)}

    def step(self, state: Mapping[str, Any], timetable: Timetable) -> int | None:
        own = self._own(state)
        count = own["num_updates"]
        uncounted = isinstance(count, Tensor) and count.numel() == 1 and count.item() == -1
        return None if uncounted else super().step(own, timetable)

    def step_of(self, count: int, timetable: Timetable) -> int:
        return count + timetable.update_after_step


class MMEngine(Named):
    """mmengine's ExponentialMovingAverage, whose first update copies the model; and checkpoints of its EMAHook, which
    keep the averages in the place of the model, and the model in that of the averages."""

    name, marks, count, prefix = "mmengine", ("steps",), "steps", "module."

    def fits(self, state: Mapping[str, Any]) -> bool:
        return self._of_hook(state) or (super().fits(state) and any(str(key).startswith("module.") for key in state))

    def _of_hook(self, state: Mapping[str, Any]) -> bool:
        model, ema = state.get("state_dict"), state.get("ema_state_dict")
        return isinstance(model, Mapping) and isinstance(ema, Mapping) and super().fits(ema)

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        if self._of_hook(state):
            state = {f"{self.prefix}{key}": value for key, value in state["state_dict"].items()}
        return super().tensors(state, model)

    def scalars(self, ema: EMA, index: int) -> dict[str, Any]:
        return {"steps": torch.tensor(ema.step)}

    def step(self, state: Mapping[str, Any], timetable: Timetable) -> int | None:
        return super().step(state["ema_state_dict"] if self._of_hook(state) else state, timetable)


class Plain(Named):
    """The names of the model's state_dict and nothing else: `EMA.averaged_state_dict`, `save_safetensors`,
    `posthoc.reconstruct`. A backbone alone takes its own part of a state that has it under `backbone.`."""

    name = "plain"

    def fits(self, state: Mapping[str, Any]) -> bool:
        return any(isinstance(value, Tensor) for value in state.values())

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        found = super().tensors(state, model)
        inside = {plain_name(key): value for key, value in found.items() if plain_name(key).startswith("backbone.")}
        if not inside or any(name.startswith("backbone.") for name in tensors_of(model)):
            return found
        return {name.removeprefix("backbone."): value for name, value in inside.items()}

    def averages(self, ema: EMA, index: int, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        return unwrapped(ema.model, super().averages(ema, index, parameters))


class Dino(Plain):
    """The teacher in a checkpoint of DINO or DINOv2: a backbone and its heads."""

    name, marks = "dino", ("teacher",)

    def fits(self, state: Mapping[str, Any]) -> bool:
        return isinstance(state.get("teacher"), Mapping)

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return super().tensors(state["teacher"], model)

    def averages(self, ema: EMA, index: int, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        return {"teacher": super().averages(ema, index, parameters)}


# ---- Averages by position


class Positional(Layout):
    """Averages in a list, in the order of the parameters that the other package was given."""

    def tensors(self, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        shadows = state["shadow_params"]
        if not isinstance(shadows, (list, tuple)):
            raise TypeError(f"shadow_params: expected a list of tensors, found {type(shadows).__name__}")
        return {f"shadow_params[{i}]": value for i, value in enumerate(shadows)}

    def places(self, model: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        those = list(model.parameters() if parameters is None else parameters)
        known = {id(tensor) for tensor in tensors_of(model).values()}
        if strangers := [str(i) for i, tensor in enumerate(those) if id(tensor) not in known]:
            at = first_few(strangers, ", ")
            raise ValueError(
                f"parameters: expected parameters of the manager's model, found other tensors at positions {at}"
            )
        return {f"shadow_params[{i}]": tensor for i, tensor in enumerate(those)}

    def averages(self, ema: EMA, index: int, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
        values, places = _by_tensor(ema, index), self.places(ema.model, parameters).values()
        return {"shadow_params": [values[id(each)] if id(each) in values else each.detach().clone() for each in places]}


class Diffusers(Positional):
    """diffusers.training_utils.EMAModel. It copies the model up to its step update_after_step + 1."""

    name, marks, count = "diffusers", ("optimization_step", "shadow_params"), "optimization_step"

    def scalars(self, ema: EMA, index: int) -> dict[str, Any]:
        schedule, after = ema.schedules[index], ema.update_after_step
        about: dict[str, Any] = {"optimization_step": ema.step, "update_after_step": after - 1}
        about |= {"use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}
        if isinstance(schedule, inverse_power):
            about |= {"decay": schedule.D, "min_decay": schedule.min, "update_after_step": after + schedule.start}
            return about | {"use_ema_warmup": True, "inv_gamma": schedule.gamma, "power": schedule.power}
        if isinstance(schedule, tf_warmup):  # its decay without use_ema_warmup
            return about | {"decay": schedule.D, "min_decay": 0.0}
        decay = _latest_decay(ema, index)
        return about | {"decay": decay, "min_decay": decay}


class TorchEma(Positional):
    """torch_ema.ExponentialMovingAverage. With a count it warms up as `tf_warmup` does."""

    name, marks, count = "torch_ema", ("num_updates", "shadow_params"), "num_updates"

    def scalars(self, ema: EMA, index: int) -> dict[str, Any]:
        decay, count = _tf_decay_and_count(ema, index)
        return {"decay": decay, "num_updates": count, "collected_params": None}

    def step(self, state: Mapping[str, Any], timetable: Timetable) -> int | None:
        return None if state["num_updates"] is None else super().step(state, timetable)

    def step_of(self, count: int, timetable: Timetable) -> int:
        return count + timetable.update_after_step


def _by_tensor(ema: EMA, index: int) -> dict[int, Any]:
    """The average of each of the model's tensors, or its own value, by the tensor's id."""
    state = ema.averaged_state_dict(index)
    return {id(tensor): state[key] for key, tensor in ema.model.state_dict(keep_vars=True).items()}


def _tf_decay_and_count(ema: EMA, index: int) -> tuple[float, int | None]:
    """What packages keep that warm up as `tf_warmup` does; without a count they have a constant decay."""
    schedule = ema.schedules[index]
    if isinstance(schedule, tf_warmup):
        return schedule.D, max(0, ema.step - ema.update_after_step)
    return _latest_decay(ema, index), None


def _latest_decay(ema: EMA, index: int) -> float:
    """The schedule's decay of the latest update, or of the first one to come."""
    schedule = ema.schedules[index]
    n = ema.step - ema.update_after_step if getattr(schedule, "per_step", True) else ema.updates
    return float(schedule(max(1, n)))


# ---- Choosing


BY_NAME: dict[str, Layout] = {
    each.name: each
    for each in (AveragedModel(), Timm(), Diffusers(), EmaPytorch(), TorchEma(), LitEma(), MMEngine(), Dino(), Plain())
}
LAYOUTS = tuple(BY_NAME)
"""The names of the layouts that `restore` and `export` know."""


def named_layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, found {name!r}")
    return BY_NAME[name]


def layout_of(state: Any, name: str | None) -> Layout:
    """The layout of that name, which the state must have; without a name, the one that the state's keys show."""
    asked = None if name is None else named_layout(name)
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict, found {type(state).__name__}")
    told = [each for each in BY_NAME.values() if each.fits(state)]
    if asked in told:
        return asked
    if asked is None and len(told) > 1:
        told = [each for each in told if each.name != "plain"]  # nearly every state has some tensors
    if asked is None and len(told) == 1:
        return told[0]
    if "averages" in state and "schedules" in state:
        raise ValueError(
            "state: expected averaged weights or the state of another package, found that of a fused_ema.EMA; call "
            "ema.load_state_dict(state)"
        )
    if asked:
        marks = f"the keys {', '.join(map(repr, asked.marks))}" if asked.marks else "tensors by name"
        wanted = f"the layout {name!r}, which has {marks}"
    else:
        wanted = f"one layout of {', '.join(LAYOUTS)}"
    found = " and ".join(each.name for each in told) or "none"
    raise ValueError(f"state: expected {wanted}, found {found}; its keys: {listed(list(state)) or 'none'}")
