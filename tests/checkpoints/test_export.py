"""checkpoints.export: names, positions, copies, and what comes from the model."""

import copy
import os
import re

import pytest
import torch
from checkpoint_checks import PARAMETERS, contents, net, ours, same, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fused_ema
from fused_ema import checkpoints
from fused_ema.checkpoints import LAYOUTS, export, load, restore


class Outer(nn.Module):
    """A child that the user calls "module"."""

    def __init__(self):
        super().__init__()
        self.module = net()


def test_what_is_not_averaged_comes_from_the_model():
    model = net()
    ema = fused_ema.EMA(model, select=lambda name, tensor: name.startswith("norm"))
    train(model)
    ema.update()
    exported = export(ema, "averaged_model")
    for name in ("middle.weight", "norm.running_mean"):
        assert same([exported[f"module.{name}"]], [model.state_dict()[name]])
    assert not same([exported["module.norm.weight"]], [model.norm.weight])
    assert not any(value.requires_grad for value in exported.values())


def test_positions():
    model = net()
    assert [name for name, _ in model.named_parameters()] == PARAMETERS
    ema = fused_ema.EMA(model, select=lambda name, tensor: name != "norm.bias")
    for layout in ("diffusers", "torch_ema"):
        shadows = export(ema, layout)["shadow_params"]
        tensors = {**dict(model.named_parameters()), **ema.state_dict()["averages"][0]}
        assert all(torch.equal(shadow, tensors[name]) for shadow, name in zip(shadows, PARAMETERS, strict=True))
        assert not any(tensor.requires_grad for tensor in shadows)


def test_one_of_several_averages(tmp_path):
    model = net()
    ema = fused_ema.EMA(model, [0.5, 0.9, 0.99])
    train(model)
    ema.update()
    for layout in LAYOUTS:
        single = fused_ema.EMA(model)
        torch.save(export(ema, layout, 1), tmp_path / "one of several")
        torch.save(export(single, layout), tmp_path / "single")
        one, alone = (os.path.getsize(tmp_path / name) for name in ("one of several", "single"))
        assert one < 1.5 * alone, "the file holds the other averages too"
        restore(single, load(tmp_path / "one of several"))
        assert same(ours(single), ours(ema, 1))
        for index in (-1, 3):
            with pytest.raises(IndexError, match="expected one of 3 averages"):
                export(ema, layout, index)


@pytest.mark.hazard(43, "good")
@pytest.mark.parametrize("wrap", [nn.Module.eval, nn.DataParallel, torch.compile], ids=["bare", "DDP", "compiled"])
def test_each_dict_of_weights_loads_whole(wrap):
    """load_state_dict is strict unless it is told otherwise."""
    model, average, bare = wrap(Outer()), AveragedModel(wrap(Outer())), Outer()
    ema = fused_ema.EMA(model, 0.5, buffers="average")
    train(model)
    ema.update()
    with ema.swapped():
        wanted = [tensor.clone() for tensor in model.parameters()]
        swapped = copy.deepcopy(model.state_dict())
    for target, state in (
        (average, export(ema, "averaged_model")),
        (bare, export(ema, "timm")["state_dict_ema"]),
        (bare, export(ema, "dino")["teacher"]),
        (bare, export(ema, "plain")),
        (model, copy.deepcopy(ema.averaged_state_dict())),
        (model, swapped),
    ):
        with torch.no_grad():
            for tensor in target.parameters():
                tensor.zero_()
        target.load_state_dict(state)
        assert same(target.parameters(), wanted)


@pytest.mark.parametrize(("step", "n_averaged"), [(1, 0), (2, 1), (3, 2)])
def test_averaged_model_counts_its_first_copy(step, n_averaged):
    ema = fused_ema.EMA(net(), 0.9, update_after_step=2)
    for _ in range(step):
        ema.update()
    assert export(ema, "averaged_model")["n_averaged"] == n_averaged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_while_swapped(layout):
    model = net()
    ema = fused_ema.EMA(model, 0.9, select=lambda name, tensor: name != "frozen")
    train(model)
    ema.update()
    wanted = contents(export(ema, layout, include_online=False))
    state = copy.deepcopy(export(ema, layout))
    with ema.swapped():
        assert contents(export(ema, layout, include_online=False)) == wanted
        with pytest.raises(RuntimeError, match="swapped"):
            restore(ema, state)
        if layout == "ema_pytorch":
            with pytest.raises(RuntimeError, match="include_online=False"):
                export(ema, layout)
    assert contents(export(ema, layout, include_online=False)) == wanted


def test_the_table_lists_all_layouts():
    assert re.findall(r'^\| "(\w+)"', checkpoints.__doc__, re.MULTILINE) == list(LAYOUTS)
