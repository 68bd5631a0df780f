"""An update or an exchange that fails on its way leaves everything as it was, and the next one works."""

import pytest
import torch
from conftest import averages, clones, equal, net, parameters
from torch import nn

from fused_ema import EMA, plan


def nudge(model):
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))


def trained(model=None, decay=0.5, **options):
    ema = EMA(net() if model is None else model, decay, **options)
    nudge(ema.model)
    ema.update()
    return ema


class Failing:
    """Makes every call of `owner.name` raise `error` until end()."""

    def __init__(self, monkeypatch, owner, name, error):
        self.calls, self.patch = 0, monkeypatch.context()

        def fail(*args, **options):
            self.calls += 1
            raise error

        with_context = self.patch.__enter__()
        with_context.setattr(owner, name, fail)

    def end(self):
        assert self.calls, "did not come that way"
        self.patch.__exit__(None, None, None)


ERRORS = [MemoryError("no memory"), torch.OutOfMemoryError("no memory")]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("where", ["__init__", "run_call"])
@pytest.mark.hazard(40, "guarded")
def test_failed_update(backend, monkeypatch, error, where):
    ema = trained()
    true = clones(averages(ema))
    ema.model[0].weight = nn.Parameter(torch.randn(4, 3))  # asks for a new plan
    failing = Failing(monkeypatch, plan.Plan, where, error)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            ema.update()
    assert (ema.step, equal(averages(ema), true)) == (1, True)
    failing.end()
    ema.update()
    expected = torch.lerp(true["0.weight"], ema.model[0].weight.detach(), 0.5)
    torch.testing.assert_close(averages(ema)["0.weight"], expected)
    assert ema.step == 2


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("where", ["__init__", "run_call", "aside"])
def test_failed_exchange(backend, monkeypatch, error, where):
    if backend == "torch" and where != "__init__":
        pytest.skip("it takes copies instead")
    ema = trained(net().bfloat16())
    raw, true = clones(parameters(ema.model)), clones(averages(ema))
    ema.model[0].weight = nn.Parameter(ema.model[0].weight.detach().clone())
    failing = Failing(monkeypatch, plan.Plan, where, error)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)), ema.swapped():
            pytest.fail("entered")
    assert equal(clones(parameters(ema.model)), raw)
    assert equal(averages(ema), true)
    failing.end()
    with ema.swapped():
        assert all(torch.equal(tensor, true[name].bfloat16()) for name, tensor in parameters(ema.model).items())
    assert equal(clones(parameters(ema.model)), raw)
    ema.update()


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_no_memory_for_the_averages(backend, monkeypatch, error):
    model = net()
    before = clones(parameters(model))
    failing = Failing(monkeypatch, torch, "empty", error)
    with pytest.raises(type(error)):
        EMA(model, 0.9)
    failing.end()
    assert equal(clones(parameters(model)), before)
    EMA(model, 0.9).update()
