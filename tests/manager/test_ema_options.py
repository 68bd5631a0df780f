"""Options that change: on restart, where what was asked for differs from what was saved, and by `ema.decay = ...`."""

import copy
import warnings

import pytest
import torch
from conftest import averages, net, refused, same_values

from fused_ema import EMA
from fused_ema.schedules import constant, inverse_power, tf_warmup


def saved(*arguments, steps=3, **options):
    ema = EMA(net(), *arguments, **options)
    for _ in range(steps):
        nudge(ema)
        ema.update()
    return ema


def nudge(ema):
    with torch.no_grad():
        for tensor in ema.model.parameters():
            tensor.add_(1)


STOCHASTIC = {"dtype": torch.bfloat16, "rounding": "stochastic"}
DIFFER = {
    "decay": (({"decay": 0.5}, {"decay": 0.9999}), ["saved with decay=0.5,", "loads it has decay=0.9999;"]),
    "schedule": (
        ({"decay": tf_warmup(0.9)}, {"decay": inverse_power(0.9)}),
        ["saved with decay=tf_warmup(D=0.9),", "has decay=inverse_power(D=0.9,"],
    ),
    "one of several": (
        ({"decay": [0.5, 0.9]}, {"decay": [0.5, tf_warmup(0.9)]}),
        ["decay=[0.5, 0.9]", "has decay=[0.5, tf_warmup(D=0.9)]"],
    ),
    "own schedule": (({"decay": 0.5}, {"decay": lambda n: 0.9}), ["decay=0.5,", "has decay=<function"]),
    "update_every": (({}, {"update_every": 10}), ["saved with update_every=1,", "has update_every=10;"]),
    "update_after_step": (
        ({"update_after_step": 7}, {}),
        ["saved with update_after_step=7,", "has update_after_step=0;"],
    ),
    "seed": (({**STOCHASTIC, "seed": 1}, {**STOCHASTIC, "seed": 2}), ["saved with seed=1,", "has seed=2;"]),
    "two": (
        ({"decay": 0.5, "update_every": 2}, {"decay": 0.9}),
        ["saved with decay=0.5, update_every=2,", "has decay=0.9, update_every=1;"],
    ),
}


@pytest.mark.hazard(49, "guarded")
@pytest.mark.parametrize(("sides", "texts"), DIFFER.values(), ids=DIFFER)
def test_a_warning_names_both(sides, texts):
    theirs, ours = sides
    state = saved(**theirs).state_dict()
    ema = EMA(net(), **ours)
    with pytest.warns(UserWarning, match='load with schedules="mine"') as caught:
        ema.load_state_dict(state)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for text in texts:
        assert text in str(caught[0].message)
    assert ema.state_dict()["schedules"] == state["schedules"]
    with warnings.catch_warnings():  # what was loaded is the manager's now
        warnings.simplefilter("error")
        ema.load_state_dict(state)


@pytest.mark.hazard(49, "good")
@pytest.mark.parametrize(("sides", "texts"), DIFFER.values(), ids=DIFFER)
def test_mine(backend, sides, texts):
    theirs, ours = sides
    state, ema = saved(**theirs).state_dict(), EMA(net(), **ours)
    timetable = ema.timetable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.load_state_dict(state, schedules="mine")
    assert (ema.timetable, ema.step) == (timetable, 3)
    for k in range(len(ema.schedules)):
        same_values(averages(ema, k), state["averages"][k])
    nudge(ema)
    ema.update()
    decays = ema.decay if isinstance(ema.decay, tuple) else (ema.decay,)
    assert not timetable.moves_at(4) or decays == timetable.decays_at(4)


@pytest.mark.parametrize("seed", [0, 5])
def test_no_warning_where_nothing_differs(seed):
    options = {"decay": [0.5, lambda n: 0.9], "update_every": 2, "update_after_step": 1}
    state = saved(**options).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMA(net(), **options, seed=seed).load_state_dict(state)  # without stochastic rounding it decides nothing


def test_a_warning_that_is_an_error_changes_nothing():
    state, ema = saved(0.5).state_dict(), EMA(net(), 0.9)
    before = copy.deepcopy(ema.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"decay=0\.5"):
            ema.load_state_dict(state)
    assert ema.step == before["step"]
    same_values(averages(ema), before["averages"][0])


def test_the_other_rounding_and_mine():
    state, ema = saved(0.5, **STOCHASTIC).state_dict(), EMA(net(), 0.5)
    refused(ValueError, lambda: ema.load_state_dict(state), *averages(ema).values(), names=['schedules="mine"'])
    ema.load_state_dict(state, schedules="mine")
    assert (ema.rounding, ema.step) == ("nearest", 3)
    EMA(net(), 0.5, **STOCHASTIC).load_state_dict(state)  # the other way on
    own = EMA(net(), lambda n: 0.5).state_dict()
    refused(ValueError, lambda: ema.load_state_dict(own), *averages(ema).values(), names=['schedules="mine"'])
    ema.load_state_dict(own, schedules="mine")
    assert ema.schedules == (constant(0.5),)


def test_whose_schedules_is_checked():
    ema = EMA(net())
    optimizer = torch.optim.SGD(ema.model.parameters(), lr=0.1)
    for call in (
        lambda: ema.load_state_dict(ema.state_dict(), schedules="theirs"),
        lambda: ema.attach(optimizer, save=True, schedules="theirs"),
    ):
        with pytest.raises(ValueError, match="schedules: expected 'saved' or 'mine', found 'theirs'"):
            call()
    ema.attach(optimizer)


@pytest.mark.parametrize("whose", ["saved", "mine"])
def test_attached(whose):
    def script(decay, **options):
        ema = EMA(net(), decay)
        optimizer = torch.optim.SGD(ema.model.parameters(), lr=0.1)
        ema.attach(optimizer, save=True, **options)
        return ema, optimizer

    first, optimizer = script(0.5)
    optimizer.step()
    second, resumed = script(0.9, schedules=whose)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(optimizer.state_dict())
    assert ["decay=0.5" in str(each.message) for each in caught] == ([True] if whose == "saved" else [])
    assert second.schedules == (constant(0.5 if whose == "saved" else 0.9),)
    assert second.step == 1
    same_values(averages(second), averages(first))


# ---- ema.decay = ...


def test_a_decay_that_is_set(backend):
    ema = saved(0.5, update_every=2)
    before = {name: tensor.clone() for name, tensor in averages(ema).items()}
    ema.decay = 0.25
    assert ema.decay == 0.25**2
    nudge(ema)
    ema.update()
    assert (ema.step, ema.decay, ema.update_every) == (4, 0.25**2, 2)
    for name, parameter in ema.model.named_parameters():
        torch.testing.assert_close(averages(ema)[name], torch.lerp(parameter, before[name], 0.25**2))
    ema.decay = tf_warmup(0.9)
    assert ema.decay == (7 / 16) ** 2  # that of the next update, at step 6
    resumed = EMA(net(), tf_warmup(0.9), update_every=2)
    resumed.load_state_dict(ema.state_dict())
    assert resumed.schedules == ema.schedules


def test_decays_that_can_not_be_set():
    ema = saved([0.5, 0.9])
    for decay, error, text in (
        (0.9, ValueError, "expected one for each of 2 averages, found 1"),
        ([0.9, 1.5], ValueError, r"expected a value in \[0, 1\], found 1.5"),
        ([0.9, "0.9"], TypeError, "expected a number, found str"),
    ):
        with pytest.raises(error, match=f"decay: {text}"):
            ema.decay = decay
    assert (ema.decay, ema.schedules) == ((0.5, 0.9), (constant(0.5), constant(0.9)))
    ema.decay = [0.25, tf_warmup(0.5)]
    assert ema.decay == (0.25, 5 / 14)
