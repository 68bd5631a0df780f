"""merge(): every kind of checkpoint, what it refuses, and that it writes all or nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import oracle
import pytest
import torch
from conftest import same_values
from merge_checks import KINDS, WEIGHTS, averaged, load, out_of, save, saved, state, states
from safetensors.torch import load_file, save_file
from torch import nn

import fused_ema
from fused_ema import merge, merging
from fused_ema.merging import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage", "ignore:`_get_")


def expected_of(contents, weights=WEIGHTS):
    """Averages of floating tensors, the newest of all others."""
    return {
        name: averaged([each[name] for each in contents], weights)
        if contents[0][name].is_floating_point() or contents[0][name].is_complex()
        else contents[-1][name]
        for name in contents[0]
    }


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_the_formula_in_float64_rounded_once(kind, threads, tmp_path):
    contents = states()
    paths = saved(kind, tmp_path, contents)
    before, number = everything(tmp_path), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = merge(paths, out_of(kind, tmp_path), WEIGHTS)
    finally:
        torch.set_num_threads(number)
    assert out == out_of(kind, tmp_path)
    same_values(load(kind, out, contents[0]), expected_of(contents))
    after = everything(tmp_path)
    assert {path: after[path] for path in before} == before, "the checkpoints are as they were"
    assert not [path for path in after if path.name.startswith(".") and path.name != ".metadata"], (
        "nothing is left over"
    )


@pytest.mark.parametrize("rule", ["mean", "linear", "ema:0.9", "wsm:1-sqrt", "pma:ema:0.5", "power:0.1", "3,0,1"])
def test_each_rule(rule, tmp_path):
    contents = [{"w": torch.randn(1000)} for _ in range(3)]
    out = merge(saved("safetensors", tmp_path, contents), tmp_path / "o.safetensors", merging.weights.parsed(rule))
    weights = merging.weights_of(merging.weights.parsed(rule), 3)
    assert oracle.same_bits(load_file(out)["w"], averaged([each["w"] for each in contents], weights))


def test_times(tmp_path):
    contents = [{"w": torch.randn(1000)} for _ in range(3)]
    out = merge(saved("torch", tmp_path, contents), tmp_path / "o.pt", "ema:0.9", times=[10, 20, 25])
    weights = merging.weights_of("ema:0.9", 3, [10, 20, 25])
    assert oracle.same_bits(torch.load(out)["w"], averaged([each["w"] for each in contents], weights))


def test_a_checkpoint_without_weight_is_compared_but_not_read(tmp_path):
    contents = [{"w": torch.full((9,), value)} for value in (1.0, float("nan"), 3.0)]
    paths = saved("safetensors", tmp_path, contents)
    assert load_file(merge(paths, tmp_path / "o.safetensors", [1, 0, 1]))["w"].tolist() == [2.0] * 9
    with pytest.raises(ValueError, match="has no 'w'"):
        merge([paths[0], save("safetensors", tmp_path / "x", {"v": torch.ones(1)})], tmp_path / "o.safetensors", [1, 0])


# ---- Kinds


def test_a_safetensors_file_keeps_the_metadata_of_the_newest_and_is_aligned(tmp_path):
    from safetensors import safe_open

    out = merge(saved("safetensors", tmp_path, states()), tmp_path / "o.safetensors")
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "step-2"}
    header = json.loads(out.read_bytes()[8 : 8 + int.from_bytes(out.read_bytes()[:8], "little")])
    sizes = {"F64": 8, "C64": 4, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "I32": 4, "I64": 8}
    for name, about in header.items():
        if name != "__metadata__":
            assert about["data_offsets"][0] % sizes[about["dtype"]] == 0, name


def test_a_folder_keeps_layout_and_configuration_of_the_newest(tmp_path):
    paths = saved("folder", tmp_path, states())
    other = json.loads((paths[0] / "model.safetensors.index.json").read_text())["weight_map"]
    moved = load("folder", paths[0], None)  # the same tensors in one file: the layout may differ
    for file in set(other.values()):
        (paths[0] / file).unlink()
    (paths[0] / "model.safetensors.index.json").unlink()
    save_file(moved, paths[0] / "model.safetensors")
    out = merge(paths, tmp_path / "average", WEIGHTS)
    same_values(load("folder", out, None), expected_of(states()))
    names = {"config.json", "model.safetensors.index.json", *other.values()}
    assert {path.name for path in out.iterdir()} == names, "the optimizer stays behind"
    assert json.loads((out / "config.json").read_text()) == {"_name_or_path": "step-2"}
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((paths[2] / index).read_text())


def test_a_folder_with_one_file(tmp_path):
    for i, content in enumerate(states()):
        (tmp_path / f"{i}").mkdir()
        save_file(content, tmp_path / f"{i}" / "model.safetensors", {"format": "pt"})
    out = merge([tmp_path / f"{i}" for i in range(3)], tmp_path / "o", WEIGHTS)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    same_values(load_file(out / "model.safetensors"), expected_of(states()))


@pytest.mark.parametrize("key", [None, "model"])
def test_a_training_checkpoint_of_torch(tmp_path, key):
    contents = states()
    paths = []
    for i, content in enumerate(contents):
        extra = {"optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}}, "epoch": i, "note": "x"}
        paths.append(save("torch", tmp_path / f"{i}", {"model": content, **extra}))
    out = merge(paths, tmp_path / "o.pt", WEIGHTS, key=key)
    found = torch.load(out, weights_only=True)
    assert found.keys() == {"model"}
    same_values(found["model"], expected_of(contents))


def test_keys_of_torch_files(tmp_path):
    content = {"a": {"b.c": {"w": torch.ones(2)}}, "b.c": {"w": torch.ones(2)}, "model": {"w": torch.ones(2)}}
    paths = [save("torch", tmp_path / name, content) for name in "xy"]
    with pytest.raises(
        ValueError, match=r"one dict of them; found tensors under 'b.c', 'model'; name one of them by key="
    ):
        merge(paths, tmp_path / "o.pt")
    for key in ("b.c", "model"):
        found = torch.load(merge(paths, tmp_path / "o.pt", key=key), weights_only=True)
        assert found.keys() == {key}
    with pytest.raises(ValueError, match=r"expected a dict of tensors under 'state', found none; found tensors under"):
        merge(paths, tmp_path / "o.pt", key="state")
    numbered = [save("torch", tmp_path / name, {0: {"w": torch.ones(2)}, "n": 1}) for name in "uv"]
    assert torch.load(merge(numbered, tmp_path / "o.pt"), weights_only=True).keys() == {0}
    nested = [
        save("torch", tmp_path / name, {"a": {"b": {"w": torch.full((2,), value)}}, "n": 1})
        for name, value in (("p", 1.0), ("q", 2.0))
    ]
    found = torch.load(merge(nested, tmp_path / "o.pt", key="a.b"), weights_only=True)
    assert found["a"]["b"]["w"].tolist() == [1.5, 1.5]


def test_tied_and_strided_tensors_of_torch_files(tmp_path):
    def content(seed):
        weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        image = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
        return {
            "embed": weight,
            "head": weight,
            "t": weight[:].t().contiguous().t(),
            "nhwc": image.to(memory_format=torch.channels_last),
        }

    contents = [content(seed) for seed in range(3)]
    out = merge(saved("torch", tmp_path, contents), tmp_path / "o.pt", WEIGHTS)
    found = torch.load(out, weights_only=True)
    same_values(found, expected_of(contents))
    assert found["embed"].data_ptr() == found["head"].data_ptr() != found["t"].data_ptr()
    assert {name: each.stride() for name, each in found.items()} == {
        name: each.stride() for name, each in contents[0].items()
    }
    assert out.stat().st_size < (tmp_path / "step-0.pt").stat().st_size + 4096, "tied ones are stored once"


def test_a_module_and_its_parameters(tmp_path):
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    for model in models:
        nn.init.normal_(model[1].weight)
    paths = saved("torch", tmp_path, [dict(model.named_parameters()) for model in models])
    found = torch.load(merge(paths, tmp_path / "o.pt"), weights_only=True)
    same_values(found, expected_of([dict(model.named_parameters()) for model in models], [0.5, 0.5]))
    paths = saved("torch", tmp_path, [model.state_dict() for model in models])
    models[0].load_state_dict(torch.load(merge(paths, tmp_path / "o.pt"), weights_only=True))


def test_values_that_are_no_tensors_are_those_of_the_newest(tmp_path):
    paths = saved("torch", tmp_path, [{"w": torch.ones(2) * i, "_extra_state": {"version": i}} for i in range(3)])
    found = torch.load(merge(paths, tmp_path / "o.pt"), weights_only=True)
    assert found["_extra_state"] == {"version": 2}
    assert found["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_without_offsets_maps_the_file(kind, tmp_path, monkeypatch):
    """As before it said where tensors lie in a file."""
    monkeypatch.setattr(merging.torch_files, "_offsets", lambda path, keys: {})
    contents = states()
    same_values(
        load(kind, merge(saved(kind, tmp_path, contents), out_of(kind, tmp_path), WEIGHTS), contents[0]),
        expected_of(contents),
    )


@pytest.mark.parametrize("value", [{"t": torch.ones(2)}, [1, {"x": (torch.ones(2),)}]], ids=["dict", "list"])
def test_tensors_inside_of_values_are_not_lost(value, tmp_path):
    paths = saved("torch", tmp_path, [{"w": torch.ones(2), "more": value}] * 2)
    with pytest.raises(
        ValueError, match=r"step-0.pt: 'more': expected a tensor, or numbers.* found one that holds a Tensor"
    ):
        merge(paths, tmp_path / "o.pt")


def test_an_order_that_a_shell_gives(tmp_path):
    paths = [save("torch", tmp_path / f"step-{i}", {"w": torch.ones(2)}) for i in (1000, 900)]
    with pytest.warns(UserWarning, match=r"step-900.pt is taken for newer than .*step-1000.pt, whose number is larger"):
        merge(paths, tmp_path / "o.pt", "linear")
    for order, weights in ((paths, "mean"), (paths, [1, 2]), (paths[::-1], "linear")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            merge(order, tmp_path / "o.pt", weights)


def test_numbers_that_fall_but_are_no_order(tmp_path):
    """Lightning's names, and a link to the newest."""
    for names in (["epoch=9-loss=0.32", "epoch=10-loss=0.31"], ["run-7/step-900", "run-7/last"]):
        (tmp_path / names[0]).parent.mkdir(exist_ok=True)
        paths = [save_as(tmp_path / f"{name}.ckpt") for name in names]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            merge(paths, tmp_path / "o.pt", "linear")


def save_as(path):
    torch.save({"w": torch.ones(2)}, path)
    return path


# ---- Integers


@pytest.mark.parametrize("kind", KINDS)
def test_integers(kind, tmp_path):
    contents = [state(seed, table=torch.arange(40000) * (seed + 1)) for seed in range(3)]
    paths = saved(kind, tmp_path, contents)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"'table': expected the same int64 of shape \(40000,\) in all checkpoints"):
        merge(paths, out_of(kind, tmp_path), WEIGHTS)
    assert everything(tmp_path) == before
    out = merge(paths, out_of(kind, tmp_path), WEIGHTS, integers="newest")
    same_values(load(kind, out, contents[0]), expected_of(contents))
    with pytest.raises(ValueError, match="integers: expected 'equal' or 'newest', found 'last'"):
        merge(paths, out, WEIGHTS, integers="last")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_integers(dtype, tmp_path):
    contents = [
        {"w": torch.ones(3), "q": torch.arange(40000).to(torch.int64).to(torch.int16).view(torch.int16).to(dtype)}
        for _ in range(2)
    ]
    paths = saved("safetensors", tmp_path, contents)
    out = merge(paths, tmp_path / "o.safetensors")
    assert oracle.same_bits(load_file(out)["q"], contents[0]["q"])


# ---- Refusals: nothing is written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("w"), ValueError, "step-1.*expected the names of .*step-0.*it has no 'w'"),
        (lambda s: s.update(x=torch.ones(2)), ValueError, "step-1.*it has besides 'x'"),
        (
            lambda s: s.update(w=s["w"].t().contiguous()),
            ValueError,
            r"'w': .* of shape \(301, 401\), found .*\(401, 301\)",
        ),
        (lambda s: s.update(w=s["w"].double()), ValueError, "'w': expected float32 .* found float64"),
        (lambda s: s.update(count=torch.tensor(1.0)), ValueError, "'count': expected int64 .* found float32"),
    ],
)
def test_checkpoints_that_differ(kind, change, error, message, tmp_path):
    contents = states()
    change(contents[1])
    paths = saved(kind, tmp_path, contents)
    before = everything(tmp_path)
    with pytest.raises(error, match=message):
        merge(paths, out_of(kind, tmp_path))
    assert everything(tmp_path) == before


def test_ties_that_differ(tmp_path):
    weight = torch.ones(3)
    tied, untied = {"a": weight, "b": weight}, {"a": weight, "b": weight.clone()}
    x, y = (save("torch", tmp_path / name, content) for name, content in (("x", tied), ("y", untied)))
    with pytest.raises(
        ValueError, match=r"y.pt: 'b': expected one memory with 'a', as in .*x.pt, found memory of its own"
    ):
        merge([x, y], tmp_path / "o.pt")
    with pytest.raises(
        ValueError, match=r"x.pt: 'b': expected memory of its own, as in .*y.pt, found one memory with 'a'"
    ):
        merge([y, x], tmp_path / "o.pt")
    flat = torch.ones(9)
    overlapping = save("torch", tmp_path / "z", {"flat": flat, "view": flat[2:5]})
    with pytest.raises(
        ValueError, match=r"z.pt: 'view': expected memory of its own, found some shared with 'flat'; save a clone"
    ):
        merge([overlapping], tmp_path / "o.pt")
    assert not (tmp_path / "o.pt").exists()


def test_strides_that_differ(tmp_path):
    image = torch.randn(2, 3, 5, 7)
    x = save("torch", tmp_path / "x", {"w": image})
    y = save("torch", tmp_path / "y", {"w": image.to(memory_format=torch.channels_last)})
    with pytest.raises(
        ValueError, match=r"'w': expected float32 of shape \(2, 3, 5, 7\), found .* with strides \(105, 1, 21, 3\)"
    ):
        merge([x, y], tmp_path / "o.pt")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_types_without_an_average(kind, tmp_path):
    paths = saved(kind, tmp_path, [{"q": torch.ones(4).to(torch.float8_e4m3fn)}] * 2)
    with pytest.raises(TypeError, match=r"'?q'?: expected .*(F8_E4M3|float8_e4m3fn)"):
        merge(paths, out_of(kind, tmp_path))


def test_kinds_that_differ(tmp_path):
    x, y = save("torch", tmp_path / "x", state(0)), save("safetensors", tmp_path / "y", state(1))
    with pytest.raises(
        ValueError, match=r"y.safetensors: expected a file of torch.save, as .*x.pt is, found a safetensors file"
    ):
        merge([x, y], tmp_path / "o.pt")


@pytest.mark.parametrize(
    ("kind", "out", "error", "message"),
    [
        ("torch", "o.safetensors", ValueError, "does not end in .safetensors, as the average is a file of torch.save"),
        ("safetensors", "o.pt", ValueError, "expected a name that ends in .safetensors"),
        ("folder", "o.safetensors", ValueError, "does not end in .safetensors"),
        ("torch", "step-1.pt", FileExistsError, "found a checkpoint to merge"),
        ("torch", "full", FileExistsError, "expected a file or nothing there"),
        ("folder", "full", FileExistsError, "found one with files in it; remove it, or choose another"),
        ("dcp", "full", FileExistsError, "found one with files in it"),
        ("folder", "step-0", FileExistsError, "found a checkpoint to merge"),
        ("torch", "nowhere/o.pt", FileNotFoundError, "make it first"),
        ("folder", "nowhere/o", FileNotFoundError, "make it first"),
    ],
)
def test_places_that_are_refused(kind, out, error, message, tmp_path):
    paths = saved(kind, tmp_path, states())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = everything(tmp_path)
    with pytest.raises(error, match=message):
        merge(paths, tmp_path / out)
    assert everything(tmp_path) == before


def test_paths_that_are_refused(tmp_path):
    path = save("torch", tmp_path / "x", state(0))
    with pytest.raises(ValueError, match=r"paths: expected each checkpoint once, found .*x.pt more than once"):
        merge([path, tmp_path / "." / "x.pt"], tmp_path / "o.pt")
    for wrong in ([], str(path), iter([path])):
        with pytest.raises(ValueError, match="paths: expected a list of one checkpoint or more"):
            merge(wrong, tmp_path / "o.pt")
    with pytest.raises(FileNotFoundError, match=r"y.pt: expected a checkpoint, found nothing there"):
        merge([path, tmp_path / "y.pt"], tmp_path / "o.pt")
    with pytest.raises(ValueError, match=r"expected a folder with one .safetensors file"):
        merge([tmp_path], tmp_path / "o")
    with pytest.raises(ValueError, match="key: expected none for safetensors"):
        merge([save("safetensors", tmp_path / "z", state(0))], tmp_path / "o.safetensors", key="model")


def test_files_that_are_damaged_or_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="could run code"):
        merge([tmp_path / "evil.pt"], tmp_path / "o.pt")
    assert not (tmp_path / "evil").exists()
    for kind in ("safetensors", "torch"):
        whole = save(kind, tmp_path / "whole", state(0))
        data = whole.read_bytes()
        for size in (0, 5, 100, len(data) // 2, len(data) - 1):
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(data[:size])
            with pytest.raises(ValueError, match=f"cut{whole.suffix}: (truncated or corrupt|expected)"):
                merge([whole, cut], out_of(kind, tmp_path))
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.pt.*_use_new_zipfile_serialization"):
        merge([tmp_path / "old.pt"], tmp_path / "o.pt")


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [1000, 1008]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]},
        {"shape": [2]},
        7,
    ],
)
def test_headers_that_lie(about, tmp_path):
    text = json.dumps({"w": about}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"x.safetensors: truncated or corrupt"):
        merge([tmp_path / "x.safetensors"], tmp_path / "o.safetensors")


def test_an_index_that_lies(tmp_path):
    paths = saved("folder", tmp_path, states())
    index = paths[1] / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for wrong, message in (
        ({**good, "w": "../step-0/model-00001-of-00002.safetensors"}, "outside the folder"),
        (
            {**good, "w": "model-00002-of-00002.safetensors"},
            "expected the tensors of the index, found a difference: .'w'",
        ),
        ({name: file for name, file in good.items() if name != "w"}, "found a difference: .'w'"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=message):
            merge(paths, tmp_path / "o")
    index.write_text("{")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        merge(paths, tmp_path / "o")


# ---- All or nothing


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_write_leaves_what_was_there(kind, error, tmp_path, monkeypatch):
    paths = saved(kind, tmp_path, states())
    out = out_of(kind, tmp_path)
    if out.suffix:
        out.write_bytes(b"before")
    before, threads = everything(tmp_path), threading.active_count()
    calls = iter(range(100))
    write = run.Sum.write

    def fail(self, *arguments):
        if next(calls) == 3:
            raise error
        return write(self, *arguments)

    monkeypatch.setattr(run.Sum, "write", fail)
    with pytest.raises(type(error)):
        merge(paths, out, WEIGHTS)
    assert everything(tmp_path) == before
    assert threading.active_count() == threads, "no thread goes on"


@pytest.mark.parametrize("kind", ["safetensors", "folder", "torch"])
def test_a_full_disk_shows_first(kind, tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    paths = saved(kind, tmp_path, states())
    before = everything(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(run.Sum, "write", lambda *arguments: pytest.fail("something was averaged before"))
    with pytest.raises(OSError, match=r"No space left on device for the \d+ bytes of the average"):
        merge(paths, out_of(kind, tmp_path))
    assert everything(tmp_path) == before


def test_a_file_system_that_reserves_nothing(tmp_path, monkeypatch):
    def unsupported(file, offset, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    out = merge(saved("safetensors", tmp_path, states()), tmp_path / "o.safetensors", WEIGHTS)
    same_values(load_file(out), expected_of(states()))
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    out = merge(saved("torch", tmp_path, states()), tmp_path / "o.pt", WEIGHTS)
    same_values(torch.load(out, weights_only=True), expected_of(states()))


def test_a_second_interrupt_waits_for_the_threads_too(monkeypatch):
    """They write to files that are closed next."""
    join, interrupts, before = threading.Thread.join, [KeyboardInterrupt] * 3, threading.active_count()

    def interrupted(thread):
        if interrupts:
            raise interrupts.pop()
        join(thread)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.in_threads(lambda tools, each: time.sleep(0.2), range(10))
    assert not interrupts
    assert threading.active_count() == before


def test_a_file_that_shrinks_meanwhile(tmp_path, monkeypatch):
    paths = saved("safetensors", tmp_path, states())
    check = merging.merge.__globals__["check_alike"]

    def cut(found):
        check(found)
        os.truncate(paths[1], paths[1].stat().st_size // 2)

    monkeypatch.setitem(merging.merge.__globals__, "check_alike", cut)
    with pytest.raises(ValueError, match=r"step-1.safetensors: truncated while it was read"):
        merge(paths, tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_an_existing_file_is_replaced_with_its_mode(tmp_path):
    paths = saved("torch", tmp_path, states())
    out = tmp_path / "o.pt"
    out.write_bytes(b"old")
    out.chmod(0o640)
    merge(paths, out, WEIGHTS)
    assert out.stat().st_mode & 0o777 == 0o640
    same_values(torch.load(out, weights_only=True), expected_of(states()))


KILLED = """
    import sys, torch
    from fused_ema import merge
    print("begin", flush=True)
    while True:
        merge(sys.argv[1:-1], sys.argv[-1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_killed_at_any_moment(kind, tmp_path):
    import random

    contents = [{"w": torch.full((2_000_000,), float(i))} for i in range(3)]
    paths = saved(kind, tmp_path, contents)
    out = out_of(kind, tmp_path)
    merge(paths, out)
    random.seed(1)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, paths), str(out)]
    for _ in range(10):
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(random.uniform(0.0, 0.3))
        child.kill()
        child.wait()
        child.stdout.close()
        assert load(kind, out, contents[0])["w"].unique().tolist() == [1.0]
        for left in tmp_path.glob(".*.tmp"):
            left.unlink()


# ---- What is not finite


@pytest.mark.parametrize("kind", KINDS)
def test_a_warning_names_averages_that_are_not_finite(kind, tmp_path):
    contents = states()
    contents[1]["b"][100] = float("nan")
    contents[0]["c"][0, 0] = complex(0, float("inf"))
    with pytest.warns(UserWarning, match="average.*: NaN or infinite values are in the average of 'b', 'c'") as caught:
        out = merge(saved(kind, tmp_path, contents), out_of(kind, tmp_path), WEIGHTS)
    assert caught[-1].filename == __file__
    found = load(kind, out, contents[0])
    assert found["b"].isnan().nonzero().tolist() == [[100]]


# ---- Memory


BOUNDED = """
    import sys, torch
    from fused_ema import merge

    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024

    small, large = sys.argv[1:4], sys.argv[4:7]
    merge(small, sys.argv[7])
    before = peak()
    merge(large, sys.argv[8])
    print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["safetensors", "folder", "torch"])
def test_memory_does_not_grow_with_the_checkpoints(kind, tmp_path):
    if kind == "torch" and not merging.torch_files._offsets(save("torch", tmp_path / "o", {"w": torch.ones(1)}), []):
        pytest.skip("this PyTorch does not say where tensors lie in a file")
    sizes = {"small": 2**16, "large": 2**24}  # 64 MiB in each of three large ones, half of it in one tensor
    paths = []
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        content = {"w": torch.zeros(size // 2), **{f"w{i}": torch.zeros(size // 8) for i in range(4)}}
        paths += saved(kind, tmp_path / name, [content] * 3)
    outs = [str(out_of(kind, tmp_path / name)) for name in sizes]
    command = [sys.executable, "-c", textwrap.dedent(BOUNDED), *map(str, paths), *outs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16, f"{done.stdout} MiB more"
    shutil.rmtree(tmp_path)


# ---- Snapshots of posthoc


def test_snapshots_give_what_reconstruct_does(tmp_path):
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3))
    ema = fused_ema.EMA(model, [fused_ema.schedules.power_function(s) for s in (0.05, 0.1)], dtype=torch.float32)
    for step in range(1, 61):
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn_like(tensor))
        ema.update()
        if step % 10 == 0:
            fused_ema.posthoc.save_snapshot(tmp_path / "snapshots", ema)
    paths = sorted((tmp_path / "snapshots").iterdir())
    out = merge(paths, tmp_path / "o.safetensors", "power:0.15")
    same_values(load_file(out), fused_ema.posthoc.reconstruct(tmp_path / "snapshots", 0.15))
    with pytest.raises(ValueError, match="expected power:SIGMA_REL for snapshots"):
        merge(paths, out)
    with pytest.raises(ValueError, match="expected none for snapshots"):
        merge(paths, out, "power:0.15", times=range(1, 7))
    other = save("safetensors", tmp_path / "x", {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"x.safetensors: expected a snapshot, as .*ema-0000000010.safetensors is"):
        merge([*paths, other], out, "power:0.15")
    with pytest.warns(UserWarning, match="with an error of"):
        merge(paths[-1:], out, "power:0.25")
