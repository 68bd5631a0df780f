"""Decay schedules against the packages that they come from.

The average is set to 1 and the model to 0, so that the average after an update is the decay that it used.
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from timm_files import timm_files
from torch import nn

from fused_ema import EMA
from fused_ema.schedules import (
    constant,
    cosine,
    exponential_ramp,
    gamma_of,
    growing_half_life,
    half_life,
    inverse_power,
    power_function,
    tf_warmup,
)

EPS = 2.0**-52


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))


def driven(weight, update, times):
    """The decays of a peer's first updates; `weight` gives its average, `update(n)` makes update n."""
    found = []
    for n in range(1, times + 1):
        with torch.no_grad():
            weight().fill_(1)
        update(n)
        found.append(weight().item())
    return found


def near(schedule, numbers, tolerance=2 * EPS):
    return pytest.approx([schedule(n) if n > 0 else 0.0 for n in numbers], rel=0, abs=tolerance)


WARM_UPS = pytest.mark.parametrize("warm", [inverse_power(0.8), inverse_power(0.95, 3.0, 0.75, 0.3, start=10)], ids=str)


@WARM_UPS
def test_timm(warm):
    # n is its `step`, which timm's train.py counts before the update: 1 at the first.
    model = One()
    theirs = timm_files().ModelEmaV3(
        model,
        decay=warm.D,
        min_decay=warm.min,
        update_after_step=warm.start,
        use_warmup=True,
        warmup_gamma=warm.gamma,
        warmup_power=warm.power,
    )
    steps = range(1, 2000)
    assert [theirs.get_decay(n) for n in steps] == near(warm, steps)
    assert driven(lambda: theirs.module.weight, lambda n: theirs.update(model, step=n), 60) == near(warm, range(1, 61))


def test_timm_without_warm_up():
    theirs = timm_files().ModelEmaV3(One(), decay=0.9, update_after_step=10)
    assert theirs.get_decay() == constant(0.9)(1), "without a step"
    # With one it copies until update_after_step + 1, then takes D: a warm-up whose min is D.
    assert [theirs.get_decay(n) for n in range(1, 50)] == near(inverse_power(0.9, min=0.9, start=10), range(1, 50))


@WARM_UPS
def test_diffusers(warm):
    # n is its `optimization_step`, which step() counts before it asks for the decay.
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    model = One()
    theirs = training_utils.EMAModel(
        model.parameters(),
        decay=warm.D,
        min_decay=warm.min,
        update_after_step=warm.start,
        use_ema_warmup=True,
        inv_gamma=warm.gamma,
        power=warm.power,
    )
    steps = range(1, 2000)
    assert [theirs.get_decay(n) for n in steps] == near(warm, steps)
    took = driven(lambda: theirs.shadow_params[0], lambda n: theirs.step(model.parameters()), 60)
    assert took == near(warm, range(1, 61))


@pytest.mark.parametrize("start", [0, 10])
def test_diffusers_without_warm_up(start):
    # Its (1 + s)/(10 + s) has s = optimization_step - update_after_step - 1: ours at n = s, after a copy where s <= 0.
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    model, schedule = One(), tf_warmup(0.8)
    theirs = training_utils.EMAModel(model.parameters(), decay=schedule.D, update_after_step=start)
    numbers = [step - start - 1 for step in range(1, 2000)]
    assert [theirs.get_decay(step) for step in range(1, 2000)] == near(schedule, numbers)
    took = driven(lambda: theirs.shadow_params[0], lambda n: theirs.step(model.parameters()), 60)
    assert took == near(schedule, numbers[:60])


@WARM_UPS
def test_ema_pytorch(warm):
    # n is the number of update() calls, this one included: update() counts its `step` first. It computes in float32.
    model = One()
    theirs = pytest.importorskip("ema_pytorch").EMA(
        model,
        beta=warm.D,
        min_value=warm.min,
        update_after_step=warm.start,
        inv_gamma=warm.gamma,
        power=warm.power,
        update_every=1,
    )
    took, asked = [], []
    for _ in range(60):
        took += driven(lambda: theirs.ema_model.weight, lambda n: theirs.update(), 1)
        asked.append(theirs.get_current_decay())
    assert took == near(warm, range(1, 61), 5e-7)
    assert asked == near(warm, range(1, 61), 5e-7)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_ema_pytorch_karras(sigma_rel):
    # One ahead of the paper: its beta has 1/(step + 1), and update() counts `step` first, so n is the calls + 1.
    model = One()
    theirs = pytest.importorskip("ema_pytorch").KarrasEMA(model, sigma_rel=sigma_rel, update_every=1)
    assert gamma_of(sigma_rel) == pytest.approx(theirs.gamma, rel=1e-10)
    theirs.update()  # copies first
    took = driven(lambda: theirs.ema_model.weight, lambda n: theirs.update(), 60)
    assert took == near(power_function(sigma_rel), range(3, 63), 1e-11)
    assert theirs.beta == pytest.approx(power_function(sigma_rel)(62), rel=1e-10)


def test_torch_ema():
    # n is its `num_updates`, which update() counts first.
    model, schedule = One(), tf_warmup(0.8)
    theirs = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), decay=schedule.D)
    took = driven(lambda: theirs.shadow_params[0], lambda n: theirs.update(), 60)
    assert took == near(schedule, range(1, 61))
    assert theirs.num_updates == 60


def test_ultralytics(tmp_path):
    # n is its `updates`, which update() counts first. It runs in a process of its own, because importing it changes
    # threads, printing and torch.save.
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("no ultralytics")
    schedule = exponential_ramp(0.99, 50.0)
    code = f"""
import importlib.metadata, json, torch
version = importlib.metadata.version  # it asks for torchvision's version, which is not needed here
importlib.metadata.version = lambda name: "0.0" if name == "torchvision" else version(name)
from ultralytics.utils.torch_utils import ModelEMA
model = torch.nn.Linear(1, 1, bias=False).double().requires_grad_(False)
model.weight.fill_(0)
theirs, took = ModelEMA(model, decay={schedule.D}, tau={schedule.tau}), []
for _ in range(60):
    theirs.ema.weight.fill_(1)
    theirs.update(model)
    took.append(theirs.ema.weight.item())
print(json.dumps([took, [theirs.decay(n) for n in range(1, 2000)]]))
"""
    offline = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **offline})
    last = run.stderr.splitlines()[-1:]
    if run.returncode and last[0].startswith(("ImportError", "ModuleNotFoundError")):
        pytest.skip(f"ultralytics can't be imported: {last[0]}")
    assert run.returncode == 0, run.stderr
    took, asked = json.loads(run.stdout.splitlines()[-1])
    assert took == near(schedule, range(1, 61))
    assert asked == near(schedule, range(1, 2000))


@pytest.mark.parametrize(("h", "interval"), [(1000, 1), (1000, 10), (3, 2)])
def test_composer(h, interval):
    # Its decay is for one update per update_interval, which is our interval, or update_every steps of one each.
    algorithms = pytest.importorskip("composer.algorithms", exc_type=ImportError)
    theirs = algorithms.EMA(half_life=f"{h}ba", update_interval=f"{interval}ba").smoothing
    assert half_life(h, interval)(1) == pytest.approx(theirs, rel=2 * EPS)
    assert half_life(h)(1) ** interval == pytest.approx(theirs, rel=16 * EPS)


@pytest.mark.parametrize(("start", "every", "fraction"), [(0, 1, 0.05), (0, 3, 0.05), (40, 1, 0.2), (40, 7, 0.01)])
def test_torchtitan(start, every, fraction):
    """Its EMAOptimizersContainer is in no release yet (the newest is 0.3.0), so this is what its documentation says:
    from start_step on, at each update_every_n_steps-th step, the decay is 2 ** (-1 / (half_life_fraction *
    num_updates)), and num_updates counts these updates, 1 at least."""

    class Documented:
        def step(self, step):
            elapsed = step - start
            if elapsed < 0 or elapsed % every:
                return None
            return 2.0 ** (-1.0 / (fraction * max(elapsed // every, 1)))

    steps = range(start + 1, start + 400)  # at start_step itself it decays as at the first update, and ours copies
    theirs = [decay for step in steps if (decay := Documented().step(step)) is not None]
    model = One()
    ema = EMA(model, growing_half_life(fraction), dtype=torch.float64, update_after_step=start, update_every=every)
    took = []
    for _ in range(start + 399):
        with torch.no_grad():
            (average,) = ema.state_dict()["averages"][0].values()
            average.fill_(1)
        moved = ema.updates
        ema.update()
        if ema.updates > moved:
            took.append(average.item())
    assert took == theirs


def test_torchtitan_covers_the_same_share_of_the_training():
    """The half of the weight that is newest covers about the same fraction of the updates, early and late."""
    schedule = growing_half_life(0.05)
    for n in (1000, 10_000):
        weight, covered = 1.0, 0
        while weight > 0.5:
            weight *= schedule(n - covered)
            covered += 1
        assert covered / n == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(("low", "high"), [(0.996, 1.0), (0.99, 1.0), (0.5, 0.9)])
def test_dino(low, high):
    """What DINO's cosine_scheduler(base_value, final_value, epochs, niter_per_ep) is without a warm-up, in numpy; its
    training reads element `it`, which is 0 at the first step."""
    epochs, per_epoch = 5, 80
    iterations = np.arange(epochs * per_epoch)
    theirs = high + 0.5 * (low - high) * (1 + np.cos(np.pi * iterations / len(iterations)))
    schedule = cosine(epochs * per_epoch, low, high)
    assert theirs.tolist() == near(schedule, range(1, len(iterations) + 1))
    assert schedule(len(iterations) + 1) == high, "as in DINOv2, which has the final value from there on"


def test_byol():
    # tau = 1 - (1 - tau_base) * (cos(pi * k / K) + 1) / 2, with k the number of the step from 0 (section 3.3)
    theirs = [1 - (1 - 0.996) * (np.cos(np.pi * k / 1000) + 1) / 2 for k in range(1001)]
    assert theirs == near(cosine(1000), range(1, 1002))
