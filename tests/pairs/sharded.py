"""Compares averages of sharded models with those of one process. test_distributed.py runs it on several processes.

torchrun --nproc-per-node N tests/pairs/sharded.py FOLDER CHECK...
"""

import contextlib
import copy
import os
import re
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_ema

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oracle

DECAYS = [0.9, 0.99, 0.5]
FSDP_RUNS_HERE = hasattr(
    torch.cpu.Stream, "record_event"
)  # FSDP2 runs on the CPU from PyTorch 2.7 on; before, only its shards can be tested


def network(dtype=torch.float32):
    """No size is a multiple of the number of ranks: shards are uneven, and some are empty."""
    torch.manual_seed(0)
    layers = nn.Linear(7, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Linear(13, 5), nn.LayerNorm(5), nn.Linear(5, 1)
    return nn.Sequential(*layers).to(dtype)


def fsdp(model):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


def batch(step):
    """The same batch on each rank, so that the gradients equal those of one process."""
    return torch.randn(16, 7, generator=torch.Generator().manual_seed(step))


def train(model, step):
    """A change that is the same whatever the sharding: elementwise, and with each parameter's own values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * step).add_(0.01 * step)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(found, expected):
    """Asserts that names and bits are the same."""
    assert found.keys() == expected.keys(), (list(found), list(expected))
    for name, tensor in expected.items():
        assert oracle.same_bits(whole(found[name]), whole(tensor)), name


def sent(function, *arguments):
    """The collective operations of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*arguments)
    return [event.key for event in profile.key_averages() if "gloo" in event.key or "c10d" in event.key]


def no_communication(function, *arguments):
    found = sent(function, *arguments)
    assert not found, found


def check_update(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert sent(distribute_tensor(torch.ones(8), mesh, [Shard(0)]).full_tensor), (
        "the profile shows no collective operation at all"
    )
    for shard in (fsdp, parallel):
        for dtype in (torch.float32, torch.bfloat16):
            one, model = network(dtype), shard(network(dtype))
            one_ema, ema = network(), shard(network())
            handle = fused_ema.bind(ema, model)
            for step, decay in enumerate(DECAYS):
                train(one, step), train(model, step)
                fused_ema.update(one_ema, one, decay)
                versions = [parameter._version for parameter in ema.parameters()]
                if step:
                    no_communication(fused_ema.update, ema, model, decay)
                else:
                    no_communication(handle.update, decay)
                assert all(p._version > before for p, before in zip(ema.parameters(), versions, strict=True))
                same(ema.state_dict(), one_ema.state_dict())
            kept = [(p, p._local_tensor) for p in model.parameters() if isinstance(p, DTensor)]
            for parameter, shard_before in kept:  # the tensor gets another shard while the first one still exists
                parameter._local_tensor = shard_before.detach().clone()
            train(one, 9), train(model, 9)
            handle.update(0.5), fused_ema.update(one_ema, one, 0.5)
            same(ema.state_dict(), one_ema.state_dict())
            fused_ema.update(list(ema.parameters()), list(model.parameters()), 0.5)
            fused_ema.update(list(one_ema.parameters()), list(one.parameters()), 0.5)
            same(ema.state_dict(), one_ema.state_dict())


def check_manager(folder):
    for shard in (fsdp, parallel):
        for dtype, options in (
            (torch.float32, {}),
            (torch.bfloat16, {}),
            (torch.float32, {"decay": [0.9, 0.99]}),
            (torch.float32, {"buffers": "average"}),
        ):
            one, model = network(dtype), shard(network(dtype))
            one_ema, ema = (fused_ema.EMA(m, **{"decay": 0.9, **options}) for m in (one, model))
            for step in range(3):
                train(one, step), train(model, step)
                one_ema.update(), no_communication(ema.update)
            for index in range(len(ema.schedules)):
                averages = ema.averaged_state_dict(index)
                same(averages, one_ema.averaged_state_dict(index))
                for name, parameter in model.named_parameters():
                    if isinstance(parameter, DTensor):
                        assert averages[name].placements == parameter.placements
                        assert averages[name].device_mesh == parameter.device_mesh
                before = copy.deepcopy(one.state_dict())
                runs = dtype == torch.float32 and shard is fsdp and FSDP_RUNS_HERE
                if runs:
                    forward(model)  # the first forward pass allocates
                    model.reshard()
                places = [address(parameter) for parameter in model.parameters()]
                with one_ema.swapped(index), ema.swapped(index):
                    same(model.state_dict(), one.state_dict())
                    same(ema.averaged_state_dict(index), one_ema.averaged_state_dict(index))
                    if runs:
                        torch.testing.assert_close(forward(model), forward(one))
                same(model.state_dict(), before)
                assert places == [address(parameter) for parameter in model.parameters()]
            again = copy.deepcopy(one_ema)
            state = ema.state_dict()
            state = {**state, "averages": [{n: t.clone() for n, t in each.items()} for each in state["averages"]]}
            again.reset(), no_communication(ema.reset)
            assert ema.step == 0
            for index in range(len(ema.schedules)):
                same(ema.averaged_state_dict(index), again.averaged_state_dict(index))
            ema.load_state_dict(state)
            other = shard(network(dtype))
            ema.copy_to(other)
            one_other = network(dtype)
            one_ema.copy_to(one_other)
            same(other.state_dict(), one_other.state_dict())
            assert ema.describe()["tensors"] == len([p for p in model.parameters() if local(p).numel()]) + (
                2 if options.get("buffers") else 0
            )


def forward(model):
    model.eval()
    return whole(model(batch(0)))


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def address(tensor):
    with torch.no_grad():
        return local(tensor).data_ptr()


def check_training(folder):
    """Forward, backward and AdamW on shards; each step's averages by the formula in float64 from the whole weights."""
    layers = nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = [parallelize_module(nn.Sequential(*layers), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})]
    for model in [*models, fsdp(network())] if FSDP_RUNS_HERE else models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ema = fused_ema.EMA(model, decay=0.9)
        ema.attach(optimizer)
        expected = {name: whole(p).detach().double() for name, p in model.named_parameters()}
        for step in range(5):
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, p in model.named_parameters():
                expected[name].lerp_(whole(p).detach().double(), 1 - 0.9)
        found = ema.averaged_state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(whole(found[name]).double(), tensor, rtol=1e-6, atol=1e-7)


def check_evaluation(folder):
    """FSDP2 leaves the outermost parameters whole after a forward pass without a backward pass."""
    if not FSDP_RUNS_HERE:
        return
    model, one = fsdp(network()).eval(), network().eval()
    model(batch(0))
    ema, one_ema = fused_ema.EMA(model, decay=0.5), fused_ema.EMA(one, decay=0.5)
    for step in range(3):
        model.reshard()
        train(model, step), train(one, step)
        model(batch(0))
        ema.update(), one_ema.update()
        before = {name: whole(p).clone() for name, p in model.state_dict().items()}
        for error in (None, KeyError):
            with contextlib.suppress(KeyError), ema.swapped(), one_ema.swapped():
                torch.testing.assert_close(model(batch(0)), one(batch(0)))
                same(ema.averaged_state_dict(), one.state_dict())
                if error:
                    raise error
            same(model.state_dict(), before)
            model(batch(0))
        same(ema.averaged_state_dict(), one_ema.averaged_state_dict())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError), ema.swapped():
            patch.setattr("fused_ema.pairs.shards.reshard", lambda _: (_ for _ in ()).throw(MemoryError))
        same(model.state_dict(), before)
        ema.distance(), ema.describe()
        model(batch(0))
        ema.copy_to(model)
        same(model.state_dict(), one_ema.averaged_state_dict())
        same(ema.averaged_state_dict(), one_ema.averaged_state_dict())
        one_ema.copy_to(one)
    # Both modules were evaluated. An update of the gathered parameters would be lost when they are resharded.
    teacher, student, one_teacher, one_student = fsdp(network()), fsdp(network()), network(), network()
    handle = fused_ema.bind(teacher, student)
    for step in range(1, 4):
        train(student, step), train(one_student, step)
        teacher.eval()(batch(0)), student.eval()(batch(0))
        handle.update(0.5) if step % 2 else fused_ema.update(teacher, student, 0.5)
        fused_ema.update(one_teacher, one_student, 0.5)
        same(teacher.state_dict(), one_teacher.state_dict())
        student.reshard()
    handle.update(0.5)
    kept = handle._plan
    teacher(batch(0)), student(batch(0))
    handle.update(0.5)
    assert handle._plan is kept, "once the shards are back in their places, nothing has to be paired again"


def check_ddp(folder):
    """Each rank averages its own replica, and all have the bits of one process."""
    one, model = network(), nn.parallel.DistributedDataParallel(network())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (one, model)]
    one_ema, ema = fused_ema.EMA(one, decay=0.9), fused_ema.EMA(model, decay=0.9)
    one_average, average = network(), network()
    ema.attach(optimizers[1])
    for step in range(5):
        for m, optimizer in zip((one, model), optimizers, strict=True):
            m(batch(step)).square().mean().backward()  # equal on all ranks, so their mean is the same
            optimizer.step()
            optimizer.zero_grad()
        one_ema.update()
        fused_ema.update(one_average, one, 0.9)
        no_communication(fused_ema.update, average, model, 0.9)  # pairs through "module."
    same(average.state_dict(), one_average.state_dict())
    same(ema.averaged_state_dict(), {f"module.{name}": t for name, t in one_ema.averaged_state_dict().items()})
    with ema.swapped(), one_ema.swapped():
        same(model.module.state_dict(), one.state_dict())
    check_ddp_buffers()
    resumed = fused_ema.EMA(network())  # in a process without DDP
    resumed.load_state_dict(ema.state_dict())
    found, expected = resumed.averaged_state_dict(), one_ema.averaged_state_dict()
    same({n: found[n] for n, _ in one.named_parameters()}, {n: expected[n] for n, _ in one.named_parameters()})


def check_ddp_buffers():
    """Averaged buffers are each rank's own, until DDP copies rank 0's: in the first forward pass after a step."""
    model = nn.parallel.DistributedDataParallel(network())
    ema = fused_ema.EMA(model, decay=0.5, buffers="average")
    model(batch(dist.get_rank())).square().mean().backward()
    ema.update()

    def means():
        found = [torch.empty(13) for _ in range(dist.get_world_size())]
        dist.all_gather(found, ema.state_dict()["averages"][0]["1.running_mean"].contiguous())
        return torch.stack(found)

    before = means()
    assert not torch.equal(before[0], before[-1])
    model.eval()
    for evaluated, expected in ((model.module, before), (model, before[0].expand_as(before))):
        with torch.no_grad(), ema.swapped():
            evaluated(batch(0))
        assert oracle.same_bits(means(), expected.contiguous())


def check_refusals(folder):
    def refused(kind, words, function):
        with pytest.raises(kind, match=re.escape(words)):
            function()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    data = torch.arange(24.0).reshape(4, 6)
    rows, columns, copies = (distribute_tensor(data, mesh, [p]) for p in (Shard(0), Shard(1), Replicate()))
    before = rows.full_tensor()
    refused(ValueError, "expected a DTensor of shape", lambda: fused_ema.update([rows], [columns], 0.5))
    refused(ValueError, "expected a DTensor of shape", lambda: fused_ema.update([rows], [copies], 0.5))
    refused(ValueError, "a tensor that is not sharded", lambda: fused_ema.update([rows], [data], 0.5))
    refused(ValueError, "a tensor that is not sharded", lambda: fused_ema.update([data], [rows], 0.5))
    other = distribute_tensor(torch.zeros(5, 6), mesh, [Shard(0)])
    refused(ValueError, "expected shape (5, 6)", lambda: fused_ema.update([rows], [other], 0.5))
    partial = DTensor.from_local(torch.ones(4, 6), mesh, [torch.distributed.tensor.Partial()])
    refused(ValueError, "still has to be reduced", lambda: fused_ema.update([copies], [partial], 0.5))
    fused_ema.update([rows], [distribute_tensor(data, mesh, [Shard(0)])], 0.5)
    refused(ValueError, "expected a DTensor of shape", lambda: fused_ema.update([rows], [columns], 0.5))
    assert torch.equal(rows.full_tensor(), before)

    model = fsdp(network())
    ema = fused_ema.EMA(model)
    refused(ValueError, "not sharded", lambda: ema.copy_to(network()))
    state = ema.state_dict()
    one = fused_ema.EMA(network())
    refused(ValueError, "call its full_tensor() on every rank", lambda: one.load_state_dict(state))
    state["averages"] = [{name: whole(tensor) for name, tensor in each.items()} for each in state["averages"]]
    one.load_state_dict(state)

    from torch.distributed.fsdp import FullyShardedDataParallel

    for use_orig_params in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        refused(RuntimeError, "fully_shard (FSDP2)", lambda flat=flat: fused_ema.EMA(flat))
        refused(RuntimeError, "fully_shard (FSDP2)", lambda flat=flat: fused_ema.update(flat, flat, 0.5))


def check_stale(folder):
    """A plan notices whatever replaces a shard."""

    def follows(change):
        change()
        expected = {name: whole(p).detach().lerp(whole(theirs[name]).detach(), 0.25) for name, p in ours.items()}
        handle.update(0.75)
        for name, p in ours.items():
            torch.testing.assert_close(whole(p).detach(), expected[name], rtol=1e-5, atol=1e-6)

    def other(parameter, factor):
        shard, size = local(parameter).detach() * factor, {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, **size)

    with torch.no_grad():
        model, ema = parallel(network()), parallel(network())
        handle = fused_ema.bind(ema, model)
        ours, theirs = dict(ema.named_parameters()), dict(model.named_parameters())
        follows(lambda: train(model, 1))

        def replace():
            model[0].weight = nn.Parameter(other(model[0].weight, 2))
            theirs["0.weight"] = model[0].weight

        def put_shard():
            model[0].weight._local_tensor = local(model[0].weight).clone() * 3

        def set_data():
            model[0].weight.data = other(model[0].weight, 0.5).data

        def assign():
            state = {name: other(p, 2) if isinstance(p, DTensor) else p * 2 for name, p in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
            theirs.update(model.named_parameters())

        for change in (replace, put_shard, set_data, assign):
            follows(change)


def check_layouts(folder):
    """A DTensor of another layout, at the address of a deleted one and with the same shard, is noticed."""
    mesh, here = init_device_mesh("cpu", (dist.get_world_size(),)), torch.ones(8, 8)
    other = [Shard(1)] if dist.get_world_size() > 1 else [Replicate()]
    ema = [DTensor.from_local(torch.zeros(8, 8), mesh, [Shard(0)], run_check=False)]
    model = [DTensor.from_local(here, mesh, [Shard(0)], run_check=False)]
    for step in (fused_ema.bind(ema, model).update, partial(fused_ema.update, ema, model)):
        for placements in [[Shard(0)], other] * 10:
            model[0] = None
            model[0] = DTensor.from_local(here, mesh, placements, run_check=False)
            with contextlib.nullcontext() if placements == [Shard(0)] else pytest.raises(ValueError, match="expected"):
                step(0.5)


def check_threads(folder):
    """Another thread replaces shards, and whole tensors, while an update runs without the interpreter's lock."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def tensor(value):
        return DTensor.from_local(torch.full((2_000_000,), value), mesh, [Replicate()], run_check=False)

    ema, model = (nn.ParameterList([nn.Parameter(tensor(value), requires_grad=False)]) for value in (0.0, 1.0))
    binding = fused_ema.bind(ema, model)
    binding.update(0.5)
    replaced, stop = 0, threading.Event()

    def replace():
        nonlocal replaced
        while not stop.is_set():
            new = nn.Parameter(tensor(2.0), requires_grad=False)
            if replaced % 2:
                ema[0]._local_tensor = new._local_tensor
            else:
                with contextlib.suppress(RuntimeError):  # where an update holds it
                    torch.utils.swap_tensors(ema[0], new)
            del new
            replaced += 1

    thread = threading.Thread(target=replace)
    thread.start()
    while replaced < 60 and thread.is_alive():
        with contextlib.suppress(RuntimeError):  # replaced again while the tensors were paired
            binding.update(0.5)
    stop.set()
    thread.join()
    assert replaced >= 60
    binding.update(0.0)
    assert local(ema[0]).eq(1).all()


def check_compiled(folder):
    """A compiled function updates each rank's shards too, and refuses other shardings."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()
        model, ema, eager = (parallel(network()) for _ in range(3))

        @torch.compile(backend=compiler, fullgraph=True)
        def step(decay, ema=ema, model=model):
            fused_ema.update(ema, model, decay)

        for at, decay in enumerate(DECAYS):
            train(model, at)
            step(decay)
            fused_ema.update(eager, model, decay)
            same(dict(ema.named_parameters()), dict(eager.named_parameters()))

    columns, copies = (distribute_tensor(torch.ones(4, 4), mesh, [p]) for p in (Shard(1), Replicate()))
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [torch.distributed.tensor.Partial()])
    for ours, theirs in ((columns, copies), (copies, partial)):
        before = ours.to_local().clone()
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"(?s)expected|placements|refusal"):
            torch.compile(fused_ema.update, backend="eager", fullgraph=True)([ours], [theirs], 0.5)
        assert torch.equal(ours.to_local(), before)


def check_reselect(folder):
    """Layers that are unfrozen, widened and removed; and what a model with other layers has in common."""
    for shard in (fsdp, parallel):
        one, model = network(), shard(network())
        for each in (one, model):
            each[3].requires_grad_(False)
        managers = [fused_ema.EMA(each, [0.9, 0.5], select=lambda _, p: p.requires_grad) for each in (one, model)]
        for step in range(4):
            train(one, step), train(model, step)
            for ema in managers:
                if step == 1:
                    ema.model[3].requires_grad_(True)
                    with pytest.warns(UserWarning, match=r"'3.weight'.* ema.reselect\(\)"):
                        ema.state_dict()
                    no_communication(ema.reselect)
                    assert sorted(set(ema.state_dict()["averages"][1])) == sorted(dict(one.named_parameters()))
                if step == 2:
                    torch.manual_seed(1)
                    wide = nn.Linear(5, 3)
                    ema.model[5] = fully_shard(wide) if ema.model is model and shard is fsdp else wide
                    with pytest.raises(ValueError, match=r"call ema.reselect\(\)"):
                        ema.update()
                    assert ema.reselect() == (["5.weight", "5.bias"], ["5.weight", "5.bias"])
                if step == 3:
                    del ema.model[4]  # renames what follows
                    added, dropped = ema.reselect()
                    assert (sorted(added), sorted(dropped)) == (
                        ["4.bias", "4.weight"],
                        ["4.bias", "4.weight", "5.bias", "5.weight"],
                    )
                ema.update()
        for index in (0, 1):
            same(managers[1].averaged_state_dict(index), managers[0].averaged_state_dict(index))

        saved = managers[1].state_dict()
        other = fused_ema.EMA(shard(network()), [0.9, 0.5])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.load_state_dict(saved, names="common")
            names = [name for name in saved["averages"][0] if name[0] in "013"]
            for index, average in enumerate(other.state_dict()["averages"]):
                same({name: average[name] for name in names}, {x: saved["averages"][index][x] for x in names})
            one_ema, ema = network(), shard(network())
            for each, source in ((one_ema, one), (ema, model)):
                fused_ema.update(each, source, 0.25, names="common")
            same(ema.state_dict(), one_ema.state_dict())


def check_save(folder):
    import torch.distributed.checkpoint as dcp

    ema, _ = trained()
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=folder)


def trained():
    model = fsdp(network()) if dist.is_initialized() and dist.get_world_size() > 1 else network()
    ema = fused_ema.EMA(model, decay=[0.9, fused_ema.schedules.inverse_power(0.99)])
    for step in range(3):
        train(model, step)
        ema.update()
    return ema, model


def written_files(folder, model, **options):
    """Trains a model and the same one in one process, and compares the files of their managers. Returns these, the one
    process's first, and a reconstruction from the files."""
    from safetensors.torch import load_file

    power = fused_ema.schedules.power_function
    managers = [fused_ema.EMA(m, decay=[power(0.05), power(0.1)], **options) for m in (network(), model)]
    places = [folder / f"{name}{options.get('device', '')}" for name in ("one", "sharded")]
    for at, place in enumerate(places):
        for step in range(3):
            train(managers[at].model, step)
            managers[at].update()
        if at or dist.get_rank() == 0:
            fused_ema.posthoc.save_snapshot(place, managers[at])
            fused_ema.checkpoints.save_safetensors(place.with_suffix(".safetensors"), managers[at], 1)
        dist.barrier()
    same(*(load_file(place.with_suffix(".safetensors")) for place in places))
    expected, found = (fused_ema.posthoc.reconstruct(place, 0.07) for place in places)
    same(found, expected)
    return *managers, found


def check_files(folder):
    """Files hold whole tensors, the same as those of one process, and any process reads them."""
    _, ema, _ = written_files(folder, fsdp(network()))
    exported = fused_ema.checkpoints.export(ema, "averaged_model")
    other = fused_ema.EMA(fsdp(network()), decay=[0.9, 0.9])
    fused_ema.checkpoints.restore(other, exported)
    same(dict(other.averaged_state_dict()), dict(ema.averaged_state_dict()))


def check_unsharded(folder):
    """A sharded manager, or model, takes whole tensors; each rank cuts out its own part."""
    for shard in (fsdp, parallel):
        one = fused_ema.EMA(network(), decay=[0.9, 0.99])
        for step in range(3):
            train(one.model, step), one.update()
        ema, other = (fused_ema.EMA(shard(network()), decay=[0.9, 0.99]) for _ in range(2))
        no_communication(ema.load_state_dict, one.state_dict())
        assert (ema.step, ema.decay) == (3, (0.9, 0.99))
        no_communication(fused_ema.checkpoints.restore, other, one.averaged_state_dict(1))
        for index in (0, 1):
            same(ema.averaged_state_dict(index), one.averaged_state_dict(index))
        same(other.averaged_state_dict(), one.averaged_state_dict(1))
        train(one.model, 0), one.update(), ema.load_state_dict(one.state_dict())
        no_communication(fused_ema.posthoc.load_into, ema.model, one.averaged_state_dict())
        same(ema.model.state_dict(), one.averaged_state_dict())
        no_communication(one.copy_to, other.model, 1)
        same(other.model.state_dict(), one.averaged_state_dict(1))

        state = one.state_dict()
        state["averages"][1]["0.weight"] = torch.zeros(13, 8)
        before = {name: whole(tensor).clone() for name, tensor in ema.averaged_state_dict(1).items()}
        with pytest.raises(ValueError, match=re.escape("'0.weight': expected shape (13, 7), found (13, 8)")):
            ema.load_state_dict(state)
        same(ema.averaged_state_dict(1), before)

        early = fused_ema.EMA(model := network(), decay=0.9)
        train(shard(model), 1)
        for call in (early.update, early.swapped().__enter__):
            with pytest.raises(ValueError, match=re.escape("make the fused_ema.EMA after fully_shard, not before")):
                call()
        late = fused_ema.EMA(model, decay=0.9)
        late.load_state_dict(early.state_dict())  # as the error says
        same(late.averaged_state_dict(), network().state_dict())
        late.update()


def check_load(folder):
    """Loads into a new manager, on the present number of ranks."""
    import torch.distributed.checkpoint as dcp

    expected, _ = trained()
    model = fsdp(network()) if dist.get_world_size() > 1 else network()
    ema = fused_ema.EMA(model, decay=[0.9, fused_ema.schedules.inverse_power(0.99)])
    state = {"ema": ema.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    ema.load_state_dict(state["ema"])
    assert ema.step == 3
    assert ema.decay == expected.decay
    for index in (0, 1):
        same(ema.averaged_state_dict(index), expected.averaged_state_dict(index))


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in names:
        globals()[f"check_{name}"](Path(folder))
        dist.barrier()
        print(f"{name} passed on rank {dist.get_rank()}", flush=True)
    os._exit(0)  # after a profile, gloo's threads sometimes abort a normal exit
