"""What holds for all values, layouts and modules; hypothesis searches for counterexamples."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import FLOATS, INNER_DECAYS, PAIRS, check_step, real, reals, same_bits
from torch import nn

import fused_ema

# The same examples in each run. All examples of a test may share the fixture `backend`.
same_examples = settings(
    derandomize=True,
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
REAL_PAIRS = [pair for pair in PAIRS if not pair[0].is_complex]

# decay == float32(decay) == 0 below 2**-150, and is rounded coarsely below 2**-126, where the bound can't hold.
decays = st.sampled_from(INNER_DECAYS) | st.floats(2.0**-126, 1, exclude_max=True)


@st.composite
def tensors(draw, dtype, size, finite=True):
    """Any bits: zeros, subnormals and the largest values are as likely as others. Where `finite`, no Inf, no NaN,
    and half the largest value at most, so that differences do not overflow."""
    width = 8 * dtype.itemsize
    patterns = st.integers(-(1 << width - 1), (1 << width - 1) - 1)
    some = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.pi, torch.finfo(dtype).tiny, torch.finfo(dtype).max / 2])
    bits = torch.tensor(draw(st.lists(patterns, min_size=size, max_size=size)), dtype=INTEGER[dtype.itemsize])
    found = bits.view(dtype)
    for i, value in draw(st.dictionaries(st.integers(0, size - 1), some, max_size=size // 2)).items() if size else ():
        found[i] = value
    if not finite:
        return found
    found = torch.where(found.isfinite(), found, torch.ones_like(found))
    return torch.where(found.abs() > torch.finfo(dtype).max / 2, found / 4, found)


def updated(ema, model, decay):
    new = ema.clone()
    fused_ema.update([new], [model], decay)
    return new


def assert_unmoved(backend, new, old):
    assert torch.equal(new, old)
    assert backend == "torch" or same_bits(new, old), "a zero changed its sign"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(st.data(), decays)
@same_examples
def test_equal_values_are_a_fixed_point(backend, dtype, data, decay):
    values = data.draw(tensors(dtype, 24))
    assert_unmoved(backend, updated(values, values.clone(), decay), values)


@pytest.mark.hazard(18, "good")
@pytest.mark.parametrize("pair", REAL_PAIRS, ids=str)
@given(st.data(), decays)
@same_examples
def test_equal_values_of_other_types_and_signs_are_a_fixed_point(backend, pair, data, decay):
    model = data.draw(tensors(pair[1], 24))
    ema = model.to(pair[0])
    assume((ema.double() == model.double()).any())
    ema, model = (side[ema.double() == model.double()] for side in (ema, model))
    ema = torch.where(ema == 0, -ema, ema)  # an average's -0.0 stays where the model has +0.0
    assert_unmoved(backend, updated(ema, model, decay), ema)


@pytest.mark.parametrize("pair", REAL_PAIRS, ids=str)
@given(st.data(), decays)
@same_examples
def test_between_the_two_and_within_the_bound(backend, pair, data, decay):
    ema, model = data.draw(tensors(pair[0], 24)), data.draw(tensors(pair[1], 24))
    representable = model.to(pair[0]).double() == model.double()
    model = torch.where(representable, model, torch.ones_like(model))
    new = updated(ema, model, decay)
    assert (new.double() >= torch.minimum(ema.double(), model.double())).all()
    assert (new.double() <= torch.maximum(ema.double(), model.double())).all()
    check_step([ema], [model], [new], decay, bitwise=backend != "torch")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(st.data(), decays)
@same_examples
def test_nan_and_inf_propagate(backend, dtype, data, decay):
    ema, model = (data.draw(tensors(dtype, 24, finite=False)) for _ in range(2))
    ends = st.sampled_from([math.nan, math.inf, -math.inf])
    for side in (ema, model):
        for i, value in data.draw(st.dictionaries(st.integers(0, 23), ends, max_size=8)).items():
            side[i] = value
    new = updated(ema, model, decay)
    assert new[ema.isnan() | model.isnan()].isnan().all()
    # Inf keeps its sign or becomes NaN; it never changes sign.
    true = decay * ema.double() + (1 - decay) * model.double()
    infinite = ema.isinf() | model.isinf()
    assert (new.isnan() | (new.double() == true))[infinite].all()


@pytest.mark.parametrize("pair", REAL_PAIRS, ids=str)
@given(st.data())
@same_examples
def test_a_smaller_decay_is_never_farther_from_the_model(backend, pair, data):
    """Both decays are on one side of 1/2, because the two formulas may round differently where they meet."""
    bounds = data.draw(st.sampled_from([(2.0**-126, 0.5), (math.nextafter(0.5, 1), math.nextafter(1, 0))]))
    small, large = sorted(data.draw(st.tuples(st.floats(*bounds), st.floats(*bounds))))
    ema, model = data.draw(tensors(pair[0], 24)), data.draw(tensors(pair[1], 24))
    near, far = updated(ema, model, small).double(), updated(ema, model, large).double()
    rises = model.double() > ema.double()
    assert torch.where(rises, near >= far, near <= far).all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@given(st.data())
@same_examples
def test_the_ends_of_decay(backend, pair, data):
    """For any bits, NaN included, decay 1 writes nothing and decay 0 copies, bit for bit within one type."""
    ema, model = (data.draw(tensors(real(dtype), 24, finite=False)) for dtype in pair)
    if pair[0].is_complex:
        ema, model = (torch.view_as_complex(side.view(-1, 2)) for side in (ema, model))
    assert same_bits(updated(ema, model, 1.0), ema)
    copied, expected = reals(updated(ema, model, 0.0)), reals(model.to(ema.dtype))
    payload = expected.isnan() if pair[0] != pair[1] else torch.zeros(24, dtype=torch.bool)
    assert same_bits(copied[~payload], expected[~payload])
    assert copied[payload].isnan().all()


# ---- Layouts -------------------------------------------------------------------------------------


@st.composite
def laid_out(draw, dtype, shape, generator, expand=False):
    """Random values of a shape, in a random order of strides, with gaps, at an offset, perhaps expanded."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=len(shape), max_size=len(shape)))
    single = [expand and draw(st.booleans()) for _ in shape]
    offset = draw(st.integers(0, 5))
    stored = [(1 if single[d] else shape[d]) * steps[d] for d in order]
    storage = torch.randn(offset + math.prod(stored) + 3, generator=generator, dtype=torch.float64).to(dtype)
    tensor = storage[offset : offset + math.prod(stored)].view(stored)
    tensor = tensor.permute([order.index(d) for d in range(len(shape))])
    return tensor[tuple(slice(None, None, step) for step in steps)].expand(shape), storage


@pytest.mark.hazard(4, "guarded")
@pytest.mark.hazard(6, "good")
@given(st.data(), decays)
@settings(same_examples, max_examples=250)
def test_any_shapes_strides_offsets_and_types(backend, data, decay):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    sides = []
    for _ in range(data.draw(st.integers(0, 5))):
        pair = data.draw(st.sampled_from(PAIRS))
        shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
        ema = data.draw(laid_out(pair[0], shape, generator))
        sides.append((*ema, *data.draw(laid_out(pair[1], shape, generator, expand=True))))
    ema, storages, model, model_storages = zip(*sides, strict=True) if sides else ((), (), (), ())
    old, before, before_model = ([t.clone() for t in some] for some in (ema, storages, model_storages))
    fused_ema.update(ema, model, decay)
    check_step(old, model, ema, decay, bitwise=backend != "torch")
    for tensor, values in zip(ema, old, strict=True):
        tensor.copy_(values)
    assert all(map(same_bits, storages, before))
    assert all(map(same_bits, model_storages, before_model))


# ---- Modules -------------------------------------------------------------------------------------

# "none" registers a parameter that is None. Wrappers use the name "module", but any module may.
leaves = st.sampled_from(["parameter", "buffer", "integer", "none"])
trees = st.recursive(
    leaves, lambda inner: st.dictionaries(st.sampled_from(["a", "b", "w1", "w2", "norm", "module"]), inner, max_size=4)
)


def build(tree, order, generator):
    """A module like `tree`; `order` shuffles what it registers."""
    module = nn.Module()
    for key in order(sorted(tree)):
        kind = tree[key]
        if isinstance(kind, dict):
            module.add_module(key, build(kind, order, generator))
        elif kind == "parameter":
            module.register_parameter(key, nn.Parameter(torch.randn(3, 2, generator=generator)))
        elif kind == "buffer":
            module.register_buffer(key, torch.randn(3, generator=generator))
        elif kind == "integer":
            module.register_buffer(key, torch.randint(100, (2,), generator=generator))
        else:
            module.register_parameter(key, None)
    return module


@given(st.data(), st.sampled_from(["copy", "average", "ignore"]))
@settings(same_examples, max_examples=150)
def test_modules_are_paired_by_name(backend, data, buffers):
    tree = data.draw(trees.filter(lambda tree: isinstance(tree, dict)))
    generator = torch.Generator().manual_seed(14)
    ema, model = (build(tree, lambda keys: data.draw(st.permutations(keys)), generator) for _ in range(2))
    ours, theirs = (dict(side.named_parameters()) | dict(side.named_buffers()) for side in (ema, model))
    parameters = dict(ema.named_parameters())
    old = {key: tensor.detach().clone() for key, tensor in ours.items()}
    wrapped = data.draw(st.booleans()) and not _has_a_wrappers_name(tree)
    fused_ema.update(ema, nn.ModuleDict({"module": model}) if wrapped else model, 0.9, buffers=buffers)
    for key, tensor in ours.items():
        if key in parameters or (buffers == "average" and tensor.is_floating_point()):
            check_step([old[key]], [theirs[key]], [tensor], 0.9, bitwise=backend != "torch")
        else:
            assert same_bits(tensor, old[key] if buffers == "ignore" else theirs[key]), key


def _has_a_wrappers_name(tree):
    return any(key == "module" or (isinstance(kind, dict) and _has_a_wrappers_name(kind)) for key, kind in tree.items())
