"""Which CUDA toolkit is found, and the reasons that are given where none is."""

import pytest
from build_fakes import CPU_TORCH, CUDA_TORCH, ROCM_TORCH, script, toolkit

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
