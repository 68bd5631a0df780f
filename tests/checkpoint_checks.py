"""What the tests of checkpoints share: a model, valid states, and a check that a refusal changes nothing."""

import torch
from conftest import refused
from torch import nn

import fused_ema
from fused_ema.checkpoints import export, restore
from fused_ema.checkpoints.layouts import BY_NAME, Positional
from fused_ema.schedules import tf_warmup


class Net(nn.Module):
    """Has buffers, a tied weight and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


PARAMETERS = ["frozen", "embed.weight", "norm.weight", "norm.bias", "middle.weight", "middle.bias"]


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    train(model)
    return model


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.3)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffer + 1 if "num_batches" in name else torch.rand(buffer.shape))


def ours(ema, index=0):
    """The averages, in the order of model.parameters()."""
    averages = ema.state_dict()["averages"][index]
    return [averages[name] for name in PARAMETERS if name in averages]


def raw(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(found, wanted):
    """Whether two lists of tensors have the same types, shapes and bits."""
    found, wanted = list(found), list(wanted)
    return len(found) == len(wanted) > 0 and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))
        for a, b in zip(found, wanted, strict=True)
    )


def contents(value):
    """A state as values that == compares."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: contents(each) for key, each in value.items()}
    return [contents(each) for each in value] if isinstance(value, list) else value


def refuses(ema, state, *words, error=ValueError, **options):
    """Checks that restore() raises an error with these words and changes nothing."""
    before = contents(ema.state_dict())
    refused(error, lambda: restore(ema, state, **options), ema.model, *ema.state_dict()["averages"], names=words)
    assert contents(ema.state_dict()) == before


def good(layout="averaged_model"):
    """A manager and a state that fits it."""
    ema = fused_ema.EMA(net(), tf_warmup(0.9))
    ema.update()
    return ema, export(ema, layout)


def values_of(layout, state):
    """A dict or a list of the averages in a state, and where in it middle.bias is."""
    if isinstance(BY_NAME[layout], Positional):
        return state["shadow_params"], PARAMETERS.index("middle.bias")
    name = "middlebias" if layout == "lit_ema" else BY_NAME[layout].prefix + "middle.bias"
    return state.get("state_dict_ema", state.get("teacher", state)), name
