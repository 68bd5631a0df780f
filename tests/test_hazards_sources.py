"""HAZARDS 12, 13, 15 to 17: what modules, dicts and lists hold, and what changes in them between two updates."""

import contextlib
import copy
import gc
import pickle
from collections import UserDict, UserList, deque
from types import MappingProxyType

import pytest
import torch
from conftest import bits, label, net, refused, same_bits, source, tensors_of
from torch import nn

import fused_ema
from fused_ema import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

# ---- 12: tensors that were moved, replaced, added, removed or tied since


def retensor(value):
    return nn.Parameter(torch.full((4, 3), value))


def move_registry(module):
    """To the end of the module's __dict__; and a change after that, which is to be seen there."""
    module[0].__dict__["_parameters"] = module[0].__dict__.pop("_parameters")
    module[0].weight = retensor(5.0)


def replace_registry(module):
    # The dict that replaces it has the same keys, and other values.
    module[0].__dict__["_parameters"] = {name: nn.Parameter(p + 1) for name, p in module[0]._parameters.items()}


def swap_in(module):
    torch.utils.swap_tensors(module[0].weight, retensor(5.0))


def to_double_by_swapping(module):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


ONE_SIDE = {
    "data": lambda m: setattr(m[0].weight, "data", torch.full((4, 3), 5.0)),
    "data of a buffer": lambda m: setattr(m[1].running_mean, "data", torch.full((4,), 5.0)),
    "other strides": lambda m: setattr(m[0].weight, "data", torch.arange(12.0).view(3, 4).t()),
    "other strides at the same address": lambda m: setattr(
        m[0].weight, "data", m[0].weight.data.as_strided((4, 3), (1, 4))
    ),
    "bfloat16 at the same address": lambda m: setattr(
        m[0].weight, "data", m[0].weight.data.zero_().view(torch.bfloat16).as_strided((4, 3), (3, 1))
    ),
    "set_": lambda m: m[0].weight.detach().set_(torch.arange(12.0).view(4, 3)),
    "resized storage": lambda m: m[0].weight.untyped_storage().resize_(4096),
    "double": lambda m: m.double(),
    "bfloat16 buffer": lambda m: m[1].register_buffer("running_mean", torch.ones(4, dtype=torch.bfloat16)),
    "assign": lambda m: m.load_state_dict(net().state_dict(), assign=True),
    "parameter": lambda m: setattr(m[0], "weight", retensor(5.0)),
    "frozen": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 3), requires_grad=False)),
    "submodule": lambda m: m.__setitem__(2, nn.Linear(4, 2)),
    "registry": replace_registry,
    "registry elsewhere": move_registry,
    # As another module at the address of one that died.
    "another __dict__": lambda m: object.__setattr__(m[0], "__dict__", vars(net()[0])),
    "swap_tensors": swap_in,
    "tied": lambda m: setattr(m[0], "bias", m[1].weight),
    "shared memory": lambda m: m.share_memory(),
}
BOTH_SIDES = {
    "double": lambda m: m.double(),
    "double by swapping": to_double_by_swapping,
    "added parameter": lambda m: m.register_parameter("extra", nn.Parameter(torch.randn(5))),
    "added buffer": lambda m: m[0].register_buffer("extra", torch.randn(5)),
    "added module": lambda m: m.append(nn.Linear(2, 2)),
    "removed parameter": lambda m: m[0].register_parameter("bias", None),
    "removed module": lambda m: m.pop(1),
    "tied": lambda m: setattr(m[0], "bias", m[1].weight),
    "another order": lambda m: m[0]._parameters.update(weight=m[0]._parameters.pop("weight")),
}


def follows(ema, model, step):
    """An update with decay 0 reaches every tensor of the model as it is now."""
    for tensor in tensors_of(model):
        tensor.data.add_(1)
    step(0.0)
    theirs = model.state_dict()
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


@pytest.mark.parametrize("change", [name for name in ONE_SIDE if name != "double"])
def test_12_changed_model(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    ONE_SIDE[change](model)
    follows(ema, model, step)


@pytest.mark.parametrize("change", [name for name in ONE_SIDE if name != "tied" and "bfloat16" not in name])
def test_12_changed_average(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    ONE_SIDE[change](ema)
    follows(ema, model, step)


def test_12_fewer_elements_at_the_same_address(stepper):
    ema, model = net(), net()
    step = stepper(ema, model)
    whole = ema[2].weight.data
    for module in (ema, model):
        module[2].weight.data = module[2].weight.data[:1]
    before = whole[1:].clone()
    follows(ema, model, step)
    assert torch.equal(whole[1:], before), "written to what is no longer the average's"


def test_12_a_conjugate_at_the_same_address_is_refused(backend):
    ema, model = torch.ones(3, dtype=torch.complex64), torch.full((3,), 1 + 2j)
    fused_ema.update([ema], [model], 0.5)
    refused(ValueError, lambda: fused_ema.update([ema], [model.conj()], 0.5), [ema, model], names=["model[0]", "lazy"])


def test_12_what_is_no_module_among_the_children(stepper):
    ema, model = net(), net()
    step = stepper(ema, model)
    model._modules["1"] = object()
    with pytest.raises((ValueError, TypeError, AttributeError)):
        step(0.5)
    model._modules["1"] = net()[1]
    follows(ema, model, step)


@pytest.mark.parametrize("side", ["ema", "model"])
@pytest.mark.parametrize("at", [0, 999, 1000, 1999])
def test_12_one_changed_among_many(backend, side, at):
    # Enough tensors for several threads to compare them.
    modules = {name: nn.ParameterList(torch.full((8,), i + 0.5) for i in range(2000)) for name in ("ema", "model")}
    binding = fused_ema.bind(modules["ema"], modules["model"])
    binding.update(0.5)
    before = bits(modules["ema"])
    modules[side][at].data = torch.full((8,), 3.0)
    binding.update(0.5)
    other = at + 0.5
    expected = torch.full((8,), 0.5 * 3.0 + 0.5 * other)
    assert torch.equal(modules["ema"][at], expected)
    assert [
        i for i, (old, new) in enumerate(zip(before, bits(modules["ema"]), strict=True)) if not torch.equal(old, new)
    ] == [at]


@pytest.mark.parametrize("change", BOTH_SIDES)
def test_12_changed_on_both_sides(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    BOTH_SIDES[change](ema), BOTH_SIDES[change](model)
    follows(ema, model, step)


CHANGES_REFUSED = {
    "wider": (TypeError, lambda m: m.double(), ["ema['0.weight']", "float64", "float32"]),
    "shape": (
        ValueError,
        lambda m: setattr(m[2].bias, "data", torch.ones(1)),  # would broadcast
        ["ema['2.bias']", "expected shape (1,)", "found (2,)"],
    ),
    "more": (ValueError, lambda m: m.register_parameter("extra", retensor(1.0)), ["missing from ema: 'extra'"]),
    "less": (ValueError, lambda m: m[2].register_parameter("bias", None), ["unexpected in ema: '2.bias'"]),
    "sparse": (
        TypeError,
        lambda m: m[2]._parameters.update(bias=torch.ones(2).to_sparse()),
        ["model['2.bias']", "sparse"],
    ),
    "meta": (ValueError, lambda m: m.to("meta"), ["model['0.weight']", "meta"]),
}


@pytest.mark.parametrize("change", CHANGES_REFUSED)
def test_12_change_that_no_longer_fits_is_refused_until_mended(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    mended = copy.deepcopy(model)
    error, apply, names = CHANGES_REFUSED[change]
    apply(model)
    for _ in range(2):
        refused(error, lambda: step(0.5), ema, model, names=names)
    for old, new in zip(model.modules(), mended.modules(), strict=True):
        old.__dict__["_parameters"], old.__dict__["_buffers"] = new._parameters, new._buffers
    follows(ema, model, step)


def test_12_refused_at_first_then_mended(backend):
    # The refusal belongs to the tensors, not to the handle that met them.
    ema, model = net(), net().double()
    handle = fused_ema.bind(ema, model)
    refused(TypeError, lambda: handle.update(0.5), ema, model, names=["ema['0.weight']", "float64", "float32"])
    refused(TypeError, handle.swap_, ema, model, names=["ema['0.weight']", "float64", "float32"])
    ema.double()
    follows(ema, model, handle.update)
    before = bits(ema)
    handle.swap_()
    assert same_bits(before, model)


@pytest.mark.parametrize("container", ["dict", "list"])
@pytest.mark.parametrize("used", [False, True])
def test_12_bound_containers_are_read_again(backend, container, used):
    ema = source(container, {"a": torch.ones(2), "b": torch.ones(2)})
    model = source(container, {"a": torch.zeros(2), "b": torch.zeros(2)})
    a, b = ("a", "b") if container == "dict" else (0, 1)
    handle = fused_ema.bind(ema, model)
    if used:
        handle.update(0.5)
    model[b] = torch.full((2,), 9.0)
    ema[a] = torch.full((2,), 7.0, dtype=torch.float64)
    handle.update(0.5)
    assert ema[a].tolist() == [3.5] * 2
    assert ema[b].tolist() == [(9 + (0.5 if used else 1)) / 2] * 2
    if container == "dict":
        ema["c"], model["c"] = torch.ones(1), torch.zeros(1)
        ema["a"] = ema.pop("a")  # to the end
    else:
        ema.append(torch.ones(1)), model.append(torch.zeros(1))
    handle.update(0.0)
    assert all(not tensor.any() for tensor in (ema[a], tensors_of(ema)[-1 if container == "list" else 1]))
    model[a] = torch.ones(3)
    where = label(container, "a", 0)
    refused(ValueError, lambda: handle.update(0.5), ema, model, names=[f"ema{where}", "(3,)", "(2,)"])


@pytest.mark.parametrize(
    "view", [MappingProxyType, UserDict, lambda d: UserList(d.values()), lambda d: deque(d.values())]
)
def test_12_bound_views_are_read_again(backend, view):
    ema, model = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)}
    ours, theirs = view(ema), view(model)
    handle = fused_ema.bind(ours, theirs)
    replaced = torch.full((2,), 9.0)
    if isinstance(theirs, MappingProxyType):
        model["b"] = replaced
    else:
        theirs["b" if isinstance(theirs, UserDict) else 1] = replaced
    for step in (handle.update, lambda decay: fused_ema.update(ours, theirs, decay)):
        step(0.0)
        assert ema["a"].tolist() == [0.0] * 2
        assert ema["b"].tolist() == [9.0] * 2


# ---- 13: freed storage


@pytest.mark.parametrize("side", ["ema", "model"])
def test_13_freed_storage_is_refused_until_it_is_back(stepper, side):
    ema, model = net(), net()
    step = stepper(ema, model)
    freed = {"ema": ema, "model": model}[side][2].weight
    values, storage = freed.detach().clone(), freed.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    names = [f"{side}['2.weight']", "storage", "freed", str(size)]
    refused(RuntimeError, lambda: step(0.5), ema, model, names=names)
    storage.resize_(size)
    freed.data.copy_(values)
    follows(ema, model, step)


def test_13_freed_storage_in_lists_and_dicts(update, kind):
    e, p = torch.ones(4), torch.zeros(4)
    ema, model = source(kind, {"ok": torch.ones(2), "w": e}), source(kind, {"ok": torch.zeros(2), "w": p})
    update(ema, model, 0.5)
    p.untyped_storage().resize_(0)
    names = [f"model{label(kind, 'w', 1)}", "storage", "freed"]
    refused(RuntimeError, lambda: update(ema, model, 0.5), ema, model, names=names)


def test_13_empty_tensors_need_no_storage(update):
    e, p = torch.empty(3, 0), torch.empty(3, 0)
    p.untyped_storage().resize_(0)
    update([e], [p], 0.5)


# ---- 15: names


def test_15_names_pair_in_any_order(update):
    names = [f"w{i}" for i in range(20)]
    for kind in ("dict", "module"):
        ema = source(kind, {name: torch.zeros(2) for name in names})
        model = source(kind, {name: torch.full((2,), float(name[1:])) for name in reversed(names)})
        update(ema, model, 0.0)
        assert [tensor[0].item() for tensor in tensors_of(ema)] == list(range(20))


@pytest.mark.parametrize("kind", ["dict", "module"])
def test_15_names_of_one_side_are_refused(update, kind):
    common = {"both": torch.ones(2)}
    ema = source(kind, common | {f"ours{i}": torch.ones(1) for i in range(7)})
    model = source(kind, {"both": torch.zeros(2)} | {f"theirs{i}": torch.ones(1) for i in range(6)})
    names = ["expected", *(f"'ours{i}'" for i in range(5)), *(f"'theirs{i}'" for i in range(5)), "1 more"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=[*names, "2 more"])
    with pytest.raises(ValueError, match="missing from ema") as caught:
        update(ema, model, 0.5)
    assert "'ours5'" not in str(caught.value)
    assert "'theirs5'" not in str(caught.value)


def test_15_forgotten_bias_is_refused(update):
    ema, model = net(bias=False), net()
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["missing from ema: '0.bias'"])
    refused(ValueError, lambda: update(model, ema, 0.5), ema, model, names=["unexpected in ema: '0.bias'"])


def test_15_lists_of_other_lengths_are_refused(update):
    ema, model = [torch.ones(1)] * 3, [torch.zeros(1)] * 2
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["expected 2", "found 3"])


def test_15_keys_that_are_no_strings(update):
    ema = {1: torch.ones(2), 2: torch.ones(2)}
    update(ema, {2: torch.zeros(2), 1: torch.full((2,), 3.0)}, 0.5)
    assert ema[1].tolist() == [2.0] * 2
    model = {1: torch.zeros(2), 3: torch.zeros(2)}
    refused(
        ValueError,
        lambda: update(ema, model, 0.5),
        ema,
        model,
        names=["expected", "missing from ema: 3", "unexpected in ema: 2"],
    )


@pytest.mark.parametrize(
    ("ema", "model"),
    [
        (net(), dict(net().named_parameters())),
        ([torch.ones(1)], {"w": torch.ones(1)}),
        (torch.ones(1), torch.ones(1)),
        ((t for t in [torch.ones(1)]), (t for t in [torch.ones(1)])),
        (None, net()),
        ("ab", "ab"),
        ([torch.ones(1), None], [torch.ones(1), torch.ones(1)]),
        ([torch.ones(1), 1.0], [torch.ones(1), 2.0]),
    ],
    ids=["module and dict", "list and dict", "tensors", "iterators", "None", "strings", "None inside", "floats"],
)
def test_15_other_kinds_of_sources_are_refused(update, ema, model):
    refused(TypeError, lambda: update(ema, model, 0.5), names=["expected", "found"])


# ---- 16: prefixes of wrappers


def wrap(name, module):
    outer = nn.Module()
    outer.add_module(name, module)
    return outer


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda m: torch.compile(m),
    "compiled in DataParallel": lambda m: nn.DataParallel(torch.compile(m)),
    "checkpoint": lambda m: nn.Sequential(*(wrap("_checkpoint_wrapped_module", child) for child in m)),
    "FSDP": lambda m: wrap("_fsdp_wrapped_module", m),
    "all": lambda m: wrap("_fsdp_wrapped_module", nn.DataParallel(torch.compile(WRAPPED["checkpoint"](m)))),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("sides", ["model", "ema", "one each"])
def test_16_wrappers(update, wrapped, sides):
    ema, model = net(), net()
    ours = ema if sides == "model" else WRAPPED[wrapped](ema)
    theirs = model if sides == "ema" else nn.DataParallel(model) if sides == "one each" else WRAPPED[wrapped](model)
    update(ours, theirs, 0.0)
    assert same_bits(bits(model), ema)


def test_16_state_dicts_with_prefixes(update):
    ema, model = net(), net()
    update(nn.DataParallel(ema).state_dict(), model.state_dict(), 0.0)
    assert same_bits(bits(model), ema)


def test_16_a_child_that_is_called_module(update):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2))
            self.module = nn.Linear(2, 2, bias=False)
            self.module.module = nn.Linear(3, 3, bias=False)

    ema, model = Net(), Net()
    update(ema, model, 0.0)  # all names equal, though one once `module.` is dropped
    assert same_bits(bits(model), ema)
    model = nn.DataParallel(Net())
    names = ["'weight'", "'module.weight'", "expected"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


def test_16_differences_behind_a_prefix_are_still_refused(update):
    ema, model = net(), nn.DataParallel(net(bias=False))
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["unexpected in ema: '0.bias'"])


# ---- 17: integer and bool buffers

INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_17_integers_are_copied_or_ignored(update, dtype, buffers):
    ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
    ema.register_buffer("steps", torch.tensor([1, 0, 1, 1, 0] * 5).to(dtype))
    model.register_buffer("steps", torch.tensor([0, 0, 1, 0, 1] * 5).to(dtype), persistent=False)
    expected = (ema if buffers == "ignore" else model).steps.clone()
    update(ema, model, 0.9, buffers=buffers)
    assert torch.equal(ema.steps, expected)
    if dtype is torch.int64:  # beyond what a float holds
        model.steps.fill_(2**53 + 1)
        update(ema, model, 0.9, buffers="copy")
        assert ema.steps[0].item() == 2**53 + 1


def test_17_float_buffers_by_choice(update):
    for buffers, expected in [("copy", 4.0), ("average", 3.0), ("ignore", 2.0)]:
        ema, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        ema.running_mean.fill_(2), model.running_mean.fill_(4)
        update(ema, model, 0.5, buffers=buffers)
        assert ema.running_mean.tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(torch.int32, torch.int64), (torch.float32, torch.int64), (torch.int64, torch.float32), (torch.bool, torch.uint8)],
)
def test_17_integers_of_another_type_are_refused(update, kind, ours, theirs):
    ema = source(kind, {"ok": torch.ones(2), "n": torch.ones(3, dtype=ours)})
    model = source(kind, {"ok": torch.zeros(2), "n": torch.zeros(3, dtype=theirs)})
    found = [str(dtype).removeprefix("torch.") for dtype in (ours, theirs)]
    refused(TypeError, lambda: update(ema, model, 0.5), ema, model, names=[f"ema{label(kind, 'n', 1)}", *found])


def test_17_unknown_choice_for_buffers_is_refused(update):
    ema, model = net(), net()
    for choice in ("avg", None, True):
        refused(ValueError, lambda c=choice: update(ema, model, 0.5, buffers=c), ema, model, names=["buffers", "copy"])


# ---- TorchScript: its modules keep their tensors elsewhere


@pytest.mark.parametrize("sides", ["ema", "model", "both"])
def test_script_modules(update, sides):
    ema, model = net(), net()
    ours = torch.jit.script(ema) if sides != "model" else ema
    theirs = torch.jit.script(model) if sides != "ema" else model
    for _ in range(2):
        with torch.no_grad():
            next(theirs.parameters()).add_(1)
        update(ours, theirs, 0.0)
        assert same_bits(bits(theirs), ours)


class Leaving(nn.Sequential):
    """Names less than it holds."""

    def modules(self):
        yield from self[0].modules()


class Hiding(nn.Module):
    """Names more than it holds."""

    def __init__(self, inner):
        super().__init__()
        self.__dict__["hidden"] = [inner]

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self
        yield from self.hidden[0].named_modules(memo, prefix + "hidden", remove_duplicate)

    def __getitem__(self, _):
        return self.hidden[0]

    def __setitem__(self, _, inner):
        self.hidden[0] = inner


class WithoutADict(nn.Sequential):
    def __init__(self, inner):
        super().__init__(inner)
        self.__dict__["_parameters"] = UserDict()


@pytest.mark.parametrize("kind", [Leaving, Hiding, WithoutADict])
def test_12_modules_that_hold_their_tensors_in_other_ways(stepper, kind):
    ema, model = kind(net()), kind(net())
    step = stepper(ema, model)
    follows(ema, model, step)
    kept = [model[0], net(), net()]  # what is replaced lives on
    for other in kept[1:]:
        model[0] = other
        follows(ema, model, step)
        assert same_bits(bits(other), ema[0])


def test_12_unpickled_modules(stepper):
    """Whose names are other strings than those of modules that were made here."""
    ema, model = (pickle.loads(pickle.dumps(net())) for _ in range(2))
    step = stepper(ema, model)
    replace_registry(model)
    follows(ema, model, step)
    move_registry(model)
    follows(ema, model, step)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_12_nothing_runs_while_modules_are_compared(backend):
    """Python 3.11 may collect garbage where a new module is asked for its __dict__, and whatever that runs may end the
    module that is looked at next."""
    ema, model = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())
    binding = fused_ema.bind(ema, model)
    old = id(model[0])
    model._modules["0"] = None
    others = []  # keep their addresses, so that what is left is the old one's
    while len(others) < 10_000 and (not others or id(others[-1]) != old):
        others.append(nn.Identity.__new__(nn.Identity))
    if id(others[-1]) != old:
        pytest.skip("no other module got that address")
    model._modules["0"] = others[-1]
    nn.Identity.__init__(others[-1])
    collections = []
    threshold = gc.get_threshold()
    gc.callbacks.append(lambda phase, _: collections.append(phase))
    try:
        current = binding._plan._prepared.current
        gc.disable()
        due = [{} for _ in range(500)]
        gc.set_threshold(1)
        gc.enable()
        fits = current()
        seen = len(collections)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()
    assert len(due) == 500
    assert fits
    assert not seen
    assert gc.isenabled()


def test_12_another_kind_of_tensor_at_the_same_address_is_refused(stepper):
    class Other(torch.Tensor):
        pass

    memory = torch.ones(8)
    ema, model = [torch.zeros(8)], [memory.detach()]
    step = stepper(ema, model)
    for _ in range(20):
        model[0] = None
        model[0] = memory.detach()
        step(0.5)
        model[0] = None
        model[0] = memory.as_subclass(Other)
        with pytest.raises(TypeError, match="plain tensor"):
            step(0.5)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_12_what_is_removed_while_it_is_looked_at(stepper, left):
    """By Python code that runs there, as it may anywhere."""

    class Removing(nn.Linear):
        left = 0

        def __getattribute__(self, name):
            if name == "__dict__" and Removing.left:
                Removing.left -= 1
                if Removing.left == 0:
                    for module in (ema, model):
                        module._modules.pop("2", None)
                    gc.collect()
            return super().__getattribute__(name)

    ema, model = (nn.Sequential(Removing(2, 2), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))) for _ in range(2))
    Removing.left = left
    with contextlib.suppress(RuntimeError, ValueError):
        step = stepper(ema, model)
        follows(ema, model, step)
    Removing.left = 0
    step = stepper(ema, model)
    follows(ema, model, step)


def test_12_a_dict_that_hands_out_other_tensors_than_it_holds(backend):
    class Widening(dict):
        def __getitem__(self, name):
            return super().__getitem__(name).float()

    ema = {"a": torch.zeros(4)}
    binding = fused_ema.bind(ema, Widening(a=torch.ones(4, dtype=torch.bfloat16)))
    binding.update(0.5)
    assert ema["a"].tolist() == [0.5] * 4
    binding.update(0.5)
    assert ema["a"].tolist() == [0.75] * 4


@pytest.mark.parametrize("replaced", ["parameter", "module", "both"])
def test_12_what_is_replaced_while_it_is_paired(backend, monkeypatch, replaced):
    """As another thread may do. The call that meets it either raises or uses what is there now; so does the next."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = copy.deepcopy(model)
    check = plan.check

    def check_then_replace(*arguments, **options):
        checked = check(*arguments, **options)
        if replaced == "parameter":
            model[1].weight = nn.Parameter(torch.full((3, 3), 5.0))
        elif replaced == "both":  # each gets one more of a name that the other has too
            for module in (ema, model):
                module.append(nn.Linear(3, 3))
            model[1].weight.data.fill_(5.0)
        else:
            model[1] = nn.Linear(3, 3).requires_grad_(False)
            model[1].weight.fill_(5.0)
        return checked

    with monkeypatch.context() as patched:
        patched.setattr(plan, "check", check_then_replace)
        with contextlib.suppress(RuntimeError):
            fused_ema.update(ema, model, 0.0)
    fused_ema.update(ema, model, 0.0)
    assert ema[1].weight.eq(5.0).all()
    assert all(map(torch.equal, ema.parameters(), model.parameters()))


def test_prepare_pairs_anew_and_writes_nothing(backend):
    ema, model = net(), net()
    handle = fused_ema.bind(ema, model)
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    before = bits(ema, model)
    handle.prepare()
    assert same_bits(before, ema, model)
    if backend != "torch":
        assert handle._plan.current()
    handle.update(0.0)
    assert ema[0].weight.eq(1).all()
    model[0].weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="expected shape"):
        handle.prepare()
