"""The options of a callback are checked when it is made."""

import inspect

import pytest
import torch

from fused_ema import EMA, schedules
from fused_ema.integrations.options import Options, check_options

FAULTS = [
    ({"dtypo": 1}, TypeError, r"options: expected those of fused_ema.EMA \(dtype, .*\), found dtypo"),
    ({"model": None}, TypeError, "found model"),
    ({"decay": 90}, ValueError, r"decay: expected a value in \[0, 1\], found 90"),
    ({"decay": "fast"}, TypeError, "decay: expected a number"),
    ({"index": 1}, IndexError, "index: expected one of 1 averages, found 1"),
    ({"evaluate": "no"}, TypeError, "evaluate: expected True or False, found 'no'"),
    ({"update_every": 0}, ValueError, "update_every: expected a whole number, 1 or more, found 0"),
    ({"dtype": torch.int32}, ValueError, "dtype: expected float64"),
    ({"rounding": "stochastic"}, ValueError, "rounding: expected 'nearest'"),
    ({"buffers": "none"}, ValueError, "buffers: expected 'copy'"),
    ({"select": 3}, TypeError, "select: expected a function"),
    ({"device": "qpu"}, RuntimeError, "device type at start of device string: qpu"),
]


@pytest.mark.parametrize(("given", "error", "message"), FAULTS)
def test_each_fault_is_found_without_a_model(given, error, message):
    given = {"decay": 0.9, "index": 0} | given
    flags = {name: given.pop(name) for name in ("evaluate",) if name in given}
    with pytest.raises(error, match=message):
        check_options(given.pop("decay"), given.pop("index"), given, **flags)


def test_good_options_pass_without_a_trace():
    """Names are not asked for, random numbers not drawn, and devices not touched."""
    before = torch.get_rng_state()
    decays = [0.9, schedules.power_function(0.1)]
    check_options(decays, 1, {"select": lambda name, _: name == "a", "device": "cuda", "seed": 3}, evaluate=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.cuda.is_initialized()


def test_the_types_name_every_option():
    assert list(Options.__annotations__) == list(inspect.signature(EMA).parameters)[2:]
