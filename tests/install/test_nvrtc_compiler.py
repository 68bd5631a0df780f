"""NVRTC compiles csrc's kernels without a header on disk, to machine code like nvcc's. Needs no GPU."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import audit_sass
import build_fakes as fakes
import pytest
from sass import KERNELS, listings, of_nvrtc

from fused_ema._build import compile as _compile
from fused_ema._build import nvrtc, toolkit

needs_nvrtc = pytest.mark.skipif(nvrtc.why_not() is not None, reason=f"no NVRTC: {nvrtc.why_not()}")


def test_the_program_is_the_kernel_and_the_stand_ins():
    names = [path.name for path in nvrtc.headers_of_kernel()]
    assert names[0] == "nvrtc.h"
    assert {"kernel.h", "tiles.h", "launch.h", "lerp.h", "ops.h", "types.h", "vectors.h"} < {*names}
    assert len(names) == len({*names}) == 8
    angles = {name for path in nvrtc.headers_of_kernel() for name in re.findall(r"#include <(.+)>", path.read_text())}
    assert angles == {*nvrtc.STAND_INS, "cmath"}  # the last is for the host alone


def test_ops_are_those_of_the_sources():
    body = re.search(r"enum class Op : uint8_t \{(.*?)\};", (_compile.source_folder() / "types.h").read_text(), re.S)
    assert tuple(re.findall(r"^  (\w+),", body[1], re.M)) == nvrtc.OPS


def test_the_digest_changes_with_the_sources(tmp_path, monkeypatch):
    before = nvrtc.kernel_digest()
    copy = shutil.copytree(_compile.source_folder(), tmp_path / "csrc")
    monkeypatch.setattr(nvrtc, "source_folder", lambda: copy)
    nvrtc.headers_of_kernel.cache_clear()
    try:
        assert nvrtc.kernel_digest() == before
        (copy / "plan.cpp").write_text("")  # no part of the kernel
        assert nvrtc.kernel_digest() == before
        (copy / "lerp.h").write_text((copy / "lerp.h").read_text() + "\n")
        assert nvrtc.kernel_digest() != before
    finally:
        nvrtc.headers_of_kernel.cache_clear()


@pytest.mark.parametrize(
    ("build", "words"), [(fakes.CPU_TORCH, "built without CUDA"), (fakes.ROCM_TORCH, "ROCm"), (None, "was not found")]
)
def test_why_not_is_told_in_words(monkeypatch, build, words):
    missing = SimpleNamespace(__version__="2.14", version=SimpleNamespace(cuda="77.0", hip=None), __file__=__file__)
    monkeypatch.setattr(nvrtc, "torch", build or missing)
    monkeypatch.delenv("FUSED_EMA_CUDA", raising=False)
    nvrtc.find.cache_clear()
    try:
        assert words in nvrtc.why_not()
        with pytest.raises(_compile.BuildError, match=words):
            nvrtc.nvrtc()
    finally:
        nvrtc.find.cache_clear()


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    """By its name, which torch may have loaded; next to torch, where a wheel may name it by a hash; in NVIDIA's own."""
    files = ["torch/lib/libnvrtc-672ee683.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"]
    others = ["libnvrtc.so.11", "libnvrtc-builtins.so.12.4", "libnvrtc.alt.so.12", "libcublas.so.12"]
    for name in [*files, *(f"nvidia/cuda_nvrtc/lib/{other}" for other in others)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    loaded = []
    monkeypatch.setattr(nvrtc, "torch", SimpleNamespace(__file__=str(tmp_path / "torch" / "__init__.py")))
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda path: loaded.append(Path(path).name))
    assert list(nvrtc._libraries("12")) == ["libnvrtc.so.12", *(tmp_path / name for name in files)]
    assert loaded == ["libnvrtc-builtins.so.12.4"], "its other half, which it would not find"


def test_fused_ema_cuda_0_switches_it_off(monkeypatch):
    monkeypatch.setenv("FUSED_EMA_CUDA", "0")
    nvrtc.find.cache_clear()
    try:
        assert "FUSED_EMA_CUDA=0" in nvrtc.why_not()
    finally:
        nvrtc.find.cache_clear()


@needs_nvrtc
def test_a_gpu_that_it_does_not_know_gets_ptx():
    compiler = nvrtc.nvrtc()
    image = compiler.compile("swap", 999)
    assert f".target sm_{compiler.archs[-1]}".encode() in image.code
    assert f".entry {image.kernel}".encode() in image.code
    with pytest.raises(_compile.BuildError, match=r"knows no GPU older than sm_\d+, and this one is sm_10"):
        compiler.compile("swap", 10)


@needs_nvrtc
def test_a_failure_has_the_compilers_words(tmp_path, monkeypatch):
    copy = shutil.copytree(_compile.source_folder(), tmp_path / "csrc")
    (copy / "kernel.h").write_text("this is no C++")
    monkeypatch.setattr(nvrtc, "source_folder", lambda: copy)
    nvrtc.headers_of_kernel.cache_clear()
    try:
        with pytest.raises(
            _compile.BuildError, match=r"can't compile the kernel 'swap' from .*\n.*kernel\.h\(1\): error"
        ):
            nvrtc.nvrtc().compile("swap", 90)
    finally:
        nvrtc.headers_of_kernel.cache_clear()


@pytest.fixture
def tools(monkeypatch):
    """cuobjdump and nvdisasm, of the toolkit, of pip or of triton."""
    import sass

    if not all(shutil.which(name, path=sass._tool_path()) for name in ("cuobjdump", "nvdisasm")):
        pytest.skip("no cuobjdump and nvdisasm")


@needs_nvrtc
@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("arch", [90, 120, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 80, 100))])
def test_machine_code(arch, tmp_path):
    """128-bit accesses, all loads first, one add and one fused multiply-add an element, no spills: see audit_sass."""
    if arch not in nvrtc.nvrtc().archs:
        pytest.skip(f"no machine code for sm_{arch} by this NVRTC")
    code, usage = listings(of_nvrtc([f"sm_{arch}"], tmp_path))
    rows, complaints = audit_sass.audit(code, usage, (f"sm_{arch}",))
    assert not complaints
    assert {row.verdict for row in rows} == {"ok"}


@needs_nvrtc
@pytest.mark.usefixtures("tools")
@pytest.mark.slow
def test_machine_code_is_nvccs(tmp_path):
    """Of one version, both make the same instructions, but for the registers that they take."""
    home = toolkit.find_cuda_home()
    if home is None or toolkit.nvcc_version(home) != tuple(map(int, nvrtc.nvrtc().version.split("."))):
        pytest.skip("no nvcc of NVRTC's version")
    cubin = tmp_path / "nvcc.cubin"
    flags = [flag for flag in _compile.nvcc_flags() if flag != "-lineinfo"]
    source = _compile.source_folder() / "ema_cuda.cu"
    command = [home / "bin" / "nvcc", "-std=c++17", *flags, "-arch=sm_90", "-cubin", "-o", cubin, source]
    subprocess.run(command, check=True, capture_output=True)
    theirs, their_usage = listings([cubin])
    ours, our_usage = listings(of_nvrtc(["sm_90"], tmp_path))
    assert ours.keys() == theirs.keys() == {("sm_90", kernel) for kernel in KERNELS.values()}
    for key, code in ours.items():
        counted = [Counter((i.name, *i.modifiers) for i in each) for each in (code, theirs[key])]
        assert counted[0] == counted[1], key
        assert our_usage[key]["REG"] == their_usage[key]["REG"], key
