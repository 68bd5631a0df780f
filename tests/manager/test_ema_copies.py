"""What users keep: states of the averages, and what they take out of `swapped()`."""

import copy
import io

import pytest
import torch
from conftest import averages, clones, equal, net, same_values, trained
from torch import nn

from fused_ema import checkpoints


def go_on(ema):
    """Another step, with other buffers."""
    with torch.no_grad():
        for tensor in ema.model.state_dict().values():
            tensor.add_(1)
    ema.update()


def saved_and_loaded(state):
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.hazard(50, "good")
@pytest.mark.parametrize("decay", [0.5, [0.5, 0.9]])
@pytest.mark.parametrize("options", [{}, {"buffers": "average"}, {"select": lambda name, _: name != "0.bias"}])
def test_a_state_is_a_copy(backend, decay, options):
    ema = trained(net(), decay, **options)
    best = ema.averaged_state_dict()
    kept = copy.deepcopy(best)
    with ema.swapped():
        same_values(saved_and_loaded(best), kept)  # taken before the block, saved inside
        inside = ema.averaged_state_dict()
        same_values(inside, kept)
    same_values(inside, kept)
    go_on(ema)
    same_values(best, kept)
    same_values(inside, kept)
    assert not equal(ema.averaged_state_dict(), kept)


def test_tied_tensors_are_copied_once():
    model = net()
    model.tied = model[0]
    model.register_buffer("tied_buffer", model[1].running_mean)
    state = trained(model).averaged_state_dict()
    assert state["tied.weight"] is state["0.weight"]
    assert state["tied_buffer"] is state["1.running_mean"]


def test_views_on_request(backend):
    ema = trained(net())
    views = ema.averaged_state_dict(copy=False)
    memory = {name: tensor.data_ptr() for name, tensor in {**ema.model.state_dict(), **averages(ema)}.items()}
    assert {name: tensor.data_ptr() for name, tensor in views.items()} == memory
    go_on(ema)
    same_values(views, ema.averaged_state_dict())


def test_views_of_one_of_several_averages_bring_no_others_into_a_file(backend):
    ema = trained(net(), [0.5, 0.9])
    state = ema.averaged_state_dict(1, copy=False)
    assert equal({name: state[name] for name in averages(ema, 1)}, averages(ema, 1))
    for tensor in state.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_an_exported_state_is_a_copy(layout):
    ema = trained(net())
    state = checkpoints.export(ema, layout)
    kept = copy.deepcopy(state)
    with ema.swapped():
        assert repr(state) == repr(kept)
    go_on(ema)
    assert repr(state) == repr(kept)
    assert repr(checkpoints.export(ema, layout)) != repr(kept)


# ---- Out of swapped()

BATCH = torch.ones(5, 3)


def outputs(model):
    with torch.no_grad():
        return model(BATCH)


def exported(model):
    return torch.export.export(model, (BATCH,)).module()


@pytest.mark.parametrize("program", [lambda model: torch.jit.trace(model, BATCH), exported], ids=["trace", "export"])
def test_a_program_of_a_copy_keeps_the_average(program):
    ema = trained(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    raw = outputs(ema.model)
    with ema.swapped() as model:
        averaged = outputs(model)
        shares, keeps = program(model), program(copy.deepcopy(model))
    assert not torch.allclose(raw, averaged)
    torch.testing.assert_close(outputs(shares), raw)  # what the page warns of
    go_on(ema)
    torch.testing.assert_close(outputs(keeps), averaged)


def test_a_cloned_state_keeps_the_average(backend):
    ema = trained(net())
    raw, expected = clones(ema.model.state_dict()), ema.averaged_state_dict()
    with ema.swapped() as model:
        shares, keeps = model.state_dict(), clones(model.state_dict())
    same_values(shares, raw)  # what the page warns of
    same_values(keeps, expected)
