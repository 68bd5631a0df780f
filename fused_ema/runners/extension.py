"""Finds the compiled extension, or says why not."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the extension, which links against its libraries

from .._build import compile as _build
from .._build.switch import switch
from .._version import __version__
from .base import Call, Job, Prepared, Tensors, Watch

BUILD = "run `python -m fused_ema build`"
REBUILD = "run `python -m fused_ema build --force`"


@dataclass(frozen=True)
class _Found:
    module: ModuleType | None
    path: Path | None
    record: dict[str, Any]
    why_not: str | None


def _mismatch(folder: Path, cached: bool) -> str | None:
    """Why the library in this folder must not even be imported: the wrong one may crash."""
    library = folder / _build.LIBRARY
    if cached and (reason := _build.distrust(folder)):
        return reason
    record = _build.read_record(folder)
    if record is None:
        return f"{library} has no readable {_build.RECORD} beside it that says what it was built for: {BUILD}"
    made_for = f"{library} was built for"
    if record.get("torch") != str(torch.__version__):
        return f"{made_for} torch {record.get('torch')}, but torch {torch.__version__} is installed: {BUILD}"
    if record.get("python") != _build.PYTHON_TAG:
        return f"{made_for} {record.get('python')}, but this is {_build.PYTHON_TAG}: {BUILD}"
    if record.get("version") != __version__:
        return f"{made_for} fused_ema {record.get('version')}, but this is {__version__}: {BUILD}"
    size = library.stat().st_size
    if record.get("size") != size:
        return f"{library} is damaged ({size} bytes instead of {record.get('size')}): {REBUILD}"
    if cached and record.get("sources") != _build.sources_digest():
        return f"{library} was built from other sources than this fused_ema's: {BUILD}"
    return None


def _import(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_build.NAME, str(library))
    spec = importlib.util.spec_from_file_location(_build.NAME, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_build.NAME] = module
    return module


def _find() -> _Found:
    if switch("FUSED_EMA_EXT") is False:
        return _Found(None, None, {}, "FUSED_EMA_EXT=0 switches the extension off: unset it")
    reasons: list[str] = []
    usable: list[tuple[Path, dict[str, Any]]] = []
    folders = [(_build.PACKAGE, False)]
    with contextlib.suppress(RuntimeError):  # no home folder
        folders.append((_build.cache_folder(str(torch.__version__)), True))
    for folder, cached in folders:
        try:
            if not (folder / _build.LIBRARY).is_file():
                continue
            if reason := _mismatch(folder, cached):
                reasons.append(reason)
            else:
                usable.append((folder / _build.LIBRARY, _build.read_record(folder) or {}))
        except OSError as error:
            reasons.append(f"{folder} cannot be read ({error})")
    usable.sort(key=lambda found: found[1].get("cuda") is None)  # one with CUDA first; else the package's own
    for library, record in usable:
        try:
            return _Found(_import(library), library, record, None)
        except Exception as error:
            sys.modules.pop(_build.NAME, None)
            reasons.append(f"importing {library} failed ({type(error).__name__}: {error}): {REBUILD}")
    return _Found(None, None, {}, "; ".join(reasons) or f"the extension is not built: {BUILD}")


def cuda_kernel_why_not() -> str | None:
    """As `cuda_why_not`, but for what does not depend on a GPU being there."""
    if switch("FUSED_EMA_CUDA") is False:
        return "FUSED_EMA_CUDA=0 switches the CUDA kernel off: unset it"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is a ROCm build, and the kernel is CUDA only"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a CUDA build, then {BUILD}"
    if _found.module is None:
        return _found.why_not
    if not _found.module.cuda_built:
        reason = _found.record.get("cuda_why_not") or "the reason was not recorded"
        return f"{_found.path} was built without CUDA ({reason}): once that is mended, {BUILD}"
    return None


def load() -> ModuleType | None:
    """The module fused_ema._C, or None."""
    return _found.module


def path() -> Path | None:
    """The file of the loaded extension."""
    return _found.path


def record() -> dict[str, Any]:
    """What the loaded extension was built for, see `_build.describe`; empty without one."""
    return dict(_found.record)


def why_not() -> str | None:
    """Why there is no extension, and what to do; None where there is one."""
    return _found.why_not


def cuda_why_not() -> str | None:
    """Why the CUDA kernel does not run, now and here, and what to do; None where it does."""
    reason = cuda_kernel_why_not()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA GPU: check `nvidia-smi`, the driver and CUDA_VISIBLE_DEVICES"
    return reason


def _serves_the_command_line() -> bool:
    """`python -m fused_ema` must run to mend what the switches below complain of."""
    return any(pair == ("-m", "fused_ema") for pair in zip(sys.orig_argv, sys.orig_argv[1:], strict=False))


_found = _find()
cuda_enabled: bool = cuda_kernel_why_not() is None

if not _serves_the_command_line():
    if switch("FUSED_EMA_EXT") and _found.module is None:
        raise ImportError(f"FUSED_EMA_EXT=1, but {_found.why_not}")
    if switch("FUSED_EMA_CUDA") and not cuda_enabled:
        raise ImportError(f"FUSED_EMA_CUDA=1, but {cuda_kernel_why_not()}")


class Extension:
    """The compiled runner, csrc/: one kernel launch per CUDA device, one parallel loop on the CPU."""

    name = "extension"

    def backend(self, device_type: str) -> str:
        return device_type

    def why_not(self, device_type: str) -> str | None:
        if load() is None:
            return why_not() or "the extension is not loaded"
        if device_type == "cuda":
            return None if cuda_enabled else cuda_kernel_why_not()
        return None if device_type == "cpu" else f"the extension has no kernel for {device_type} devices"

    def prepare(self, job: Job, watch: Watch | None) -> Prepared:
        return _Compiled(job, watch)


class _Compiled:
    """See `Prepared`; csrc/plan.h is behind it."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        library: Any = load()
        self._ops = library.Op.__members__
        names, ema, model, actions, averages, strides = job
        self._tables = library.Plan(names, ema, model, actions, watch, averages, strides)
        self.launches = self._tables.launches
        self.scratch = self._tables.aside_bytes
        self.current = self._tables.current
        self.exchanged = self._tables.exchanged
        self.mark_exchanged = self._tables.mark_exchanged

    def run(self, call: Call, ema: Tensors | None = None, model: Tensors | None = None) -> bool:
        op, decays, device_decays, keys, average, scratch = call
        if ema is not None:
            return self._tables.run_with(ema, model, self._ops[op], decays, device_decays)  # type: ignore[no-any-return]
        return self._tables.run(self._ops[op], decays, device_decays, keys, average, scratch)  # type: ignore[no-any-return]
