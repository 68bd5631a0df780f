"""Threads that update at once, and processes that were forked."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import bits, net, same_bits, source

import fused_ema
from fused_ema.runners.base import one_at_a_time

THREADS, STEPS = 4, 12


def at_once(work, threads=THREADS):
    """Runs work(turn) in threads that begin together; fails if one of them raises or does not end."""
    start, errors = threading.Barrier(threads), []

    def run(turn):
        try:
            start.wait(30)
            work(turn)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(turn,), daemon=True) for turn in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert not any(thread.is_alive() for thread in running), "deadlock"
    assert errors == []


@pytest.mark.parametrize(
    "size", [10, 2**20 + 3], ids=["small", "large"]
)  # the large one releases the interpreter's lock
@pytest.mark.parametrize("way", ["bound", "module", "list"])
def test_threads_update_one_after_the_other(backend, way, size):
    ema, model = source("module", {"w": torch.ones(size)}), source("module", {"w": torch.zeros(size)})
    handle = fused_ema.bind(ema, model)
    steps = {
        "bound": lambda: handle.update(0.5),
        "module": lambda: fused_ema.update(ema, model, 0.5),
        "list": lambda: fused_ema.update([ema.w], [model.w], 0.5),
    }
    at_once(lambda _: [steps[way]() for _ in range(STEPS)])
    assert ema.w.unique().tolist() == [0.5 ** (THREADS * STEPS)]


def test_threads_that_share_a_manager_make_each_step_once(backend):
    """The model is large enough for updates to release the interpreter's lock."""
    model = source("module", {"w": torch.zeros(2**20 + 3)})
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5

    ema = fused_ema.EMA(model, schedule)
    model.w.data.fill_(1)
    at_once(lambda _: [ema.update() for _ in range(STEPS)])
    assert ema.step == THREADS * STEPS
    assert asked == list(range(1, THREADS * STEPS + 1))


def test_first_calls_of_threads(backend):
    # Several threads may find that there is no plan yet, and each make one.
    size = 2**20
    for _ in range(20):
        ema, model = source("module", {"w": torch.ones(size)}), source("module", {"w": torch.zeros(size)})

        def work(turn, ema=ema, model=model):
            if turn % 2:
                fused_ema.update([ema.w], [model.w], 0.5)
            else:
                fused_ema.update(ema, model, 0.5)

        at_once(work)
        assert ema.w.unique().tolist() == [0.5**THREADS]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_other_threads_go_on_during_a_large_update(backend):
    """The switch interval is so long that the update itself has to release the interpreter's lock."""
    ema, model = torch.zeros(1 << 24), torch.ones(1 << 24)
    fused_ema.update([ema], [model], 0.5)
    gate, went_on = threading.Lock(), []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        for _ in range(100):  # on a busy machine the other thread may come too late
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


@pytest.mark.hazard(29, "good")
def test_threads_with_models_of_their_own(backend):
    # Models come and go in each thread, so plans are dropped while other threads make theirs.
    def work(_):
        for i in range(60):
            e, p = torch.ones(1 + i % 3), torch.zeros(1 + i % 3)
            ema, model = source("module", {"w": e}), source("module", {"w": p})
            for _ in range(3):
                fused_ema.update(ema, model, 0.5)
            assert e.unique().tolist() == [0.125]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        at_once(work, threads=8)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.hazard(29, "guarded")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of forks in threaded programs
def test_a_forked_child_updates_with_an_inherited_binding(backend):
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
def test_a_forked_child_updates_where_another_thread_was_updating(backend):
    """The child inherits the lock as held, without the thread that would release it."""
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
    fused_ema.update([ema], [model], 0.5)  # the parent still has its own lock
    assert ema.tolist() == [0.25] * 3


CROWDED = """
import os, sys, torch, fused_ema
torch.set_num_threads(2)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # for the threads of OpenMP too, which begin later
ema, model = ([torch.full((2**16 + 5,), value) for _ in range(5)] for value in (0.0, 1.0))
handle = fused_ema.bind(ema, model)
for _ in range(20):
    handle.update(0.5)
sys.exit(not all((tensor == 1 - 0.5**20).all() for tensor in ema))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux lets threads be crowded on one core")
def test_threads_that_delay_each_other_on_one_core():
    """Each parallel loop would take a time slice or more; after the first, one thread does the next ones."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "ACTIVE"}
    environment["OMP_NUM_THREADS"] = "2"
    subprocess.run([sys.executable, "-c", CROWDED], check=True, timeout=120, env=environment)
