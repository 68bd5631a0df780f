"""What changes in modules, dicts and lists between two calls is seen by the next one: followed, or refused by name."""

import contextlib
import copy
import gc
import pickle
from collections import UserDict, UserList, deque
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import bits, label, net, refused, same_bits, source, tensors_of
from torch import nn

import fused_ema
from fused_ema import plan


def retensor(value):
    return nn.Parameter(torch.full((4, 3), value))


def move_registry(module):
    """Moves the registry to the end of the module's __dict__, then changes what it holds."""
    module[0].__dict__["_parameters"] = module[0].__dict__.pop("_parameters")
    module[0].weight = retensor(5.0)


def replace_registry(module):
    # The new dict has the same keys and other values.
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
    # This is what a new module at the address of a dead one looks like.
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
    """Checks that an update with decay 0 copies every tensor that the model has now."""
    for tensor in tensors_of(model):
        tensor.data.add_(1)
    step(0.0)
    theirs = model.state_dict()
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


@pytest.mark.hazard(12, "good")
@pytest.mark.parametrize("change", [name for name in ONE_SIDE if name != "double"])
def test_changed_model(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    ONE_SIDE[change](model)
    follows(ema, model, step)


@pytest.mark.parametrize("change", [name for name in ONE_SIDE if name != "tied" and "bfloat16" not in name])
def test_changed_average(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    ONE_SIDE[change](ema)
    follows(ema, model, step)


@pytest.mark.parametrize("change", BOTH_SIDES)
def test_changed_on_both_sides(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    BOTH_SIDES[change](ema), BOTH_SIDES[change](model)
    follows(ema, model, step)


def test_fewer_elements_at_the_same_address(stepper):
    ema, model = net(), net()
    step = stepper(ema, model)
    whole = ema[2].weight.data
    for module in (ema, model):
        module[2].weight.data = module[2].weight.data[:1]
    before = whole[1:].clone()
    follows(ema, model, step)
    assert torch.equal(whole[1:], before), "written to what is no longer the average's"


def test_a_conjugate_at_the_same_address_is_refused(backend):
    ema, model = torch.ones(3, dtype=torch.complex64), torch.full((3,), 1 + 2j)
    fused_ema.update([ema], [model], 0.5)
    refused(ValueError, lambda: fused_ema.update([ema], [model.conj()], 0.5), [ema, model], names=["model[0]", "lazy"])


def test_another_kind_of_tensor_at_the_same_address_is_refused(stepper):
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


def test_what_is_no_module_among_the_children(stepper):
    ema, model = net(), net()
    step = stepper(ema, model)
    model._modules["1"] = object()
    with pytest.raises((ValueError, TypeError, AttributeError)):
        step(0.5)
    model._modules["1"] = net()[1]
    follows(ema, model, step)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("side", ["ema", "model"])
def test_one_changed_among_many(backend, side):
    # There are enough tensors for several threads to compare them.
    modules = {name: nn.ParameterList(torch.full((8,), i + 0.5) for i in range(2000)) for name in ("ema", "model")}
    binding = fused_ema.bind(modules["ema"], modules["model"])
    binding.update(0.5)
    for at in (0, 999, 1000, 1999):
        before = bits(modules["ema"])
        modules[side][at].data = torch.full((8,), 3.0)
        binding.update(0.5)
        assert modules["ema"][at].tolist() == [(3.0 + at + 0.5) / 2] * 8
        moved = [not torch.equal(*pair) for pair in zip(before, bits(modules["ema"]), strict=True)]
        assert [i for i, each in enumerate(moved) if each] == [at]
        for module in modules.values():
            module[at].data = torch.full((8,), at + 0.5)
        binding.update(0.5)


CHANGES_REFUSED = {
    "wider": (TypeError, lambda m: m.double(), ["ema['0.weight']", "float64", "float32"]),
    "shape": (
        ValueError,
        lambda m: setattr(m[2].bias, "data", torch.ones(1)),  # it would broadcast
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


@pytest.mark.hazard(12, "guarded")
@pytest.mark.parametrize("change", CHANGES_REFUSED)
def test_a_change_that_no_longer_fits_is_refused_until_it_is_undone(stepper, change):
    ema, model = net(), net()
    step = stepper(ema, model)
    original = copy.deepcopy(model)
    error, apply, names = CHANGES_REFUSED[change]
    apply(model)
    for _ in range(2):
        refused(error, lambda: step(0.5), ema, model, names=names)
    for old, new in zip(model.modules(), original.modules(), strict=True):
        old.__dict__["_parameters"], old.__dict__["_buffers"] = new._parameters, new._buffers
    follows(ema, model, step)


def test_what_was_refused_at_first_is_taken_once_it_fits(backend):
    # A handle does not remember that its tensors were refused once.
    ema, model = net(), net().double()
    handle = fused_ema.bind(ema, model)
    refused(TypeError, lambda: handle.update(0.5), ema, model, names=["ema['0.weight']", "float64", "float32"])
    refused(TypeError, handle.swap_, ema, model, names=["ema['0.weight']", "float64", "float32"])
    ema.double()
    follows(ema, model, handle.update)
    before = bits(ema)
    handle.swap_()
    assert same_bits(before, model)


@pytest.mark.hazard(13, "guarded")
@pytest.mark.parametrize("side", ["ema", "model"])
def test_freed_storage_is_refused_until_it_is_back(stepper, side):
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


# ---- Dicts, lists and views of them


@pytest.mark.parametrize("container", ["dict", "list"])
@pytest.mark.parametrize("used", [False, True])
def test_bound_containers_are_read_again(backend, container, used):
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
        ema["a"] = ema.pop("a")  # moves to the end
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
def test_bound_views_are_read_again(backend, view):
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


def test_a_dict_that_hands_out_other_tensors_than_it_holds(backend):
    class Widening(dict):
        def __getitem__(self, name):
            return super().__getitem__(name).float()

    ema = {"a": torch.zeros(4)}
    binding = fused_ema.bind(ema, Widening(a=torch.ones(4, dtype=torch.bfloat16)))
    binding.update(0.5)
    assert ema["a"].tolist() == [0.5] * 4
    binding.update(0.5)
    assert ema["a"].tolist() == [0.75] * 4


# ---- Modules that are unlike others


class Leaving(nn.Sequential):
    """Its modules() lists fewer modules than it holds."""

    def modules(self):
        yield from self[0].modules()


class Hiding(nn.Module):
    """Its named_modules() lists more modules than its registries hold."""

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
def test_modules_that_hold_their_tensors_in_other_ways(stepper, kind):
    ema, model = kind(net()), kind(net())
    step = stepper(ema, model)
    follows(ema, model, step)
    kept = [model[0], net(), net()]  # keeps the replaced modules alive
    for other in kept[1:]:
        model[0] = other
        follows(ema, model, step)
        assert same_bits(bits(other), ema[0])


def test_unpickled_modules(stepper):
    """Unpickled modules hold names that are equal to those of other modules but not the same objects."""
    ema, model = (pickle.loads(pickle.dumps(net())) for _ in range(2))
    step = stepper(ema, model)
    replace_registry(model)
    follows(ema, model, step)
    move_registry(model)
    follows(ema, model, step)


# ---- Changes while modules are compared or paired


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_nothing_runs_while_modules_are_compared(backend):
    """Asking a new module for its __dict__ may collect garbage in Python 3.11, and code that runs then may delete the
    module that is compared next."""
    ema, model = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())
    binding = fused_ema.bind(ema, model)
    old = id(model[0])
    model._modules["0"] = None
    others = []  # they occupy other addresses until one of them gets the old module's
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
        current = binding._plan.prepared.current
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


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("left", [1, 2, 3])
def test_what_is_removed_while_it_is_looked_at(stepper, left):
    """Python code may run while modules are compared, and remove one of them."""

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


@pytest.mark.parametrize("replaced", ["parameter", "module", "both"])
def test_what_is_replaced_while_it_is_paired(backend, monkeypatch, replaced):
    """Another thread may do this. The call either raises or uses the new tensor; the next call uses it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = copy.deepcopy(model)
    check = plan.check

    def check_then_replace(*arguments, **options):
        checked = check(*arguments, **options)
        if replaced == "parameter":
            model[1].weight = nn.Parameter(torch.full((3, 3), 5.0))
        elif replaced == "both":  # both get a module of the same name
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


def test_prepare_pairs_again_and_writes_nothing(backend):
    ema, model = net(), net()
    handle = fused_ema.bind(ema, model)
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    before = bits(ema, model)
    handle.prepare()
    assert same_bits(before, ema, model)
    if backend != "torch":
        assert handle._plan.prepared.current()
    handle.update(0.0)
    assert ema[0].weight.eq(1).all()
    model[0].weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="expected shape"):
        handle.prepare()


def test_lists_in_which_a_tensor_became_an_inference_tensor(backend):
    """At the same address, of the same kind: nothing else changed."""
    arrays = [np.zeros(2, np.float32) for _ in range(2)]
    model = [torch.ones(2) for _ in range(2)]
    fused_ema.copy_(list(map(torch.from_numpy, arrays)), model)
    for tensor in model:
        tensor.fill_(5)
    with torch.inference_mode():
        inference = torch.from_numpy(arrays[1])
    refused(RuntimeError, lambda: fused_ema.copy_([torch.from_numpy(arrays[0]), inference], model), names=["ema[1]"])
    assert [array.tolist() for array in arrays] == [[1, 1], [1, 1]]


def test_a_parameter_that_became_an_inference_tensor(backend):
    """The same object, at the same address."""
    array = np.zeros(2, np.float32)
    ema, model = nn.Module(), nn.Module()
    ema.w, model.w = nn.Parameter(torch.from_numpy(array)), nn.Parameter(torch.ones(2))
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    with torch.inference_mode():
        inference = torch.from_numpy(array)
    ema.w.data = inference
    refused(RuntimeError, lambda: handle.update(0.5), model, names=["ema['w']", "InferenceMode"])
    assert array.tolist() == [0.5, 0.5]


class Compared(nn.Module):
    """Modules that compare by a value of theirs."""

    def __init__(self, value):
        super().__init__()
        self.inner, self.value = nn.Linear(2, 2), value

    def __eq__(self, other):
        return self.value == other.value

    __hash__ = nn.Module.__hash__


def test_modules_with_a_comparison_of_their_own(stepper):
    ema, model = Compared(1), Compared(1)
    follows(ema, model, stepper(ema, model))
