"""Pickles name public paths alone, so that files can move inside the package."""

import copy
import pickle
import pickletools

import pytest
import torch
from conftest import averages, same_values
from torch import nn

import fused_ema
from fused_ema import EMA, schedules

PUBLIC = {"fused_ema", "fused_ema.schedules"}


def modules_named(pickled):
    """The modules that a pickle imports from."""
    strings, found = [], set()
    for opcode, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "STACK_GLOBAL":
            found.add(strings[-2])
        elif opcode.name == "GLOBAL":
            found.add(argument.split(" ")[0])
    return found


def ema_of(model):
    options = {"decay": [0.5, schedules.power_function(0.1)], "select": lambda name, _: name != "0.bias"}
    ema = EMA(model, **options, dtype=torch.bfloat16, rounding="stochastic", update_every=2, seed=3)
    for _ in range(5):
        ema.update()
    return ema


OBJECTS = {
    "manager": lambda: ema_of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))),
    "binding": lambda: fused_ema.bind(nn.Linear(3, 2), nn.Linear(3, 2)),
    "multi_avg_fn": lambda: fused_ema.get_ema_multi_avg_fn(0.9),
    "function": lambda: fused_ema.update,
    "schedule": lambda: schedules.half_life(10.0),
}


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("what", OBJECTS)
def test_pickles_name_public_paths(what, protocol):
    value = OBJECTS[what]()
    pickled = pickle.dumps(value, protocol)
    ours = {name for name in modules_named(pickled) if name.startswith("fused_ema")}
    assert ours <= PUBLIC
    assert ours
    assert type(pickle.loads(pickled)) is type(value)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_a_copy_goes_on_alike(backend, duplicate):
    ema = ema_of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    other = duplicate(ema)
    assert other.timetable == ema.timetable
    for each in (ema, other):
        with torch.no_grad():
            each.model[0].weight.fill_(2.0)
        each.update()
    assert other.step == ema.step == 6
    for k in range(2):
        same_values(averages(other, k), averages(ema, k))
    assert other.describe()["not_averaged"] == ema.describe()["not_averaged"]


@pytest.mark.parametrize("name", fused_ema.__all__)
def test_public_names_say_where_they_are(name):
    value = getattr(fused_ema, name)
    assert getattr(value, "__module__", "fused_ema") == "fused_ema"
