"""NaN and infinity: an option that keeps them out of the averages, a count of them, and a warning before they are
saved."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import averages, trained
from torch import nn

from fused_ema import EMA, checkpoints, posthoc, schedules

NAN, INF = float("nan"), float("inf")


def one(value=1.0, count=4, **options):
    model = nn.ParameterList([torch.full((count,), value)])
    return model, EMA(model, 0.5, **options)


# ---- The option


@pytest.mark.hazard(51, "good")
@pytest.mark.filterwarnings("ignore:EMA. averages hold NaN")
def test_one_bad_step_does_not_last(backend):
    """Without the option it does."""
    for nonfinite, expected in (("propagate", [2.5, NAN, NAN]), ("skip", [2.5, 2.0, 2.0])):
        model, ema = one(count=3, nonfinite=nonfinite)
        assert ema.nonfinite == ema.describe()["nonfinite"] == nonfinite
        for values in ([3.0, NAN, INF], [3.0, 3.0, 3.0]):
            model[0].data.copy_(torch.tensor(values))
            ema.update()
        assert torch.equal(averages(ema)["0"].nan_to_num(-1), torch.tensor(expected).nan_to_num(-1))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="nonfinite: expected 'propagate' or 'skip', found 'ignore'"):
        one(nonfinite="ignore")


def test_a_state_and_a_pickle_keep_it():
    model, ema = one(nonfinite="skip")
    assert ema.state_dict()["nonfinite"] == "skip"
    others = [copy.deepcopy(ema), pickle.loads(pickle.dumps(ema)), EMA(model, 0.5)]
    others[2].load_state_dict(ema.state_dict())
    assert [other.nonfinite for other in others] == ["skip"] * 3


def test_a_state_without_it_propagates():
    """As earlier versions saved it."""
    _, ema = one(nonfinite="skip")
    state = ema.state_dict()
    del state["nonfinite"]
    ema.load_state_dict(state, schedules="mine")
    assert ema.nonfinite == "skip"
    with pytest.warns(UserWarning, match="saved with nonfinite=propagate, and the manager that loads it has nonfinite"):
        ema.load_state_dict(state)
    assert ema.nonfinite == "propagate"


@pytest.mark.parametrize("found", ["ignore", None, 1, torch.zeros(2)])
def test_a_state_with_another_word_is_refused(found):
    _, ema = one(nonfinite="skip")
    with pytest.raises(ValueError, match="nonfinite"):
        ema.load_state_dict({**ema.state_dict(), "nonfinite": found})
    assert ema.nonfinite == "skip"


# ---- The count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_distance_counts_both_sides(backend, dtype):
    model = nn.ParameterList([torch.ones(10, dtype=dtype), torch.ones(2, 3, dtype=dtype)])
    model.append(model[0])  # tied, and counted once
    ema = EMA(model, [0.5, 0.9], nonfinite="skip")
    found = ema.distance()
    assert (found["nonfinite_model"], found["nonfinite_average"]) == (0, 0)
    model[0].data[::3] = NAN
    model[1].data[0, 0] = INF
    averages(ema, 1)["1"][1, :] = -INF
    ema.update()
    counts = [(each["nonfinite_model"], each["nonfinite_average"]) for each in (ema.distance(0), ema.distance(1))]
    assert counts == [(5, 0), (5, 3)]


def test_what_is_left_out_stands_still():
    model, ema = one(nonfinite="skip")
    model[0].data.copy_(torch.tensor([NAN, 2.0, 2.0, 2.0]))
    assert ema.distance()["still"] == 0.25


# ---- The warning


SAVES = {
    "state_dict": lambda ema, folder: ema.state_dict(),
    "averaged_state_dict": lambda ema, folder: ema.averaged_state_dict(1),
    "save_safetensors": lambda ema, folder: checkpoints.save_safetensors(folder / "x.safetensors", ema, 1),
    "export": lambda ema, folder: checkpoints.export(ema, "timm", 1),
    "export, by position": lambda ema, folder: checkpoints.export(ema, "diffusers", 1),
    "save_snapshot": lambda ema, folder: posthoc.save_snapshot(folder, ema),
    "optimizer": lambda ema, folder: ema._attachment._save(None, {}),
}


@pytest.mark.hazard(51, "guarded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("save", SAVES)
def test_saves_name_what_is_not_finite(tmp_path, save, bad, dtype):
    model = nn.ModuleDict({name: nn.Linear(3, 2, dtype=dtype) for name in ("a", "b")})
    model.register_parameter("empty", nn.Parameter(torch.empty(0, dtype=dtype)))
    ema = trained(model, [0.5, schedules.power_function(0.1)])
    ema.attach(torch.optim.SGD(model.parameters(), lr=0.1), save=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAVES[save](ema, tmp_path)
    averages(ema, 1)["b.weight"][1, 2] = bad
    with pytest.warns(UserWarning, match=r"NaN or infinity, which stay in them for good: 'b\.weight'\. ") as caught:
        SAVES[save](ema, tmp_path)
    assert [each.filename for each in caught] == [__file__]


def test_the_advice_fits_the_manager():
    _, ema = one()
    averages(ema)["0"][1] = NAN
    with pytest.warns(UserWarning, match=r"Go on from an earlier state, and pass nonfinite='skip' to EMA"):
        ema.state_dict()

    model, ema = one(nonfinite="skip")
    earlier = copy.deepcopy(ema.state_dict())
    averages(ema)["0"][1] = NAN
    with pytest.warns(UserWarning, match="earlier state, or make the manager again from a finite model") as caught:
        ema.state_dict()
    assert "pass nonfinite" not in str(caught[0].message)
    with warnings.catch_warnings():  # the advice, followed
        warnings.simplefilter("error")
        ema.load_state_dict(earlier)
        ema.state_dict(), EMA(model, 0.5, nonfinite="skip").state_dict()


def test_the_model_alone_does_not_matter():
    model, ema = one()
    model[0].data.fill_(NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.state_dict(), ema.averaged_state_dict()


def test_the_advice_works():
    """An earlier state, in a manager with nonfinite="skip"."""
    model, ema = one()
    earlier = copy.deepcopy(ema.state_dict())
    model[0].data.copy_(torch.tensor([NAN, 2.0, 2.0, 2.0]))
    ema.update()
    with pytest.warns(UserWarning, match="Go on from an earlier state, and pass nonfinite='skip' to EMA"):
        ema.state_dict()
    ema = EMA(model, 0.5, nonfinite="skip")
    ema.load_state_dict(earlier, schedules="mine")
    ema.update()
    assert averages(ema)["0"].tolist() == [1.0, 1.5, 1.5, 1.5]
