"""fused_ema.dropin.EMAModel beside diffusers' own class, on a real UNet with random weights."""

import copy
import gc
import inspect
import pickle
import re
import subprocess
import sys
import types
import weakref

import diffusers
import numpy as np
import oracle
import pytest
import torch
from checkpoint_checks import same
from conftest import refused
from diffusers.training_utils import EMAModel as Theirs
from small_unet import clones, contents, moved, unet
from torch import nn

import fused_ema
from fused_ema.dropin import EMAModel, ema_model

WARM = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "min_decay": 0.1, "update_after_step": 2}
both = pytest.mark.parametrize(("one", "other"), [(Theirs, EMAModel), (EMAModel, Theirs)], ids=["to ours", "to theirs"])


def averaging(cls, model, **options):
    return cls(model.parameters(), 0.95, model_cls=type(model), model_config=model.config, **options)


def trained(cls, steps=5, **options):
    model = unet()
    ema = averaging(cls, model, **options)
    for _ in range(steps):
        ema.step(moved(model).parameters())
    return model, ema


def numbers(ema):
    """What a state holds beside tensors, and the decay of the last step."""
    return {**ema.state_dict(), "shadow_params": None}, ema.cur_decay_value


@pytest.fixture(params=[False, True], ids=["loop", "foreach"])
def foreach(request):
    return request.param


# ---- A step


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
        oracle.check_step(old, clones(model.parameters()), ours.shadow_params, ours.cur_decay_value, bitwise=True)
        theirs.step(model.parameters())
    assert [tensor.dtype for tensor in ours.shadow_params] == [tensor.dtype for tensor in theirs.shadow_params]


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
    assert plan.describe()["launches_per_update"] == 1
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


# ---- Evaluation


def test_store_copy_to_and_restore(foreach):
    (model, ours), (_, theirs) = trained(EMAModel, foreach=foreach), trained(Theirs, foreach=foreach)
    for average, value in zip(theirs.shadow_params, ours.shadow_params, strict=True):
        average.copy_(value)
    raw = clones(model.parameters())
    for ema in (ours, theirs):
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        assert same(model.parameters(), ours.shadow_params)
        ema.restore(model.parameters())
        assert same(model.parameters(), raw)
        assert ema.temp_stored_params is None
        with pytest.raises(RuntimeError, match="no `store\\(\\)`ed weights"):
            ema.restore(model.parameters())
    model.bfloat16()
    ours.copy_to(model.parameters())
    assert same(model.parameters(), [average.bfloat16() for average in ours.shadow_params])


def test_copy_to_inside_autocast_shows():
    ours = EMAModel([nn.Parameter(torch.ones(4, 4))])
    weight = nn.Parameter(torch.zeros(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 4) @ weight).max() == 0  # autocast keeps a cast of the weight
        ours.store([weight])
        ours.copy_to([weight])
        assert (torch.ones(2, 4) @ weight).min() == 4
        ours.restore([weight])
        assert (torch.ones(2, 4) @ weight).max() == 0


# ---- States and folders


@both
def test_states_go_both_ways(one, other, tmp_path):
    model, ema = trained(one, **WARM)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    fresh = averaging(other, unet(seed=1))
    fresh.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert same(fresh.shadow_params, ema.shadow_params)
    assert numbers(fresh)[0] == numbers(ema)[0]
    assert fresh.state_dict().keys() == ema.state_dict().keys()
    again = averaging(one, unet(seed=2))
    again.load_state_dict(fresh.state_dict())
    moved(model)
    again.step(model.parameters()), ema.step(model.parameters())
    assert same(again.shadow_params, ema.shadow_params), "the same class goes on with the same bits"
    assert numbers(again) == numbers(ema)


@both
def test_folders_go_both_ways(one, other, tmp_path):
    _, ema = trained(one, **WARM)
    same_state = averaging(other, unet(seed=1))
    same_state.load_state_dict(ema.state_dict())
    for name, each in (("one", ema), ("other", same_state)):
        each.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    loaded = other.from_pretrained(tmp_path / "one", diffusers.UNet2DModel, foreach=True)
    assert type(loaded) is other
    assert loaded.foreach
    assert same(loaded.shadow_params, ema.shadow_params)
    assert numbers(loaded)[0] == numbers(ema)[0]
    assert same(diffusers.UNet2DModel.from_pretrained(tmp_path / "one").parameters(), ema.shadow_params)


def test_states_of_the_manager():
    model, ours = trained(EMAModel, **WARM)
    manager = fused_ema.EMA(model)
    fused_ema.checkpoints.restore(manager, ours.state_dict())
    averages = manager.state_dict()["averages"][0]
    assert same([averages[name] for name, _ in model.named_parameters()], ours.shadow_params)
    fresh = averaging(EMAModel, unet(seed=1))
    fresh.load_state_dict(fused_ema.checkpoints.export(manager, "diffusers"))
    assert same(fresh.shadow_params, ours.shadow_params)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("decay", 1.5), ("min_decay", 1), ("power", "2/3"), ("shadow_params", 3), ("shadow_params", [3])],
)
def test_a_state_that_is_refused_changes_nothing(entry, value):
    _, ours = trained(EMAModel)
    before, averages = numbers(ours), ours.shadow_params
    state = {**trained(Theirs, steps=3, **WARM)[1].state_dict(), entry: value}
    refused(ValueError, lambda: ours.load_state_dict(state), ours.shadow_params)
    assert numbers(ours) == before
    assert ours.shadow_params is averages


# ---- Refusals


def fewer(model):
    return list(model.parameters())[:-1], "as many as shadow_params"


def reordered(model):
    return list(model.parameters())[::-1], "parameters[0]: expected shape"


def that_would_be_broadcast(model):
    listed = list(model.parameters())
    return [
        nn.Parameter(torch.zeros(1)) if x.dim() == 1 else x for x in listed
    ], "expected shape (4,), as shadow_params"


def without_values(model):
    return model.to("meta").parameters(), "on the meta device"


each_refusal = pytest.mark.parametrize(
    "found", [fewer, reordered, that_would_be_broadcast, without_values], ids=lambda f: f.__name__
)


@each_refusal
def test_a_step_that_is_refused_writes_and_counts_nothing(backend, foreach, found):
    model, ours = trained(EMAModel, foreach=foreach)
    before = numbers(ours)
    parameters, words = found(copy.deepcopy(model))
    refused(ValueError, lambda: ours.step(parameters), ours.shadow_params, names=[words])
    assert numbers(ours) == before
    ours.step(model.parameters())
    assert ours.optimization_step == 6


@pytest.mark.parametrize("found", [fewer, reordered, that_would_be_broadcast], ids=lambda f: f.__name__)
def test_a_copy_that_is_refused_writes_nothing(foreach, found):
    model, ours = trained(EMAModel, foreach=foreach)
    other = copy.deepcopy(model)
    parameters = found(other)[0]
    ours.store(model.parameters())
    for call in (ours.store, ours.copy_to, ours.restore):
        refused(ValueError, lambda call=call: call(iter(parameters)), parameters, ours.temp_stored_params)
    ours.copy_to(other.parameters())
    ours.restore(other.parameters())
    assert same(other.parameters(), model.parameters())


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan")])
def test_decays_outside_0_and_1_are_refused(decay):
    model, ours = trained(EMAModel)
    ours.get_decay = lambda _: decay
    before = numbers(ours)
    refused(ValueError, lambda: ours.step(moved(model).parameters()), ours.shadow_params, names=["expected a value in"])
    assert numbers(ours) == before


# ---- DeepSpeed's ZeRO-3


class Gathered:
    """Stands in for deepspeed.zero.GatheredParameters: parameters have their values inside the block alone."""

    def __init__(self, parameters, modifier_rank):
        assert modifier_rank is None
        self.parameters = parameters

    def __enter__(self):
        for each in self.parameters:
            each.data = each.whole

    def __exit__(self, *_):
        for each in self.parameters:
            each.data = torch.empty(0)


def test_parameters_that_zero_3_has_sharded_are_gathered(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "deepspeed", types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=Gathered))
    )
    model, ours = trained(EMAModel)
    _, expected = trained(EMAModel)
    expected.step(clones(moved(model).parameters())), expected.step(model.parameters())
    ours.step(clones(model.parameters()))
    for each in model.parameters():
        each.whole, each.ds_numel, each.data = each.detach().clone(), each.numel(), torch.empty(0)
    ours.step(model.parameters())
    assert same(ours.shadow_params, expected.shadow_params)
    assert not any(each.numel() for each in model.parameters())
    for call in (ours.store, ours.copy_to):
        refused(
            ValueError, lambda call=call: call(model.parameters()), names=["within deepspeed.zero.GatheredParameters"]
        )
    with Gathered(list(model.parameters()), None):
        ours.step(model.parameters())
        ours.copy_to(model.parameters())
    assert ours.optimization_step == 8
