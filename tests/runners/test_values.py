"""Values that stay, values that are no numbers, and the same bits however they are reached."""

import pytest
import torch
from conftest import bits, net, same_bits, tensors_of

import fused_ema

NAN, INF = float("nan"), float("inf")


@pytest.mark.hazard(18, "guarded")
def test_only_what_is_frozen_stands_still(update):
    ema, model = net(), net()
    ema.load_state_dict(model.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1e-3)
    frozen, moving = bits(ema[1], ema[2]), ema[0].weight.clone()
    update(ema, model, 0.9)
    assert same_bits(frozen, ema[1], ema[2])
    assert bool((ema[0].weight != moving).all())


@pytest.mark.hazard(32, "guarded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_bad_values_stay_where_they_are(update, dtype):
    e, p = torch.full((1000,), 2.0, dtype=dtype), torch.full((1000,), 4.0, dtype=dtype)
    p[::37] = NAN
    p[5::37] = INF
    update([e], [p], 0.5)
    finite = p.isfinite()
    assert torch.equal(e.isfinite(), finite)
    assert e[finite].eq(3).all()


@pytest.mark.hazard(34, "good")
def test_same_bits_however_it_is_called(backend):
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


@pytest.mark.hazard(34, "guarded")
def test_subnormals_are_kept_on_every_thread():
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
