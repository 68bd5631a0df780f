"""EMA.attach: one update for each step that an optimizer takes, none for those that were skipped, and nothing left."""

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import averages, clones, equal, net, parameters
from torch import nn

import fused_ema
from fused_ema import EMA

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def backward(model, factor=1.0):
    (model(torch.randn(4, 3)).square().mean() * factor).backward()


def hooks(optimizer):
    return dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)


class Checked:
    """An attached manager, and another that is updated by hand after the steps that were taken."""

    def __init__(self, model, optimizer, overlap=False, **options):
        self.model, self.optimizer = model, optimizer
        self.ema, self.twin = EMA(model, 0.9, **options), EMA(model, 0.9, **options)
        self.handle = self.ema.attach(optimizer, overlap=overlap)

    def after(self, *, taken):
        if taken:
            self.twin.update()
        assert (self.ema.step, self.ema.updates) == (self.twin.step, self.twin.updates)
        assert equal(averages(self.ema), averages(self.twin))


@pytest.mark.hazard(28, "good")
@pytest.mark.parametrize("overlap", [False, True])
def test_an_update_after_each_step(backend, make_optimizer, overlap):
    model = net()
    checked = Checked(model, make_optimizer(model.parameters()), overlap)
    start = clones(averages(checked.ema))
    for _ in range(4):
        checked.optimizer.zero_grad()
        backward(model)
        checked.after(taken=False)
        checked.optimizer.step()
        checked.after(taken=True)
    assert checked.ema.step == 4
    assert not equal(averages(checked.ema), start)
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


def test_several_averages_and_options(backend, make_optimizer):
    model = net()
    optimizer = make_optimizer(model.parameters())
    options = {"decay": [0.9, lambda n: n / (n + 1)], "update_every": 2, "update_after_step": 3}
    ema, twin = EMA(model, **options), EMA(model, **options)
    ema.attach(optimizer)
    for _ in range(9):
        backward(model)
        optimizer.step()
        twin.update()
    assert (ema.step, ema.updates, ema.decay) == (9, 3, twin.decay)
    assert all(equal(averages(ema, k), averages(twin, k)) for k in range(2))


@pytest.mark.parametrize("schedule_first", [False, True])
def test_learning_rate_schedule(backend, make_optimizer, schedule_first):
    # It puts a function of its own in the place of optimizer.step.
    model = net()
    optimizer = make_optimizer(model.parameters())
    if schedule_first:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    checked = Checked(model, optimizer)
    if not schedule_first:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(5):
        backward(model)
        optimizer.step()
        schedule.step()
        checked.after(taken=True)
    checked.handle.remove()
    backward(model)
    optimizer.step()
    checked.after(taken=False)


def test_gradient_accumulation(backend):
    model = net()
    checked = Checked(model, torch.optim.SGD(model.parameters(), 0.1))
    for batch in range(12):
        backward(model)
        if batch % 4 == 3:
            checked.optimizer.step()
            checked.optimizer.zero_grad()
        checked.after(taken=batch % 4 == 3)
    assert checked.ema.step == 3


def test_closures(backend):
    model = net()
    checked = Checked(model, torch.optim.LBFGS(model.parameters(), max_iter=5))
    calls = []

    def closure():
        calls.append(1)
        checked.optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    checked.optimizer.step(closure)
    checked.after(taken=True)
    assert len(calls) > 1


def test_a_step_that_raises_is_not_one(backend):
    model = net()
    checked = Checked(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ZeroDivisionError):
        checked.optimizer.step(lambda: 1 / 0)
    checked.after(taken=False)


# ---- Steps that a GradScaler skips


@pytest.mark.hazard(36, "guarded")
@pytest.mark.parametrize("overlap", [False, True])
def test_grad_scaler(backend, make_optimizer, overlap):
    model = net()
    optimizer = make_optimizer(model.parameters())
    checked = Checked(model, optimizer, overlap)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for n, factor in enumerate([1.0, torch.inf, 1.0, torch.nan, torch.inf, 1.0]):
        overflow = factor != 1
        optimizer.zero_grad()
        before = clones(dict(model.named_parameters()))
        scaler.scale(model(torch.randn(4, 3)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert equal(clones(dict(model.named_parameters())), before) == overflow, n
        checked.after(taken=not overflow)
    assert checked.ema.step == 3


def test_grad_scaler_skipped_steps_do_not_ask_the_schedule(backend):
    model, asked = net(), []
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ema = EMA(model, lambda n: asked.append(n) or 0.5)
    ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert asked == [1, 2]


# ---- Wrappers


class Wrapper(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer: a subclass whose own step, and so whose hooks, never run."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize("depth", [1, 2])
def test_wrapped_optimizer(backend, depth):
    model = net()
    inner = wrapped = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(depth):
        wrapped = Wrapper(wrapped)
    before = hooks(inner)
    checked = Checked(model, wrapped)
    for _ in range(3):
        backward(model)
        wrapped.step()
        checked.after(taken=True)
    checked.handle.remove()
    assert hooks(inner) == before


# ---- The end of it, and what is refused


@pytest.mark.parametrize("overlap", [False, True])
def test_remove_leaves_nothing(backend, make_optimizer, overlap):
    model = net()
    optimizer = make_optimizer(model.parameters())
    optimizer.register_step_post_hook(other := lambda *_: None)
    optimizer.register_step_pre_hook(other)
    before, attributes = hooks(optimizer), set(vars(optimizer))
    checked = Checked(model, optimizer, overlap)
    assert hooks(optimizer) != before
    backward(model)
    optimizer.step()
    checked.after(taken=True)
    for _ in range(2):
        checked.handle.remove()
        assert hooks(optimizer) == before
        assert set(vars(optimizer)) == attributes
    optimizer.step()
    checked.after(taken=False)
    checked.ema.update(), checked.after(taken=True)


def test_attached_again(backend):
    model = net()
    first, second = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    checked = Checked(model, first)
    before = hooks(first), hooks(second)
    for optimizer in (first, second):
        with pytest.raises(RuntimeError, match=r"attach.*remove\(\)"):
            checked.ema.attach(optimizer)
    assert (hooks(first), hooks(second)) == before
    backward(model)
    first.step()
    checked.after(taken=True)
    old = checked.handle
    old.remove()
    checked.handle = checked.ema.attach(second)
    old.remove()  # which is no longer its concern
    with pytest.raises(RuntimeError, match="attach"):
        checked.ema.attach(first)
    first.step()
    checked.after(taken=False)
    second.step()
    checked.after(taken=True)


@pytest.mark.parametrize(
    "thing",
    [None, 3, nn.Linear(2, 2), [], torch.optim.SGD, lambda: None],
    ids=lambda thing: getattr(thing, "__name__", type(thing).__name__),
)
def test_other_things_are_refused(backend, thing):
    ema = EMA(net(), 0.9)
    with pytest.raises(TypeError, match="optimizer"):
        ema.attach(thing)
    optimizer = torch.optim.SGD(ema.model.parameters(), 0.1)
    ema.attach(optimizer)  # it is still free


def test_an_optimizer_of_another_model_is_warned_of(backend, recwarn):
    model, other = net(), net()
    with pytest.warns(UserWarning, match="the optimizer has none of the averaged model's parameters in its groups"):
        EMA(model).attach(torch.optim.SGD(other.parameters(), 0.1)).remove()
    recwarn.clear()
    some = [next(model.parameters()), next(other.parameters())]
    EMA(model).attach(torch.optim.SGD([{"params": [tensor]} for tensor in some], 0.1)).remove()
    assert not recwarn


def test_two_managers_on_one_optimizer(backend):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checked = [Checked(model, optimizer) for _ in range(2)]
    for taken in (1, 2):
        backward(model)
        optimizer.step()
        for each in checked[: 3 - taken]:
            each.after(taken=True)
        checked[1].handle.remove()
    assert [each.ema.step for each in checked] == [2, 1]


@pytest.mark.hazard(28, "guarded")
@pytest.mark.parametrize("overlap", [False, True])
def test_refused_update_is_heard_and_not_counted(backend, overlap):
    model = net()
    checked = Checked(model, torch.optim.SGD(model.parameters(), 0.1), overlap)
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    for _ in range(2):
        with pytest.raises(ValueError, match="'extra'"):
            checked.optimizer.step()
        checked.after(taken=False)
    del model.extra
    checked.optimizer.step()
    checked.after(taken=True)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_update_by_hand_is_refused(backend, overlap):
    model = net()
    checked = Checked(model, torch.optim.SGD(model.parameters(), 0.1), overlap)
    backward(model)
    checked.optimizer.step()
    checked.after(taken=True)
    with pytest.raises(RuntimeError, match=r"a step would count twice; leave the call out, or call remove\(\)"):
        checked.ema.update()
    checked.after(taken=False)
    checked.handle.remove()  # as the error says
    checked.ema.update()
    checked.after(taken=True)


def test_everything_works_while_attached(backend):
    model = net()
    checked = Checked(model, torch.optim.SGD(model.parameters(), 0.1), overlap=True)
    backward(model)
    checked.optimizer.step()
    ema = checked.ema
    with ema.swapped():
        assert torch.equal(model[0].weight, averages(ema)["0.weight"])
    ema.load_state_dict(ema.state_dict())
    ema.averaged_state_dict(), ema.distance(), repr(ema), ema.copy_to(net())
    checked.after(taken=True)


class Derived(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("base_first", [False, True])
def test_a_step_that_calls_its_base_is_one_step(backend, base_first):
    # PyTorch wraps step() of each class that it makes an instance of: nested ones run the hooks twice.
    model = nn.Linear(3, 3)
    if base_first:
        torch.optim.SGD(model.parameters(), 0.1)
    optimizer = Derived(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    handle = ema.attach(optimizer)
    torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert ema.step == 3
    handle.remove()


@torch.no_grad()
def shrink(optimizer):
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.mul_(0.9)


def look_ahead(wrapper, closure):
    loss = wrapper.optimizer.step(closure)
    shrink(wrapper)
    return loss


class Lookahead(torch.optim.Optimizer):
    """As several packages have it: it steps another optimizer and then writes to the parameters itself."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        return look_ahead(self, closure)


class LookaheadWithoutHooks(torch.optim.Optimizer):
    """Nor do all call the __init__ that makes torch run hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        return look_ahead(self, closure)


class TimmLookahead(torch.optim.Optimizer):
    """As timm's: the base's name is its own, it has hooks for step() alone, and its state is the base's."""

    def __init__(self, base):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, {}

    def step(self, closure=None):
        self._base_optimizer.step(closure)
        shrink(self)

    def state_dict(self):
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state):
        self._base_optimizer.load_state_dict(state)


class ScheduleFree:
    """As schedulefree's wrapper: no torch.optim.Optimizer, and it writes before the step of its base too."""

    def __init__(self, base):
        self.base = base

    @property
    def param_groups(self):
        return self.base.param_groups

    def step(self, closure=None):
        shrink(self)
        self.base.step(closure)
        shrink(self)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


@pytest.mark.parametrize("kind", [Lookahead, LookaheadWithoutHooks])
@pytest.mark.parametrize("scheduled", [True, False])
def test_a_wrapper_that_writes_after_the_step(backend, kind, scheduled):
    model = net()
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.1))
    ema = EMA(model, 0.0)  # copies: what it holds is what it saw
    original = optimizer.step
    handle = ema.attach(optimizer)
    if scheduled:  # the scheduler wraps step() again
        torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for step in range(1, 4):
        backward(model)
        optimizer.step()
        assert ema.step == step
        assert equal(averages(ema), {name: tensor.detach() for name, tensor in model.named_parameters()})
    optimizer.optimizer.step()  # past the wrapper
    assert ema.step == 4
    handle.remove()
    optimizer.step()
    assert ema.step == 4
    assert scheduled or optimizer.step == original


def test_a_wrapper_that_raises_updates_nothing(backend):
    model = net()

    class Broken(Lookahead):
        def step(self, closure=None):
            super().step(closure)
            raise ArithmeticError

    optimizer = Broken(torch.optim.SGD(model.parameters(), 0.1))
    ema = EMA(model, 0.0)
    ema.attach(optimizer)
    backward(model)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert ema.step == 0
    optimizer.optimizer.step()
    assert ema.step == 1, "only its own"


def test_a_step_left_out_after_one_that_raised_updates_nothing(backend):
    model = net()

    class Accumulating(Lookahead):
        """Steps at first, and then only gathers gradients."""

        raises, steps = True, True

        def step(self, closure=None):
            if self.steps:
                super().step(closure)
            if self.raises:
                raise ArithmeticError

    optimizer = Accumulating(torch.optim.SGD(model.parameters(), 0.1))
    ema = EMA(model, 0.0)
    ema.attach(optimizer)
    backward(model)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.raises, optimizer.steps = False, False
    optimizer.step()
    assert ema.step == 0
    optimizer.steps = True
    optimizer.step()
    assert ema.step == 1


class Bare(torch.optim.SGD):
    """Without the base's __init__, which is what makes torch run hooks."""

    def __init__(self, params):
        made = torch.optim.SGD(params, 0.1)
        self.__dict__.update(made.__dict__)

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for tensor in group["params"]:
                    tensor.mul_(0.9)


def test_an_optimizer_that_never_called_its_base(backend):
    model = net()
    optimizer = Bare(model.parameters())
    ema = EMA(model, 0.0)
    ema.attach(optimizer)
    for step in range(1, 4):
        optimizer.step()
        assert ema.step == step
        assert equal(averages(ema), {name: tensor.detach() for name, tensor in model.named_parameters()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_while_swapped_is_refused_before_it_moves_anything(backend, dtype):
    model = net().to(dtype).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    backward(model.float()), model.to(dtype)
    optimizer.step()
    expected, raw = clones(averages(ema)), clones(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\), which would train the averages"), ema.swapped():
        optimizer.step()
    assert equal(averages(ema), expected)
    assert equal(dict(model.named_parameters()), raw)
    assert ema.step == 1
    optimizer.step()
    assert ema.step == 2


# ---- Sharpness-aware optimizers, whose own methods step another one, or nothing


class SAM(torch.optim.Optimizer):
    """As github.com/davda54/sam has it."""

    def __init__(self, params, base_optimizer=torch.optim.SGD, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([grad.norm(p=2) for grad in grads]).norm(p=2)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class DecoupledSAM(SAM):
    """As WSAM of pytorch_optimizer: it writes to the parameters after the step of its base."""

    def second_step(self, zero_grad=False):
        super().second_step(zero_grad)
        shrink(self)


class SAMByItself(SAM):
    """Without a base, so that no step() runs in its phases."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        del self.base_optimizer

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old_p"]).sub_(p.grad, alpha=0.1)


class BayesianSAM(SAMByItself):
    """As BSAM of pytorch_optimizer, whose third phase ends the step."""

    def third_step(self):
        shrink(self)

    def step(self, closure=None):
        super().step(closure)
        self.third_step()


def in_phases(model, optimizer):
    for phase in ("first_step", "second_step", "third_step"):
        if hasattr(optimizer, phase):
            optimizer.zero_grad()
            backward(model)
            getattr(optimizer, phase)()


def by_closure(model, optimizer):
    def closure():
        optimizer.zero_grad()
        backward(model)

    closure()
    optimizer.step(closure)


@pytest.mark.parametrize("step", [in_phases, by_closure])
@pytest.mark.parametrize("kind", [SAM, DecoupledSAM, SAMByItself, BayesianSAM])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_sharpness_aware_step_is_one_update(backend, kind, step, overlap):
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    attributes = set(vars(optimizer))
    checked, copies = Checked(model, optimizer, overlap), EMA(model, 0.0)
    handle = copies.attach(optimizer)
    for _ in range(3):
        step(model, optimizer)
        checked.after(taken=True)
        assert equal(averages(copies), {name: p.detach() for name, p in model.named_parameters()})
    handle.remove(), checked.handle.remove()
    assert set(vars(optimizer)) == attributes
    step(model, optimizer)
    checked.after(taken=False)


def test_a_first_step_is_no_update_and_is_refused_while_swapped(backend):
    model = net().eval()
    optimizer = SAM(model.parameters(), lr=0.1)
    checked = Checked(model, optimizer)
    in_phases(model, optimizer)
    checked.after(taken=True)
    raw = clones(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match=r"step\(\), which would train the averages"), checked.ema.swapped():
        optimizer.first_step()
    assert equal(dict(model.named_parameters()), raw)
    optimizer.first_step()
    checked.after(taken=False)
    optimizer.second_step()
    checked.after(taken=True)


@pytest.mark.parametrize("kind", [SAM, TimmLookahead, ScheduleFree])
def test_wrappers_save_and_load_the_averages(backend, kind):
    def setup():
        model = net()
        ema = EMA(model, 0.5)
        base = None if kind is SAM else torch.optim.SGD(model.parameters(), 0.1)
        optimizer = kind(base) if base else SAM(model.parameters(), lr=0.1)
        ema.attach(optimizer, save=True)
        return model, ema, optimizer

    model, ema, optimizer = setup()
    in_phases(model, optimizer) if kind is SAM else (backward(model), optimizer.step())
    _, other, loaded = setup()
    loaded.load_state_dict(optimizer.state_dict())
    assert (ema.step, other.step) == (1, 1)
    assert equal(averages(other), averages(ema))


# ---- Further wrappers


class ZeRO:
    """As DeepSpeed's optimizers: no torch.optim.Optimizer. It steps its base once for each group of parameters."""

    def __init__(self, base):
        self.optimizer = base

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        groups = self.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups
        shrink(self)


class SteppedByAnEngine(Wrapper):
    """As accelerate's wrapper for DeepSpeed, whose engine has stepped in backward()."""

    def step(self, closure=None):
        pass


def wrapped_both_ways(base):
    base.outer = Wrapper(base)
    return base.outer


WRAPS = {
    "ScheduleFree": ScheduleFree,
    "timm": TimmLookahead,
    "ZeRO": ZeRO,
    "of a wrapper": lambda base: Lookahead(ZeRO(base)),
    "engine": lambda base: SteppedByAnEngine(ZeRO(base)),
    "circle": wrapped_both_ways,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrappers_make_one_update_a_step(backend, wrap):
    model = net()
    groups = [{"params": layer.parameters()} for layer in model if list(layer.parameters())]
    assert len(groups) > 1
    optimizer = WRAPS[wrap](torch.optim.SGD(groups, 0.1))
    checked, copies = Checked(model, optimizer), EMA(model, 0.0)
    copies.attach(optimizer)
    for _ in range(3):
        backward(model)
        if wrap == "engine":
            optimizer.optimizer.step()
            checked.after(taken=True)
            optimizer.step()
            checked.after(taken=False)
        else:
            optimizer.step()
            checked.after(taken=True)
        assert equal(averages(copies), {name: p.detach() for name, p in model.named_parameters()})


def test_an_optimizer_that_holds_several_is_stepped_itself(backend):
    class Both(torch.optim.Optimizer):
        def __init__(self, params):
            params = list(params)
            super().__init__(params, {})
            self.first, self.second = torch.optim.SGD(params[:1], 0.1), torch.optim.Adam(params[1:], 0.1)

        def step(self, closure=None):
            self.first.step(), self.second.step()

    model = net()
    checked = Checked(model, Both(model.parameters()))
    for _ in range(2):
        backward(model)
        checked.optimizer.step()
        checked.after(taken=True)


# ---- No step was seen


LOOKS = {
    "swapped": lambda ema: ema.swapped().__enter__(),
    "state_dict": EMA.state_dict,
    "averaged_state_dict": EMA.averaged_state_dict,
    "copy_to": lambda ema: ema.copy_to(net()),
}


def trained_without_a_step(dtype=torch.float32):
    """By code of its own, as some optimizers do it, and past the version counters."""
    model = net().to(dtype)
    ema = EMA(model, 0.5)
    handle = ema.attach(torch.optim.SGD(model.parameters(), 0.1))
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return ema, handle


def test_weights_that_were_loaded_since_need_begin(backend, recwarn):
    """As the warning says."""
    ema, _ = trained_without_a_step()
    ema.begin()
    assert equal(averages(ema), parameters(ema.model))
    assert not recwarn


@pytest.mark.hazard(41, "guarded")
@pytest.mark.parametrize("look", LOOKS)
def test_a_trained_model_without_a_step_is_warned_of_once(backend, look, recwarn):
    ema, _ = trained_without_a_step()
    with pytest.warns(
        UserWarning, match=r"parameters have changed .* attached SGD was not seen to step, so the averages"
    ):
        LOOKS[look](ema)
    if look == "swapped":
        return
    recwarn.clear()
    for each in LOOKS:
        LOOKS[each](ema)
    assert not recwarn


def test_the_warning_of_no_step_says_what_helps(backend, recwarn):
    ema, handle = trained_without_a_step(torch.bfloat16)
    handle.remove()
    ema.update()
    with ema.swapped():
        pass
    assert ema.step == 1
    assert not recwarn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_warning_where_steps_are_to_come(backend, dtype, recwarn):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for options in ({}, {"buffers": "average"}, {"dtype": torch.bfloat16}):
        ema = EMA(model, [0.5, 0.9], **options)
        handle = ema.attach(optimizer)
        model(torch.randn(4, 3, dtype=dtype)).sum().backward()  # moves BatchNorm's statistics
        with ema.swapped():
            ema.state_dict()
        handle.remove()
    saved = EMA(copy.deepcopy(model), [0.5, 0.9]).state_dict()  # averages that were loaded are the user's
    with torch.no_grad():
        model[0].weight.add_(1)
    ema = EMA(model, [0.5, 0.9])
    ema.attach(optimizer)
    ema.load_state_dict(saved)
    with ema.swapped():
        pass
    assert not recwarn


# ---- Saved with the optimizer


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Wrapper, Lookahead])
def test_the_optimizers_state_holds_the_averages(backend, make_optimizer, wrap, tmp_path):
    def setup():
        model = net()
        optimizer = make_optimizer(model.parameters())
        return model, optimizer, EMA(model, [0.5, 0.9])

    model, optimizer, ema = setup()
    ema.attach(wrap(optimizer), save=True)
    for _ in range(3):
        backward(model)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    other_model, other_optimizer, other = setup()
    handle = other.attach(wrap(other_optimizer), save=True)
    other_model.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    assert other.step == 3
    assert all(equal(averages(other, k), averages(ema, k)) for k in range(2))
    assert optimizer.state_dict().keys() == {"state", "param_groups", "fused_ema"}
    handle.remove()
    assert other_optimizer.state_dict().keys() == {"state", "param_groups"}
    other_optimizer.load_state_dict(saved["optimizer"])  # as an optimizer alone would


def test_an_optimizers_state_without_averages_is_warned_of(backend):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    plain = optimizer.state_dict()
    ema.attach(optimizer, save=True)
    with pytest.warns(UserWarning, match="the optimizer's state has no averages under 'fused_ema'"):
        optimizer.load_state_dict(plain)


def fill(parameters, value):
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(value)
            parameter.grad = torch.ones_like(parameter)


def one(*tensors):
    """The only value that these tensors hold."""
    (value,) = {value for tensor in tensors for value in tensor.unique().tolist()}
    return value


@pytest.mark.filterwarnings("ignore:EMA.attach. the optimizer's state has no averages")
@pytest.mark.parametrize("history", ["none", "updated", "loaded"])
def test_a_state_without_averages_begins_them_at_the_next_step(backend, history):
    """With weights that are loaded before or after it, but only where there was nothing to go on with. The optimizer
    has a part of the model, so that it would not begin by itself."""
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), 1.0)
    plain = optimizer.state_dict()
    fill(model.parameters(), 1.0)
    ema = EMA(model, 0.5)
    if history == "updated":
        ema.update()
    elif history == "loaded":
        ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.attach(optimizer, save=True)
    fill(model.parameters(), 9.0)
    optimizer.load_state_dict(plain)
    fill(model.parameters(), 99.0)
    optimizer.step()
    trained = averages(ema)
    assert one(trained["0.weight"], trained["0.bias"]) == (98.5 if history == "none" else 49.5)
    optimizer.step()
    assert one(trained["0.weight"]) == (97.75 if history == "none" else 73.25)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_average_begins_with_what_is_there_at_the_first_step(backend, overlap, frozen):
    model = net()
    model[0].requires_grad_(not frozen)
    fill(model.parameters(), 1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, overlap)
    for value, expected in ((9.0, 8.5), (9.0, 8.25)):
        fill(model.parameters(), value)
        optimizer.step()
        assert one(*(averages(ema)[name] for name, p in model.named_parameters() if p.requires_grad)) == expected
    assert one(averages(ema)["0.weight"]) == (9.0 if frozen else 8.25)


@pytest.mark.parametrize("trained_by", ["another optimizer", "a forward pass"])
def test_what_else_was_trained_before_the_first_step_is_averaged(backend, trained_by):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fill(model.parameters(), 1.0)
    if trained_by == "another optimizer":
        ema, moved = EMA(model, 0.5), model[0].weight
        optimizers = [torch.optim.SGD(part.parameters(), 1.0) for part in model]
    else:
        ema, moved = EMA(model, 0.5, buffers="average"), model[1].running_mean
        optimizers = [torch.optim.SGD(model.parameters(), 1.0)]
        moved.fill_(1.0)
        ema.begin()
        moved.fill_(0.0)
    ema.attach(optimizers[-1])
    for optimizer in optimizers:
        optimizer.step()
    own = averages(ema)
    assert one(moved) == 0.0
    assert one(own["0.weight"], own["1.running_mean" if moved is model[1].running_mean else "1.weight"]) == 0.5


def test_the_parts_of_a_step_begin_nothing(backend):
    """In the second one the model has the weights that SAM looks at, though there was no update so far."""

    class SAM(torch.optim.SGD):
        def first_step(self):
            fill(self.param_groups[0]["params"], 100.0)

        def second_step(self):
            fill(self.param_groups[0]["params"], 1.0)
            self.step()

    model = net()
    optimizer = SAM(model.parameters(), 1.0)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    fill(model.parameters(), 1.0)
    optimizer.first_step()
    optimizer.second_step()
    assert one(*averages(ema).values()) == 0.5


def stepped():
    """A manager that is saved with its optimizer, after a step, and what both were before it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, save=True)
    start = copy.deepcopy(optimizer.state_dict())
    backward(model)
    optimizer.step()
    return ema, optimizer, start


def test_optimizer_and_averages_are_taken_over_together(backend):
    ema, optimizer, start = stepped()
    before = copy.deepcopy(ema.state_dict())
    start["param_groups"] *= 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(start)
    assert ema.step == 1
    assert equal(averages(ema), before["averages"][0])
    del start["param_groups"][1]
    optimizer.load_state_dict(start)
    assert ema.step == 0
    assert equal(averages(ema), start["fused_ema"]["averages"][0])


def test_a_swap_between_the_two_parts_of_a_load_is_seen(backend):
    ema, optimizer, start = stepped()
    own, true, swaps = clones(dict(ema.model.named_parameters())), clones(averages(ema)), []

    def swap(*_):
        swaps.append(ema.swapped())
        swaps[0].__enter__()

    optimizer.register_load_state_dict_pre_hook(swap)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) was called inside swapped\(\)"):
        optimizer.load_state_dict(start)
    swaps[0].__exit__(None, None, None)
    assert equal(dict(ema.model.named_parameters()), own)
    assert equal(averages(ema), true)


def test_decays_on_the_device_are_as_fine_as_the_numbers():
    decays = (0.9, 1 - 2.0**-40)
    for skipped, wanted in ((0.0, decays), (1.0, (1.0, 1.0))):
        found = fused_ema.manager.ema._unless(torch.tensor([skipped]), decays)
        assert found.dtype == torch.float64
        assert tuple(found.tolist()) == wanted


def test_averages_in_an_optimizers_state_are_checked(backend):
    model, other = net(), net(bias=False)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        EMA(each, 0.5).attach(optimizer, save=True)
    with pytest.raises(ValueError, match="state: expected the manager's names"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())


@pytest.mark.filterwarnings("ignore:EMA. the model's parameters have changed")
def test_the_step_that_makes_the_state_of_an_optimizer_is_no_update(make_optimizer):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = net()
    optimizer = make_optimizer(model.parameters())
    ema = EMA(model, decay=0.5)
    ema.attach(optimizer)
    with torch.no_grad():
        model[0].weight.add_(1)
    before = clones(averages(ema))
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    assert ema.step == 0
    assert equal(averages(ema), before)
    backward(model)
    optimizer.step()
    assert ema.step == 1
    assert not equal(averages(ema), before)


@pytest.mark.filterwarnings("ignore:EMA. the model's parameters have changed")
def test_two_managers_do_not_save_under_one_name(make_optimizer):
    model = net()
    optimizer = make_optimizer(model.parameters())
    first, second = EMA(model, decay=0.5), EMA(model, decay=0.9)
    handle = first.attach(optimizer, save=True)
    with pytest.raises(ValueError, match="another manager already saves"):
        second.attach(optimizer, save=True)
    assert equal(optimizer.state_dict()["fused_ema"]["averages"][0], averages(first))
    backward(model)
    optimizer.step()
    assert (first.step, second.step) == (1, 0)
    handle.remove()
    second.attach(optimizer, save=True)
    assert equal(optimizer.state_dict()["fused_ema"]["averages"][0], averages(second))
