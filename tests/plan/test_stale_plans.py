"""Whatever happens to the tensors of two modules and a manager, in any order, the next update follows the formula or
raises and writes nothing. hypothesis searches for an order that breaks this."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from conftest import all_averages, bits, refused, same_bits, tensors_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import check_step
from oracle import same_bits as same_tensor
from torch import nn

import fused_ema

PLACES = [(child, name) for child in ("a", "b") for name in ("w", "v")]
SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (2, 3, 4)]
DECAYS = st.sampled_from([0.0, 1e-6, 0.5, 0.9, 0.9999, 1.0])
places, sides, shapes = st.sampled_from(PLACES), st.sampled_from(["ema", "model"]), st.sampled_from(SHAPES)
seeds = st.integers(0, 2**32 - 1)


def random(shape, dtype, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def tree(dtype, seed):
    module = nn.Module()
    for number, child in enumerate("ab"):
        module.add_module(child, nn.Module())
        part = module.get_submodule(child)
        for position, name in enumerate("wv"):
            part.register_parameter(name, nn.Parameter(random((3, 5), dtype, seed + 2 * number + position)))
        part.register_buffer("mean", random((4,), dtype, seed))
        part.register_buffer("count", torch.tensor(number))
    return module


def named(module):
    return dict(module.named_parameters(remove_duplicate=False))


class StalePlans(RuleBasedStateMachine):
    """Two modules with a bound handle, and a manager of one of them."""

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=seeds)
    def make(self, dtype, seed):
        self.ema, self.model = tree(torch.float32, seed), tree(dtype, seed + 1)
        self.added = self.steps = 0
        self.bind()
        self.manage()

    @invariant()
    def updates_come_often(self):
        """Updates after every other step, whichever rules are chosen, with values that the averages do not have."""
        self.steps += 1
        if self.steps % 2 == 0:
            self.train(self.steps)
            self.update("bound", 0.9)
            self.manager_updates()

    def bind(self):
        self.handle = fused_ema.bind(self.ema, self.model)

    def manage(self):
        self.manager = fused_ema.EMA(self.model, [0.5, 0.9])

    def part(self, side, place):
        return getattr(self, side).get_submodule(place[0])

    def tied(self, side="model"):
        part = getattr(self, side)
        return any(getattr(part.a, name) is getattr(part.b, name) for name in "wv")

    # ---- Changes of tensors

    @rule(seed=seeds)
    def train(self, seed):
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.add_(random(tensor.shape, tensor.dtype, seed))
            self.model.a.mean.add_(1)
            self.model.a.count.add_(1)

    @rule(side=sides, place=places, seed=seeds, transposed=st.booleans())
    def set_data(self, side, place, seed, transposed):
        tensor = getattr(self.part(side, place), place[1])
        new = random(tensor.shape, tensor.dtype, seed)
        tensor.data = new.mT.contiguous().mT if transposed and new.ndim > 1 else new

    @rule(side=sides, place=places, seed=seeds)
    def replace(self, side, place, seed):
        if not self.tied(side):
            part = self.part(side, place)
            old = getattr(part, place[1])
            setattr(part, place[1], nn.Parameter(random(old.shape, old.dtype, seed)))

    @rule(side=sides, place=places, seed=seeds)
    def replace_buffer(self, side, place, seed):
        part = self.part(side, place)
        part.mean = random(part.mean.shape, part.mean.dtype, seed)

    @rule(side=sides)
    def assign(self, side):
        if not self.tied(side):
            module = getattr(self, side)
            module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)

    @rule(name=st.sampled_from("wv"), both=st.booleans())
    def tie(self, name, both):
        if getattr(self.model.a, name).shape == getattr(self.model.b, name).shape:
            for module in (self.ema, self.model) if both else (self.model,):
                setattr(module.b, name, getattr(module.a, name))
            self.manage()

    @precondition(lambda self: self.tied())
    @rule()
    def untie(self):
        tied = [name for name in "wv" if getattr(self.model.a, name) is getattr(self.model.b, name)]
        for module in (self.ema, self.model):
            for name in "wv":
                if getattr(module.a, name) is getattr(module.b, name):
                    setattr(module.b, name, nn.Parameter(getattr(module.b, name).detach().clone()))
        if any(getattr(self.model.b, name).numel() for name in tied):
            self.manager_refuses(ValueError)  # one average that two names share can't follow two parameters
        self.manage()

    @rule(place=places)
    def freeze(self, place):
        getattr(self.part("model", place), place[1]).requires_grad_(False)

    @rule(place=places, shape=shapes, seed=seeds)
    def resize(self, place, shape, seed):
        if not self.tied() and not self.tied("ema"):
            for side in ("ema", "model"):
                part = self.part(side, place)
                setattr(part, place[1], nn.Parameter(random(shape, getattr(part, place[1]).dtype, seed)))
            self.manage()

    @rule(place=places, seed=seeds)
    def add(self, place, seed):
        self.added += 1
        for side in ("ema", "model"):
            part = self.part(side, place)
            part.register_parameter(f"x{self.added}", nn.Parameter(random((2,), part.mean.dtype, seed)))
        self.manage()

    @precondition(lambda self: self.added)
    @rule()
    def remove(self):
        for module in (self.ema, self.model):
            for child in ("a", "b"):
                module.get_submodule(child)._parameters.pop(f"x{self.added}", None)
        self.added -= 1
        self.manage()

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def cast_the_model(self, dtype):
        self.model.to(dtype)

    @rule(what=st.sampled_from(["ema", "model", "manager"]))
    def move(self, what):
        if what == "manager":
            self.manager._averages._move(torch.clone)
            self.manager.to("cpu")
        else:
            getattr(self, what)._apply(torch.clone)  # as .to() another device

    @rule(way=st.sampled_from(["pickle", "deepcopy"]))
    def travel(self, way):
        everything = (self.ema, self.model, self.handle, self.manager)
        self.ema, self.model, self.handle, self.manager = (
            copy.deepcopy(everything) if way == "deepcopy" else pickle.loads(pickle.dumps(everything))
        )
        left = everything[-1]
        assert self.manager is not left
        assert self.manager.model is self.model
        assert self.manager.step == left.step
        assert all(map(same_bits, map(bits, left.state_dict()["averages"]), all_averages(self.manager)))

    # ---- What must be refused until it is undone

    def all_refuse(self, error, side):
        for call in (lambda: self.handle.update(0.5), lambda: fused_ema.update(self.ema, self.model, 0.5)):
            refused(error, call, self.ema, self.model)
        if side == "model":
            self.manager_refuses(error)

    def manager_refuses(self, error):
        step = self.manager.step
        refused(error, self.manager.update, self.model, *all_averages(self.manager))
        assert self.manager.step == step

    @rule(side=sides, place=places)
    def only_one_side_has_it(self, side, place):
        part = self.part(side, place)
        part.register_parameter("more", nn.Parameter(torch.ones(2)))
        self.all_refuse(ValueError, side)
        del part.more

    @rule(side=sides, place=places)
    def another_shape(self, side, place):
        if not self.tied() and not self.tied("ema"):
            part = self.part(side, place)
            old = getattr(part, place[1])
            setattr(part, place[1], nn.Parameter(torch.ones(5, 3)))
            self.all_refuse(ValueError, side)
            setattr(part, place[1], old)

    @rule(place=places)
    def freed_storage(self, place):
        tensor = getattr(self.part("model", place), place[1])
        if tensor.numel():
            storage = tensor.untyped_storage()
            kept = storage.clone()
            storage.resize_(0)
            self.all_refuse(RuntimeError, "model")
            storage.resize_(kept.nbytes())
            storage.copy_(kept)

    # ---- The operation

    def pairs(self):
        """Each average once, with its model tensor."""
        theirs = named(self.model)
        found = {id(e): (e, theirs[name]) for name, e in named(self.ema).items()}
        return [[side.detach() for side in pair] for pair in found.values()]

    @rule(way=st.sampled_from(["bound", "function", "thread", "dict"]), decay=DECAYS)
    def update(self, way, decay):
        pairs = self.pairs()
        old = [e.clone() for e, _ in pairs]
        before = bits(self.model)
        calls = {
            "bound": lambda: self.handle.update(decay),
            "function": lambda: fused_ema.update(self.ema, self.model, decay),
            "dict": lambda: fused_ema.update(*map(named, (self.ema, self.model)), decay),
        }
        if way == "thread":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(calls["bound"]).result()
        else:
            calls[way]()
        check_step(old, [p for _, p in pairs], [e for e, _ in pairs], decay, bitwise=True)
        assert same_bits(before, self.model)
        if way != "dict" and decay != 1:
            for name, buffer in self.ema.named_buffers():
                assert same_tensor(buffer, self.model.get_buffer(name).to(buffer.dtype)), name

    @rule(bound=st.booleans())
    def copy(self, bound):
        self.handle.copy_() if bound else fused_ema.copy_(self.ema, self.model)
        assert all(same_tensor(e, p.to(e.dtype)) for e, p in self.pairs())

    @rule()
    def swap(self):
        both = [*zip(self.ema.parameters(), self.model.parameters(), strict=False)]
        alike = all(e.dtype == p.dtype for e, p in both) and not self.tied() and not self.tied("ema")
        if alike and self.ema.a.mean.dtype == self.model.a.mean.dtype:
            before = [[tensor.detach().clone() for tensor in pair] for pair in self.pairs()]
            self.handle.swap_()
            for (e, p), (old_e, old_p) in zip(self.pairs(), before, strict=True):
                assert same_tensor(e, old_p)
                assert same_tensor(p, old_e)

    # ---- The manager

    @rule()
    def manager_updates(self):
        old = [{name: tensor.clone() for name, tensor in average.items()} for average in all_averages(self.manager)]
        self.manager.update()
        model = named(self.model)
        for before, after, decay in zip(old, all_averages(self.manager), (0.5, 0.9), strict=True):
            theirs = [model[name].detach() for name in before]
            check_step([*before.values()], theirs, [after[name] for name in before], decay, bitwise=True)

    @rule(index=st.integers(0, 1))
    def manager_swaps(self, index):
        raw, true = bits(self.model), [bits(average) for average in all_averages(self.manager)]
        averages = all_averages(self.manager)[index]
        expected = {name: average.clone() for name, average in averages.items()}
        with self.manager.swapped(index):
            for name, tensor in named(self.model).items():
                assert same_tensor(tensor.detach(), expected[name].to(tensor.dtype)), name
        assert same_bits(raw, self.model)
        assert all(map(same_bits, true, all_averages(self.manager)))

    @rule()
    def manager_resumes(self):
        file = io.BytesIO()
        torch.save(self.manager.state_dict(), file)
        file.seek(0)
        before, step = all_averages(self.manager), self.manager.step
        self.manage()
        self.manager.load_state_dict(torch.load(file, weights_only=True))
        assert self.manager.step == step
        for old, new in zip(before, all_averages(self.manager), strict=True):
            assert all(map(same_tensor, tensors_of(old), tensors_of(new)))


TestStalePlans = StalePlans.TestCase
TestStalePlans.settings = settings(
    stateful_step_count=30,
    max_examples=max(100, settings.default.max_examples),
    suppress_health_check=list(HealthCheck),
)
