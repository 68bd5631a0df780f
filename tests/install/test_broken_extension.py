"""The package works without an extension, with a broken one, and with one that is switched off."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused

import fused_ema
from fused_ema._build import cache
from fused_ema.runners import extension as _native

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


def run_python(folder, **environment):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_EMA", "PYTHONPATH"))}
    keep |= {"XDG_CACHE_HOME": str(folder / "cache")} | environment
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=keep, capture_output=True, text=True, timeout=120
    )


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


@pytest.mark.parametrize("compiler", [sys.executable, "/none"], ids=["compiler", "none"])
def test_absent_extension(package, compiler):
    """What would be faster is said once, at the user's line, where there is a compiler to build it."""
    done = run_python(package, CXX=compiler, PATH="")
    warning = (
        "<string>:7: UserWarning: fused_ema: on cpu devices, updates run as PyTorch's own operations, which are slower "
        "than the compiled kernel: the extension is not built; run `python -m fused_ema build`. FUSED_EMA_QUIET=1 "
        "silences this warning.\n"
    )
    assert (done.returncode, done.stderr) == (0, warning if compiler == sys.executable else "")
    assert done.stdout.startswith("torch | the extension is not built; run `python -m fused_ema build`")


def test_absence_is_an_error_where_it_was_asked_for(package):
    done = run_python(package, FUSED_EMA_EXT="1")
    assert done.returncode != 0
    assert "ImportError: FUSED_EMA_EXT=1, but the extension is not built" in done.stderr


def test_switched_off(package):
    for file in extension():
        shutil.copy(file, package / "fused_ema")
    done = run_python(package, FUSED_EMA_EXT="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("torch | FUSED_EMA_EXT=0 switches the extension off")


@pytest.mark.hazard(35, "guarded")
@pytest.mark.parametrize("damage", ["damaged", "importing"])
def test_broken_extension(package, damage):
    """One library is truncated, the other has the right size but no code. test_native.py has the other reasons."""
    library, record = extension()
    content = library.read_bytes()
    broken = {"damaged": content[:-1000], "importing": bytes(len(content))}[damage]
    (package / "fused_ema" / library.name).write_bytes(broken)
    shutil.copy(record, package / "fused_ema")
    done = run_python(package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch | ")
    assert damage in done.stdout
    assert "python -m fused_ema build" in done.stdout


@pytest.mark.hazard(35, "good")
def test_backend_tells(backend):
    assert fused_ema.backend("cpu") == fused_ema.backend(torch.device("cpu")) == backend
    assert fused_ema.backend("mps") == fused_ema.backend("xla") == fused_ema.backend("meta") == "torch"
    if not torch.cuda.is_available():
        assert fused_ema.backend() == backend
    refused(RuntimeError, lambda: fused_ema.backend("no such device"), names=["no such device"])
