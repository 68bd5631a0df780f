"""Compares averages of an FSDP2 model on one device with those of the unsharded model, for test_gpu_devices.py.

python tests/gpu/one_gpu.py FOLDER WHERE, which is "cuda" or "cpu": where the averages of the FSDP2 model lie
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard

import fused_ema

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpu_checks
import oracle
from step_checks import transformer

from fused_ema.pairs import shards


def main(folder, where):
    device = "cpu" if where == "cpu" else None
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    torch.manual_seed(0)
    plain, x = (side.cuda() for side in transformer())
    sharded, target = copy.deepcopy(plain), torch.randn_like(x)
    for layer in sharded.layers:
        fully_shard(layer)
    fully_shard(sharded)
    emas = [fused_ema.EMA(plain, [0.9, 0.99]), fused_ema.EMA(sharded, [0.9, 0.99], device=device)]
    optimizer = torch.optim.AdamW(sharded.parameters(), 0.01)
    emas[1].attach(optimizer, overlap=True)
    for _ in range(5):
        optimizer.zero_grad()
        (sharded(x) - target).square().mean().backward()
        optimizer.step()
        trained = dict(sharded.named_parameters())
        with torch.no_grad():  # trained by itself, it might get gradients that differ in their last bits
            for name, parameter in plain.named_parameters():
                parameter.copy_(trained[name].full_tensor())
        emas[0].update()
    for k in range(2):
        found, expected = (ema.averaged_state_dict(k) for ema in (emas[1], emas[0]))
        for name, tensor in expected.items():
            assert found[name]._local_tensor.device.type == where, (k, name)
            assert oracle.same_bits(shards.whole(found[name]), tensor), (k, name)
            assert not oracle.same_bits(tensor, plain.state_dict()[name]), (k, name)
    check_states(sharded, emas, folder)
    step = fused_ema.EMA(sharded, 0.9, device=device).update
    gpu_checks.profile(step, 1)  # the first profile of a process loads CUPTI
    on_device, _ = gpu_checks.profile(step, 3)
    assert sum(on_device.values()) == 3, on_device
    assert all("ema_kernel" in kernel for kernel in on_device), on_device
    with emas[1].swapped():
        expected = emas[0].averaged_state_dict()["layers.0.linear1.weight"]
        assert oracle.same_bits(sharded.layers[0].linear1.weight.full_tensor(), expected)
        sharded(x)
    if where == "cpu":
        check_memory()
    dist.destroy_process_group()
    print("sharded as unsharded")


def check_states(sharded, emas, folder):
    """States go between averages on the device and in host memory, by themselves and through a checkpoint."""
    for each in (None, "cpu"):
        other = fused_ema.EMA(sharded, [0.9, 0.99], device=each)
        other.load_state_dict(emas[1].state_dict())
        saved = {"ema": other.state_dict()}
        dcp.save(saved, checkpoint_id=f"{folder}/{each}")
        for back in (None, "cpu"):
            fresh = fused_ema.EMA(sharded, [0.9, 0.99], device=back)
            state = {"ema": fresh.state_dict()}
            dcp.load(state, checkpoint_id=f"{folder}/{each}")
            fresh.load_state_dict(state["ema"])
            for k in range(2):
                for name, tensor in emas[0].averaged_state_dict(k).items():
                    found = fresh.averaged_state_dict(k)[name]
                    assert oracle.same_bits(shards.whole(found), tensor), (each, back, k, name)


def check_memory():
    """Updates and swaps take less than 1 MiB on the device for parameters of 32 or 64 MiB, and averages are pinned."""
    for dtype in (torch.float32, torch.bfloat16):
        model = fully_shard(torch.nn.Linear(4096, 4096, device="cuda", dtype=dtype))
        own = [p._local_tensor.clone().cpu() for p in model.parameters()]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ema = fused_ema.EMA(model, [0.9, 0.99], device="cpu")
        for _ in range(3):
            ema.update()
            with ema.swapped(1):
                pass
        assert torch.cuda.max_memory_allocated() - before < 1 << 20
        for average in ema.state_dict()["averages"]:
            assert all(tensor._local_tensor.is_pinned() for tensor in average.values())
        for parameter, values in zip(model.parameters(), own, strict=True):
            assert oracle.same_bits(parameter._local_tensor.cpu(), values)


if __name__ == "__main__":
    main(*sys.argv[1:])
