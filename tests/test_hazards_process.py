"""HAZARDS 29 and 30, and what must not stay in memory: threads, forks, copies, garbage."""

import copy
import functools
import gc
import os
import pickle
import signal
import sys
import threading
import weakref

import pytest
import torch
from conftest import bits, net, same_bits, source, tensors_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fused_ema
from fused_ema import functional
from fused_ema.runners.base import one_at_a_time

# ---- 29: threads and forks

THREADS, STEPS = 4, 12


@pytest.mark.parametrize("size", [10, 2**20 + 3], ids=["small", "large"])  # large: without the interpreter's lock
@pytest.mark.parametrize("way", ["bound", "module", "list"])
def test_29_threads_update_one_after_the_other(backend, way, size):
    ema, model = source("module", {"w": torch.ones(size)}), source("module", {"w": torch.zeros(size)})
    handle = fused_ema.bind(ema, model)
    steps = {
        "bound": lambda: handle.update(0.5),
        "module": lambda: fused_ema.update(ema, model, 0.5),
        "list": lambda: fused_ema.update([ema.w], [model.w], 0.5),
    }
    start, errors = threading.Barrier(THREADS), []

    def work():
        try:
            start.wait(30)
            for _ in range(STEPS):
                steps[way]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert errors == []
    assert ema.w.unique().tolist() == [0.5 ** (THREADS * STEPS)]


def test_29_threads_that_share_a_manager_make_each_step_once(backend):
    """Large enough to run without the interpreter's lock."""
    model = source("module", {"w": torch.zeros(2**20 + 3)})
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5

    ema = fused_ema.EMA(model, schedule)
    model.w.data.fill_(1)
    threads = [threading.Thread(target=lambda: [ema.update() for _ in range(STEPS)]) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ema.step == THREADS * STEPS
    assert asked == list(range(1, THREADS * STEPS + 1))


@pytest.mark.parametrize("way", ["module", "module and list"])
def test_29_first_calls_of_threads(backend, way):
    # Each thread may find no plan yet, and make one of its own.
    size = 2**20
    for _ in range(20):
        ema, model = source("module", {"w": torch.ones(size)}), source("module", {"w": torch.zeros(size)})
        start = threading.Barrier(THREADS)

        def work(turn, ema=ema, model=model, start=start):
            start.wait(30)
            if turn % 2 and way == "module and list":
                fused_ema.update([ema.w], [model.w], 0.5)
            else:
                fused_ema.update(ema, model, 0.5)

        threads = [threading.Thread(target=work, args=(turn,), daemon=True) for turn in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
        assert ema.w.unique().tolist() == [0.5**THREADS]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_29_other_threads_go_on_during_a_large_update(backend):
    """Nobody gets the interpreter here but from who gives it away."""
    ema, model = torch.zeros(1 << 24), torch.ones(1 << 24)
    fused_ema.update([ema], [model], 0.5)
    gate, went_on = threading.Lock(), []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        for _ in range(100):  # on a busy machine the other may come too late
            gate.acquire()
            thread = threading.Thread(target=lambda: went_on.append(gate.acquire()))
            thread.start()
            gate.release()
            fused_ema.update([ema], [model], 0.5)
            seen = list(went_on)
            thread.join()
            gate.release()
            if seen:
                return
            went_on.clear()
    finally:
        sys.setswitchinterval(before)
    pytest.fail("no other thread ran during 100 updates of 16 million elements")


def test_29_threads_with_models_of_their_own(backend):
    # More models than plans are kept, so that the threads evict each other's.
    errors = []

    def work(seed):
        try:
            for i in range(60):
                e, p = torch.ones(1 + i % 3), torch.zeros(1 + i % 3)
                ema, model = source("module", {"w": e}), source("module", {"w": p})
                for _ in range(3):
                    fused_ema.update(ema, model, 0.5)
                assert e.unique().tolist() == [0.125]
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert errors == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of forks in threaded programs
def test_29_a_forked_child_updates_with_an_inherited_binding(backend):
    ema, model = net(), net()
    handle = fused_ema.bind(ema, model)
    for step in (handle.update, lambda decay: fused_ema.update(ema, model, decay)):
        step(0.5)
        child = os.fork()
        if child == 0:  # nothing of pytest may run here
            status = 1
            try:
                torch.set_num_threads(1)
                with torch.no_grad():
                    model[0].weight.add_(1)
                step(0.0)
                status = 0 if same_bits(bits(model), ema) else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert not torch.equal(ema[0].weight, model[0].weight)
        step(0.5)  # the parent's plan still works


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_29_a_forked_child_updates_where_another_thread_was_updating(backend):
    """The lock that this thread holds is never released in the child, where the thread is not."""
    ema, model = torch.ones(3), torch.zeros(3)
    fused_ema.update([ema], [model], 0.5)
    held, forked = threading.Event(), threading.Event()

    def update_for_long():
        with one_at_a_time():
            held.set()
            forked.wait(60)

    thread = threading.Thread(target=update_for_long, daemon=True)
    thread.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        status = 1
        try:
            signal.alarm(20)  # kills it in a deadlock
            fused_ema.update([ema], [model], 0.5)
            status = 0 if ema.tolist() == [0.25] * 3 else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    forked.set()
    thread.join(30)
    assert os.waitstatus_to_exitcode(status) == 0
    fused_ema.update([ema], [model], 0.5)  # the parent has its own lock still
    assert ema.tolist() == [0.25] * 3


# ---- 30: pickling and copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_30_the_function_for_averaged_models(backend, copied):
    function = copied(fused_ema.get_ema_multi_avg_fn(0.75))
    e, p = torch.full((3,), 8.0), torch.zeros(3)
    function([e], [p], 1)
    assert e.tolist() == [6.0] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_30_averaged_model_with_the_function_in_it(backend, copied, use_buffers):
    model = net()
    averaged = AveragedModel(model, multi_avg_fn=fused_ema.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    averaged.update_parameters(model)  # the first is a copy
    before = averaged.module[0].weight.clone()
    again = copied(averaged)
    with torch.no_grad():
        model[0].weight.add_(2)
        model[1].num_batches_tracked.add_(3)
    again.update_parameters(model)
    assert torch.allclose(again.module[0].weight, before + 1, atol=1e-5)
    assert torch.equal(again.module[1].num_batches_tracked, model[1].num_batches_tracked)
    assert torch.equal(averaged.module[0].weight, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_30_a_binding_travels_with_its_modules(backend, copied):
    ema, model = net(), net()
    handle = fused_ema.bind(ema, model, buffers="ignore")
    handle.update(0.5)
    before = bits(ema, model)
    other_ema, other_model, other = copied((ema, model, handle))
    with torch.no_grad():
        other_model[0].weight.fill_(3)
    other.update(0.0)
    assert other_ema[0].weight.unique().tolist() == [3.0]
    assert not torch.equal(other_ema[1].running_mean, other_model[1].running_mean)
    assert same_bits(before, ema, model)


# ---- garbage: what the package must not keep alive


class Knot(nn.Module):
    """Refers to itself, as modules with hooks, bound methods or parents in their attributes do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.callback = self.forward
        self.layer.register_forward_hook(self.hook)

    def hook(self, *_):
        pass


@pytest.mark.parametrize("make", [net, Knot], ids=["plain", "knot"])
@pytest.mark.parametrize("operation", [lambda e, m: fused_ema.update(e, m, 0.5), fused_ema.copy_, fused_ema.swap_])
def test_garbage_cached_plans_keep_no_module_alive(backend, make, operation):
    ema, model = make(), make()
    operation(ema, model)
    dead = [weakref.ref(x) for side in (ema, model) for x in (side, *side.parameters())]
    memory = weakref.ref(model.get_parameter("0.weight" if make is net else "layer.weight").untyped_storage())
    del ema, model
    gc.collect()
    assert [reference() for reference in dead] == [None] * len(dead)
    assert memory() is None
    assert not functional._module_plans


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_garbage_cached_plans_keep_no_tensor_alive(backend, kind):
    ema, model = source(kind, {"w": torch.ones(3)}), source(kind, {"w": torch.zeros(3)})
    fused_ema.update(ema, model, 0.5)
    fused_ema.update(ema, model, 1.0)
    with pytest.raises(ValueError, match="decay"):
        fused_ema.update(ema, model, 2.0)
    dead = [weakref.ref(tensor) for tensor in tensors_of(ema, model)]
    del ema, model
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


@pytest.mark.parametrize("make", [net, Knot], ids=["plain", "knot"])
def test_garbage_a_dropped_binding_frees_its_modules(backend, make):
    ema, model = make(), make()
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    dead = [weakref.ref(ema), weakref.ref(model), weakref.ref(next(model.parameters()))]
    del ema, model, handle
    gc.collect()
    assert [reference() for reference in dead] == [None] * 3


def test_garbage_a_binding_kept_by_its_own_model(backend):
    ema, model = net(), net()
    model.handle = fused_ema.bind(ema, model)
    model.handle.update(0.5)
    dead = weakref.ref(model)
    del ema, model
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_30_copies_of_a_model_that_holds_its_binding(backend, copied):
    ema, model = net(), net()
    model.handle = fused_ema.bind(ema, model)
    other = copied(model)
    with torch.no_grad():
        other[0].weight.add_(1)
    before = bits(ema)
    other.handle.update(0.0)
    average, averaged = other.handle._sources[:2]
    assert averaged is other
    assert torch.equal(average[0].weight, other[0].weight)
    assert same_bits(before, ema)


WAYS = {
    "update": lambda ema, model: functools.partial(fused_ema.update, ema, model, 0.5),
    "bind": lambda ema, model: functools.partial(fused_ema.bind(ema, model).update, 0.5),
    "manager": lambda _, model: fused_ema.EMA(model).update,
}


@pytest.mark.parametrize("way", WAYS)
def test_garbage_replaced_tensors_are_freed_at_once(backend, way):
    ema, model = net(), net()
    step = WAYS[way](ema, model)
    step()
    dead = weakref.ref(model[0].weight), weakref.ref(model[0].weight.untyped_storage())
    model[0].weight = nn.Parameter(torch.ones(4, 3))
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    step()


def test_garbage_a_model_that_its_own_tensors_refer_to(backend):
    ema, model = net(), net()
    model[0].weight.owner = model
    model[0].bias.register_hook(lambda _, owner=model: owner.training)
    fused_ema.update(ema, model, 0.5)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert not functional._module_plans


def test_garbage_a_new_model_at_an_old_address(backend):
    for value in range(50):
        ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.fill_(value)
        fused_ema.update(ema, model, 0.0)
        assert ema.weight.unique().tolist() == [value]


def test_many_pairs_of_modules_keep_their_plans():
    if fused_ema.backend("cpu") != "cpu":
        pytest.skip("the pure-PyTorch path keeps no plans")
    pairs = [(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(40)]
    for ema, model in pairs:
        fused_ema.update(ema, model, 0.5)
    plans = {key: entry[0] for key, entry in functional._module_plans.items()}
    for ema, model in pairs:
        fused_ema.update(ema, model, 0.5)
        key = (id(ema), id(model), "copy")
        assert functional._module_plans[key][0] is plans[key]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_plans_of_lists_end_with_the_least_recently_used(backend):
    most = functional._MOST_LISTS
    pairs = [([torch.ones(2)], [torch.zeros(2)]) for _ in range(most + 1)]

    def update(i):
        """The plan that ran: the last in use."""
        fused_ema.update(*pairs[i], 0.5)
        return next(reversed(functional._list_plans.values()))

    plans = [update(i) for i in range(most)]
    assert update(0) is plans[0]
    new = update(most)  # in the place of the second
    assert list(functional._list_plans.values()) == [*plans[2:], plans[0], new]
    assert update(2) is plans[2]
    assert update(1) is not plans[1]
    assert len(functional._list_plans) == most
    assert [ema[0].tolist() for ema, _ in pairs] == [[0.5**n] * 2 for n in (2, 2, 2, *[1] * (most - 2))]
