"""The CUDA toolkit to build with: where it is, whether it fits the installed torch, which GPUs it can build for.

setup.py imports this in an environment that may lack torch: nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .switch import switch

USUAL_PLACES = (Path("/usr/local"), Path("/opt"))
# Where pip puts a toolkit, as cu13.
PACKAGES = tuple(dict.fromkeys(Path(folder).absolute() / "nvidia" for folder in sys.path))

# Each architecture, with the first nvcc and the first torch that support it.
ARCHITECTURES = (
    ("7.5", (10, 0), (2, 0)),
    ("8.0", (11, 0), (2, 0)),
    ("8.6", (11, 1), (2, 0)),
    ("8.9", (11, 8), (2, 0)),
    ("9.0", (11, 8), (2, 0)),
    ("10.0", (12, 8), (2, 7)),
    ("12.0", (12, 8), (2, 7)),
)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _nvcc(home: Path) -> Path:
    return home / "bin" / ("nvcc.exe" if sys.platform == "win32" else "nvcc")


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def _cuda_homes() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    if found := shutil.which("nvcc"):
        yield Path(found).resolve().parent.parent
        # That nvcc may be a wrapper script outside the toolkit, but it knows where the toolkit is.
        top = re.search(r"^#\$ TOP=(.+)$", _output_of(found, "--dryrun", "-c", "none.cu"), re.MULTILINE)
        if top:
            yield Path(top[1].strip()).resolve()
    # Before the usual places, because it was installed for this very Python, whose torch it then fits.
    for packages in PACKAGES:
        homes = _newest_first(packages.glob("cu[0-9]*"))
        yield from (home for home in homes if (home / "include" / "cccl").is_dir())  # else it compiles nothing
    for usual in USUAL_PLACES:
        yield usual / "cuda"
        yield from _newest_first(usual.glob("cuda-*"))


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: _numbers(folder.name), reverse=True)


def _complete_homes() -> Iterator[Path]:
    """The toolkits that have both the compiler and the headers."""
    for home in _cuda_homes():
        if _nvcc(home).is_file() and (home / "include" / "cuda_runtime.h").is_file():
            yield home


def find_cuda_home() -> Path | None:
    return next(_complete_homes(), None)


def nvcc_version(home: Path) -> tuple[int, int] | None:
    found = re.search(r"release (\d+)\.(\d+)", _output_of(str(_nvcc(home)), "--version"))
    return (int(found[1]), int(found[2])) if found else None


def arch_list(nvcc: tuple[int, int], torch: tuple[int, int]) -> str:
    """The value for TORCH_CUDA_ARCH_LIST: all that this nvcc and this torch support, and PTX for the last."""
    known = [arch for arch, since_nvcc, since_torch in ARCHITECTURES if nvcc >= since_nvcc and torch >= since_torch]
    return ";".join(known) + "+PTX"


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: tuple[int, int]
    archs: str


def no_cuda_in(torch: Any) -> str | None:
    """Why the CUDA kernel can neither be built for this torch nor run in it; None where it can."""
    if switch("FUSED_EMA_CUDA") is False:
        return "FUSED_EMA_CUDA=0 switches the CUDA kernel off; unset it"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is a ROCm build, and the kernel is CUDA only"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    return None


def find_toolkit(torch: Any) -> Toolkit | str:
    """The CUDA toolkit to build with, or a sentence that says why there is none."""
    if reason := no_cuda_in(torch):
        return reason
    reasons = []
    for home in _complete_homes():
        version = nvcc_version(home)
        if version is None:
            reasons.append(f"`{_nvcc(home)} --version` failed")
        elif version[0] != _numbers(torch.version.cuda)[0]:
            reasons.append(
                f"{home} is CUDA {version[0]}.{version[1]}, but torch {torch.__version__} was built with CUDA "
                f"{torch.version.cuda}, and the major versions must agree"
            )
        else:
            major, minor = _numbers(torch.__version__)[:2]
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or arch_list(version, (major, minor))
            return Toolkit(home, version, archs)
    reason = reasons[0] if reasons else (
        "no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) was found at $CUDA_HOME, $CUDA_PATH, the nvcc on PATH, "
        "among Python's packages, /usr/local/cuda* or /opt/cuda*"
    )
    return f"{reason}; {how_to_get(torch)}"


def how_to_get(torch: Any) -> str:
    """How to get a toolkit for a CUDA build of torch."""
    cuda: str = torch.version.cuda
    if _numbers(cuda)[0] < 13:  # the packages of older ones have no nvcc
        return f"install CUDA {cuda}, or set CUDA_HOME"
    return f'run `pip install "cuda-toolkit[nvcc,cccl]=={cuda}.*"`, or install CUDA {cuda} and set CUDA_HOME'


def link_folder(home: Path, temp: Path) -> list[Path]:
    """A further folder for the linker, which looks for libcudart.so: the toolkit that pip installs has libcudart.so.13
    alone. It is made in `temp`; the packages stay as they are."""
    found = sorted(home.glob("lib*/libcudart.so*"))
    if not found or any(path.name == "libcudart.so" for path in found):
        return []
    link = temp / "link" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(found[0].resolve())
    return [link.parent]
