"""Which extension is loaded, and why none."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from build_fakes import install

from fused_ema._build import compile as _build

ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """Copies of _native.py and what it needs, in a package folder of their own: probe() imports them anew."""
    package = tmp_path / "packages" / "fused_ema_probe"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("_build.py", "_native.py", "_switch.py", "_toolkit.py", "_version.py"):
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
