"""EMA.attach on a GPU: updates on a stream of their own, and steps that a GradScaler skipped."""

import copy

import gpu_checks
import pytest
import torch
from gpu_checks import A_WHILE, DEVICE
from oracle import same_bits
from torch import nn

from fused_ema import EMA

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.1),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, 0.1, fused=True),
}
WAYS = pytest.mark.parametrize(
    ("overlap", "where"), [(False, None), (True, None), (False, "cpu")], ids=["plain", "overlap", "host memory"]
)


def averages(ema):
    return [value for each in ema.state_dict()["averages"] for value in each.values()]


class Training:
    """A model, its optimizer, an attached manager, and a second one that is updated by hand after each step taken."""

    def __init__(self, device, make, overlap=False, where=None, decays=(0.9, 0.5), **options):
        torch.manual_seed(1)
        self.device = device
        self.model = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 5)).to(device)
        self.optimizer = make(self.model.parameters())
        self.ema = EMA(self.model, list(decays), device=where, **options)
        self.twin = EMA(self.model, list(decays), **options)
        self.handle = self.ema.attach(self.optimizer, overlap=overlap)

    def backward(self, factor=1.0, scaler=None):
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(16, 40, device=self.device)).square().mean() * factor
        (scaler.scale(loss) if scaler else loss).backward()

    def step(self):
        self.backward()
        self.optimizer.step()
        self.twin.update()

    def check(self):
        assert (self.ema.step, self.ema.updates) == (self.twin.step, self.twin.updates)
        assert all(map(same_bits, averages(self.ema), averages(self.twin)))

    def step_held_up(self):
        """A step whose update has to wait on the manager's own stream. Returns the event that marks its end."""
        torch.cuda.synchronize()
        [stream] = self.handle._streams.values()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(A_WHILE)
        self.step()
        [(_, done)] = self.handle._done
        return done


def check_values(device, make, overlap, where, **options):
    training = Training(device, make, overlap, where, **options)
    for step in range(20):
        training.step()
        if step % 5 == 0:
            training.check()
    training.check()


@WAYS
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_same_values_as_by_hand(make, overlap, where):
    check_values(DEVICE, OPTIMIZERS[make], overlap, where)


@WAYS
def test_options(overlap, where):
    more = {"dtype": torch.bfloat16, "rounding": "stochastic", "update_every": 2, "update_after_step": 3}
    check_values(DEVICE, OPTIMIZERS["sgd"], overlap, where, **more)


@pytest.mark.parametrize("where", [None, "cpu"])
def test_nothing_waits_but_the_next_step(where):
    """While an update is held up, later work on the training stream continues. The next step waits, because otherwise
    the update would read parameters that this step wrote."""
    training = Training(DEVICE, OPTIMIZERS["adamw fused"], True, where)
    training.step()
    training.step()  # the kernels of all that follows are loaded
    training.check()
    for _ in range(3):
        done = training.step_held_up()
        training.backward()
        torch.cuda.current_stream().synchronize()
        assert not done.query(), "training waited for the update, or the machine is too slow for this test"
        training.optimizer.step()
        torch.cuda.current_stream().synchronize()
        assert done.query(), "the next step did not wait for the update"
        training.twin.update()
        training.check()


LOOKS = {
    "step": lambda ema, other: ema.step,
    "swapped": lambda ema, other: ema.swapped(1).__enter__(),
    "copy_to": lambda ema, other: ema.copy_to(other),
    "remove": lambda ema, other: ema._attachment.remove(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_looks_at_the_averages_waits(look):
    """On its stream, not on the host, where what `state_dict` and `averaged_state_dict` return is looked at."""
    for held_up in (False, True):  # at first all kernels are loaded
        training = Training(DEVICE, OPTIMIZERS["sgd"], True)
        other = copy.deepcopy(training.model)
        training.step()
        if not held_up:
            LOOKS[look](training.ema, other)
            continue
        done = training.step_held_up()
        with gpu_checks.raises_on_sync():
            LOOKS[look](training.ema, other)
        after = torch.cuda.current_stream().record_event()
        assert not done.query(), "the host waited, or the machine is too slow for this test"
        after.synchronize()
        assert done.query(), "looked at before the update was done"


@WAYS
def test_remove(overlap, where):
    training = Training(DEVICE, OPTIMIZERS["adamw fused"], overlap, where)
    for _ in range(3):
        training.step()
    training.handle.remove()
    training.check()
    before = [value.clone() for value in averages(training.ema)]
    training.backward()
    training.optimizer.step()
    assert training.ema.step == 3
    assert all(map(same_bits, averages(training.ema), before))
    training.handle.remove()
    training.handle = training.ema.attach(training.optimizer, overlap=not overlap)
    training.step()
    training.check()


@WAYS
def test_reset(overlap, where):
    training = Training(DEVICE, OPTIMIZERS["adamw fused"], overlap, where)
    for _ in range(3):
        training.step()
    training.ema.reset(), training.twin.reset()
    assert training.ema.step == 0
    training.check()
    for _ in range(2):
        training.step()
    assert training.ema.step == 2
    training.check()


def check_scaler(device, make, overlap, where):
    """Steps 3, 4 and 7 overflow: no average moves, and once the host has looked, the steps are not counted."""
    training = Training(device, make, overlap, where)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    for step in range(10):
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        training.backward(float("inf") if step in (3, 4, 7) else 1.0, scaler)
        scaler.step(training.optimizer)
        scaler.update()
        same = all(map(same_bits, training.model.parameters(), before))
        assert same == (step in (3, 4, 7)), "the optimizer did not do what this test is about"
        if not same:
            training.twin.update()
        if step != 3:  # so that two steps are skipped before the host looks
            training.check()
    assert training.ema.step == 7


@WAYS
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_steps_that_a_scaler_skipped(make, overlap, where):
    check_scaler(DEVICE, OPTIMIZERS[make], overlap, where)


def test_a_skipped_step_costs_no_wait():
    """The host learns of it a step later."""
    training = Training(DEVICE, OPTIMIZERS["adamw fused"])
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    for _ in range(2):
        training.backward(1.0, scaler)
        scaler.step(training.optimizer)
        scaler.update()
    torch.cuda.synchronize()
    training.backward(float("inf"), scaler)
    torch.cuda._sleep(A_WHILE)
    with gpu_checks.raises_on_sync():
        scaler.step(training.optimizer)
    assert not torch.cuda.current_stream().query(), "the host waited, or the machine is too slow for this test"
    assert training.ema._step == 3
    assert training.ema.step == 2


def test_on_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    training = Training("cuda:0", OPTIMIZERS["sgd"], True)
    training.handle.remove()
    training.model[2].to("cuda:1")
    training.model.forward = lambda x: training.model[2](training.model[1](training.model[0](x)).to("cuda:1"))
    training.optimizer = OPTIMIZERS["sgd"](training.model.parameters())
    training.ema, training.twin = EMA(training.model, [0.9, 0.5]), EMA(training.model, [0.9, 0.5])
    training.handle = training.ema.attach(training.optimizer, overlap=True)
    for _ in range(10):
        training.step()
    training.check()
    assert len(training.handle._streams) == 2
    assert torch.cuda.current_device() == 0
