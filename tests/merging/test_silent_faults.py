"""Mistakes and accidents that would otherwise give a wrong average without a word."""

import json
import os
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from merge_checks import KINDS, load, out_of, save, saved
from safetensors.torch import save_file

import fused_ema
from fused_ema import merge
from fused_ema.merging import run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_a_rounded_average_that_overflows_is_named(dtype, tmp_path):
    largest = torch.finfo(dtype).max
    paths = saved("torch", tmp_path, [{"w": torch.full((9,), sign * largest).to(dtype)} for sign in (-1, 1)])
    with pytest.warns(UserWarning, match="NaN or infinite values are in the average of 'w'"):
        merge(paths, tmp_path / "o.pt", [-5, 6])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_written_to_meanwhile(kind, tmp_path, monkeypatch):
    paths = saved(kind, tmp_path, [{"w": torch.full((100,), float(i))} for i in range(2)])
    target = paths[1] if paths[1].is_file() else next(each for each in paths[1].iterdir() if each.stat().st_size > 400)
    before = run.average

    def average(*arguments):
        found = before(*arguments)
        os.utime(target, ns=(1, 1))
        return found

    monkeypatch.setattr(sys.modules["fused_ema.merging.merge"], "average", average)
    with pytest.raises(ValueError, match=f"{target.name}: changed while it was read"):
        merge(paths, out_of(kind, tmp_path))
    assert not out_of(kind, tmp_path).exists()


def test_a_torch_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch):
    paths = saved("torch", tmp_path, [{"a": torch.ones(100), "b": torch.zeros(100)}] * 2)
    other = tmp_path / "other.pt"
    torch.save({"b": torch.zeros(100), "a": torch.ones(100)}, other)
    before = fused_ema.merging.torch_files.load

    def opened(path, *arguments, **options):
        found = before(path, *arguments, **options)
        if path == paths[1] and other.exists():
            os.replace(other, path)
        return found

    monkeypatch.setattr("fused_ema.merging.torch_files.load", opened)
    with pytest.raises(ValueError, match=r"step-1\.pt: changed while it was read"):
        merge(paths, tmp_path / "o.pt")


def test_safetensors_whose_tensors_overlap_or_leave_bytes_out(tmp_path):
    for at, other, size in (
        ([0, 8], [0, 8], 16),
        ([0, 8], [12, 20], 20),
        ([4, 12], [12, 20], 20),
        ([0, 8], [8, 16], 24),
    ):
        header = json.dumps(
            {name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in (("a", at), ("b", other))}
        ).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
        with pytest.raises(ValueError, match=r"x.safetensors: truncated or corrupt.*expected"):
            merge([path], tmp_path / "o.safetensors")


def test_configurations_that_differ_are_named(tmp_path, recwarn):
    paths = [tmp_path / f"{i}" for i in range(3)]
    for i, path in enumerate(paths):
        path.mkdir()
        save_file({"w": torch.ones(3)}, path / "adapter_model.safetensors")
        settings = {"lora_alpha": 8 * (i + 1), "r": 4, "transformers_version": str(i), "_name_or_path": str(i)}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        (path / "model.py").write_text("code")
        (path / "trainer_state.json").write_text("{}")
        (path / "model.safetensors.index.fp16.json").write_text("{}")
    out = merge(paths, tmp_path / "o")
    (found,) = [str(each.message) for each in recwarn if issubclass(each.category, UserWarning)]
    assert found.endswith("in lora_alpha; merge only models with the same configuration")
    assert sorted(each.name for each in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.py",
    ]


def test_dcp_keeps_the_keys_of_each_name(tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    paths = saved("dcp", tmp_path, [{"app": {"model": {"0.weight": torch.full((3,), float(i))}}} for i in range(2)])
    for key in (None, "app.model"):
        out = merge(paths, tmp_path / f"o{key}", key=key)
        dcp_to_torch_save(out, tmp_path / "x.pt")
        found = torch.load(tmp_path / "x.pt", weights_only=True)
        assert found["app"]["model"]["0.weight"].tolist() == [0.5] * 3


def test_lists_in_dcp_folders(tmp_path):
    paths = saved("dcp", tmp_path, [{"layers": [torch.zeros(2), torch.full((2,), float(i))]} for i in range(2)])
    found = {"layers": [torch.ones(2), torch.ones(2)]}
    dcp.load(found, checkpoint_id=merge(paths, tmp_path / "o"))
    assert torch.stack(found["layers"]).tolist() == [[0, 0], [0.5, 0.5]]


@pytest.mark.parametrize("name", ["app.optimizer.w", "opt.w.exp_avg", "x.momentum_buffer"])
def test_states_of_optimizers_are_not_averaged_unasked(name, tmp_path):
    paths = saved("dcp", tmp_path, [{"model.w": torch.ones(3), name: torch.ones(3)}] * 2)
    with pytest.raises(ValueError, match=f"found '{name}'; name the model by key="):
        merge(paths, tmp_path / "o")


def test_what_stops_a_dcp_merge_is_what_is_raised(tmp_path, monkeypatch):
    paths = saved("dcp", tmp_path, [{"w": torch.ones(3), "v": torch.ones(3)}] * 2)
    for error in (KeyboardInterrupt(), OSError(5, "broken")):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(sys.modules["fused_ema.merging.merge"], "average", fail)
        with pytest.raises(type(error)):
            merge(paths, tmp_path / "o")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=23))
    with pytest.raises(OSError, match="No space left for the 24 bytes of the average, 23 are free"):
        merge(paths, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_files_that_are_missing_or_cut_are_named(tmp_path):
    paths = saved("folder", tmp_path, [{f"{i}": torch.ones(3) for i in range(6)}] * 2)
    shard = paths[1] / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"step-1 names this file, which is not there: '{shard}'"):
        merge(paths, tmp_path / "o")
    path = save("torch", tmp_path / "x", {"w": torch.randn(20000)})
    whole = path.read_bytes()
    for size in range(1, len(whole), 4001):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.pt: "):
            merge([path], tmp_path / "o.pt")


def test_too_many_files_say_so(tmp_path):
    import resource

    paths = saved("safetensors", tmp_path, [{"w": torch.ones(3)}] * 40)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        with pytest.raises(OSError, match="raise the limit by `ulimit -n`"):
            merge(paths, tmp_path / "o.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_weights_as_text(tmp_path):
    paths = saved("torch", tmp_path, [{"w": torch.full((3,), float(i))} for i in range(2)])
    assert load("torch", merge(paths, tmp_path / "o.pt", "-1, 3"), None)["w"].tolist() == [1.5] * 3
    for wrong in (5, None, 0.5):
        with pytest.raises(TypeError, match="weights: expected a rule or a list of numbers, found"):
            merge(paths, tmp_path / "o.pt", wrong)
