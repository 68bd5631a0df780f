"""What is compiled, when, and what is kept. The compiler is a fake; .ci/packaging builds with a real one."""

import errno
import json
import mmap
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from build_fakes import CPU_TORCH, CUDA_TORCH, toolkit

import fused_ema
from fused_ema._build import cache
from fused_ema._build import compile as _build

pytestmark = pytest.mark.usefixtures("bare_environment")


def test_flags():
    compile_flags, link_flags = _build.cxx_flags()
    everything = compile_flags + link_flags + _build.nvcc_flags()
    assert not [flag for flag in everything if "arch" in flag or "-std" in flag or "fast" in flag]
    assert "-fmad=false" in _build.nvcc_flags()
    if sys.platform == "linux":
        assert {"-fopenmp", "-ffp-contract=off"} <= set(compile_flags)
        assert link_flags == ["-fopenmp"]


@pytest.mark.parametrize("cuda", [False, True])
def test_extension(monkeypatch, tmp_path, cuda):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    extension = _build.extension(cuda)
    names = {Path(path).name for path in extension.sources}
    assert {"bindings.cpp", "ema_cpu.cpp", "plan.cpp"} <= names
    assert ("ema_cuda.cu" in names) is cuda
    assert (("FUSED_EMA_CUDA", None) in extension.define_macros) is cuda


# ---- build ---------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the compiler; collects what it was asked for."""
    calls = []

    def compile_nothing(temp, tools):
        calls.append(tools)
        library = temp / "library.so"
        library.write_bytes(b"library %d" % len(calls))
        return library

    monkeypatch.setattr(_build, "_compile", compile_nothing)
    monkeypatch.setattr(_build, "import_torch", lambda: CPU_TORCH)
    return calls


def test_build_into_the_cache_once(compiled, tmp_path):
    folder = tmp_path / "cache" / "fused_ema" / f"torch-2.13.0+cpu-{_build.PYTHON_TAG}"
    folder.mkdir(parents=True)
    (folder / ".lock").touch()  # as a killed build leaves it
    assert cache.build() == (folder / cache.LIBRARY, True)
    assert cache.build() == (folder / cache.LIBRARY, False)
    assert len(compiled) == 1
    record = cache.read_record(folder)
    assert (record["torch"], record["version"]) == ("2.13.0+cpu", fused_ema.__version__)
    assert "without CUDA" in record["cuda_why_not"]
    assert cache.build(force=True)[1]
    assert (folder / cache.LIBRARY).read_bytes() == b"library 2"
    assert {path.name for path in folder.iterdir()} == {".lock", cache.LIBRARY, cache.RECORD}


def test_the_cache_is_private(compiled, tmp_path):
    before = os.umask(0)
    try:
        path, _ = cache.build()
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o777)
    with pytest.raises(_build.BuildError, match="can be written by others"):
        cache.build()


def test_the_cache_of_someone_else(compiled, monkeypatch):
    path, _ = cache.build()
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(_build.BuildError, match="belongs to user"):
        cache.build()


@pytest.mark.parametrize("change", ["torch", "sources", "size", "cuda"])
def test_a_library_that_does_not_fit_is_built_again(compiled, change, tmp_path):
    path, _ = cache.build(tmp_path / "here")
    record = cache.read_record(path.parent)
    (path.parent / cache.RECORD).write_text(json.dumps({**record, change: "other"}))
    assert cache.build(tmp_path / "here")[1]


# ---- place ---------------------------------------------------------------------------------------


@pytest.fixture
def placed(tmp_path):
    """place(content) puts a library with that content, and its record, into the folder that it returns."""

    def place(content):
        library = tmp_path / "compiled.so"
        library.write_bytes(content)
        cache.place(_build.Built(library, {"sources": content.decode()}), tmp_path / "here")
        return tmp_path / "here"

    place(b"old")
    return place


def pair_in(folder):
    """The library's content, and that which the record names; None for what is missing."""
    library, record = folder / cache.LIBRARY, cache.read_record(folder)
    return library.read_bytes() if library.exists() else None, record and record["sources"].encode()


def test_a_loaded_library_stays_as_it_was(placed, tmp_path):
    """Processes that have it mapped would crash if it changed."""
    library = tmp_path / "here" / cache.LIBRARY
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        folder = placed(b"new")
        assert mapped[:] == b"old"
        assert os.fstat(file.fileno()).st_ino != library.stat().st_ino
    assert pair_in(folder) == (b"new", b"new")
    assert {path.name for path in folder.iterdir()} == {cache.LIBRARY, cache.RECORD}


def test_no_library_is_left_with_the_record_of_another(placed, monkeypatch, tmp_path):
    """A reader may come at any time: the pair fits before and after each file takes its place."""
    folder, replace, seen = tmp_path / "here", os.replace, []

    def observed(source, target):
        seen.append(pair_in(folder))
        replace(source, target)
        seen.append(pair_in(folder))

    monkeypatch.setattr(os, "replace", observed)
    placed(b"new")
    assert seen == [(b"old", None), (b"new", None), (b"new", None), (b"new", b"new")]


@pytest.mark.parametrize("failing", ["copyfile", "copymode", "write_text"])
def test_a_failing_copy_leaves_the_old_pair(placed, monkeypatch, tmp_path, failing):
    def fail(_, target, **__):
        """Fails after a part is written, as on a full disk."""
        Path(target).write_bytes(b"n")
        raise OSError(errno.ENOSPC, "no space")

    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "here").iterdir()}
    owner = Path if failing == "write_text" else shutil
    monkeypatch.setattr(owner, failing, (lambda self, *_, **__: fail(None, self)) if owner is Path else fail)
    with pytest.raises(OSError, match="no space"):
        placed(b"new")
    after = {path.name: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "here").iterdir()}
    assert after == before


@pytest.mark.parametrize("failing", [cache.LIBRARY, cache.RECORD])
def test_a_failing_replacement_leaves_no_record(placed, monkeypatch, tmp_path, failing):
    replace = os.replace

    def fail(source, target):
        if target.name == failing:
            raise OSError(errno.EACCES, "not allowed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="not allowed"):
        placed(b"new")
    assert pair_in(tmp_path / "here") == (b"old" if failing == cache.LIBRARY else b"new", None)


# ---- Builds at the same time, and builds that fail -----------------------------------------------


def test_two_builds_at_once(compiled, monkeypatch, tmp_path):
    results = []
    compile_nothing = _build._compile

    def compile_slowly(temp, tools):
        time.sleep(0.5)  # until the other build has begun
        return compile_nothing(temp, tools)

    monkeypatch.setattr(_build, "_compile", compile_slowly)
    threads = [threading.Thread(target=lambda: results.append(cache.build(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done for _, done in results) == [False, True]
    assert len(compiled) == 1


@pytest.fixture
def failing(monkeypatch, tmp_path, compiled):
    """CUDA is there but does not compile; with "cpu" set to True, nothing compiles."""
    toolkit(tmp_path / "local" / "cuda")
    succeed = _build._compile
    broken = {"cpu": False}

    def fail(temp, tools):
        if broken["cpu"] or isinstance(tools, _build.Toolkit):
            raise RuntimeError("ninja says no")
        return succeed(temp, tools)

    monkeypatch.setattr(_build, "_compile", fail)
    monkeypatch.setattr(_build, "import_torch", lambda: CUDA_TORCH)
    return broken


def test_without_cuda_where_cuda_fails(failing, capsys, tmp_path):
    path, _ = cache.build(tmp_path / "here")
    record = cache.read_record(path.parent)
    assert "cuda" not in record
    assert "ninja says no" in record["cuda_why_not"]
    assert "WITHOUT CUDA" in capsys.readouterr().err


def test_failing_cuda_as_an_error(failing, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_EMA_CUDA", "1")
    with pytest.raises(_build.BuildError, match="FUSED_EMA_CUDA=1, but compiling with CUDA failed: ninja"):
        cache.build(tmp_path / "here")


def test_missing_cuda_as_an_error(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_EMA_CUDA", "1")
    with pytest.raises(_build.BuildError, match=r"FUSED_EMA_CUDA=1, but torch 2.13.0\+cpu was built without"):
        cache.build(tmp_path / "here")


def test_nothing_compiles(failing, tmp_path):
    failing["cpu"] = True
    with pytest.raises(_build.BuildError, match="compiling failed"):
        cache.build(tmp_path / "here")
    assert not (tmp_path / "here" / cache.LIBRARY).exists()


def test_switched_off(compiled, monkeypatch, tmp_path):
    cache.build(tmp_path / "here")
    monkeypatch.setenv("FUSED_EMA_EXT", "0")
    with pytest.raises(_build.BuildError, match="FUSED_EMA_EXT=0"):
        cache.build(tmp_path / "here")
