"""DCP folders: other shardings, other writers, keys, and pickles that could run code."""

import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import same_values
from merge_checks import WEIGHTS, averaged, save, saved, states

from fused_ema import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage", "ignore:`_get_")

RANKS = """
    import os
    import sys
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "same": [Replicate()]}
    whole = {name: torch.randn(13, 7, generator=torch.Generator().manual_seed(int(sys.argv[2]))) for name in placements}
    state = {name: distribute_tensor(each, mesh, placements[name]) for name, each in whole.items()}
    dcp.save({"model": state, "step": 3}, checkpoint_id=sys.argv[1])
    dist.barrier()
    os._exit(0)  # the end of the interpreter may abort in a thread of Gloo
"""


@pytest.mark.slow
def test_checkpoints_of_one_two_and_four_ranks(tmp_path):
    wholes = []
    for i, ranks in enumerate((4, 2, 1)):
        (tmp_path / "ranks.py").write_text(textwrap.dedent(RANKS))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, tmp_path / "ranks.py", tmp_path / f"{i}", str(i)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        wholes.append(
            {
                name: torch.randn(13, 7, generator=torch.Generator().manual_seed(i))
                for name in ("rows", "columns", "same")
            }
        )
    paths = [tmp_path / f"{i}" for i in range(3)]
    with pytest.raises(ValueError, match="expected tensors of a model, found 'step'; name the model by key="):
        merge(paths, tmp_path / "o", WEIGHTS)
    out = merge(paths, tmp_path / "o", WEIGHTS, key="model")
    found = {"model": {name: torch.zeros(13, 7) for name in wholes[0]}}
    dcp.load(found, checkpoint_id=out)
    same_values(found["model"], {name: averaged([each[name] for each in wholes]) for name in wholes[0]})


def test_optimizers_ask_for_a_key(tmp_path):
    content = {"model": {"w": torch.ones(3)}, "optimizer": {"w": torch.ones(3)}}
    paths = saved("dcp", tmp_path, [content] * 2)
    with pytest.raises(ValueError, match=r"found 'optimizer.w'; name the model by key="):
        merge(paths, tmp_path / "o")
    merge(paths, tmp_path / "o", key="model")
    names = dcp.FileSystemReader(tmp_path / "o").read_metadata().state_dict_metadata
    assert list(names) == ["model.w"]
    with pytest.raises(ValueError, match="step-0: expected tensors under 'x', found none"):
        merge(paths, tmp_path / "p", key="x")


def test_metadata_that_could_run_code(tmp_path):
    path = save("dcp", tmp_path / "x", {"w": torch.ones(3)})

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    for protocol in (2, 4, 5):
        (path / ".metadata").write_bytes(pickle.dumps(Evil(), protocol))
        with pytest.raises(ValueError, match=r"x/.metadata: .*expected the metadata of tensors, found posix.mkdir"):
            merge([path], tmp_path / "o")
    (path / ".metadata").write_bytes(b"\x80\x04cbuiltins\neval\n.")
    with pytest.raises(ValueError, match=r"found builtins.eval"):
        merge([path], tmp_path / "o")
    (path / ".metadata").write_bytes(b"\x80\x04ctorch\nfloat32.__class__\n.")
    with pytest.raises(ValueError, match=r"found torch.float32.__class__"):
        merge([path], tmp_path / "o")
    for data in (b"", b"\x80", pickle.dumps({"state_dict_metadata": 1})):
        (path / ".metadata").write_bytes(data)
        with pytest.raises(ValueError, match=r"x/.metadata: damaged"):
            merge([path], tmp_path / "o")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "o").exists()


def test_data_that_is_damaged(tmp_path):
    paths = saved("dcp", tmp_path, states())
    data = paths[1] / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"__0_0.distcp: '.*': truncated or corrupt"):
        merge(paths, tmp_path / "o", WEIGHTS)
    data.unlink()
    with pytest.raises(FileNotFoundError):
        merge(paths, tmp_path / "o", WEIGHTS)
    assert not (tmp_path / "o").exists()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
