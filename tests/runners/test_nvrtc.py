"""What the NVRTC runner does beyond what all runners do: kernels, contexts, captures, streams, and the driver's errors.

It runs on a stand-in for the CUDA driver, in host memory; see tests/grid/stand_in.py.
"""

import gc
import os
import threading
import weakref
from pathlib import Path

import emulated_grid
import numpy as np
import pytest
import stand_in
import torch
from conftest import bits, forget_plans, same_bits
from grid_checks import in_copy, place

import fused_ema
from fused_ema._build import kernels
from fused_ema._build.compile import BuildError
from fused_ema.pairs.checks import Action
from fused_ema.runners import driver, extension, nvrtc
from fused_ema.runners.base import Call, Job
from fused_ema.runners.watch import SlotWatch

OPS = emulated_grid.OPS


@pytest.fixture
def host(monkeypatch):
    forget_plans()
    yield stand_in.install(monkeypatch)
    forget_plans()
    stand_in.forget()


def job(pairs, averages=1):
    """Of pairs of the emulated grid."""
    actions = [Action.AVERAGE if pair.average else Action.COPY for pair in pairs]
    sides = [[pair.ema for pair in pairs], [pair.model for pair in pairs]]
    return Job([f"[{i}]" for i in range(len(pairs))], *sides, actions, averages, [pair.stride for pair in pairs])


def prepare(runner, pairs, averages):
    made = job(pairs, averages)
    kind = extension.load().CompiledWatch if extension.load() else SlotWatch
    return runner.prepare(made, kind([], [made.ema, made.model]))


def two_pairs():
    """Of one type, and of two types."""
    ema, model = [torch.ones(1000), torch.ones(700)], [torch.zeros(1000), torch.zeros(700, dtype=torch.bfloat16)]
    return ema, model, nvrtc.Nvrtc().prepare(job(list(map(emulated_grid.Pair, ema, model))), None)


def scratch_for(prepared):
    return [torch.empty(size, dtype=torch.uint8, device=device) for device, size in prepared.scratch()]


# ---- The bits of the compiled runner ----


@pytest.mark.parametrize("averages", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.3, 0.9999])
def test_all_operations_have_the_bits_of_the_compiled_runner(host, averages, decay):
    if extension.load() is None:
        pytest.skip(f"no native extension: {extension.why_not()}")
    kinds = [*emulated_grid.LERP_PAIRS, *emulated_grid.CAST_PAIRS]
    rows = [(kind, n, (n % 4, n % 3), n % 5 > 0) for n, kind in enumerate(kinds * 2, 100)]
    rows += [(kind, 4099, (1, 1), False) for kind in emulated_grid.RAW_PAIRS]
    memory, pairs = place(np.random.default_rng(0), rows, averages)
    other, twins = in_copy(memory, pairs)
    ours, theirs = prepare(nvrtc.Nvrtc(), pairs, averages), prepare(extension.Extension(), twins, averages)
    assert ours.scratch() == theirs.scratch()
    scratch, other_scratch = scratch_for(ours), scratch_for(theirs)
    decays, keys = tuple(decay + k * 1e-5 for k in range(averages)), tuple(range(7, 7 + averages))
    for op in OPS:
        call = Call(op, decays, keys=keys)
        if op in ("swap", "restore"):
            call = Call(op, average=averages - 1, scratch=scratch)
        before = host.launches()
        assert ours.run(call)
        assert host.launches() == before + 1, "whatever the number of tensors, types and averages"
        assert theirs.run(call._replace(scratch=other_scratch if call.scratch else ()))
        assert torch.equal(memory, other), op
        assert ours.exchanged() == theirs.exchanged() == (op == "swap")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_for_each_average_on_the_device(host, dtype):
    """The host never reads it."""
    rows = [(kind, n, (n % 4, 0), True) for n, kind in enumerate(emulated_grid.LERP_PAIRS, 300)]
    memory, pairs = place(np.random.default_rng(1), rows, 3)
    other, twins = in_copy(memory, pairs)
    decays = torch.tensor([0.9, 1.0, 0.0], dtype=dtype)
    assert prepare(nvrtc.Nvrtc(), pairs, 3).run(Call("update", device_decays=decays, decays=(0.0,) * 3))
    assert prepare(nvrtc.Nvrtc(), twins, 3).run(Call("update", tuple(decays.tolist())))
    assert torch.equal(memory, other)


# ---- Kernels, contexts, threads ----


def test_a_kernel_is_loaded_once_when_it_is_needed(host):
    before = host.loads()
    ema, model, prepared = two_pairs()
    assert host.loads() == before + 1, "the kernel of updates, so that a capture may follow"
    for op in ("update", "copy", "update", "copy"):
        assert prepared.run(Call(op, (0.9,)), ema, model)
    two_pairs()
    assert host.loads() == before + 2


@pytest.mark.hazard(52, "good")
@pytest.mark.skipif(nvrtc.nvrtc.why_not() is not None, reason=f"no NVRTC: {nvrtc.nvrtc.why_not()}")
def test_what_nvrtc_compiles_is_loaded_by_its_name(host, monkeypatch):
    compiler = nvrtc.nvrtc.nvrtc()
    monkeypatch.setattr(kernels, "image", compiler.compile)
    ema, model, prepared = two_pairs()
    assert prepared.run(Call("update", (0.9,)), ema, model)
    assert ema[0].eq(0.9).all()
    assert compiler.compile("update", 90).code.startswith(b"\x7fELF")


def test_a_thread_without_a_context_gets_it_for_the_launch_alone(host):
    ema, model, prepared = two_pairs()
    assert prepared.run(Call("update", (0.5,)), ema, model)
    found = []

    def run():
        before = driver.driver().current_context()
        found.extend([before, prepared.run(Call("update", (0.5,)), ema, model), driver.driver().current_context()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0, True, 0]
    assert ema[0].eq(0.25).all()


def test_the_context_of_another_device_is_given_back(host):
    ema, model, prepared = two_pairs()
    other = driver.driver().primary_context(3)
    driver.driver().set_context(other)
    try:
        assert prepared.run(Call("copy"), ema, model)
        assert driver.driver().current_context() == other
    finally:
        driver.driver().set_context(0)


@pytest.mark.parametrize("call", ["cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuModuleLoadData", "cuLaunchKernel"])
def test_a_failure_has_the_drivers_words_and_nothing_else_runs(host, call):
    ema, model = {"w": torch.ones(100)}, {"w": torch.zeros(100)}
    if call == "cuLaunchKernel":
        fused_ema.update(ema, model, 1.0)  # makes the plan
    before = bits(ema, model)
    host.fail(call, 700)
    for _ in range(2):
        words = rf"the CUDA driver failed in {call}.*: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was enc"
        with pytest.raises(RuntimeError, match=words):
            fused_ema.update(ema, model, 0.5)
    assert same_bits(before, ema, model)
    host.fail("", 0)
    fused_ema.update(ema, model, 0.5)
    assert ema["w"].eq(0.5).all()


def test_an_error_without_a_name_has_its_number(host):
    host.fail("cuLaunchKernel", 12345)
    ema, model, prepared = two_pairs()
    with pytest.raises(RuntimeError, match="cuLaunchKernel on cpu: error 12345"):
        prepared.run(Call("update", (0.5,)), ema, model)


def test_an_exchange_that_fails_is_none(host):
    ema, model, prepared = two_pairs()
    before = bits(ema, model)
    host.fail("cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
        prepared.run(Call("swap", scratch=scratch_for(prepared)), ema, model)
    assert not prepared.exchanged()
    host.fail("", 0)
    assert prepared.run(Call("restore", scratch=scratch_for(prepared)), ema, model), "there is nothing to undo"
    assert same_bits(before, ema, model)


def test_an_exchange_that_fails_on_the_second_device_is_undone_on_the_first(host):
    """Two devices that are both host memory: each has a pair."""
    sides = [[torch.full((500,), float(value + k)) for k in range(2)] for value in (10, 20)]
    pairs = list(map(emulated_grid.Pair, *sides))
    prepared = nvrtc.Nvrtc().prepare(job(pairs), None)
    parts = [nvrtc.Nvrtc().prepare(job([pair]), None) for pair in pairs]
    prepared._devices = [part._devices[0] for part in parts]
    assert prepared.launches() == 2
    before = bits(*sides)
    host.fail("cuLaunchKernel", 700, after=1)
    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
        prepared.run(Call("swap"), *sides)
    assert [each.exchanged() for each in parts] == [True, False]
    assert prepared.exchanged()
    assert [side[0].mean().item() for side in sides] == [20, 10]
    assert [side[1].mean().item() for side in sides] == [11, 21]
    host.fail("", 0)
    assert prepared.run(Call("restore"), *sides)
    assert not prepared.exchanged()
    assert same_bits(before, *sides)


def test_a_kernel_that_does_not_compile_raises_before_anything_is_written(host, monkeypatch):
    def fail(op, arch):
        raise BuildError(f"NVRTC 13.0 can't compile the kernel {op!r}:\nits log")

    ema, model, prepared = two_pairs()
    before = bits(ema, model)
    monkeypatch.setattr(kernels, "image", fail)
    with pytest.raises(RuntimeError, match="the kernel 'copy':\nits log"):
        prepared.run(Call("copy"), ema, model)
    assert same_bits(before, ema, model)


# ---- Graph captures and streams ----


def test_a_capture_takes_neither_new_tensors_nor_new_kernels(host, monkeypatch):
    ema, model = {"w": torch.ones(100)}, {"w": torch.zeros(100)}
    binding = fused_ema.bind(ema, model)
    monkeypatch.setattr(stand_in.HostGpu, "now_capturing", True)
    binding.update(0.5)
    before = bits(ema)
    with pytest.raises(RuntimeError, match=r"the kernel 'copy' can't be loaded on cpu during a CUDA graph capture"):
        binding.copy_()
    model["w"] = torch.zeros(100)
    words = (
        r"the addresses of new or replaced tensors on cpu can't be uploaded during a CUDA graph capture. Update them"
    )
    with pytest.raises(RuntimeError, match=words):
        binding.update(0.5)
    assert same_bits(before, ema)
    monkeypatch.setattr(stand_in.HostGpu, "now_capturing", False)
    binding.prepare()
    binding.copy_()
    monkeypatch.setattr(stand_in.HostGpu, "now_capturing", True)
    binding.copy_()


def rows(prepared):
    return [device.memory[0].numpy().tobytes() for device in prepared._devices]


@pytest.mark.parametrize("averages", [1, 2])
def test_rows_of_replaced_tensors_are_those_of_a_new_plan(host, averages):
    layout = [(kind, 90 + n, (n % 4, n % 3), True) for n, kind in enumerate(emulated_grid.LERP_PAIRS)]
    layout += [(kind, 70, (1, 1), False) for kind in emulated_grid.RAW_PAIRS]
    _, pairs = place(np.random.default_rng(0), layout, averages)
    ema, model = [pair.ema for pair in pairs], [pair.model for pair in pairs]
    made = job(pairs, averages)
    prepared = nvrtc.Nvrtc().prepare(made, SlotWatch([], [ema, model]))
    assert prepared.run(Call("update", (1.0,) * averages))  # writes nothing
    captured, before = prepared._devices[0].memory[0], rows(prepared)
    for i in range(0, len(model), 3):
        model[i] = torch.zeros(len(model[i]) + i % 2, dtype=model[i].dtype)[i % 2 :]
    changed = prepared.changed()
    assert changed.numbers == list(range(0, len(model), 3))
    assert prepared.patch(changed)
    assert prepared.current()
    assert rows(prepared) == rows(nvrtc.Nvrtc().prepare(made._replace(model=model), None)) != before
    assert captured.numpy().tobytes() == before[0], "a captured graph reads these"


def test_a_captured_graph_keeps_the_rows_of_before(host, monkeypatch):
    ema, model = {"w": torch.ones(100)}, {"w": torch.zeros(100)}
    binding = fused_ema.bind(ema, model)
    binding.update(1.0)
    device = binding._plan.prepared._devices[0]
    monkeypatch.setattr(stand_in.HostGpu, "now_capturing", True)
    binding.update(0.5)
    monkeypatch.setattr(stand_in.HostGpu, "now_capturing", False)
    captured = weakref.ref(device.memory[0])
    model["w"] = torch.zeros(100)
    binding.update(0.5)
    assert binding._plan.prepared._devices == [device], "the plan was patched"
    assert captured() is not None is not device.memory[0]
    assert captured() is not device.memory[0]


def test_the_words_of_a_refusal_are_those_of_the_compiled_runner():
    source = (Path(nvrtc.__file__).parents[2] / "csrc" / "plan.cpp").read_text()
    for words in (
        "fused_ema: the addresses of new or replaced tensors on ",
        "can't be uploaded during a CUDA graph capture. Update them once before the capture, or call prepare() ",
        "on what bind() returned",
    ):
        assert words in source
        assert words.strip() in " ".join(Path(nvrtc.__file__).read_text().replace('"', "").replace("f{", "{").split())


@pytest.mark.parametrize("captured", [True, False])
def test_captured_tables_outlive_their_plan(host, monkeypatch, captured):
    ema, model, prepared = two_pairs()
    tables = [weakref.ref(memory) for memory in prepared._devices[0].memory]
    monkeypatch.setattr(stand_in.HostGpu, "now_capturing", captured)
    for _ in range(2):
        prepared.run(Call("update", (0.5,)), ema, model)
    del prepared
    gc.collect()
    assert [reference() is not None for reference in tables] == [captured] * 2


def test_other_streams_are_recorded(host, monkeypatch):
    ema, model, prepared = two_pairs()
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda memory, stream: recorded.append((memory, stream)))
    prepared.run(Call("update", (0.5,)), ema, model)
    assert not recorded
    other = stand_in.Stream()
    monkeypatch.setattr(stand_in.HostGpu, "now_stream", other)
    prepared.run(Call("update", (0.5,)), ema, model)
    assert [id(memory) for memory, _ in recorded] == [id(memory) for memory in prepared._devices[0].memory]
    assert all(stream is other for _, stream in recorded)


# ---- Forks, refusals ----


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_neither_uses_nor_frees_the_memory_of_its_parent(host):
    ema, model, prepared = two_pairs()
    tables = [weakref.ref(memory) for memory in prepared._devices[0].memory]
    child = os.fork()
    if child == 0:
        ran = prepared.current() or prepared.run(Call("update", (0.5,)), ema, model) or not ema[0].eq(1).all()
        del prepared
        gc.collect()
        os._exit(bool(ran) or any(reference() is None for reference in tables))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert prepared.run(Call("update", (0.5,)), ema, model)


WRONG = {
    "too few decays": (Call("update", ()), "one decay, and one key or none, for each average"),
    "too many keys": (Call("update_stochastic", (0.5,), keys=(1, 2)), "one decay, and one key or none"),
    "no such average": (Call("copy", average=1), "for each average that takes part"),
    "too few on the device": (Call("update", device_decays=torch.zeros(0)), "device_decays: expected one for each"),
    "no scratch": (Call("swap"), "scratch: expected a contiguous uint8 tensor, aligned to 16 bytes, for each device"),
    "small scratch": (Call("swap", scratch=[torch.zeros(8, dtype=torch.uint8)]), "scratch: expected a contiguous"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_writes_nothing(host, wrong):
    ema, model, prepared = two_pairs()
    before = bits(ema, model)
    call, words = WRONG[wrong]
    with pytest.raises(ValueError, match=words):
        prepared.run(call, ema, model)
    assert same_bits(before, ema, model)


def test_nine_averages_are_refused(host):
    pairs = [emulated_grid.Pair(torch.ones(9 * 16)[:16], torch.ones(16), stride=16)]
    with pytest.raises(RuntimeError, match="expected 1 to 8 averages, found 9"):
        nvrtc.Nvrtc().prepare(job(pairs, 9), None)


def test_more_blocks_than_a_grid_has_are_refused(host, monkeypatch):
    monkeypatch.setattr(nvrtc.Tables, "tile_count", lambda self: 1 << 31)
    with pytest.raises(RuntimeError, match=r"expected fewer than 2\^31 blocks on cpu, found 2147483648"):
        two_pairs()


# ---- why_not ----


@pytest.fixture
def fresh():
    stand_in.forget()
    yield
    stand_in.forget()


@pytest.mark.usefixtures("fresh")
def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(driver, "library_name", lambda: "libno_such_driver.so.1")
    assert "the CUDA driver, libno_such_driver.so.1, can't be used" in driver.why_not()
    with pytest.raises(RuntimeError, match="install NVIDIA's driver"):
        driver.driver()


@pytest.mark.usefixtures("fresh")
def test_with_an_old_driver(monkeypatch):
    monkeypatch.setattr(driver.Driver, "version", lambda self: 12040)
    path, _ = emulated_grid.library("stand_in_driver.cpp", ["-O1"])
    monkeypatch.setattr(driver, "library_name", lambda: str(path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "the CUDA driver supports CUDA 12.4 at most, and torch" in driver.why_not()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("capability", "words"), [((6, 1), "compute capability 6.1, and the kernel needs 7.0"), ((9, 0), None)]
)
def test_with_an_old_gpu(monkeypatch, capability, words):
    monkeypatch.setattr(nvrtc.nvrtc, "why_not", lambda: None)
    monkeypatch.setattr(nvrtc.driver, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = nvrtc.Nvrtc().why_not("cuda")
    assert words in reason if words else reason is None


def test_for_other_devices():
    for kind in ("cpu", "mps", "xpu"):
        assert f"not for {kind} devices" in nvrtc.Nvrtc().why_not(kind)
