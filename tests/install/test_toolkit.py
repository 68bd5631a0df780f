"""Which CUDA toolkit is found, and the reasons that are given where none is."""

from types import SimpleNamespace

import pytest
from build_fakes import CPU_TORCH, CUDA_TORCH, ROCM_TORCH, packaged_toolkit, script, toolkit

from fused_ema._build import toolkit as _toolkit
from fused_ema._build.switch import switch

pytestmark = pytest.mark.usefixtures("bare_environment")


def test_no_toolkit(tmp_path):
    assert _toolkit.find_cuda_home() is None


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_the_environment_names_the_toolkit(monkeypatch, tmp_path, name):
    toolkit(tmp_path / "local" / "cuda")
    monkeypatch.setenv(name, str(toolkit(tmp_path / "mine")))
    assert _toolkit.find_cuda_home() == tmp_path / "mine"


def test_a_wrong_cuda_home_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "without-headers", headers=False)))
    toolkit(tmp_path / "local" / "cuda")
    assert _toolkit.find_cuda_home() == tmp_path / "local" / "cuda"


def test_headers_without_a_compiler_are_passed_over(monkeypatch, tmp_path):
    home = toolkit(tmp_path / "local" / "cuda")
    (home / "bin" / "nvcc").unlink()
    assert _toolkit.find_cuda_home() is None


def test_nvcc_on_the_path_is_a_wrapper_script(tmp_path):
    home = toolkit(tmp_path / "far" / "away")
    script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert _toolkit.find_cuda_home() == home


def test_nvcc_on_the_path_is_a_link(tmp_path):
    home = toolkit(tmp_path / "far" / "away")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")  # it does not say where it is
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert _toolkit.find_cuda_home() == home


def test_the_newest_of_the_usual_place(tmp_path):
    for version in ("9.2", "12.4", "12.10"):
        toolkit(tmp_path / "local" / f"cuda-{version}")
    assert _toolkit.find_cuda_home() == tmp_path / "local" / "cuda-12.10"
    toolkit(tmp_path / "local" / "cuda")
    assert _toolkit.find_cuda_home() == tmp_path / "local" / "cuda"


# ---- A toolkit that pip installed ----------------------------------------------------------------


def test_a_packaged_toolkit_comes_before_the_usual_places(monkeypatch, tmp_path):
    toolkit(tmp_path / "local" / "cuda")
    home = packaged_toolkit(tmp_path / "site" / "nvidia")
    assert _toolkit.find_cuda_home() == home
    script(tmp_path / "bin" / "nvcc", f'exec {toolkit(tmp_path / "far")}/bin/nvcc "$@"')
    assert _toolkit.find_cuda_home() == tmp_path / "far"
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "mine")))
    assert _toolkit.find_cuda_home() == tmp_path / "mine"


@pytest.mark.parametrize("part", ["bin/nvcc", "include/cuda_runtime.h", "include/cccl"])
def test_packages_that_make_no_whole_toolkit(tmp_path, part):
    """torch's own packages alone, or nvcc without cccl, whose headers those of CUDA include."""
    path = packaged_toolkit(tmp_path / "site" / "nvidia") / part
    path.rmdir() if path.is_dir() else path.unlink()
    assert _toolkit.find_cuda_home() is None
    assert '`pip install "cuda-toolkit[nvcc,cccl]==13.0.*"`' in _toolkit.find_toolkit(CUDA_TORCH)


def test_the_packages_of_several_versions(tmp_path):
    packages = tmp_path / "site" / "nvidia"
    homes = {version: packaged_toolkit(packages, f"cu{version}", f"{version}.1") for version in (9, 13, 14)}
    (packages / "cudnn").mkdir()
    assert _toolkit.find_cuda_home() == homes[14]
    assert _toolkit.find_toolkit(CUDA_TORCH).home == homes[13]


def test_a_toolkit_of_another_version_does_not_hide_one_that_fits(tmp_path):
    toolkit(tmp_path / "bin" / "..", "12.8")  # its nvcc is on PATH
    home = packaged_toolkit(tmp_path / "site" / "nvidia")
    assert _toolkit.find_toolkit(CUDA_TORCH).home == home


def test_the_linker_finds_the_packaged_library(tmp_path):
    home = packaged_toolkit(tmp_path / "site" / "nvidia")
    before = sorted(home.rglob("*"))
    for _ in range(2):  # setup.py keeps its folder from one build to the next
        (folder,) = _toolkit.link_folder(home, tmp_path / "build")
        assert (folder / "libcudart.so").read_text() == "the library of torch"
    assert folder.is_relative_to(tmp_path / "build")
    assert sorted(home.rglob("*")) == before
    (home / "lib" / "libcudart.so").symlink_to("libcudart.so.13")
    assert _toolkit.link_folder(home, tmp_path / "other") == []


def test_other_toolkits_need_no_link(tmp_path):
    assert _toolkit.link_folder(toolkit(tmp_path / "cuda"), tmp_path / "build") == []


@pytest.mark.parametrize(("cuda", "has_packages"), [("12.8", False), ("13.0", True), ("14.2", True)])
def test_how_to_get_a_toolkit(cuda, has_packages):
    torch = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda, hip=None))
    reason = _toolkit.find_toolkit(torch)
    assert f"install CUDA {cuda}" in reason
    assert (f'run `pip install "cuda-toolkit[nvcc,cccl]=={cuda}.*"`' in reason) == has_packages


def test_nvcc_version(tmp_path):
    assert _toolkit.nvcc_version(toolkit(tmp_path / "a", "12.10")) == (12, 10)
    script(tmp_path / "b" / "bin" / "nvcc", "exit 1")
    assert _toolkit.nvcc_version(tmp_path / "b") is None


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
    assert _toolkit.arch_list(nvcc, torch_version) == expected


def test_toolkit_found(monkeypatch, tmp_path):
    home = toolkit(tmp_path / "local" / "cuda", "13.1")  # another minor version will do
    found = _toolkit.find_toolkit(CUDA_TORCH)
    assert found == _toolkit.Toolkit(home, (13, 1), "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert _toolkit.find_toolkit(CUDA_TORCH).archs == "9.0"
    monkeypatch.setenv("FUSED_EMA_CUDA", "0")
    assert "FUSED_EMA_CUDA=0" in _toolkit.find_toolkit(CUDA_TORCH)


def test_reasons_for_no_toolkit(tmp_path):
    assert "without CUDA" in _toolkit.find_toolkit(CPU_TORCH)
    assert "ROCm" in _toolkit.find_toolkit(ROCM_TORCH)
    assert "set CUDA_HOME" in _toolkit.find_toolkit(CUDA_TORCH)
    toolkit(tmp_path / "local" / "cuda", "12.8")
    assert "CUDA 12.8" in _toolkit.find_toolkit(CUDA_TORCH)
    assert "with CUDA 13.0" in _toolkit.find_toolkit(CUDA_TORCH)
    script(tmp_path / "local" / "cuda" / "bin" / "nvcc", "exit 1")
    assert "--version` failed" in _toolkit.find_toolkit(CUDA_TORCH)


def test_switch(monkeypatch):
    for value, expected in {"": None, "0": False, "1": True}.items():
        monkeypatch.setenv("FUSED_EMA_EXT", value)
        assert switch("FUSED_EMA_EXT") is expected
    monkeypatch.setenv("FUSED_EMA_EXT", "yes")
    with pytest.raises(ValueError, match="FUSED_EMA_EXT='yes'"):
        switch("FUSED_EMA_EXT")
