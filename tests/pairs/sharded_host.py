"""Averages in host memory of sharded models, without a GPU. test_distributed.py runs it on several processes.

The mesh says "cuda" once the model is sharded, and its shards stay on the CPU, as FSDP2's CPUOffloadPolicy has them. So
shards lie on another device than the mesh has, and whatever would move one there raises, as this PyTorch has no CUDA.

torchrun --nproc-per-node N tests/pairs/sharded_host.py FOLDER CHECK...
"""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import fsdp as sharded_by_fsdp
from sharded import local, network, no_communication, parallel, same, train, written_files
from torch.distributed.tensor import DTensor

import fused_ema
from fused_ema.pairs import shards

GATHERED = []


def gathers_on(mesh):
    """In the place of the mesh's devices, which are not here."""
    GATHERED.append(mesh)
    return "cpu"


def on_devices(model):
    """Lets the meshes of a sharded model say that its devices are of CUDA."""
    for tensor in model.parameters():
        if isinstance(tensor, DTensor):
            name = "_device_type" if hasattr(tensor.device_mesh, "_device_type") else "device_type"
            setattr(tensor.device_mesh, name, "cuda")
            assert tensor.device_mesh.device_type == "cuda"
            assert local(tensor).device.type == "cpu"
    return model


def fsdp(model):
    return on_devices(sharded_by_fsdp(model))


def values(averages):
    """The whole averages, gathered as files gather them."""
    return {name: shards.whole(tensor) for name, tensor in averages.items()}


def check_host(folder):
    for shard in (fsdp, lambda model: on_devices(parallel(model))):
        for dtype, options in (
            (torch.float32, {"decay": 0.9}),
            (torch.bfloat16, {"decay": 0.9}),
            (torch.float32, {"decay": [0.9, 0.99]}),
            (torch.float32, {"decay": 0.9, "nonfinite": "skip"}),
            (torch.bfloat16, {"decay": 0.9, "dtype": torch.bfloat16}),
        ):
            one, model = network(dtype), shard(network(dtype))
            one_ema, ema = fused_ema.EMA(one, **options), fused_ema.EMA(model, device="cpu", **options)
            for step in range(3):
                for each in (one, model):
                    train(each, step)
                if step == 1 and "nonfinite" in options:
                    for each in (one, model):
                        each[0].weight.data.mul_(torch.inf), each[0].weight.data.nan_to_num_(nan=torch.nan)
                one_ema.update(), no_communication(ema.update)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where the model is not finite
                for index in range(len(ema.schedules)):
                    check_swap(one, one_ema, model, ema, index)
            check_states(shard, dtype, options, ema)


def check_swap(one, one_ema, model, ema, index):
    found, expected = ema.averaged_state_dict(index), one_ema.averaged_state_dict(index)
    same(values(found), expected)
    before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert shards.Sharding.of(found[name]) == shards.Sharding.of(parameter), name
        assert local(found[name]).device.type == "cpu", name
    with ema.swapped(index), one_ema.swapped(index):
        for name, parameter in one.named_parameters():
            assert torch.equal(shards.whole(dict(model.named_parameters())[name]), parameter), name
        same(values(ema.averaged_state_dict(index)), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(local(parameter).nan_to_num(), before[name].nan_to_num()), name


def check_states(shard, dtype, options, ema):
    """States go from averages in host memory to others, and back; a whole one is cut without the mesh's devices."""
    state = ema.state_dict()
    for device in (None, "cpu"):
        model = ema.model
        other = fused_ema.EMA(model, device=device, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            no_communication(other.load_state_dict, state)
            for index in range(len(ema.schedules)):
                same(values(other.averaged_state_dict(index)), values(ema.averaged_state_dict(index)))
            full = {**state, "averages": [values(each) for each in state["averages"]]}
            train(model, 1), other.update()
            no_communication(other.load_state_dict, full)
            same(values(other.averaged_state_dict()), values(ema.averaged_state_dict()))
    before = ema.step
    wrong = {name: torch.zeros(2, 2) for name in state["averages"][0]}
    with pytest.raises(ValueError, match="expected shape"):
        ema.load_state_dict({**state, "averages": [wrong] * len(ema.schedules)})
    assert ema.step == before


def check_host_attach(folder):
    for overlap in (False, True):
        one, model = network(), fsdp(network())
        one_ema = fused_ema.EMA(one, decay=[0.9, 0.5])
        ema = fused_ema.EMA(model, decay=[0.9, 0.5], device="cpu")
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.01, foreach=False) for each in (one, model)]
        ema.attach(optimizers[1], overlap=overlap)
        for step in range(4):
            for each, optimizer in zip((one, model), optimizers, strict=True):
                for parameter in each.parameters():
                    parameter.grad = parameter.detach() * 0 + step
                optimizer.step()
            one_ema.update()
        assert ema.step == 4
        for index in (0, 1):
            same(values(ema.averaged_state_dict(index)), one_ema.averaged_state_dict(index))
        for each in (one_ema, ema):
            each.reselect(lambda name, tensor: name[0] != "0"), each.to("cpu")
            train(each.model, 7), each.reselect(lambda name, tensor: True)
        for index in (0, 1):  # the first layer begins again
            same(values(ema.averaged_state_dict(index)), one_ema.averaged_state_dict(index))


def check_host_files(folder):
    *managers, found = written_files(folder, fsdp(network()), device="cpu")
    other = fused_ema.EMA(fsdp(network()), decay=[0.9, 0.9], device="cpu")
    weights = managers[0].averaged_state_dict(1)
    no_communication(fused_ema.checkpoints.restore, other, weights)
    same(values(other.averaged_state_dict()), weights)
    no_communication(managers[1].copy_to, other.model, 1)
    same(values(other.model.state_dict()), weights)
    no_communication(fused_ema.posthoc.load_into, managers[1].model, found)
    assert GATHERED, "files gather over the mesh"


def trained():
    model = fsdp(network()) if dist.get_world_size() > 1 else network()
    ema = fused_ema.EMA(model, decay=[0.9, fused_ema.schedules.inverse_power(0.99)], device="cpu")
    for step in range(3):
        train(model, step)
        ema.update()
    return ema


def check_host_save(folder):
    dcp.save({"ema": trained().state_dict()}, checkpoint_id=folder / f"dcp{dist.get_world_size()}")


def check_host_load(folder):
    """Loads all that other numbers of ranks saved, with averages on either device; saves it again for the next."""
    expected = trained()
    model = fsdp(network())
    for saved in sorted(folder.glob("dcp*")):
        for device in (None, "cpu"):
            ema = fused_ema.EMA(model, decay=[0.9, fused_ema.schedules.inverse_power(0.99)], device=device)
            state = {"ema": ema.state_dict()}
            dcp.load(state, checkpoint_id=saved)
            ema.load_state_dict(state["ema"])
            assert ema.step == 3
            for index in (0, 1):
                same(values(ema.averaged_state_dict(index)), values(expected.averaged_state_dict(index)))
    dist.barrier()
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=folder / f"dcp{dist.get_world_size()}_resaved")


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    shards._gathers_on = gathers_on
    for name in names:
        globals()[f"check_{name}"](Path(folder))
        dist.barrier()
        print(f"{name} passed on rank {dist.get_rank()}", flush=True)
    os._exit(0)  # after a profile, gloo's threads sometimes abort a normal exit
