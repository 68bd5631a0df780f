"""What the tests share: the backends of a machine without a GPU, ways to call, and what a refusal must look like."""

import os
import sys
import tempfile

import oracle
import pytest
import torch
from hypothesis import settings
from summary import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_sessionfinish,
    pytest_terminal_summary,
)
from torch import nn

import fused_ema
from fused_ema import functional
from fused_ema._build import toolkit as _toolkit
from fused_ema.runners import extension as _native

# Of the tests that set none themselves; `make test-long` takes the other.
settings.register_profile("short", derandomize=True, max_examples=30, deadline=None, database=None)
settings.register_profile("long", max_examples=10_000, deadline=None, print_blob=True)
settings.load_profile("short")

pytest.register_assert_rewrite("grid_checks", "step_checks")  # so that their failures show values


@pytest.fixture(autouse=True, scope="session")
def temporary_folder(tmp_path_factory):
    """What tests and their processes leave in the temporary folder goes when pytest's own does."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patched.setattr(tempfile, "tempdir", None)  # which it remembers
        yield


@pytest.fixture(params=["cpu", "torch"])
def backend(request, monkeypatch):
    """Runs the test with the native extension, and with pure PyTorch alone."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "load", lambda: None)
    elif _native.load() is None:
        if os.environ.get("FUSED_EMA_EXT") == "1":
            pytest.fail(f"FUSED_EMA_EXT=1, but {_native.why_not()}")
        pytest.skip(f"no native extension: {_native.why_not()}")
    functional._module_plans.clear()
    functional._list_plans.clear()
    yield request.param
    functional._module_plans.clear()
    functional._list_plans.clear()


@pytest.fixture(params=["update", "bound"])
def update(request, backend):
    """update(ema, model, decay): the function, or a handle bound for the occasion."""
    if request.param == "update":
        return fused_ema.update
    return lambda ema, model, decay, **options: fused_ema.bind(ema, model, **options).update(decay)


@pytest.fixture(params=["update", "bound", "used"])
def stepper(request, backend):
    """stepper(ema, model) → step(decay), through a plan made before the test changes anything."""

    def make(ema, model):
        handle = fused_ema.bind(ema, model)
        if request.param == "bound":
            return handle.update
        step = handle.update if request.param == "used" else lambda decay: fused_ema.update(ema, model, decay)
        step(0.5)
        return step

    return make


@pytest.fixture(params=["module", "dict", "list"])
def kind(request):
    return request.param


def source(kind, tensors):
    """The tensors of a dict as a module, a dict or a list."""
    if kind == "dict":
        return dict(tensors)
    if kind == "list":
        return list(tensors.values())
    module = nn.Module()
    module._parameters.update(tensors)  # register_parameter() would refuse some of what the tests pass in
    return module


def label(kind, name, position):
    """How errors name a tensor."""
    return f"[{position}]" if kind == "list" else f"[{name!r}]"


def tensors_of(*sources):
    found = []
    for each in sources:
        if isinstance(each, nn.Module):
            found += [*each.parameters(), *each.buffers()]
        elif isinstance(each, torch.Tensor):
            found.append(each)
        else:
            found += each.values() if hasattr(each, "values") else each
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def plain(tensor):
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_nested


def memory(tensor):
    """Every byte of a tensor's storage, gaps and neighbours included; a view, not a copy."""
    if not plain(tensor) or tensor.is_meta:
        return torch.empty(0, dtype=torch.uint8)
    if tensor.layout is torch.sparse_coo:
        return memory(tensor._values())
    if tensor.layout is not torch.strided:
        return memory(tensor.to_dense())
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def bits(*sources):
    return [memory(tensor).clone() for tensor in tensors_of(*sources)]


def same_bits(before, *sources):
    after = [memory(tensor) for tensor in tensors_of(*sources)]
    return len(before) == len(after) and all(map(torch.equal, before, after))


def clones(tensors):
    """Of a dict of tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def versions(*sources):
    return [tensor._version for tensor in tensors_of(*sources) if plain(tensor) and not tensor.is_inference()]


def refused(error, call, *sources, names=()):
    """`call` raises exactly `error`, with all of `names` in its text, and leaves each byte of the sources alone."""
    assert error in (ValueError, TypeError, RuntimeError)
    before, versions_before = bits(*sources), versions(*sources)
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error, caught.value
    text = str(caught.value)
    for name in names:
        assert name in text, f"{name} is not in: {text}"
    assert same_bits(before, *sources), "written in spite of the error"
    assert versions(*sources) == versions_before


def net(bias=True):
    """Parameters, float buffers and an integer one, each element another value."""
    module = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        for tensor in tensors_of(module):
            tensor.copy_(torch.randn(tensor.shape) * 8)
    return module


@pytest.fixture
def grid(request, capfd):
    """The kernel's tile code over an emulated grid; a report of its sanitizer fails the test."""
    import emulated_grid  # in tests/grid, which pytest puts on sys.path for the tests there

    yield emulated_grid.build(getattr(request, "param", "default"))
    assert "runtime error" not in capfd.readouterr().err


@pytest.fixture
def bare_environment(monkeypatch, tmp_path):
    """None of this machine's toolkits, switches or caches."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "FUSED_EMA_EXT", "FUSED_EMA_CUDA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_toolkit, "USUAL_PLACES", (tmp_path / "local",))


def same_values(found, expected):
    """Two mappings of names to tensors hold the same bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert oracle.same_bits(found[name], tensor), name


def interrupted_at(moment, call):
    """Runs `call` up to a moment at which Python hands out signals: where a function begins, or a built-in one ends.

    True if it came to that.
    """
    moments = 0

    def profile(frame, event, argument):
        nonlocal moments
        moments += event in ("call", "c_return")
        if moments == moment:
            raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # PyTorch's own no_grad() does not see to that
    return False
