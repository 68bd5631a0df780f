"""Writes reconstructed weights into a model: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..manager.copying import copy_into
from ..manager.selection import tensors_of
from ..manager.swap import holds_average
from ..pairs import shards
from ..pairs.arguments import Names, check_names
from ..pairs.checks import check_tensor, dtype_name
from ..pairs.pairing import by_plain_name, in_common, mismatch

EXTRA_STATE = "_extra_state"  # the last segment of its key, in PyTorch's state_dict


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, names: Names = "equal") -> None:
    """Writes `weights` into the model, in place, with the casts that its types need: all of them, or none.

    Names are compared without the segments of wrappers, so that compiled, DDP-wrapped and sharded models take them too;
    one of several tied names is enough. What `weights` lacks besides parameters (buffers) and a module's extra state
    stay the model's.

    Args:
        model: a sharded one takes its own part of the tensors; every rank calls this.
        weights: from `reconstruct`, `EMA.averaged_state_dict` or a file of `checkpoints.save_safetensors`.
        names: "equal": weights have each of the model's parameters, and nothing that the model lacks. "common": tensors
            whose name or shape only one side has are left out, and a warning names them once. Averages that `select`
            chose need "common", unless `reconstruct` was given the model.

    Raises:
        ValueError, TypeError, RuntimeError: names or shapes differ, a type can't be cast to the model's, tied names
            have different values, or the model is inside `swapped()`. Nothing is written.

    Equivalent to, for a model without wrappers and buffers::

        model.load_state_dict(weights)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        found = "other keys" if isinstance(weights, Mapping) else type(weights).__name__
        raise TypeError(f"weights: expected tensors by name, found {found}")
    check_names(names)
    shards.reshard(model)
    into = tensors_of(model)
    if holds_average(into.values):
        raise RuntimeError("load_into: the model is inside swapped(); leave the block first")
    keys = by_plain_name("weights", (key for key in weights if key.rpartition(".")[2] != EXTRA_STATE))
    values = {name: weights[key] for name, key in keys.items()}
    given = {id(into[name]) for name in values if name in into}
    missing = [name for name, tensor in into.items() if isinstance(tensor, nn.Parameter) and id(tensor) not in given]
    unexpected = [key for name, key in keys.items() if name not in into]
    differ = mismatch(missing, unexpected, "weights")
    if names == "equal" and differ:
        raise ValueError(
            f"load_into: expected the names of the model's parameters; {differ}; to write only those that both have, "
            "pass names='common'"
        )
    matched = [(name, name) for name in values if name in into]
    if names == "common":
        matched = in_common("load_into", matched, values, into, differ)
    values = {name: values[name] for name, _ in matched}
    for name, value in values.items():
        check_tensor(f"weights[{keys[name]!r}]", value)
        check_tensor(f"model[{name!r}]", into[name])
        if value.dtype != into[name].dtype and not (value.is_floating_point() or value.is_complex()):
            wanted, found = dtype_name(into[name]), dtype_name(value)
            raise TypeError(f"weights[{keys[name]!r}]: expected a type that casts to {wanted}, found {found}")
    copy_into(values, into, averages=None)
