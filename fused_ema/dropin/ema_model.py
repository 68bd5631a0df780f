"""A drop-in for diffusers' EMAModel: `from fused_ema.dropin import EMAModel`."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

try:
    from diffusers import training_utils
    from diffusers.utils.deprecation_utils import deprecate
except ImportError as error:
    raise ImportError(
        'this drop-in needs diffusers; run pip install "fused-ema[diffusers]", or pip install diffusers'
    ) from error

from .. import plan as plans
from ..pairs.arguments import decay_number
from ..pairs.checks import check_tensor
from ..pairs.pairing import Pairs, pair
from ..plan import Plan
from ..runners.base import Call


class EMAModel(training_utils.EMAModel):
    """diffusers' EMAModel, with a `step` of one kernel launch per device.

    It is a subclass, so that `isinstance` holds, and constructor, attributes, decays, states and folders are those of
    the diffusers that is installed, whose documentation has the arguments. Averages keep the types that they have
    there. `foreach` chooses how `copy_to` and `restore` copy; `step` is the same with and without it.

    Unlike diffusers', it checks everything before it changes anything, in `step`, `store`, `copy_to`, `restore` and
    `load_state_dict`: tensors that are too few, or of other shapes, raise an error. Errors about a pair of tensors call
    `shadow_params[i]` `ema[i]`, and the i-th parameter `model[i]`.

    Source: `diffusers.training_utils.EMAModel`.
    """

    cur_decay_value: Any  # diffusers' annotation would be None; a float from the first step on
    _plan: Plan | None = None  # of the last step
    _averaged: Sequence[bool] = ()  # which parameters the plan averages; it copies the others

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the averages towards the parameters, and counts the step.

        Args:
            parameters: as many as `shadow_params`, in their order, of their shapes and on their devices; of any types.
                Those that do not require grad are copied. Averages in pinned memory (`pin_memory`) of parameters on a
                GPU are updated where they are. Parameters that DeepSpeed's ZeRO-3 has sharded are gathered for the
                step, all at once.

        Raises:
            ValueError, TypeError, RuntimeError: a tensor can't be used, or `get_decay` is outside [0, 1]. Nothing is
                written or counted.

        Equivalent to::

            ema.optimization_step += 1
            ema.cur_decay_value = ema.get_decay(ema.optimization_step)
            with torch.no_grad():
                for average, parameter in zip(ema.shadow_params, parameters, strict=True):
                    if parameter.requires_grad:
                        average.lerp_(parameter.to(average.dtype), 1 - ema.cur_decay_value)
                    else:
                        average.copy_(parameter)

        computed in float32 (float64 where either side is) and rounded once, with a fused multiply-add.
        """
        if isinstance(parameters, nn.Module):
            about = "EMAModel.step: expected parameters, found a module; pass module.parameters()"
            deprecate("a module in EMAModel.step", "1.0.0", about, standard_warn=False, stacklevel=3)
            parameters = parameters.parameters()
        theirs = list(parameters)
        before = self.optimization_step, self.cur_decay_value
        try:
            self.optimization_step += 1
            self.cur_decay_value = self.get_decay(self.optimization_step)
            with _gathered(theirs):
                self._update(theirs, decay_number(self.cur_decay_value))
        except BaseException:
            self.optimization_step, self.cur_decay_value = before
            raise

    def _update(self, theirs: list[nn.Parameter], decay: float) -> None:
        _check_count(theirs, "shadow_params", self.shadow_params)
        averaged = [parameter.requires_grad for parameter in theirs]
        pairs = pair(list(self.shadow_params), theirs, "copy")._replace(averaged=averaged)
        kept = self._plan if averaged == self._averaged else None
        self._plan = plans.run(kept, Call("update", (decay,)), _new_plan, pairs, pairs=pairs)
        self._averaged = averaged

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps a copy of the parameters on the CPU, for `restore`.

        Raises:
            ValueError: as for `copy_to`; what is stored stays.
        """
        theirs = list(parameters)
        _check_shapes(theirs, "shadow_params", self.shadow_params)
        super().store(theirs)

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Writes the averages into the parameters, with the casts that their types need, from any device.

        Raises:
            ValueError: there are not as many parameters as averages, or one has another shape. Nothing is written.
        """
        theirs = list(parameters)
        _check_shapes(theirs, "shadow_params", self.shadow_params)
        plans.forget_values()
        super().copy_to(theirs)

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Writes what `store` has kept back into the parameters.

        Raises:
            RuntimeError: nothing is stored.
            ValueError: as for `copy_to`; what is stored stays.
        """
        theirs = list(parameters)
        if self.temp_stored_params is not None:
            _check_shapes(theirs, "temp_stored_params", self.temp_stored_params)
            plans.forget_values()
        super().restore(theirs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state of this class or of diffusers'; its tensors are copied.

        Raises:
            ValueError: an entry has a wrong type or value. Nothing has changed.
        """
        loaded = copy.copy(self)
        super(EMAModel, loaded).load_state_dict(state_dict)
        vars(self).update(vars(loaded))

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the plan, which belongs to this process and these tensors."""
        return {name: value for name, value in vars(self).items() if name not in ("_plan", "_averaged")}


EMAModel.__module__ = "fused_ema.dropin"  # so that pickles and errors name what users import


def _gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Holds the whole values of parameters that DeepSpeed's ZeRO-3 has sharded. (diffusers asks transformers whether
    it has, and misses deepspeed's import where EMAModel was imported before deepspeed was configured.)"""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed and any(getattr(each, "ds_numel", 0) and not each.numel() for each in parameters):
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)  # type: ignore[no-any-return]
    return contextlib.nullcontext()


def _new_plan(pairs: Pairs) -> Plan:
    for i, (average, parameter) in enumerate(zip(pairs.ema, pairs.model, strict=True)):
        check_tensor(f"parameters[{i}]", parameter)
        check_tensor(f"shadow_params[{i}]", average)
        if average.device != parameter.device and not average.is_pinned():
            raise ValueError(
                f"shadow_params[{i}]: expected a tensor on {parameter.device}, as parameters[{i}], found one on "
                f"{average.device}; call to(device={str(parameter.device)!r}) before the step"
            )
    _check_shapes(pairs.model, "shadow_params", pairs.ema)
    return Plan(pairs, free_types=True)


def _check_count(parameters: Sequence[Tensor], name: str, kept: Sequence[Tensor]) -> None:
    if len(parameters) != len(kept):
        raise ValueError(
            f"parameters: expected {len(kept)} tensors, as many as {name}, found {len(parameters)}; pass the "
            "parameters that EMAModel was made for"
        )


def _check_shapes(parameters: Sequence[Tensor], name: str, kept: Sequence[Tensor]) -> None:
    _check_count(parameters, name, kept)
    for i, (parameter, tensor) in enumerate(zip(parameters, kept, strict=True)):
        if parameter.shape != tensor.shape:
            wanted, found = tuple(tensor.shape), tuple(parameter.shape)
            hint = (
                "; call this, and make EMAModel, within deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)"
                if hasattr(parameter, "ds_numel")
                else ""
            )
            raise ValueError(f"parameters[{i}]: expected shape {wanted}, as {name}[{i}], found {found}{hint}")
