"""The command line, and setup.py with and without torch."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from build_fakes import install

import fused_ema
from fused_ema import __main__ as fused_ema_main
from fused_ema import _cost
from fused_ema._build import cache
from fused_ema._build.compile import PACKAGE

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("bare_environment")


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


def test_info_about_the_extension():
    code, output = python("-m", "fused_ema")
    assert code == 0
    record = cache.read_record(PACKAGE)
    if record and record["torch"] == str(torch.__version__):
        assert str(PACKAGE / cache.LIBRARY) in output
        assert f"built for torch {torch.__version__}" in output
        assert "backend    cpu: cpu" in output
    else:
        assert "not active: " in output
        assert "run `python -m fused_ema build`" in output


def test_info_without_the_extension_says_why_it_is_slow_in_one_screen():
    code, output = python("-m", "fused_ema", FUSED_EMA_EXT="0", OMP_NUM_THREADS="1")
    assert code == 0
    for text in (f"fused_ema  {fused_ema.__version__}", f"torch      {torch.__version__}", "backend    cpu: torch"):
        assert text in output
    reasons = output.partition("Updates are slower here than they could be:\n")[2]
    assert "- The compiled CPU kernel is not active: FUSED_EMA_EXT=0" in reasons
    one_of_many = f"- On the CPU, PyTorch uses 1 of {_cost.cores()} cores (OMP_NUM_THREADS=1; torchrun sets it to 1)"
    assert (one_of_many in reasons) == (_cost.cores() > 1)
    for row in ("fused_ema (torch)", "torch._foreach_lerp_"):
        assert re.search(rf"{re.escape(row)} +[\d,]+ us +[\d.]+ ms +[\d.]+ GB/s", output)
    assert output.count("\n") <= 24 + 3 * torch.cuda.device_count()


@pytest.mark.parametrize(
    ("fused", "stream", "active", "complains"),
    [
        ((1e-4, 0.01), 0.009, "cpu", False),
        ((1e-4, 0.02), 0.009, "cpu", True),
        ((1e-2, 0.01), 0.009, "cpu", True),
        ((1e-2, 0.02), 0.009, "torch", False),  # for another reason, which is in the list
    ],
)
def test_info_says_when_it_is_slower_than_it_should_be(monkeypatch, fused, stream, active, complains):
    monkeypatch.setattr(_cost, "measure", lambda device: _cost.Cost(fused, (1e-3, 0.011), stream))
    monkeypatch.setattr(fused_ema, "backend", lambda device: active)
    table, slow = fused_ema_main._table("cpu")
    assert len(table) == 4
    assert (slow is not None) == complains


def test_info_survives_a_device_without_memory(monkeypatch):
    def measure(device):
        raise torch.OutOfMemoryError("no room\nlong traceback")

    monkeypatch.setattr(_cost, "measure", measure)
    assert fused_ema_main._table("cpu") == (["cpu could not be measured: no room"], None)


@pytest.mark.parametrize(
    ("built", "architecture", "runs"),
    [("8.0", "8.6", True), ("8.6", "8.0", False), ("9.0", "10.0", False), ("12.0", "12.0", True)],
)
def test_info_knows_what_machine_code_runs_on(built, architecture, runs):
    assert fused_ema_main._runs_on(built, architecture) == runs


def test_build_fails_with_a_sentence(monkeypatch, capsys):
    assert python("-m", "fused_ema", "build", FUSED_EMA_EXT="0") == (
        1,
        "fused_ema: no extension was built: FUSED_EMA_EXT=0 switches the extension off; unset it to build one\n",
    )
    monkeypatch.setenv("FUSED_EMA_CUDA", "maybe")
    assert fused_ema_main.build(None, force=False) == 1
    assert "no extension was built: FUSED_EMA_CUDA='maybe': expected 0" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    for pattern in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "csrc/*",
        "fused_ema/**/*.py",
        "fused_ema/*.pyi",
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
    assert wheel.name == f"fused_ema-{fused_ema.__version__}-py3-none-any.whl"
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_ema").rglob("*.py")}
    sources = {f"fused_ema/_csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert packed == modules | sources | {"fused_ema/py.typed", "fused_ema/_C.pyi"}


@pytest.mark.parametrize("name", ["FUSED_EMA_EXT", "FUSED_EMA_CUDA"])
def test_wheel_without_torch_as_an_error(checkout, no_torch, name):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, PYTHONPATH=no_torch, **{name: "1"})
    assert code != 0
    assert "torch cannot be imported" in output
    assert f"{name}=1 makes this an error" in output


def test_setup_names_a_wrong_switch(checkout):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, FUSED_EMA_EXT="yes")
    assert code != 0
    assert "FUSED_EMA_EXT='yes'" in output


def test_setup_switched_off(checkout):
    install(checkout / "fused_ema")  # as an earlier build left it
    code, output = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, FUSED_EMA_EXT="0")
    assert code == 0
    assert "NO COMPILED EXTENSION" in output
    assert not list((checkout / "fused_ema").glob("*.so"))


@pytest.mark.parametrize("required", [False, True])
def test_setup_where_nothing_compiles(checkout, required):
    install(checkout / "fused_ema")  # as an earlier build left it
    switches = {
        "CXX": "false",
        "CC": "false",
        "FUSED_EMA_CUDA": "0",
        "FUSED_EMA_EXT": "1" if required else "",
    }
    code, output = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **switches)
    assert "compiling failed" in output
    assert ("FUSED_EMA_EXT=1 makes this an error" if required else "NO COMPILED EXTENSION") in output
    assert (code == 0) is not required
    assert not list((checkout / "fused_ema").glob("_C*.so"))


def test_what_setup_imports_needs_no_torch():
    code = (
        "import sys, types; package = sys.modules['fused_ema'] = types.ModuleType('fused_ema'); "
        "package.__path__ = [sys.argv[1]]; import fused_ema._build.cache, fused_ema._build.compile; "
        "assert not {'torch', 'setuptools'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "fused_ema")], check=True)
