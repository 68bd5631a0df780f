"""Arguments: decays of all types are checked before anything is written, and so is the choice for buffers."""

import numpy as np
import pytest
import torch
from conftest import net, refused
from torch import nn

import fused_ema

DECAYS = [
    *(kind(0.5) for kind in (float, np.float64, np.float32, np.float16, torch.tensor)),
    torch.tensor(0.5, dtype=torch.float64),
    nn.Parameter(torch.tensor(0.5)),
    *(kind(1) for kind in (int, bool, np.int64)),
    *(kind(0) for kind in (int, bool, np.int64)),
]


@pytest.mark.hazard(31, "good")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("decay", DECAYS, ids=repr)
def test_decays_of_many_types(update, decay):
    e = torch.full((3,), 2.0)
    update([e], [torch.zeros(3)], decay)
    assert e.tolist() == [2.0 * float(decay)] * 3


def short(value):
    return repr(value)[:20]


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [NAN, -NAN, -1e-9, 1.0000001, INF, -INF, 2, -1]


@pytest.mark.hazard(31, "guarded")
@pytest.mark.parametrize(
    "decay", [*OUT_OF_RANGE, 10**400, *(torch.tensor(each, dtype=torch.float64) for each in OUT_OF_RANGE)], ids=short
)
def test_decays_out_of_range_are_refused(update, decay):
    ema, model = [torch.ones(3)], [torch.zeros(3)]
    names = ["decay", "expected", "[0, 1]", "found"]
    refused(ValueError, lambda: update(ema, model, decay), ema, model, names=names)


NO_NUMBERS = [None, "0.5", b"0.5", "x", 0.5j, [0.5], (0.5,), {}, np.array([0.5]), net]


@pytest.mark.parametrize("decay", NO_NUMBERS, ids=short)
def test_decays_that_are_no_numbers_are_refused(update, decay):
    ema, model = [torch.ones(3)], [torch.zeros(3)]
    names = ["decay", "expected a number", f"found {type(decay).__name__}"]
    refused(TypeError, lambda: update(ema, model, decay), ema, model, names=names)


@pytest.mark.parametrize(
    "decay",
    [torch.tensor([0.5]), torch.tensor([]), torch.tensor(0.5).half(), torch.tensor(0.5).bfloat16(), torch.tensor(0),
     torch.tensor(True), torch.tensor(0.5 + 0j), torch.tensor([[0.5]])],
)  # fmt: skip
def test_decay_tensors_of_another_shape_or_type_are_refused(update, decay):
    ema, model = [torch.ones(3)], [torch.zeros(3)]
    names = ["decay", "0-d", "float32", "found", str(tuple(decay.shape)), str(decay.dtype).removeprefix("torch.")]
    refused(ValueError, lambda: update(ema, model, decay), ema, model, names=names)


@pytest.mark.hazard(11, "guarded")
def test_decay_on_another_device_is_refused(update):
    ema, model = [torch.ones(3)], [torch.zeros(3)]
    elsewhere = torch.tensor(0.5, device="meta")
    refused(ValueError, lambda: update(ema, model, elsewhere), ema, model, names=["decay", "cpu", "meta"])


def test_the_function_for_averaged_models_checks_its_decay():
    for decay in (NAN, 1.1, -0.1):
        refused(ValueError, lambda d=decay: fused_ema.get_ema_multi_avg_fn(d), names=["decay", "[0, 1]"])
    for decay in ("0.5", None, torch.tensor(0.5)):
        refused(TypeError, lambda d=decay: fused_ema.get_ema_multi_avg_fn(d), names=["decay", "expected a number"])


def test_unknown_choice_for_buffers_is_refused(update):
    ema, model = net(), net()
    for choice in ("avg", None, True):
        refused(ValueError, lambda c=choice: update(ema, model, 0.5, buffers=c), ema, model, names=["buffers", "copy"])
