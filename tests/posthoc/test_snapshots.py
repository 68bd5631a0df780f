"""Snapshots: what is stored, what is read, and files that are broken."""

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from snapshot_stub import Stub, both, even
from torch import nn

import fused_ema
from fused_ema.checkpoints.files import safetensors
from fused_ema.posthoc import reconstruct, save_snapshot, snapshots, solve_weights
from fused_ema.posthoc.snapshots import KEYS, MARK
from fused_ema.schedules import constant, gamma_of, power_function, sigma_rel_of, to_state


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 4, generator=generator)
    return {
        "last in the alphabet": base.clone(),
        "a/b.c": torch.randn((), generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "expanded": torch.randn(1, 3, generator=generator).expand(5, 3),
        "overlapping 1": base[:4],
        "overlapping 2": base[2:],
        "same memory, other shape": base.view(-1),
        "empty": torch.zeros(0, 3),
        "also empty": torch.zeros(0, 3),
        "double": torch.randn(3, generator=generator).double(),
        "bfloat16": torch.randn(3, generator=generator).bfloat16(),
        "complex64": torch.randn(3, 2, dtype=torch.complex64, generator=generator),
        "complex128": torch.randn((), dtype=torch.complex128, generator=generator),
        "conjugate": torch.randn(3, dtype=torch.complex64, generator=generator).conj(),
        "complex empty": torch.zeros(0, dtype=torch.complex64),
    }


def test_every_kind_of_tensor(tmp_path, tensors):
    save_snapshot(tmp_path, Stub(10, tensors, {name: tensor * 2 for name, tensor in tensors.items()}))
    save_snapshot(tmp_path, Stub(20, {name: tensor * 4 for name, tensor in tensors.items()}, tensors))
    for sigma_rel, updates, factor in ((0.05, 10, 1), (0.10, 10, 2), (0.05, 20, 4), (0.10, 20, 1)):
        found = reconstruct(tmp_path, sigma_rel, updates=updates, dtype=torch.float64)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            assert found[name].dtype == wide
            assert torch.equal(found[name], (tensor * factor).to(wide)), name
    for dtype in (torch.float16, torch.float32):
        complexes = [each for each in reconstruct(tmp_path, 0.07, dtype=dtype).values() if each.is_complex()]
        assert [each.dtype for each in complexes] == [torch.complex64] * 4
    combined = reconstruct(tmp_path, 0.07, dtype=torch.float64)
    weights = solve_weights(*even(2, 20), 20, gamma_of(0.07))
    factor = (weights * torch.tensor([1.0, 2, 4, 1], dtype=torch.float64)).sum()
    for name in ("complex64", "complex128", "transposed"):
        assert (combined[name] - tensors[name].to(combined[name].dtype) * factor).abs().max() < 1e-14


def test_ties_are_stored_once_and_come_back_under_all_names(tmp_path):
    w, v = torch.arange(1000.0), torch.arange(1000.0) * 2
    path = save_snapshot(tmp_path, Stub(10, {"a": w, "b": w, "c": w.clone()}, {"a": v, "b": v, "c": v.clone()}))
    assert sorted(load_file(path)) == ["0/a", "0/c", "1/a", "1/c"]
    assert path.stat().st_size < 4 * 4000 + 1000
    # Names that share memory in one average only are not tied. In the second snapshot the ties differ.
    save_snapshot(tmp_path, Stub(20, {"a": w, "b": w, "c": w}, {"a": v, "b": v + 1, "c": v}))
    assert {name: each[1].item() for name, each in reconstruct(tmp_path, 0.10).items()} == {"a": 2, "b": 3, "c": 2}
    weights = solve_weights(*even(2, 20), 20, gamma_of(0.07))
    found = reconstruct(tmp_path, 0.07, dtype=torch.float64)
    assert (found["b"] - found["a"]).tolist() == pytest.approx([weights[3].item()] * 1000, abs=1e-9)
    assert torch.equal(found["a"], found["c"])


def test_empty_tensors_are_not_tied(tmp_path):
    tensors = {"a": torch.ones(0, 3), "b": torch.ones(4, 0), "c": torch.ones(1)}
    save_snapshot(tmp_path, Stub(3, tensors, tensors))
    assert {name: each.shape for name, each in reconstruct(tmp_path, 0.1).items()} == {
        name: each.shape for name, each in tensors.items()
    }


def test_only_power_functions_are_kept(tmp_path):
    w = torch.ones(2)
    schedules = [to_state(constant(0.9)), to_state(power_function(0.07)), "<lambda>", to_state(power_function(0.2))]
    ema = Stub(5, *({"w": w * k} for k in range(4)), schedules=schedules, step=23)
    path = save_snapshot(str(tmp_path / "new" / "folder"), ema)
    assert path == tmp_path / "new" / "folder" / "ema-0000000005.safetensors"
    assert snapshots(path.parent) == [(path, 23, 5, (0.07, 0.2))]
    assert {name: each.tolist() for name, each in load_file(path).items()} == {
        "0/w": [1, 1],
        "1/w": [3, 3],
    }
    with pytest.raises(ValueError, match=r"power_function, found \[.*'constant'.*, 'lambda'\]"):
        save_snapshot(tmp_path, Stub(5, {"w": w}, {"w": w}, schedules=[to_state(constant(0.9)), "lambda"]))


def test_sigma_rels_to_the_last_bit(tmp_path):
    sigma_rels = (0.1 + 2**-54, sigma_rel_of(7.3), 1 / 3 * 0.3)
    save_snapshot(tmp_path, Stub(5, *[{"w": torch.ones(1)}] * 3, schedules=sigma_rels))
    assert snapshots(tmp_path)[0].sigma_rels == sigma_rels


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="expected 1 update or more before a snapshot, found 0"):
        save_snapshot(tmp_path, Stub(0, *both(torch.ones(1))))
    with pytest.raises(ValueError, match="dtype: expected float64"):
        save_snapshot(tmp_path, Stub(1, *both(torch.ones(1))), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"ema\['w'\]: expected values of at most 65504"):
        save_snapshot(tmp_path, Stub(1, *both(torch.tensor([1.0, 1e5]))), dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    save_snapshot(
        tmp_path, Stub(1, *both(torch.tensor([math.inf, math.nan]))), dtype=torch.float16
    )  # not from the cast


def test_a_later_write_to_the_averages_does_not_reach_the_snapshot(tmp_path):
    w = torch.ones(3)
    save_snapshot(tmp_path, Stub(1, {"w": w}, {"w": w}))
    before = reconstruct(tmp_path, 0.05)["w"]
    before.add_(1)
    w.add_(5)
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [1, 1, 1]


# ---- Other files, and broken ones


def test_other_files_are_ignored(tmp_path):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    for name in ("ema-12.safetensors", "model.safetensors", f".{path.name}.00ff.tmp", ".tmpXyZ", f"{path.name}.bak"):
        (tmp_path / name).write_bytes(b"no")
    (tmp_path / "ema-0000000008.safetensors").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "ema-0000000009.safetensors")  # not a snapshot
    assert [each.path for each in snapshots(tmp_path)] == [path]
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [1, 1]


def test_no_snapshots(tmp_path):
    assert snapshots(tmp_path) == []
    with pytest.raises(ValueError, match=f"{tmp_path}: expected snapshots, found none"):
        reconstruct(tmp_path, 0.05)
    with pytest.raises(FileNotFoundError):
        snapshots(tmp_path / "nowhere")


@pytest.mark.parametrize("part", [0, 4, 8, 0.1, 0.5, -1, "longer", "noise", "no JSON", "no key"])
def test_broken_files_are_named(tmp_path, part):
    save_snapshot(tmp_path, Stub(7, *both(torch.ones(50))))
    path = save_snapshot(tmp_path, Stub(8, *both(torch.ones(50))))
    content = path.read_bytes()
    if part in ("no JSON", "no key"):
        metadata = {MARK: "1", **dict.fromkeys(KEYS, "{" if part == "no JSON" else "1")}
        if part == "no key":
            del metadata["tensors"]
        save_file({"0/w": torch.ones(1)}, path, metadata)
    elif part == "longer":
        path.write_bytes(content + b"0")
    elif part == "noise":
        path.write_bytes(bytes(range(256)) * 4)
    else:
        path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    for function in (snapshots, lambda folder: reconstruct(folder, 0.07)):
        with pytest.raises(ValueError, match=f"{path}: truncated or corrupt"):
            function(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("step", "-1", "step: expected a whole number, 0 or more, found -1"),
        ("updates", '"7"', "updates: expected a whole number, 1 or more, found '7'"),
        ("updates", "1" + "0" * 400, "updates: expected a whole number"),
        ("sigma_rels", "null", "sigma_rels: expected a list of numbers, found None"),
        ("sigma_rels", '["x"]', "sigma_rel: expected a number, found str"),
        ("sigma_rels", "[NaN]", "sigma_rel: expected a value in"),
        ("tensors", "3", "tensors: expected a dict of names to names, found 3"),
        ("tensors", '{"w": 3}', "tensors: expected a dict of names to names"),
        ("complex", '["v"]', "complex: expected a list of names of tensors, found"),
        (
            "complex",
            '["w"]',
            "'0/w': expected shape .2, 3. with a last dimension of 2, for complex numbers",
        ),
        ("step", "[" * 100_000, "recursion"),
        ("step", "9" * 5000, "digits"),
    ],
)
def test_invalid_metadata_are_named(tmp_path, key, value, named):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2, 3))))
    rewrite(path, **{key: value})
    with pytest.raises(ValueError, match=f"{path}: .*{named}"):
        reconstruct(tmp_path, 0.07)


def test_another_format_is_named(tmp_path):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    save_file({"w": torch.ones(1)}, path, {MARK: "2"})
    with pytest.raises(ValueError, match=f"{path}: expected format 1, found 2"):
        snapshots(tmp_path)


def test_without_safetensors(tmp_path, monkeypatch):
    save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    calls = [lambda: save_snapshot(tmp_path, Stub(8, *both(torch.ones(2)))), lambda: snapshots(tmp_path)]
    for call in [*calls, lambda: reconstruct(tmp_path, 0.05)]:
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()


def test_the_module_imports_without_safetensors():
    code = "import sys; sys.modules['safetensors'] = None; import fused_ema.posthoc as p"
    code += "; print(p.solve_weights([1], [3], 2, 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "tensor([1.], dtype=torch.float64)\n"), done.stderr


def saved_after(folder, ema, updates):
    while ema.updates < updates:
        ema.update()
    return save_snapshot(folder, ema)


def test_snapshots_of_more_updates_are_named(tmp_path):
    """They belong to another run, or to this one before it went back to an earlier state."""
    ema = fused_ema.EMA(nn.Linear(2, 2), power_function(0.1))
    saved_after(tmp_path, ema, 2), saved_after(tmp_path, ema, 5)
    (tmp_path / "ema-0000000009.safetensors.bak").touch()  # not a snapshot
    state = copy.deepcopy(ema.state_dict())
    saved_after(tmp_path, ema, 6), saved_after(tmp_path, ema, 8)
    ema.load_state_dict(state)
    with pytest.warns(UserWarning, match="ema-0000000008.safetensors had more updates than ema-0000000006"):
        saved_after(tmp_path, ema, 6)
    again = fused_ema.EMA(ema.model, ema.schedules)
    names = ", ".join(f"ema-000000000{updates}.safetensors" for updates in (2, 5, 6, 8))
    with pytest.warns(UserWarning, match=f"{names} had more updates than ema-0000000001"):
        saved_after(tmp_path, again, 1)


def test_snapshots_in_order_give_no_warning(tmp_path):
    ema = fused_ema.EMA(nn.Linear(2, 2), power_function(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved_after(tmp_path, ema, 2), saved_after(tmp_path, ema, 2), saved_after(tmp_path, ema, 5)
        resumed = fused_ema.EMA(ema.model, ema.schedules)
        resumed.load_state_dict(ema.state_dict())
        saved_after(tmp_path, resumed, 8)


def test_a_snapshot_with_the_key_of_a_run_is_read(tmp_path):
    """Earlier versions wrote one."""
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    rewrite(path, run="0123")
    assert [each.path for each in snapshots(tmp_path)] == [path]
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [1, 1]


def rewrite(path, **metadata):
    """Changes some of the metadata."""
    with safetensors().safe_open(path, "pt") as file:
        before, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**before, **metadata})


def test_a_snapshot_under_another_name_is_refused(tmp_path):
    path = save_snapshot(tmp_path, Stub(1, *both(torch.ones(2))))
    path.rename(path.with_name("ema-0000000007.safetensors"))
    with pytest.raises(ValueError, match="the name says 7 updates, the metadata 1"):
        snapshots(tmp_path)
