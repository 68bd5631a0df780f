"""Shapes, strides, addresses and storages: what is taken, and what is refused by name."""

import pytest
import torch
from conftest import label, refused, source
from torch import nn

import fused_ema

OPERATIONS = [lambda e, m: fused_ema.update(e, m, 0.5), fused_ema.copy_, fused_ema.swap_]


def numbers(like, seed):
    """Fills a tensor with small integers, which are exact in every dtype, as their means are."""
    generator = torch.Generator().manual_seed(seed)
    like.copy_(torch.randint(-64, 64, like.shape, generator=generator))
    return like


# ---- Strides


def test_thirteen_dimensions_are_right_or_refused_by_name(update, backend):
    e = numbers(torch.empty([2] * 13), 1)
    p = numbers(torch.empty([2] * 13).permute(*range(12, -1, -1)), 2)  # no two dimensions can be merged
    ema, model = {"ok": torch.ones(2), "x": e}, {"ok": torch.zeros(2), "x": p}
    expected = (e + p) / 2
    if backend != "torch":
        return refused(RuntimeError, lambda: update(ema, model, 0.5), ema, model, names=["ema['x']", "12"])
    update(ema, model, 0.5)
    assert torch.equal(e, expected)


@pytest.mark.hazard(5, "guarded")
@pytest.mark.parametrize(
    "e",
    [torch.ones(1).expand(3), torch.ones(3, 1).expand(3, 2), torch.ones(6).as_strided((3, 2), (1, 1))],
    ids=["scalar", "rows", "windows"],
)
def test_expanded_average_is_refused(backend, e):
    ema = {"ok": torch.ones(2), "a": e}
    model = {"ok": torch.zeros(2), "a": torch.zeros(e.shape)}
    names = ["ema['a']", "expected", "found", str(tuple(e.stride()))]
    for operation in OPERATIONS:
        refused(ValueError, lambda run=operation: run(ema, model), ema, model, names=names)


def test_swap_with_an_expanded_model_is_refused(backend, kind):
    ema, model = source(kind, {"a": torch.ones(3)}), source(kind, {"a": torch.zeros(1).expand(3)})
    names = [f"model{label(kind, 'a', 0)}", "expected", "found"]
    refused(ValueError, lambda: fused_ema.swap_(ema, model), ema, model, names=names)


# ---- Shapes


@pytest.mark.hazard(6, "guarded")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((2, 3), (3, 2)), ((6,), (2, 3)), ((6,), (1, 6)), ((6,), (6, 1)), ((), (1,)), ((6,), ()), ((4, 3), (3,)),
     ((3,), (4,)), ((0, 3), (0, 4)), ((0,), ()), ((2,), (0,))],
)  # fmt: skip
def test_other_shapes_are_refused(update, ours, theirs):
    ema = {"ok": torch.ones(2), "a": torch.ones(ours)}
    model = {"ok": torch.zeros(2), "a": torch.zeros(theirs)}
    names = ["ema['a']", f"expected shape {theirs}", f"found {ours}"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


@pytest.mark.hazard(8, "good")
def test_empty_models(update):
    for ema, model in [([], []), ({}, {}), ((), []), (nn.Identity(), nn.ReLU()), (nn.Module(), nn.Module())]:
        update(ema, model, 0.5)
        about = fused_ema.bind(ema, model).describe()
        assert (about["tensors"], about["elements"], about["bytes_per_update"]) == (0, 0, 0)


def test_empty_tensors_among_others(update, kind):
    e = torch.full((3,), 2.0)
    ema = {"x": torch.empty(0), "a": e, "y": torch.empty(3, 0, 2), "z": torch.empty(0, dtype=torch.int64)}
    model = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    update(source(kind, ema), source(kind, model), 0.5)
    assert e.tolist() == [1.0] * 3
    assert fused_ema.bind(source(kind, ema), source(kind, model)).describe()["tensors"] == 1


def test_one_empty_tensor_on_both_sides_is_no_alias(update):
    nothing = torch.empty(0)
    update([nothing, nothing], [nothing, torch.empty(0)], 0.5)


@pytest.mark.hazard(8, "guarded")
def test_nothing_to_average_still_checks_its_arguments(update):
    refused(ValueError, lambda: update([], [], 1.5), names=["decay", "1.5"])
    refused(TypeError, lambda: update({}, {}, None), names=["decay", "NoneType"])
    refused(ValueError, lambda: update({}, {"w": torch.ones(1)}, 0.5), names=["'w'"])
    refused(TypeError, lambda: update([torch.empty(0)], [torch.empty(0, dtype=torch.int64)], 0.5), names=["ema[0]"])


# ---- Addresses and storages


@pytest.mark.hazard(7, "guarded")
def test_address_that_is_no_multiple_of_the_type_is_refused(update, kind):
    odd = torch.frombuffer(bytearray(range(64)), dtype=torch.float32, offset=1, count=4)
    good = torch.ones(4)
    ema, model = source(kind, {"ok": torch.ones(2), "a": odd}), source(kind, {"ok": torch.zeros(2), "a": good})
    names = [label(kind, "a", 1), "expected an address", "found 0x"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["ema", *names])
    refused(ValueError, lambda: update(model, ema, 0.5), ema, model, names=["model", *names])


FAR = 2**31 + 5  # storages of this many elements are never filled: only a few pages are touched


@pytest.mark.hazard(9, "good")
def test_offsets_beyond_32_bits(update):
    storage = torch.empty(2 * FAR + 8, dtype=torch.bfloat16)
    e = storage.as_strided((3, 4), (FAR, 1))
    p = numbers(torch.empty(3, 4), 2).bfloat16()
    for offset in (0, 3):
        e = storage.as_strided((3, 4), (FAR, 1), offset)
        numbers(e, 1)
        expected = (e + p) / 2
        update([e], [p], 0.5)
        assert torch.equal(e, expected)
        update([p.clone()], [e], 0.5)
        tail = storage[2 * FAR + offset :][:4]
        update([tail], [p[0]], 0.0)
        assert torch.equal(e[2], p[0])


@pytest.mark.hazard(9, "guarded")
def test_storage_too_small_for_such_offsets_is_refused(update):
    e = torch.empty(FAR + 8, dtype=torch.bfloat16).as_strided((2, 4), (FAR, 1))
    e.untyped_storage().resize_(64)
    ema, model = {"a": e}, {"a": torch.zeros(2, 4, dtype=torch.bfloat16)}
    names = ["ema['a']", f"expected a storage of at least {2 * (FAR + 4)} bytes", "64"]
    refused(RuntimeError, lambda: update(ema, model, 0.5), ema, model, names=names)


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_freed_storage_in_lists_and_dicts(update, kind):
    e, p = torch.ones(4), torch.zeros(4)
    ema, model = source(kind, {"ok": torch.ones(2), "w": e}), source(kind, {"ok": torch.zeros(2), "w": p})
    update(ema, model, 0.5)
    p.untyped_storage().resize_(0)
    names = [f"model{label(kind, 'w', 1)}", "storage", "freed"]
    refused(RuntimeError, lambda: update(ema, model, 0.5), ema, model, names=names)


@pytest.mark.hazard(13, "good")
def test_empty_tensors_need_no_storage(update):
    e, p = torch.empty(3, 0), torch.empty(3, 0)
    p.untyped_storage().resize_(0)
    update([e], [p], 0.5)


def functional(shape):
    return torch._to_functional_tensor(torch.ones(shape))


@pytest.mark.parametrize("side", ["ema", "model"])
@pytest.mark.parametrize("make", [torch._efficientzerotensor, functional])
def test_tensors_without_memory_are_refused(backend, side, make):
    sides = {"ema": torch.ones(3), "model": torch.ones(3), side: make((3,))}
    for call in OPERATIONS:
        with pytest.raises(RuntimeError, match=rf"{side}\[0\]: expected a tensor with memory of its own"):
            call([sides["ema"]], [sides["model"]])
