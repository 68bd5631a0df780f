"""The one description of sources and flags, for setup.py and for `python -m fused_ema build`.

setup.py loads this in an environment that may lack torch: nothing here imports torch or setuptools at import.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .switch import switch
from .toolkit import Toolkit, find_toolkit
from .._version import __version__

NAME = "fused_ema._C"
PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
RECORD = LIBRARY.rpartition(".")[0] + ".json"  # beside the library: what it was built for
PYTHON_TAG: str = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag or "python"


class BuildError(RuntimeError):
    """No extension could be built; the text says why, and what to do."""


def say(text: str) -> None:
    print(f"fused_ema: {text}", file=sys.stderr, flush=True)


def import_torch() -> Any:
    try:
        import torch
    except Exception as error:
        raise BuildError(f"torch cannot be imported in this build ({type(error).__name__}: {error})") from None
    return torch


def source_folder() -> Path:
    """fused_ema/_csrc in an installed package, csrc beside fused_ema in a checkout."""
    installed = PACKAGE / "_csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


# ---- The description -----------------------------------------------------------------------------


def sources(cuda: bool) -> list[Path]:
    """Absolute, in a fixed order."""
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    return [path for path in sorted(source_folder().iterdir()) if path.suffix in suffixes]


def cxx_flags() -> tuple[list[str], list[str]]:
    """For the compiler and the linker. No -std: torch adds its own. No -march: ema_cpu.cpp asks the CPU."""
    if sys.platform == "win32":
        return ["/O2", "/openmp", "/fp:precise"], []
    flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # without it at::parallel_for is serial
    return flags + openmp, openmp


def nvcc_flags() -> list[str]:
    """No flag may contain "arch", in any place: torch would drop all its -gencode flags."""
    return ["-O3", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo"]


def extension(cuda: bool) -> Any:
    from torch.utils import cpp_extension

    compile_flags, link_flags = cxx_flags()
    kind: Any = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        name=NAME,
        sources=[str(path) for path in sources(cuda)],
        depends=[str(path) for path in sorted(source_folder().glob("*.h"))],
        define_macros=[("FUSED_EMA_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": compile_flags, "nvcc": nvcc_flags()} if cuda else {"cxx": compile_flags},
        extra_link_args=link_flags,
    )


def sources_digest() -> str:
    """Changes with anything that goes into the library."""
    digest = hashlib.sha256(repr([cxx_flags(), nvcc_flags()]).encode())
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(torch: Any, toolkit: Toolkit | str) -> dict[str, str | int | None]:
    """What is written beside the library, and compared before it is loaded."""
    with_cuda = isinstance(toolkit, Toolkit)
    return {
        "torch": str(torch.__version__),
        "cuda": ".".join(map(str, toolkit.version)) if isinstance(toolkit, Toolkit) else None,
        "archs": toolkit.archs if isinstance(toolkit, Toolkit) else None,
        "cuda_why_not": None if with_cuda else str(toolkit),
        "python": PYTHON_TAG,
        "version": __version__,
        "sources": sources_digest(),
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_built(folder: Path, wanted: dict[str, str | int | None]) -> bool:
    record = read_record(folder)
    if record is None or not (folder / LIBRARY).is_file():
        return False
    same = all(record.get(key) == value for key, value in wanted.items())
    return same and record.get("size") == (folder / LIBRARY).stat().st_size


# ---- Compiling -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    library: Path
    record: dict[str, str | int | None]


@contextlib.contextmanager
def _build_environment(toolkit: Toolkit | str) -> Iterator[None]:
    """What torch's BuildExtension reads, set for as long as it runs."""
    # An environment that is used without being activated has its ninja, but not on PATH.
    wanted = {"PATH": os.pathsep.join((os.environ.get("PATH", ""), sysconfig.get_path("scripts")))}
    if isinstance(toolkit, Toolkit):
        # Never left unset: torch takes the visible GPUs then, and fails where there is none.
        wanted |= {"CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": toolkit.archs}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        from torch.utils import cpp_extension

        if isinstance(toolkit, Toolkit):
            cpp_extension.CUDA_HOME = str(toolkit.home)  # its own guess, made at import, may be wrong
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _compile(temp: Path, toolkit: Toolkit | str) -> Path:
    with _build_environment(toolkit):
        from setuptools import Distribution
        from torch.utils.cpp_extension import BuildExtension

        cuda = isinstance(toolkit, Toolkit)
        distribution = Distribution({"name": "fused_ema", "ext_modules": [extension(cuda)]})
        command = BuildExtension(distribution)
        command.build_lib, command.build_temp = str(temp / "lib"), str(temp / "objects")
        command.ensure_finalized()
        command.run()
        return Path(command.get_ext_fullpath(NAME))


def compile_extension(temp: Path) -> Built:
    """Compiles what this torch and machine allow into `temp`: with CUDA, or without it, or a BuildError."""
    if switch("FUSED_EMA_EXT") is False:
        raise BuildError("FUSED_EMA_EXT=0 switched the extension off: unset it to build one")
    need_cuda = switch("FUSED_EMA_CUDA") is True
    torch = import_torch()
    toolkit = find_toolkit(torch)
    if isinstance(toolkit, Toolkit):
        say(f"compiling for torch {torch.__version__} with nvcc in {toolkit.home}, for {toolkit.archs}")
        record = describe(torch, toolkit)  # before compiling: the sources may be edited meanwhile
        try:
            return Built(_compile(temp, toolkit), record)
        except Exception as error:
            if need_cuda:
                raise BuildError(f"FUSED_EMA_CUDA=1, but compiling with CUDA failed: {error}") from error
            say(f"WARNING: compiling with CUDA failed ({error}); the compiler's output is above.")
            say("WARNING: going on WITHOUT CUDA (FUSED_EMA_CUDA=1 makes this an error).")
            toolkit = f"compiling with nvcc in {toolkit.home} failed: {error}"
    elif need_cuda:
        raise BuildError(f"FUSED_EMA_CUDA=1, but {toolkit}")
    say(f"compiling for torch {torch.__version__} without CUDA: {toolkit}")
    record = describe(torch, toolkit)
    try:
        return Built(_compile(temp, toolkit), record)
    except Exception as error:
        raise BuildError(
            f"compiling failed ({type(error).__name__}: {error}), the compiler's output is above: it takes "
            "setuptools and the C++ compiler that this torch asks for"
        ) from error


def place(built: Built, folder: Path) -> None:
    """Moves a library and its record into a folder. A process that has the old one loaded keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    size = built.library.stat().st_size  # a library that was cut off would crash when loaded
    with tempfile.TemporaryDirectory(prefix=".fused_ema-", dir=folder) as staging:
        library, text = Path(staging) / LIBRARY, Path(staging) / RECORD
        shutil.copyfile(built.library, library)
        shutil.copymode(built.library, library)
        text.write_text(json.dumps({**built.record, "size": size}, indent=1) + "\n", encoding="utf-8")
        # A reader in between sees no extension, never a pair that does not belong together.
        (folder / RECORD).unlink(missing_ok=True)
        os.replace(library, folder / LIBRARY)
        os.replace(text, folder / RECORD)


def remove(folder: Path) -> None:
    for name in (RECORD, LIBRARY):
        (folder / name).unlink(missing_ok=True)


# ---- The user's cache ----------------------------------------------------------------------------


def cache_folder(torch_version: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "fused_ema" / f"torch-{torch_version}-{PYTHON_TAG}"


def distrust(folder: Path) -> str | None:
    """Why code in this folder must not be loaded: someone else could have put it there."""
    if not hasattr(os, "getuid"):
        return None
    status = folder.stat()
    if status.st_uid != os.getuid():
        return f"{folder} belongs to user {status.st_uid}, not to you ({os.getuid()})"
    if status.st_mode & 0o022:
        return f"{folder} can be written by others: run `chmod go-w {folder}`"
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build per folder at a time. The system drops the lock of a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(target: Path | None = None, force: bool = False) -> tuple[Path, bool]:
    """Compiles the extension for the installed torch into a folder, the user's cache unless told.

    Returns the library's path, and whether it was compiled now (or was there already). Raises BuildError.
    """
    torch = import_torch()
    if target is None:
        target = cache_folder(torch.__version__)
        target.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (target.parent, target):
            folder.mkdir(mode=0o700, exist_ok=True)
            if reason := distrust(folder):
                raise BuildError(f"{reason}; set XDG_CACHE_HOME to a folder of your own, or use --into")
    target.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        toolkit = find_toolkit(torch)
        if switch("FUSED_EMA_CUDA") and isinstance(toolkit, str):
            raise BuildError(f"FUSED_EMA_CUDA=1, but {toolkit}")
        wanted = describe(torch, toolkit)
        if switch("FUSED_EMA_EXT") is not False and not force and is_built(target, wanted):
            return target / LIBRARY, False
        with tempfile.TemporaryDirectory(prefix="fused_ema-") as temp:
            place(compile_extension(Path(temp)), target)
    return target / LIBRARY, True
