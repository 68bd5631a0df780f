"""Which extension is loaded, and the reasons that are given where none is."""

import sys
from types import SimpleNamespace

import pytest
import torch
from build_fakes import install

from fused_ema._build import cache, library
from fused_ema._build.compile import NAME

pytestmark = pytest.mark.usefixtures("bare_environment")
HERE = f"but torch {torch.__version__} and fused_ema {library.__version__} are installed; {library.BUILD}"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Where a library is looked for: an empty package, and an empty cache."""
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "package")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return {"package": tmp_path / "package", "cache": cache.cache_folder(str(torch.__version__))}


def why_not():
    found = library._find()
    assert (found.module, found.path, found.record) == (None, None, {})
    return found.why_not


def test_not_built(folders):
    assert why_not() == "the extension is not built; run `python -m fused_ema build`"


@pytest.mark.parametrize("place", ["package", "cache"])
def test_another_torch(folders, place):
    install(folders[place], torch="1.0.0+cpu")
    assert f"was built for torch 1.0.0+cpu and fused_ema {library.__version__}, {HERE}" in why_not()


def test_the_local_part_of_the_version_counts(folders):
    public = str(torch.__version__).partition("+")[0]
    install(folders["package"], torch=f"{public}+cu999")
    assert f"was built for torch {public}+cu999 and" in why_not()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": "0.0.1"}, f"was built for torch {torch.__version__} and fused_ema 0.0.1, {HERE}"),
        ({"size": 10**6}, "is damaged (25 bytes instead of 1000000)"),  # loading a cut-off one may crash
        ({}, "failed (ImportError: "),
    ],
)
def test_a_library_that_is_not_loaded(folders, changes, expected):
    install(folders["package"], **changes)
    reason = why_not()
    assert expected in reason
    assert "python -m fused_ema build" in reason


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_library_without_a_record(folders, text):
    install(folders["package"])
    record = folders["package"] / cache.RECORD
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    assert f"has no readable {cache.RECORD} next to it" in why_not()


def test_a_cache_that_others_can_write(folders):
    install(folders["cache"])
    folders["cache"].chmod(0o777)
    assert "can be written by others" in why_not()


def test_a_cache_from_other_sources(folders):
    install(folders["cache"], sources="other")
    assert "was built from other sources" in why_not()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The package in a folder of sys.path, shadowed by the one that runs."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path, str(tmp_path / "site")])
    return tmp_path / "site" / "package"


def test_the_extension_of_an_installed_package_that_a_checkout_shadows(folders, installed, monkeypatch):
    install(installed, sources=library.sources_digest())
    monkeypatch.setattr(library, "_import", lambda path: SimpleNamespace())
    assert library._find().path == installed / cache.LIBRARY
    install(folders["package"])
    assert library._find().path == folders["package"] / cache.LIBRARY
    install(installed, sources="other")
    (folders["package"] / cache.LIBRARY).unlink()
    assert f"{installed / cache.LIBRARY} was built from other sources" in why_not()


def test_all_reasons_are_given(folders):
    install(folders["package"], torch="1.0.0")
    install(folders["cache"])
    reason = why_not()
    assert "torch 1.0.0" in reason
    assert "ImportError" in reason


def test_one_with_cuda_is_preferred(folders, monkeypatch):
    install(folders["package"])
    install(folders["cache"], cuda="13.0")
    tried = []
    monkeypatch.setattr(library, "_import", lambda path: tried.append(path) or SimpleNamespace())
    assert library._find().path == folders["cache"] / cache.LIBRARY
    assert tried == [folders["cache"] / cache.LIBRARY]


# ---- What is loaded, and what the environment asks for -------------------------------------------


@pytest.fixture
def found(monkeypatch, tmp_path):
    """found(**parts) stands for what `_find` found when the package was imported."""
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    return lambda **parts: monkeypatch.setattr(library, "_found", library._Found(**parts))


def test_switches_at_run_time(folders, found, monkeypatch):
    found(why_not="the reason")
    library._insist()
    monkeypatch.setenv("FUSED_EMA_EXT", "1")
    with pytest.raises(ImportError, match="FUSED_EMA_EXT=1, but the reason"):
        library._insist()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fused_ema", "build"])
    library._insist()
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    monkeypatch.setenv("FUSED_EMA_EXT", "0")
    assert why_not() == "FUSED_EMA_EXT=0 switches the extension off; unset it"
    monkeypatch.setenv("FUSED_EMA_CUDA", "1")
    with pytest.raises(ImportError, match="FUSED_EMA_CUDA=1, but"):
        library._insist()
    monkeypatch.setenv("FUSED_EMA_CUDA", "off")
    with pytest.raises(ValueError, match="FUSED_EMA_CUDA='off'"):
        library._insist()


@pytest.mark.parametrize("cuda_built", [False, True])
def test_cuda_reasons(found, monkeypatch, tmp_path, cuda_built):
    found(module=SimpleNamespace(cuda_built=cuda_built), path=tmp_path, record={"cuda_why_not": "no nvcc"})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "torch sees no CUDA GPU" if cuda_built else "was built without CUDA (no nvcc)"
    assert expected in library.cuda_why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (library.cuda_why_not() is None) is cuda_built
    monkeypatch.setenv("FUSED_EMA_CUDA", "0")
    assert "FUSED_EMA_CUDA=0" in library.cuda_why_not()
    monkeypatch.delenv("FUSED_EMA_CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA; install a CUDA build" in library.cuda_why_not()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in library.cuda_why_not()


def test_no_extension_is_the_reason_for_no_cuda(found, monkeypatch):
    found(why_not="the extension is not built")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    assert library.cuda_why_not() == "the extension is not built"
