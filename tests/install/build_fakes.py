"""Stand-ins for what a build meets: torch builds, a CUDA toolkit, an extension that was installed."""

import json
from types import SimpleNamespace

import torch

from fused_ema._build import cache
from fused_ema._build.compile import describe

CPU_TORCH = SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None, hip=None))
CUDA_TORCH = SimpleNamespace(__version__="2.13.0+cu130", version=SimpleNamespace(cuda="13.0", hip=None))
ROCM_TORCH = SimpleNamespace(__version__="2.13.0+rocm7.0", version=SimpleNamespace(cuda=None, hip="7.0"))


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(home, version="13.0", headers=True):
    """Makes a folder that looks like a CUDA toolkit, with an nvcc that answers what fused_ema asks it."""
    script(home / "bin" / "nvcc", f'echo "release {version}, V{version}.1"; echo "#\\$ TOP={home}/bin/.." >&2')
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return home


def install(folder, content=b"this is no shared library", **changes):
    """Writes a library that cannot be imported, with a record that fits it except for `changes`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / cache.LIBRARY).write_bytes(content)
    record = {**describe(torch, "no CUDA here"), "size": len(content), **changes}
    (folder / cache.RECORD).write_text(json.dumps(record))


def packaged_toolkit(packages, name="cu13", version="13.0"):
    """Makes what `pip install "cuda-toolkit[nvcc,cccl]"` puts next to torch's own libraries."""
    home = toolkit(packages / name, version)
    (home / "include" / "cccl").mkdir()
    (home / "lib").mkdir()
    (home / "lib" / f"libcudart.so.{version.partition('.')[0]}").write_text("the library of torch")
    return home
