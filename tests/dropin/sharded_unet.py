"""The drop-in for diffusers' EMAModel with FSDP2. test_ema_model_sharded.py runs this on several processes.

torchrun --nproc-per-node N tests/dropin/sharded_unet.py
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oracle
from diffusers.training_utils import EMAModel as Theirs
from small_unet import averaging, unet

import fused_ema
from fused_ema.dropin import EMAModel


def shards(tensors):
    """Copies of what lies on this rank."""
    return [tensor.detach().to_local().clone() for tensor in tensors]


def main():
    dist.init_process_group("gloo")
    model = unet()
    for block in (*model.down_blocks, *model.up_blocks):
        fully_shard(block)
    fully_shard(model)
    ours, theirs = (averaging(cls, model) for cls in (EMAModel, Theirs))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        model(images, 10).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        old = shards(ours.shadow_params)
        with CommDebugMode() as communication:
            ours.step(model.parameters())
        assert communication.get_total_counts() == 0
        assert all(isinstance(average, DTensor) for average in ours.shadow_params)
        new, bitwise = shards(ours.shadow_params), fused_ema.backend("cpu") != "torch"
        oracle.check_step(old, shards(model.parameters()), new, ours.cur_decay_value, bitwise=bitwise)
        theirs.step(model.parameters())
    for a, b in zip(shards(ours.shadow_params), shards(theirs.shadow_params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    raw, averages = shards(model.parameters()), shards(ours.shadow_params)
    ours.store(model.parameters())
    ours.copy_to(model.parameters())
    assert all(map(torch.equal, shards(model.parameters()), averages))
    ours.restore(model.parameters())
    assert all(map(torch.equal, shards(model.parameters()), raw))
    print(f"passed on rank {dist.get_rank()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
