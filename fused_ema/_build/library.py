"""Finds the compiled extension and loads it, or says why not. This imports torch: setup.py must not import it."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch  # before the extension, which links against its libraries

from .cache import LIBRARY, RECORD, cache_folder, distrust, read_record
from .compile import NAME, PACKAGE, Record, built_for, sources_digest
from .switch import switch
from .toolkit import no_cuda_in
from .._version import __version__

BUILD = "run `python -m fused_ema build`"
REBUILD = "run `python -m fused_ema build --force`"


@dataclass(frozen=True)
class _Found:
    module: ModuleType | None = None
    path: Path | None = None
    record: Record = field(default_factory=dict)
    why_not: str | None = None


def _refusal(library: Path, record: Record | None, cached: bool) -> str | None:
    """Why a library must not even be imported: the wrong one may crash."""
    if cached and (reason := distrust(library.parent)):
        return reason
    if record is None:
        return f"{library} has no readable {RECORD} next to it that says what it was built for; {BUILD}"
    here = built_for({"torch": str(torch.__version__), "version": __version__})
    if built_for(record) != here:
        return f"{library} was built for {built_for(record)}, but {here} are installed; {BUILD}"
    size = library.stat().st_size
    if record.get("size") != size:
        return f"{library} is damaged ({size} bytes instead of {record.get('size')}); {REBUILD}"
    if library.parent != PACKAGE and record.get("sources") != sources_digest():
        return f"{library} was built from other sources than those of this fused_ema; {BUILD}"
    return None


def _import(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def _find() -> _Found:
    if switch("FUSED_EMA_EXT") is False:
        return _Found(why_not="FUSED_EMA_EXT=0 switches the extension off; unset it")
    reasons: list[str] = []
    usable: list[tuple[Path, Record]] = []
    cache: Path | None = None
    with contextlib.suppress(RuntimeError):  # no home folder
        cache = cache_folder(str(torch.__version__))
    # A checkout in the working directory shadows the package that was installed from it, with its extension.
    installed = (Path(each, PACKAGE.name).resolve() for each in sys.path)
    for folder in dict.fromkeys([PACKAGE, *([cache] if cache else []), *installed]):
        library = folder / LIBRARY
        try:
            if not library.is_file():
                continue
            record = read_record(folder)
            if reason := _refusal(library, record, cached=folder == cache):
                reasons.append(reason)
            else:
                usable.append((library, record or {}))
        except OSError as error:
            reasons.append(f"{folder} cannot be read ({error})")
    usable.sort(key=lambda found: found[1].get("cuda") is None)  # one with CUDA comes first, else the package's own
    for library, record in usable:
        try:
            return _Found(_import(library), library, record)
        except Exception as error:
            sys.modules.pop(NAME, None)
            reasons.append(f"importing {library} failed ({type(error).__name__}: {error}); {REBUILD}")
    return _Found(why_not="; ".join(reasons) or f"the extension is not built; {BUILD}")


def load() -> ModuleType | None:
    """The module fused_ema._C, or None."""
    return _found.module


def path() -> Path | None:
    """The file of the loaded extension."""
    return _found.path


def record() -> Record:
    """What the loaded extension was built for, see `compile.describe`; empty without an extension."""
    return dict(_found.record)


def why_not() -> str | None:
    """Why no extension is loaded, and what to do; None where one is."""
    return _found.why_not


def cuda_kernel_why_not() -> str | None:
    """Like `cuda_why_not`, whether or not there is a GPU."""
    if (reason := no_cuda_in(torch)) or _found.module is None:
        return reason or _found.why_not
    if not _found.module.cuda_built:
        reason = _found.record.get("cuda_why_not") or "the reason was not recorded"
        return f"{_found.path} was built without CUDA ({reason}); once that is fixed, {BUILD}"
    return None


def cuda_why_not() -> str | None:
    """Why the CUDA kernel does not run here and now, and what to do; None where it does."""
    reason = cuda_kernel_why_not()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA GPU; check `nvidia-smi`, the driver and CUDA_VISIBLE_DEVICES"
    return reason


def _insist() -> None:
    """Raises where the environment asks for a part that is missing.

    `python -m fused_ema` must run even then: it says what to do, and can do it.
    """
    if any(pair == ("-m", "fused_ema") for pair in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)):
        return
    if switch("FUSED_EMA_EXT") and _found.module is None:
        raise ImportError(f"FUSED_EMA_EXT=1, but {_found.why_not}")
    if switch("FUSED_EMA_CUDA") and (reason := cuda_kernel_why_not()):
        raise ImportError(f"FUSED_EMA_CUDA=1, but {reason}")


_found = _find()
cuda_enabled: bool = cuda_kernel_why_not() is None
_insist()
