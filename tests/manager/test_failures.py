"""An update or an exchange that fails on its way leaves everything as it was, and the next one works."""

import contextlib

import pytest
import torch
from conftest import averages, clones, equal, net, parameters, trained
from torch import nn

from fused_ema import EMA, plan


@contextlib.contextmanager
def failing(monkeypatch, owner, name, error):
    """Every call of `owner.name` raises `error`, and there is at least one."""
    calls = []

    def fail(*_, **__):
        calls.append(name)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        yield
    assert calls, "nothing called it"


ERRORS = [MemoryError("no memory"), torch.OutOfMemoryError("no memory")]


@pytest.mark.hazard(40, "guarded")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["__init__", "try_run"])
def test_failed_update(backend, monkeypatch, error, where):
    ema = trained(net())
    true = clones(averages(ema))
    ema.model[0].weight = nn.Parameter(torch.randn(3, 4).t())  # other strides ask for a new plan
    with failing(monkeypatch, plan.Plan, where, error):
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)):
                ema.update()
    assert (ema.step, equal(averages(ema), true)) == (1, True)
    ema.update()
    expected = torch.lerp(true["0.weight"], ema.model[0].weight.detach(), 0.5)
    torch.testing.assert_close(averages(ema)["0.weight"], expected)
    assert ema.step == 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["__init__", "try_run", "new_scratch"])
def test_failed_exchange(backend, monkeypatch, error, where):
    ema = trained(net().bfloat16())
    raw, true = clones(parameters(ema.model)), clones(averages(ema))
    ema.model[0].weight = nn.Parameter(ema.model[0].weight.detach().t().contiguous().t())  # asks for a new plan
    with failing(monkeypatch, plan.Plan, where, error):
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)), ema.swapped():
                pytest.fail("entered")
    assert equal(clones(parameters(ema.model)), raw)
    assert equal(averages(ema), true)
    with ema.swapped():
        assert all(torch.equal(tensor, true[name].bfloat16()) for name, tensor in parameters(ema.model).items())
    assert equal(clones(parameters(ema.model)), raw)
    ema.update()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_no_memory_for_the_averages(backend, monkeypatch, error):
    model = net()
    before = clones(parameters(model))
    with failing(monkeypatch, torch, "empty", error), pytest.raises(type(error)):
        EMA(model, 0.9)
    assert equal(clones(parameters(model)), before)
    EMA(model, 0.9).update()
