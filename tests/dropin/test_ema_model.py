"""fused_ema.dropin.EMAModel beside diffusers' own class, on a real UNet: its steps, and the class itself."""

import copy
import gc
import inspect
import itertools
import pickle
import re
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import oracle
import pytest
import torch
from checkpoint_checks import same
from diffusers.training_utils import EMAModel as Theirs
from small_unet import WARM, averaging, clones, each_foreach, moved, numbers, trained, unet
from torch import nn

import fused_ema
from fused_ema.dropin import EMAModel, ema_model

# ---- A step


@each_foreach
@pytest.mark.parametrize("options", [{}, WARM], ids=["plain", "warm-up"])
def test_a_step_keeps_the_contract_and_is_near_theirs(backend, foreach, options):
    model = unet()
    ours, theirs = (averaging(cls, model, foreach=foreach, **options) for cls in (EMAModel, Theirs))
    decays = []
    for n in range(1, 9):
        moved(model)
        old, parameters = clones(theirs.shadow_params), clones(model.parameters())
        for average, value in zip(ours.shadow_params, old, strict=True):
            average.copy_(value)
        assert ours.step(model.parameters()) is theirs.step(model.parameters()) is None
        assert numbers(ours) == numbers(theirs)
        assert ours.optimization_step == n
        decay = ours.cur_decay_value
        decays.append(decay)
        oracle.check_step(old, parameters, ours.shadow_params, decay, bitwise=backend != "torch")
        e, p, o, t = (
            oracle.flat(x).double().numpy() for x in (old, parameters, ours.shadow_params, theirs.shadow_params)
        )
        # What docs/dropin-emamodel.md states.
        allowed = oracle.ulp(np.maximum(abs(o), abs(t)), torch.float32) + 2.5 * 2.0**-23 * (1 - decay) * abs(p - e)
        assert (abs(o - t) <= allowed * oracle.SLACK).all()
    assert decays[0] == 0
    assert 0.2 < decays[-1] < 0.95


@pytest.mark.parametrize(("average", "parameter"), [*oracle.PAIRS[:11], *oracle.NARROW_PAIRS], ids=str)
@pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")
def test_types(average, parameter):
    """Those of the averages are what the parameters had, or what `to` was asked for, as in diffusers."""
    model = unet(dtype=parameter)
    ours, theirs = (averaging(cls, model) for cls in (EMAModel, Theirs))
    assert {tensor.dtype for tensor in ours.shadow_params} == {parameter}
    ours.to(dtype=average), theirs.to(dtype=average)
    for _ in range(3):
        old = clones(ours.shadow_params)
        ours.step(moved(model).parameters())
        bitwise = fused_ema.backend("cpu") != "torch"
        oracle.check_step(old, clones(model.parameters()), ours.shadow_params, ours.cur_decay_value, bitwise=bitwise)
        theirs.step(model.parameters())
    assert [tensor.dtype for tensor in ours.shadow_params] == [tensor.dtype for tensor in theirs.shadow_params]


@each_foreach
def test_frozen_parameters_are_copied(backend, foreach):
    model, ours = trained(EMAModel, foreach=foreach)
    weight = model.conv_in.weight
    at = [id(parameter) for parameter in model.parameters()].index(id(weight))
    for frozen in (True, False, True):
        weight.requires_grad_(not frozen)
        old = clones(ours.shadow_params)
        ours.step(moved(model).parameters())
        assert torch.equal(ours.shadow_params[at], weight) == frozen
        if frozen:
            old[at] = weight.detach()
        oracle.check_step(
            old, clones(model.parameters()), ours.shadow_params, ours.cur_decay_value, bitwise=backend != "torch"
        )


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def given_data(model):
    model.conv_out.weight.data = model.conv_out.weight.detach().clone()


def channels_last(model):
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [assigned, given_data, channels_last, nn.Module.double], ids=lambda f: f.__name__)
def test_replaced_parameters_are_followed(backend, change):
    model, ours = trained(EMAModel)
    change(model)
    for _ in range(2):
        old = clones(ours.shadow_params)
        ours.step(moved(model).parameters())
        oracle.check_step(
            old, clones(model.parameters()), ours.shadow_params, ours.cur_decay_value, bitwise=backend != "torch"
        )


def test_a_step_is_one_call_of_a_plan_that_is_kept(monkeypatch):
    plans = []
    make = ema_model._new_plan
    monkeypatch.setattr(ema_model, "_new_plan", lambda pairs: plans.append(make(pairs)) or plans[-1])
    model, ours = trained(EMAModel)
    (plan,) = plans
    assert plan.describe()["launches_per_update"] == 1 or plan.describe()["backend"] == "torch"
    assert plan.describe()["tensors"] == len(ours.shadow_params)
    runs, run = [], plan.prepared.run
    monkeypatch.setattr(plan.prepared, "run", lambda *args: runs.append(args[0].op) or run(*args))
    ours.step(moved(model).parameters())
    ours.step(list(moved(model).parameters()))  # a list, which spares the walk over the modules
    assert runs == ["update"] * 2
    model.conv_in.weight = nn.Parameter(model.conv_in.weight.detach().clone())
    ours.step(moved(model).parameters())
    assert plans == [plan], "a parameter that was replaced by its like is taken into the plan"


def test_parameters_are_not_kept_alive():
    model, ours = trained(EMAModel)
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() for reference in references)
    assert ours.optimization_step == 5


def test_decay_1_writes_nothing():
    model, ours = trained(EMAModel)
    ours.decay = ours.min_decay = 1.0
    old = clones(ours.shadow_params)
    ours.step(moved(model).parameters())
    assert same(ours.shadow_params, old)
    assert (ours.optimization_step, ours.cur_decay_value) == (6, 1.0)


def test_what_help_calls_equivalent():
    lines = EMAModel.step.__doc__.partition("Equivalent to::\n")[2].splitlines()
    lines = itertools.takewhile(lambda line: not line or line.startswith(" " * 12), lines)
    model, ours = trained(EMAModel)
    moved(model).conv_in.requires_grad_(False)
    other = copy.deepcopy(ours)
    ours.step(model.parameters())
    exec(textwrap.dedent("\n".join(lines)), {"torch": torch, "ema": other, "parameters": list(model.parameters())})
    assert numbers(other) == numbers(ours)
    for found, expected in zip(other.shadow_params, ours.shadow_params, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_no_parameters():
    ours = EMAModel([])
    ours.step([])
    ours.store([]), ours.copy_to([]), ours.restore([])
    assert ours.optimization_step == 1


# ---- The class


def test_the_class_and_its_attributes():
    assert issubclass(EMAModel, Theirs)
    assert inspect.signature(EMAModel) == inspect.signature(Theirs)
    (model, ours), (_, theirs) = trained(EMAModel, **WARM), trained(Theirs, **WARM)
    assert isinstance(ours, Theirs)
    held = {name: value for name, value in vars(ours).items() if name not in ("_plan", "_averaged")}
    plain = {name: value for name, value in held.items() if name != "shadow_params"}
    assert held.keys() == vars(theirs).keys()
    assert plain == {name: value for name, value in vars(theirs).items() if name != "shadow_params"}
    assert [ours.get_decay(n) for n in range(50)] == [theirs.get_decay(n) for n in range(50)]
    assert ours.temp_stored_params is None
    ours.store(model.parameters())
    assert same(ours.temp_stored_params, model.parameters())


@pytest.mark.parametrize(
    "options", [{"max_value": 0.7}, {"min_value": 0.3}, {"device": "cpu"}, {}, {"max_value": None}], ids=str
)
def test_deprecated_arguments(options):
    model, found = unet(), []
    for cls in (Theirs, EMAModel):
        with pytest.warns(FutureWarning) as caught:
            found.append((cls(model, **options), [str(each.message) for each in caught]))
    (theirs, said), (ours, also_said) = found
    assert numbers(ours) == numbers(theirs)
    assert ours.use_ema_warmup
    assert also_said == said
    for ema in (theirs, ours):
        with pytest.warns(FutureWarning, match="module"):
            ema.step(model)
    assert same(ours.shadow_params, model.parameters())


def test_a_deprecated_call_points_at_the_caller():
    ours = EMAModel((model := unet()).parameters())
    with pytest.warns(FutureWarning, match=re.escape("pass module.parameters()")) as caught:
        ours.step(model)
    assert [each.filename for each in caught] == [__file__]


def test_pickles_and_copies_go_on():
    model, ours = trained(EMAModel)
    others = [pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)]
    moved(model)
    for each in (ours, *others):
        each.step(model.parameters())
    for each in others:
        assert type(each) is EMAModel
        assert same(each.shadow_params, ours.shadow_params)
        assert numbers(each) == numbers(ours)
    assert b"fused_ema.dropin\x94" in pickle.dumps(ours), "the name that users import"


def test_a_decay_of_ones_own():
    class Constant(EMAModel):
        def get_decay(self, optimization_step):
            assert self.optimization_step == optimization_step
            return 0.5

    ours = Constant([nn.Parameter(torch.zeros(3))])
    ours.step([nn.Parameter(torch.ones(3))])
    assert (ours.shadow_params[0].tolist(), ours.cur_decay_value) == ([0.5] * 3, 0.5)


def test_it_is_loaded_when_asked_for():
    lines = [
        "import sys, fused_ema, fused_ema.dropin",
        "assert 'diffusers' not in sys.modules",
        "from fused_ema.dropin import EMAModel",
        "from diffusers.training_utils import EMAModel as Theirs",
        "assert issubclass(EMAModel, Theirs) and fused_ema.dropin.EMAModel is EMAModel",
    ]
    subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'EMAModels'"):
        fused_ema.dropin.EMAModels  # noqa: B018
