"""Checks of arguments that are not tensors: decays, counts, options."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeAlias

import torch
from torch import Tensor

Use = Literal["copy", "average", "ignore"]
Buffers: TypeAlias = Use | Callable[[str, Tensor], Use]
Names = Literal["equal", "common"]
_USES = ("copy", "average", "ignore")


def check_decay(decay: float | Tensor) -> float | Tensor:
    """Returns a number in [0, 1] as a float, or a 0-d float32 or float64 tensor without reading its value."""
    if isinstance(decay, Tensor):
        if decay.dim() != 0 or decay.dtype not in (torch.float32, torch.float64):
            found = str(decay.dtype).removeprefix("torch.")
            raise ValueError(
                f"decay: expected a number or a 0-d float32 or float64 tensor, "
                f"found shape {tuple(decay.shape)} and {found}"
            )
        return decay
    value = decay if type(decay) is float else _as_float(decay)
    if not 0.0 <= value <= 1.0:  # false for NaN too
        raise ValueError(f"decay: expected a value in [0, 1], found {value}")
    return value


def decay_number(decay: Any) -> float:
    """Like `check_decay`, but refuses tensors."""
    value = check_decay(decay)
    if not isinstance(value, float):
        raise TypeError("decay: expected a number, found a tensor")
    return value


def _as_float(decay: object) -> float:
    try:
        if isinstance(decay, SupportsFloat):  # a string is not, though float() takes one
            return float(decay)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        pass
    raise TypeError(f"decay: expected a number or a 0-d tensor, found {type(decay).__name__}")


def whole_number(name: str, value: Any, least: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value < 2**64:
        limit = " and below 2**64" if whole and value >= 2**64 else ""  # what a float can hold
        raise ValueError(f"{name}: expected a whole number, {least} or more{limit}, found {shown(value)}")
    return int(value)


def average_index(index: SupportsIndex, count: int) -> int:
    """The number of one of `count` averages; a negative one is refused."""
    index = operator.index(index)
    if not 0 <= index < count:
        raise IndexError(f"index: expected one of {count} averages, found {index}")
    return index


def shown(value: object) -> str:
    """The repr for an error message; it never reads a tensor, whose memory may be freed, and shortens huge numbers."""
    return _Shown().repr(value)


class _Shown(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return f"one of {x.bit_length()} bits" if x.bit_length() > 1000 else super().repr_int(x, level)

    def repr_instance(self, x: object, level: int) -> str:
        return f"a {type(x).__name__}" if isinstance(x, Tensor) else super().repr_instance(x, level)


def check_buffers(buffers: object) -> None:
    if not (isinstance(buffers, str) and buffers in _USES) and not callable(buffers):
        raise ValueError(
            "buffers: expected 'copy', 'average', 'ignore' or a function of a name and a tensor that returns one of "
            f"these, found {shown(buffers)}"
        )


def use_of(buffers: Buffers, name: str, tensor: Tensor) -> Use:
    """What is to be done with the buffer of this name. Raises where a function answers with something else."""
    if isinstance(buffers, str):
        return buffers
    use = buffers(name, tensor)
    if not (isinstance(use, str) and use in _USES):
        raise ValueError(
            f"buffers: expected the function to return 'copy', 'average' or 'ignore', found {shown(use)} for {name!r}"
        )
    return use


def check_names(names: object) -> None:
    if not (isinstance(names, str) and names in ("equal", "common")):
        raise ValueError(f"names: expected 'equal' or 'common', found {shown(names)}")


def check_floating(dtype: torch.dtype) -> None:
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float64, float32, bfloat16 or float16, found {shown(dtype)}")
