"""Feeds broken and hostile files and states to the functions that read them.

    python tests/long/fuzz/fuzz_checkpoints.py -runs=2000 -seed=1

A reader returns a result or raises an error that its docstring names; it runs no code from a file, and a refusal leaves
the manager as it was.
"""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import resource
import struct
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fused_ema"]):
    import fused_ema
    from fused_ema import checkpoints, posthoc
    from fused_ema.schedules import inverse_power, power_function
import harness
import torch
from torch import nn

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
MARKER = FOLDER / "marker"
MOST_MIB = 4096
HUGE = (2**40, 2**63 - 1, 2**63, 2**64, 10**400, -1, 0)
ODD = (None, True, -1.5, math.nan, math.inf, "x", "", b"b", [], [1], {}, {"a": 1}, (), 1j, *HUGE)
READ, TAKEN = (ValueError, OSError), (ValueError, TypeError)


class Runs:
    def __reduce__(self):
        return (os.system, (f"touch {MARKER}",))


class Network:
    """A class of another package, in a pickle as EDM2 writes them."""


def manager():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.complex64))
    model[1].weight = nn.Parameter(torch.ones(3))
    model[0].bias = model[1].bias  # tied
    return fused_ema.EMA(model, [power_function(0.1), inverse_power(0.9), power_function(0.05)], buffers="average")


EMA = manager()
for _ in range(3):
    EMA.update()
FIRST = copy.deepcopy(EMA.state_dict())


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def seeds():
    """Valid states, and valid files by name."""
    states = {layout: checkpoints.export(EMA, layout) for layout in checkpoints.LAYOUTS}
    states["manager"] = copy.deepcopy(FIRST)
    files = {f"{name}.pt": saved(state) for name, state in states.items()}
    files["runs.pt"], files["network.pt"] = saved({"state_dict_ema": Runs()}), saved({"ema": Network()})
    files["runs.pkl"], files["network.pkl"] = pickle.dumps({"a": Runs()}), pickle.dumps({"ema": Network()})
    checkpoints.save_safetensors(FOLDER / "model.safetensors", EMA)
    files["model.safetensors"] = (FOLDER / "model.safetensors").read_bytes()
    for _ in range(2):
        path = posthoc.save_snapshot(FOLDER / "good", EMA)
        files[path.name] = path.read_bytes()
        EMA.update()
    EMA.load_state_dict(FIRST)
    return states, files


STATES, FILES = seeds()
SNAPSHOTS = [name for name in FILES if name.startswith("ema-")]


class Damage(harness.Choices):
    def tensor(self, like):
        kind = self.below(14)
        usual = type(like) in (torch.Tensor, nn.Parameter) and like.layout is torch.strided
        usual = (
            usual
            and not (like.is_nested or like.is_quantized or like.is_meta)
            and like.untyped_storage().nbytes() >= like.nbytes
        )
        value = like.detach().clone() if usual else torch.ones(2, 2)
        if kind == 0:
            return value.to(self.of((torch.float64, torch.float16, torch.int64, torch.complex128, torch.bool)))
        if kind == 1:
            return torch.zeros(self.of(((), (0,), (7,), (1, 1, 1), (2, 0))))
        if kind == 2:
            return value.to("meta")
        if kind == 3:
            return torch.zeros(1).expand(2**40)
        if kind == 4:
            value.untyped_storage().resize_(self.of((0, 3)))
        elif kind == 5:
            return torch.ones(2, 2).to_sparse()
        elif kind == 6:
            return torch.quantize_per_tensor(torch.ones(value.shape), 0.1, 0, torch.qint8)
        elif kind == 7:
            return value * math.nan if value.is_floating_point() else value
        elif kind == 8 and value.is_complex():
            return value.conj()
        elif kind == 9:
            return nn.UninitializedParameter()
        elif kind == 10:
            return torch.nested.nested_tensor([torch.ones(2)])
        elif kind == 11:
            return torch.zeros(value.shape, dtype=torch.float8_e4m3fn)
        elif kind == 12 and value.is_floating_point():
            return torch._neg_view(value)
        return value

    def mutated(self, value, depth=0):
        """The object with one change somewhere inside."""
        if isinstance(value, (dict, list)) and value and self.below(8 if depth else 32):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            key = self.of(keys)
            new = value.copy()
            what = self.below(12)
            if what == 0:
                del new[key]
            elif what == 1:
                if isinstance(new, dict):
                    new[self.of((3, None, "module.x", f"module.{key}", "", ("a",)))] = new[key]
                else:
                    new.append(new[key])
            else:
                new[key] = self.mutated(value[key], depth + 1)
            return new
        return self.tensor(value) if self.below(2) else self.of((*ODD, Network()))

    def damaged(self, content):
        for _ in range(1 + self.below(3)):
            what, at = self.below(6), self.below(len(content) + 1)
            if what == 0:
                content = content[:at]
            elif what == 1:
                content = content[:at] + self.data.ConsumeBytes(1 + self.below(8)) + content[at + 1 :]
            elif what == 2:
                content = content[:at] + self.of(list(FILES.values()))[at:]
            elif what == 3:
                content = content[:at] + content[self.below(len(content) + 1) :]
            elif what == 4:
                content += self.data.ConsumeBytes(self.below(20))
        return content

    def safetensors(self, content):
        """The file with another header."""
        size = struct.unpack("<Q", content[:8])[0]
        header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
        about = header.get("__metadata__", {})
        for _ in range(1 + self.below(2)):
            if about and self.below(2):
                key = self.of(list(about))
                value = about[key]
                with contextlib.suppress(ValueError, TypeError, RecursionError):  # no JSON
                    value = json.dumps(self.mutated_json(json.loads(value)))
                if self.below(4) == 0:
                    value = self.of(("", "[", "NaN", "[" * 5000, "1e999", "9" * 5000, '"\\ud800"', "null", "2"))
                about[key] = value
                continue
            key = self.of(list(header))
            if self.below(4) == 0:
                header[self.of(("0/x", "", "é", "__metadata__", key + ".x"))] = header.pop(key)
            elif isinstance(header[key], dict) and header[key] and self.below(8):
                field = self.of(list(header[key]))
                options = {
                    "dtype": ("F64", "BF16", "I8", "C64", "F8_E4M3", "F4", "X", 3),
                    "shape": ([2**50], [2**32, 2**32], [-1], [], [0], [1] * 100, [1.5], "3", None, [3], [2, 3, 1]),
                    "data_offsets": ([0, 2**50], [8, 0], [-8, 0], [0], [0, 0], [4, 16], [0, 24], None),
                }
                header[key][field] = self.of(options.get(field, ("x", None, [1])))
            else:
                header[key] = self.of((None, 3, [], {}, "x"))
        text = json.dumps(header).encode()
        if self.below(8) == 0:
            text = text[:-1] + b"," + text[1:]  # every name twice
        size = len(text) if self.below(8) else self.of((0, 1, 7, 2**63, 2**64 - 1, 10**8, len(text) + 1))
        return struct.pack("<Q", size) + text + rest

    def mutated_json(self, value, depth=0):
        if isinstance(value, (dict, list)) and value and self.below(6):
            new = value.copy()
            key = self.of(list(value) if isinstance(value, dict) else range(len(value)))
            if self.below(4) == 0:
                del new[key]
            else:
                new[key] = self.mutated_json(value[key], depth + 1)
            return new
        return self.of(
            (None, True, "x", "", -1, 0, 5, 1.5, math.nan, math.inf, [], {}, [1], {"a": 1}, [[]], 2**70, 2**1100)
        )

    def pickled(self, content):
        """An archive of torch.save, with the bytes of one member changed."""
        try:
            source = zipfile.ZipFile(io.BytesIO(content))
        except zipfile.BadZipFile:
            return self.damaged(content)
        chosen = self.of(source.namelist())
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name in source.namelist():
                member = source.read(name)
                archive.writestr(name, self.damaged(member) if name == chosen else member)
        return file.getvalue()


def state_of(ema):
    found = ema.state_dict()
    bits = [{k: (v.dtype, v.shape, v.detach().clone().view(-1).view(torch.uint8).numpy().tobytes())
             for k, v in average.items()} for average in found.pop("averages")]  # fmt: skip
    return bits, repr(found), ema.decay


FRESH = state_of(EMA)


def attempt_on_manager(call, refusals=TAKEN):
    """Whether the call succeeded; resets the manager afterwards."""
    done = harness.attempt(call, refusals)
    assert not MARKER.exists(), "a file's code ran"
    if done:
        EMA.load_state_dict(FIRST)
    assert state_of(EMA) == FRESH, "a refused call changed the manager" if not done else "the manager can't be restored"


def target(data):
    choose = Damage(data)
    what = choose.of(("state", "file", "snapshots"))
    if what == "state":
        name = choose.of(list(STATES))
        state = STATES[name]
        for _ in range(choose.below(3)):
            state = choose.mutated(state)
        if name == "manager":
            attempt_on_manager(lambda: EMA.load_state_dict(state), (ValueError,))
        else:
            layout = choose.of((None, name, *checkpoints.LAYOUTS, "x", 3)) if choose.below(3) == 0 else name
            step = choose.of((None, 5, 0, *ODD)) if choose.below(4) == 0 else 5 if name == "timm" else None
            index = choose.below(2)
            refusals = (*TAKEN, RuntimeError)
            attempt_on_manager(lambda: checkpoints.restore(EMA, state, layout, index, step=step), refusals)
        return
    if what == "file":
        name = choose.of(list(FILES))
        content = FILES[name]
        if choose.below(4):
            header = name.endswith(".safetensors") and choose.below(3)
            archive = name.endswith(".pt") and choose.below(3)
            content = (choose.safetensors if header else choose.pickled if archive else choose.damaged)(content)
        path = FOLDER / ("read" + Path(name).suffix)
        path.write_bytes(content)
        read = []
        harness.attempt(lambda: read.append(checkpoints.load(path)), READ)
        assert not MARKER.exists(), "a file's code ran"
        if read and name == "manager.pt":
            attempt_on_manager(lambda: EMA.load_state_dict(read[0]), (ValueError,))
        elif read and name.endswith(".pt"):
            attempt_on_manager(lambda: checkpoints.restore(EMA, read[0], step=5))
        return
    folder = FOLDER / "read"
    folder.mkdir(exist_ok=True)
    changed = choose.below(3)
    for i, name in enumerate(SNAPSHOTS):
        content = FILES[name]
        if i == changed or (changed == 2 and choose.below(2)):
            content = (choose.safetensors if choose.below(4) else choose.damaged)(content)
        (folder / name).write_bytes(content)
    harness.attempt(lambda: posthoc.snapshots(folder), (ValueError,))
    sigma_rel = choose.of((0.1, 0.07, 0.05, 0.2, *ODD)) if choose.below(4) == 0 else 0.1
    updates = choose.of((None, 3, 4, *HUGE))
    refusals = (ValueError,) if isinstance(sigma_rel, float) else TAKEN  # TypeError if it is no number
    harness.attempt(lambda: posthoc.reconstruct(folder, sigma_rel, updates=updates), refusals)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peak < MOST_MIB, f"{peak:.0f} MiB at the most"


if __name__ == "__main__":
    import random

    harness.run(target, [random.Random(i).randbytes(200) for i in range(60)])
