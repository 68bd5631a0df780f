"""Kinds of tensors: plain parameters and buffers are taken; what has no memory of its own is refused."""

import functools
import itertools

import pytest
import torch
from conftest import label, refused, source
from torch import nn
from torch._subclasses import FakeTensorMode

import fused_ema


@pytest.mark.hazard(20, "good")
def test_plain_kinds_are_taken(update, kind):
    tensors = {"a": torch.ones(2), "b": nn.Parameter(torch.ones(2)), "c": nn.Buffer(torch.ones(2))}
    tensors["d"] = nn.Parameter(torch.ones(2), requires_grad=False)
    model = source(kind, {name: torch.zeros(2) for name in tensors})
    update(source(kind, tensors), model, 0.5)
    assert all(tensor.tolist() == [0.5, 0.5] for tensor in tensors.values())


class Tagged(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    """A tensor without data of its own: its data_ptr() is null."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} of a wrapper was called")


def wrapper():
    return torch.Tensor._make_wrapper_subclass(Wrapper, (2, 2), dtype=torch.float32)


def fake():
    with FakeTensorMode():
        return torch.ones(2, 2)


def quantized():
    return torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.quint8)


KINDS = {
    "quantized": (TypeError, quantized, "quint8"),
    "coo": (TypeError, lambda: torch.eye(2).to_sparse(), "sparse_coo"),
    "csr": (TypeError, lambda: torch.eye(2).to_sparse_csr(), "sparse_csr"),
    "mkldnn": (TypeError, lambda: torch.eye(2).to_mkldnn(), "mkldnn"),
    "float8_e4m3fn": (TypeError, lambda: torch.eye(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "float8_e5m2": (TypeError, lambda: torch.eye(2).to(torch.float8_e5m2), "float8_e5m2"),
    "complex32": (TypeError, lambda: torch.ones(2, 2, dtype=torch.complex32), "complex32"),
    "nested": (TypeError, lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
    "jagged": (
        TypeError,
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        "NestedTensor",
    ),
    "subclass": (TypeError, lambda: torch.eye(2).as_subclass(Tagged), "Tagged"),
    "parameter of a subclass": (TypeError, lambda: nn.Parameter(torch.eye(2).as_subclass(Tagged)), "Tagged"),
    "wrapper": (TypeError, wrapper, "Wrapper"),
    "fake": (TypeError, fake, "FakeTensor"),
    "meta": (ValueError, lambda: torch.ones(2, 2, device="meta"), "meta"),
    "meta parameter": (ValueError, lambda: nn.Parameter(torch.ones(2, 2, device="meta")), "meta"),
    "lazy": (RuntimeError, lambda: nn.UninitializedParameter(), "initialised"),
    "lazy buffer": (RuntimeError, lambda: nn.UninitializedBuffer(), "initialised"),
}


OPERATIONS = [lambda e, m: fused_ema.update(e, m, 0.5), fused_ema.copy_, fused_ema.swap_, fused_ema.bind]


@pytest.mark.hazard(21, "guarded")
@pytest.mark.hazard(20, "guarded")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", KINDS)
def test_tensors_of_other_kinds_are_refused(backend, kind, name):
    error, make, found = KINDS[name]
    places = itertools.product(["ema", "model", "both"], [0, 1])
    for operation, (side, position) in zip(itertools.cycle(OPERATIONS), places, strict=False):
        ema, model = [torch.ones(3)], [torch.zeros(3)]
        ema.insert(position, make() if side != "model" else torch.ones(2, 2))
        model.insert(position, make() if side != "ema" else torch.ones(2, 2))
        ema = source(kind, dict(zip("vw", ema, strict=True)))
        model = source(kind, dict(zip("vw", model, strict=True)))
        where = f"{'model' if side == 'model' else 'ema'}{label(kind, 'vw'[position], position)}"
        call = functools.partial(operation, ema, model)
        refused(error, call, ema, model, names=[where, "expected", "found", found])


def test_a_lazy_module_is_taken_once_it_is_initialised(update):
    ema, model = nn.LazyLinear(3), nn.LazyLinear(3)
    refused(RuntimeError, lambda: update(ema, model, 0.5), names=["ema['weight']", "expected"])
    ema(torch.ones(1, 2)), model(torch.ones(1, 2))
    update(ema, model, 0.0)
    assert torch.equal(ema.weight, model.weight)


@pytest.mark.parametrize("position", [0, 1])
def test_a_subclass_on_memory_seen_before_is_refused(backend, position):
    ema, model = [torch.ones(2), torch.ones(2)], [torch.zeros(2), torch.zeros(2)]
    fused_ema.update(ema, model, 0.5)
    ema[position] = ema[position].as_subclass(Tagged)
    names = [f"ema[{position}]", "Tagged"]
    refused(TypeError, lambda: fused_ema.update(ema, model, 0.5), ema, model, names=names)


# ---- Inference tensors


@pytest.mark.hazard(23, "good")
def test_inside_inference_mode(update, kind):
    with torch.inference_mode():
        e, p = torch.ones(3), torch.zeros(3)
        update(source(kind, {"w": e}), source(kind, {"w": p}), 0.5)
        assert e.tolist() == [0.5] * 3


def test_ordinary_tensors_inside_inference_mode(update):
    e, p = torch.ones(3), torch.zeros(3)
    with torch.inference_mode():
        update([e], [p], 0.5)
    assert e.tolist() == [0.5] * 3
    assert e._version == 1


def test_inference_model_of_an_ordinary_average(update, kind):
    with torch.inference_mode():
        p = torch.zeros(3)
    e = torch.ones(3)
    update(source(kind, {"w": e}), source(kind, {"w": p}), 0.5)
    assert e.tolist() == [0.5] * 3


@pytest.mark.hazard(23, "guarded")
def test_inference_average_outside_inference_mode_is_refused(update, kind):
    with torch.inference_mode():
        e = torch.ones(3)
    ema, model = source(kind, {"w": e}), source(kind, {"w": torch.zeros(3)})
    names = [f"ema{label(kind, 'w', 0)}", "inference tensor outside InferenceMode"]
    for call in (lambda: update(ema, model, 0.5), lambda: fused_ema.copy_(ema, model)):
        refused(RuntimeError, call, ema, model, names=names)


@pytest.mark.parametrize("way", ["update", "bound"])
def test_a_plan_made_inside_is_refused_outside(backend, kind, way):
    with torch.inference_mode():
        ema, model = source(kind, {"w": torch.ones(3)}), source(kind, {"w": torch.zeros(3)})
        step = fused_ema.bind(ema, model).update
        if way == "update":
            step = lambda decay: fused_ema.update(ema, model, decay)  # noqa: E731
        step(0.5)
    refused(RuntimeError, lambda: step(0.5), ema, model, names=[f"ema{label(kind, 'w', 0)}", "InferenceMode"])
    with torch.inference_mode():
        step(0.5)


def test_swap_with_an_inference_model_outside_is_refused(backend, kind):
    with torch.inference_mode():
        p = torch.zeros(3)
    ema, model = source(kind, {"w": torch.ones(3)}), source(kind, {"w": p})
    handle = fused_ema.bind(ema, model)
    with torch.inference_mode():
        handle.swap_()
    for call in (handle.swap_, lambda: fused_ema.swap_(ema, model)):
        refused(RuntimeError, call, ema, model, names=[f"model{label(kind, 'w', 0)}", "InferenceMode"])
    handle.update(0.5)
