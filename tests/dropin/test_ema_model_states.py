"""fused_ema.dropin.EMAModel: evaluation with the averages, states and folders, which go to diffusers and back."""

import diffusers
import pytest
import torch
from checkpoint_checks import same
from conftest import refused
from diffusers.training_utils import EMAModel as Theirs
from small_unet import WARM, averaging, clones, contents, each_foreach, moved, numbers, trained, unet
from torch import nn

import fused_ema
from fused_ema.dropin import EMAModel

both = pytest.mark.parametrize(("one", "other"), [(Theirs, EMAModel), (EMAModel, Theirs)], ids=["to ours", "to theirs"])


# ---- Evaluation


@each_foreach
def test_store_copy_to_and_restore(foreach):
    (model, ours), (_, theirs) = trained(EMAModel, foreach=foreach), trained(Theirs, foreach=foreach)
    for average, value in zip(theirs.shadow_params, ours.shadow_params, strict=True):
        average.copy_(value)
    raw = clones(model.parameters())
    for ema in (ours, theirs):
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        assert same(model.parameters(), ours.shadow_params)
        ema.restore(model.parameters())
        assert same(model.parameters(), raw)
        assert ema.temp_stored_params is None
        with pytest.raises(RuntimeError, match="no `store\\(\\)`ed weights"):
            ema.restore(model.parameters())
    model.bfloat16()
    ours.copy_to(model.parameters())
    assert same(model.parameters(), [average.bfloat16() for average in ours.shadow_params])


def test_copy_to_inside_autocast_shows():
    ours = EMAModel([nn.Parameter(torch.ones(4, 4))])
    weight = nn.Parameter(torch.zeros(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 4) @ weight).max() == 0  # autocast keeps a cast of the weight
        ours.store([weight])
        ours.copy_to([weight])
        assert (torch.ones(2, 4) @ weight).min() == 4
        ours.restore([weight])
        assert (torch.ones(2, 4) @ weight).max() == 0


# ---- States and folders


@both
def test_states_go_both_ways(one, other, tmp_path):
    model, ema = trained(one, **WARM)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    fresh = averaging(other, unet(seed=1))
    fresh.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert same(fresh.shadow_params, ema.shadow_params)
    assert numbers(fresh)[0] == numbers(ema)[0]
    assert fresh.state_dict().keys() == ema.state_dict().keys()
    again = averaging(one, unet(seed=2))
    again.load_state_dict(fresh.state_dict())
    moved(model)
    again.step(model.parameters()), ema.step(model.parameters())
    assert same(again.shadow_params, ema.shadow_params), "the same class goes on with the same bits"
    assert numbers(again) == numbers(ema)


@both
def test_folders_go_both_ways(one, other, tmp_path):
    _, ema = trained(one, **WARM)
    same_state = averaging(other, unet(seed=1))
    same_state.load_state_dict(ema.state_dict())
    for name, each in (("one", ema), ("other", same_state)):
        each.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    loaded = other.from_pretrained(tmp_path / "one", diffusers.UNet2DModel, foreach=True)
    assert type(loaded) is other
    assert loaded.foreach
    assert same(loaded.shadow_params, ema.shadow_params)
    assert numbers(loaded)[0] == numbers(ema)[0]
    assert same(diffusers.UNet2DModel.from_pretrained(tmp_path / "one").parameters(), ema.shadow_params)


def test_states_of_the_manager():
    model, ours = trained(EMAModel, **WARM)
    manager = fused_ema.EMA(model)
    fused_ema.checkpoints.restore(manager, ours.state_dict())
    averages = manager.state_dict()["averages"][0]
    assert same([averages[name] for name, _ in model.named_parameters()], ours.shadow_params)
    fresh = averaging(EMAModel, unet(seed=1))
    fresh.load_state_dict(fused_ema.checkpoints.export(manager, "diffusers"))
    assert same(fresh.shadow_params, ours.shadow_params)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("decay", 1.5), ("min_decay", 1), ("power", "2/3"), ("shadow_params", 3), ("shadow_params", [3])],
)
def test_a_state_that_is_refused_changes_nothing(entry, value):
    _, ours = trained(EMAModel)
    before, averages = numbers(ours), ours.shadow_params
    state = {**trained(Theirs, steps=3, **WARM)[1].state_dict(), entry: value}
    refused(ValueError, lambda: ours.load_state_dict(state), ours.shadow_params)
    assert numbers(ours) == before
    assert ours.shadow_params is averages
