"""HAZARDS 10, 11, 20 to 23: dtypes, devices and kinds of tensors that may be averaged, and those that may not."""

import functools
import itertools

import pytest
import torch
from conftest import bits, label, net, refused, same_bits, source
from torch import nn
from torch._subclasses import FakeTensorMode

import fused_ema

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex128, torch.complex64]


def size(dtype):
    return dtype.itemsize


# ---- 10: mixed dtypes


def test_10_every_pair_of_dtypes_in_one_call(update, kind):
    pairs = [(e, p) for types in (REAL, COMPLEX) for e in types for p in types if size(e) >= size(p)]
    ema = {f"w{i}": torch.full((7,), 6.0, dtype=e) for i, (e, _) in enumerate(pairs)}
    model = {f"w{i}": torch.full((7,), -2.0, dtype=p) for i, (_, p) in enumerate(pairs)}
    ema["n"], model["n"] = torch.full((7,), 6), torch.full((7,), -2)
    update(source(kind, ema), source(kind, model), 0.75)
    for i, (e, _) in enumerate(pairs):
        assert torch.equal(ema[f"w{i}"], torch.full((7,), 4.0, dtype=e)), pairs[i]
    assert ema["n"].tolist() == [-2] * 7


def test_10_nothing_is_written_when_the_last_pair_is_bad(update, kind):
    ema = {f"w{i}": torch.ones(100) for i in range(50)} | {"last": torch.ones(3, dtype=torch.int64)}
    model = {name: torch.zeros(tensor.shape) for name, tensor in ema.items()}
    names = [f"ema{label(kind, 'last', 50)}", "int64", "float32"]
    ema, model = source(kind, ema), source(kind, model)
    refused(TypeError, lambda: update(ema, model, 0.5), ema, model, names=names)


NARROWER = [(e, p) for types in (REAL, COMPLEX) for e in types for p in types if size(e) < size(p)]


@pytest.mark.parametrize(("ours", "theirs"), NARROWER)
def test_10_narrow_average_of_a_wide_model_is_refused(update, kind, ours, theirs):
    ema = source(kind, {"ok": torch.ones(2), "w": torch.ones(3, dtype=ours)})
    model = source(kind, {"ok": torch.zeros(2), "w": torch.zeros(3, dtype=theirs)})
    found = [str(dtype).removeprefix("torch.") for dtype in (ours, theirs)]
    names = [f"ema{label(kind, 'w', 1)}", "expected", "found", *found]
    for decay in (0.0, 0.5, 1.0):
        refused(TypeError, lambda d=decay: update(ema, model, d), ema, model, names=names)


@pytest.mark.parametrize(
    ("ours", "theirs"), [*NARROWER, *((p, e) for e, p in NARROWER), (torch.float16, torch.bfloat16)]
)
def test_10_copy_casts_as_torch_does(backend, kind, ours, theirs):
    p = torch.randn(1000, dtype=torch.complex128 if theirs.is_complex else torch.float64)
    p = (p * torch.logspace(-12, 12, 1000, dtype=torch.float64)).to(theirs)
    e = torch.zeros(1000, dtype=ours)
    fused_ema.copy_(source(kind, {"w": e}), source(kind, {"w": p}))
    assert same_bits(bits(p.to(ours)), e)


def test_10_swap_across_dtypes_is_refused(backend, kind):
    ema = source(kind, {"ok": torch.ones(2), "w": torch.ones(3)})
    model = source(kind, {"ok": torch.zeros(2), "w": torch.zeros(3, dtype=torch.bfloat16)})
    names = [f"ema{label(kind, 'w', 1)}", "expected bfloat16", "found float32"]
    refused(TypeError, lambda: fused_ema.swap_(ema, model), ema, model, names=names)
    handle = fused_ema.bind(ema, model)
    refused(TypeError, handle.swap_, ema, model, names=names)
    handle.update(0.5)  # what is allowed still is


# ---- 11: devices (what a machine without a GPU can show)


def test_11_one_launch_for_the_device(backend):
    handle = fused_ema.bind(net(), net())
    assert handle.describe()["devices"] == ["cpu"]
    assert fused_ema.backend("cpu") == backend


def test_11_decay_on_another_device_is_refused(update, kind):
    ema, model = source(kind, {"w": torch.ones(3)}), source(kind, {"w": torch.zeros(3)})
    elsewhere = torch.tensor(0.5, device="meta")
    refused(ValueError, lambda: update(ema, model, elsewhere), ema, model, names=["decay", "cpu", "meta"])


# ---- 20, 21: tensors without plain memory


class Tagged(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    """Holds no data of its own: its data_ptr() is null."""

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


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", KINDS)
def test_20_21_tensors_of_other_kinds_are_refused(backend, kind, name):
    error, make, found = KINDS[name]
    for side, position in itertools.product(["ema", "model", "both"], [0, 1]):
        ema, model = [torch.ones(3)], [torch.zeros(3)]
        ema.insert(position, make() if side != "model" else torch.ones(2, 2))
        model.insert(position, make() if side != "ema" else torch.ones(2, 2))
        ema = source(kind, dict(zip("vw", ema, strict=True)))
        model = source(kind, dict(zip("vw", model, strict=True)))
        where = f"{'model' if side == 'model' else 'ema'}{label(kind, 'vw'[position], position)}"
        for operation in OPERATIONS:
            call = functools.partial(operation, ema, model)
            refused(error, call, ema, model, names=[where, "expected", "found", found])


def test_20_plain_kinds_are_taken(update, kind):
    tensors = {"a": torch.ones(2), "b": nn.Parameter(torch.ones(2)), "c": nn.Buffer(torch.ones(2))}
    tensors["d"] = nn.Parameter(torch.ones(2), requires_grad=False)
    model = source(kind, {name: torch.zeros(2) for name in tensors})
    update(source(kind, tensors), model, 0.5)
    assert all(tensor.tolist() == [0.5, 0.5] for tensor in tensors.values())


def test_20_a_lazy_module_is_taken_once_it_is_initialised(update):
    ema, model = nn.LazyLinear(3), nn.LazyLinear(3)
    refused(RuntimeError, lambda: update(ema, model, 0.5), names=["ema['weight']", "expected"])
    ema(torch.ones(1, 2)), model(torch.ones(1, 2))
    update(ema, model, 0.0)
    assert torch.equal(ema.weight, model.weight)


@pytest.mark.parametrize("position", [0, 1])
def test_20_a_subclass_on_memory_seen_before_is_refused(backend, position):
    ema, model = [torch.ones(2), torch.ones(2)], [torch.zeros(2), torch.zeros(2)]
    fused_ema.update(ema, model, 0.5)
    ema[position] = ema[position].as_subclass(Tagged)
    names = [f"ema[{position}]", "Tagged"]
    refused(TypeError, lambda: fused_ema.update(ema, model, 0.5), ema, model, names=names)


# ---- 22: complex parameters


@pytest.mark.parametrize(("ours", "theirs"), [(e, p) for e in COMPLEX for p in COMPLEX if size(e) >= size(p)])
def test_22_complex_parameters_are_pairs_of_reals(update, kind, ours, theirs):
    e, p = torch.tensor([1 + 8j, 4 - 2j] * 9, dtype=ours), torch.tensor([5 - 4j, 0 + 2j] * 9, dtype=theirs)
    update(source(kind, {"w": e}), source(kind, {"w": p}), 0.75)
    assert e.tolist() == [2 + 5j, 3 - 1j] * 9


def test_22_real_and_imaginary_parts_are_views_like_others(update):
    z, w = torch.tensor([1 + 8j, 4 - 2j]), torch.tensor([5 - 4j, 0 + 2j])
    update([z.imag], [w.real], 0.5)
    assert z.tolist() == [1 + 6.5j, 4 - 1j]
    update([z.real], [torch.zeros(2)], 0.0)
    assert z.tolist() == [6.5j, -1j]


def test_22_complex_of_other_strides(update):
    e, p = torch.zeros(3, 4, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64).t()
    update([e], [p], 0.0)
    assert torch.equal(e, p)
    before = p.clone()
    fused_ema.swap_([e], [p.contiguous()])
    assert torch.equal(e, before)


@pytest.mark.parametrize(("ours", "theirs"), [(torch.float32, torch.complex64), (torch.complex64, torch.float32)])
def test_22_real_with_complex_is_refused(update, kind, ours, theirs):
    ema, model = source(kind, {"w": torch.ones(2, dtype=ours)}), source(kind, {"w": torch.ones(2, dtype=theirs)})
    names = [f"ema{label(kind, 'w', 0)}", "expected complex64" if theirs.is_complex else "expected float32"]
    refused(TypeError, lambda: update(ema, model, 0.5), ema, model, names=names)


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.conj().imag], ids=["conjugate", "negation"])
def test_22_lazy_views_are_refused_and_resolved_ones_taken(update, kind, view):
    lazy = view(torch.tensor([1 + 2j, 3 - 4j]))
    plain = torch.zeros_like(lazy).clone()
    ours, theirs = source(kind, {"w": plain}), source(kind, {"w": lazy})
    where = label(kind, "w", 0)
    refused(ValueError, lambda: update(ours, theirs, 0.5), plain, names=[f"model{where}", "expected", "found"])
    refused(ValueError, lambda: update(theirs, ours, 0.5), plain, names=[f"ema{where}", "expected", "found"])
    update(ours, source(kind, {"w": lazy.resolve_conj().resolve_neg()}), 0.0)
    assert torch.equal(plain, lazy)


# ---- 23: inference tensors


def test_23_inside_inference_mode(update, kind):
    with torch.inference_mode():
        e, p = torch.ones(3), torch.zeros(3)
        update(source(kind, {"w": e}), source(kind, {"w": p}), 0.5)
        assert e.tolist() == [0.5] * 3


def test_23_ordinary_tensors_inside_inference_mode(update, kind):
    e, p = torch.ones(3), torch.zeros(3)
    with torch.inference_mode():
        update(source(kind, {"w": e}), source(kind, {"w": p}), 0.5)
    assert e.tolist() == [0.5] * 3
    assert e._version == 1


def test_23_inference_model_of_an_ordinary_average(update, kind):
    with torch.inference_mode():
        p = torch.zeros(3)
    e = torch.ones(3)
    update(source(kind, {"w": e}), source(kind, {"w": p}), 0.5)
    assert e.tolist() == [0.5] * 3


def test_23_inference_average_outside_inference_mode_is_refused(update, kind):
    with torch.inference_mode():
        e = torch.ones(3)
    ema, model = source(kind, {"w": e}), source(kind, {"w": torch.zeros(3)})
    names = [f"ema{label(kind, 'w', 0)}", "inference tensor outside InferenceMode"]
    for call in (lambda: update(ema, model, 0.5), lambda: fused_ema.copy_(ema, model)):
        refused(RuntimeError, call, ema, model, names=names)


@pytest.mark.parametrize("way", ["update", "bound"])
def test_23_a_plan_made_inside_is_refused_outside(backend, kind, way):
    with torch.inference_mode():
        ema, model = source(kind, {"w": torch.ones(3)}), source(kind, {"w": torch.zeros(3)})
        step = fused_ema.bind(ema, model).update
        if way == "update":
            step = lambda decay: fused_ema.update(ema, model, decay)  # noqa: E731
        step(0.5)
    refused(RuntimeError, lambda: step(0.5), ema, model, names=[f"ema{label(kind, 'w', 0)}", "InferenceMode"])
    with torch.inference_mode():
        step(0.5)


def test_23_swap_with_an_inference_model_outside_is_refused(backend, kind):
    with torch.inference_mode():
        p = torch.zeros(3)
    ema, model = source(kind, {"w": torch.ones(3)}), source(kind, {"w": p})
    handle = fused_ema.bind(ema, model)
    with torch.inference_mode():
        handle.swap_()
    for call in (handle.swap_, lambda: fused_ema.swap_(ema, model)):
        refused(RuntimeError, call, ema, model, names=[f"model{label(kind, 'w', 0)}", "InferenceMode"])
    handle.update(0.5)
