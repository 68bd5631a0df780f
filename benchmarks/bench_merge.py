"""Compares ways to average checkpoints: time, memory, and how many elements differ from the formula.

    python benchmarks/bench_merge.py FOLDER [--mergekit PYTHON] [--rounds 5] [--json FILE]

Makes four checkpoints of a model with Llama's shapes in bfloat16 in FOLDER, each as a folder that transformers can load
and as a file of torch.save, and averages them by the mean. Each method runs in a process of its own, in alternation;
the clock runs from after its imports until its output is on disk. `copy` reads the same bytes and writes one checkpoint
without any arithmetic: the limit. `memory` is what a process had at its peak more than after its imports: all of it,
and the part that is not mapped from files, which the system can't drop. PYTHON is one of an environment with mergekit.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COUNT = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
COPY, LOOP, LOOP_SAFETENSORS = "copy", "torch.load loop", "load_file loop"
FOLDERS, FILES, MERGEKIT = "fused_ema.merge", "fused_ema.merge, files of torch.save", "mergekit, linear"
WITHOUT = "fused_ema.merge, no extension"
METHODS = [COPY, FOLDERS, WITHOUT, LOOP_SAFETENSORS, MERGEKIT, FILES, LOOP]


def shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, words = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    found = {"model.embed_tokens.weight": (words, hidden)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        found |= {f"{layer}.mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        found |= {f"{layer}.{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}


def make(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for i in range(COUNT):
        path = folder / f"step-{i}"
        if (folder / f"step-{i}.pt").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(i)
        state = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in shapes().items()}
        save_file(state, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(CONFIG))
        torch.save(state, folder / f"step-{i}.pt")


# ---- One method, in a process of its own


def run(method: str, folder: Path) -> None:
    """Imports, says so, waits, averages, and prints the seconds."""
    paths, out = [folder / f"step-{i}" for i in range(COUNT)], folder / "out"
    work: Any
    if method == COPY:
        work = lambda: copy([path / "model.safetensors" for path in paths], out)  # noqa: E731
    elif method in (FOLDERS, WITHOUT, FILES):
        import fused_ema

        files, target = (paths, out) if method != FILES else ([f"{path}.pt" for path in paths], out / "out.pt")
        work = lambda: fused_ema.merge(files, target)  # noqa: E731
    elif method == MERGEKIT:
        work = mergekit(paths, out)
    else:
        work = loop(method, paths, out)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    work()
    for file in out.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    print(json.dumps({"seconds": time.perf_counter() - start, **memory("self", "VmHWM")}), flush=True)
    sys.stdin.readline()


def copy(files: list[Path], out: Path) -> None:
    out.mkdir(exist_ok=True)
    buffer = bytearray(1 << 18)
    with open(out / "model.safetensors", "wb", buffering=0) as target:
        for i, file in enumerate(files):
            with open(file, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    if i == 0:
                        target.write(memoryview(buffer)[:count])


def loop(method: str, paths: list[Path], out: Path) -> Any:
    """What people write: sums in float32, all in memory."""
    import torch
    from safetensors.torch import load_file, save_file

    def work() -> None:
        total: dict[str, Any] = {}
        for path in paths:
            if method == LOOP:
                state = torch.load(f"{path}.pt", weights_only=True)
            else:
                state = load_file(path / "model.safetensors")
            for name, tensor in state.items():
                if name in total:
                    total[name] += tensor.float() / COUNT
                else:
                    total[name] = tensor.float() / COUNT
        result = {name: tensor.bfloat16() for name, tensor in total.items()}
        out.mkdir(exist_ok=True)
        if method == LOOP:
            torch.save(result, out / "out.pt")
        else:
            save_file(result, out / "model.safetensors", {"format": "pt"})

    return work


def mergekit(paths: list[Path], out: Path) -> Any:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
    config = MergeConfiguration.model_validate({"merge_method": "linear", "dtype": "bfloat16", "models": models})
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    return lambda: run_merge(config, str(out), options)


# ---- All methods


def memory(process: int | str, *names: str) -> dict[str, int]:
    """Entries of a process's status, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in lines if "kB" in line}
    return {name: int(found.get(name, "0")) * 1024 for name in names}


def measured(method: str, folder: Path, python: str) -> dict[str, float]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    if method == FILES:
        (folder / "out").mkdir()
    command = [python, __file__, str(folder), "--run", method]
    env = {**os.environ, "FUSED_EMA_EXT": "0"} if method == WITHOUT else None
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert child.stdin
    assert child.stdout
    while (line := child.stdout.readline()).strip() != "ready":
        if not line:
            raise RuntimeError(f"{method} failed")
    before = memory(child.pid, "VmRSS", "RssAnon")
    anonymous = before["RssAnon"]
    child.stdin.write("\n")
    child.stdin.flush()
    while not select.select([child.stdout], [], [], 0.005)[0]:
        anonymous = max(anonymous, memory(child.pid, "RssAnon")["RssAnon"])
    done = json.loads(child.stdout.readline() or "null")
    if done is None:
        raise RuntimeError(f"{method} failed")
    child.stdin.write("\n")
    child.stdin.close()
    child.wait()
    return {
        "seconds": done["seconds"],
        "peak": done["VmHWM"] - before["VmRSS"],
        "anonymous": anonymous - before["RssAnon"],
    }


def differing(folder: Path, method: str) -> float:
    """The share of elements that differ from the float64 mean, rounded once."""
    import torch
    from safetensors import safe_open

    if method in (FILES, LOOP):
        found = torch.load(folder / "out" / "out.pt", weights_only=True, mmap=True)
    else:
        from safetensors.torch import load_file

        (path,) = (folder / "out").glob("*.safetensors")
        found = load_file(path)
    wrong = total = 0
    files = [safe_open(folder / f"step-{i}" / "model.safetensors", "pt") for i in range(COUNT)]
    for name, tensor in found.items():
        exact = torch.zeros(tensor.shape, dtype=torch.float64)
        for file in files:
            exact += 1 / COUNT * file.get_tensor(name).double()
        # Sums of four bfloat16 are exact in float64, so the nearest bfloat16 can be told from the distance to it.
        down = (exact.view(torch.int64) & -(1 << 45)).view(torch.float64)  # towards zero, to 8 bits
        up = torch.where(exact == down, down, ((exact.view(torch.int64) | ((1 << 45) - 1)) + 1).view(torch.float64))
        even = (down.view(torch.int64) >> 45) & 1 == 0
        nearest = torch.where((exact - down).abs() < (up - exact).abs(), down, up)
        nearest = torch.where((exact - down).abs() == (up - exact).abs(), torch.where(even, down, up), nearest)
        wrong += int((tensor.double() != nearest).sum())
        total += tensor.numel()
    return wrong / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run(arguments.run, arguments.folder)
    import torch
    from measure import environment
    from report import columns, console, short

    make(arguments.folder)
    methods = [method for method in METHODS if method != MERGEKIT or arguments.mergekit]
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    wrong = {}
    for _ in range(arguments.rounds):
        for method in methods:
            python = arguments.mergekit if method == MERGEKIT else sys.executable
            found[method].append(measured(method, arguments.folder, python))
            if method != COPY and method not in wrong:
                wrong[method] = differing(arguments.folder, method)
    size = sum((arguments.folder / f"step-{i}" / "model.safetensors").stat().st_size for i in range(COUNT))
    title = f"{COUNT} checkpoints of {short(size / COUNT)} in bfloat16"
    table = columns(title, "method", ["seconds", "read at", "memory", "not mapped", "differ"])
    rows = []
    for method, values in found.items():
        row = {key: statistics.median(each[key] for each in values) for key in values[0]}
        rows.append({"method": method, **row, "all_seconds": [each["seconds"] for each in values]})
        rows[-1]["differing"] = wrong.get(method)
        differ = "" if method not in wrong else f"{wrong[method]:.1e}"
        speed = f"{short(size / row['seconds'])}/s"
        table.add_row(method, f"{row['seconds']:.2f}", speed, short(row["peak"]), short(row["anonymous"]), differ)
    console.print(table)
    env = environment(torch.device("cpu"))
    mergekit = " --mergekit PYTHON" if arguments.mergekit else ""
    env["command"] = f"python benchmarks/bench_merge.py FOLDER{mergekit} --rounds {arguments.rounds} --json FILE"
    content = {"env": env, "count": COUNT, "bytes": size, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
