"""Helpers that the tests share: the backends of a machine without a GPU, ways to call, the check of a refusal."""

import gc
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
from fused_ema import EMA, functional
from fused_ema._build import toolkit as _toolkit
from fused_ema.runners import extension as _native

# For tests that set nothing themselves; `make test-long` uses "long".
settings.register_profile("short", derandomize=True, max_examples=30, deadline=None, database=None)
settings.register_profile("long", max_examples=10_000, deadline=None, print_blob=True)
settings.load_profile("short")

os.environ.setdefault("FUSED_EMA_QUIET", "1")  # many tests run without the extension
pytest.register_assert_rewrite("grid_checks", "step_checks")  # so that failed assertions there show values


@pytest.fixture(autouse=True, scope="session")
def temporary_folder(tmp_path_factory):
    """Deletes the temporary files of tests and their processes together with pytest's own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patched.setattr(tempfile, "tempdir", None)  # the folder that tempfile has cached
        yield


def pytest_itemcollected(item):
    """Only the hazards and the suite of all runners meet the stand-in in `make test`: the rest is alike on it."""
    parameters = getattr(item, "callspec", None) and item.callspec.params
    everywhere = item.get_closest_marker("hazard") or item.path.parent.name == "runners"
    if parameters and parameters.get("backend") == "nvrtc" and not everywhere:
        item.add_marker("slow")


@pytest.fixture(params=["cpu", "nvrtc", "torch"])
def backend(request, monkeypatch):
    """Runs the test with the native extension, with the NVRTC runner on its stand-in, and with pure PyTorch alone."""
    if request.param != "cpu":
        monkeypatch.setattr(_native, "load", lambda: None)
        if request.param == "nvrtc":
            import stand_in  # in tests/grid, which pytest puts on sys.path

            stand_in.install(monkeypatch)
    elif _native.load() is None:
        if os.environ.get("FUSED_EMA_EXT") == "1":
            pytest.fail(f"FUSED_EMA_EXT=1, but {_native.why_not()}")
        pytest.skip(f"no native extension: {_native.why_not()}")
    forget_plans()
    yield request.param
    forget_plans()


def forget_plans():
    """Drops the cached plans, so that the next call of each function makes a new one."""
    functional._module_plans.clear()
    functional._list_plans.clear()


@pytest.fixture(params=["update", "bound"])
def update(request, backend):
    """Gives update(ema, model, decay): the function, or a handle that is bound for each call."""
    if request.param == "update":
        return fused_ema.update
    return lambda ema, model, decay, **options: fused_ema.bind(ema, model, **options).update(decay)


@pytest.fixture(params=["update", "bound", "used"])
def stepper(request, backend):
    """Gives stepper(ema, model), which returns step(decay); its plan is made before the test changes anything."""

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
    module._parameters.update(tensors)  # register_parameter() would refuse some tensors of the tests
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
    """Clones the tensors of a dict."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def all_averages(ema):
    """Each average of a manager as a dict of tensors by name; they are not copies."""
    return [dict(average) for average in ema.state_dict()["averages"]]


def averages(ema, index=0):
    """The tensors of a manager's average by name; they are not copies."""
    return ema.state_dict()["averages"][index]


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


def equal(left, right):
    """Two mappings of names to tensors hold the same bits."""
    return left.keys() == right.keys() and all(oracle.same_bits(left[name], right[name]) for name in left)


def trained(model, decay=0.5, **options):
    """A manager whose averages differ from the model's values."""
    ema = EMA(model, decay, **options)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))
    ema.update()
    return ema


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
    assert same_bits(before, *sources), "a call that raised wrote something"
    assert versions(*sources) == versions_before


def net(bias=True):
    """A module with parameters, float buffers and an integer one, all of whose elements differ."""
    module = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        for tensor in tensors_of(module):
            tensor.copy_(torch.randn(tensor.shape) * 8)
    return module


@pytest.fixture
def quick_collections():
    """Lets gc.collect() look only at what the test makes, which takes a hundredth of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def grid(request, capfd):
    """Runs the kernel's tile code over an emulated grid; a report of its sanitizer fails the test."""
    import emulated_grid  # in tests/grid, which pytest puts on sys.path for the tests there

    yield emulated_grid.build(getattr(request, "param", "default"))
    assert "runtime error" not in capfd.readouterr().err


@pytest.fixture
def bare_environment(monkeypatch, tmp_path):
    """Hides this machine's toolkits, switches and caches."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "FUSED_EMA_EXT", "FUSED_EMA_CUDA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_toolkit, "USUAL_PLACES", (tmp_path / "local",))
    monkeypatch.setattr(_toolkit, "PACKAGES", (tmp_path / "site" / "nvidia",))


def same_values(found, expected):
    """Asserts that two mappings of names to tensors hold the same bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert oracle.same_bits(found[name], tensor), name


def interrupted_at(moment, call):
    """Raises KeyboardInterrupt at one of the moments of `call` at which Python handles signals: where a function begins
    or a built-in function ends.

    False if the call ended before that moment.
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
        torch.set_grad_enabled(True)  # an interrupted no_grad() leaves it off
    return False
