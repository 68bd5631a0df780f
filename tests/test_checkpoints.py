"""Checkpoints of other packages: round trips through the packages themselves, refusals that change nothing, files that
run nothing."""

import argparse
import ast
import copy
import importlib.util
import os
import pickle
import re
import sys
import types
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import refused
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_ema
from fused_ema import checkpoints
from fused_ema.checkpoints import LAYOUTS, export, load, restore, save_safetensors
from fused_ema.schedules import constant, exponential_ramp, half_life, inverse_power, power_function, tf_warmup


class Net(nn.Module):
    """Buffers, a tied weight, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


PARAMETERS = ["frozen", "embed.weight", "norm.weight", "norm.bias", "middle.weight", "middle.bias"]


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    train(model)
    return model


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.3)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffer + 1 if "num_batches" in name else torch.rand(buffer.shape))


# ---- The packages


class Peer:
    """An average of another package, and a manager whose decays are the same."""

    def __init__(self, layout, schedule, model, average, update, module=None, after=0):
        self.layout, self.schedule, self.after, self.model = layout, schedule, after, model
        self.average, self._update, self.module = average, update, module

    def train(self, steps=6):
        for _ in range(steps):
            train(self.model)
            self._update()
        return self

    def manager(self, **options):
        return fused_ema.EMA(self.model, self.schedule, update_after_step=self.after, **options)

    def averages(self):
        """In the order of model.parameters()."""
        listed = self.module.parameters() if self.module is not None else self.average.shadow_params
        return [tensor.detach() for tensor in listed]

    def state(self):
        return {"state_dict_ema": self.module.state_dict()} if self.layout == "timm" else self.average.state_dict()

    def take(self, state):
        if self.layout == "timm":
            self.module.load_state_dict(state["state_dict_ema"])
        else:
            self.average.load_state_dict(state)

    def count(self):
        """0 where there is none."""
        return int((self.layout != "timm" and self.state()[checkpoints._MARKS[self.layout][0]]) or 0)

    def go_on(self, ema):
        """Some more steps of both, which agree."""
        for _ in range(5):
            self.train(1)
            ema.update()
        for average, theirs in zip(ours(ema), self.averages(), strict=True):
            if self.layout != "timm" or average.shape != (7, 4):  # it moves a tied weight once for each name
                torch.testing.assert_close(average, theirs, rtol=1e-5, atol=1e-6)


def averaged_model(model, **options):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), **options)
    return Peer(
        "averaged_model", constant(0.9), model, average, lambda: average.update_parameters(model), average.module
    )


def timm(model):
    average = timm_files().ModelEmaV3(model, decay=0.9)
    return Peer("timm", constant(0.9), model, average, lambda: average.update(model), average.module)


def diffusers(model):
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    warm = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75}
    average = training_utils.EMAModel(model.parameters(), 0.95, min_decay=0.1, update_after_step=3, **warm)
    schedule = inverse_power(0.95, 2.0, 0.75, 0.1, start=3)
    return Peer("diffusers", schedule, model, average, lambda: average.step(model.parameters()))


def diffusers_short(model):
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    average = training_utils.EMAModel(model.parameters(), 0.95)
    return Peer("diffusers", tf_warmup(0.95), model, average, lambda: average.step(model.parameters()), after=1)


def ema_pytorch(model, **options):
    library = pytest.importorskip("ema_pytorch")
    average = library.EMA(model, beta=0.95, update_after_step=3, update_every=1, **options)
    return Peer("ema_pytorch", inverse_power(0.95, start=3), model, average, average.update, average.ema_model)


def torch_ema(model):
    average = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), 0.95)
    return Peer("torch_ema", tf_warmup(0.95), model, average, average.update)


def torch_ema_constant(model):
    average = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), 0.95, False)
    return Peer("torch_ema", constant(0.95), model, average, average.update)


ALL = [averaged_model, timm, diffusers, diffusers_short, ema_pytorch, torch_ema, torch_ema_constant]


def peers(*kinds):
    return pytest.mark.parametrize("kind", kinds or ALL, ids=lambda kind: kind.__name__)


@cache
def timm_files():
    """timm's own files: `import timm` needs torchvision, which what is tested here does not."""
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("no timm")
    folder = Path(package.origin).parent
    sys.modules["timm_files"] = types.ModuleType("timm_files")
    sys.modules["timm_files"].__path__ = []

    def real(name, file):
        spec = importlib.util.spec_from_file_location(f"timm_files.{name}", folder / file)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
        return sys.modules[spec.name]

    model_ema, helpers = real("model_ema", "utils/model_ema.py"), real("_helpers", "models/_helpers.py")
    # Of utils/model.py, which imports torchvision, the two functions that the saver takes from it.
    tree = ast.parse((folder / "utils" / "model.py").read_text())
    wanted = ("unwrap_model", "get_state_dict")
    tree.body = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in wanted]
    model = sys.modules["timm_files.model"] = types.ModuleType("timm_files.model")
    model.ModelEma = model_ema.ModelEma
    exec(compile(tree, "timm/utils/model.py", "exec"), vars(model))
    return types.SimpleNamespace(
        ModelEmaV3=model_ema.ModelEmaV3,
        CheckpointSaver=real("checkpoint_saver", "utils/checkpoint_saver.py").CheckpointSaver,
        load_checkpoint=helpers.load_checkpoint,
    )


# ---- Comparing


def ours(ema, index=0):
    """The averages, in the order of model.parameters()."""
    averages = ema.state_dict()["averages"][index]
    return [averages[name] for name in PARAMETERS if name in averages]


def raw(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(found, wanted):
    """Bitwise, in type and in shape."""
    found, wanted = list(found), list(wanted)
    return len(found) == len(wanted) > 0 and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))
        for a, b in zip(found, wanted, strict=True)
    )


def contents(value):
    """All of a state, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: contents(each) for key, each in value.items()}
    return [contents(each) for each in value] if isinstance(value, list) else value


def refuses(ema, state, *words, error=ValueError, **options):
    """restore() raises, with these words in its message, and changes nothing."""
    before = contents(ema.state_dict())
    refused(error, lambda: restore(ema, state, **options), ema.model, *ema.state_dict()["averages"], names=words)
    assert contents(ema.state_dict()) == before


def good(layout="averaged_model"):
    """A manager and a state that fits it."""
    ema = fused_ema.EMA(net(), tf_warmup(0.9))
    ema.update()
    return ema, export(ema, layout)


def values_of(layout, state):
    """A dict or a list of the averages in a state, and where in it middle.bias is."""
    if layout in ("diffusers", "torch_ema"):
        return state["shadow_params"], PARAMETERS.index("middle.bias")
    return state.get("state_dict_ema", state), checkpoints._PREFIXES[layout] + "middle.bias"


# ---- Round trips


@peers()
def test_restore_and_go_on(kind, tmp_path):
    peer = kind(net()).train()
    ema = peer.manager()
    assert not same(ours(ema), peer.averages())
    torch.save(peer.state(), tmp_path / "theirs")
    restore(ema, load(tmp_path / "theirs"))
    assert same(ours(ema), peer.averages())
    assert ema.step == peer.count() == (0 if kind in (timm, torch_ema_constant) else 6)
    peer.go_on(ema)
    assert not same(ours(ema), peer.model.parameters())


def test_a_state_without_a_count_where_no_update_copies():
    """What the next update does is what counts, not what the schedule says of a step without one."""
    state = {"state_dict_ema": net().state_dict()}
    restore(fused_ema.EMA(net(), inverse_power(0.999), update_every=4), state)  # 0 at step 1, more at step 4
    resumed = fused_ema.EMA(net(), power_function(0.1), update_every=4)
    for schedule, options in ((power_function(0.1), {"update_every": 4}), (constant(0.9), {"update_after_step": 1})):
        with pytest.raises(ValueError, match="counts no steps, and the next update would copy: pass step="):
            restore(fused_ema.EMA(net(), schedule, **options), state)
    for _ in range(5):
        resumed.update()
    restore(resumed, state)


@peers()
def test_export_and_go_on(kind, tmp_path):
    peer = kind(net())
    ema = peer.manager()
    for _ in range(7):
        train(peer.model)
        ema.update()
    torch.save(export(ema, peer.layout), tmp_path / "ours")
    state = load(tmp_path / "ours")
    assert not same(ours(ema), peer.averages())
    peer.take(state)
    assert same(ours(ema), peer.averages())
    assert peer.count() == (0 if kind in (timm, torch_ema_constant) else 7)
    assert contents(peer.state()) == contents(state)
    peer.go_on(ema)


def test_a_checkpoint_that_timm_saved(tmp_path):
    peer = timm(net()).train()
    optimizer = torch.optim.SGD(peer.model.parameters(), lr=0.1, momentum=0.9)
    args = argparse.Namespace(model="net", lr=0.1, opt_betas=None)
    saver = timm_files().CheckpointSaver(
        peer.model, optimizer, args, model_ema=peer.average, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(3, 71.5)
    found = load(tmp_path / "last.pth.tar")
    assert (found["epoch"], found["args"]) == (3, args)
    ema = peer.manager()
    restore(ema, found)
    assert same(ours(ema), peer.averages())


def test_a_checkpoint_that_timm_loads(tmp_path):
    model = net()
    ema = fused_ema.EMA(nn.DataParallel(model))
    train(model)
    ema.update()
    torch.save({"epoch": 3, "state_dict": model.state_dict(), **export(ema, "timm")}, tmp_path / "last.pth.tar")
    timm_files().load_checkpoint(fresh := net(seed=5), str(tmp_path / "last.pth.tar"))
    assert same(fresh.parameters(), ours(ema))
    (fresh := net(seed=5)).load_state_dict(load(tmp_path / "last.pth.tar")["state_dict_ema"])
    assert same(fresh.parameters(), ours(ema))


@peers()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_averages_are_widened(kind, dtype):
    peer = kind(net(dtype)).train()
    ema, narrow = peer.manager(), peer.manager(dtype=dtype)
    restore(ema, peer.state())
    restore(narrow, peer.state())
    assert same(ours(ema), [tensor.float() for tensor in peer.averages()])
    assert same(ours(narrow), peer.averages())


@peers()
def test_wide_averages_are_refused(kind):
    peer = kind(net()).train()
    refuses(peer.manager(dtype=torch.bfloat16), peer.state(), "expected bfloat16, found float32")
    peer = kind(net(torch.float64)).train()
    refuses(fused_ema.EMA(net()), peer.state(), "expected float32, found float64")


@peers()
def test_float32_averages_of_a_bfloat16_model(kind):
    peer = kind(net(torch.bfloat16))
    ema = peer.manager()
    train(peer.model)
    ema.update()
    peer.take(export(ema, peer.layout))
    kept = peer.layout == "diffusers"  # which keeps the types of a state; the others cast to the model's
    assert same(peer.averages(), ours(ema) if kept else [tensor.bfloat16() for tensor in ours(ema)])


@peers(lambda model: averaged_model(model, use_buffers=True), timm, ema_pytorch)
def test_averaged_buffers(kind):
    peer = kind(net()).train()
    ema = peer.manager(buffers="average")
    restore(ema, peer.state())
    averages = ema.state_dict()["averages"][0]
    assert same([averages["norm.running_mean"]], [peer.module.norm.running_mean])
    assert not same([averages["norm.running_mean"]], [peer.model.norm.running_mean])
    other = kind(net(seed=1))
    other.take(export(ema, peer.layout))
    assert same([averages["norm.running_var"]], [other.module.norm.running_var])
    assert same([peer.model.norm.num_batches_tracked], [other.module.norm.num_batches_tracked])


def test_what_is_not_averaged_is_the_models():
    peer = averaged_model(net()).train()
    ema = peer.manager(select=lambda name, tensor: name.startswith("norm"))
    train(peer.model)
    before = contents(peer.model.state_dict())
    restore(ema, peer.state())
    assert contents(peer.model.state_dict()) == before
    assert same(ours(ema), peer.module.norm.parameters())
    exported = export(ema, "averaged_model")
    for name in ("middle.weight", "norm.running_mean"):
        assert same([exported[f"module.{name}"]], [peer.model.state_dict()[name]])
    assert not any(value.requires_grad for value in exported.values())
    state = peer.state()
    state["module.norm.running_mean"] = "not read"
    restore(ema, state)


def test_positions():
    model = net()
    assert [name for name, _ in model.named_parameters()] == PARAMETERS
    ema = fused_ema.EMA(model, select=lambda name, tensor: name != "norm.bias")
    for layout in ("diffusers", "torch_ema"):
        shadows = export(ema, layout)["shadow_params"]
        tensors = {**dict(model.named_parameters()), **ema.state_dict()["averages"][0]}
        assert [tensor.data_ptr() for tensor in shadows] == [tensors[name].data_ptr() for name in PARAMETERS]
        assert not any(tensor.requires_grad for tensor in shadows)


@peers(diffusers, torch_ema)
def test_some_parameters_only(kind, monkeypatch):
    model = net()
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    with monkeypatch.context() as patched:
        patched.setattr(Net, "parameters", lambda self: iter(trainable))
        peer = kind(model).train()
    assert len(peer.averages()) == 5
    ema = peer.manager(select=lambda name, tensor: tensor.requires_grad)
    refuses(ema, peer.state(), "expected 6 tensors", "found 5", "`parameters`")
    restore(ema, peer.state(), parameters=iter(trainable))
    assert same(ours(ema), peer.averages())
    train(model)
    ema.update()
    peer.take(export(ema, peer.layout, parameters=iter(trainable)))
    assert same(ours(ema), peer.averages())
    refuses(peer.manager(), peer.state(), "'frozen' only in the manager", parameters=trainable)
    with pytest.raises(ValueError, match=r"parameters: expected those of the manager's model, found others at \[1\]"):
        export(ema, peer.layout, parameters=[model.frozen, torch.zeros(3)])


@peers()
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))],
    ids=["module", "_orig_mod", "both"],
)
def test_wrapped_models(kind, wrap):
    peer = kind(net()).train()
    ema = fused_ema.EMA(wrap(net(seed=3)), peer.schedule)
    restore(ema, peer.state())
    assert same(ours(ema), peer.averages())
    state = export(ema, peer.layout)
    wrapped = kind(net(seed=4) if kind is timm else wrap(net(seed=4)))
    wrapped.take(state)  # strictly: by its names
    assert same(ours(ema), wrapped.averages())
    plain = fused_ema.EMA(net(seed=5))
    restore(plain, {"state_dict_ema": wrap(wrapped.module).state_dict()} if kind is timm else wrapped.state())
    assert same(ours(ema), ours(plain))


def test_one_of_several_averages(tmp_path):
    peer = averaged_model(net()).train()
    ema = fused_ema.EMA(peer.model, [0.5, 0.9, 0.99])
    train(peer.model)
    ema.update()
    others = copy.deepcopy([ours(ema, 0), ours(ema, 2)])
    restore(ema, peer.state(), index=1)
    assert same(ours(ema, 1), peer.averages())
    assert same(ours(ema, 0), others[0])
    assert same(ours(ema, 2), others[1])
    for layout in LAYOUTS:
        single = fused_ema.EMA(peer.model)
        torch.save(export(ema, layout, 1), tmp_path / "one of several")
        torch.save(export(single, layout), tmp_path / "single")
        one, alone = (os.path.getsize(tmp_path / name) for name in ("one of several", "single"))
        assert one < 1.5 * alone, "the others went along"
        restore(single, load(tmp_path / "one of several"))
        assert same(ours(single), ours(ema, 1))
    for index in (-1, 3):
        refuses_index = pytest.raises(IndexError, match="expected one of 3 averages")
        with refuses_index:
            export(ema, "diffusers", index)
        with refuses_index:
            restore(ema, peer.state(), index=index)


def test_schedules_stay_and_the_decay_is_theirs():
    state = {**good("ema_pytorch")[1], "step": torch.tensor(40)}
    for schedule, decay in [(inverse_power(0.7, start=2), 0.7), (lambda n: n / 100, 0.4), (tf_warmup(0.9), 41 / 50)]:
        ema = fused_ema.EMA(net(), schedule)
        restore(ema, state)
        assert ema.schedules == (schedule,)
        assert (ema.step, ema.decay) == (40, decay), "of update 40"


# The decays at updates 10 and on that the two packages with a schedule go on with: ours, or our latest one.
@pytest.mark.parametrize(
    ("schedule", "diffusers_too", "torch_ema_too"),
    [
        (constant(0.75), True, True),
        (half_life(4), True, True),
        (tf_warmup(0.6), True, True),
        (inverse_power(0.7, 3.0, 0.5, 0.5, 2), True, False),
        (exponential_ramp(0.9, 10.0), False, False),
        (power_function(0.1), False, False),
        (lambda n: n / 100, False, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("after", [0, 2])
def test_decays_go_along(schedule, diffusers_too, torch_ema_too, after):
    model = net()
    ema = fused_ema.EMA(model, schedule, update_after_step=after)
    for _ in range(9 + after):
        ema.update()
    wanted, latest = [schedule(n) for n in range(10, 40)], [schedule(9)] * 30
    theirs = diffusers(model).average
    theirs.load_state_dict(export(ema, "diffusers"))
    asked = [theirs.get_decay(theirs.optimization_step + k) for k in range(1, 31)]
    assert asked == pytest.approx(wanted if diffusers_too else latest, rel=1e-14)
    theirs, took = torch_ema(model).average, []
    theirs.load_state_dict(export(ema, "torch_ema"))
    for _ in range(30):
        for shadow, parameter in zip(theirs.shadow_params, model.parameters(), strict=True):
            shadow.fill_(1)
            parameter.data.fill_(0)
        theirs.update()
        took.append(theirs.shadow_params[0].mean().item())
    assert took == pytest.approx(wanted if torch_ema_too else latest, rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "key", "step"),
    [
        ("averaged_model", "n_averaged", 4 + 3 * 6),
        ("diffusers", "optimization_step", 7),
        ("ema_pytorch", "step", 7),
        ("torch_ema", "num_updates", 4 + 7),
    ],
)
def test_counts_where_not_every_step_is_an_update(layout, key, step):
    ema = fused_ema.EMA(net(), tf_warmup(0.9), update_every=3, update_after_step=4)
    for seven in (7, torch.tensor(7), torch.tensor([7])):  # the last as older ones of ema_pytorch have it
        restore(ema, {**export(ema, layout), key: seven})
        assert ema.step == step
        assert (ema.update_every, ema.update_after_step) == (3, 4)
        assert export(ema, layout)[key] == 7
        restore(ema, {**export(ema, layout), key: 0})
        assert ema.step == export(ema, layout)[key] == 0


@pytest.mark.parametrize(("step", "n_averaged"), [(1, 0), (2, 1), (3, 2)])
def test_the_copy_that_averaged_model_begins_with_counts_from_its_step_on(step, n_averaged):
    ema = fused_ema.EMA(net(), 0.9, update_after_step=2)
    for _ in range(step):
        ema.update()
    assert export(ema, "averaged_model")["n_averaged"] == n_averaged


def test_the_online_model_of_ema_pytorch():
    model = net()
    ema = fused_ema.EMA(model)
    train(model)
    theirs = ema_pytorch(net(seed=7))
    theirs.take(export(ema, "ema_pytorch"))
    assert contents(theirs.model.state_dict()) == contents(model.state_dict())
    without = ema_pytorch(net(seed=7), include_online_model=False)
    without.take(export(ema, "ema_pytorch", include_online=False))
    assert same(without.averages(), ours(ema))
    restore(ema, without.train().state())
    assert same(without.averages(), ours(ema))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_while_swapped(layout):
    model = net()
    ema = fused_ema.EMA(model, 0.9, select=lambda name, tensor: name != "frozen")
    train(model)
    ema.update()
    wanted = contents(export(ema, layout, include_online=False))
    state = copy.deepcopy(export(ema, layout))
    with ema.swapped():
        assert contents(export(ema, layout, include_online=False)) == wanted
        with pytest.raises(RuntimeError, match="swapped"):
            restore(ema, state)
        if layout == "ema_pytorch":
            with pytest.raises(RuntimeError, match="include_online=False"):
                export(ema, layout)
    assert contents(export(ema, layout, include_online=False)) == wanted


class Renamed(nn.Module):
    """Other names in its state_dict, and an extra state."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("cache", torch.randn(2), persistent=False)
        self.register_state_dict_post_hook(lambda self, state, *rest: state.update(w=state.pop("weight")))

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        pass


def test_names_are_those_of_the_state_dict():
    model = Renamed()
    ema = fused_ema.EMA(model, 0.9)
    state = {"state_dict_ema": {"w": torch.arange(3.0), "_extra_state": None}}
    restore(ema, state)
    assert contents(export(ema, "timm")) == contents(state)
    refuses(ema, {"state_dict_ema": {"weight": torch.arange(3.0)}}, "'weight' only in the state")


# ---- Tied tensors


def test_one_tied_name_is_enough():
    peer = averaged_model(net()).train()
    for key in ("module.embed.weight", "module.head.weight"):
        ema, state = peer.manager(), peer.state()
        del state[key]
        restore(ema, state)
        assert same(ours(ema), peer.averages())
    state = {key: value for key, value in peer.state().items() if not key.endswith(("embed.weight", "head.weight"))}
    refuses(peer.manager(), state, "'embed.weight', 'head.weight' only in the manager")


def test_tied_names_with_two_values():
    ema, state = good()
    state["module.head.weight"] = state["module.embed.weight"] + 1
    refuses(ema, state, "'head.weight': expected what it is tied to")
    state["module.head.weight"] = torch.zeros(2, 2)
    refuses(ema, state, "'head.weight': expected shape (7, 4), found (2, 2)")
    state["module.head.weight"] = state.pop("module.embed.weight")
    state["module.embed.weight"] = torch.zeros(2, 2)
    refuses(ema, state, "'embed.weight': expected shape (7, 4), found (2, 2)")
    state["module.embed.weight"] = torch.full((7, 4), torch.nan)
    state["module.head.weight"] = torch.full((7, 4), torch.nan)
    restore(ema, state)
    assert ours(ema)[1].isnan().all()


# ---- What is refused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3,), (1, 4), (), (0,)], ids=str)
def test_wrong_shapes(layout, shape):
    ema, state = good(layout)
    values, at = values_of(layout, state)
    values[at] = torch.zeros(shape)
    word = at if isinstance(at, str) else "shadow_params[5]"
    refuses(ema, state, word.removeprefix(checkpoints._PREFIXES.get(layout, "")), "(4,)", str(shape))


@pytest.mark.parametrize("layout", ["averaged_model", "timm", "ema_pytorch"])
def test_other_names(layout):
    ema, state = good(layout)
    values, _ = values_of(layout, state)
    prefix = checkpoints._PREFIXES[layout]
    values[f"{prefix}a.weight"] = torch.zeros(4)
    refuses(ema, state, "'a.weight' only in the state and none only in the manager")
    del values[f"{prefix}norm.weight"]
    values[f"{prefix}b.weight"] = values.pop(f"{prefix}middle.bias")
    differ = "'a.weight', 'b.weight' only in the state and 'norm.weight', 'middle.bias' only in the manager"
    refuses(ema, state, differ)


@pytest.mark.parametrize("layout", ["diffusers", "torch_ema"])
def test_other_positions(layout):
    ema, state = good(layout)
    shadows = state["shadow_params"]
    for others in (shadows[:-1], [*shadows, torch.zeros(4)], []):
        refuses(ema, {**state, "shadow_params": others}, "expected 6 tensors", f"found {len(others)}")
    moved = {**state, "shadow_params": [shadows[i] for i in (1, 0, 2, 3, 4, 5)]}
    refuses(ema, moved, "'shadow_params[0]': expected shape (3,), found (7, 4)", "'shadow_params[1]'")
    some = fused_ema.EMA(net(), select=lambda name, tensor: name == "norm.bias")
    refuses(some, moved, "'shadow_params[0]'", "'shadow_params[1]'")  # though neither is averaged


@pytest.mark.parametrize(
    "state", [None, 3, "n_averaged", [1], torch.zeros(2), object()], ids=lambda state: type(state).__name__
)
def test_no_dict(state):
    for layout in (None, *LAYOUTS):
        ema, whole = good(layout or "timm")
        refuses(ema, state, "expected a dict", type(state).__name__, error=TypeError, layout=layout)
        if layout == "timm":
            refuses(ema, {"state_dict_ema": state}, type(state).__name__, error=TypeError)
        elif layout in ("diffusers", "torch_ema") and not isinstance(state, list):
            refuses(ema, {**whole, "shadow_params": state}, type(state).__name__, error=TypeError)
        elif layout == "averaged_model":
            refuses(ema, {**whole, 3: state}, "by name", error=TypeError)


def test_layouts_that_are_not_told():
    ema, state = good()
    for keys in ({}, {"a": 1}, {1: 2}, {"shadow_params": []}, {"module.x": 1, "step": 2}):
        refuses(ema, keys, *LAYOUTS, str([*map(str, keys)]))
    refuses(ema, {str(i): i for i in range(20)}, "'7'] and 12 more")
    refuses(ema, {**state, "state_dict_ema": {}}, "averaged_model and timm")
    refuses(ema, state, *LAYOUTS, "'swa'", layout="swa")
    refuses(ema, state, "the layout 'diffusers'", "optimization_step", "n_averaged", layout="diffusers")
    restore(ema, {**state, "state_dict_ema": {}}, "averaged_model")
    with pytest.raises(ValueError, match="averaged_model, timm, diffusers, ema_pytorch, torch_ema, found 'swa'"):
        export(ema, "swa")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, TypeError),
        (1.5, TypeError),
        ([[1.0]], TypeError),
        (torch.zeros(4, device="meta"), ValueError),
        (torch.zeros(4).to_sparse(), TypeError),
        (torch.zeros(4, dtype=torch.complex64), ValueError),
        (torch.zeros(4, dtype=torch.int64), ValueError),
    ],
    ids=["None", "number", "list", "meta", "sparse", "complex", "integer"],
)
def test_values_that_do_not_fit(layout, value, error):
    ema, state = good(layout)
    values, at = values_of(layout, state)
    values[at] = value
    refuses(ema, state, error=error)


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "timm"])
@pytest.mark.parametrize("count", [-1, 1.5, True, "7", [], torch.tensor([1, 2]), torch.tensor(0.5), torch.tensor(-3)])
def test_counts_that_are_none(layout, count):
    ema, state = good(layout)
    key = checkpoints._MARKS[layout][0]
    refuses(ema, {**state, key: count}, key, "whole number")


def test_names_that_are_one_without_wrappers():
    ema, state = good("timm")
    state["state_dict_ema"]["module.middle.bias"] = torch.zeros(4)
    refuses(ema, state, "'middle.bias' and 'module.middle.bias' are one name")


def test_a_schedule_that_fails_changes_nothing():
    ema = fused_ema.EMA(net(), lambda n: 0.5 if n < 5 else 2.0)
    refuses(ema, {**good()[1], "n_averaged": 6}, "2.0")


# ---- Files


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def torch_load(path):
    torch.load(path, weights_only=False)


def unpickle(path):
    pickle.loads(path.read_bytes())


def pickled(protocol):
    return lambda value, path: path.write_bytes(pickle.dumps(value, protocol))


@pytest.mark.parametrize(
    ("write", "run"),
    [(torch.save, torch_load), (legacy, torch_load), *((pickled(protocol), unpickle) for protocol in (0, 2, 4))],
    ids=["zip", "legacy", "protocol 0", "protocol 2", "protocol 4"],
)
@pytest.mark.parametrize("name", ["net.pth.tar", "network-snapshot-0002048-0.100.pkl"])
@pytest.mark.parametrize("forced", [False, True], ids=["", "forced"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_not_run(write, run, name, forced, tmp_path, monkeypatch):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran, path = tmp_path / "ran", tmp_path / name
    write({"n_averaged": Hostile(ran), "args": argparse.Namespace(x=Hostile(ran))}, path)
    with pytest.raises(ValueError, match="refused, since to unpickle it could run code") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value), "no word on how to run it"
    assert caught.value.__cause__ is None, "nor torch's own"
    if run is torch_load:
        assert "posix.system" in str(caught.value)
    assert not ran.exists()
    run(path)
    assert ran.exists(), "it would have run"


@pytest.mark.filterwarnings("ignore")  # that it looks like TorchScript, and that this is deprecated
def test_modules_and_scripts_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module")
    with pytest.raises(ValueError, match=r"found torch\.nn\.modules\.linear\.Linear: refused"):
        load(tmp_path / "module")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script"))
    with pytest.raises(ValueError, match="refused"):
        load(tmp_path / "script")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind, tmp_path):
    suffix = ".safetensors" if kind == "safetensors" else ".pt"
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch")
        save_safetensors(whole, fused_ema.EMA(net()))
    else:
        (torch.save if kind == "zip" else legacy)(good()[1], whole)
    data = whole.read_bytes()
    assert load(whole)
    for size in (0, 1, 2, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="cut") as caught:
            load(cut)
        assert caught.type is ValueError


def test_suffixes_in_capitals(tmp_path):
    ema, path = fused_ema.EMA(net()), tmp_path / "MODEL.SAFETENSORS"
    save_safetensors(path, ema)
    assert load(path).keys() == ema.averaged_state_dict().keys()


def test_8_bit_types_beside_the_averages_are_cast_with_them(tmp_path):
    model = net()
    model.scale = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    ema = fused_ema.EMA(model, select=lambda name, tensor: name != "scale")
    save_safetensors(tmp_path / "w.safetensors", ema, dtype=torch.float16)
    assert load(tmp_path / "w.safetensors")["scale"].tolist() == [1, 1, 1]


def test_files_that_are_none(tmp_path):
    path = tmp_path / "junk"
    torch.manual_seed(0)
    for size in (10, 1000) * 20:
        path.write_bytes(bytes(torch.randint(256, (size,)).tolist()))
        with pytest.raises(ValueError, match=r"junk: expected .* damaged|junk: .* can't be read") as caught:
            load(path)
        assert caught.type is ValueError
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected a dict, found list"):
        load(path)
    for name in ("none", "none.safetensors", "."):
        if "." in name:
            pytest.importorskip("safetensors")
        with pytest.raises(OSError, match=r"none|directory"):
            load(tmp_path / name)


def test_load_takes_what_is_harmless(tmp_path):
    path = tmp_path / "state"
    state = {"a": torch.arange(3), "b": OrderedDict(c=[1, 2.5, None, "d", (True,)]), "e": argparse.Namespace(f=1)}
    for write in (torch.save, legacy):
        write(state, path)
        assert contents(load(str(path), torch.device("cpu"))) == contents(state)
    assert load(path, "meta")["a"].is_meta
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):  # it is let in by load() alone
        torch.load(path, weights_only=True)


# ---- safetensors


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.torch")


def test_safetensors_load_into_a_fresh_model(safetensors, tmp_path):
    model = net()
    ema = fused_ema.EMA(model, [0.5, 0.9])
    train(model)
    ema.update()
    for index in (0, 1):
        path, fresh = tmp_path / f"{index}.safetensors", net(seed=9)
        save_safetensors(str(path), ema, index)
        fresh.load_state_dict(safetensors.load_file(path), strict=True)
        assert same(fresh.parameters(), ours(ema, index))
        assert same(fresh.buffers(), model.buffers())
        restored = fused_ema.EMA(net(seed=9))
        restore(restored, {"state_dict_ema": load(path)})
        assert same(ours(restored), ours(ema, index))
        with ema.swapped(index):
            save_safetensors(tmp_path / "swapped.safetensors", ema, index)
        assert (tmp_path / "swapped.safetensors").read_bytes() == path.read_bytes()


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = net()


@pytest.mark.parametrize("inner", [net, Outer])
def test_safetensors_of_a_wrapped_model(safetensors, inner, tmp_path):
    for wrap in (nn.Module.eval, nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))):
        save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(wrap(inner())))
        inner().load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"), strict=True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_safetensors_dtype(safetensors, dtype, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(net(torch.bfloat16)), dtype=dtype)
    found = safetensors.load_file(tmp_path / "x.safetensors")
    assert {found[name].dtype for name in PARAMETERS} == {dtype or torch.float32}
    assert found["norm.running_mean"].dtype == (dtype or torch.bfloat16)
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    net(torch.bfloat16).load_state_dict(found, strict=True)


def test_safetensors_of_strides_and_complex_numbers(safetensors, tmp_path):
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    model.b = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(model), dtype=torch.bfloat16)
    found = safetensors.load_file(tmp_path / "x.safetensors")
    assert same([found["a"], found["b"]], [model.a.bfloat16(), model.b])
    model.b = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"ema\['b'\].*complex128"):
        save_safetensors(tmp_path / "y.safetensors", fused_ema.EMA(model))
    assert not (tmp_path / "y.safetensors").exists()


def test_safetensors_file_is_as_before_after_an_error(safetensors, tmp_path, monkeypatch):
    path, model = tmp_path / "x.safetensors", net()
    save_safetensors(path, fused_ema.EMA(model))
    before = path.read_bytes()
    model.middle.bias.data.fill_(1e30)
    ema = fused_ema.EMA(model)

    def fails(tensors, file, *rest):
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left")

    with pytest.raises(ValueError, match=r"middle\.bias"):
        save_safetensors(path, ema, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype: expected float64"):
        save_safetensors(path, ema, dtype=torch.int8)
    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "save_file", fails)
        with pytest.raises(OSError, match="no space"):
            save_safetensors(path, ema)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
    save_safetensors(path, ema)
    assert path.read_bytes() != before


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(net()))
    with pytest.raises(ImportError, match="pip install safetensors"):
        load(tmp_path / "x.safetensors")
    torch.save({"a": 1}, tmp_path / "x.pt")
    assert load(tmp_path / "x.pt") == {"a": 1}


def test_the_table_of_layouts_is_whole():
    assert re.findall(r'^\| "(\w+)"', checkpoints.__doc__, re.MULTILINE) == list(LAYOUTS)


def test_a_name_that_safetensors_keeps_for_itself(tmp_path):
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(3)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="__metadata__"):
        save_safetensors(path, fused_ema.EMA(model))
    assert path.read_bytes() == b"before"
