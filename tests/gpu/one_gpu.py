"""Compares averages of an FSDP2 model on one device with those of the unsharded model, for test_gpu_devices.py."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fused_ema

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpu_checks
import oracle
from step_checks import transformer


def main(folder):
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    torch.manual_seed(0)
    plain, x = (side.cuda() for side in transformer())
    sharded, target = copy.deepcopy(plain), torch.randn_like(x)
    for layer in sharded.layers:
        fully_shard(layer)
    fully_shard(sharded)
    emas = [fused_ema.EMA(model, [0.9, 0.99]) for model in (plain, sharded)]
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
            assert oracle.same_bits(found[name].full_tensor(), tensor), (k, name)
            assert not oracle.same_bits(tensor, plain.state_dict()[name]), (k, name)
    step = fused_ema.EMA(sharded, 0.9).update
    gpu_checks.profile(step, 1)  # the first profile of a process loads CUPTI
    on_device, _ = gpu_checks.profile(step, 3)
    assert sum(on_device.values()) == 3, on_device
    assert all("ema_kernel" in kernel for kernel in on_device), on_device
    with emas[1].swapped():
        expected = emas[0].averaged_state_dict()["layers.0.linear1.weight"]
        assert oracle.same_bits(sharded.layers[0].linear1.weight.full_tensor(), expected)
        sharded(x)
    dist.destroy_process_group()
    print("sharded as unsharded")


if __name__ == "__main__":
    main(sys.argv[1])
