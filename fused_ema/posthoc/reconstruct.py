"""Reconstructs an average of any length from snapshots of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._warning import warn
from ..checkpoints.files import PathLike
from ..manager.selection import tensors_of
from ..pairs.arguments import check_floating, whole_number
from ..pairs.checks import dtype_name
from ..pairs.pairing import first_few, listed
from ..schedules import gamma_of
from .profiles import profile_error, solve_weights
from .snapshots import opened, snapshots


def reconstruct(
    folder: PathLike,
    sigma_rel: float,
    *,
    model: nn.Module | None = None,
    updates: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Returns the average that power_function(sigma_rel) would have given, approximately; see `profile_error`.

    It is exact where a snapshot holds that very average; a warning says where the error is above 0.25. Files are read
    one by one, and summed in float64 on the CPU. Write the result into a model by `load_into(model, weights)`, which
    checks that nothing is left out.

    Args:
        folder: of the snapshots.
        sigma_rel: in (0, 0.2887], as for `schedules.power_function`.
        model: gives the result the keys of `model.state_dict()`, in their order, for `model.load_state_dict(result)`,
            with copies of the model's own values for what is not averaged; a warning names parameters among them.
            None: the result has what was averaged and no more, under the manager's names, which are those of the
            innermost model.
        updates: the number of updates after which the average is wanted; None: the last snapshot's. Choose one that has
            a snapshot: between two, what came after the earlier one is missing, and the error is large.
        dtype: of the result, floating. Complex tensors are complex128 if it is float64, else complex64.
        device: of the result.

    Raises:
        ValueError: as from `snapshots`; there are none, or `updates` is before the first or after the last; names or
            shapes differ between snapshots, or from the model's; sigma_rel is out of range; a value is too large for
            `dtype`.
        ImportError: safetensors is not installed.
    """
    gamma = gamma_of(sigma_rel)
    check_floating(dtype)
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if updates is not None:
        whole_number("updates", updates, 1)
    found = snapshots(folder)
    if not found:
        raise ValueError(f"{folder}: expected snapshots, found none")
    time = found[-1].updates if updates is None else updates
    if not found[0].updates <= time <= found[-1].updates:
        first, last = found[0].updates, found[-1].updates
        raise ValueError(f"updates: expected {first} to {last}, as snapshots in {folder} were taken, found {time}")
    used = [each for each in found if each.updates <= time]
    times = [each.updates for each in used for _ in each.sigma_rels]
    gammas = [gamma_of(x) for each in used for x in each.sigma_rels]
    weights = iter(solve_weights(times, gammas, time, gamma).tolist())
    if (error := profile_error(times, gammas, time, gamma)) > 0.25:
        warn(
            f"{folder}: the snapshots give the profile of sigma_rel {sigma_rel} after {time} updates with an error of "
            f"{error:.0%}; see fused_ema.posthoc.profile_error",
        )
    sums: dict[str, Tensor] = {}
    expected: dict[str, str] = {}
    for snapshot in used:
        with opened(snapshot.path) as (file, about):
            shapes = _shapes(file, about)
            expected = expected or shapes
            _check_same(snapshot.path, shapes, used[0].path, expected)
            for k in range(len(snapshot.sigma_rels)):
                if weight := next(weights):  # 0 times Inf would be NaN
                    for name, key in about["tensors"].items():
                        value = _read(snapshot.path, file, k, key, name in about["complex"])
                        if name not in sums:
                            sums[name] = torch.zeros_like(value)
                        sums[name].add_(value, alpha=weight)
    result = {}
    for name in expected:
        value = sums.pop(name)  # popped, so that it is freed once it is cast
        if name in about["complex"]:  # this is the same in each file
            result[name] = torch.view_as_complex(value if dtype == torch.float64 else value.float()).to(device)
        else:
            cast = value.to(dtype)
            if not torch.equal(cast.isfinite(), value.isfinite()):
                raise ValueError(f"dtype: expected one that holds {value.abs().max():.3g} of {name!r}, found {dtype}")
            result[name] = cast.to(device)
    return result if model is None else _named_as(model, result, device)


def _named_as(model: nn.Module, weights: dict[str, Tensor], device: torch.device | str) -> dict[str, Any]:
    """The state of a model with these weights in it, by the manager's names."""
    tensors, state = tensors_of(model), model.state_dict(keep_vars=True)
    values = {id(tensor): weights[name] for name, tensor in tensors.items() if name in weights}
    keyed = {id(value) for value in state.values()}
    if unknown := [name for name in weights if name not in tensors or id(tensors[name]) not in keyed]:
        raise ValueError(f"model: expected the names of the snapshots in its state_dict, found no {listed(unknown)}")
    for name, tensor in tensors.items():
        if name in weights and tensor.shape != weights[name].shape:
            wanted, found = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"model[{name!r}]: expected shape {wanted}, as in the snapshots, found {found}")
    if left := [name for name, each in tensors.items() if isinstance(each, nn.Parameter) and id(each) not in values]:
        warn(f"reconstruct: the snapshots have no averages of {listed(left)}; the model's own values are in the result")
    return {key: values[id(value)] if id(value) in values else _copied(value, device) for key, value in state.items()}


def _copied(value: Any, device: torch.device | str) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


def _read(path: Path, file: Any, k: int, key: str, is_complex: bool) -> Tensor:
    """The tensor of average k in float64. Raises where its shape differs from that in average 0."""
    value: Tensor = file.get_tensor(f"{k}/{key}")
    if not value.is_floating_point():
        raise ValueError(f"{path}: '{k}/{key}': expected a floating type, found {dtype_name(value)}")
    wanted = tuple(file.get_slice(f"0/{key}").get_shape())
    if value.shape != wanted or (is_complex and wanted[-1:] != (2,)):
        last = " with a last dimension of 2, for complex numbers" if is_complex else ""
        raise ValueError(f"{path}: '{k}/{key}': expected shape {wanted}{last}, found {tuple(value.shape)}")
    return value.to(torch.float64)


def _shapes(file: Any, about: dict[str, Any]) -> dict[str, str]:
    """The shape of each tensor, in words; complex ones have one more dimension in the file."""
    shapes = {name: file.get_slice(f"0/{key}").get_shape() for name, key in about["tensors"].items()}
    return {name: f"{'complex, ' if name in about['complex'] else ''}shape {shape}" for name, shape in shapes.items()}


def _check_same(path: Path, found: dict[str, str], first: Path, expected: dict[str, str]) -> None:
    differences = [
        f"{name!r}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
        for name in expected | found
        if expected.get(name) != found.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path}: the tensors differ from those in {first.name}: {first_few(differences, '; ')}; after "
            "EMA.reselect() save snapshots into a new folder"
        )
