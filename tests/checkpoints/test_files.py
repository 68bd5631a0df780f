"""Files stay complete when writing is interrupted by errors, a full disk, or the end of the process."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from snapshot_stub import Stub, both
from torch import nn

from fused_ema import EMA
from fused_ema.checkpoints import save_safetensors
from fused_ema.posthoc import reconstruct, save_snapshot
from fused_ema.posthoc.snapshots import FILE_NAME

safetensors_torch = pytest.importorskip("safetensors.torch")


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, where, error):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    before = path.read_bytes()

    def half(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patched:
        if where == "write":
            patched.setattr(safetensors_torch, "save_file", half)
        else:
            patched.setattr(os, where, failing(error))
        with pytest.raises(type(error)):
            save_snapshot(tmp_path, Stub(7, *both(torch.zeros(2))))
        with pytest.raises(type(error)):
            save_snapshot(tmp_path, Stub(8, *both(torch.zeros(2))))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    save_snapshot(tmp_path, Stub(7, *both(torch.zeros(2))))
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [0, 0]


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("fsync", path, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("replace", Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    temporary = events[0][1]
    assert events == [
        ("fsync", temporary, path.stat().st_size),
        ("replace", temporary, path),
        ("fsync", tmp_path, None),
    ]
    assert temporary.parent == tmp_path
    assert not FILE_NAME.fullmatch(temporary.name)


def test_new_files_have_the_usual_mode(tmp_path):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_replacing_a_file_keeps_its_mode_and_links(tmp_path):
    ema = EMA(nn.Linear(2, 2))
    path, link = tmp_path / "run" / "weights.safetensors", tmp_path / "latest.safetensors"
    path.parent.mkdir()
    link.symlink_to(path)
    save_safetensors(link, ema)  # creates the file that the link points to
    assert link.is_symlink()
    path.chmod(0o640)
    nn.init.zeros_(ema.model.weight)
    ema.update()
    save_safetensors(link, ema)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]
    assert torch.equal(safetensors_torch.load_file(path)["weight"], ema.averaged_state_dict()["weight"])


@pytest.mark.parametrize("kind", ["pipe", "link to itself"])
def test_only_files_are_replaced(tmp_path, kind):
    path = tmp_path / "weights.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.raises(ValueError, match="expected a file to replace or no file, found a"):
        save_safetensors(path, EMA(nn.Linear(2, 2)))
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_fifo() if kind == "pipe" else path.is_symlink()


def test_a_file_system_without_owners(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chown", failing(OSError(errno.EOPNOTSUPP, "not supported")))
    save_safetensors(tmp_path / "w.safetensors", EMA(nn.Linear(2, 2)))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_longest_name(tmp_path):
    path = tmp_path / ("w" * (255 - len(".safetensors")) + ".safetensors")
    save_safetensors(path, EMA(nn.Linear(2, 2)))
    assert list(tmp_path.iterdir()) == [path]


KILLS = max(20, settings.default.max_examples // 10)  # of each kind of file; 1000 in `make test-long`
KILLED = """
    # A child keeps saving, to an existing file and to a new one alternately; the parent kills it at a random moment.
    import json, os, random, signal, sys, time
    import torch
    from pathlib import Path
    from safetensors.torch import load_file
    from torch import nn
    from fused_ema import EMA
    from fused_ema.checkpoints import save_safetensors
    from fused_ema.posthoc import save_snapshot, snapshots
    sys.path.insert(0, {tests!r})
    from snapshot_stub import Stub

    name, folder, size = {name!r}, Path({folder!r}), 200_000
    torch.set_num_threads(1)
    random.seed(7)
    model = nn.ParameterDict({{"w": torch.zeros(size), "v": torch.zeros(3)}})
    ema = EMA(model, 0.0)

    def save(n, place):
        if name == "snapshot":
            averages = ({{"w": torch.full((size,), float(n)), "v": torch.full((3,), float(n))}} for _ in range(2))
            save_snapshot(folder, Stub(place, *averages, step=n))
        else:
            with torch.no_grad():
                for tensor in model.values():
                    tensor.fill_(n)
            ema.update()
            save_safetensors(folder / f"{{place:010}}.safetensors", ema)

    def saved():
        if name == "snapshot":
            return [(each.path, each.step) for each in snapshots(folder)]
        return [(path, None) for path in sorted(folder.glob("[!.]*"))]

    def save_all_the_time(n):
        while True:
            n += 1
            for place in (1, n):
                os.write(begins, b".")
                save(n, place)

    newest, leftovers = 1, 0
    save(1, 1)
    for _ in range({kills}):
        begun, begins = os.pipe()
        child = os.fork()
        if not child:
            try:
                save_all_the_time(newest)
            finally:
                os._exit(1)
        os.close(begins)
        for _ in range(random.randint(1, 6)):
            os.read(begun, 1)
        time.sleep(random.uniform(0.0, 0.01))  # so that the kill hits a save
        os.kill(child, signal.SIGKILL)
        os.close(begun)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child failed"
        assert saved() and int(saved()[0][0].stem.removeprefix("ema-")) == 1, "gone, and no new one there"
        for path, step in saved():
            values = {{value for tensor in load_file(path).values() for value in tensor.unique().tolist()}}
            assert len(values) == 1 and step in (None, *values), (path, step, values)  # all of one save
            newest = max(newest, int(*values))
        for left in folder.glob(".*"):
            leftovers += 1
            left.unlink()
        for path, _ in saved()[1:-1]:
            os.unlink(path)
    print(json.dumps([newest, leftovers]))
"""


@pytest.mark.parametrize("name", ["snapshot", "safetensors"])
def test_killed_at_any_moment(tmp_path, name):
    names = {"name": name, "tests": str(Path(__file__).parents[1]), "folder": str(tmp_path), "kills": KILLS}
    code = textwrap.dedent(KILLED.format(**names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    newest, leftovers = json.loads(done.stdout)
    assert newest > KILLS / 2, "too few were saved for the kills to mean anything"
    assert leftovers > KILLS / 20, "too few kills hit a write"


FULL = """
    import resource, signal, sys
    from pathlib import Path
    from torch import nn
    from fused_ema import EMA, schedules
    from fused_ema.checkpoints import save_safetensors
    from fused_ema.posthoc import save_snapshot

    folder, name = sys.argv[1:]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def manager():  # random values after one update, so that all files have the same name and differ
        ema = EMA(nn.Linear(100, 100), schedules.power_function(0.1))
        ema.update()
        return ema

    def save(ema):
        if name == "snapshot":
            save_snapshot(folder, ema)
        else:
            save_safetensors(f"{folder}/model.safetensors", ema)

    save(manager())
    [path] = Path(folder).iterdir()
    old, other = path.read_bytes(), manager()
    size = 4 * (100 * 100 + 100)
    for limit in (0, 1, 8, 200, size // 2, size - 1, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(other)
        except Exception:
            assert [*Path(folder).iterdir()] == [path], "a leftover"
            assert path.read_bytes() == old, f"not the file of before, at {limit} bytes for {size}"
        else:
            sys.exit(f"nothing was said of {limit} bytes for {size}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save(other)
    [path] = Path(folder).iterdir()
    new = path.read_bytes()
    assert len(new) == len(old) and new != old, "the second save has what the first has: the above means nothing"
"""


@pytest.mark.parametrize("name", ["snapshot", "safetensors"])
def test_a_full_disk(tmp_path, name):
    """A limit on the size of files stands for a full disk: an error, the old file, and nothing left over."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path), name], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
