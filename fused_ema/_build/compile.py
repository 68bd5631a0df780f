"""Describes the sources and flags, and compiles them, for setup.py and for `python -m fused_ema build`.

setup.py imports this in an environment that may lack torch: nothing here imports torch or setuptools at import.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .switch import switch
from .toolkit import Toolkit, find_toolkit, link_folder
from .._version import __version__

NAME = "fused_ema._C"
PACKAGE = Path(__file__).resolve().parent.parent
PYTHON_TAG: str = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag or "python"

Record = dict[str, Any]


class BuildError(RuntimeError):
    """No extension or no kernel could be built; the text says why, and what to do."""


def say(text: str) -> None:
    print(f"fused_ema: {text}", file=sys.stderr, flush=True)


def import_torch() -> Any:
    try:
        import torch
    except Exception as error:
        raise BuildError(f"torch cannot be imported in this build ({type(error).__name__}: {error})") from None
    return torch


def source_folder() -> Path:
    """fused_ema/_csrc in an installed package, csrc next to fused_ema in a checkout."""
    installed = PACKAGE / "_csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


# ---- The description -----------------------------------------------------------------------------


def sources(cuda: bool) -> list[Path]:
    """Absolute paths, in a fixed order."""
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
    """No flag may contain "arch" anywhere: torch would then drop all its -gencode flags."""
    return ["-O3", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo"]


def extension(cuda: bool, library_dirs: Sequence[Path] = ()) -> Any:
    from torch.utils import cpp_extension

    compile_flags, link_flags = cxx_flags()
    kind: Any = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        name=NAME,
        sources=[str(path) for path in sources(cuda)],
        depends=[str(path) for path in sorted(source_folder().glob("*.h"))],
        define_macros=[("FUSED_EMA_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": compile_flags, "nvcc": nvcc_flags()} if cuda else {"cxx": compile_flags},
        library_dirs=[str(folder) for folder in library_dirs],
        extra_link_args=link_flags,
    )


def sources_digest() -> str:
    """A digest that changes with anything that goes into the library."""
    digest = hashlib.sha256(repr([cxx_flags(), nvcc_flags()]).encode())
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(torch: Any, toolkit: Toolkit | str) -> Record:
    """What a library is built for and from. This is written next to it, and read before it is loaded."""
    if isinstance(toolkit, Toolkit):
        cuda = {"cuda": ".".join(map(str, toolkit.version)), "archs": toolkit.archs}
    else:
        cuda = {"cuda_why_not": toolkit}
    return {"torch": str(torch.__version__), "version": __version__, "sources": sources_digest(), **cuda}


def built_for(record: Record) -> str:
    """The part of a record that decides whether a library may be loaded here, in words."""
    return f"torch {record.get('torch')} and fused_ema {record.get('version')}"


# ---- Compiling -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    library: Path
    record: Record


def find_target() -> tuple[Any, Toolkit | str]:
    """The torch to build for, and the CUDA toolkit to build with, or why there is none.

    Raises BuildError where nothing is to be built, or where the environment asks for CUDA and there is none.
    """
    if switch("FUSED_EMA_EXT") is False:
        raise BuildError("FUSED_EMA_EXT=0 switches the extension off; unset it to build one")
    torch = import_torch()
    toolkit = find_toolkit(torch)
    if switch("FUSED_EMA_CUDA") and isinstance(toolkit, str):
        raise BuildError(f"FUSED_EMA_CUDA=1, but {toolkit}")
    return torch, toolkit


def _compile(temp: Path, toolkit: Toolkit | str) -> Path:
    from setuptools import Distribution
    from torch.utils import cpp_extension

    # An environment that is used without being activated has its ninja, but not on PATH.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), sysconfig.get_path("scripts")))
    if isinstance(toolkit, Toolkit):
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(toolkit.home)  # torch's own guess may be wrong
        # If this is unset, torch builds for the visible GPUs, and fails where there is none.
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.archs
        modules = [extension(True, link_folder(toolkit.home, temp))]
    else:
        modules = [extension(False)]
    command = cpp_extension.BuildExtension(Distribution({"name": "fused_ema", "ext_modules": modules}))
    command.build_lib, command.build_temp = str(temp / "lib"), str(temp / "objects")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(NAME))


def compile_extension(temp: Path, torch: Any, toolkit: Toolkit | str) -> Built:
    """Compiles the extension into `temp`, with CUDA where that succeeds, else without it. Raises BuildError."""
    cuda = toolkit if isinstance(toolkit, Toolkit) else None
    how = f"with nvcc in {cuda.home}, for {cuda.archs}" if cuda else f"without CUDA: {toolkit}"
    say(f"compiling for torch {torch.__version__} {how}")
    record = describe(torch, toolkit)  # before compiling, which takes long enough for the sources to be edited
    try:
        return Built(_compile(temp, toolkit), record)
    except Exception as error:
        if cuda is None:
            raise BuildError(
                f"compiling failed ({type(error).__name__}: {error}); the compiler's output is above. Building needs "
                "setuptools and a C++ compiler that this torch supports"
            ) from error
        if switch("FUSED_EMA_CUDA"):
            raise BuildError(f"FUSED_EMA_CUDA=1, but compiling with CUDA failed: {error}") from error
        say(f"WARNING: compiling with CUDA failed ({error}); the compiler's output is above.")
        say("WARNING: the extension is now built WITHOUT CUDA; set FUSED_EMA_CUDA=1 to make this an error.")
        return compile_extension(temp, torch, f"compiling with nvcc in {cuda.home} failed: {error}")
