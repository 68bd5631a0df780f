"""The drop-in for torch's AveragedModel: state dicts, pickles, wrapped models, update_bn."""

import copy
import io
import pickle
import warnings

import averaged_models
import pytest
import torch
from averaged_models import FUNCTIONS, MEANS, shaken, used
from conftest import bits, net, same_bits
from torch import nn
from torch.optim import swa_utils

import fused_ema
from fused_ema import EMA, checkpoints

fused_alone = averaged_models.fused_alone

KINDS = [fused_ema.AveragedModel, swa_utils.AveragedModel]


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "bare": lambda model: model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DDP": nn.parallel.DistributedDataParallel,
}


# ---- States


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("there", [KINDS, KINDS[::-1]], ids=["to torch's", "from torch's"])
def test_a_state_goes_both_ways(backend, group, there, use_buffers, wrapper):
    """Through a file, strictly; both go on from there, within what their steps may differ by."""
    one, other = there
    options = {**FUNCTIONS["torch's function of lists"](0.75), "use_buffers": use_buffers}
    model = WRAPPERS[wrapper](net())
    _, averaged = used(model, kind=one, **options)
    file = io.BytesIO()
    torch.save(averaged.state_dict(), file)
    file.seek(0)
    again = other(WRAPPERS[wrapper](net()), **options)
    assert list(again.state_dict()) == list(averaged.state_dict())
    again.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(bits(averaged), again)
    before = copy.deepcopy(averaged.state_dict())
    shaken(model)
    for each in (averaged, again):
        each.update_parameters(model)
    assert averaged.n_averaged == again.n_averaged == 4
    theirs = {"module." + name: value for name, value in model.state_dict().items()}
    for name, value in averaged.state_dict().items():
        if value.is_floating_point():
            # Both err by half an ulp, and by the rounding of the difference and of the product.
            one_step = 2.0**-24 * value.abs() + 2.0**-22 * 0.25 * (theirs[name] - before[name]).abs()
            assert ((value - again.state_dict()[name]).abs() <= 2.001 * one_step).all(), name


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("made_of", WRAPPERS)
def test_wrapped_models(backend, group, fused_alone, wrapper, made_of):
    """The averages may be made from the model as it is, or wrapped, and updated from either."""
    model = net()
    averaged = fused_ema.AveragedModel(WRAPPERS[made_of](model), **FUNCTIONS["ours"](0.5))
    expected = copy.deepcopy(averaged.module)
    wrapped = WRAPPERS[wrapper](model)
    fused_ema.copy_(expected, shaken(model))
    averaged.update_parameters(wrapped)
    fused_ema.update(expected, shaken(model), 0.5)
    averaged.update_parameters(wrapped)
    assert same_bits(bits(expected), averaged.module)


def test_the_manager_goes_on_with_its_state(backend):
    model, averaged = used(**FUNCTIONS["ours"](0.5))
    ema = EMA(model, 0.5, update_after_step=1)
    checkpoints.restore(ema, averaged.state_dict())
    averaged.update_parameters(shaken(model))
    ema.update()
    expected = dict(averaged.module.named_parameters())
    assert all(
        torch.equal(value, expected[name]) for name, value in ema.averaged_state_dict().items() if name in expected
    )
    state = checkpoints.export(ema, "averaged_model")
    again = fused_ema.AveragedModel(model)
    again.load_state_dict(state)
    assert same_bits(bits(averaged), again)


# ---- Copies


def saved(averaged):
    file = io.BytesIO()
    torch.save(averaged, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved])
@pytest.mark.parametrize("function", [FUNCTIONS["ours"](0.5), {}], ids=["moving average", "mean"])
def test_copies_go_on_alike(backend, fused_alone, duplicate, function):
    model, averaged = used(**function)
    again = duplicate(averaged)
    assert type(again) is fused_ema.AveragedModel
    shaken(model)
    before = bits(averaged)
    again.update_parameters(model)
    assert same_bits(before, averaged)
    averaged.update_parameters(model)
    assert same_bits(bits(averaged), again)
    assert again.n_averaged == 4


def test_a_pickle_holds_no_model(backend):
    model = nn.Sequential(nn.Linear(100, 100))
    fresh = pickle.dumps(fused_ema.AveragedModel(model))
    _, averaged = used(model, **FUNCTIONS["ours"](0.5))
    assert len(pickle.dumps(averaged)) < len(fresh) + 1000
    assert b"fused_ema.dropin" not in fresh  # so that files can move inside the package


def test_an_object_of_torchs_class_can_become_one(backend):
    model, averaged = used(kind=swa_utils.AveragedModel)
    again = copy.deepcopy(averaged)
    again.__class__ = fused_ema.AveragedModel
    expected = copy.deepcopy(averaged.module)
    fused_ema.update(expected, shaken(model), 0.5)
    again.update_parameters(model)
    assert same_bits(bits(expected), again.module)


def test_sharded_parameters(backend, group):
    """Parameters that are DTensors stay DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    averaged = fused_ema.AveragedModel(model, **FUNCTIONS["ours"](0.5))
    averaged.update_parameters(model)
    before = averaged.module[0].weight.full_tensor().detach().clone()
    with torch.no_grad():
        model[0].weight.add_(2)
    averaged.update_parameters(model)
    assert isinstance(averaged.module[0].weight, DTensor)
    expected = before.lerp(model[0].weight.full_tensor().detach(), 0.5)
    assert ((averaged.module[0].weight.full_tensor() - expected).abs() <= 2.0**-22 * (2 + before.abs())).all()


# ---- update_bn


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4, momentum=0.3)

    def forward(self, x):
        return self.norm(self.gru(x)[0][:, -1])


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4, momentum=None))


BATCHES = {
    "tensors": lambda x: x,
    "tuples": lambda x: (x, torch.zeros(len(x))),
    "lists": lambda x: [x, "label"],
}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("make", [Recurrent, Convolutions])
def test_update_bn(backend, make, batches, device):
    """The same statistics as with torch's class, bit for bit, where the averages are the same."""
    model = make()
    ours, theirs = fused_ema.AveragedModel(model), swa_utils.AveragedModel(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update_parameters(model)
    theirs.load_state_dict(ours.state_dict())
    loader = [BATCHES[batches](torch.randn(8, 5, 3)) for _ in range(3)]
    for each in (ours.eval(), theirs.eval()):
        swa_utils.update_bn(loader, each, device=device)
    assert same_bits(bits(theirs), ours)
    norms = [each for each in ours.modules() if isinstance(each, nn.BatchNorm1d)]
    assert [each.num_batches_tracked.item() for each in norms] == [3] * len(norms)
    assert [each.momentum for each in norms] == ([0.3] if make is Recurrent else [0.1, None])
    assert not ours.training
    swa_utils.update_bn(loader, ours.train(), device=device)
    assert ours.training


def test_training_goes_on_after_update_bn(backend):
    """The statistics of the averages are the model's again after the next update."""
    model = Recurrent()
    averaged = fused_ema.AveragedModel(model)
    averaged.update_parameters(model)
    swa_utils.update_bn([torch.randn(8, 5, 3)], averaged)
    assert not torch.equal(averaged.module.norm.running_mean, model.norm.running_mean)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.norm.running_mean, model.norm.running_mean)


@pytest.mark.parametrize("means", MEANS)
def test_swa_with_its_schedule(backend, means):
    """The example of torch's documentation, with SWALR, beside torch's class."""
    torch.manual_seed(0)
    model = Recurrent()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fused_ema.AveragedModel(model, **MEANS[means]())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05)
    seen = []
    for step in range(12):
        model(torch.randn(8, 5, 3)).square().mean().backward()
        optimizer.step()
        if step >= 6:
            ours.update_parameters(model)
            seen.append([parameter.detach().double().clone() for parameter in model.parameters()])
            schedule.step()
    for found, *models in zip(ours.parameters(), *seen, strict=True):
        exact = torch.stack(models).mean(0)
        assert ((found - exact).abs() <= 6 * (2.0**-24 * exact.abs() + 2.0**-22 * torch.stack(models).std(0))).all()
