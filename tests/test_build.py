"""The build description and the search for the extension; what takes a compiler is in .ci/run."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_ema import _build

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None, hip=None))
CUDA_TORCH = SimpleNamespace(__version__="2.13.0+cu130", version=SimpleNamespace(cuda="13.0", hip=None))
ROCM_TORCH = SimpleNamespace(__version__="2.13.0+rocm7.0", version=SimpleNamespace(cuda=None, hip="7.0"))


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """None of this machine's toolkits, switches or caches."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "FUSED_EMA_EXT", "FUSED_EMA_CUDA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "USUAL_PLACES", (tmp_path / "local",))


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(home, version="13.0", headers=True):
    """A folder that looks like a CUDA toolkit; its nvcc answers what is asked of it here."""
    script(home / "bin" / "nvcc", f'echo "release {version}, V{version}.1"; echo "#\\$ TOP={home}/bin/.." >&2')
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return home


# ---- find_cuda_home ------------------------------------------------------------------------------


def test_no_toolkit(tmp_path):
    assert _build.find_cuda_home() is None


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_the_environment_names_the_toolkit(monkeypatch, tmp_path, name):
    toolkit(tmp_path / "local" / "cuda")
    monkeypatch.setenv(name, str(toolkit(tmp_path / "mine")))
    assert _build.find_cuda_home() == tmp_path / "mine"


def test_a_wrong_cuda_home_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "without-headers", headers=False)))
    toolkit(tmp_path / "local" / "cuda")
    assert _build.find_cuda_home() == tmp_path / "local" / "cuda"


def test_headers_without_a_compiler_are_passed_over(monkeypatch, tmp_path):
    home = toolkit(tmp_path / "local" / "cuda")
    (home / "bin" / "nvcc").unlink()
    assert _build.find_cuda_home() is None


def test_nvcc_on_the_path_is_a_wrapper_script(tmp_path):
    home = toolkit(tmp_path / "far" / "away")
    script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert _build.find_cuda_home() == home


def test_nvcc_on_the_path_is_a_link(tmp_path):
    home = toolkit(tmp_path / "far" / "away")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")  # says nothing of where it lies
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert _build.find_cuda_home() == home


def test_the_newest_of_the_usual_place(tmp_path):
    for version in ("9.2", "12.4", "12.10"):
        toolkit(tmp_path / "local" / f"cuda-{version}")
    assert _build.find_cuda_home() == tmp_path / "local" / "cuda-12.10"
    toolkit(tmp_path / "local" / "cuda")
    assert _build.find_cuda_home() == tmp_path / "local" / "cuda"


def test_nvcc_version(tmp_path):
    assert _build.nvcc_version(toolkit(tmp_path / "a", "12.10")) == (12, 10)
    script(tmp_path / "b" / "bin" / "nvcc", "exit 1")
    assert _build.nvcc_version(tmp_path / "b") is None


# ---- find_toolkit, arch_list, switch -------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvcc", "torch_version", "expected"),
    [
        ((11, 7), (2, 6), "7.5;8.0;8.6+PTX"),
        ((11, 8), (2, 6), "7.5;8.0;8.6;8.9;9.0+PTX"),
        ((12, 7), (2, 13), "7.5;8.0;8.6;8.9;9.0+PTX"),
        ((12, 8), (2, 13), "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ((12, 8), (2, 6), "7.5;8.0;8.6;8.9;9.0+PTX"),
        ((13, 2), (2, 15), "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
    ],
)
def test_arch_list(nvcc, torch_version, expected):
    assert _build.arch_list(nvcc, torch_version) == expected


def test_toolkit_found(monkeypatch, tmp_path):
    home = toolkit(tmp_path / "local" / "cuda", "13.1")  # another minor version will do
    found = _build.find_toolkit(CUDA_TORCH)
    assert found == _build.Toolkit(home, (13, 1), "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert _build.find_toolkit(CUDA_TORCH).archs == "9.0"
    monkeypatch.setenv("FUSED_EMA_CUDA", "0")
    assert "FUSED_EMA_CUDA=0" in _build.find_toolkit(CUDA_TORCH)


def test_reasons_for_no_toolkit(tmp_path):
    assert "without CUDA" in _build.find_toolkit(CPU_TORCH)
    assert "ROCm" in _build.find_toolkit(ROCM_TORCH)
    assert "set CUDA_HOME" in _build.find_toolkit(CUDA_TORCH)
    toolkit(tmp_path / "local" / "cuda", "12.8")
    assert "CUDA 12.8" in _build.find_toolkit(CUDA_TORCH)
    assert "with CUDA 13.0" in _build.find_toolkit(CUDA_TORCH)
    script(tmp_path / "local" / "cuda" / "bin" / "nvcc", "exit 1")
    assert "--version failed" in _build.find_toolkit(CUDA_TORCH)


def test_switch(monkeypatch):
    for value, expected in {"": None, "0": False, "1": True}.items():
        monkeypatch.setenv("FUSED_EMA_EXT", value)
        assert _build.switch("FUSED_EMA_EXT") is expected
    monkeypatch.setenv("FUSED_EMA_EXT", "yes")
    with pytest.raises(ValueError, match="FUSED_EMA_EXT='yes'"):
        _build.switch("FUSED_EMA_EXT")


# ---- The description -----------------------------------------------------------------------------


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


def test_the_description_needs_no_torch():
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_build', sys.argv[1]); "
        "m = sys.modules['_build'] = u.module_from_spec(s); s.loader.exec_module(m); "
        "assert not {'torch', 'setuptools'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "fused_ema" / "_build.py")], check=True)


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
    assert (record["version"], record["python"]) == (_build.VERSION, _build.PYTHON_TAG)
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


# ---- _native: what is loaded, and why not --------------------------------------------------------


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """Copies of _native.py and what it needs, in a package folder of their own: probe() imports them anew."""
    package = tmp_path / "packages" / "fused_ema_probe"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("_build.py", "_native.py", "_version.py"):
        (package / name).write_text((ROOT / "fused_ema" / name).read_text())
    (package / "_csrc").symlink_to(ROOT / "csrc")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    loaded = sys.modules.get(_build.NAME)

    def start():
        forget()
        return importlib.import_module("fused_ema_probe._native")

    def forget():
        for name in [name for name in sys.modules if name.startswith("fused_ema_probe")]:
            del sys.modules[name]

    start.folder = package
    start.cache = _build.cache_folder(str(torch.__version__))
    yield start
    forget()
    if loaded is not None:
        sys.modules[_build.NAME] = loaded


def install(folder, content=b"this is no shared library", **changes):
    """A library that cannot be imported, with a record that says it fits but for `changes`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / _build.LIBRARY).write_bytes(content)
    record = {**_build.describe(torch, "no CUDA here"), "size": len(content), **changes}
    (folder / _build.RECORD).write_text(json.dumps(record))


def test_not_built(probe):
    native = probe()
    assert native.load() is None
    assert native.path() is None
    assert native.why_not() == "the extension is not built: run `python -m fused_ema build`"
    assert native.cuda_enabled is False


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_another_torch(probe, place):
    install(getattr(probe, place), torch="1.0.0+cpu")
    expected = f"was built for torch 1.0.0+cpu, but torch {torch.__version__} is installed: run `python -m"
    assert expected in probe().why_not()


def test_the_local_part_of_the_version_counts(probe):
    public = str(torch.__version__).partition("+")[0]
    install(probe.folder, torch=f"{public}+cu999")
    assert f"was built for torch {public}+cu999, but" in probe().why_not()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"python": "cpython-39"}, "was built for cpython-39, but this is"),
        ({"version": "0.0.1"}, "was built for fused_ema 0.0.1, but this is"),
        ({"size": 10**6}, "is damaged (25 bytes instead of 1000000)"),  # loading a cut-off one may crash
        ({}, "failed (ImportError: "),
    ],
)
def test_a_library_that_is_not_loaded(probe, changes, expected):
    install(probe.folder, **changes)
    native = probe()
    assert native.load() is None
    assert expected in native.why_not()
    assert "python -m fused_ema build" in native.why_not()


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_library_without_a_record(probe, text):
    install(probe.folder)
    if text is None:
        (probe.folder / _build.RECORD).unlink()
    else:
        (probe.folder / _build.RECORD).write_text(text)
    assert _build.RECORD in probe().why_not()


def test_a_cache_that_others_can_write(probe):
    install(probe.cache)
    probe.cache.chmod(0o777)
    assert "can be written by others" in probe().why_not()


def test_a_cache_from_other_sources(probe):
    install(probe.cache, sources="other")
    assert "was built from other sources" in probe().why_not()


def test_all_reasons_are_told(probe):
    install(probe.folder, torch="1.0.0")
    install(probe.cache)
    assert "torch 1.0.0" in probe().why_not()
    assert "ImportError" in probe().why_not()


def test_switches_at_run_time(probe, monkeypatch):
    install(probe.folder)
    monkeypatch.setenv("FUSED_EMA_EXT", "1")
    with pytest.raises(ImportError, match="FUSED_EMA_EXT=1, but importing"):
        probe()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fused_ema", "build"])
    assert probe().load() is None  # what mends it must run
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    monkeypatch.setenv("FUSED_EMA_EXT", "0")
    assert probe().why_not() == "FUSED_EMA_EXT=0 switches the extension off: unset it"
    monkeypatch.setenv("FUSED_EMA_CUDA", "1")
    with pytest.raises(ImportError, match="FUSED_EMA_CUDA=1, but"):
        probe()
    monkeypatch.setenv("FUSED_EMA_CUDA", "off")
    with pytest.raises(ValueError, match="FUSED_EMA_CUDA='off'"):
        probe()


class FakeLibrary(SimpleNamespace):
    """Stands for an extension that was loaded."""


@pytest.mark.parametrize("cuda_built", [False, True])
def test_cuda_reasons(probe, monkeypatch, cuda_built):
    native = probe()
    found = native._Found(FakeLibrary(cuda_built=cuda_built), probe.folder, {"cuda_why_not": "no nvcc"}, None)
    monkeypatch.setattr(native, "_found", found)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "torch sees no CUDA GPU" if cuda_built else "was built without CUDA (no nvcc)"
    assert expected in native.cuda_why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (native.cuda_why_not() is None) is cuda_built
    monkeypatch.setenv("FUSED_EMA_CUDA", "0")
    assert "FUSED_EMA_CUDA=0" in native.cuda_why_not()
    monkeypatch.delenv("FUSED_EMA_CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA: install a CUDA build" in native.cuda_why_not()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in native.cuda_why_not()


def test_one_with_cuda_is_preferred(probe, monkeypatch):
    install(probe.folder)
    install(probe.cache, cuda="13.0")
    native = probe()
    tried = []
    monkeypatch.setattr(native, "_import", lambda path: tried.append(path) or FakeLibrary(cuda_built=True))
    assert native._find().path == probe.cache / _build.LIBRARY
    assert tried == [probe.cache / _build.LIBRARY]


# ---- The command line and setup.py ---------------------------------------------------------------


def python(*arguments, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_info_without_the_extension():
    code, output = python("-m", "fused_ema", FUSED_EMA_EXT="0")
    assert code == 0
    versions = (f"fused_ema  {_build.VERSION}", f"torch      {torch.__version__}")
    for text in (*versions, "cpu: torch", "FUSED_EMA_EXT=0"):
        assert text in output


def test_info_about_the_extension():
    code, output = python("-m", "fused_ema")
    assert code == 0
    record = _build.read_record(_build.PACKAGE)
    if record and record["torch"] == str(torch.__version__):
        assert str(_build.PACKAGE / _build.LIBRARY) in output
        assert f"built for torch {torch.__version__}" in output
        assert "backend    cpu: cpu" in output
    else:
        assert "not active: " in output
        assert "run `python -m fused_ema build`" in output


def test_build_fails_with_a_sentence(tmp_path):
    assert python("-m", "fused_ema", "build", FUSED_EMA_EXT="0") == (
        1,
        "fused_ema: no extension was built: FUSED_EMA_EXT=0 switched the extension off: unset it to build one\n",
    )
    code, output = python("-m", "fused_ema", "build", FUSED_EMA_CUDA="maybe")
    assert code != 0
    assert "FUSED_EMA_CUDA='maybe'" in output


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    for pattern in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "csrc/*",
        "fused_ema/*.py*",
        "fused_ema/py.typed",
    ):
        for path in ROOT.glob(pattern):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                copy.write_bytes(path.read_bytes())
    (folder / "README.md").touch()
    return folder


@pytest.fixture
def no_torch(tmp_path):
    """A PYTHONPATH under which torch cannot be imported, as in an isolated build."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    return str(tmp_path / "empty")


def test_wheel_without_torch(checkout, no_torch):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, PYTHONPATH=no_torch)
    assert code == 0, output
    assert "NO COMPILED EXTENSION" in output
    assert "No module named 'torch'" in output
    assert "python -m fused_ema build" in output
    assert "pip install --no-build-isolation ." in output
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name == f"fused_ema-{_build.VERSION}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.name for path in (ROOT / "csrc").iterdir()}
    assert {f"fused_ema/_csrc/{name}" for name in sources} <= names
    assert {"fused_ema/py.typed", "fused_ema/_C.pyi", "fused_ema/_build.py", "fused_ema/__main__.py"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize("name", ["FUSED_EMA_EXT", "FUSED_EMA_CUDA"])
def test_wheel_without_torch_as_an_error(checkout, no_torch, name):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, PYTHONPATH=no_torch, **{name: "1"})
    assert code != 0
    assert "torch cannot be imported" in output
    assert f"{name}=1 makes that an error" in output


def test_setup_names_a_wrong_switch(checkout):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, FUSED_EMA_EXT="yes")
    assert code != 0
    assert "FUSED_EMA_EXT='yes'" in output


def test_setup_switched_off(checkout):
    code, output = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, FUSED_EMA_EXT="0")
    assert code == 0
    assert "NO COMPILED EXTENSION" in output
    assert not list((checkout / "fused_ema").glob("*.so"))


@pytest.mark.parametrize("required", [False, True])
def test_setup_where_nothing_compiles(checkout, required):
    install(checkout / "fused_ema")  # of an earlier build
    switches = {
        "CXX": "false",
        "CC": "false",
        "FUSED_EMA_CUDA": "0",
        "FUSED_EMA_EXT": "1" if required else "",
    }
    code, output = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **switches)
    assert "compiling failed" in output
    assert ("FUSED_EMA_EXT=1 makes that an error" if required else "NO COMPILED EXTENSION") in output
    assert (code == 0) is not required
    assert not list((checkout / "fused_ema").glob("_C*.so"))
