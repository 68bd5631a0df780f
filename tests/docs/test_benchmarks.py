"""The benchmarks themselves: what they compute from times, what they check, and one small run from end to end."""

import csv
import gc
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_scaling  # noqa: E402
import bench_update  # noqa: E402
import export  # noqa: E402
import measure  # noqa: E402
import methods  # noqa: E402
import models  # noqa: E402
import plot  # noqa: E402
import tables  # noqa: E402

CPU = torch.device("cpu")
RESULTS = [BENCHMARKS / "results" / name for name in (*plot.OF_THE_PAGES, "foreach-cpu-torch2.13.0.json")]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = models.filled(lambda: nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)), torch.float32, CPU)
    return model, models.average_of(model, torch.float32)


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != methods.COMPILED])
@torch.no_grad()
def test_each_method_makes_the_same_update_of_the_averages_it_is_given(pair, name):
    try:
        step = methods.make_step(name, *pair)
    except ImportError as problem:
        pytest.skip(f"{name}: {problem}")
    model, average = pair
    expected = [
        e.double().lerp(p.double(), methods.WEIGHT)
        for e, p in zip(average.parameters(), model.parameters(), strict=True)
    ]
    assert measure.error_over_bound(step, *pair) < (1.001 if name in methods.OURS else 1000)
    for average_now, exact in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(average_now.double(), exact, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_wrong_method_shows(pair):
    model, average = pair

    def wrong():
        for e, p in zip(average.parameters(), model.parameters(), strict=True):
            e.lerp_(p, 1.001 * methods.WEIGHT)

    assert measure.error_over_bound(wrong, *pair) > 100


def test_memory_of_a_step():
    tensor = torch.zeros(100_000)
    assert measure.peak_extra_bytes(lambda: tensor.add_(1), CPU) < 1000
    assert 400_000 <= measure.peak_extra_bytes(lambda: tensor.copy_(tensor + 1), CPU) < 401_000


def test_turns_are_fair():
    calls = []
    steps = {name: [lambda name=name, k=k: calls.append((name, k)) for k in range(3)] for name in "ab"}
    times = measure.alternating(steps, CPU, 0.0)
    rounds = measure.WARM_UP + measure.ROUNDS
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("ab", measure.ROUNDS)
    assert [k for _, k in calls] == [call % 3 for call in range(2 * rounds)], "no set twice in a row"
    assert all(sorted(who for who, _ in calls[i : i + 2]) == ["a", "b"] for i in range(0, 2 * rounds, 2))


def test_collection_goes_on_after_a_method_that_raises():
    with pytest.raises(ZeroDivisionError):
        measure.alternating({"a": [lambda: 1 // 0]}, CPU, 0.0)
    assert gc.isenabled()


def test_sets_are_larger_than_the_cache():
    cache = measure.last_level_cache(CPU)
    for size in (cache // 100, cache, 10 * cache):
        sets = measure.sets_for(size, CPU)
        assert not measure.in_cache(size, sets, CPU)
        assert sets == 1 or measure.in_cache(size, sets - 1, CPU)
    assert measure.in_cache(100, measure.sets_for(100, CPU), CPU)


def test_a_line_is_found_and_so_is_where_the_gain_ends():
    theirs, ours = {"us": (4.0, 3.0, 9000.0)}, {"us": (2.0, 0.5, 10000.0)}
    points = []
    for tensors, size in ((1, 10**4), (100, 10**6), (100, 10**9), (5000, 5 * 10**7), (20000, 10**6)):
        medians = {
            name: {"median": line[0] + line[1] * tensors + line[2] * size / 1e9}
            for name, line in (("theirs", theirs["us"]), ("ours", ours["us"]))
        }
        points.append({"tensors": tensors, "bytes": size, "us": medians})
    fits = {name: bench_scaling.fit(points, name) for name in ("theirs", "ours")}
    for name, line in (("theirs", theirs["us"]), ("ours", ours["us"])):
        assert [*fits[name].values()] == pytest.approx(line, rel=1e-6)
    end = bench_scaling.break_even(fits["theirs"], fits["ours"], 100)
    time = {
        name: each["fixed_us"] + 100 * each["us_per_tensor"] + end / 1e9 * each["us_per_GB"]
        for name, each in fits.items()
    }
    assert time["theirs"] / time["ours"] == pytest.approx(bench_scaling.GAIN)
    assert bench_scaling.break_even({**fits["theirs"], "us_per_GB": 12000.0}, fits["ours"], 100) is None
    assert bench_scaling.break_even(fits["ours"], {**fits["ours"], "us_per_GB": 1.0}, 100) == 0


def test_ratios_are_taken_within_rounds():
    times = {
        name: [measure.Times(k * factor, 0.0, 0.0) for k in (1, 50, 2)] for name, factor in (("a", 3.0), ("b", 1.0))
    }
    times["a"][2] = measure.Times(100.0, 0.0, 0.0)
    assert measure.ratio(times["a"], times["b"]) == 3


@torch.no_grad()
def test_shares_of_a_stream_at_each_size_are_measured_and_drawn(tmp_path, monkeypatch):
    library = measure.compile_stream()
    if isinstance(library, str):
        pytest.skip(library)
    names = [methods.LOOP, methods.FOREACH_CACHED, methods.UPDATE, methods.BOUND, methods.MANAGER]
    points = [bench_scaling.point(4, elements, CPU, 0.0, names, library) for elements in (4000, 40000, 400000)]
    for point in points:
        assert point["share_of_ceiling"].keys() == point["us"].keys() == set(names)
        assert all(0 < each < 100 for each in point["share_of_ceiling"].values())
        assert point["streams"].keys() == {"plain C++ loop"}
    scaling = {"by_size": points, "by_count": points, "tensors": 4, "fits": {name: {} for name in names}}
    content = {"env": measure.environment(CPU), "rows": [], "ceiling": [], "left_out": {}, "scaling": scaling}
    results = tmp_path / "some.json"
    results.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(results)])
    plot.main()
    found = {path.name for path in tmp_path.glob("*.png")}
    assert found == {"some-share.png", "some-share-dark.png", "some-count.png", "some-count-dark.png"}
    assert "some-share-dark.png" in "".join(tables.share(content, "some.json"))
    assert bench_scaling.point(4, 4000, CPU, 0.0, names[:1], "no compiler")["share_of_ceiling"] == {}


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_tables_are_made_of_older_results_too(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in ("run", "equal", "wider", "extra", "host", "ratios"):
        lines = tables.WRITERS[name](content, f"results/{file.name}")
        cells = {line.count("|") for line in lines if line.startswith("|")}
        assert len(cells) == (name not in ("run", "ratios")), "each row of a table has as many cells"
    bounds = {f"({stream})" for each in content["ceiling"] for stream in each["streams"]}
    table = "".join(tables.WRITERS["equal"](content, ""))
    assert all(tables.escaped(bound) in table for bound in bounds)
    assert "error |" in table


def test_the_table_of_the_front_page():
    content = json.loads((BENCHMARKS / "results" / "h200-torch2.11.0.json").read_text(encoding="utf-8"))
    lines = tables.front(content, "x.json")
    assert [line.partition("| ")[2].partition(" | ")[2] for line in lines[2:6]] == [
        "7.2 ms | 402 | 0 |",
        "8.2 ms | 254 | 4.4 GB |",
        "7.4 ms | 256 | 4.4 GB |",
        "**2.6 ms** | **1** | **0** |",
    ]
    assert "NVIDIA H200" in lines[-1]
    assert "(x.json)" in lines[-1]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_pictures_are_there_for_light_and_dark_pages(page):
    text = (BENCHMARKS.parent / page).read_text(encoding="utf-8")
    pictures = re.findall(r'<source media=".*?dark.*?" srcset="(.*?)-dark.png">\s*<img alt=".+" src="(.*?).png">', text)
    assert len(pictures) == text.count("<picture>")
    for dark, light in pictures:
        assert dark == light
        for suffix in ("", "-dark"):
            assert ((BENCHMARKS.parent / page).parent / f"{light}{suffix}.png").exists()


def test_what_is_kept_of_times():
    found = measure.spread([1e-6 * us for us in (1, 2, 3, 4, 5, 6, 7, 8, 109)])
    expected = {"median": 5, "p20": 2, "p80": 8, "mean": 145 / 9, "min": 1, "max": 109, "iqr": 4, "outliers": 1}
    assert found == pytest.approx(expected | {"std": 34.92}, rel=1e-3)


def test_an_export_has_the_columns_of_kernels_benchmark():
    ours, theirs = (dict.fromkeys(("mean", "std", "min", "max", "iqr"), us) for us in (100.0, 250.0))
    common = {"case": "small", "rounds": 9, "match": True, "max_err_over_bound": 1.0}
    rows = [
        {**common, "method": methods.LOOP, "device_us": theirs | {"outliers": 1}},
        {**common, "method": methods.BOUND, "device_us": ours | {"outliers": 0}},
        {**common, "match": None, "case": "old", "method": methods.BOUND, "device_us": {"median": 3.0}},
    ]
    left_out = {"small": {"wrong": "ArithmeticError: a wrong result", "absent": "ImportError"}, "large": "MemoryError"}
    file = io.StringIO()
    export.write({"rows": rows, "left_out": left_out}, file)
    found = list(csv.DictReader(file.getvalue().splitlines()))
    columns = "Benchmark Workload N Speedup Mean(ms) Std(ms) Min(ms) Max(ms) IQR(ms) Outliers Ref(ms) Match Error"
    assert list(found[0]) == columns.split()
    assert [line["Workload"] for line in found] == [methods.LOOP, methods.BOUND, methods.BOUND, "wrong"]
    assert [line["Speedup"] for line in found] == ["1.00x", "2.50x", "", ""]
    assert [line["Match"] for line in found] == ["✓", "✓", "", "✗"]
    assert [line["Mean(ms)"] for line in found] == ["0.2500", "0.1000", "", ""]


def test_a_match_is_what_torch_testing_calls_one(pair):
    model, average = pair
    for off, match in ((0.0, True), (5e-6, True), (1e-4, False)):

        @torch.no_grad()
        def step(off=off):
            for e, p in zip(average.parameters(), model.parameters(), strict=True):
                e.lerp_(p, methods.WEIGHT).add_(off)

        assert measure.compared(step, model, average)[1] is match


def test_a_wrong_result_is_left_out(monkeypatch):
    monkeypatch.setitem(methods.METHODS, methods.LOOP, lambda model, ema: lambda: None)
    case = models.Case("small", models.equal_tensors(3, 100))
    with torch.no_grad():
        rows, _, left_out = bench_update.measure(case, CPU, 0.0, "no compiler", [methods.LOOP, methods.BOUND])
    assert [row["method"] for row in rows] == [methods.BOUND]
    assert "a wrong result" in left_out[methods.LOOP]


@pytest.mark.slow
def test_a_small_run_from_end_to_end(tmp_path):
    results = tmp_path / "results.json"
    options = ["--parts", "models", "--methods", "fused,tutorial", "--seconds", "0.05", "--threads", "1"]
    options += ["--cases", "2000 tensors", "--json", results, "--csv", tmp_path / "rows.csv"]
    command = [sys.executable, BENCHMARKS / "bench_update.py", *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "2000 tensors of 256" in printed
    content = json.loads(results.read_text())
    assert {row["method"] for row in content["rows"]} >= {methods.LOOP, *methods.OURS[:3]}
    for row in content["rows"]:
        assert row["tensors"] == 2000
        assert row["device_us"]["p20"] <= row["device_us"]["median"] <= row["device_us"]["p80"]
        assert (row["max_err_over_bound"] <= 1.001) == (row["method"] in methods.OURS or "fused" in row["method"])
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == len(content["rows"]) + 1
    subprocess.run([sys.executable, BENCHMARKS / "plot.py", results], check=True)
    assert {path.name for path in tmp_path.glob("*.png")} >= {"results-ratios.png", "results-ratios-dark.png"}


@pytest.mark.parametrize(
    "options", [["--methods", "fast"], ["--methods", "bind,"], ["--cases", "GPT-5"], ["--parts", "all"]], ids=" ".join
)
def test_what_is_not_there_is_an_error(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_update.py", *options])
    with pytest.raises(SystemExit) as ended:
        bench_update.main()
    assert ended.value.code == 2
    assert f"{options[0]}: expected" in capsys.readouterr().err


def test_counts_of_a_profile():
    """Kernels, copies and waits go to the range in which they began; what is around, and the marks, to none."""
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, device, start, end):
        span, marks = SimpleNamespace(start=start, end=end), name.startswith(("fused_ema: probe", "Torch-Compiled"))
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=marks)

    marks = [event(f"{measure.MARK} {k}", device, 10 * k, 10 * k + 8) for k in range(3) for device in (cpu, cuda)]
    marks.append(event("Torch-Compiled Region", cuda, 21, 23))
    inside = [event("Memset (Device)", cuda, 11, 12), event("void ema_kernel<0>", cuda, 12, 30)]
    inside += [event("cudaDeviceSynchronize", cpu, 7, 8), event("cudaLaunchKernel", cpu, 11, 12)]
    inside += [
        event("Memcpy DtoH", cuda, 27, 28),
        event("gemm", cuda, 21, 22),
        event("cudaStreamSynchronize", cpu, 23, 24),
    ]
    outside = [event("warm up", cuda, -5, -4), event("between", cuda, 9, 9.5), event("after", cuda, 29, 30)]
    found = measure.counted([*outside, *inside, *marks], 3)
    assert found == [{"syncs": 1}, {"copies": 1, "kernels": 1}, {"copies": 1, "kernels": 1, "syncs": 1}]
