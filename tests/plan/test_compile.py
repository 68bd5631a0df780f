"""`update` inside compiled functions is one operation with the usual checks, and a new decay compiles nothing."""

import copy

import pytest
import torch
from conftest import bits, net, same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fused_ema


@pytest.mark.hazard(25, "good")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_schedule_compiles_twice_at_most(compiler):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    model = net()
    ema, eager = copy.deepcopy(model), copy.deepcopy(model)

    @torch.compile(backend=compiler, fullgraph=True)
    def step(decay):
        fused_ema.update(ema, model, decay)

    for i in range(8):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
        step(1 - 0.3 / (i + 1))
        fused_ema.update(eager, model, 1 - 0.3 / (i + 1))
        for name, tensor in eager.state_dict().items():
            assert torch.equal(ema.state_dict()[name], tensor), name
    assert 1 <= graphs["unique_graphs"] - before <= 2


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_whole_training_step_in_one_graph(compiler):
    """Forward, backward, SGD and the average. (Dynamo does not trace .backward(), but torch.func.)"""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]

    def trainer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        ema, parameters = copy.deepcopy(model), dict(model.named_parameters())

        def loss(weights, x):
            return torch.func.functional_call(model, weights, x).square().mean()

        def step(x, decay):
            gradients = torch.func.grad(loss)(parameters, x)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.sub_(gradients[name], alpha=0.1)
            fused_ema.update(ema, model, decay)

        return step, model, ema

    step, model, ema = trainer()
    eager, eager_model, eager_ema = trainer()
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    first = copy.deepcopy(ema)
    for i in range(6):
        x = torch.randn(5, 3)
        compiled(x, 1 - 0.3 / (i + 1)), eager(x, 1 - 0.3 / (i + 1))
    for found, expected in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected, old in zip(ema.parameters(), eager_ema.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, old)
    assert 1 <= graphs["unique_graphs"] - before <= 2


def module_of(buffer):
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(3))
    module.register_buffer("buffer", buffer)
    return module


@pytest.mark.hazard(25, "guarded")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.zeros(3), torch.ones(1)),
        (torch.zeros(3, dtype=torch.int64), torch.full((3,), 1.7)),
        (torch.zeros(3), torch.ones(3, dtype=torch.complex64)),
    ],
    ids=["shape", "integer", "complex"],
)
def test_compiled_updates_refuse_what_others_refuse(ours, theirs):
    torch._dynamo.reset()
    ema, model = module_of(ours), module_of(theirs)
    step = torch.compile(lambda: fused_ema.update(ema, model, 0.5), backend="aot_eager", fullgraph=True)
    before = bits(ema, model)  # versions may move: PyTorch counts one before the operation runs
    with pytest.raises((ValueError, TypeError), match=r"ema\['buffer'\]: expected .* found"):
        step()
    assert same_bits(before, ema, model)


@pytest.mark.hazard(21, "good")
def test_traced_with_fake_tensors():
    with FakeTensorMode():
        averages, tensors = [torch.zeros(3), torch.zeros(4)], [torch.ones(3), torch.ones(4)]
        torch.ops.fused_ema.lerp_(averages, tensors, torch.tensor(0.5, dtype=torch.float64))
    real = make_fx(lambda e, p, decay: torch.ops.fused_ema.lerp_([e], [p], decay), tracing_mode="fake")(
        torch.zeros(3), torch.ones(3), torch.tensor(0.5, dtype=torch.float64)
    )
    average = torch.zeros(3)
    real(average, torch.ones(3), torch.tensor(0.5, dtype=torch.float64))
    assert average.eq(0.5).all()


def test_the_operation_passes_torchs_own_checks():
    averages, tensors = [torch.zeros(3), torch.zeros(4)], [torch.ones(3), torch.ones(4)]
    decay = torch.tensor(0.5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fused_ema.lerp_, (averages, tensors, decay))
    torch.ops.fused_ema.lerp_(averages, tensors, decay)
    assert all(average.eq(0.5).all() for average in averages)


@pytest.mark.parametrize("way", ["function", "bound"])
def test_recorded_by_make_fx(way):
    ema, model = torch.zeros(3), torch.ones(3)
    handle = fused_ema.bind([ema], [model])

    def step(e, p):
        fused_ema.update([e], [p], 0.5) if way == "function" else handle.update(0.5)
        return e * 1

    graph = make_fx(step)(ema, model)
    assert any("lerp_" in str(node.target) for node in graph.graph.nodes)
    if way == "function":
        assert graph(torch.zeros(3), torch.ones(3)).tolist() == [0.5] * 3


def test_jit_trace_is_refused():
    def step(e, p):
        fused_ema.update([e], [p], 0.5)
        return e * 1

    with pytest.raises(RuntimeError, match=r"under torch\.jit\.trace"):
        torch.jit.trace(step, (torch.zeros(3), torch.ones(3)))
