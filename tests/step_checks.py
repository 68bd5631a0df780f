"""Checks of updates on a given device: test_numerics.py runs them on the CPU, test_gpu_*.py on CUDA."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import torch
from oracle import (
    FLOATS,
    FORMAT,
    PAIRS,
    TILE_BYTES,
    check_step,
    reals,
    same_bits,
    same_bits_but_nan,
    value_pair,
    values,
)
from torch import nn
from torch.optim import swa_utils

import fused_ema

COUNTS = [0, 1, 449, 5000]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
INTEGERS += [getattr(torch, name) for name in ("uint16", "uint32", "uint64") if hasattr(torch, name)]


def guarded(tensor, offset, device):
    """A copy of a 1-d tensor on `device`, `offset` elements into a storage, and the whole storage."""
    storage = torch.full((offset + len(tensor) + 5,), 7, dtype=tensor.dtype, device=device)
    view = storage[offset : offset + len(tensor)]
    view.copy_(tensor)
    return view, storage


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def name(parameter):
    if isinstance(parameter, tuple):
        return "-".join(str(dtype).removeprefix("torch.") for dtype in parameter)
    return str(parameter).removeprefix("torch.")


def check_sizes(device, pair, decay, bitwise):
    """One call over all sizes and alignments; no byte next to the tensors changes."""
    ema_dtype, model_dtype = pair
    rng = np.random.default_rng(1)
    tile = TILE_BYTES // ema_dtype.itemsize
    sides = []
    for size in (0, 1, 7, tile - 1, tile, tile + 1):
        for ema_offset, model_offset in ((0, 0), (1, 0), (0, 1), (3, 2)):
            ema, model = value_pair(ema_dtype, model_dtype, size, rng)
            sides.append((*guarded(ema, ema_offset, device), *guarded(model, model_offset, device)))
    ema, ema_storages, model, model_storages = zip(*sides, strict=True)
    old, old_storages, old_models = clones(ema), clones(ema_storages), clones(model_storages)
    fused_ema.update(ema, model, decay)
    check_step(old, model, ema, decay, bitwise=bitwise)
    for view, values_before in zip(ema, old, strict=True):
        view.copy_(values_before)
    assert all(map(same_bits, ema_storages, old_storages)), "written next to an average"
    assert all(map(same_bits, model_storages, old_models)), "written to a model"


def check_count(device, count, decay, bitwise):
    """Many small tensors in one call, which cycle through all pairs of types."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(0, 40, count).tolist()
    pairs = [value_pair(*pair, size, rng) for pair, size in zip(itertools.cycle(PAIRS), sizes, strict=False)]
    ema, model = ([side.to(device) for side in one] for one in (zip(*pairs, strict=True) if pairs else ((), ())))
    old = clones(ema)
    fused_ema.update(ema, model, decay)
    check_step(old, model, ema, decay, bitwise=bitwise)


def check_layouts(device, decay, bitwise):
    """Strides that differ between the two sides, gaps, zero strides of the model, no dimensions and many."""

    def make(dtype, seed, *shape):
        return values(dtype, math.prod(shape), np.random.default_rng(seed)).reshape(shape).to(device)

    def twelve(tensor):
        """12 dimensions that can't be merged: every second one is taken out of a larger tensor."""
        return tensor.view([3] * 12)[(slice(0, 2),) * 12]

    for ema_dtype, model_dtype in ((torch.float32, torch.bfloat16), (torch.complex64, torch.complex64)):
        image = (3, 8, 5, 7)
        e, p = partial(make, ema_dtype, 14), partial(make, model_dtype, 15)
        pairs = [
            (e(*image).contiguous(memory_format=torch.channels_last), p(*image)),
            (e(*image), p(*image).contiguous(memory_format=torch.channels_last)),
            tuple(side(*image).contiguous(memory_format=torch.channels_last) for side in (e, p)),
            (e(6, 9).t(), p(9, 6)),
            (e(6, 9).t(), p(6, 9).t()),
            (e(4, 5, 6).permute(2, 0, 1), p(5, 6, 4).permute(1, 2, 0)),
            (e(30)[::3], p(10)),
            (e(30)[1::3], p(20)[::2]),
            (e(8, 12)[:, 2:7], p(8, 12)[:, 1:6]),
            (e(6, 5), p(5).expand(6, 5)),
            (e(6, 5), p(6, 1).expand(6, 5)),
            (e(4, 3), p().expand(4, 3)),
            (e(), p()),
            (e(1, 1, 1), p(1).view(1, 1, 1)),
            (e(70, 130), p(130, 70).t()),
            (twelve(e(3**12)), twelve(p(3**12))),
        ]
        ema, model = (list(side) for side in zip(*pairs, strict=True))
        whole = [tensor if tensor._base is None else tensor._base for tensor in ema]
        old, before = clones(ema), clones(whole)
        fused_ema.update(ema, model, decay)
        check_step(old, model, ema, decay, bitwise=bitwise)
        for view, values_before in zip(ema, old, strict=True):
            view.copy_(values_before)
        assert all(map(same_bits, whole, before)), "written into a gap between elements"


def nans(dtype):
    """Quiet and signalling NaN of both signs, with payloads."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype).view(integer)
    quiet = 1 << FORMAT[dtype][0] - 2
    return torch.cat([infinite + payload for payload in (1, 5, quiet, quiet + 3)]).view(dtype)


def check_non_finite(device, dtype, decay, *, kept=True):
    """`kept`: an average that is as infinite as the model, or a zero, keeps its bits."""
    ends = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.5], dtype=dtype, device=device)
    ema, model = (side.reshape(-1) for side in torch.meshgrid(ends, ends, indexing="ij"))
    old, new = ema.clone(), ema.clone()
    fused_ema.update([new], [model], decay)
    if decay == 1:
        assert same_bits(new, old)
    elif decay == 0:
        assert same_bits(new, model)
    else:
        finite = old.isfinite() & model.isfinite()
        assert not new[~finite].isfinite().any()
        assert new[finite].isfinite().all()
        nan = old.isnan() | model.isnan()
        assert new[nan].isnan().all()
        equal = (old == model) & (finite | kept)
        assert torch.equal(new[equal], old[equal])
        assert not kept or same_bits(new[equal], old[equal])
        lerp = torch.lerp(old.double(), model.double(), 1 - decay).to(dtype)  # where one is Inf: this, or NaN
        assert (new.isnan() | (new == lerp))[~finite & (old != model)].all()
        check_step([old[finite]], [model[finite]], [new[finite]], decay, bitwise=False)


def check_copy(device, call):
    """All pairs of real types, complex types and integers, as Tensor.to; NaN keeps its bits within one type."""
    pairs = [*itertools.product(FLOATS, FLOATS), *itertools.product([torch.complex64, torch.complex128], repeat=2)]
    rng = np.random.default_rng(4)
    for ema_dtype, model_dtype in pairs:
        model = values(model_dtype, 5000, rng)
        reals(model)[:8] = nans(reals(model).dtype)
        reals(model)[8:10] = torch.tensor([math.inf, -math.inf])
        model = model.to(device)
        ema = torch.full_like(model, 3, dtype=ema_dtype)
        call([ema], [model])
        same = same_bits if ema_dtype == model_dtype else same_bits_but_nan
        assert same(ema, model.to(ema_dtype)), f"{ema_dtype} <- {model_dtype}"
    for dtype in INTEGERS:
        model = torch.from_numpy(rng.integers(0, 2, 5001 * dtype.itemsize, np.uint8)).view(dtype).to(device)
        ema = torch.zeros_like(model)
        call([ema], [model])
        assert same_bits(ema, model), dtype


def check_swap(device):
    rng = np.random.default_rng(5)
    ema, model = [], []
    for dtype, offset in itertools.product([*FLOATS, torch.complex64, torch.complex128], (0, 1)):
        for side in (ema, model):
            tensor = values(dtype, 5000, rng)
            reals(tensor)[:8] = nans(reals(tensor).dtype)
            side.append(tensor.to(device)[offset:])
    for dtype in INTEGERS:
        for side in (ema, model):
            side.append(torch.from_numpy(rng.integers(0, 2, 77 * dtype.itemsize, np.uint8)).view(dtype).to(device))
    ema.append(ema[0].clone()[:4992].view(64, 78))
    model.append(ema[0].clone()[:4992].view(78, 64).t())
    addresses = [tensor.data_ptr() for tensor in ema + model]
    old_ema, old_model = clones(ema), clones(model)
    fused_ema.swap_(ema, model)
    assert all(map(same_bits, ema, old_model))
    assert all(map(same_bits, model, old_ema))
    assert addresses == [tensor.data_ptr() for tensor in ema + model]
    fused_ema.swap_(ema, model)
    assert all(map(same_bits, ema + model, old_ema + old_model))


def check_order_pieces_alignment(device):
    """The same elements in other orders of tensors, in pieces, and at other addresses give the same bits."""
    rng = np.random.default_rng(6)
    for pair, decay in itertools.product(PAIRS, (0.3, 0.999)):
        n = 2 * TILE_BYTES // pair[0].itemsize + 37
        ema, model = (side.to(device) for side in value_pair(*pair, n, rng))
        expected = ema.clone()
        fused_ema.update([expected], [model], decay)
        for ema_offset, model_offset in ((1, 0), (0, 1), (3, 5)):
            moved = guarded(ema, ema_offset, device)[0]
            fused_ema.update([moved], [guarded(model, model_offset, device)[0]], decay)
            assert same_bits(moved, expected), (pair, decay, ema_offset, model_offset)
        pieces = ema.clone()
        ends = [0, *sorted(rng.integers(0, n, 20).tolist()), n]
        slices = [slice(*pair_of_ends) for pair_of_ends in itertools.pairwise(ends)]
        rng.shuffle(slices)
        fused_ema.update([pieces[s] for s in slices], [model[s] for s in slices], decay)
        assert same_bits(pieces, expected), (pair, decay, ends)


def check_device_decay(device, decay, dtype, bitwise):
    rng = np.random.default_rng(8)
    pairs = [value_pair(*pair, 999, rng) for pair in PAIRS]
    ema, model = ([side.to(device) for side in one] for one in zip(*pairs, strict=True))
    held = torch.tensor(decay, dtype=dtype, device=device)
    old, by_number = clones(ema), clones(ema)
    fused_ema.update(by_number, model, held.item())
    fused_ema.update(ema, model, held)
    check_step(old, model, ema, held.item(), bitwise=bitwise)
    if bitwise:
        assert all(map(same_bits, ema, by_number))


class Block(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.second, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):
        return torch.relu(self.norm2(self.second(torch.relu(self.norm1(self.first(x))))) + self.short(x))


def residual_network():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Block(8, 8), Block(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return network.append(nn.Linear(12, 5)), torch.randn(16, 3, 8, 8)


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(4, 6, 16)


def check_training(device, make, buffers, model_dtype):
    """50 steps of an optimizer, against averages in float64 and the sum of the bounds of all steps."""
    torch.manual_seed(11)
    network, x = make()
    ema = copy.deepcopy(network).to(device)
    network, x = network.to(device, model_dtype), x.to(device, model_dtype)
    averaged = dict(ema.named_parameters())
    if buffers == "average":
        averaged |= {key: b for key, b in ema.named_buffers() if b.is_floating_point()}
    true = {key: tensor.detach().double() for key, tensor in averaged.items()}
    allowed = {key: torch.zeros_like(tensor) for key, tensor in true.items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(50):
        decay = min(0.99, (1 + step) / (10 + step))
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
        old = {key: tensor.detach().clone() for key, tensor in averaged.items()}
        fused_ema.update(ema, network, decay, buffers=buffers)
        theirs = dict(network.named_parameters()) | dict(network.named_buffers())
        for key, tensor in averaged.items():
            model = theirs[key].detach().double()
            half_ulp = 2.0**-24 * tensor.detach().double().abs() + 2.0**-150
            one_step = half_ulp + 2.0**-23 * min(decay, 1 - decay) * (model - old[key]).abs()
            true[key].lerp_(model, 1 - decay)
            allowed[key].mul_(decay).add_(one_step)
    moved = 0
    for key, tensor in averaged.items():
        assert ((tensor - true[key]).abs() <= allowed[key] * (1 + 2.0**-20)).all(), key
        moved += (tensor != theirs[key]).sum().item()
    assert moved > 100
    for key, buffer in ema.named_buffers():
        if key not in averaged:
            assert same_bits(buffer, theirs[key].to(buffer.dtype)), key


def check_averaged_model(device, use_buffers, decay=0.9, kind=swa_utils.AveragedModel):
    torch.manual_seed(12)
    network, x = residual_network()
    network, x = network.to(device), x.to(device)
    ours, theirs = (
        each(network, multi_avg_fn=module.get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
        for each, module in ((kind, fused_ema), (swa_utils.AveragedModel, swa_utils))
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(20):
        network(x).square().mean().backward()
        optimizer.step()
        ours.update_parameters(network)
        theirs.update_parameters(network)
    assert ours.n_averaged == 20
    model, peers = network.state_dict(), theirs.module.state_dict()
    for key, tensor in ours.module.state_dict().items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, model[key]), key
        elif "running" in key and not use_buffers:
            assert same_bits(tensor, model[key]), key
        else:
            # At each step both err by half an ulp and by the rounding of the product, and both remember ten steps.
            allowed = 20 * (2.0**-24 * tensor.abs() + 2.0**-22 * (1 - decay) * (model[key] - tensor).abs() + 2.0**-149)
            assert ((tensor - peers[key]).abs() <= 2 * allowed).all(), key
            assert not torch.equal(tensor, model[key]), key
