"""HAZARDS 1 to 9: where the values lie. Tests are named after the rows."""

import itertools

import pytest
import torch
from conftest import bits, label, memory, net, refused, same_bits, source
from torch import nn

import fused_ema

LAYOUTS = {
    "contiguous": lambda: torch.empty(2, 3, 4, 5),
    "channels_last": lambda: torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.empty(5, 3, 4, 2).transpose(0, 3),
    "permuted": lambda: torch.empty(3, 5, 2, 4).permute(2, 0, 3, 1),
    "every_other": lambda: torch.empty(2, 6, 4, 10)[:, ::2, :, 1::2],
    "narrowed": lambda: torch.empty(3, 4, 5, 6)[1:, :3, 1:, :5],
}


def numbers(like, seed):
    """Small integers: exact in every type, and so are their means."""
    generator = torch.Generator().manual_seed(seed)
    like.copy_(torch.randint(-64, 64, like.shape, generator=generator))
    return like


# ---- 1: tied parameters


def test_01_tied_pair_runs_once(update, kind):
    e, p = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    update(source(kind, {"a": e, "b": e}), source(kind, {"a": p, "b": p}), 0.5)
    assert e.tolist() == [2.0, 0.0]
    assert e._version == 1


def test_01_tied_through_other_tensor_objects(update):
    e, p = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    update([e, e.detach(), e.view(2)], [p, p[:], p.detach()], 0.5)
    assert e.tolist() == [2.0, 0.0]


def test_01_tied_modules_average_each_weight_once(update):
    def tied():
        module = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        module["head"].weight = module["embed"].weight
        module["again"] = module["head"]
        return module

    ema, model = tied(), tied()
    numbers(ema["embed"].weight.data, 1), numbers(model["embed"].weight.data, 2)
    expected = (ema["embed"].weight + model["embed"].weight) / 2
    update(ema, model, 0.5)
    assert torch.equal(ema["embed"].weight, expected)


def test_01_untied_averages_of_a_tied_model(update, kind):
    p = torch.tensor([3.0, -2.0])
    ema = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 6.0])}
    update(source(kind, ema), source(kind, {"a": p, "b": p}), 0.5)
    assert ema["a"].tolist() == [2.0, 0.0]
    assert ema["b"].tolist() == [4.0, 2.0]


def test_01_averages_of_their_own_for_a_module_that_is_used_twice(update):
    layer = nn.Linear(3, 2)
    model, ema = nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(3, 2))
    update(ema, model, 0.0)
    for average in (ema[0], ema[2]):
        assert torch.equal(average.weight, layer.weight)
        assert torch.equal(average.bias, layer.bias)


@pytest.mark.parametrize("operation", ["update", "copy_", "swap_"])
def test_01_one_average_of_two_parameters_is_refused(backend, kind, operation):
    e = torch.ones(3)
    ema, model = source(kind, {"a": e, "b": e}), source(kind, {"a": torch.zeros(3), "b": torch.full((3,), 2.0)})
    decay = (0.5,) if operation == "update" else ()
    a, b = label(kind, "a", 0), label(kind, "b", 1)
    wanted = [f"model{a}", f"model{b}", f"ema{a}"]
    refused(ValueError, lambda: getattr(fused_ema, operation)(ema, model, *decay), ema, model, names=wanted)


def test_01_swap_of_a_tied_model_with_two_averages_is_refused(backend, kind):
    p = torch.zeros(3)
    ema, model = source(kind, {"a": torch.ones(3), "b": torch.ones(3)}), source(kind, {"a": p, "b": p})
    b = f"model{label(kind, 'b', 1)}"
    refused(ValueError, lambda: fused_ema.swap_(ema, model), ema, model, names=[b, "expected", "found"])


def test_01_swap_of_pairs_tied_on_both_sides_runs_once(backend, kind):
    e, p = torch.ones(3), torch.zeros(3)
    fused_ema.swap_(source(kind, {"a": e, "b": e}), source(kind, {"a": p, "b": p}))
    assert e.tolist() == [0.0] * 3
    assert p.tolist() == [1.0] * 3


# ---- 2: averages that overlap


def test_02_neighbours_in_one_storage(update, kind):
    flat = torch.arange(8.0)
    ema = {"a": flat[:3], "b": flat[3:7], "c": flat[7:]}
    update(source(kind, ema), source(kind, {name: torch.zeros_like(e) for name, e in ema.items()}), 0.5)
    assert flat.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


@pytest.mark.parametrize(
    "views",
    [
        lambda x: (x[:5], x[4:]),
        lambda x: (x[2:4], x),
        lambda x: (x[:4], x[:4].view(2, 2)),
        lambda x: (x[:4].view(2, 2), x[:4].view(2, 2).t()),
        lambda x: (x[:4], x[:4].view(torch.int32)),
        lambda x: (x[:8], x[:8].view(torch.complex64)),
        lambda x: (x[::2], x[6:]),
    ],
    ids=["partly", "inside", "reshaped", "transposed", "other dtype", "complex", "with gaps"],
)
def test_02_overlapping_averages_are_refused(update, kind, views):
    first, second = views(torch.arange(9.0)[:8])
    tensors = {"a": first, "ok": torch.ones(2), "b": second}
    ema = source(kind, tensors)
    model = source(kind, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    names = [f"ema{label(kind, 'a', 0)}", f"ema{label(kind, 'b', 2)}", "expected", "found"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


# ---- 3: the average is the model


def test_03_average_and_model_in_one_storage(update, kind):
    flat = torch.arange(8.0)
    update(source(kind, {"a": flat[:4]}), source(kind, {"a": flat[4:]}), 0.5)
    assert flat.tolist() == [2.0, 3.0, 4.0, 5.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("make", [net, lambda: dict(net().named_parameters()), lambda: [torch.ones(2)]])
def test_03_the_model_as_its_own_average_is_refused(update, make):
    model = make()
    refused(ValueError, lambda: update(model, model, 0.5), model, names=["ema[", "model[", "expected", "found"])


@pytest.mark.parametrize(
    "alias",
    [lambda p: p, lambda p: p.detach(), lambda p: p.view(torch.int32).view(torch.float32), lambda p: p.t()],
    ids=["itself", "detached", "viewed", "transposed"],
)
def test_03_views_of_the_model_are_refused(update, kind, alias):
    p, q = torch.randn(3, 3), torch.randn(3)
    ema, model = source(kind, {"q": q.clone(), "p": alias(p)}), source(kind, {"q": q, "p": p})
    names = [f"ema{label(kind, 'p', 1)}", f"model{label(kind, 'p', 1)}", "expected", "found"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


def test_03_overlap_with_another_tensor_of_the_model_is_refused(update, kind):
    flat = torch.arange(9.0)
    ema, model = {"a": torch.ones(4), "b": flat[3:7]}, {"a": flat[:4], "b": torch.ones(4)}
    names = [f"ema{label(kind, 'b', 1)}", f"model{label(kind, 'a', 0)}"]
    ema, model = source(kind, ema), source(kind, model)
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


def test_03_shared_buffers_are_refused_unless_ignored(update):
    ema, model = net(), net()
    ema[1]._buffers["running_var"] = model[1].running_var
    names = ["ema['1.running_var']", "model['1.running_var']"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)
    update(ema, model, 0.0, buffers="ignore")
    assert torch.equal(ema[0].weight, model[0].weight)


# ---- 4: strides


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_04_strides_are_never_reinterpreted(update, ours, theirs):
    e, p = LAYOUTS[ours](), LAYOUTS[theirs]()
    memory(e).fill_(77)
    numbers(e, 1), numbers(p, 2)
    expected, model_before = e * 0.75 + p * 0.25, bits(p)
    whole = memory(e).clone().view(torch.float32)
    whole.as_strided(e.shape, e.stride(), e.storage_offset()).copy_(expected)
    update([e], [p], 0.75)
    assert torch.equal(e, expected)
    assert torch.equal(memory(e), memory(whole)), "written between the elements"
    assert same_bits(model_before, p)


@pytest.mark.parametrize("operation", ["copy_", "swap_"])
@pytest.mark.parametrize(("ours", "theirs"), [("channels_last", "contiguous"), ("every_other", "transposed")])
def test_04_copy_and_swap_across_strides(backend, operation, ours, theirs):
    e, p = numbers(LAYOUTS[ours](), 1), numbers(LAYOUTS[theirs](), 2)
    old_e, old_p = e.clone(), p.clone()
    getattr(fused_ema, operation)([e], [p])
    assert torch.equal(e, old_p)
    assert torch.equal(p, old_e if operation == "swap_" else old_p)


def test_04_channels_last_model(update):
    ema, model = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert ema.weight.stride() != model.weight.stride()
    update(ema, model, 0.0)
    assert torch.equal(ema.weight, model.weight)
    assert ema.weight.is_contiguous()


def many_dimensions(count):
    """Two tensors of `count` dimensions of size 2, none of which merge."""
    e = numbers(torch.empty([2] * count), 1)
    return e, numbers(torch.empty([2] * count).permute(*range(count - 1, -1, -1)), 2)


def test_04_twelve_dimensions(update):
    e, p = many_dimensions(12)
    expected = (e + p) / 2
    update([e], [p], 0.5)
    assert torch.equal(e, expected)


def test_04_thirteen_dimensions_are_right_or_refused_by_name(update, backend):
    e, p = many_dimensions(13)
    ema, model = {"ok": torch.ones(2), "x": e}, {"ok": torch.zeros(2), "x": p}
    expected = (e + p) / 2
    if backend == "cpu":
        return refused(RuntimeError, lambda: update(ema, model, 0.5), ema, model, names=["ema['x']", "12"])
    update(ema, model, 0.5)
    assert torch.equal(e, expected)


# ---- 5: expanded tensors


@pytest.mark.parametrize(
    "p", [torch.tensor(4.0).expand(3, 2), torch.tensor([[4.0], [6.0], [8.0]]).expand(3, 2)], ids=["scalar", "rows"]
)
def test_05_expanded_model(update, kind, p):
    e = torch.ones(3, 2)
    update(source(kind, {"a": e}), source(kind, {"a": p}), 0.5)
    assert torch.equal(e, (p + 1) / 2)


@pytest.mark.parametrize(
    "e",
    [torch.ones(1).expand(3), torch.ones(3, 1).expand(3, 2), torch.ones(6).as_strided((3, 2), (1, 1))],
    ids=["scalar", "rows", "windows"],
)
@pytest.mark.parametrize("operation", [lambda e, m: fused_ema.update(e, m, 0.5), fused_ema.copy_, fused_ema.swap_])
def test_05_expanded_average_is_refused(backend, kind, operation, e):
    ema = source(kind, {"ok": torch.ones(2), "a": e})
    model = source(kind, {"ok": torch.zeros(2), "a": torch.zeros(e.shape)})
    names = [f"ema{label(kind, 'a', 1)}", "expected", "found", str(tuple(e.stride()))]
    refused(ValueError, lambda: operation(ema, model), ema, model, names=names)


def test_05_swap_with_an_expanded_model_is_refused(backend, kind):
    ema, model = source(kind, {"a": torch.ones(3)}), source(kind, {"a": torch.zeros(1).expand(3)})
    names = [f"model{label(kind, 'a', 0)}", "expected", "found"]
    refused(ValueError, lambda: fused_ema.swap_(ema, model), ema, model, names=names)


# ---- 6: shapes


def test_06_equal_shapes_of_every_rank(update, kind):
    for shape in [(), (1,), (1, 1), (6,), (2, 3), (1, 2, 1, 3)]:
        e = torch.full(shape, 2.0)
        update(source(kind, {"a": e}), source(kind, {"a": torch.zeros(shape)}), 0.5)
        assert torch.equal(e, torch.ones(shape))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((2, 3), (3, 2)), ((6,), (2, 3)), ((6,), (1, 6)), ((6,), (6, 1)), ((), (1,)), ((6,), ()), ((4, 3), (3,)),
     ((3,), (4,)), ((0, 3), (0, 4)), ((0,), ()), ((2,), (0,))],
)  # fmt: skip
def test_06_other_shapes_are_refused(update, kind, ours, theirs):
    ema = source(kind, {"ok": torch.ones(2), "a": torch.ones(ours)})
    model = source(kind, {"ok": torch.zeros(2), "a": torch.zeros(theirs)})
    names = [f"ema{label(kind, 'a', 1)}", f"expected shape {theirs}", f"found {ours}"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


# ---- 7: storage offsets


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float16),
     (torch.bfloat16, torch.bfloat16), (torch.complex64, torch.complex64), (torch.uint8, torch.uint8)],
)  # fmt: skip
def test_07_misaligned_offset(update, ours, theirs):
    e, p = numbers(torch.empty(100, dtype=ours), 1), numbers(torch.empty(100, dtype=theirs), 2)
    expected = p if ours is torch.uint8 else e * 0.75 + p.to(ours) * 0.25
    for at_e, at_p in itertools.product(range(16), range(16)):
        ema, model = torch.full((130,), 7, dtype=ours), torch.full((130,), 9, dtype=theirs)
        ema[at_e : at_e + 100] = e
        model[at_p : at_p + 100] = p
        around = ema.clone()
        around[at_e : at_e + 100] = expected
        update([ema[at_e : at_e + 100]], [model[at_p : at_p + 100]], 0.75)
        assert torch.equal(ema, around), (at_e, at_p)


def test_07_address_that_is_no_multiple_of_the_type_is_refused(update, kind):
    odd = torch.frombuffer(bytearray(range(64)), dtype=torch.float32, offset=1, count=4)
    good = torch.ones(4)
    ema, model = source(kind, {"ok": torch.ones(2), "a": odd}), source(kind, {"ok": torch.zeros(2), "a": good})
    names = [label(kind, "a", 1), "expected an address", "found 0x"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["ema", *names])
    refused(ValueError, lambda: update(model, ema, 0.5), ema, model, names=["model", *names])


# ---- 8: nothing to average


def test_08_empty_models(update):
    for ema, model in [([], []), ({}, {}), ((), []), (nn.Identity(), nn.ReLU()), (nn.Module(), nn.Module())]:
        update(ema, model, 0.5)
        about = fused_ema.bind(ema, model).describe()
        assert (about["tensors"], about["elements"], about["bytes_per_update"]) == (0, 0, 0)


def test_08_empty_tensors_among_others(update, kind):
    e = torch.full((3,), 2.0)
    ema = {"x": torch.empty(0), "a": e, "y": torch.empty(3, 0, 2), "z": torch.empty(0, dtype=torch.int64)}
    model = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    update(source(kind, ema), source(kind, model), 0.5)
    assert e.tolist() == [1.0] * 3
    assert fused_ema.bind(source(kind, ema), source(kind, model)).describe()["tensors"] == 1


def test_08_one_empty_tensor_on_both_sides_is_no_alias(update):
    nothing = torch.empty(0)
    update([nothing, nothing], [nothing, torch.empty(0)], 0.5)


def test_08_nothing_to_average_still_checks_its_arguments(update):
    refused(ValueError, lambda: update([], [], 1.5), names=["decay", "1.5"])
    refused(TypeError, lambda: update({}, {}, None), names=["decay", "NoneType"])
    refused(ValueError, lambda: update({}, {"w": torch.ones(1)}, 0.5), names=["'w'"])
    refused(TypeError, lambda: update([torch.empty(0)], [torch.empty(0, dtype=torch.int64)], 0.5), names=["ema[0]"])


# ---- 9: more than 2^31 elements apart


FAR = 2**31 + 5  # a storage of 4 GiB of which a few pages are ever touched


def test_09_offsets_beyond_32_bits(update):
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


def test_09_storage_too_small_for_such_offsets_is_refused(update, kind):
    e = torch.empty(FAR + 8, dtype=torch.bfloat16).as_strided((2, 4), (FAR, 1))
    e.untyped_storage().resize_(64)
    ema, model = source(kind, {"a": e}), source(kind, {"a": torch.zeros(2, 4, dtype=torch.bfloat16)})
    names = [f"ema{label(kind, 'a', 0)}", f"expected a storage of at least {2 * (FAR + 4)} bytes", "64"]
    refused(RuntimeError, lambda: update(ema, model, 0.5), ema, model, names=names)


def functional(shape):
    return torch._to_functional_tensor(torch.ones(shape))


@pytest.mark.parametrize("side", ["ema", "model"])
@pytest.mark.parametrize("make", [torch._efficientzerotensor, functional])
def test_13_tensors_without_memory_are_refused(backend, side, make):
    sides = {"ema": torch.ones(3), "model": torch.ones(3), side: make((3,))}
    for call in (lambda *both: fused_ema.update(*both, 0.5), fused_ema.copy_, fused_ema.swap_):
        with pytest.raises(RuntimeError, match=rf"{side}\[0\]: expected a tensor with memory of its own"):
            call([sides["ema"]], [sides["model"]])
