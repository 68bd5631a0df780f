"""The command line, and setup.py with and without torch."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from build_fakes import install, script

import fused_ema
from fused_ema import __main__ as fused_ema_main
from fused_ema import _cost
from fused_ema._build import cache, library, nvrtc, toolkit
from fused_ema._build.compile import PACKAGE
from fused_ema.runners import driver, slower

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("bare_environment")


def python(*arguments, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def states(output, device):
    """What the output says of each runner on devices of this type."""
    lines = re.search(rf"^on {device} .*\n((?:           .*\n)+)", output, re.MULTILINE)
    return dict(line.split(None, 1) for line in lines[1].splitlines()) if lines else {}


def test_info_about_the_extension():
    code, output = python("-m", "fused_ema")
    assert code == 0
    record = cache.read_record(PACKAGE)
    if record and record["torch"] == str(torch.__version__):
        assert str(PACKAGE / cache.LIBRARY) in output
        assert f"built for torch {torch.__version__}" in output
        assert states(output, "cpu")["extension"] == "active"
        assert states(output, "cpu")["foreach"] == "ready, but extension comes first"
    else:
        assert states(output, "cpu")["foreach"] == "active"
        assert "run `python -m fused_ema build`" in output


def test_info_without_the_extension_says_why_it_is_slow_in_one_screen():
    code, output = python("-m", "fused_ema", FUSED_EMA_EXT="0", OMP_NUM_THREADS="1")
    assert code == 0
    for text in (f"fused_ema  {fused_ema.__version__}", f"torch      {torch.__version__}", ", 1 thread\n"):
        assert text in output
    assert states(output, "cpu") == {
        "extension": "not active: FUSED_EMA_EXT=0 switches the extension off; unset it",
        "nvrtc": "not active: NVRTC compiles kernels only for CUDA devices, not for cpu devices",
        "foreach": "active",
    }
    reasons = output.partition("Updates are slower here than they could be:\n")[2]
    assert "- On cpu, updates run as PyTorch's own operations: FUSED_EMA_EXT=0" in reasons
    one_of_many = f"- On the CPU, PyTorch uses 1 of {_cost.cores()} cores (OMP_NUM_THREADS=1; torchrun sets it to 1)"
    assert (one_of_many in reasons) == (_cost.cores() > 1)
    for row in ("fused_ema (foreach)", "torch._foreach_lerp_"):
        assert re.search(rf"{re.escape(row)} +[\d,]+ us +[\d.]+ ms +[\d.]+ GB/s", output)
    assert output.count("\n") <= 27 + 3 * torch.cuda.device_count()


@pytest.fixture
def machine(monkeypatch):
    """machine(compiler, cuda) is one without the extension, without a GPU, and with one thread on one core."""
    monkeypatch.delenv("FUSED_EMA_RUNNER", raising=False)
    monkeypatch.setattr(library, "_found", library._Found(why_not="the extension is not built"))
    monkeypatch.setattr(fused_ema_main, "_gpus", lambda: [])
    monkeypatch.setattr(fused_ema_main, "_table", lambda device: ([], None))
    monkeypatch.setattr(_cost, "cores", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)

    def change(compiler=True, cuda=None):
        for module in (fused_ema_main, slower):
            monkeypatch.setattr(module, "has_compiler", lambda: compiler)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(nvrtc, "find", lambda: toolkit.no_cuda_in(torch) or object())

    change()
    return change


def info(capsys):
    assert fused_ema_main.info() == 0
    return capsys.readouterr().out


def test_info_says_what_a_compiler_would_add_where_there_is_one(machine, capsys):
    output = info(capsys)
    assert "slower here than they could be:\n- On cpu, updates run as PyTorch's own operations: the extension" in output
    machine(compiler=False)
    output = info(capsys)
    assert "(it needs a C++ compiler, and there is none here)" in states(output, "cpu")["extension"]
    assert "Updates are as fast here as they can be without a C++ compiler." in output


def test_info_about_cuda_without_a_gpu(machine, capsys):
    output = info(capsys)
    assert f"on cuda    torch {torch.__version__} was built without CUDA; install a CUDA build of torch\n" in output
    machine(cuda="13.0")
    assert states(info(capsys), "cuda") == {
        "extension": "not active, for the same reason as on cpu",
        "nvrtc": "ready",
        "foreach": "ready",
    }


def test_info_about_a_gpu(machine, monkeypatch, capsys):
    machine(cuda="13.0", compiler=False)
    monkeypatch.setattr(fused_ema_main, "_gpus", lambda: ["cuda:0"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "a GPU")
    for reason in (None, "the driver is old; update it"):
        monkeypatch.setattr(driver, "why_not", lambda reason=reason: reason)
        output = info(capsys)
        assert "on cuda    cuda:0 is a GPU\n" in output
        assert states(output, "cuda")["nvrtc"] == (f"not active: {reason}" if reason else "active")
        assert states(output, "cuda")["foreach"] == ("active" if reason else "ready, but nvrtc comes first")
        assert ("On cuda, updates run as PyTorch's own operations: the driver is old" in output) is bool(reason)
    monkeypatch.setenv("FUSED_EMA_CUDA", "0")
    output = info(capsys)
    assert states(output, "cuda")["nvrtc"].startswith("not active: FUSED_EMA_CUDA=0")
    assert "On cuda, updates run as PyTorch's own operations: FUSED_EMA_CUDA=0 switches" in output


@pytest.mark.parametrize("forced", ["nvrtc", "nvcc"])
def test_info_where_a_runner_is_forced_that_cannot_be_had(machine, monkeypatch, capsys, forced):
    monkeypatch.setenv("FUSED_EMA_RUNNER", forced)
    output = info(capsys)
    assert states(output, "cpu")["foreach"] == f"ready, but FUSED_EMA_RUNNER={forced} asks for another"
    assert "- On cpu, no update runs: FUSED_EMA_RUNNER=" in output


def test_info_where_a_slower_runner_is_forced(machine, monkeypatch, capsys):
    monkeypatch.setattr(library, "_found", library._Found(module=SimpleNamespace(cuda_built=False)))
    monkeypatch.setenv("FUSED_EMA_RUNNER", "foreach")
    assert "own operations: FUSED_EMA_RUNNER=foreach asks for that; unset it" in info(capsys)


@pytest.mark.parametrize(
    ("fused", "stream", "active", "complains"),
    [
        ((1e-4, 0.01), 0.009, "extension", False),
        ((1e-4, 0.02), 0.009, "extension", True),
        ((1e-2, 0.01), 0.009, "extension", True),
        ((1e-2, 0.02), 0.009, "foreach", False),  # for another reason, which is in the list
    ],
)
def test_info_says_when_it_is_slower_than_it_should_be(monkeypatch, fused, stream, active, complains):
    monkeypatch.setattr(_cost, "measure", lambda device: _cost.Cost(fused, (1e-3, 0.011), stream))
    monkeypatch.setattr(fused_ema_main, "_active", lambda device_type: active)
    table, slow = fused_ema_main._table("cpu")
    assert len(table) == 4
    assert (slow is not None) == complains


def test_measurements_alternate_and_the_best_counts(monkeypatch):
    took = {"fast": iter([9.0, 0.3, 0.2, *[0.4] * 9]), "slow": iter([9.0, 0.5, 2.0, *[0.6] * 9])}
    clock, order = [0.0], []

    def call(name):
        order.append(name)
        clock[0] += next(took[name])

    monkeypatch.setattr(_cost.time, "perf_counter", lambda: clock[0])
    best = _cost._best(torch.device("cpu"), *(partial(call, name) for name in took))
    assert best == pytest.approx([0.2, 0.5])
    assert order == ["fast", "slow"] * (1 + _cost.ROUNDS)


def test_the_stream_has_the_bytes_of_the_update(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        _cost, "_best", lambda device, *calls: sizes.append([each.args for each in calls]) or [1.0] * len(calls)
    )
    monkeypatch.setattr(_cost, "LARGE", (1, 100))
    _cost.measure(torch.device("cpu"))
    _update, (ema, model, _), (added,) = sizes[1]
    assert added is model[0]
    assert ema[0].shape == model[0].shape == (100,)
    table, _ = fused_ema_main._table("cpu")
    assert "a.add_(b), the same bytes" in table[3]
    assert "memory's speed" not in "".join(table)


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fused_ema", "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        fused_ema_main.main()
    assert capsys.readouterr().out == f"fused_ema {fused_ema.__version__}\n"


def test_a_reader_that_leaves_early_gets_no_traceback():
    code = "import os, sys; os.dup2(int(sys.argv.pop(1)), 1); import runpy, fused_ema._cost as cost; "
    code += "cost.SECONDS = 0; runpy.run_module('fused_ema', {}, '__main__')"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", code, str(write)]
    done = subprocess.run(command, pass_fds=[write], stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_info_survives_a_device_without_memory(monkeypatch):
    def measure(device):
        raise torch.OutOfMemoryError("no room\nlong traceback")

    monkeypatch.setattr(_cost, "measure", measure)
    assert fused_ema_main._table("cpu") == (["cpu could not be measured: no room"], None)


@pytest.mark.parametrize(
    ("built", "architecture", "runs"),
    [("8.0", "8.6", True), ("8.6", "8.0", False), ("9.0", "10.0", False), ("12.0", "12.0", True)],
)
def test_info_knows_what_machine_code_runs_on(built, architecture, runs):
    assert fused_ema_main._runs_on(built, architecture) == runs


def test_build_fails_with_a_sentence(monkeypatch, capsys):
    assert python("-m", "fused_ema", "build", FUSED_EMA_EXT="0") == (
        1,
        "fused_ema: no extension was built: FUSED_EMA_EXT=0 switches the extension off; unset it to build one\n",
    )
    monkeypatch.setenv("FUSED_EMA_CUDA", "maybe")
    assert fused_ema_main.build(None, force=False) == 1
    assert "no extension was built: FUSED_EMA_CUDA='maybe': expected 0" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    for pattern in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "csrc/*",
        "fused_ema/**/*.py",
        "fused_ema/*.pyi",
        "fused_ema/py.typed",
    ):
        for path in ROOT.glob(pattern):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                copy.write_bytes(path.read_bytes())
    (folder / "README.md").touch()
    return folder


@pytest.fixture
def no_torch(tmp_path):
    """A PYTHONPATH under which torch cannot be imported, as in an isolated build."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    return str(tmp_path / "empty")


def test_wheel_without_torch(checkout, no_torch):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, PYTHONPATH=no_torch)
    assert code == 0, output
    assert "installing without the compiled extension" in output
    assert "No module named 'torch'" in output
    assert "python -m fused_ema build" in output
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name == f"fused_ema-{fused_ema.__version__}-py3-none-any.whl"
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_ema").rglob("*.py")}
    sources = {f"fused_ema/_csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert packed == modules | sources | {"fused_ema/py.typed", "fused_ema/_C.pyi"}


@pytest.mark.parametrize("name", ["FUSED_EMA_EXT", "FUSED_EMA_CUDA"])
def test_wheel_without_torch_as_an_error(checkout, no_torch, name):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, PYTHONPATH=no_torch, **{name: "1"})
    assert code != 0
    assert "torch cannot be imported" in output
    assert f"{name}=1 makes this an error" in output


def test_setup_names_a_wrong_switch(checkout):
    code, output = python("setup.py", "-q", "bdist_wheel", cwd=checkout, FUSED_EMA_EXT="yes")
    assert code != 0
    assert "FUSED_EMA_EXT='yes'" in output


def test_setup_switched_off(checkout):
    install(checkout / "fused_ema")  # as an earlier build left it
    code, output = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, FUSED_EMA_EXT="0")
    assert code == 0
    assert "installing without the compiled extension" in output
    assert not list((checkout / "fused_ema").glob("*.so"))


@pytest.mark.parametrize("required", [False, True])
def test_setup_where_nothing_compiles(checkout, required):
    install(checkout / "fused_ema")  # as an earlier build left it
    switches = {
        "CXX": "false",
        "CC": "false",
        "FUSED_EMA_CUDA": "0",
        "FUSED_EMA_EXT": "1" if required else "",
    }
    code, output = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **switches)
    assert "compiling failed" in output
    assert (
        "FUSED_EMA_EXT=1 makes this an error" if required else "installing without the compiled extension"
    ) in output
    assert (code == 0) is not required
    assert not list((checkout / "fused_ema").glob("_C*.so"))


def test_an_old_setuptools_gets_a_sentence(tmp_path):
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    (tmp_path / "setuptools" / "__init__.py").write_text(
        "__version__ = '65.5.0'\nExtension = find_packages = setup = None"
    )
    (tmp_path / "setuptools" / "command" / "build_ext.py").write_text("build_ext = object")
    code, output = python("setup.py", "-q", "bdist_wheel", PYTHONPATH=str(tmp_path))
    expected = 'expected setuptools 77 or newer, found 65.5.0; run pip install "setuptools>=77"'
    assert (code, output) == (1, f"fused_ema: {expected}\n")


@pytest.fixture
def make_torch(tmp_path):
    """make_torch(offered, ...): what make says and installs where pip finds these versions."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "bash", "uname", "grep", "head", "rm", "touch", "cksum"):
        (tools / name).symlink_to(shutil.which(name, path="/usr/bin:/bin"))

    def run(offered, *arguments, programs=()):
        for name in programs:
            script(tools / name, "")
        number = subprocess.check_output([str(tools / "cksum")], input=b"torch\n").split()[0].decode()
        installed = tmp_path / "installed"
        answer = f'*"index versions torch"*) echo "Available versions: {offered}";;'
        script(tmp_path / "venv" / "bin" / "python", f'case "$*" in {answer} *) echo "$@" >{installed};; esac')
        stamp = f"{tmp_path}/venv/.torch-{number}"
        command = ["make", "-s", f"VENV={tmp_path}/venv", *arguments, stamp]
        done = subprocess.run(command, cwd=ROOT, env={"PATH": str(tools)}, capture_output=True, text=True, check=True)
        os.remove(stamp)
        return done.stdout, installed.read_text()

    return run


@pytest.mark.skipif(
    Path("/dev/nvidiactl").exists() or sys.platform != "linux", reason="the choice is for Linux without GPU"
)
def test_make_takes_a_build_for_the_cpu_where_there_is_no_gpu(make_torch):
    said, installed = make_torch("2.14.1, 2.14.0, 2.13.0+cpu, 2.13.0, 2.12.0+cpu")
    assert " torch==2.13.0+cpu ninja" in installed
    assert "No NVIDIA GPU here, so this takes a build of PyTorch for the CPU" in said
    said, installed = make_torch("2.14.1, 2.14.0")
    assert " torch ninja" in installed
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in said
    for arguments, programs in ((["TORCH=torch"], []), (["FUSED_EMA_CUDA=1"], []), ([], ["nvidia-smi"])):
        said, installed = make_torch("2.14.1, 2.13.0+cpu", *arguments, programs=programs)
        assert " torch ninja" in installed
        assert "No NVIDIA GPU" not in said


def test_what_setup_imports_needs_no_torch():
    code = (
        "import sys, types; package = sys.modules['fused_ema'] = types.ModuleType('fused_ema'); "
        "package.__path__ = [sys.argv[1]]; import fused_ema._build.cache, fused_ema._build.compile; "
        "assert not {'torch', 'setuptools'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "fused_ema")], check=True)
