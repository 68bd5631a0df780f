"""A compiled model computes with what the model holds: before, inside and after swapped(), without compiling again."""

import copy

import pytest
import torch
import torch._dynamo
from conftest import parameters, trained
from oracle import same_bits
from torch import nn
from torch._dynamo.utils import counters

from fused_ema import EMA

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)  # it compiles C++
COMPILERS = pytest.mark.parametrize("compiler", ["eager", "aot_eager", INDUCTOR])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network(dtype):
    """Convolutions, statistics, attention and a tied weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, padding=1),
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
        nn.Linear(64, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 10),
    )
    model[6].weight = model[5].weight
    return model.to(dtype).eval()


def compiled_frames():
    return counters["stats"]["unique_graphs"], counters["frames"]["total"]


def check(model, ema, run, x, compiler, index=0):
    """`run` is the compiled model. What another compiled model gives that holds the same from the start is the bits to
    expect: eager and aot_eager call the model's own operations, inductor others."""
    with torch.no_grad():
        own = run(x).clone()
        count = compiled_frames()
        assert count[0] >= 1
        for _ in range(2):
            with ema.swapped(index):
                inside, plainly = run(x).clone(), model(x)
            assert compiled_frames() == count, "compiled again"
            if compiler in ("eager", "aot_eager"):
                assert same_bits(inside, plainly)
            assert not same_bits(inside, own)
            assert same_bits(run(x), own)
            assert compiled_frames() == count, "compiled again"
        averaged = copy.deepcopy(model)
        ema.copy_to(averaged, index)
        torch._dynamo.reset()
        assert same_bits(torch.compile(averaged, backend=compiler)(x), inside)


@COMPILERS
@pytest.mark.parametrize("options", [{}, {"decay": [0.9, 0.5]}, {"buffers": "average"}], ids=str)
def test_a_model_compiled_before(compiler, options):
    model = network(torch.float32)
    run = torch.compile(model, backend=compiler)
    with torch.no_grad():
        run(X)
    ema = trained(model, **options)
    check(model, ema, run, X, compiler, index=len(ema.schedules) - 1)


@COMPILERS
def test_averages_of_another_type(compiler):
    """The values of bfloat16 parameters wait in scratch memory, and the averages are written in their place."""
    model = network(torch.bfloat16)
    check(model, trained(model), torch.compile(model, backend=compiler), X.bfloat16(), compiler)


@COMPILERS
def test_a_compiled_model_that_is_averaged(compiler):
    """The manager has the wrapper that torch.compile returns; and model.compile() makes none."""
    for make in (lambda model: torch.compile(model, backend=compiler), lambda model: model):
        model = make(network(torch.float32))
        if not hasattr(model, "_orig_mod"):
            model.compile(backend=compiler)
        ema = trained(model)
        with torch.no_grad():
            own = model(X).clone()
            count = compiled_frames()
            with ema.swapped():
                inside = model(X).clone()
            assert same_bits(model(X), own)
            assert not same_bits(inside, own)
            assert compiled_frames() == count


@COMPILERS
def test_a_model_first_compiled_inside(compiler):
    model = network(torch.float32)
    ema = trained(model)
    run = torch.compile(model, backend=compiler)
    with torch.no_grad():
        with ema.swapped():
            inside = run(X).clone()
        count = compiled_frames()
        own = run(X).clone()
        assert not same_bits(own, inside)
        with ema.swapped():
            assert same_bits(run(X), inside)
        assert same_bits(run(X), own)
        assert compiled_frames() == count, "compiled again"


@COMPILERS
def test_training_goes_on_in_between(compiler):
    """One program for training and one for evaluation, whatever is swapped."""
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = torch.compile(model, backend=compiler)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    counts = []
    for _ in range(4):
        run(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with ema.swapped(), torch.no_grad():
            inside = run(X).clone()
        with torch.no_grad():
            assert not same_bits(run(X), inside)
        counts.append(compiled_frames())
    assert counts[1:] == counts[:1] * 3


@pytest.mark.slow
def test_a_frozen_program_keeps_weights_of_its_own():
    """What docs/frameworks.md warns of: inductor's freezing folds the convolution and its statistics into constants,
    which no swap reaches. A copy that is compiled with the averages has them."""
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        model = network(torch.float32)[:4].append(nn.Linear(64, 10)).eval()  # it can't freeze the encoder
        ema = trained(model)
        run = torch.compile(model)
        run(X)
        with ema.swapped():
            inside, plainly = run(X).clone(), model(X)
        assert (inside - plainly).abs().max() > 0.1
        averaged = copy.deepcopy(model)
        ema.copy_to(averaged)
        torch._dynamo.reset()
        assert (torch.compile(averaged)(X) - plainly).abs().max() < 1e-5 * plainly.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["cudagraphs", "inductor", "reduce-overhead"])
def test_on_a_gpu(compiler):
    """CUDA graphs replay with the addresses that they were captured with, which a swap keeps."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    model = network(torch.float32).cuda()
    options = {"mode": compiler} if compiler == "reduce-overhead" else {"backend": compiler}
    run, x = torch.compile(model, **options), X.cuda()
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor))
    ema.update()
    places = [tensor.data_ptr() for tensor in parameters(model).values()]
    with torch.no_grad():
        for _ in range(3):  # warm-up, capture, replay
            own = run(x).clone()
        count = compiled_frames()
        for _ in range(2):
            with ema.swapped():
                inside, plainly = run(x).clone(), model(x)
            torch.testing.assert_close(inside, plainly, rtol=1e-3, atol=1e-3)
            assert not same_bits(inside, own)
            assert same_bits(run(x).clone(), own)
            assert compiled_frames() == count
    assert places == [tensor.data_ptr() for tensor in parameters(model).values()]
