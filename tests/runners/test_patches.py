"""A plan takes tensors in that replaced some of its own, and is then what a new plan would be. Where that is not
possible, it gives way to a new plan."""

import copy
import gc
import itertools
import random
import weakref

import pytest
import torch
from conftest import all_averages, bits, refused, same_bits, tensors_of
from torch import nn

import fused_ema
from fused_ema import plan
from fused_ema.pairs.memory import Apart, Span

COUNT = 8


def tree(rng, dtype=torch.float32):
    """Layers of several kinds of tensors, two of them in one piece of memory."""
    module = nn.Module()
    pool = torch.randn(400, dtype=dtype)
    module.register_parameter("first", nn.Parameter(pool[:50]))
    module.register_parameter("second", nn.Parameter(pool[61:111]))
    for i in range(COUNT):
        shape = rng.choice([(50,), (5, 10), (), (2, 3, 4)])
        module.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, dtype=dtype)))
    module.register_parameter("strided", nn.Parameter(torch.randn(6, 4, dtype=dtype).t()))
    module.register_parameter("empty", nn.Parameter(torch.zeros(0, dtype=dtype)))
    module.register_buffer("mean", torch.randn(7))
    module.register_buffer("count", torch.tensor(3))
    return module


def like(tensor):
    """New values in memory of its own, in the same shape, strides and class."""
    strides = torch.empty_like(tensor, device="meta").stride()  # those of an expanded tensor become dense
    new = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
    new.copy_(torch.randn(tensor.shape) * 4)
    return nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new


class Changes:
    """What may happen to the tensors of a module between two updates. Each takes a module and the name of a tensor."""

    def __init__(self, rng):
        self.rng = rng

    def put(self, module, name, tensor):
        registry = module._parameters if name in module._parameters else module._buffers
        registry[name] = tensor

    def get(self, module, name):
        return {**module._parameters, **module._buffers}[name]

    def replace(self, module, name):
        self.put(module, name, like(self.get(module, name)))

    def replace_several(self, module, name):
        for each in self.rng.sample(sorted(module._parameters), 3):
            self.replace(module, each)

    def reuse_the_address(self, module, name):
        shape = self.get(module, name).shape
        dtype, kind = self.get(module, name).dtype, type(self.get(module, name))
        self.put(module, name, None)
        gc.collect(0)
        new = torch.randn(shape).to(dtype)
        self.put(module, name, nn.Parameter(new, False) if kind is nn.Parameter else new)

    def set_data(self, module, name):
        self.get(module, name).data = like(self.get(module, name)).detach()

    def misalign(self, module, name):
        tensor = self.get(module, name)
        tensor.data = torch.randn(tensor.numel() + 1).to(tensor.dtype)[1:].view(tensor.shape)

    def transpose(self, module, name):
        tensor = self.get(module, name)
        tensor.data = tensor.data.mT.contiguous().mT if tensor.dim() > 1 else tensor.data.clone()

    def cast(self, module, name):
        tensor = self.get(module, name)
        if tensor.is_floating_point():
            self.put(
                module,
                name,
                nn.Parameter(tensor.detach().to(self.rng.choice([torch.float16, torch.float64]), copy=True)),
            )

    def resize(self, module, name):
        self.put(module, name, nn.Parameter(torch.randn(self.rng.choice([(50,), (5, 10), (0,)]))))

    def tie(self, module, name):
        self.put(module, name, self.get(module, self.rng.choice(sorted(module._parameters))))

    def untie(self, module, name):
        self.put(module, name, nn.Parameter(self.get(module, name).detach().clone(), False))

    def overlap(self, module, name):
        other = self.get(module, self.rng.choice(sorted(module._parameters))).detach()
        self.put(module, name, nn.Parameter(other.view(-1)[1:] if other.is_contiguous() else other, False))

    def move_in_the_pool(self, module, name):
        pool = module.first.detach()
        if pool.untyped_storage().nbytes() >= 400 * pool.element_size():
            at = self.rng.choice([0, 30, 61, 120, 200, 350])
            module._parameters["second"] = nn.Parameter(pool.as_strided((50,), (1,), at))

    def expand(self, module, name):
        self.put(module, name, nn.Parameter(torch.randn(()).expand(self.get(module, name).shape)))

    def exchange(self, module, name):
        first, second = self.rng.sample(sorted(module._parameters), 2)
        registry = module._parameters
        registry[first], registry[second] = registry[second], registry[first]

    def free(self, module, name):
        self.get(module, name).untyped_storage().resize_(0)

    def inference(self, module, name):
        with torch.inference_mode():
            self.put(module, name, self.get(module, name).detach().clone())

    def remove(self, module, name):
        self.put(module, name, None)


EVERY = [name for name in vars(Changes) if name[0] != "_" and name not in ("put", "get")]
OFTEN = ["replace"] * 6 + ["set_data"] * 3 + ["replace_several", "reuse_the_address", "exchange"]


class Copies:
    """Copies of tensors that share objects and memory as these do, which copy.deepcopy does not keep."""

    def __init__(self):
        self.tensors, self.storages = {}, {}

    def of(self, tensor):
        if tensor is None or id(tensor) in self.tensors:
            return tensor if tensor is None else self.tensors[id(tensor)]
        storage = tensor.untyped_storage()
        memory = self.storages.setdefault(storage._cdata, storage.clone())
        with torch.inference_mode(tensor.is_inference()):
            new = torch.empty(0, dtype=tensor.dtype).set_(
                memory, tensor.storage_offset(), tensor.shape, tensor.stride()
            )
        memory.resize_(storage.nbytes())  # set_() enlarges one that was freed
        new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        self.tensors[id(tensor)] = new
        return new

    def of_module(self, module):
        new = nn.Module()
        for registry in ("_parameters", "_buffers"):
            vars(new)[registry].update({name: self.of(each) for name, each in vars(module)[registry].items()})
        return new

    def of_manager(self, manager):
        new = fused_ema.EMA.__new__(fused_ema.EMA)
        state = manager.__getstate__()
        first = {name: self.of(each) for name, each in state["averages"]["first"].items()}
        model = self.of_module(manager.model)
        new.__setstate__({**state, "model": model, "averages": {**state["averages"], "first": first}})
        return new


def outcome(call, *sources):
    """What a call raised, and all bytes afterwards."""
    try:
        call()
        error = None
    except (ValueError, TypeError, RuntimeError) as raised:
        error = type(raised), str(raised)
    return error, bits(*sources)


def same(one, other):
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1])
    assert all(map(torch.equal, one[1], other[1]))


def ways(ema, model, way):
    """The call that is repeated, and what makes the same call with a new plan for other sources."""
    if way == "manager":
        manager = fused_ema.EMA(model, [0.9, 0.5])
        return manager.update, manager
    if way == "lists":
        return lambda: fused_ema.update(tensors_of(ema), tensors_of(model), 0.9), None
    if way == "swap":
        return lambda: fused_ema.swap_(ema, model), None
    return lambda: fused_ema.update(ema, model, 0.9), None


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 40))])
@pytest.mark.parametrize("way", ["modules", "lists", "manager", "swap"])
def test_a_patched_plan_does_what_a_new_one_does(backend, way, seed):
    """After each change the plan that went through all of them runs, and a new one on a copy of the same tensors."""
    rng = random.Random(f"{seed} {way}")
    torch.manual_seed(seed)
    model = tree(rng, rng.choice([torch.float32, torch.bfloat16]) if way in ("modules", "manager") else torch.float32)
    ema = copy.deepcopy(model)
    for tensor in ema.parameters():
        tensor.data = torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)
    call, holder = ways(ema, model, way)
    call()
    changes = Changes(rng)
    for _ in range(30):
        side = model if way == "manager" or rng.random() < 0.6 else ema
        change = rng.choice([*OFTEN, *EVERY])
        undo = [(each, dict(each._parameters), dict(each._buffers)) for each in (ema, model)]
        held = {**side._parameters, **side._buffers}
        name = rng.choice(sorted(each for each, tensor in held.items() if tensor is not None and each != "count"))
        data = [(tensor, tensor.data) for tensor in tensors_of(ema, model)]
        getattr(changes, change)(side, name)
        if way == "manager":
            other = Copies().of_manager(holder)
            sides = ([*all_averages(holder), model], [*all_averages(other), other.model])
            fresh = other.update
        else:
            copies = Copies()
            sides = ([ema, model], [copies.of_module(ema), copies.of_module(model)])
            fresh, _ = ways(*sides[1], way)

        expected = outcome(fresh, *sides[1])
        found = outcome(call, *sides[0])
        same(found, expected)
        if found[0]:  # put everything back, so that it goes on
            for module, parameters, buffers in undo:
                module.__dict__["_parameters"], module.__dict__["_buffers"] = parameters, buffers
            for tensor, before in data:
                if tensor.untyped_storage().nbytes() == 0 and tensor.numel():
                    tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size() * 9)
                    tensor.data.fill_(1)
                if not tensor.is_inference():
                    tensor.data = before
            call()


def plans_made(monkeypatch):
    """Counts the pairs that are checked from now on, call by call."""
    counts, check = [], plan.check

    def counting(pairs, *arguments, **options):
        counts.append(len(pairs.ema))
        return check(pairs, *arguments, **options)

    monkeypatch.setattr(plan, "check", counting)
    return counts


REPLACED = {
    "parameter": lambda m: setattr(m, "p3", like(m.p3)),
    "data": lambda m: setattr(m.p3, "data", like(m.p3).detach()),
    "buffer": lambda m: setattr(m, "mean", m.mean * 0.9),
    "strided": lambda m: setattr(m, "strided", like(m.strided)),
}


@pytest.mark.hazard(47, "good")
@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("way", ["function", "bound", "lists", "manager", "copy_"])
def test_only_what_was_replaced_is_checked(backend, monkeypatch, way, what):
    torch.manual_seed(0)
    model = tree(random.Random(0))
    ema = copy.deepcopy(model)
    handle, manager = fused_ema.bind(ema, model), fused_ema.EMA(model, 0.0, buffers="average")
    call = {
        "function": lambda: fused_ema.update(ema, model, 0.0),
        "bound": lambda: handle.update(0.0),
        "lists": lambda: fused_ema.update(tensors_of(ema), tensors_of(model), 0.0),
        "manager": manager.update,
        "copy_": handle.copy_,
    }[way]
    for _ in range(2):
        call()
    for _ in range(3):
        REPLACED[what](model)
        counts = plans_made(monkeypatch)
        call()
        assert counts == [1]
        theirs = dict(model.named_parameters()) | dict(model.named_buffers())
        ours = all_averages(manager)[0] if way == "manager" else dict(ema.named_parameters())
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_buffer_that_a_manager_does_not_average_costs_no_check(backend, monkeypatch):
    model = tree(random.Random(0))
    manager = fused_ema.EMA(model, 0.9)
    manager.update()
    counts = plans_made(monkeypatch)
    for _ in range(3):
        model.mean = model.mean * 0.9
        manager.update()
    assert set(counts) == {0}


def test_one_of_two_tied_names_gets_a_tensor_of_its_own(backend):
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(4))
    model.b = model.a
    ema = copy.deepcopy(model)
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    for name in "ab":
        shared = getattr(model, name)
        setattr(model, name, nn.Parameter(torch.ones(4)))
        refused(ValueError, lambda: handle.update(0.5), ema, model, names=["both feeding the average"])
        setattr(model, name, shared)
        handle.update(0.5)


def test_one_of_two_tied_names_of_a_manager_gets_a_tensor_of_its_own(backend):
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(4))
    model.b = model.a
    manager = fused_ema.EMA(model, 0.5)
    manager.update()
    for name in "ab":
        shared = getattr(model, name)
        setattr(model, name, nn.Parameter(torch.ones(4)))
        refused(ValueError, manager.update, model, *all_averages(manager), names=["both feeding the average"])
        setattr(model, name, shared)
        manager.update()


def test_tensors_that_are_replaced_inside_swapped_do_not_get_the_averages(backend):
    model = tree(random.Random(0))
    manager = fused_ema.EMA(model, 0.5)
    raw, average = bits(*model.parameters()), bits(*all_averages(manager))
    with manager.swapped():
        model.p3 = like(model.p3)
    assert same_bits(raw, *model.parameters())
    assert same_bits(average, *all_averages(manager))


def test_an_average_tied_by_memory_alone_moves_away(backend):
    """Two averages are one memory, and so are two tensors of the model; then one average gets memory of its own."""
    e, m = torch.zeros(4), torch.ones(4)
    ema, model = [e, e.view(4)], [m, m.view(4)]
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    ema[0] = torch.zeros(4)
    handle.update(0.5)
    assert ema[0].tolist() == [0.5] * 4
    assert ema[1].tolist() == [0.75] * 4


def test_two_pairs_that_become_one_are_averaged_once(backend):
    ema, model = [torch.zeros(4), torch.zeros(4)], [torch.ones(4), torch.ones(4)]
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    ema[:], model[:] = [torch.zeros(4)] * 2, [torch.ones(4)] * 2
    for expected in (0.5, 0.75):
        handle.update(0.5)
        assert ema[0].tolist() == [expected] * 4


def test_a_tensor_that_gets_the_shape_of_the_average_is_averaged_from_then_on(backend):
    """What names="common" left out, since only its replacement fits."""
    ema, model = ({"a": torch.zeros(4), "b": torch.zeros(3)} for _ in "12")
    model["b"] = torch.ones(2)
    handle = fused_ema.bind(ema, model, names="common")
    handle.update(0.5)
    model["b"] = torch.ones(3)
    handle.update(0.5)
    assert ema["b"].tolist() == [0.5] * 3


@pytest.mark.hazard(47, "guarded")
def test_a_replaced_tensor_that_overlaps_one_far_away_is_refused(backend):
    pool = torch.zeros(1000)
    ema = [pool[100 * i : 100 * i + 50] for i in range(10)]
    model = [torch.ones(50) for _ in range(10)]
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    ema[2] = pool[60:110]  # apart from its neighbours in the list
    handle_before = bits(pool, model)
    refused(ValueError, lambda: handle.update(0.5), pool, model, names=["ema[1]", "ema[2]", "shared"])
    ema[2] = pool[50:100]
    handle.update(0.5)
    model[7] = pool[940:990]
    refused(ValueError, lambda: handle.update(0.5), pool, model, names=["ema[9]", "model[7]"])
    assert not same_bits(handle_before, pool, model)


def test_a_patch_that_is_interrupted_leaves_the_plan_to_a_new_one(backend, monkeypatch):
    model = tree(random.Random(0))
    ema = copy.deepcopy(model)
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    kept = handle._plan

    def interrupted(*_):
        raise KeyboardInterrupt

    model.p3 = like(model.p3)
    with monkeypatch.context() as patched:
        patched.setattr(kept.prepared, "patch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handle.update(0.5)
    handle.update(0.0)
    assert torch.equal(ema.p3, model.p3)
    assert handle._plan is not kept


def test_replaced_tensors_of_a_patched_plan_are_freed(backend):
    model = tree(random.Random(0))
    handle = fused_ema.bind(copy.deepcopy(model), model)
    dead = []
    for _ in range(3):
        handle.update(0.5)
        dead += [weakref.ref(model.p3), weakref.ref(model.p3.untyped_storage())]
        model.p3 = like(model.p3)
    gc.collect()
    assert [each() for each in dead] == [None] * 6


@pytest.mark.parametrize("seed", range(5))
def test_spans_that_are_replaced_are_compared_with_all_others(seed):
    rng = random.Random(seed)
    spans = [(10 * i, 10 * i + rng.randint(1, 10)) for i in range(30)]
    apart = Apart(spans)
    for _ in range(300):
        new = {i: (begin := rng.randrange(320), begin + rng.randint(1, 12)) for i in rng.sample(range(30), 2)}
        after = [new.get(i, span) for i, span in enumerate(spans)]
        ordered = sorted(after)
        free = all(one[1] <= other[0] for one, other in itertools.pairwise(ordered))
        replaced = apart.replaced({i: Span(*span, "") for i, span in new.items()})
        assert (replaced is not None) == free
        if replaced:
            apart, spans = replaced, after
