"""EMA: the averages against the formula, whatever the types, the layouts, the wrappers and the changes in between."""

import contextlib
import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import averages, clones, equal, net, parameters, refused
from oracle import DECAYS, FLOATS, HALF, LARGEST, check_step, real, same_bits, values
from torch import nn
from torch.nn.utils import parametrizations

import fused_ema
from fused_ema import EMA
from fused_ema.schedules import constant, half_life, power_function, tf_warmup

pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")

RNG = np.random.default_rng(3)
MODEL_TYPES = [*FLOATS, torch.complex64, torch.complex128]


def name(value):
    return str(value).removeprefix("torch.")


def shake(model, dtype=torch.float32):
    """Other values for all parameters, such as averages of `dtype` can follow."""
    with torch.no_grad():
        for tensor in model.parameters():
            new = values(tensor.dtype, tensor.numel(), RNG, LARGEST[real(dtype)] - 1)
            tensor.copy_(new.view(tensor.shape))


def nudge(*models):
    """A step of some optimizer, the same for each of the models."""
    with torch.no_grad():
        for tensors in zip(*(model.parameters() for model in models), strict=True):
            step = torch.randn(tensors[0].shape) * 0.1
            for tensor in tensors:
                tensor.add_(step.to(tensor.dtype))


def check_update(ema, current, decays, *, bitwise):
    """One update of each average, from the tensors `current` by name, is the formula's."""
    old = [clones(averages(ema, k)) for k in range(len(decays))]
    before = clones(current)
    ema.update()
    assert equal(before, clones(current)), "written to the model"
    for k, decay in enumerate(decays):
        new = averages(ema, k)
        assert new.keys() == current.keys()
        check_step(*([side[n] for n in new] for side in (old[k], current, new)), decay, bitwise=bitwise)


def assorted(backend):
    """Parameters of all layouts, tied, empty and scalar ones; long enough for several threads and pieces."""
    tensors = {
        "image": torch.randn(3, 8, 5, 7).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 9).t(),
        "gaps": torch.randn(8, 12)[:, 2:7],
        "strided": torch.randn(30)[::3],
        "offset": torch.randn(20)[3:],
        "empty": torch.empty(0, 3),
        "scalar": torch.randn(()),
        "long": torch.randn(300_011 if backend == "cpu" else 5_011),
        "complex": torch.randn(5, 3, dtype=torch.complex64),
        "in_half": torch.randn(77).half(),
    }
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor))
    model.tied = model.transposed
    return model


# ---- Values


def average_type(dtype, model_dtype):
    if dtype in HALF:
        return model_dtype if model_dtype.is_complex else dtype
    return torch.promote_types(dtype, model_dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("model_dtype", MODEL_TYPES, ids=name)
def test_each_step_is_the_formulas(backend, dtype, model_dtype):
    model = nn.ParameterList(torch.empty(shape, dtype=model_dtype) for shape in ((), (1,), (0,), (13, 7)))
    shake(model, dtype)
    ema = EMA(model, lambda n: DECAYS[n - 1], dtype=dtype)
    kept = average_type(dtype, model_dtype)
    for key, average in averages(ema).items():
        assert average.dtype == kept
        assert same_bits(average, parameters(model)[key].detach().to(kept))
    narrow_of_float64 = dtype in HALF and real(model_dtype) == torch.float64 and not model_dtype.is_complex
    for decay in DECAYS:
        shake(model, kept)
        check_update(ema, parameters(model), [decay], bitwise=backend != "torch" and not narrow_of_float64)
    assert ema.step == ema.updates == len(DECAYS)


def test_default_types_and_options():
    model = nn.ModuleDict({str(i): nn.Linear(2, 2, dtype=dtype) for i, dtype in enumerate(FLOATS)})
    ema = EMA(model)
    for key, average in averages(ema).items():
        assert average.dtype == (torch.float64 if parameters(model)[key].dtype == torch.float64 else torch.float32)
        assert not average.requires_grad
    assert (ema.decay, ema.step, ema.updates) == (0.9999, 0, 0)
    assert ema.schedules == (constant(0.9999),)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("update_every", [1, 3])
def test_several_averages_are_each_as_if_alone(backend, count, update_every):
    decays = [0.3, power_function(0.1), 0.999, tf_warmup(0.99), 1.0, lambda n: 1 / (n + 1), half_life(5.0), 0.0][:count]
    model = assorted(backend)
    together = EMA(model, decays, update_every=update_every)
    alone = [EMA(model, decay, update_every=update_every) for decay in decays]
    for _ in range(6):
        nudge(model)
        for ema in (together, *alone):
            ema.update()
    for k, one in enumerate(alone):
        assert equal(averages(together, k), averages(one)), k
        assert np.ravel(together.decay)[k] == one.decay


def test_several_averages_take_one_launch(backend):
    model = net()
    about = EMA(model, [0.9, 0.99, 0.999]).describe()
    elements = sum(tensor.numel() for tensor in model.parameters())
    assert about["bytes_per_update"] == elements * (2 * 3 * 4 + 4)
    assert (about["averages"], about["tensors"]) == (3, len(parameters(model)))
    if backend != "torch":
        assert about["launches_per_update"] == EMA(model, 0.9).describe()["launches_per_update"] == 1


@pytest.mark.parametrize(
    ("decay", "error"),
    [
        ([0.5] * 9, ValueError),
        ([], ValueError),
        (1.5, ValueError),
        (math.nan, ValueError),
        (-0.1, ValueError),
        ("0.9", TypeError),
        (None, TypeError),
        ([0.9, None], TypeError),
        (constant, TypeError),
        (torch.tensor(0.9), TypeError),
    ],
)
def test_decays_refused(decay, error):
    with pytest.raises(error, match="decay"):
        EMA(net(), decay)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.int64},
        {"dtype": torch.complex64},
        {"rounding": "up"},
        {"rounding": "stochastic"},
        {"rounding": "stochastic", "dtype": torch.float64},
        {"buffers": "keep"},
        {"update_every": 0},
        {"update_every": 1.5},
        {"update_every": True},
        {"update_after_step": -1},
        {"seed": -1},
        {"device": "cuda"},
    ],
    ids=str,
)
def test_options_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EMA(net(), 0.9, **options)


@pytest.mark.parametrize("name", ["update_every", "update_after_step", "seed", "rounding", "schedules", "model"])
def test_options_stay_as_they_were_made(name):
    ema = EMA(net())
    before = getattr(ema, name)
    with pytest.raises(AttributeError, match=name):
        setattr(ema, name, 3)
    assert getattr(ema, name) is before


def test_counts_of_other_kinds():
    ema = EMA(net(), update_every=np.int64(2))
    assert type(ema.update_every) is int
    for value in (np.float64(2), np.bool_(True), torch.tensor(2), "2"):
        with pytest.raises(ValueError, match="update_every: expected a whole number"):
            EMA(net(), update_every=value)


def test_model_refused():
    with pytest.raises(TypeError, match="model"):
        EMA(list(net().parameters()))
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"0\.weight.*float8"):
        EMA(model)


# ---- Layouts


@pytest.mark.parametrize("count", [1, 3])
def test_layouts(backend, count):
    model = assorted(backend)
    decays = [0.9, 0.3, 0.999][:count]
    ema = EMA(model, decays)
    assert averages(ema)["image"].is_contiguous(memory_format=torch.channels_last)
    assert averages(ema)["transposed"].stride() == model.transposed.stride()
    for k in range(count):
        assert all(same_bits(a, parameters(model)[key].to(a.dtype)) for key, a in averages(ema, k).items())
        assert averages(ema, k)["tied"].data_ptr() == averages(ema, k)["transposed"].data_ptr()
    for _ in range(3):
        nudge(model)
        check_update(ema, parameters(model), decays, bitwise=backend != "torch")


def test_layout_of_the_model_changes(backend):
    model = nn.Conv2d(4, 6, 3)
    ema = EMA(model, [0.9, 0.5])
    for memory_format in (torch.channels_last, torch.contiguous_format):
        model.to(memory_format=memory_format)
        nudge(model)
        check_update(ema, parameters(model), [0.9, 0.5], bitwise=backend != "torch")


def test_expanded_parameter(backend):
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.randn(4, 1).expand(4, 3)))
    ema = EMA(model, 0.5)
    model.w.data = torch.randn(3).expand(4, 3)
    check_update(ema, parameters(model), [0.5], bitwise=backend != "torch")
    refused(ValueError, ema.swapped().__enter__, model, averages(ema), names=["model['w']", "strides"])
    ema.update()


def test_names_that_are_one_without_wrappers():
    class Inner(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"expected names that differ .*, found 'weight' and '_orig_mod.weight'"):
        EMA(Inner())


@pytest.mark.parametrize("member", ["swapped", "averaged_state_dict", "copy_to", "distance"])
def test_indices(member):
    ema = EMA(net(), [0.5, 0.9])
    for index, error in ((2, IndexError), (-1, IndexError), (0.0, TypeError), ("0", TypeError)):
        found = "2 averages" if error is IndexError else None
        with pytest.raises(error, match=found), contextlib.ExitStack() as stack:
            stack.enter_context(getattr(ema, member)(index=index))
    getattr(ema, member)(index=np.int64(1))


def test_copy_to_an_empty_module_is_refused(backend):
    ema = EMA(net(), 0.5)
    nudge(ema.model)
    refused(ValueError, lambda: ema.copy_to(nn.Sequential()), ema.model, names=["EMA.copy_to", "expected the names"])


def test_describe_sees_what_changed(backend):
    ema = EMA(net(), 0.5)
    ema.update()
    before = ema.describe()["bytes_per_update"]
    ema.model.bfloat16()
    assert ema.describe()["dtypes"] == {"float32←bfloat16": 6}
    assert ema.describe()["bytes_per_update"] == before * 10 // 12
    ema.model[0].bias = nn.Parameter(torch.zeros(7))
    assert "expected shape (4,), as its average has, found (7,)" in ema.describe()["problem"]


def test_tied_averages_are_tied_in_the_state(backend):
    for decays in (0.5, [0.5, 0.9]):
        ema = EMA(LowRank(), decays)
        state = ema.averaged_state_dict()
        assert state["alias"].data_ptr() == state["up.weight"].data_ptr()


@pytest.mark.parametrize("options", [{}, {"buffers": "average"}, {"select": lambda name, tensor: True}])
def test_models_without_anything_to_average_are_refused(options):
    counts = nn.Module()
    counts.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    counts.index = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    for model in (
        nn.Sequential(nn.ReLU()),
        nn.Sequential(),
        nn.BatchNorm1d(3, affine=False, track_running_stats=False),
    ):
        with pytest.raises(ValueError, match=f"model: expected parameters .* found none .* in {type(model).__name__};"):
            EMA(model, **options)
    text = "select: expected some" if "select" in options else "found none that are real or complex in Module;"
    with pytest.raises(ValueError, match=text):
        EMA(counts, **options)
    EMA(nn.ParameterList([torch.zeros(0)]), **options).update()  # an empty tensor is something


@pytest.mark.parametrize("buffers", ["copy", "ignore", "average"])
def test_buffers_that_follow_the_model_are_not_averaged(buffers):
    model = net()
    model.register_buffer("mask", torch.ones(2), persistent=False)
    ema = EMA(model, buffers=buffers, select=lambda name, _: name != "0.bias")
    running = [] if buffers == "average" else ["1.running_mean", "1.running_var"]
    expected = ["mask", "0.bias", *running, "1.num_batches_tracked"]
    assert sorted(ema.describe()["not_averaged"]) == sorted(expected)
    assert f"({len(expected)} not averaged)" in repr(ema)


# ---- Modules that are more than their parameters


def weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def spectral_normed():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.hazard(19, "good")
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, compiled])
@pytest.mark.parametrize("make", [net, weight_normed, spectral_normed])
def test_wrapped_when_the_manager_is_made(backend, make, wrap):
    model = make()
    ema = EMA(wrap(model), 0.9)
    nudge(model)
    check_update(ema, parameters(model), [0.9], bitwise=backend != "torch")  # by plain names
    raw, true = clones(parameters(model)), clones(averages(ema))
    with ema.swapped():
        assert equal(clones(parameters(model)), true)
    assert equal(clones(parameters(model)), raw)
    assert list(ema.averaged_state_dict()) == list(ema.model.state_dict())


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_wrapped_after_the_manager_was_made(backend, wrap):
    model = net()
    ema = EMA(model, 0.9)
    ema.update()
    model[0] = wrap(model[0])
    plain = {key.replace("module.", "").replace("_orig_mod.", ""): tensor for key, tensor in model.named_parameters()}
    assert plain.keys() == averages(ema).keys()
    for _ in range(2):
        nudge(model)
        check_update(ema, plain, [0.9], bitwise=backend != "torch")
    ema.load_state_dict(ema.state_dict())
    assert list(ema.averaged_state_dict()) == list(model.state_dict())


def test_a_model_that_deepcopy_refuses(backend):
    model = net()
    model.cache = model(torch.ones(4, 3))  # no leaf of the graph
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    ema = EMA(model, 0.5)
    ema.update()
    with ema.swapped():
        pass


def test_parametrized_average_is_used(backend):
    # What is averaged is what is trained: direction and length, not the weight that they make.
    model = weight_normed()
    ema = EMA(model, 0.5)
    nudge(model)
    ema.update()
    twin = weight_normed()
    twin.load_state_dict(ema.averaged_state_dict())
    x = torch.randn(5, 3)
    with ema.swapped():
        assert torch.equal(model(x), twin(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_scripted(backend, whole):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    if whole:
        model = torch.jit.script(model)
    else:
        model[0] = torch.jit.script(model[0])
    ema = EMA(model, [0.9, 0.5])
    for _ in range(2):
        nudge(model)
        check_update(ema, parameters(model), [0.9, 0.5], bitwise=backend != "torch")
    raw, true = clones(parameters(model)), clones(averages(ema, 1))
    with ema.swapped(1):
        assert equal(clones(parameters(model)), true)
    assert equal(clones(parameters(model)), raw)
    assert equal(averages(ema, 1), true)


# ---- Buffers


@pytest.mark.parametrize("buffers", ["copy", "ignore"])
def test_buffers_are_the_models(backend, buffers):
    model = net()
    ema = EMA(model, 0.9, buffers=buffers)
    model(torch.randn(8, 3))
    ema.update()
    assert averages(ema).keys() == parameters(model).keys()
    state = ema.averaged_state_dict()
    assert list(state) == list(model.state_dict())
    for key, buffer in model.named_buffers():
        assert same_bits(state[key], buffer)
    running = model[1].running_mean.clone()
    with ema.swapped():
        assert same_bits(model[1].running_mean, running)


def test_buffers_averaged(backend):
    model = net()
    ema = EMA(model, 0.9, buffers="average")
    floating = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point()}
    assert averages(ema).keys() == floating.keys()
    assert ema.describe()["not_averaged"] == ["1.num_batches_tracked"]
    model(torch.randn(8, 3))
    check_update(ema, floating, [0.9], bitwise=backend != "torch")
    true, tracked = averages(ema)["1.running_mean"].clone(), model[1].num_batches_tracked.clone()
    with ema.swapped():
        assert same_bits(model[1].running_mean, true)
        assert same_bits(model[1].num_batches_tracked, tracked)
    assert same_bits(ema.averaged_state_dict()["1.num_batches_tracked"], tracked)


def test_buffers_that_are_not_persistent_are_the_models(backend):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("scale", torch.ones(3))
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1), persistent=False)

    model = Masked()
    ema = EMA(model, 0.5, buffers="average")
    nudge(model)
    model.scale.add_(1)
    ema.update()
    assert sorted(averages(ema)) == ["linear.bias", "linear.weight", "scale"]
    state = ema.averaged_state_dict()
    assert torch.equal(state["scale"], torch.full((3,), 1.5))
    Masked().load_state_dict(state)
    with ema.swapped():
        assert same_bits(model.mask, Masked().mask)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_an_infinite_average_stays(backend):
    """With PyTorch's own operations it may become NaN, as with torch.lerp."""
    model = nn.ParameterList([torch.tensor([-torch.inf, torch.inf, 1.0])])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ema = EMA(model, 0.9, dtype=dtype)
        ema.update()
        assert averages(ema)["0"].tolist() == [-math.inf, math.inf, 1.0]


def test_added_buffer_is_refused_where_buffers_are_averaged(backend):
    model = net()
    ema = EMA(model, 0.9, buffers="average")
    model.register_buffer("extra", torch.ones(3))
    refused(ValueError, ema.update, model, averages(ema), names=["'extra'"])


# ---- What is selected


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(64, 64)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)
        self.alias = self.up.weight


def test_select(backend):
    model = LowRank()
    asked = []
    ema = EMA(model, [0.9, 0.99], select=lambda n, p: asked.append(n) or p.requires_grad)
    assert sorted(asked) == sorted(model.state_dict())  # tied names too
    chosen = ["alias", "down.weight", "up.weight"]
    assert sorted(averages(ema)) == chosen
    about = ema.describe()
    assert about["average_bytes"] == 2 * 2 * 64 * 2 * 4
    assert sorted(about["not_averaged"]) == ["base.bias", "base.weight"]
    assert "(2 not averaged)" in repr(ema)
    nudge(model)
    check_update(ema, {n: parameters(model)[n] for n in averages(ema)}, [0.9, 0.99], bitwise=backend != "torch")
    base = clones(parameters(model.base))
    with ema.swapped():
        assert equal(clones(parameters(model.base)), base)
    state = ema.averaged_state_dict(1)
    assert list(state) == list(model.state_dict())
    assert same_bits(state["base.weight"], model.base.weight)
    assert same_bits(state["up.weight"], averages(ema, 1)["up.weight"])


def test_select_by_any_of_tied_names(backend):
    model = LowRank()
    for chosen in ("alias", "up.weight"):
        ema = EMA(model, select=lambda name, _, chosen=chosen: name == chosen)
        assert sorted(averages(ema)) == ["alias", "up.weight"]


def test_select_takes_memory_for_the_chosen_alone(monkeypatch):
    model, taken, empty = LowRank(), [], torch.empty

    def spy(*args, **options):
        tensor = empty(*args, **options)
        if not tensor.is_meta:
            taken.append(tensor.untyped_storage().nbytes())
        return tensor

    monkeypatch.setattr(torch, "empty", spy)
    EMA(model, 0.9, select=lambda n, p: p.requires_grad)
    assert sum(taken) <= 2 * 2 * 64 * 4


def test_select_nothing_is_refused():
    with pytest.raises(ValueError, match=r"select.*6 tensors.*none"):
        EMA(net(), 0.9, select=lambda n, p: False)


def test_select_by_a_list_is_refused():
    with pytest.raises(TypeError, match="select: expected a function of a name and a tensor, found list"):
        EMA(net(), select=["weight"])


def test_select_that_raises_is_heard():
    with pytest.raises(ZeroDivisionError):
        EMA(net(), 0.9, select=lambda n, p: 1 / 0)


# ---- Changes between updates


def retie(model):
    model[0].bias = model[1].weight


CHANGES = {
    "data": lambda m: setattr(m[0].weight, "data", torch.randn(4, 3)),
    "other strides": lambda m: setattr(m[0].weight, "data", torch.randn(3, 4).t()),
    "assign": lambda m: m.load_state_dict(net().state_dict(), assign=True),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(4, 3))),
    "module": lambda m: m.__setitem__(2, nn.Linear(4, 2)),
    "frozen": lambda m: m.requires_grad_(False),
    "narrower": lambda m: m.bfloat16(),
    "mixed": lambda m: m[0].half(),
    "swap_tensors": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(torch.randn(4, 3))),
    "tied": retie,
    "another order": lambda m: m[0]._parameters.update(weight=m[0]._parameters.pop("weight")),
    "buffer": lambda m: m.register_buffer("extra", torch.randn(2)),
    "module without parameters": lambda m: m.append(nn.ReLU()),
    "shared memory": lambda m: m.share_memory(),
}


@pytest.mark.hazard(40, "good")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("count", [1, 2])
def test_changed_between_updates(backend, change, count):
    model, decays = net(), [0.9, 0.3][:count]
    ema = EMA(model, decays)
    ema.update()
    CHANGES[change](model)
    for _ in range(2):
        nudge(model)
        current = parameters(model)
        check_update(ema, {n: current[n] for n in averages(ema)}, decays, bitwise=backend != "torch")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.complex64, id="complex64")], ids=name
)
@pytest.mark.parametrize("update_first", [False, True])
def test_model_cast_to_float64_is_followed_or_refused(backend, dtype, update_first):
    model = nn.Linear(5, 3, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    ema = EMA(model, 0.75, dtype=torch.float32 if dtype.is_complex else dtype)
    if update_first:
        ema.update()
    for tensor in model.parameters():
        tensor.data = tensor.data.to(torch.complex128 if dtype.is_complex else torch.float64)
    nudge(model)
    old = clones(averages(ema))
    refusal = None
    try:
        ema.update()
    except TypeError as error:
        refusal = str(error)
    if refusal:
        assert "['weight']" in refusal
        assert equal(averages(ema), old)
        assert ema.step == update_first
    else:
        for key, average in averages(ema).items():
            wanted = 0.75 * old[key].to(torch.complex128) + 0.25 * parameters(model)[key].detach()
            tolerance = torch.finfo(average.dtype).eps
            torch.testing.assert_close(average.to(torch.complex128), wanted, rtol=tolerance, atol=tolerance)


def untie(model):
    model.alias = nn.Parameter(torch.randn(64, 2))


NO_LONGER_FITS = {
    "added": (net, lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(2))), ["'extra'"]),
    "added module": (net, lambda m: m.append(nn.Linear(2, 2)), ["'3.weight'", "'3.bias'"]),
    "removed": (net, lambda m: m[0].register_parameter("bias", None), ["'0.bias'"]),
    "removed module": (net, lambda m: m.pop(2), ["'2.weight'", "'2.bias'"]),
    "renamed": (net, lambda m: m.add_module("last", m.pop(2)), ["'last.weight'", "'2.weight'"]),
    "shape": (net, lambda m: setattr(m[2].bias, "data", torch.ones(1)), ["'2.bias'", "(1,)", "(2,)"]),
    "untied": (LowRank, untie, ["'alias'", "'up.weight'"]),
    "integers": (net, lambda m: m[2]._parameters.update(bias=torch.tensor([1, 2])), ["'2.bias'", "int64"]),
    "sparse": (net, lambda m: m[2]._parameters.update(bias=torch.ones(2).to_sparse()), ["'2.bias'", "sparse"]),
    "meta": (net, lambda m: m.to("meta"), ["'0.weight'", "meta"]),
    "parametrized": (net, lambda m: parametrizations.weight_norm(m[0]), ["'0.weight'", "'0.parametrizations"]),
}


@pytest.mark.filterwarnings("ignore:Setting .*:UserWarning")
@pytest.mark.parametrize("change", NO_LONGER_FITS)
@pytest.mark.parametrize("update_first", [False, True])
def test_change_that_no_longer_fits(backend, change, update_first):
    make, apply, names = NO_LONGER_FITS[change]
    model = make()
    ema = EMA(model, [0.5, lambda n: 1 / n])
    if update_first:
        nudge(model)
        ema.update()
    true = [clones(averages(ema, k)) for k in range(2)]
    counted, decay = ema.step, ema.decay
    apply(model)
    for _ in range(2):
        error = TypeError if change in ("sparse", "integers") else ValueError
        refused(error, ema.update, model, *(averages(ema, k) for k in range(2)), names=names)
    assert (ema.step, ema.decay) == (counted, decay)
    assert all(equal(averages(ema, k), true[k]) for k in range(2))


@pytest.mark.parametrize("member", ["update", "swapped", "copy_to", "distance", "averaged_state_dict"])
def test_removed_parameter_is_an_error_everywhere(backend, member):
    model = net()
    ema = EMA(model, 0.5)
    model[0].register_parameter("bias", None)
    call = (lambda: ema.swapped().__enter__()) if member == "swapped" else getattr(ema, member)
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=r"0\.bias"):
            call()


def test_mended_after_a_refusal(backend):
    model = net()
    ema = EMA(model, 0.5)
    removed = model[0].bias
    model[0].register_parameter("bias", None)
    refused(ValueError, ema.update, model, averages(ema), names=["'0.bias'"])
    model[0].bias = removed
    nudge(model)
    check_update(ema, parameters(model), [0.5], bitwise=backend != "torch")
    assert ema.step == 1


# ---- When, and with which decay


def drive(ema, model, steps):
    """The steps at which the averages moved, and what `decay` said after each."""
    moved = []
    for n in range(1, steps + 1):
        before = clones(averages(ema))
        nudge(model)
        ema.update()
        if not equal(averages(ema), before):
            moved.append((n, ema.decay))
    return moved


@pytest.mark.parametrize("decay", [0.9, lambda n: n / (n + 1)], ids=["constant", "schedule"])
def test_update_every(backend, decay):
    model = net()
    ema = EMA(model, decay, update_every=3)
    per_step = decay if callable(decay) else lambda n: decay
    assert ema.decay == per_step(3) ** 3  # of the first update
    assert drive(ema, model, 10) == [(n, per_step(n) ** 3) for n in (3, 6, 9)]
    assert (ema.step, ema.updates, ema.decay) == (10, 3, per_step(9) ** 3)


def test_update_every_moves_with_the_power_of_the_decay(backend):
    model = net()
    ema, direct = EMA(model, 0.9, update_every=4), EMA(model, 0.9**4)
    for n in range(1, 13):
        nudge(model)
        ema.update()
        if n % 4 == 0:
            direct.update()
        assert equal(averages(ema), averages(direct)), n


def test_update_every_is_exact_while_the_model_rests(backend):
    # k steps towards one model are a step with the k-th power.
    model = nn.Linear(30, 30, dtype=torch.float64)
    each, fourth = EMA(model, 0.9), EMA(model, 0.9, update_every=4)
    nudge(model)
    for _ in range(8):
        each.update(), fourth.update()
    for key, average in averages(fourth).items():
        torch.testing.assert_close(average, averages(each)[key], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("update_every", [1, 2, 3])
def test_update_after_step(backend, update_every):
    model, asked = net(), []

    def schedule(n):
        asked.append(n)
        return 0.5

    ema = EMA(model, schedule, update_every=update_every, update_after_step=5)
    moved = drive(ema, model, 12)
    copies = [1, 2, 3, 4, 5]
    updates = list(range(5 + update_every, 13, update_every))
    assert [n for n, _ in moved] == copies + updates
    assert [decay for _, decay in moved] == [0.0] * len(copies) + [0.5**update_every] * len(updates)
    assert sorted(set(asked)) == [n - 5 for n in updates]
    assert (ema.step, ema.updates) == (12, len(updates))


def test_until_update_after_step_averages_are_the_model(backend):
    model = net()
    ema = EMA(model, 0.9, update_after_step=3)
    for _ in range(3):
        nudge(model)
        ema.update()
        assert equal(averages(ema), clones(parameters(model)))
        assert (ema.decay, ema.updates) == (0.0, 0)
    nudge(model)
    check_update(ema, parameters(model), [0.9], bitwise=backend != "torch")
    assert (ema.decay, ema.updates) == (0.9, 1)


@pytest.mark.parametrize("update_every", [1, 4])
@pytest.mark.parametrize("after", [0, 2])
def test_power_function_weights(backend, update_every, after):
    """Model t is the t-th unit vector, so that the average is the vector of weights."""
    schedule, count = power_function(0.1), 12
    model = nn.ParameterList([torch.zeros(count, dtype=torch.float64)])
    ema = EMA(model, schedule, update_every=update_every, update_after_step=after)
    assert not schedule.per_step
    for step in range(1, after + count * update_every + 1):
        update = (step - after) // update_every
        model[0].data = torch.eye(count + 1, dtype=torch.float64)[max(update, 0)][1:].contiguous()
        ema.update()
    ends = (np.arange(count + 1) / count) ** (schedule.gamma + 1)
    wanted = torch.tensor([late - early for early, late in pairwise(ends)])
    torch.testing.assert_close(averages(ema)["0"], wanted, rtol=1e-12, atol=1e-14)
    assert ema.updates == count


@pytest.mark.parametrize(
    ("returned", "error"), [(math.nan, ValueError), (1.01, ValueError), (-1, ValueError), ("x", TypeError)]
)
def test_schedule_that_goes_wrong(backend, returned, error):
    model = net()
    ema = EMA(model, [0.9, lambda n: 0.5 if n < 3 else returned])
    ema.update(), ema.update()
    nudge(model)
    refused(error, ema.update, model, averages(ema), averages(ema, 1), names=["decay"])
    assert (ema.step, ema.decay) == (2, (0.9, 0.5))


def test_schedule_that_raises_is_not_counted(backend):
    model = net()
    ema = EMA(model, lambda n: 1 / (2 - n))
    ema.update()
    before = clones(averages(ema))
    nudge(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ema.update()
    assert ema.step == 1
    assert equal(averages(ema), before)


@pytest.mark.hazard(36, "good")
@pytest.mark.parametrize("decays", [[1.0], [1.0, 0.5]])
def test_a_decay_of_one_writes_nothing(backend, decays):
    model = net()
    ema = EMA(model, decays)
    kept, counters = averages(ema), [tensor._version for tensor in model.parameters()]
    before, kept_counters = clones(kept), [tensor._version for tensor in kept.values()]
    nudge(model)
    check_update(ema, parameters(model), decays, bitwise=backend != "torch")
    assert equal(kept, before)
    if len(decays) == 1 and backend != "torch":
        assert [tensor._version for tensor in kept.values()] == kept_counters
    assert [tensor._version for tensor in model.parameters()] == [counter + 1 for counter in counters]  # nudge's


def test_equal_values_are_a_fixed_point(backend):
    model = net()
    ema = EMA(model, [0.9, 0.9999, 0.1])
    for _ in range(5):
        ema.update()
    assert all(equal(averages(ema, k), clones(parameters(model))) for k in range(3))


# ---- Where the averages go


@pytest.mark.parametrize("index", [0, 1])
def test_copy_to(backend, index):
    model, other = net().bfloat16(), net()
    ema = EMA(model, [0.9, 0.3])
    nudge(model)
    ema.update()
    ema.copy_to(other, index)
    for key, tensor in other.state_dict().items():
        wanted = averages(ema, index).get(key, model.state_dict()[key])
        assert torch.equal(tensor, wanted.to(tensor.dtype)), key
    before = clones(averages(ema, index))
    ema.copy_to(index=index)
    assert all(torch.equal(t, before[key].bfloat16()) for key, t in parameters(model).items())
    assert equal(averages(ema, index), before)
    wrapped = nn.DataParallel(net())
    ema.copy_to(wrapped, index)
    assert torch.equal(wrapped.module[0].weight, before["0.weight"])


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (lambda: net()[:2], ["'2.weight'"]),
        (lambda: net().append(nn.Linear(2, 2)), ["'3.weight'"]),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
            ["'2.weight'", "(1, 4)", "(2, 4)"],
        ),
    ],
)
def test_copy_to_what_does_not_fit(backend, other, names):
    ema = EMA(net(), 0.9)
    refused(ValueError, lambda: ema.copy_to(target), target := other(), ema.model, averages(ema), names=names)


class Counting(nn.Linear):
    """Saves more than tensors."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.seen = []

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_copy_to_copies_extra_state(backend):
    model = nn.Sequential(Counting(3, 2), nn.Linear(2, 2))
    ema = EMA(model, 0.9)
    nudge(model)
    model[0].seen = [torch.ones(1)]
    for wrap in (lambda each: each, nn.DataParallel):
        target = nn.Sequential(Counting(3, 2), nn.Linear(2, 2))
        ema.copy_to(wrap(target))
        assert target[0].seen == [torch.ones(1)]
        assert target[0].seen[0] is not model[0].seen[0], "it has to be a copy"
        assert torch.equal(target[0].weight, averages(ema)["0.weight"])
    ema.copy_to()
    assert model[0].seen == [torch.ones(1)]


def test_copy_to_of_extra_state_that_does_not_fit(backend):
    plain, counting = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(Counting(3, 2))
    for model, target, where in ((plain, counting, "unexpected in"), (counting, plain, "missing from")):
        ema = EMA(model, 0.9)
        nudge(model)
        names = ["extra states", f"{where} the model: '0._extra_state'"]
        refused(ValueError, lambda ema=ema, target=target: ema.copy_to(target), target, names=names)
    smaller = nn.Sequential(Counting(2, 2))
    counting[0].seen = [1]
    refused(ValueError, lambda: EMA(counting, 0.9).copy_to(smaller), smaller, names=["0.weight"])
    assert smaller[0].seen == []


class WithModule(nn.Module):
    """A child called as DDP calls what it wraps, beside a parameter of the same name as the child's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.module = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.module(x) + x @ self.weight.T


@pytest.mark.parametrize("wrap", [lambda each: each, nn.DataParallel, torch.compile])
def test_a_child_that_is_called_module(backend, wrap):
    inner = WithModule()
    model, expected = wrap(inner), clones(parameters(inner))
    ema = EMA(model, 0.5)
    assert averages(ema).keys() == {"weight", "module.weight"}
    nudge(inner)
    ema.update()
    for name, parameter in inner.named_parameters():
        expected[name].lerp_(parameter.detach(), 0.5)
    assert equal(averages(ema), expected)
    with ema.swapped():
        assert equal(clones(parameters(inner)), expected)
    target, resumed = WithModule(), EMA(WithModule(), 0.5)
    ema.copy_to(target)
    assert equal(parameters(target), expected)
    resumed.load_state_dict(ema.state_dict())
    assert equal(averages(resumed), expected)
    other = EMA(WithModule(), 0.5)
    fused_ema.checkpoints.restore(other, fused_ema.checkpoints.export(ema, "averaged_model"))
    assert equal(averages(other), expected)


@pytest.mark.hazard(19, "guarded")
def test_lazy_tensors_are_refused_until_they_are_initialised(backend):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises((ValueError, RuntimeError), match=r"0\.weight.*(uninitiali[sz]ed|lazy|initialised)"):
        EMA(model)
    model(torch.ones(2, 3))
    ema = EMA(model)
    ema.update()
    assert averages(ema)["0.weight"].shape == (4, 3)


def test_lazy_tensors_may_be_left_out(backend):
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    ema = EMA(model, 0.5, select=lambda name, tensor: name.startswith("0."))
    assert ema.averaged_state_dict().keys() == model.state_dict().keys()
    with ema.swapped():
        pass


def tied(model):
    model[2].bias = model[0].bias
    return model


def square():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


@pytest.mark.parametrize("same", [False, True], ids=["", "equal averages"])
def test_copy_to_tied_tensors(backend, same):
    # That two averages can't both go there is an error, unless they are equal.
    ema, target = EMA(square(), 0.5), tied(square())
    if same:
        with torch.no_grad():
            ema.model[2].bias.copy_(ema.model[0].bias)
        ema = EMA(ema.model, 0.5)
        ema.copy_to(target)
        assert torch.equal(target[2].bias, averages(ema)["2.bias"])
    else:
        names = ["model['2.bias']", "'0.bias'", "another"]
        refused(ValueError, lambda: ema.copy_to(target), target, ema.model, averages(ema), names=names)


def test_copy_to_what_shares_memory(backend):
    ema, target = EMA(square(), 0.5), square()
    target[2].bias.data = target[0].weight.data[1]
    names = ["shared by ['0.weight', '2.bias']"]
    refused(ValueError, lambda: ema.copy_to(target), target, ema.model, averages(ema), names=names)
    target[2].bias.data = torch.ones(1).expand(3)
    refused(ValueError, lambda: ema.copy_to(target), target, ema.model, averages(ema), names=["'2.bias'", "strides"])


def test_copy_to_the_averages_themselves(backend):
    ema, target = EMA(square(), [0.5, 0.9]), square()
    nudge(ema.model)
    ema.update()
    target.load_state_dict(ema.state_dict()["averages"][0], assign=True)
    both = [averages(ema, k) for k in range(2)]
    refused(ValueError, lambda: ema.copy_to(target, 1), target, ema.model, *both, names=["memory of the averages"])
    with ema.swapped():
        refused(RuntimeError, lambda: ema.copy_to(target), target, ema.model, averages(ema, 1), names=["swapped"])
    before = clones(averages(ema))
    ema.copy_to(target)  # what it has
    assert equal(averages(ema), before)


def test_copy_to_what_is_laid_out_in_the_same_way(backend):
    model = square()
    table = torch.randn(4, 2)
    for name, view in {"cos": table[:, 0], "sin": table[:, 1], "all": table[None], "last": table[1:, 0]}.items():
        model.register_buffer(name, view)
    ema, target = EMA(model, 0.5), copy.deepcopy(model)
    nudge(model)
    ema.update()
    ema.copy_to(target)
    assert torch.equal(target[2].bias, averages(ema)["2.bias"])
    assert torch.equal(target.all[0], table)


def test_copy_to_a_wrapper_of_the_swapped_model(backend):
    ema = EMA(square(), [0.5, 0.9])
    nudge(ema.model)
    ema.update()
    wrapped = nn.DataParallel(ema.model)
    with ema.swapped():
        refused(RuntimeError, lambda: ema.copy_to(wrapped, 1), ema.model, averages(ema), names=["swapped"])


@pytest.mark.parametrize("source", ["meta", "sparse"])
def test_copy_to_of_what_can_not_be_copied(backend, source):
    model, target = net(), net()
    for each in (model, target):
        each[2].register_buffer("last", torch.ones(2, device="meta") if source == "meta" else torch.eye(2).to_sparse())
    ema = EMA(model, 0.5)
    nudge(model)
    error = ValueError if source == "meta" else TypeError
    refused(error, lambda: ema.copy_to(target), target, names=["2.last"])
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module or a dict .*, found list"):
        ema.copy_to([])


def test_averaged_state_dict(backend):
    model = LowRank().bfloat16()
    model.register_buffer("tokens", torch.arange(3))
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    ema = EMA(model, [0.9, 0.3], select=lambda n, p: "base" not in n)
    nudge(model)
    ema.update()
    state = ema.averaged_state_dict(1)
    assert list(state) == list(model.state_dict())
    for key, tensor in state.items():
        mine = averages(ema, 1).get(key)
        assert same_bits(tensor, model.state_dict()[key] if mine is None else mine)
        assert not tensor.requires_grad
    other = LowRank()
    other.register_buffer("tokens", torch.zeros(3, dtype=torch.int64))
    other.load_state_dict(state)


# ---- Looking


@pytest.mark.hazard(44, "good")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_begin_follows_the_model_until_there_is_a_history(backend, dtype):
    model = net()
    ema = EMA(model, [0.5, 0.9], dtype=dtype)
    places = [tensor.data_ptr() for k in (0, 1) for tensor in averages(ema, k).values()]
    for _ in range(2):
        nudge(model)
        ema.begin()
        for k in (0, 1):
            assert equal(averages(ema, k), {n: p.to(dtype) for n, p in parameters(model).items()})
    assert places == [tensor.data_ptr() for k in (0, 1) for tensor in averages(ema, k).values()]
    assert ema.step == 0
    again = copy.deepcopy(ema)
    nudge(again.model)
    again.begin()
    assert equal(averages(again), {n: p.to(dtype) for n, p in parameters(again.model).items()})
    loaded = EMA(model, [0.5, 0.9], dtype=dtype)
    loaded.load_state_dict(copy.deepcopy(ema.state_dict()))  # of step 0
    ema.update()
    nudge(model)
    for each in (ema, loaded, copy.deepcopy(loaded)):
        before = [clones(averages(each, k)) for k in (0, 1)]
        each.begin()
        assert equal(before[0], averages(each, 0))
        assert equal(before[1], averages(each, 1))
        with each.swapped(), pytest.raises(RuntimeError, match=r"EMA\.begin\(\) was called inside swapped\(\)"):
            each.begin()


def test_describe(backend):
    model = net().bfloat16()
    ema = EMA(model, [0.9, tf_warmup(0.99)], update_every=2)
    ema.update(), ema.update()
    elements = sum(tensor.numel() for tensor in model.parameters())
    about = ema.describe()
    expected = {
        "backend": backend,
        "devices": ["cpu"],
        "tensors": 6,
        "averaged": 6,
        "copied": 0,
        "elements": elements,
        "dtypes": {"float32←bfloat16": 6},
        "bytes_per_update": elements * (2 * 2 * 4 + 2),
        "averages": 2,
        "dtype": "float32",
        "rounding": "nearest",
        "decay": (0.9**2, (3 / 12) ** 2),
        "step": 2,
        "updates": 1,
        "swapped": None,
        "not_averaged": ["1.running_mean", "1.running_var", "1.num_batches_tracked"],
    }
    assert {key: about[key] for key in expected} == expected
    assert about["average_bytes"] >= 2 * 4 * elements
    assert about["schedules"] == [repr(schedule) for schedule in ema.schedules]
    with ema.swapped(1):
        assert ema.describe()["swapped"] == 1


def test_repr(backend):
    ema = EMA(nn.Linear(10, 200), [0.9, 0.99])
    ema.update()
    text = repr(ema)
    for part in ("EMA(Linear", "2 tensors", "2,200 elements", "2 x float32", repr(backend), "44,000 bytes", "step 1"):
        assert part in text
    assert "constant(D=0.9)" in text
    assert "swapped" not in text
    with ema.swapped():
        assert "swapped" in repr(ema)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=name)
def test_distance(backend, dtype):
    model = nn.Sequential(nn.Linear(7, 5, dtype=dtype), nn.Linear(5, 7, dtype=dtype))
    model[1].alias = model[0].weight
    ema = EMA(model, [0.9, 0.5])
    assert ema.distance() == {"relative": 0.0, "still": 0.0, "nonfinite_model": 0, "nonfinite_average": 0}
    nudge(model)
    ema.update()
    for index in range(2):
        theirs = torch.cat([tensor.detach().reshape(-1) for tensor in model.parameters()]).to(torch.complex128)
        mine = torch.cat([averages(ema, index)[n].reshape(-1) for n, _ in model.named_parameters()])
        wanted = ((mine - theirs).norm() / theirs.norm()).item()
        assert ema.distance(index)["relative"] == pytest.approx(wanted, rel=1e-12)
        assert ema.distance(index)["still"] == 0


def test_distance_sees_what_stands_still(backend):
    model = nn.ParameterList([torch.ones(1000)])
    ema = EMA(model, 0.999, dtype=torch.bfloat16)
    model[0].data[:250] = 1.01  # rounds to 1.0078; 0.001 of it is far less than half a unit in the last place
    model[0].data[250:300] = 1000.0
    true = clones(averages(ema))
    before = ema.distance()
    assert before["still"] == 0.25
    expected = math.sqrt(250 * 0.01**2 + 50 * 999**2) / math.sqrt(250 * 1.01**2 + 50 * 1000**2 + 700)
    assert before["relative"] == pytest.approx(expected, rel=1e-6)
    assert equal(averages(ema), true), "looking must not touch"
    ema.update()
    assert (averages(ema)["0"] != 1).sum() == 50


def test_distance_from_a_tensor_of_another_shape_is_refused(backend):
    model = nn.Linear(2, 3)
    ema = EMA(model, 0.9)
    model.weight = nn.Parameter(torch.ones(1, 2))  # which would broadcast
    with pytest.raises(ValueError, match=r"model\['weight'\]: expected shape \(3, 2\), .* found \(1, 2\)"):
        ema.distance()


def test_distance_of_a_model_of_zeros(backend):
    model = nn.ParameterList([torch.zeros(3)])
    assert math.isnan(EMA(model, 0.9).distance()["relative"])


def test_to(backend):
    model = assorted(backend)
    ema = EMA(model, [0.9, 0.5])
    true = [clones(averages(ema, k)) for k in range(2)]
    assert ema.to("cpu") is ema
    assert all(equal(averages(ema, k), true[k]) for k in range(2))
    nudge(model)
    check_update(ema, parameters(model), [0.9, 0.5], bitwise=backend != "torch")


def test_device_of_the_host_makes_no_difference(backend):
    model = net()
    here, there = EMA(model, 0.9), EMA(model, 0.9, device="cpu")
    nudge(model)
    here.update(), there.update()
    assert equal(averages(here), averages(there))


def test_public_name():
    assert fused_ema.EMA is EMA
    assert EMA.__module__ == "fused_ema"
