"""Names: modules and mappings are paired by name, whatever wraps them; names that only one side has are refused."""

import warnings

import pytest
import torch
from conftest import bits, net, refused, same_bits, source, tensors_of
from torch import nn

import fused_ema
from fused_ema import _warning

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.hazard(15, "good")
def test_names_pair_in_any_order(update):
    names = [f"w{i}" for i in range(20)]
    for kind in ("dict", "module"):
        ema = source(kind, {name: torch.zeros(2) for name in names})
        model = source(kind, {name: torch.full((2,), float(name[1:])) for name in reversed(names)})
        update(ema, model, 0.0)
        assert [tensor[0].item() for tensor in tensors_of(ema)] == list(range(20))


@pytest.mark.hazard(15, "guarded")
@pytest.mark.parametrize("kind", ["dict", "module"])
def test_names_of_one_side_are_refused(update, kind):
    common = {"both": torch.ones(2)}
    ema = source(kind, common | {f"ours{i}": torch.ones(1) for i in range(7)})
    model = source(kind, {"both": torch.zeros(2)} | {f"theirs{i}": torch.ones(1) for i in range(6)})
    names = ["expected", *(f"'ours{i}'" for i in range(5)), *(f"'theirs{i}'" for i in range(5)), "1 more"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=[*names, "2 more"])
    with pytest.raises(ValueError, match="missing from ema") as caught:
        update(ema, model, 0.5)
    assert "'ours5'" not in str(caught.value)
    assert "'theirs5'" not in str(caught.value)


def test_forgotten_bias_is_refused(update):
    ema, model = net(bias=False), net()
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["missing from ema: '0.bias'"])
    refused(ValueError, lambda: update(model, ema, 0.5), ema, model, names=["unexpected in ema: '0.bias'"])


def test_lists_of_other_lengths_are_refused(update):
    ema, model = [torch.ones(1)] * 3, [torch.zeros(1)] * 2
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["expected 2", "found 3"])


def test_keys_that_are_no_strings(update):
    ema = {1: torch.ones(2), 2: torch.ones(2)}
    update(ema, {2: torch.zeros(2), 1: torch.full((2,), 3.0)}, 0.5)
    assert ema[1].tolist() == [2.0] * 2
    model = {1: torch.zeros(2), 3: torch.zeros(2)}
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["ema: 3", "ema: 2"])


@pytest.mark.parametrize(
    ("ema", "model"),
    [
        (net(), dict(net().named_parameters())),
        ([torch.ones(1)], {"w": torch.ones(1)}),
        (torch.ones(1), torch.ones(1)),
        ((t for t in [torch.ones(1)]), (t for t in [torch.ones(1)])),
        (None, net()),
        ("ab", "ab"),
        ([torch.ones(1), None], [torch.ones(1), torch.ones(1)]),
        ([torch.ones(1), 1.0], [torch.ones(1), 2.0]),
    ],
    ids=["module and dict", "list and dict", "tensors", "iterators", "None", "strings", "None inside", "floats"],
)
def test_other_kinds_of_sources_are_refused(update, ema, model):
    refused(TypeError, lambda: update(ema, model, 0.5), names=["expected", "found"])


# ---- Names in common


def widened():
    """Like net(), but its first layer has other names, and its last another shape."""
    model = net()
    model[0] = nn.Sequential(nn.Linear(3, 4))
    model[2] = nn.Linear(4, 5)
    return model


def forget_warnings():
    _warning._warn_once.cache_clear()


@pytest.fixture
def heard():
    """The warnings so far, each given whenever it is called for."""
    forget_warnings()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found
    forget_warnings()


@pytest.mark.hazard(48, "good")
def test_names_in_common(update, heard):
    ema, model = widened(), nn.DataParallel(net())
    before = bits(ema[0], ema[2])
    for _ in range(3):
        update(ema, model, 0.0, names="common")
    assert same_bits(before, ema[0], ema[2]), "what only one side has"
    assert same_bits(bits(model.module[1]), ema[1])
    (warning,) = heard
    for part in (
        "names='common' leaves out",
        "missing from ema: '0.weight', '0.bias'",
        "unexpected in ema: '0.0.weight', '0.0.bias'",
        "of two shapes: '2.weight', (5, 4) and (2, 4), '2.bias', (5,) and (2,)",
    ):
        assert part in str(warning.message)


@pytest.mark.parametrize("kind", ["dict", "module"])
def test_names_in_common_of_both_kinds(update, kind, heard):
    ema = source(kind, {"both": torch.ones(2), "wide": torch.ones(3), "ours": torch.ones(1)})
    model = source(kind, {"theirs": torch.zeros(1), "wide": torch.zeros(4), "both": torch.zeros(2)})
    for _ in range(3):
        update(ema, model, 0.5, names="common")
    assert [tensor.tolist() for tensor in tensors_of(ema)] == [[0.125] * 2, [1.0] * 3, [1.0]]
    assert len(heard) == 1
    fused_ema.copy_(ema, model, names="common")
    fused_ema.swap_(ema, model, names="common")
    assert [tensor.tolist() for tensor in tensors_of(ema)] == [[0.0] * 2, [1.0] * 3, [1.0]]
    assert len(heard) == 1


def test_equal_names_are_common_without_a_word(update, heard):
    ema, model = net(), net()
    update(ema, model, 0.0, names="common")
    assert same_bits(bits(model), ema)
    assert not heard


@pytest.mark.hazard(48, "guarded")
def test_the_advice_to_pair_what_both_have_works(update, heard):
    """Each error about names or shapes says what to pass; with that the same call succeeds."""
    narrow, without = widened(), net()
    narrow[0], without[2] = net()[0], nn.Identity()
    for ema in (narrow, without):
        model = net()
        refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["pass names='common'"])  # noqa: B023
        update(ema, model, 0.0, names="common")
        assert same_bits(bits(model[0], model[1]), ema[0], ema[1])


def test_nothing_in_common_is_refused(update):
    for ema, model in ((nn.Linear(2, 3), nn.Linear(3, 4)), ({"a": torch.ones(1)}, {"b": torch.ones(1)})):
        call = lambda: update(ema, model, 0.5, names="common")  # noqa: E731, B023
        refused(ValueError, call, ema, model, names=["expected some tensors in common"])


def test_a_warning_that_is_an_error_comes_before_the_first_write(update):
    forget_warnings()
    ema, model = widened(), net()
    before = bits(ema)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="leaves out"):
                update(ema, model, 0.5, names="common")
    assert same_bits(before, ema)


@pytest.mark.parametrize("names", ["all", None, True, ["0.weight"]])
def test_other_words_for_names_are_refused(update, names):
    ema, model = net(), net()
    call = lambda: update(ema, model, 0.5, names=names)  # noqa: E731
    refused(ValueError, call, ema, model, names=["names: expected 'equal' or 'common', found"])


def test_sequences_have_no_names_in_common(update):
    ema, model = [torch.ones(1)], [torch.zeros(1)]
    call = lambda: update(ema, model, 0.5, names="common")  # noqa: E731
    refused(ValueError, call, ema, model, names=["names: expected 'equal' for sequences"])


def test_names_in_common_in_a_compiled_function():
    ema, model = widened(), net()
    torch._dynamo.reset()
    torch.compile(lambda: fused_ema.update(ema, model, 0.0, names="common"), backend="eager", fullgraph=True)()
    assert same_bits(bits(model[1]), ema[1])


# ---- Wrappers


def wrap(name, module):
    outer = nn.Module()
    outer.add_module(name, module)
    return outer


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda m: torch.compile(m),
    "compiled in DataParallel": lambda m: nn.DataParallel(torch.compile(m)),
    "checkpoint": lambda m: nn.Sequential(*(wrap("_checkpoint_wrapped_module", child) for child in m)),
    "FSDP": lambda m: wrap("_fsdp_wrapped_module", m),
    "all": lambda m: wrap("_fsdp_wrapped_module", nn.DataParallel(torch.compile(WRAPPED["checkpoint"](m)))),
}


@pytest.mark.hazard(16, "good")
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("sides", ["model", "ema", "one each"])
def test_wrappers(backend, wrapped, sides):
    ema, model = net(), net()
    ours = ema if sides == "model" else WRAPPED[wrapped](ema)
    theirs = model if sides == "ema" else nn.DataParallel(model) if sides == "one each" else WRAPPED[wrapped](model)
    fused_ema.update(ours, theirs, 0.0)
    assert same_bits(bits(model), ema)


def test_state_dicts_with_prefixes(update):
    ema, model = net(), net()
    update(nn.DataParallel(ema).state_dict(), model.state_dict(), 0.0)
    assert same_bits(bits(model), ema)


def test_a_child_that_is_called_module(update):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2))
            self.module = nn.Linear(2, 2, bias=False)
            self.module.module = nn.Linear(3, 3, bias=False)

    ema, model = Net(), Net()
    update(ema, model, 0.0)  # some names are equal once `module.` is dropped, but all of them match as they are
    assert same_bits(bits(model), ema)
    wrapped = nn.DataParallel(nn.ModuleDict({"_orig_mod": Net()}))
    update(ema, wrapped, 0.0)  # the first `module.` is not one of theirs
    assert same_bits(bits(wrapped.module["_orig_mod"]), ema)
    mixed = nn.ModuleDict({"module": Net(), "0": nn.Linear(2, 2)})  # here it is
    refused(ValueError, lambda: update(ema, mixed, 0.5), ema, mixed, names=["'weight'", "'0.weight'"])
    twice = {"_orig_mod.weight": torch.ones(2), "weight": torch.ones(2)}
    refused(ValueError, lambda: update(model.state_dict(), twice, 0.5), names=["differ", *map(repr, twice)])


@pytest.mark.hazard(16, "guarded")
def test_differences_behind_a_prefix_are_still_refused(update):
    ema, model = net(), nn.DataParallel(net(bias=False))
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["unexpected in ema: '0.bias'"])


@pytest.mark.parametrize("sides", ["ema", "model", "both"])
def test_script_modules(update, sides):
    ema, model = net(), net()
    ours = torch.jit.script(ema) if sides != "model" else ema
    theirs = torch.jit.script(model) if sides != "ema" else model
    for _ in range(2):
        with torch.no_grad():
            next(theirs.parameters()).add_(1)
        update(ours, theirs, 0.0)
        assert same_bits(bits(theirs), ours)
