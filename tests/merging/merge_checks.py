"""Checkpoints of every kind, written by their own packages, and what their average must be."""

import json
import math
from fractions import Fraction

import oracle
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

KINDS = ["safetensors", "folder", "torch", "dcp"]
WEIGHTS = [0.1, 0.25, 0.65]
SUFFIX = {"safetensors": ".safetensors", "torch": ".pt"}


def state(seed, **more):
    """Tensors of every type, one larger than a piece of the merge, one empty, one without dimensions."""
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(301, 401, generator=g),
        "b": torch.randn(70001, generator=g).bfloat16(),
        "h": torch.randn(33, 5, generator=g).half(),
        "d": torch.randn(7, generator=g).double(),
        "c": torch.randn(9, 2, dtype=torch.complex64, generator=g),
        "scale": torch.randn((), generator=g),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(seed),
        "mask": torch.arange(40000) % 3 == 0,
        "table": torch.arange(5, dtype=torch.int32),
        **more,
    }


def states(**more):
    return [state(seed, **more) for seed in range(3)]


def averaged(found, weights=WEIGHTS):
    """The formula of the documentation, rounded once."""
    if found[0].is_complex():
        return torch.view_as_complex(averaged([torch.view_as_real(each) for each in found], weights))
    total = sum(weight * each.double() for weight, each in zip(weights, found, strict=True))
    if found[0].element_size() != 2:
        return total.to(found[0].dtype)
    return (
        torch.tensor([nearest(each, found[0].dtype) for each in total.flatten().tolist()])
        .to(found[0].dtype)
        .view(total.shape)
    )


def nearest(value, dtype):
    """A float64 rounded once to a 16-bit type, to nearest even, in exact arithmetic."""
    precision, smallest = oracle.FORMAT[dtype]
    if not math.isfinite(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1], smallest) - precision  # of one unit in the last place
    units = Fraction(value) / Fraction(2) ** exponent
    rounded = Fraction(round(units)) * Fraction(2) ** exponent  # Python rounds halves to even
    limit = torch.finfo(dtype).max
    return math.copysign(math.inf, value) if abs(rounded) > limit else math.copysign(float(rounded), value)


def save(kind, path, content):
    path = path.with_suffix(SUFFIX.get(kind, ""))
    if kind == "safetensors":
        save_file(content, path, {"format": "pt", "of": path.stem})
    elif kind == "torch":
        torch.save(content, path)
    elif kind == "dcp":
        dcp.save(content, checkpoint_id=path)
    else:
        names = list(content)
        files = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
        path.mkdir()
        for file, those in files.items():
            save_file({name: content[name] for name in those}, path / file, {"format": "pt"})
        weight_map = {name: file for file, those in files.items() for name in those}
        index = {"metadata": {"total_size": 7}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps({"_name_or_path": path.name}))
        (path / "optimizer.pt").write_bytes(b"not the model's")
    return path


def load(kind, path, like):
    if kind == "safetensors":
        return load_file(path)
    if kind == "torch":
        return torch.load(path, weights_only=True)
    if kind == "dcp":
        found = {name: torch.full_like(each, 7) for name, each in like.items()}
        dcp.load(found, checkpoint_id=path)
        return found
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return {
        name: each
        for file in sorted(set(index["weight_map"].values()))
        for name, each in load_file(path / file).items()
    }


def saved(kind, folder, contents):
    return [save(kind, folder / f"step-{i}", content) for i, content in enumerate(contents)]


def out_of(kind, folder):
    return folder / f"average{SUFFIX.get(kind, '')}"
