"""Checkpoints in folders of torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import errno
import inspect
import io
import math
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import replacing_folder
from ..pairs.pairing import first_few
from .entries import Checkpoint, Entry, InMemory, Place, identity

ALLOWED = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}
OF_OPTIMIZERS = re.compile(r"(^|\.)(optim|optimizers?)\.|\.(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)$")
KIND, METADATA = "a folder of torch.distributed.checkpoint", ".metadata"


def open_folder(path: Path, key: str | None) -> Checkpoint:
    """All tensors of the folder, or those whose names begin with the key and a dot. `about`: the keys of each name."""
    files = {str(file): identity(file.stat()) for file in path.iterdir()}
    tensors, storage, paths = _metadata(path)
    pieces: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, info in storage.items():
        if index.offset is not None:
            pieces.setdefault(index.fqn, {})[tuple(index.offset)] = info
    checkpoint = Checkpoint(str(path), KIND, {}, paths, files=files)
    others = []
    for name, about in tensors.items():
        if key is not None and not name.startswith(f"{key}."):
            continue
        if not hasattr(about, "chunks") or (key is None and OF_OPTIMIZERS.search(name)):
            others.append(name)
            continue
        checkpoint.entries[name] = _entry(path, name, about, pieces.get(name, {}))
    if others:
        raise ValueError(
            f"{path}: expected tensors of a model, found {first_few(list(map(repr, others)), ', ')}; name the model by "
            "key=, such as 'model' for names that begin with 'model.'"
        )
    return checkpoint


class _Unpickler(pickle.Unpickler):
    """Makes the objects that DCP's metadata consist of, which are plain data, and refuses all others.

    (PyTorch's own reader of weights does not know the pickles of protocol 4 that DCP writes.)
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (isinstance(getattr(torch, name, None), torch.dtype) and module == "torch"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"expected the metadata of tensors, found {module}.{name}")


def _metadata(path: Path) -> Any:
    """The pickle of what the folder holds, read without running code that is in it."""
    try:
        with open(path / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
            return metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data or {}
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path / METADATA}: damaged, or not written by torch.distributed.checkpoint: {error}"
        ) from None


def _entry(folder: Path, name: str, about: Any, pieces: dict[tuple[int, ...], Any]) -> Entry:
    """`pieces`: where each chunk is stored, by its offsets in the tensor."""
    dtype, shape = about.properties.dtype, tuple(about.size)
    covered = sum(math.prod(chunk.sizes) for chunk in about.chunks)
    offsets = {tuple(chunk.offsets) for chunk in about.chunks}
    inside = all(
        o + size <= most for c in about.chunks for o, size, most in zip(c.offsets, c.sizes, shape, strict=True)
    )
    if covered != math.prod(shape) or not inside or len(offsets) < len(about.chunks) or offsets - pieces.keys():
        raise ValueError(f"{folder}: {name!r}: expected chunks that cover shape {shape}, found {covered} elements")

    def place() -> Place:
        whole = torch.zeros(shape, dtype=dtype)
        for chunk in about.chunks:
            part = _chunk(folder, name, pieces[tuple(chunk.offsets)])
            if part.shape != chunk.sizes or part.dtype != dtype:
                raise ValueError(
                    f"{folder}: {name!r}: expected a chunk of shape {tuple(chunk.sizes)}, found {part.shape}"
                )
            at = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[at] = part
        return in_memory(whole)

    return Entry(dtype, shape, None, math.prod(shape), 0, place)


def in_memory(tensor: Tensor) -> InMemory:
    flat = tensor.reshape(-1)
    return InMemory(torch.view_as_real(flat).flatten() if flat.is_complex() else flat)


def _chunk(folder: Path, name: str, info: Any) -> Tensor:
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{folder}: {name!r}: expected plain chunks, found {info.transform_descriptors}")
    file = folder / info.relative_path
    if file.resolve().parent != folder.resolve():
        raise ValueError(f"{folder}: {name!r}: expected a chunk inside the folder, found {info.relative_path!r}")
    with open(file, "rb") as stream:
        stream.seek(info.offset)
        data = stream.read(info.length)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file}: {name!r}: truncated or corrupt: {error}") from None
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{file}: {name!r}: expected a tensor, found {type(tensor).__name__}")
    return tensor.detach()


def write_folder(out: Path, newest: Checkpoint, average: Callable[[str], Tensor], check: Callable[[], None]) -> None:
    """Writes a folder of tensors, each of which is made by `average(name)` when its turn comes; then calls `check`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    failures: list[BaseException] = []

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Tensor:
            try:
                return average(write_item.index.fqn)
            except BaseException as error:
                failures.append(error)
                raise

    alone: dict[str, Any] = {"no_dist": True} if "no_dist" in inspect.signature(save).parameters else {}
    with replacing_folder(out) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one says that a single process saves
        needed, free = sum(entry.bytes for entry in newest.entries.values()), shutil.disk_usage(temporary).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"No space left for the {needed} bytes of the average, {free} are free", str(out)
            )
        writer = FileSystemWriter(temporary, single_file_per_rank=True, sync_files=False)
        try:
            save(_nested(newest), storage_writer=writer, planner=Planner(), **alone)
        except CheckpointException as error:  # by which DCP hides what went wrong
            raise next((failure[0] for failure in error.failures.values()), error) from None
        except RuntimeError as error:  # by which PyTorch's zip files do
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            if failures:
                raise failures[0] from None
            raise OSError(f"{out}: PyTorch can't write the average: {error}") from error
        check()


def _nested(newest: Checkpoint) -> dict[str, Any]:
    """The state dict in the form that the newest one had, of tensors without memory."""
    state: dict[str, Any] = {}
    for name, entry in newest.entries.items():
        keys = newest.about.get(name, (name,))
        inside = state
        if not all(isinstance(key, str) for key in keys):  # a list, all of whose items would have to be there
            keys = (name,)
        for key in keys[:-1]:
            inside = inside.setdefault(key, {})
        inside[keys[-1]] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    return state
