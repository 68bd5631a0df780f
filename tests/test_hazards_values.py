"""HAZARDS 18, 32 to 34: values that stay, values that are no numbers, and the same bits anywhere."""

import random
import warnings

import pytest
import torch
from conftest import bits, net, same_bits, source, tensors_of
from torch import nn

import fused_ema
from fused_ema import plan

NAN, INF = float("nan"), float("inf")
REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def awkward(dtype):
    """Values of every magnitude and sign, zeros and subnormals among them; no NaN, no Inf."""
    limits = torch.finfo(dtype)
    random_ = torch.randn(3000, dtype=torch.float64) * torch.logspace(-45, 38, 3000, dtype=torch.float64)
    edges = [0.0, -0.0, limits.tiny, -limits.tiny, limits.tiny / 4, -limits.tiny / 4, limits.max, limits.min, 1.0]
    values = torch.cat([random_, torch.tensor(edges, dtype=torch.float64)])
    return values.clamp(limits.min, limits.max).to(dtype)


# ---- 18: frozen parameters


@pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")
@pytest.mark.parametrize(("ours", "theirs"), [(e, p) for e in REAL for p in REAL if e.itemsize >= p.itemsize])
def test_18_equal_values_are_a_fixed_point(update, ours, theirs):
    p = awkward(theirs)
    p = p[p.to(ours).to(theirs) == p]  # bfloat16 and float16 hold different values
    e = p.to(ours, copy=True)
    before = bits(e)
    for decay in (0.999, 1 / 3, 0.5, 1e-3, 1 - 1e-7, torch.tensor(0.999)):
        for _ in range(20):
            update([e], [p], decay)
        assert same_bits(before, e), decay


def test_18_zeros_keep_their_signs(update):
    e, p = torch.tensor([0.0, -0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, -0.0, 0.0])
    before = bits(e)
    update([e], [p], 0.9)
    assert same_bits(before, e)


def test_18_only_what_is_frozen_stands_still(update):
    ema, model = net(), net()
    ema.load_state_dict(model.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1e-3)
    frozen, moving = bits(ema[1], ema[2]), ema[0].weight.clone()
    update(ema, model, 0.9)
    assert same_bits(frozen, ema[1], ema[2])
    assert bool((ema[0].weight != moving).all())


# ---- 32: NaN and Inf in the model


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64])
def test_32_nan_and_inf_in_the_model(update, dtype):
    def average(e, p, decay):
        e, p = torch.full((40,), e, dtype=dtype), torch.full((40,), p, dtype=dtype)
        update([e], [p], decay)
        return torch.view_as_real(e)[:, 0] if dtype.is_complex else e

    for bad in (NAN, INF, -INF):
        assert average(1.0, bad, 1).tolist() == [1.0] * 40
        assert torch.equal(average(1.0, bad, 0).isnan(), torch.full((40,), bad != bad))
        assert average(bad, 1.0, 0).tolist() == [1.0] * 40  # the average recovers
        for decay in (0.5, 0.999, 0.001):
            assert not average(1.0, bad, decay).isfinite().any()
            assert not average(bad, 1.0, decay).isfinite().any()
            assert not average(bad, bad, decay).isfinite().any()
    assert average(1.0, INF, 0.999).tolist() == [INF] * 40


def test_32_bad_values_stay_where_they_are(update):
    e, p = torch.full((1000,), 2.0), torch.full((1000,), 4.0)
    p[::37] = NAN
    p[5::37] = INF
    update([e], [p], 0.5)
    finite = p.isfinite()
    assert torch.equal(e.isfinite(), finite)
    assert e[finite].unique().tolist() == [3.0]


# ---- 33: 16-bit averages


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(plan, "_warned", False)


@pytest.mark.parametrize(("dtype", "decay"), [(torch.bfloat16, 0.99), (torch.float16, 0.999)])
def test_33_one_warning_for_16_bit_averages(update, kind, unwarned, dtype, decay):
    ema, model = source(kind, {"w": torch.ones(3, dtype=dtype)}), source(kind, {"w": torch.zeros(3, dtype=dtype)})
    with pytest.warns(UserWarning, match=f"16 bits stand still at decay {decay}"):
        update(ema, model, decay)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(ema, model, decay)


def test_33_the_warning_points_at_the_caller(backend, kind, unwarned, monkeypatch):
    average, model = {"w": torch.ones(3).bfloat16()}, {"w": torch.zeros(3).bfloat16()}
    ema, model = source(kind, average), source(kind, model)
    steps = [lambda: fused_ema.update(ema, model, 0.9999), lambda: fused_ema.bind(ema, model).update(0.9999)]
    for step in steps:
        monkeypatch.setattr(plan, "_warned", False)
        with pytest.warns(UserWarning, match="16 bits") as caught:
            step()
        assert caught[0].filename == __file__


def test_33_no_warning_where_averages_move(update, kind, unwarned):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ours, theirs, decay in [
            (torch.float32, torch.bfloat16, 0.9999),
            (torch.float64, torch.float16, 0.9999),
            (torch.bfloat16, torch.bfloat16, 0.9),
            (torch.float16, torch.float16, 0.99),
            (torch.bfloat16, torch.bfloat16, 1.0),  # writes nothing
        ]:
            ema = source(kind, {"w": torch.ones(3, dtype=ours)})
            model = source(kind, {"w": torch.zeros(3, dtype=theirs)})
            update(ema, model, decay)
            fused_ema.copy_(ema, model)


def test_33_no_warning_for_averages_that_were_in_16_bits(stepper, unwarned):
    ema, model = net().bfloat16(), net().bfloat16()
    step = stepper(ema, model)
    ema.float(), model.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(0.9999)


def test_33_buffers_in_16_bits_that_are_copied_do_not_count(update, unwarned):
    ema, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for module in (ema, model):
        module.running_mean = module.running_mean.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(ema, model, 0.9999)
    with pytest.warns(UserWarning, match="16 bits"):
        update(ema, model, 0.9999, buffers="average")


# ---- 34: the same bits, whatever the threads, the order and the alignment


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 3, 64, 1000, 4097, 70001, 131072]
    pairs = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
             (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]  # fmt: skip
    return [
        (torch.randn(size, generator=generator).to(e), torch.randn(size, generator=generator).to(p))
        for size in sizes
        for e, p in pairs
    ]


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("decay", [0.9, 0.25])
def test_34_same_bits_for_any_threads_order_and_alignment(update, restore_threads, decay):
    pairs = values(0)
    expected = [e.clone() for e, _ in pairs]
    torch.set_num_threads(1)
    for e, (_, p) in zip(expected, pairs, strict=True):
        update([e], [p], decay)
    for threads, seed in [(1, 1), (2, 2), (5, 3)]:
        torch.set_num_threads(threads)
        shuffle = random.Random(seed)
        order = shuffle.sample(range(len(pairs)), len(pairs))
        moved = {}
        for i in order:
            shift_e, shift_p = shuffle.randrange(16), shuffle.randrange(16)
            moved[i] = [torch.cat([t.new_zeros(s), t])[s:] for t, s in zip(pairs[i], (shift_e, shift_p), strict=True)]
        update([moved[i][0] for i in order], [moved[i][1] for i in order], decay)
        for i in order:
            assert torch.equal(moved[i][0], expected[i]), (threads, pairs[i][0].dtype, pairs[i][0].numel())


def test_34_same_bits_for_any_strides(update):
    e, p = torch.randn(40, 50), torch.randn(40, 50)
    expected = e.clone()
    update([expected], [p], 0.9)
    for permuted_e in (e.clone(), e.t().clone().t(), torch.cat([e, e], 1)[:, :50]):
        update([permuted_e], [p.t().clone().t()], 0.9)
        assert torch.equal(permuted_e, expected)


def test_34_same_bits_however_it_is_called(backend):
    results = []
    for call in ("module", "dict", "list", "bound", "averaged model"):
        torch.manual_seed(0)
        ema, model = net(), net()
        if call == "averaged model":
            step = fused_ema.get_ema_multi_avg_fn(0.9)
            step(list(ema.parameters()), list(model.parameters()), 1)
        elif call == "bound":
            fused_ema.bind(ema, model, buffers="ignore").update(0.9)
        else:
            sides = (ema, model) if call == "module" else (dict(m.named_parameters()) for m in (ema, model))
            if call == "list":
                sides = (list(side.values()) for side in sides)
            fused_ema.update(*sides, 0.9, buffers="ignore")
        results.append([parameter.detach() for parameter in tensors_of(ema)[:8]])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_34_subnormals_are_kept_on_every_thread():
    if fused_ema.backend("cpu") != "cpu":
        pytest.skip("no native extension: PyTorch's own operations follow torch.set_flush_denormal")
    size = 600_001  # several threads' work
    ema, model = torch.full((size,), 1e-40), torch.full((size,), 3e-40)
    wanted = torch.full((size,), 2e-40)
    if not torch.set_flush_denormal(True):
        pytest.fail("this machine can't flush subnormals, so nothing was tested")
    try:
        fused_ema.update([ema], [model], 0.5)
        flushed = torch.tensor(1e-40, dtype=torch.float64).float() * 1
    finally:
        torch.set_flush_denormal(False)
    assert flushed == 0, "the caller's own mode is back"
    assert (ema.view(torch.int32) - wanted.view(torch.int32)).abs().max() <= 1
