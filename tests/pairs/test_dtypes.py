"""Dtypes: wider averages are taken, narrower ones refused; integers are copied; complex numbers are pairs of reals."""

import pytest
import torch
from conftest import label, refused, source
from torch import nn

import fused_ema

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex128, torch.complex64]
NARROWER = [(e, p) for types in (REAL, COMPLEX) for e in types for p in types if e.itemsize < p.itemsize]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64]


@pytest.mark.hazard(10, "guarded")
def test_nothing_is_written_when_the_last_pair_is_bad(update, kind):
    ema = {f"w{i}": torch.ones(100) for i in range(50)} | {"last": torch.ones(3, dtype=torch.int64)}
    model = {name: torch.zeros(tensor.shape) for name, tensor in ema.items()}
    names = [f"ema{label(kind, 'last', 50)}", "int64", "float32"]
    ema, model = source(kind, ema), source(kind, model)
    refused(TypeError, lambda: update(ema, model, 0.5), ema, model, names=names)


@pytest.mark.parametrize(("ours", "theirs"), NARROWER)
def test_narrow_average_of_a_wide_model_is_refused(update, ours, theirs):
    ema = {"ok": torch.ones(2), "w": torch.ones(3, dtype=ours)}
    model = {"ok": torch.zeros(2), "w": torch.zeros(3, dtype=theirs)}
    found = [str(dtype).removeprefix("torch.") for dtype in (ours, theirs)]
    names = ["ema['w']", "expected", "found", *found]
    for decay in (0.0, 0.5, 1.0):
        refused(TypeError, lambda d=decay: update(ema, model, d), ema, model, names=names)


def test_swap_across_dtypes_is_refused(backend, kind):
    ema = source(kind, {"ok": torch.ones(2), "w": torch.ones(3)})
    model = source(kind, {"ok": torch.zeros(2), "w": torch.zeros(3, dtype=torch.bfloat16)})
    names = [f"ema{label(kind, 'w', 1)}", "expected bfloat16", "found float32"]
    refused(TypeError, lambda: fused_ema.swap_(ema, model), ema, model, names=names)
    handle = fused_ema.bind(ema, model)
    refused(TypeError, handle.swap_, ema, model, names=names)
    handle.update(0.5)  # an update across dtypes is allowed


# ---- Integers and bools


@pytest.mark.hazard(17, "good")
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_integers_are_copied_or_ignored(backend, dtype, buffers):
    ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
    ema.register_buffer("steps", torch.tensor([1, 0, 1, 1, 0] * 5).to(dtype))
    model.register_buffer("steps", torch.tensor([0, 0, 1, 0, 1] * 5).to(dtype), persistent=False)
    expected = (ema if buffers == "ignore" else model).steps.clone()
    fused_ema.update(ema, model, 0.9, buffers=buffers)
    assert torch.equal(ema.steps, expected)
    if dtype is torch.int64:  # more than a float can hold
        model.steps.fill_(2**53 + 1)
        fused_ema.update(ema, model, 0.9, buffers="copy")
        assert ema.steps[0].item() == 2**53 + 1


@pytest.mark.hazard(17, "guarded")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(torch.int32, torch.int64), (torch.float32, torch.int64), (torch.int64, torch.float32), (torch.bool, torch.uint8)],
)
def test_integers_of_another_type_are_refused(update, ours, theirs):
    ema = {"ok": torch.ones(2), "n": torch.ones(3, dtype=ours)}
    model = {"ok": torch.zeros(2), "n": torch.zeros(3, dtype=theirs)}
    found = [str(dtype).removeprefix("torch.") for dtype in (ours, theirs)]
    refused(TypeError, lambda: update(ema, model, 0.5), ema, model, names=["ema['n']", *found])


# ---- Complex numbers


@pytest.mark.hazard(22, "good")
def test_real_and_imaginary_parts_are_views_like_others(update):
    z, w = torch.tensor([1 + 8j, 4 - 2j]), torch.tensor([5 - 4j, 0 + 2j])
    update([z.imag], [w.real], 0.5)
    assert z.tolist() == [1 + 6.5j, 4 - 1j]
    update([z.real], [torch.zeros(2)], 0.0)
    assert z.tolist() == [6.5j, -1j]


@pytest.mark.hazard(22, "guarded")
@pytest.mark.parametrize(("ours", "theirs"), [(torch.float32, torch.complex64), (torch.complex64, torch.float32)])
def test_real_with_complex_is_refused(update, kind, ours, theirs):
    ema, model = source(kind, {"w": torch.ones(2, dtype=ours)}), source(kind, {"w": torch.ones(2, dtype=theirs)})
    names = [f"ema{label(kind, 'w', 0)}", "expected complex64" if theirs.is_complex else "expected float32"]
    refused(TypeError, lambda: update(ema, model, 0.5), ema, model, names=names)


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.conj().imag], ids=["conjugate", "negation"])
def test_lazy_views_are_refused_and_resolved_ones_taken(update, kind, view):
    lazy = view(torch.tensor([1 + 2j, 3 - 4j]))
    plain = torch.zeros_like(lazy).clone()
    ours, theirs = source(kind, {"w": plain}), source(kind, {"w": lazy})
    where = label(kind, "w", 0)
    refused(ValueError, lambda: update(ours, theirs, 0.5), plain, names=[f"model{where}", "expected", "found"])
    refused(ValueError, lambda: update(theirs, ours, 0.5), plain, names=[f"ema{where}", "expected", "found"])
    update(ours, source(kind, {"w": lazy.resolve_conj().resolve_neg()}), 0.0)
    assert torch.equal(plain, lazy)
