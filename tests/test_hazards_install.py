"""HAZARDS 35: no extension, a broken one, or one that is switched off."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import refused

import fused_ema
from fused_ema._build import cache, library
from fused_ema.runners import extension as _native

# ---- 35: where there is no extension, or a broken one

SCRIPT = """
import torch, fused_ema
from fused_ema.runners import extension as _native
e, p = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
e.load_state_dict({name: torch.ones_like(t) for name, t in e.state_dict().items()})
p.load_state_dict({name: torch.zeros_like(t) for name, t in p.state_dict().items()})
fused_ema.update(e, p, 0.75)
assert e.weight.unique().tolist() == [0.75], e.weight
print(fused_ema.backend("cpu"), "|", _native.why_not())
"""


def run_python(folder, *arguments, **environment):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_EMA", "PYTHONPATH"))}
    keep |= {"XDG_CACHE_HOME": str(folder / "cache")} | environment
    command = [sys.executable, *(arguments or ("-c", textwrap.dedent(SCRIPT)))]
    return subprocess.run(command, cwd=folder, env=keep, capture_output=True, text=True, timeout=120)


@pytest.fixture
def package(tmp_path):
    """A copy of the package's Python files, without an extension."""
    folder = Path(fused_ema.__file__).parent
    shutil.copytree(
        folder, tmp_path / "fused_ema", ignore=shutil.ignore_patterns("_C.*.so", "_C.*.json", "__pycache__")
    )
    return tmp_path


def extension():
    """The extension and its record; skips where there is none, as the fixture `backend` does."""
    if _native.path() is None:
        pytest.skip(f"no native extension: {_native.why_not()}")
    return _native.path(), _native.path().with_name(cache.RECORD)


def test_35_absent_extension(package):
    done = run_python(package)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("torch | the extension is not built")
    info = run_python(package, "-m", "fused_ema")
    assert info.returncode == 0
    assert "not built" in info.stdout
    assert "python -m fused_ema build" in info.stdout


def test_35_absence_is_an_error_where_it_was_asked_for(package):
    done = run_python(package, FUSED_EMA_EXT="1")
    assert done.returncode != 0
    assert "ImportError: FUSED_EMA_EXT=1, but the extension is not built" in done.stderr


def test_35_switched_off(package):
    for file in extension():
        shutil.copy(file, package / "fused_ema")
    done = run_python(package)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "cpu | None\n")
    done = run_python(package, FUSED_EMA_EXT="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("torch | FUSED_EMA_EXT=0 switches the extension off")


def test_35_unknown_switch_is_refused(monkeypatch):
    monkeypatch.setenv("FUSED_EMA_EXT", "yes")
    refused(ValueError, library._find, names=["FUSED_EMA_EXT='yes'", "expected 0", "1"])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "other torch", "no record"])
def test_35_broken_extension(package, damage):
    library, record = extension()
    broken, text = package / "fused_ema" / library.name, record.read_text()
    size = library.stat().st_size
    broken.write_bytes({"truncated": library.read_bytes()[:-1000], "garbage": b"\0" * size}.get(damage, b"x" * size))
    if damage == "other torch":
        text = text.replace(torch.__version__, "2.0.1+cu999")
    if damage != "no record":
        (package / "fused_ema" / record.name).write_text(text)
    done = run_python(package)
    assert done.returncode == 0, done.stderr
    reason = {
        "truncated": "damaged",
        "garbage": "importing",
        "other torch": f"for torch 2.0.1+cu999 and fused_ema {fused_ema.__version__}, but torch {torch.__version__}",
        "no record": "no readable",
    }
    assert done.stdout.startswith("torch | ")
    assert reason[damage] in done.stdout
    assert "python -m fused_ema build" in done.stdout


def test_35_backend_tells(backend):
    assert fused_ema.backend("cpu") == fused_ema.backend(torch.device("cpu")) == backend
    assert fused_ema.backend("mps") == fused_ema.backend("xla") == fused_ema.backend("meta") == "torch"
    if not torch.cuda.is_available():
        assert fused_ema.backend() == backend
    refused(RuntimeError, lambda: fused_ema.backend("no such device"), names=["no such device"])
