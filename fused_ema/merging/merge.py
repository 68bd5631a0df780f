"""The weighted average of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .._warning import warn
from ..checkpoints.files import PathLike
from ..pairs.arguments import shown
from ..pairs.pairing import first_few
from . import dcp_folders, safetensors_files, snapshot_files, torch_files
from .checks import check_alike, warn_of_order
from .entries import Checkpoint
from .progress import Progress
from .run import Job, alike, average, copy
from .weights import weights_of

Integers = Literal["equal", "newest"]


def merge(
    paths: Sequence[PathLike],
    out: PathLike,
    weights: str | Sequence[float] = "mean",
    *,
    times: Sequence[float] | None = None,
    key: str | None = None,
    integers: Integers = "equal",
    progress: bool | None = None,
) -> Path:
    """Writes the weighted average of checkpoints, piece by piece, in memory that does not grow with the model.

    All checkpoints are of one kind, and so is the average: .safetensors files; folders of them, with an index or with
    one file; files of ``torch.save``, which are read with weights_only=True; or folders of
    ``torch.distributed.checkpoint`` (DCP), where one whole tensor of each checkpoint is in memory at a time. Names,
    shapes and dtypes are compared before anything is written. The average appears under its name once it is complete
    and on disk, and not at all after an error; a process that is killed may leave a hidden temporary file or folder
    next to it.

    Args:
        paths: the checkpoints, from the oldest to the newest; the order matters for all weights but the mean.
        out: where to write. A file that is there is replaced; a folder has to be new or empty. What is not averaged,
            such as metadata, the layout in files and a folder's configuration (its .json, .txt, .model, .jinja and
            .tiktoken files), comes from the newest checkpoint.
        weights: "mean", "linear", "ema:0.9", "wsm:cosine", "power:0.15" and others, or a number for each checkpoint;
            see `merging.weights_of`. Checkpoints of weight 0 are compared and not read. Snapshots of
            `posthoc.save_snapshot` are merged by "power:SIGMA_REL", which gives what `posthoc.reconstruct` does.
        times: when each checkpoint was saved, for "ema" and "power".
        key: where the model is in files of torch.save and in DCP folders that hold more than it, such as "model" or
            "state.model"; the average is under that key too, alone. None: at the top, or, in a file of torch.save,
            under the only key that has a dict with tensors.
        integers: integer and bool tensors of one element, such as counts, are the newest checkpoint's. All others have
            to be "equal" in all checkpoints, as they may be packed weights, of which there is no average; or they are
            the "newest" checkpoint's too.
        progress: whether to draw a bar on stderr. None: where that is a terminal.

    Returns: the path of the average.

    Raises:
        ValueError, TypeError: checkpoints differ in names, shapes, dtypes, ties or kind; one is damaged, holds a type
            that has no average (such as float8), or is a pickle that could run code; or an argument is out of range.
            The text names the checkpoint and the tensor. What was at `out` before stays as it was.
        FileExistsError: `out` is a folder with files in it, or is one of the checkpoints.
        OSError: a file can't be read or written.

    Warns where an average has NaN or infinite values, and names it; and where the numbers in the paths fall, if the
    order matters.

    Equivalent to, with K state dicts in memory::

        total = sum(w * state[name].double() for w, state in zip(weights, states))
        result[name] = total.to(dtype)  # rounded once

    bit for bit, on any machine and with any number of threads; the products are added in the order of the checkpoints.
    (`to` itself rounds twice from float64 to 16 bits.)
    """
    if integers not in ("equal", "newest"):
        raise ValueError(f"integers: expected 'equal' or 'newest', found {shown(integers)}")
    if isinstance(paths, (str, bytes)) or not isinstance(paths, Sequence) or not paths:
        raise ValueError(f"paths: expected a list of one checkpoint or more, found {shown(paths)}")
    targets = [Path(each).resolve() for each in paths]
    if twice := sorted({str(each) for each in targets if targets.count(each) > 1}):
        raise ValueError(
            f"paths: expected each checkpoint once, found {twice[0]} more than once; give it a larger weight instead"
        )
    if Path(out).resolve() in targets:
        raise FileExistsError(f"{out}: expected a place of its own for the average, found a checkpoint to merge")
    with ExitStack() as closing:
        found = [_opened(Path(each), key, closing) for each in paths]
        if unlike := [each for each in found if each.kind != found[0].kind]:
            raise ValueError(
                f"{unlike[0].path}: expected {found[0].kind}, as {found[0].path} is, found {unlike[0].kind}"
            )
        _check_out(Path(out), found[0])
        opened = found
        found, numbers = snapshot_files.weighed(found, weights, times) or (
            found,
            weights_of(weights, len(found), times),
        )
        check_alike(found)
        if found[0].kind == safetensors_files.FOLDER:
            safetensors_files.warn_of_configurations(found)
        ordered = isinstance(weights, str) and weights not in ("mean", "pma:sma", "wsm:linear")
        if ordered and found[0].kind != snapshot_files.KIND:
            warn_of_order([Path(each) for each in paths])

        def check() -> None:
            for each in opened:
                each.check_unchanged()

        return _merged(found, numbers, Path(out), integers, progress, check)


def _opened(path: Path, key: str | None, closing: ExitStack) -> Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a checkpoint, found nothing there")
    if path.is_dir():
        if (path / dcp_folders.METADATA).is_file():
            checkpoint = dcp_folders.open_folder(path, key)
        elif len(list(path.glob("*.safetensors"))) == 1 or any(path.glob(f"*{safetensors_files.INDEX}")):
            _no_key(path, key)
            checkpoint = safetensors_files.open_folder(path, closing)
        else:
            raise ValueError(
                f"{path}: expected a folder with one .safetensors file, an index of several, or the .metadata of "
                "torch.distributed.checkpoint, found none of these; name a file inside it"
            )
    elif path.suffix.lower() == ".safetensors":
        _no_key(path, key)
        checkpoint = safetensors_files.open_file(path, closing)
    else:
        checkpoint = torch_files.open_file(path, key, closing)
    if not checkpoint.entries:
        under = f" under {key!r}" if key else ""
        raise ValueError(f"{path}: expected tensors{under}, found none")
    return checkpoint


def _check_out(out: Path, like: Checkpoint) -> None:
    """The name says which kind it is; a folder in the place of a file would show only at the end."""
    safetensors = out.suffix.lower() == ".safetensors"
    if safetensors != (like.kind == safetensors_files.FILE):
        wanted = "a name that ends in .safetensors" if not safetensors else "a name that does not end in .safetensors"
        raise ValueError(f"{out}: expected {wanted}, as the average is {like.kind}, like the checkpoints")
    if out.is_dir() and like.kind in (safetensors_files.FILE, torch_files.KIND):
        raise FileExistsError(f"{out}: expected a file or nothing there, as the average is {like.kind}, found a folder")


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise ValueError(
            f"{path}: key: expected none for safetensors, which have no keys above the names, found {key!r}"
        )


def _merged(
    checkpoints: list[Checkpoint],
    weights: list[float],
    out: Path,
    integers: Integers,
    progress: bool | None,
    check: Callable[[], None],
) -> Path:
    """`check` is called once everything was read, before the average gets its name."""
    newest = checkpoints[-1]
    used = [(each, weight) for each, weight in zip(checkpoints, weights, strict=True) if weight]  # 0 times Inf is NaN
    numbers = [weight for _, weight in used]
    untied = {name: entry for name, entry in newest.entries.items() if name not in newest.ties and entry.count}
    copied = {name: entry for name, entry in untied.items() if not entry.averaged}
    if integers == "equal":
        for name, entry in copied.items():
            if entry.real[1] > 1 and not alike(entry, [each.entries[name].open() for each in checkpoints]):
                raise ValueError(
                    f"{name!r}: expected the same {entry} in all checkpoints, found different ones: integers have no "
                    "average. If they are packed weights, merge the unpacked checkpoints instead; if the newest "
                    "checkpoint's are right, pass integers='newest'"
                )
    averaged = {name: entry for name, entry in untied.items() if entry.averaged}
    bar = Progress(len(used) * sum(entry.bytes for entry in averaged.values()), progress)
    try:
        if newest.kind == dcp_folders.KIND:
            not_finite: set[str] = set()

            def tensor(name: str) -> Tensor:
                entry = newest.entries[name]
                result = torch.empty(entry.shape, dtype=entry.dtype)
                place = dcp_folders.in_memory(result)
                if entry.averaged:
                    job = Job(name, entry, [each.entries[name].open() for each, _ in used], place)
                    not_finite.update(average([job], numbers, bar))
                else:
                    copy([Job(name, entry, [entry.open()], place)])
                return result

            dcp_folders.write_folder(out, newest, tensor, check)
        else:
            with _writers[newest.kind](out, newest) as places:
                jobs = (
                    Job(name, entry, [each.entries[name].open() for each, _ in used], places[name])
                    for name, entry in averaged.items()
                )
                not_finite = average(jobs, numbers, bar)
                copy(Job(name, entry, [entry.open()], places[name]) for name, entry in copied.items())
                check()
    finally:
        bar.close()
    if not_finite:
        warn(f"{out}: NaN or infinite values are in the average of {first_few(sorted(map(repr, not_finite)), ', ')}")
    return out


_writers = {
    safetensors_files.FILE: safetensors_files.written_file,
    safetensors_files.FOLDER: safetensors_files.written_folder,
    snapshot_files.KIND: safetensors_files.written_file,
    torch_files.KIND: torch_files.written_file,
}
