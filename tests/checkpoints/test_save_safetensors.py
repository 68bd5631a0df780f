"""checkpoints.save_safetensors: names, types and values."""

import sys

import pytest
import torch
from checkpoint_checks import PARAMETERS, net, ours, same, train
from torch import nn

import fused_ema
from fused_ema.checkpoints import load, restore, save_safetensors


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.torch")


def test_safetensors_load_into_a_fresh_model(safetensors, tmp_path):
    model = net()
    ema = fused_ema.EMA(model, [0.5, 0.9])
    train(model)
    ema.update()
    for index in (0, 1):
        path, fresh = tmp_path / f"{index}.safetensors", net(seed=9)
        save_safetensors(str(path), ema, index)
        fresh.load_state_dict(safetensors.load_file(path), strict=True)
        assert same(fresh.parameters(), ours(ema, index))
        assert same(fresh.buffers(), model.buffers())
        restored = fused_ema.EMA(net(seed=9))
        restore(restored, {"state_dict_ema": load(path)})
        assert same(ours(restored), ours(ema, index))
        with ema.swapped(index):
            save_safetensors(tmp_path / "swapped.safetensors", ema, index)
        assert (tmp_path / "swapped.safetensors").read_bytes() == path.read_bytes()


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = net()


@pytest.mark.parametrize("inner", [net, Outer])
def test_safetensors_of_a_wrapped_model(safetensors, inner, tmp_path):
    def wrap_parts(model):
        for name, child in [*model.named_children()]:
            setattr(model, name, nn.DataParallel(torch.compile(child)))
        return model

    both = lambda model: torch.compile(nn.DataParallel(model))  # noqa: E731
    for wrap in (nn.Module.eval, nn.DataParallel, torch.compile, both, wrap_parts):
        save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(wrap(inner())))
        inner().load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"), strict=True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_safetensors_dtype(safetensors, dtype, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(net(torch.bfloat16)), dtype=dtype)
    found = safetensors.load_file(tmp_path / "x.safetensors")
    assert {found[name].dtype for name in PARAMETERS} == {dtype or torch.float32}
    assert found["norm.running_mean"].dtype == (dtype or torch.bfloat16)
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    net(torch.bfloat16).load_state_dict(found, strict=True)


def test_safetensors_of_strides_and_complex_numbers(safetensors, tmp_path):
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    model.b = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(model), dtype=torch.bfloat16)
    found = safetensors.load_file(tmp_path / "x.safetensors")
    assert same([found["a"], found["b"]], [model.a.bfloat16(), model.b])
    model.b = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"ema\['b'\].*complex128"):
        save_safetensors(tmp_path / "y.safetensors", fused_ema.EMA(model))
    assert not (tmp_path / "y.safetensors").exists()


def test_a_refusal_leaves_the_file_as_it_was(safetensors, tmp_path):
    path, model = tmp_path / "x.safetensors", net()
    save_safetensors(path, fused_ema.EMA(model))
    before = path.read_bytes()
    model.middle.bias.data.fill_(1e30)
    ema = fused_ema.EMA(model)
    with pytest.raises(ValueError, match=r"middle\.bias"):
        save_safetensors(path, ema, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype: expected float64"):
        save_safetensors(path, ema, dtype=torch.int8)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
    save_safetensors(path, ema)
    assert path.read_bytes() != before


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_safetensors(tmp_path / "x.safetensors", fused_ema.EMA(net()))
    with pytest.raises(ImportError, match="pip install safetensors"):
        load(tmp_path / "x.safetensors")
    torch.save({"a": 1}, tmp_path / "x.pt")
    assert load(tmp_path / "x.pt") == {"a": 1}


def test_8_bit_tensors_are_cast_too(tmp_path):
    model = net()
    model.scale = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    ema = fused_ema.EMA(model, select=lambda name, tensor: name != "scale")
    save_safetensors(tmp_path / "w.safetensors", ema, dtype=torch.float16)
    assert load(tmp_path / "w.safetensors")["scale"].tolist() == [1, 1, 1]


def test_the_name_of_safetensors_metadata_is_refused(tmp_path):
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(3)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="__metadata__"):
        save_safetensors(path, fused_ema.EMA(model))
    assert path.read_bytes() == b"before"
