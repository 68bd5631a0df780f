"""Averages of any length after training: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.

    ema = EMA(model, decay=[power_function(0.05), power_function(0.10)])
    save_snapshot("snapshots", ema)                         # while training, say 64 times in all
    weights = reconstruct("snapshots", sigma_rel=0.15)      # afterwards

After t updates, a power_function average is the integral over 0 < s <= t of the weights times the profile
p(s) = (gamma + 1)·s^gamma / t^(gamma + 1), where the weights between s = i - 1 and s = i are those of update i. That is
exact: the decays (1 - 1/n)^(gamma + 1) leave update i a share of (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1).
So what combines the profiles of the snapshots to the wanted one combines the tensors too. The least
∫ (Σ x[k]·p[k] - p)² is where A·x = b, with the inner products of profiles in A and b.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..checkpoints.files import safetensors, save, storable
from ..pairs.arguments import check_floating, shown, whole_number
from ..pairs.checks import dtype_name
from ..pairs.shards import is_sharded
from ..schedules import gamma_of

if TYPE_CHECKING:
    from ..manager.ema import EMA

__all__ = ["Snapshot", "profile_error", "reconstruct", "save_snapshot", "snapshots", "solve_weights"]


Folder: TypeAlias = "str | os.PathLike[str]"
Numbers: TypeAlias = Sequence[float] | Tensor

_NAME = re.compile(r"ema-\d{10,}\.safetensors")
_MARK, _FORMAT, _RUN = "fused_ema.posthoc", "1", "run"
_KEYS = ("step", "updates", "sigma_rels", "tensors", "complex")  # of the metadata; values are JSON


class Snapshot(NamedTuple):
    """A file of averages, one for each of sigma_rels, as they were after `updates` updates."""

    path: Path
    step: int
    updates: int
    sigma_rels: tuple[float, ...]


def save_snapshot(folder: Folder, ema: EMA, *, dtype: torch.dtype | None = None) -> Path:
    """Writes the power_function averages of `ema`, not the others, to folder/ema-{updates:010d}.safetensors.

    For the averages at the end of the training, the last snapshot is to be of its last update.

    Whatever interrupts it, a file of that name is complete: the new one, or the one that was there before. Of sharded
    averages every rank calls it, and the mesh's first writes them whole, for which the others do not wait.

    Args:
        folder: made where there is none.
        ema: the manager; the averages are copied to the CPU first, all at once.
        dtype: a floating type to cast to, such as torch.float16 for half the size. None: as they are.

    Raises:
        ValueError: no schedule is a power_function, there was no update yet, or a value is too large for `dtype`.
        ImportError: safetensors, or numpy, which it needs to write, is not installed.
    """
    safetensors()
    check_floating(dtype or torch.float32)
    state = ema.state_dict()
    schedules, updates = state["schedules"], state["updates"]
    powers = [k for k, each in enumerate(schedules) if isinstance(each, dict) and each["name"] == "power_function"]
    if not powers:
        raise ValueError(f"ema: expected an average whose schedule is a power_function, found {schedules}")
    if updates < 1:
        raise ValueError(f"ema: expected 1 update or more before a snapshot, found {updates}")
    averages: list[dict[str, Tensor]] = [state["averages"][k] for k in powers]
    first_of: dict[tuple[Any, ...], str] = {}  # the same memory in each average → the first name of it
    names = {name: first_of.setdefault(_memory(name, averages), name) for name in averages[0]}
    about = {
        "step": state["step"],
        "updates": updates,
        "sigma_rels": [schedules[k]["sigma_rel"] for k in powers],
        "tensors": names,  # → the name that it is stored under
        "complex": [name for name in names if averages[0][name].is_complex()],
    }
    tensors = {f"{k}/{x}": storable(x, each[x], dtype) for k, each in enumerate(averages) for x in first_of.values()}
    path = Path(folder, f"ema-{updates:010d}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, tensors, {_MARK: _FORMAT, _RUN: ema._run_id, **{key: json.dumps(about[key]) for key in _KEYS}})
    if not any(tensor is None for tensor in tensors.values()) and (others := _of_other_runs(path.parent, ema)):
        warnings.warn(
            f"{folder}: holds snapshots of another run, or of this one before it was resumed: reconstruct() would mix "
            f"them with its own; keep those of one run in a folder: {others[:5]}",
            stacklevel=2,
        )
    return path


def _of_other_runs(folder: Path, ema: EMA) -> list[str]:
    """Names of snapshots that a manager has not written; those up to the state that it was loaded with are its own."""
    found = []
    for path in sorted(folder.iterdir()):
        if _NAME.fullmatch(path.name) and path.is_file() and int(path.stem[4:]) > ema._loaded_updates:
            with suppress(safetensors().SafetensorError), safetensors().safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get(_RUN, ema._run_id) != ema._run_id:
                    found.append(path.name)
    return found


def snapshots(folder: Folder) -> list[Snapshot]:
    """The snapshots in a folder, in the order of their updates; other files are ignored.

    Raises:
        ValueError: a file, which it names, is truncated, corrupt, or in a format of another version.
        ImportError: safetensors is not installed.
    """
    found = []
    for path in Path(folder).iterdir():
        if _NAME.fullmatch(path.name) and path.is_file():
            with _opened(path) as (_, about):
                if about:
                    if int(path.stem[4:]) != about["updates"]:
                        raise ValueError(
                            f"{path}: expected one of {about['updates']} updates by its name, found another"
                        )
                    found.append(Snapshot(path, about["step"], about["updates"], tuple(about["sigma_rels"])))
    return sorted(found, key=lambda each: (each.updates, each.path))


def reconstruct(
    folder: Folder,
    sigma_rel: float,
    *,
    updates: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The average that power_function(sigma_rel) would have given, nearly: `profile_error` says how nearly.

    By the manager's names, without the segments of wrappers, and only what it averages: a model with buffers takes it
    with `load_state_dict(..., strict=False)`.

    Exact where a snapshot holds that very average; warns where the error is above 0.25. Reads file by file, and sums in
    float64 on the CPU.

    Args:
        folder: of the snapshots.
        sigma_rel: in (0, 0.2887], as for `schedules.power_function`.
        updates: after how many updates; None: the last snapshot's. Best where there is a snapshot: between two, what
            came after the earlier one is missing, and the error is large.
        dtype: of the result, floating. Complex tensors are complex128 where it is float64, else complex64.
        device: of the result.

    Raises:
        ValueError: as from `snapshots`; there are none, or `updates` is before the first or after the last; names or
            shapes differ between snapshots; sigma_rel is out of range.
        ImportError: safetensors is not installed.
    """
    gamma = gamma_of(sigma_rel)
    check_floating(dtype)
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
        message = f"the profile of sigma_rel {sigma_rel} after {time} updates is met with an error of {error:.0%} only"
        warnings.warn(f"{folder}: {message}; see fused_ema.posthoc.profile_error", stacklevel=2)
    sums: dict[str, Tensor] = {}
    expected: dict[str, str] = {}
    for snapshot in used:
        with _opened(snapshot.path) as (file, about):
            names = about["tensors"]
            shapes = {name: f"shape {file.get_slice(f'0/{key}').get_shape()}" for name, key in names.items()}
            shapes |= {name: f"complex, {shapes[name]}" for name in about["complex"]}
            _check_same(snapshot.path, shapes, used[0].path, expected := expected or shapes)
            for k in range(len(snapshot.sigma_rels)):
                if weight := next(weights):  # 0 times Inf would be NaN
                    for name, key in names.items():
                        value = file.get_tensor(f"{k}/{key}")
                        if not value.is_floating_point():
                            kind = dtype_name(value)
                            raise ValueError(f"{snapshot.path}: '{k}/{key}': expected a floating type, found {kind}")
                        value = value.to(torch.float64)
                        if name not in sums:
                            sums[name] = torch.zeros_like(value)
                        wanted = tuple(file.get_slice(f"0/{key}").get_shape())
                        if value.shape != wanted or (name in about["complex"] and wanted[-1:] != (2,)):
                            two = ", and 2 for complex numbers in the end" if name in about["complex"] else ""
                            raise ValueError(
                                f"{snapshot.path}: '{k}/{key}': expected shape {wanted}{two}, "
                                f"found {tuple(value.shape)}"
                            )
                        sums[name].add_(value, alpha=weight)
    result = {}
    for name in expected:
        value = sums.pop(name)  # goes as soon as it is cast
        if name in about["complex"]:  # the same ones in each file
            result[name] = torch.view_as_complex(value if dtype == torch.float64 else value.float()).to(device)
        else:
            cast = value.to(dtype)
            if not torch.equal(cast.isfinite(), value.isfinite()):
                raise ValueError(f"dtype: expected one that holds {value.abs().max():.3g} of {name!r}, found {dtype}")
            result[name] = cast.to(device)
    return result


def solve_weights(times: Numbers, gammas: Numbers, time: float, gamma: float) -> Tensor:
    """How to combine averages: Σ weights[k]·average[k] comes nearest to the wanted one.

    Solves A·x = b in float64, where A[k, l] is the inner product of the profiles k and l, b[k] that of k and the wanted
    one; then scales x to sum to 1, as the shares in an average do. Profiles are scaled to norm 1 for it, and singular
    values of A below 1e-12 of the largest count as 0: equal averages share their weight, where x would else be rounding
    errors divided by each other. (256 snapshots of 0.05 and 0.10, evenly spread, stay above 1e-8.) If the wanted
    average is among them, it gets exactly 1.

    Args:
        times: the updates that each average was taken after, > 0.
        gammas: the exponent of each average's profile, >= 0; see `schedules.gamma_of`.
        time, gamma: of the wanted average.

    Returns: a float64 weight per average, on the CPU.

    Raises:
        ValueError: times and gammas differ in length, are none, or out of range; or no average has weight where the
            wanted one has.
    """
    wanted, given = _profiles([time], [gamma]), _profiles(times, gammas)
    same = (given[0] == wanted[0]) & (given[1] == wanted[1])
    if same.any():
        return torch.zeros_like(given[0]).index_fill_(0, same.nonzero()[0], 1.0)
    a, b, scale = _system(*given, *wanted)
    x: Tensor = torch.linalg.lstsq(a, b[:, None], rcond=1e-12, driver="gelsd").solution[:, 0] / scale
    if not x.sum() > 0:
        raise ValueError(f"no average has weight where that of gamma {gamma} after {time} updates has")
    return x / x.sum()


def profile_error(times: Numbers, gammas: Numbers, time: float, gamma: float) -> float:
    """‖Σ x[k]·p[k] - p‖ / ‖p‖, in L2, with x from `solve_weights`; 1e-8 is rounding.

    If the weights were independent noise at each update, it would be the error of the reconstruction relative to the
    noise that is left in the wanted average; relative to how far weights go that change slowly, it is smaller. For a
    folder::

        found = snapshots(folder)
        times = [each.updates for each in found for _ in each.sigma_rels]
        gammas = [gamma_of(sigma_rel) for each in found for sigma_rel in each.sigma_rels]
        profile_error(times, gammas, found[-1].updates, gamma_of(0.15))
    """
    a, b, scale = _system(*_profiles(times, gammas), *_profiles([time], [gamma]))
    x = solve_weights(times, gammas, time, gamma) * scale
    return math.sqrt(max(0.0, float(x @ a @ x - 2 * (b @ x) + 1)))


def _inner(time_a: Tensor, gamma_a: Tensor, time_b: Tensor, gamma_b: Tensor) -> Tensor:
    """∫ p_a·p_b: a power of s up to the earlier time. The later profile's exponent is what can only underflow."""
    earlier, later = torch.minimum(time_a, time_b), torch.maximum(time_a, time_b)
    exponent = torch.where(time_a < time_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later) ** exponent / later


def _system(t: Tensor, g: Tensor, time: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A and b for profiles scaled to norm 1, and the norms before, relative to the wanted one's."""
    norms, norm = _inner(t, g, t, g).sqrt(), _inner(time, gamma, time, gamma).sqrt()
    a = _inner(t[:, None], g[:, None], t, g) / norms[:, None] / norms
    return a, _inner(t, g, time, gamma) / norms / norm, norms / norm


def _profiles(times: Numbers, gammas: Numbers) -> tuple[Tensor, Tensor]:
    t, g = (torch.as_tensor(each, dtype=torch.float64, device="cpu") for each in (times, gammas))
    if t.ndim != 1 or t.shape != g.shape or not t.numel():
        raise ValueError(f"expected as many times as gammas, 1 or more, found shapes {[*t.shape]} and {[*g.shape]}")
    if not (t.isfinite() & g.isfinite() & (t > 0) & (g >= 0)).all():
        raise ValueError(f"expected finite times > 0 and gammas >= 0, found {t.tolist()} and {g.tolist()}")
    return t, g


def _memory(name: str, averages: Sequence[dict[str, Tensor]]) -> tuple[Any, ...]:
    """Equal for names that are tied in all averages; but not of sharded ones: a rank can't tell empty shards apart."""
    each = [average[name] for average in averages]
    if any(map(is_sharded, each)):
        return (name,)
    return tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in each)


def _check_same(path: Path, found: dict[str, str], first: Path, expected: dict[str, str]) -> None:
    differences = [
        f"'{name}': expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
        for name in expected | found
        if expected.get(name) != found.get(name)
    ]
    if differences:
        raise ValueError(f"{path}: other tensors than in {first.name}: {'; '.join(differences)}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and its metadata, which is {} where it is none of `save_snapshot`'s."""
    library = safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            yield file, _about(path, file.metadata() or {})
    except library.SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error


def _about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata as `save_snapshot` writes them; ValueError where it can't have written these."""
    if metadata.get(_MARK, _FORMAT) != _FORMAT:
        raise ValueError(f"{path}: expected format {_FORMAT}, found {metadata[_MARK]}: update fused_ema")
    if _MARK not in metadata:
        return {}
    try:
        about: dict[str, Any] = {key: json.loads(metadata[key]) for key in _KEYS}
        whole_number("step", about["step"], 0)
        whole_number("updates", about["updates"], 1)
        sigma_rels, names, parts = about["sigma_rels"], about["tensors"], about["complex"]
        if not isinstance(sigma_rels, list) or not sigma_rels:
            raise ValueError(f"sigma_rels: expected a list of numbers, found {shown(sigma_rels)}")
        for sigma_rel in sigma_rels:
            gamma_of(sigma_rel)
        if not isinstance(names, dict) or not all(isinstance(key, str) for key in names.values()):
            raise ValueError(f"tensors: expected names by name, found {shown(names)}")
        if not isinstance(parts, list) or not all(isinstance(name, str) and name in names for name in parts):
            raise ValueError(f"complex: expected a list of names among the tensors', found {shown(parts)}")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    return about
