"""The cache of compiled kernels: what is in it is used, and whatever is not to be trusted is compiled again or refused.

A stand-in for NVRTC counts what is compiled.
"""

import fcntl
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import fused_ema
from fused_ema import __main__
from fused_ema._build import cache, kernels
from fused_ema._build.compile import BuildError
from fused_ema._build.nvrtc import OPS, Image


class Compiler:
    version = "13.0"

    def __init__(self):
        self.compiled = []

    def compile(self, op, arch):
        self.compiled.append((op, arch))
        return Image(f"kernel_{op}", f"code for {arch}".encode())


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """An empty cache, and a process that has compiled nothing."""
    made = Compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "nvrtc", lambda: made)
    monkeypatch.setattr(kernels, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(kernels, "_said_not_kept", False)
    start_over(monkeypatch)
    return made


def start_over(monkeypatch):
    """As a new process does."""
    monkeypatch.setattr(kernels, "_images", {})


def the_file():
    (file,) = kernels.kernels_folder().glob("*.bin")
    return file


def test_compiled_once_and_kept(compiler, monkeypatch, capsys):
    image = kernels.image("update", 90)
    assert image == Image("kernel_update", b"code for 90")
    assert kernels.image("update", 90) is image
    start_over(monkeypatch)
    assert kernels.image("update", 90) == image
    assert compiler.compiled == [("update", 90)]
    kernels.image("update", 80), kernels.image("swap", 90)
    assert compiler.compiled == [("update", 90), ("update", 80), ("swap", 90)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3, "one line for each"
    assert said[0] == (
        f"fused_ema: compiling the CUDA kernel 'update' for sm_90 with NVRTC 13.0, keeping it in "
        f"{kernels.kernels_folder()}"
    )


@pytest.mark.parametrize("change", ["version", "sources"])
def test_other_compilers_and_sources_get_files_of_their_own(compiler, monkeypatch, change):
    kernels.image("update", 90)
    start_over(monkeypatch)
    if change == "version":
        monkeypatch.setattr(Compiler, "version", "13.1")
    else:
        monkeypatch.setattr(kernels, "kernel_digest", lambda: "other")
    kernels.image("update", 90)
    assert len(compiler.compiled) == len([*kernels.kernels_folder().glob("*.bin")]) == 2


DAMAGE = {
    "empty": lambda data: b"",
    "half-written": lambda data: data[: len(data) // 2],
    "the last byte is missing": lambda data: data[:-1],
    "a byte has changed": lambda data: data[:-1] + b"!",
    "no JSON": lambda data: b"{" + data,
    "JSON of another kind": lambda data: b"[]\n" + data.partition(b"\n")[2],
    "of another architecture": lambda data: data.replace(b'"arch": 90', b'"arch": 80'),
    "without a name": lambda data: data.replace(b'"kernel"', b'"colonel"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_again(compiler, monkeypatch, capsys, damage):
    image = kernels.image("update", 90)
    sound = the_file().read_bytes()
    the_file().write_bytes(DAMAGE[damage](sound))
    start_over(monkeypatch)
    capsys.readouterr()
    assert kernels.image("update", 90) == image
    assert len(compiler.compiled) == 2
    assert f"'update' is compiled again, because {the_file()} is damaged" in capsys.readouterr().err
    assert the_file().read_bytes() == sound


def test_a_file_that_others_can_write_is_compiled_again(compiler, monkeypatch, capsys):
    kernels.image("update", 90)
    the_file().chmod(0o666)
    start_over(monkeypatch)
    kernels.image("update", 90)
    assert len(compiler.compiled) == 2
    assert "can be written by others" in capsys.readouterr().err
    assert the_file().stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("mask", [0o002, 0o000])
def test_any_umask_gives_a_file_that_is_trusted(compiler, monkeypatch, mask):
    old = os.umask(mask)
    try:
        kernels.image("update", 90)
    finally:
        os.umask(old)
    start_over(monkeypatch)
    kernels.image("update", 90)
    assert len(compiler.compiled) == 1


def test_a_file_of_another_user_is_compiled_again(compiler, monkeypatch, capsys):
    kernels.image("update", 90)
    distrust = cache.distrust
    monkeypatch.setattr(
        kernels, "distrust", lambda path: f"{path} belongs to user 7" if path.suffix == ".bin" else distrust(path)
    )
    start_over(monkeypatch)
    kernels.image("update", 90)
    assert len(compiler.compiled) == 2
    assert "belongs to user 7" in capsys.readouterr().err


@pytest.mark.parametrize("level", [0, 1])
def test_a_folder_that_others_can_write_is_not_used(compiler, monkeypatch, capsys, level):
    kernels.image("update", 90)
    folder = [kernels.kernels_folder(), kernels.kernels_folder().parent][level]
    folder.chmod(0o777)
    before = the_file().read_bytes()
    the_file().write_bytes(b"poison")
    start_over(monkeypatch)
    for op in OPS[:2]:
        assert kernels.image(op, 90) == Image(f"kernel_{op}", b"code for 90")
    assert the_file().read_bytes() == b"poison"
    said = capsys.readouterr().err
    assert said.count("every process has to compile the CUDA kernels") == 1
    assert f"{folder} can be written by others: run `chmod go-w {folder}`" in said
    with pytest.raises(BuildError, match="can be written by others"):
        kernels.build([90])
    folder.chmod(0o700)
    the_file().write_bytes(before)
    start_over(monkeypatch)
    kernels.image("update", 90)
    assert len(compiler.compiled) == 3


def test_a_cache_that_can_not_be_written_costs_one_compilation_a_process(compiler, monkeypatch, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(3):
        kernels.image("update", 90)
    assert len(compiler.compiled) == 1
    said = capsys.readouterr().err
    assert "every process has to compile the CUDA kernels, because they can't be kept" in said
    assert "set XDG_CACHE_HOME" in said


def test_a_full_disk_costs_one_compilation_a_process(compiler, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(3):
        assert kernels.image("update", 90) == Image("kernel_update", b"code for 90")
    assert len(compiler.compiled) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in kernels.kernels_folder().iterdir()} == {".lock"}, "nothing half-written stays"


def test_a_read_only_cache_is_read(compiler, monkeypatch):
    image = kernels.image("update", 90)
    start_over(monkeypatch)

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(kernels, "locked", read_only)
    assert kernels.image("update", 90) == image
    assert len(compiler.compiled) == 1


def test_no_home_folder(compiler, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert kernels.image("update", 90).kernel == "kernel_update"
    assert "Could not determine home directory" in capsys.readouterr().err


def test_a_compilation_that_fails_raises_and_leaves_nothing(compiler, monkeypatch):
    def fail(self, op, arch):
        raise BuildError("NVRTC 13.0 can't compile it:\nits log")

    monkeypatch.setattr(Compiler, "compile", fail)
    for _ in range(2):
        with pytest.raises(BuildError, match="its log"):
            kernels.image("update", 90)
    assert not [*kernels.kernels_folder().glob("*.bin")]


def test_ahead_of_time(compiler, monkeypatch, tmp_path):
    """For an image whose user can't write: into the package, where no cache is asked."""
    package = tmp_path / "package"
    done = kernels.build([80, 90], package)
    assert [compiled for _, compiled in done] == [True] * 2 * len(OPS)
    assert sorted(path for path, _ in done) == sorted(package.glob("*.bin"))
    assert [compiled for _, compiled in kernels.build([80, 90], package)] == [False] * 2 * len(OPS)
    assert [compiled for _, compiled in kernels.build([90], package, force=True)] == [True] * len(OPS)
    compiler.compiled.clear()
    for op in OPS:
        assert kernels.image(op, 90) == Image(f"kernel_{op}", b"code for 90")
    assert not compiler.compiled
    assert not kernels.kernels_folder().exists()
    kernels.build([90])
    assert len([*kernels.kernels_folder().glob("*.bin")]) == len(OPS)


SLOW = """
    import sys, time
    from pathlib import Path
    from fused_ema._build import kernels
    from fused_ema._build.nvrtc import Image

    class Compiler:
        version = "13.0"

        def compile(self, op, arch):
            with open(sys.argv[1], "a") as file:
                file.write("compiled\\n")
            time.sleep(1)
            return Image("kernel", b"code")

    kernels.nvrtc = Compiler
    assert kernels.image("update", 90) == Image("kernel", b"code")
"""


def test_processes_at_once_compile_once(tmp_path):
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(fused_ema.__file__).parents[1]),
    }
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path / "log")]
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [each.wait(60) for each in running] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "compiled\n"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_during_a_compilation_holds_no_lock(compiler, monkeypatch):
    compiling, forked = threading.Event(), threading.Event()

    def compile(self, op, arch):
        compiling.set()
        forked.wait(10)
        return Image("kernel", b"code")

    monkeypatch.setattr(Compiler, "compile", compile)
    thread = threading.Thread(target=kernels.image, args=("update", 90))
    thread.start()
    compiling.wait(10)
    child = os.fork()
    if child == 0:
        threading.Event().wait(30)  # lives on, with the lock's file open
        os._exit(0)
    try:
        forked.set()
        thread.join(10)
        assert not thread.is_alive()
        with open(kernels.kernels_folder() / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it would have to wait for the child
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


# ---- python -m fused_ema build --kernel ----


@pytest.fixture
def command(compiler, monkeypatch):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["fused_ema", "build", *map(str, arguments)])
        return __main__.main()

    return command


def test_build_for_gpus_that_are_not_here(command, compiler, capsys):
    assert command("--kernel", "--arch", "9.0", "--arch", "12.0;8.0") == 0
    assert sorted({arch for _, arch in compiler.compiled}) == [80, 90, 120]
    assert len(compiler.compiled) == 3 * len(OPS)
    assert all(Path(line).is_file() for line in capsys.readouterr().out.splitlines())
    assert command("--kernel", "--arch", "9.0") == 0
    assert capsys.readouterr().out.count("up to date") == len(OPS)
    assert len(compiler.compiled) == 3 * len(OPS)
    assert command("--kernel", "--arch", "9.0", "--force") == 0
    assert len(compiler.compiled) == 4 * len(OPS)


def test_build_into_a_folder_says_where_the_kernels_are_looked_for(command, tmp_path, capsys):
    assert command("--kernel", "--arch", "9.0", "--into", tmp_path / "new" / "folder") == 0
    assert len([*(tmp_path / "new" / "folder").glob("*.bin")]) == len(OPS)
    assert f"looks for them in {Path(fused_ema.__file__).parent} and in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernel", "--arch", "sm_90"], "--arch: expected compute capabilities, such as 9.0, found 'sm_90'"),
        (["--kernel"], "there is no GPU here to build for; name one, such as --arch 9.0"),
        (["--kernel", "--arch", "9.0", "--into", __file__], "File exists"),
    ],
)
def test_a_build_that_fails_says_why(command, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command(*arguments) == 1
    assert words in capsys.readouterr().err


def test_arch_without_kernel_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command("--arch", "9.0")
    assert "--arch goes with --kernel" in capsys.readouterr().err


def test_the_gpus_that_are_here(command, compiler, monkeypatch):
    capabilities = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capabilities[int(name[-1])])
    assert command("--kernel") == 0
    assert {arch for _, arch in compiler.compiled} == {80, 90}
