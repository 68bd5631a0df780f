"""Checkpoints of other packages: round trips through the packages themselves."""

import argparse
import types

import pytest
import torch
from checkpoint_checks import Net, contents, net, ours, refuses, same, train
from timm_files import timm_files
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_ema
from fused_ema.checkpoints import export, load, restore
from fused_ema.checkpoints.layouts import BY_NAME
from fused_ema.schedules import constant, exponential_ramp, half_life, inverse_power, power_function, tf_warmup

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
        """The count in the state; 0 if it has none."""
        count = BY_NAME[self.layout].count
        return int((count and self.state()[count]) or 0)

    def go_on(self, ema):
        """Trains both for some more steps, and checks that they agree."""
        for _ in range(5):
            self.train(1)
            ema.update()
        for average, theirs in zip(ours(ema), self.averages(), strict=True):
            if self.layout != "timm" or average.shape != (7, 4):  # timm updates a tied weight once for each name
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


def mmengine(model, **options):
    library = pytest.importorskip("mmengine.model")
    average = library.ExponentialMovingAverage(model, momentum=0.1, **options)
    update = lambda: average.update_parameters(model)  # noqa: E731
    return Peer("mmengine", constant(0.9), model, average, update, average.module, after=1)


class LitEma(nn.Module):
    """As latent-diffusion's, which is in no registry: the names of its buffers, and its arithmetic."""

    def __init__(self, model):
        super().__init__()
        self.named_parameters_of_model = model.named_parameters
        self.register_buffer("decay", torch.tensor(0.95))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_buffer(name.replace(".", ""), parameter.detach().clone())

    @torch.no_grad()
    def update(self):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for average, (_, parameter) in zip(self.shadow_params, self.named_parameters_of_model(), strict=True):
            if average is not parameter:
                average.sub_((1 - decay) * (average - parameter))

    @property
    def shadow_params(self):
        return [self._buffers.get(name.replace(".", ""), p) for name, p in self.named_parameters_of_model()]


def lit_ema(model):
    average = LitEma(model)
    return Peer("lit_ema", tf_warmup(0.95), model, average, average.update)


ALL = [averaged_model, timm, diffusers, diffusers_short, ema_pytorch, torch_ema, torch_ema_constant, mmengine, lit_ema]


def peers(*kinds):
    return pytest.mark.parametrize("kind", kinds or ALL, ids=lambda kind: kind.__name__)


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


def test_a_checkpoint_of_mmengines_hook():
    """The hook exchanges the two states in its checkpoints."""
    library = pytest.importorskip("mmengine.hooks")
    runner = types.SimpleNamespace(model=net(), iter=0)
    hook = library.EMAHook(momentum=0.1)
    hook.before_run(runner)
    for _ in range(4):
        train(runner.model)
        hook.after_train_iter(runner, 0)
    average = [tensor.clone() for tensor in hook.ema_model.module.parameters()]
    checkpoint = {"state_dict": runner.model.state_dict()}
    hook.before_save_checkpoint(runner, checkpoint)
    ema = fused_ema.EMA(net(seed=3), 0.9, update_after_step=1)
    restore(ema, checkpoint)
    assert same(ours(ema), average)
    assert ema.step == 4


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
    kept = peer.layout == "diffusers"  # it keeps the types of a state; the others cast to the model's
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


@peers(diffusers, torch_ema)
def test_some_parameters_only(kind, monkeypatch):
    model = net()
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    with monkeypatch.context() as patched:
        patched.setattr(Net, "parameters", lambda self: iter(trainable))
        peer = kind(model).train()
    assert len(peer.averages()) == 5
    ema = peer.manager(select=lambda name, tensor: tensor.requires_grad)
    refuses(ema, peer.state(), "expected 6 tensors", "found 5", "parameters=")
    restore(ema, peer.state(), parameters=iter(trainable))
    assert same(ours(ema), peer.averages())
    train(model)
    ema.update()
    peer.take(export(ema, peer.layout, parameters=iter(trainable)))
    assert same(ours(ema), peer.averages())
    refuses(peer.manager(), peer.state(), "missing from the state: 'frozen'", parameters=trainable)
    with pytest.raises(
        ValueError, match=r"parameters: expected parameters of the manager's model, found other tensors at positions 1"
    ):
        export(ema, peer.layout, parameters=[model.frozen, torch.zeros(3)])


@peers()
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))],
    ids=["module", "_orig_mod", "both"],
)
def test_wrapped_models(kind, wrap):
    kept = slice(1 if kind is lit_ema else 0, None)  # it leaves the frozen parameter, the first, to the model
    peer = kind(net()).train()
    ema = fused_ema.EMA(wrap(net(seed=3)), peer.schedule)
    restore(ema, peer.state())
    assert same(ours(ema)[kept], peer.averages()[kept])
    state = export(ema, peer.layout)
    wrapped = kind(net(seed=4) if kind in (timm, lit_ema) else wrap(net(seed=4)))  # their names are the innermost's
    wrapped.take(state)  # load_state_dict is strict about names
    assert same(ours(ema)[kept], wrapped.averages()[kept])
    plain = fused_ema.EMA(net(seed=5))
    restore(plain, {"state_dict_ema": wrap(wrapped.module).state_dict()} if kind is timm else wrapped.state())
    assert same(ours(ema)[kept], ours(plain)[kept])


# Whether each of the two packages with a schedule goes on with our decays from update 10 on, or with our latest one.
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
