"""Every runner does what runners/base.py says. A new runner joins by a line in WAYS."""

import gc
import weakref

import oracle
import pytest
import stand_in
import torch
from conftest import averages, bits, forget_plans, same_bits
from torch import nn

from fused_ema import EMA, bind, runners, update
from fused_ema import backend as backend_on
from fused_ema.pairs.checks import Action
from fused_ema.plan import Plan
from fused_ema.runners import choose, extension, slower
from fused_ema.runners.base import Call, Job
from fused_ema.runners.watch import SlotWatch

DECAY = 0.9


COMPILED = extension.load() and extension.load().CompiledWatch
# A runner in Python gets the compiled watch where the extension is there, but has no kernel for a device.
WAYS = [("extension", COMPILED), *((name, watch) for name in ("nvrtc", "foreach") for watch in (SlotWatch, COMPILED))]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{getattr(way[1], '__name__', None)}")
def way(request, monkeypatch):
    name, kind = request.param
    if kind is None:
        pytest.skip(f"no native extension: {extension.why_not()}")
    if name == "nvrtc":
        stand_in.install(monkeypatch)
    return next(runner for runner in runners.RUNNERS if runner.name == name), kind


@pytest.fixture
def runner(way):
    return way[0]


@pytest.fixture
def watch_of(way):
    def watch_of(*sources):
        modules = [source for source in sources if isinstance(source, nn.Module)]
        return way[1](modules, [source for source in sources if not isinstance(source, nn.Module)])

    return watch_of


def sides(types=((torch.float32, torch.float32), (torch.float32, torch.bfloat16)), averages=1):
    """Averages and the model's tensors, of which the last pair is copied; `averages` of each, 128 elements apart."""
    torch.manual_seed(0)
    ema = [torch.randn(averages * 128).to(kind)[:100].view(20, 5) for kind, _ in types]
    model = [torch.randn(20, 5).to(kind) for _, kind in types]
    return [*ema, torch.arange(3)], [*model, torch.arange(3) + 7]


def job(ema, model, averages=1):
    actions = [Action.AVERAGE] * (len(ema) - 1) + [Action.COPY]
    names = [f"[{i}]" for i in range(len(ema))]
    return Job(names, ema, model, actions, averages, [128 if averages > 1 else 0] * len(ema))


@pytest.fixture
def prepared(runner, watch_of):
    def prepared(averages=1):
        ema, model = sides(averages=averages)
        if averages > 1:
            ema, model = ema[:-1], model[:-1]
            made = job([*ema, torch.zeros(0)], [*model, torch.zeros(0)], averages)
            made.actions[-1] = Action.NONE
            return ema, model, runner.prepare(made, watch_of(made.ema, made.model))
        return ema, model, runner.prepare(job(ema, model), watch_of(ema, model))

    return prepared


def test_why_not_is_told_in_words(runner):
    assert runner.why_not("cpu") is None
    for kind in ("cuda", "mps", "xpu"):
        reason = runner.why_not(kind)
        assert reason is None or len(reason.split()) > 3
    assert choose("mps").name == "foreach"


def test_update(prepared):
    ema, model, pairs = prepared()
    old = [tensor.clone() for tensor in ema]
    assert pairs.current()
    versions = [tensor._version for tensor in ema]
    assert pairs.run(Call("update", (DECAY,)))
    oracle.check_step(old[:2], model[:2], ema[:2], DECAY, bitwise=False)
    assert torch.equal(ema[2], model[2])
    assert [tensor._version for tensor in ema] == [version + 1 for version in versions]
    assert pairs.launches() >= 1
    assert not pairs.exchanged()


def test_update_of_other_objects_on_the_same_memory(runner):
    ema, model = sides()
    pairs = runner.prepare(job(ema, model), None)
    assert not pairs.current()
    assert not pairs.run(Call("update", (DECAY,)))
    old = [tensor.clone() for tensor in ema]
    assert pairs.run(Call("update", (DECAY,)), [t.detach() for t in ema], [t.detach() for t in model])
    oracle.check_step(old[:2], model[:2], ema[:2], DECAY, bitwise=False)
    before = bits(ema, model)
    others = [tensor.clone() for tensor in model]
    assert not pairs.run(Call("update", (DECAY,)), ema, others)
    assert not pairs.run(Call("update", (DECAY,)), ema[:2], model[:2])
    assert same_bits(before, ema, model)


def test_several_averages_and_one_of_them(prepared):
    ema, model, pairs = prepared(averages=2)
    second = [tensor.as_strided(tensor.shape, tensor.stride(), 128) for tensor in ema]
    old = [[t.clone() for t in each] for each in (ema, second)]
    assert pairs.run(Call("update", (DECAY, 0.5)))
    for before, after, decay in zip(old, (ema, second), (DECAY, 0.5), strict=True):
        oracle.check_step(before, model, after, decay, bitwise=False)
    first = [tensor.clone() for tensor in ema]
    assert pairs.run(Call("copy", average=1))
    assert all(map(torch.equal, first, ema))
    assert all(torch.equal(average, tensor.to(average.dtype)) for average, tensor in zip(second, model, strict=True))


def test_swap_and_restore(prepared):
    ema, model, pairs = prepared()
    before = bits(ema, model)
    averages = [tensor.clone() for tensor in ema]
    scratch = [torch.empty(size, dtype=torch.uint8, device=device) for device, size in pairs.scratch()]
    assert scratch, "the types of the second pair differ"
    assert pairs.run(Call("swap", scratch=scratch))
    assert pairs.exchanged()
    assert all(torch.equal(tensor, average.to(tensor.dtype)) for tensor, average in zip(model, averages, strict=True))
    assert pairs.run(Call("restore", scratch=scratch))
    assert not pairs.exchanged()
    assert same_bits(before, ema, model)


def test_scratch_memory_that_does_not_fit_is_refused(prepared):
    ema, model, pairs = prepared()
    before = bits(ema, model)
    ((device, size),) = pairs.scratch()
    for scratch in ([], [torch.empty(size - 1, dtype=torch.uint8, device=device)]):
        with pytest.raises(ValueError, match="scratch: expected"):
            pairs.run(Call("swap", scratch=scratch))
        assert same_bits(before, ema, model)
    assert not pairs.exchanged()


def test_a_swap_that_another_did_is_undone(runner, prepared, watch_of):
    ema, model, pairs = prepared()
    before = bits(ema, model)
    scratch = [torch.empty(size, dtype=torch.uint8, device=device) for device, size in pairs.scratch()]
    assert pairs.run(Call("swap", scratch=scratch))
    other = runner.prepare(job(ema, model), watch_of(ema, model))
    other.mark_exchanged()
    assert other.exchanged()
    assert other.run(Call("restore", scratch=scratch))
    assert same_bits(before, ema, model)


CHANGES = {
    "replaced": lambda model: model.__setitem__(0, model[0].clone()),
    "data": lambda model: setattr(model[0], "data", model[0].clone()),
    "type": lambda model: setattr(model[1], "data", model[1].half()),
    "shape": lambda model: setattr(model[0], "data", model[0].data.view(5, 20)),
    "strides": lambda model: setattr(model[0], "data", model[0].data.as_strided((20, 5), (1, 20))),
    "added": lambda model: model.append(torch.zeros(1)),
    "removed": lambda model: model.pop(),
    "freed": lambda model: model[0].untyped_storage().resize_(0),
    "conjugated": lambda model: setattr(model[0], "data", torch._neg_view(model[0].data)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_written_once_something_changed(prepared, change):
    ema, model, pairs = prepared()
    assert pairs.run(Call("update", (DECAY,)))
    CHANGES[change](model)
    before = bits(ema)
    assert not pairs.current()
    assert not pairs.run(Call("update", (DECAY,)))
    assert same_bits(before, ema)


def test_no_tensor_is_held(runner, watch_of):
    ema, model = nn.Linear(3, 2), nn.Linear(3, 2)
    tensors = [[*side.parameters()] for side in (ema, model)]
    made = Job(["a", "b"], *tensors, [Action.AVERAGE] * 2, 1, [0, 0])
    pairs = runner.prepare(made, watch_of(ema, model))
    assert pairs.run(Call("update", (DECAY,)))
    ends = [weakref.ref(each) for each in (model, *tensors[1])]
    del model, tensors, made
    gc.collect()
    assert not any(end() is not None for end in ends)
    assert not pairs.run(Call("update", (DECAY,)))


def test_a_kept_plan_runs_again(backend, monkeypatch):
    """Whichever runner it is: nothing is paired or checked again while nothing changes."""
    ema, model = nn.Linear(3, 2), nn.Linear(3, 2)
    lists = [[*side.parameters()] for side in (ema, model)]
    manager, handle = EMA(model, DECAY), bind(ema, model)
    calls = [lambda: handle.update(DECAY), lambda: update(ema, model, DECAY), lambda: update(*lists, DECAY)]
    calls.append(manager.update)
    for call in calls:
        call()
    made = []
    monkeypatch.setattr(Plan, "__init__", lambda *_, **__: made.append(1))
    for call in calls:
        call()
    assert not made
    assert backend_on("cpu") == backend


def test_the_environment_chooses_a_runner_or_raises(monkeypatch):
    forget_plans()
    ema, model = [torch.zeros(3)], [torch.ones(3)]
    monkeypatch.setenv("FUSED_EMA_RUNNER", "foreach")
    assert backend_on("cpu") == "torch"
    assert bind(ema, model).describe()["runner"] == "foreach"
    monkeypatch.setenv("FUSED_EMA_RUNNER", "extension")
    monkeypatch.setattr(extension, "load", lambda: None)
    with pytest.raises(
        RuntimeError, match=r"FUSED_EMA_RUNNER=extension, but on cpu devices it can't run: .*the extension"
    ):
        update(ema, model, 0.5)
    monkeypatch.setenv("FUSED_EMA_RUNNER", "fast")
    with pytest.raises(ValueError, match="FUSED_EMA_RUNNER='fast': expected one of extension, "):
        bind(ema, model)
    assert ema[0].eq(0).all()
    forget_plans()


SLOW = "updates run as PyTorch's own operations, which are slower"


@pytest.fixture
def warnings_of_first(monkeypatch, recwarn):
    """The warnings of the first binding of a process that has no extension."""

    def warnings_of_first():
        monkeypatch.setattr(extension, "load", lambda: None)
        monkeypatch.setattr(slower, "_warned", False)
        for _ in range(2):
            bind([torch.zeros(3)], [torch.ones(3)]).update(0.5)
        return [str(each.message) for each in recwarn if SLOW in str(each.message)]

    for name in ("FUSED_EMA_QUIET", "FUSED_EMA_EXT", "FUSED_EMA_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    return warnings_of_first


@pytest.mark.hazard(52, "guarded")
def test_slower_than_the_machine_allows_is_said_once(warnings_of_first, monkeypatch):
    monkeypatch.setattr(slower.shutil, "which", lambda name: f"/usr/bin/{name}")
    (warning,) = warnings_of_first()
    assert "on cpu devices" in warning
    assert "the extension" in warning


@pytest.mark.parametrize(
    ("name", "value"), [("FUSED_EMA_QUIET", "1"), ("FUSED_EMA_EXT", "0"), ("FUSED_EMA_RUNNER", "foreach")]
)
def test_nothing_is_said_where_the_user_wants_it_so(warnings_of_first, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not warnings_of_first()


def test_nothing_is_said_where_nothing_can_be_done(warnings_of_first, monkeypatch):
    monkeypatch.setattr(slower.shutil, "which", lambda _: None)
    assert not warnings_of_first()


def test_a_device_that_the_loaded_extension_has_no_kernel_for(monkeypatch):
    """As CUDA's, where the extension was built without it: the foreach runner runs, and sees what is replaced."""
    if COMPILED is None:
        pytest.skip(f"no native extension: {extension.why_not()}")
    forget_plans()
    monkeypatch.setattr(extension.Extension, "why_not", lambda *_: "there is no kernel for it")
    ema, model = nn.Linear(3, 2), nn.Linear(3, 2)
    handle, manager = bind(ema, model), EMA(model, 0.0)
    assert handle.describe()["backend"] == manager.describe()["backend"] == "torch"
    for _ in range(2):
        for step in (lambda: handle.update(0.0), lambda: update(ema, model, 0.0), manager.update):
            model.weight = nn.Parameter(torch.randn(2, 3))
            step()
        assert torch.equal(averages(manager)["weight"], model.weight)
        handle.update(0.0)
        assert torch.equal(ema.weight, model.weight)
    with manager.swapped():
        pass
    forget_plans()
