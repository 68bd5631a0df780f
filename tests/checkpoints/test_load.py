"""checkpoints.load: files that run nothing, and files that are damaged."""

import argparse
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from checkpoint_checks import contents, good, net
from torch import nn

import fused_ema
from fused_ema.checkpoints import load, save_safetensors


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def torch_load(path):
    torch.load(path, weights_only=False)


def unpickle(path):
    pickle.loads(path.read_bytes())


def pickled(protocol):
    return lambda value, path: path.write_bytes(pickle.dumps(value, protocol))


@pytest.mark.parametrize(
    ("write", "run"),
    [(torch.save, torch_load), (legacy, torch_load), *((pickled(protocol), unpickle) for protocol in (0, 2, 4))],
    ids=["zip", "legacy", "protocol 0", "protocol 2", "protocol 4"],
)
@pytest.mark.parametrize("name", ["net.pth.tar", "network-snapshot-0002048-0.100.pkl"])
@pytest.mark.parametrize("forced", [False, True], ids=["", "forced"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_not_run(write, run, name, forced, tmp_path, monkeypatch):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran, path = tmp_path / "ran", tmp_path / name
    write({"n_averaged": Hostile(ran), "args": argparse.Namespace(x=Hostile(ran))}, path)
    with pytest.raises(ValueError, match="refused, because unpickling it could run code") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value), "no word on how to run it"
    assert caught.value.__cause__ is None, "nor torch's own"
    if run is torch_load:
        assert "posix.system" in str(caught.value)
    assert not ran.exists()
    run(path)
    assert ran.exists(), "it would have run"


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_modules_and_scripts_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module")
    with pytest.raises(ValueError, match=r"found torch\.nn\.modules\.linear\.Linear; the file was refused"):
        load(tmp_path / "module")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script"))
    with pytest.raises(ValueError, match="refused"):
        load(tmp_path / "script")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind, tmp_path):
    suffix = ".safetensors" if kind == "safetensors" else ".pt"
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch")
        save_safetensors(whole, fused_ema.EMA(net()))
    else:
        (torch.save if kind == "zip" else legacy)(good()[1], whole)
    data = whole.read_bytes()
    assert load(whole)
    for size in (0, 1, 2, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="cut") as caught:
            load(cut)
        assert caught.type is ValueError


def test_suffixes_in_capitals(tmp_path):
    ema, path = fused_ema.EMA(net()), tmp_path / "MODEL.SAFETENSORS"
    save_safetensors(path, ema)
    assert load(path).keys() == ema.averaged_state_dict().keys()


def test_files_that_are_not_checkpoints(tmp_path):
    path = tmp_path / "junk"
    torch.manual_seed(0)
    for size in (10, 1000) * 20:
        path.write_bytes(bytes(torch.randint(256, (size,)).tolist()))
        with pytest.raises(ValueError, match=r"junk: expected .* damaged|junk: .* can't be read") as caught:
            load(path)
        assert caught.type is ValueError
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected a dict, found list"):
        load(path)
    for name in ("none", "none.safetensors", "."):
        if "." in name:
            pytest.importorskip("safetensors")
        with pytest.raises(OSError, match=r"none|directory"):
            load(tmp_path / name)


def test_load_takes_what_is_harmless(tmp_path):
    path = tmp_path / "state"
    state = {"a": torch.arange(3), "b": OrderedDict(c=[1, 2.5, None, "d", (True,)]), "e": argparse.Namespace(f=1)}
    for write in (torch.save, legacy):
        write(state, path)
        assert contents(load(str(path), torch.device("cpu"))) == contents(state)
    assert load(path, "meta")["a"].is_meta
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):  # load() allows it only for its own call
        torch.load(path, weights_only=True)
