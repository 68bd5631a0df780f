"""Averages in 16 bits that would stand still cause one warning; others cause none."""

import contextlib
import warnings

import pytest
import torch
from conftest import averages, clones, net, source
from torch import nn

import fused_ema
from fused_ema import EMA, plan


@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(plan, "_warned", False)


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.hazard(33, "guarded")
@pytest.mark.parametrize(("dtype", "decay"), [(torch.bfloat16, 0.99), (torch.float16, 0.999)])
def test_one_warning_for_16_bit_averages(update, kind, dtype, decay):
    ema, model = source(kind, {"w": torch.ones(3, dtype=dtype)}), source(kind, {"w": torch.zeros(3, dtype=dtype)})
    with pytest.warns(UserWarning, match=f"16 bits stand still at decay {decay}"):
        update(ema, model, decay)
    with no_warning():
        update(ema, model, decay)


def test_the_warning_points_at_the_caller(backend, kind, monkeypatch):
    average, model = {"w": torch.ones(3).bfloat16()}, {"w": torch.zeros(3).bfloat16()}
    ema, model = source(kind, average), source(kind, model)
    steps = [lambda: fused_ema.update(ema, model, 0.9999), lambda: fused_ema.bind(ema, model).update(0.9999)]
    for step in steps:
        monkeypatch.setattr(plan, "_warned", False)
        with pytest.warns(UserWarning, match="16 bits") as caught:
            step()
        assert caught[0].filename == __file__


def test_no_warning_where_averages_move(update, kind):
    with no_warning():
        for ours, theirs, decay in [
            (torch.float32, torch.bfloat16, 0.9999),
            (torch.float64, torch.float16, 0.9999),
            (torch.bfloat16, torch.bfloat16, 0.9),
            (torch.float16, torch.float16, 0.99),
            (torch.bfloat16, torch.bfloat16, 1.0),  # a decay of 1 writes nothing
        ]:
            ema = source(kind, {"w": torch.ones(3, dtype=ours)})
            model = source(kind, {"w": torch.zeros(3, dtype=theirs)})
            update(ema, model, decay)
            fused_ema.copy_(ema, model)


def test_no_warning_for_averages_that_were_in_16_bits(stepper):
    ema, model = net().bfloat16(), net().bfloat16()
    step = stepper(ema, model)
    ema.float(), model.float()
    with no_warning():
        step(0.9999)


def test_buffers_in_16_bits_that_are_copied_do_not_count(update):
    ema, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for module in (ema, model):
        module.running_mean = module.running_mean.bfloat16()
    with no_warning():
        update(ema, model, 0.9999)
    with pytest.warns(UserWarning, match="16 bits"):
        update(ema, model, 0.9999, buffers="average")


# ---- The manager


@pytest.mark.hazard(33, "good")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_16_bit_models_are_float32_and_move(backend, dtype):
    model = nn.Linear(20, 20).to(dtype)
    ema = EMA(model, 0.999)
    start = clones(averages(ema))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1.1)
    with no_warning():
        for _ in range(3):
            ema.update()
    for name, tensor in averages(ema).items():
        assert tensor.dtype == torch.float32
        assert ((tensor != start[name]) | (start[name] == 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_manager_warns_once(backend, dtype):
    coarse = 1 - torch.finfo(dtype).eps
    fine, still = EMA(net(), 1 - 5 * torch.finfo(dtype).eps, dtype=dtype), EMA(net(), [0.0, coarse], dtype=dtype)
    with no_warning():
        fine.update()
    with pytest.warns(UserWarning, match="stand still") as caught:
        still.update()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with no_warning():
        still.update()
        EMA(net(), coarse, dtype=dtype).update()


def test_warning_beside_a_decay_of_one(backend):
    with pytest.warns(UserWarning, match="stand still"):
        EMA(net(), [1.0, 0.9999], dtype=torch.bfloat16).update()


def test_stochastic_rounding_does_not_warn(backend):
    ema = EMA(net(), 0.99999, dtype=torch.bfloat16, rounding="stochastic")
    with no_warning():
        ema.update()


def test_float32_averages_in_the_memory_of_16_bit_ones_do_not_warn(backend):
    ema, model = torch.zeros(64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    fused_ema.update([ema], [model], 0.5)
    with no_warning():
        fused_ema.update([ema.view(torch.float32)], [torch.ones(32)], 0.99999)
