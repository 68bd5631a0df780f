"""What is compiled, when, and what is kept; with a real compiler, that is in .ci/run."""

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
    assert _build.build() == (folder / _build.LIBRARY, True)
    assert _build.build() == (folder / _build.LIBRARY, False)
    assert len(compiled) == 1
    record = json.loads((folder / _build.RECORD).read_text())
    assert (record["torch"], record["cuda"], record["archs"]) == ("2.13.0+cpu", None, None)
    assert (record["version"], record["python"]) == (fused_ema.__version__, _build.PYTHON_TAG)
    assert _build.build(force=True)[1]
    assert (folder / _build.LIBRARY).read_bytes() == b"library 2"
    assert {path.name for path in folder.iterdir()} == {".lock", _build.LIBRARY, _build.RECORD}


def test_the_cache_is_private(compiled, tmp_path):
    before = os.umask(0)
    try:
        path, _ = _build.build()
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o777)
    with pytest.raises(_build.BuildError, match="can be written by others"):
        _build.build()


def test_the_cache_of_someone_else(compiled, monkeypatch):
    path, _ = _build.build()
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(_build.BuildError, match="belongs to user"):
        _build.build()


@pytest.mark.parametrize("change", ["torch", "sources", "size", "cuda"])
def test_a_library_that_does_not_fit_is_built_again(compiled, change, tmp_path):
    path, _ = _build.build(tmp_path / "here")
    record = json.loads((path.parent / _build.RECORD).read_text())
    (path.parent / _build.RECORD).write_text(json.dumps({**record, change: "other"}))
    assert _build.build(tmp_path / "here")[1]


# ---- place ---------------------------------------------------------------------------------------


@pytest.fixture
def placed(tmp_path):
    """place(content) puts such a library, and a record that says so, into a folder, which it returns; one is there."""

    def place(content):
        library = tmp_path / "compiled.so"
        library.write_bytes(content)
        _build.place(_build.Built(library, {"sources": content.decode()}), tmp_path / "here")
        return tmp_path / "here"

    place(b"old")
    return place


def pair_in(folder):
    """The library, and what the record says it is; None for what is not there."""
    library, record = folder / _build.LIBRARY, _build.read_record(folder)
    return library.read_bytes() if library.exists() else None, record and record["sources"].encode()


def test_a_loaded_library_stays_as_it_was(placed, tmp_path):
    """Or the processes that have it mapped would crash."""
    library = tmp_path / "here" / _build.LIBRARY
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        folder = placed(b"new")
        assert mapped[:] == b"old"
        assert os.fstat(file.fileno()).st_ino != library.stat().st_ino
    assert pair_in(folder) == (b"new", b"new")
    assert {path.name for path in folder.iterdir()} == {_build.LIBRARY, _build.RECORD}


def test_no_library_lies_beside_the_record_of_another(placed, monkeypatch, tmp_path):
    """Whatever a reader finds, before and after each file takes its place, or is left with."""
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
        """Half of it is written, as on a full disk."""
        Path(target).write_bytes(b"n")
        raise OSError(errno.ENOSPC, "no space")

    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "here").iterdir()}
    owner = Path if failing == "write_text" else shutil
    monkeypatch.setattr(owner, failing, (lambda self, *_, **__: fail(None, self)) if owner is Path else fail)
    with pytest.raises(OSError, match="no space"):
        placed(b"new")
    after = {path.name: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "here").iterdir()}
    assert after == before


@pytest.mark.parametrize("failing", [_build.LIBRARY, _build.RECORD])
def test_a_failing_replacement_leaves_no_record(placed, monkeypatch, tmp_path, failing):
    replace = os.replace

    def fail(source, target):
        if target.name == failing:
            raise OSError(errno.EACCES, "not allowed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="not allowed"):
        placed(b"new")
    assert pair_in(tmp_path / "here") == (b"old" if failing == _build.LIBRARY else b"new", None)


# ---- build, at once and in vain ------------------------------------------------------------------


def test_two_builds_at_once(compiled, monkeypatch, tmp_path):
    results = []
    compile_nothing = _build._compile

    def compile_slowly(temp, tools):
        time.sleep(0.5)  # the other comes meanwhile
        return compile_nothing(temp, tools)

    monkeypatch.setattr(_build, "_compile", compile_slowly)
    threads = [threading.Thread(target=lambda: results.append(_build.build(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done for _, done in results) == [False, True]
    assert len(compiled) == 1


@pytest.fixture
def failing(monkeypatch, tmp_path, compiled):
    """CUDA is there, but does not compile; with the argument, nothing does."""
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
    path, _ = _build.build(tmp_path / "here")
    record = json.loads((path.parent / _build.RECORD).read_text())
    assert record["cuda"] is None
    assert "ninja says no" in record["cuda_why_not"]
    assert "WITHOUT CUDA" in capsys.readouterr().err


def test_failing_cuda_as_an_error(failing, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_EMA_CUDA", "1")
    with pytest.raises(_build.BuildError, match="FUSED_EMA_CUDA=1, but compiling with CUDA failed: ninja"):
        _build.build(tmp_path / "here")


def test_missing_cuda_as_an_error(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_EMA_CUDA", "1")
    with pytest.raises(_build.BuildError, match=r"FUSED_EMA_CUDA=1, but torch 2.13.0\+cpu was built without"):
        _build.build(tmp_path / "here")


def test_nothing_compiles(failing, tmp_path):
    failing["cpu"] = True
    with pytest.raises(_build.BuildError, match="compiling failed"):
        _build.build(tmp_path / "here")
    assert not (tmp_path / "here" / _build.LIBRARY).exists()


def test_switched_off(compiled, monkeypatch, tmp_path):
    _build.build(tmp_path / "here")
    monkeypatch.setenv("FUSED_EMA_EXT", "0")
    with pytest.raises(_build.BuildError, match="FUSED_EMA_EXT=0"):
        _build.build(tmp_path / "here")
