"""Programs exported inside swapped(), which share the model's memory: a warning; and the way that is right."""

import copy
import gc
import warnings

import pytest
import torch
from conftest import same_values, trained
from torch import nn

from fused_ema.manager.programs import programs_on

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
X = torch.randn(3, 4)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def inside(what, mode=torch.no_grad):
    """What `what(model)` returns inside swapped(), and the warnings; and its output there, and the model's after."""
    model = net()
    ema = trained(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ema.swapped(), mode():
            result, averaged = what(model), model(X).detach()
    found = [str(each.message) for each in caught if "EMA.swapped" in str(each.message)]
    return result, found, averaged, model(X).detach()


EXPORTS = {
    "export": lambda model: torch.export.export(model, (X,)),
    "export, strict": lambda model: torch.export.export(model, (X,), strict=True),
    "export, decomposed": lambda model: torch.export.export(model, (X,)).run_decompositions(),
    "trace": lambda model: torch.jit.trace(model, X),
    "script": lambda model: torch.jit.script(model),
}


SLOW = pytest.mark.slow


@pytest.mark.hazard(50, "guarded")
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("export", torch.no_grad),
        pytest.param("export", torch.enable_grad, marks=SLOW),
        pytest.param("export, strict", torch.no_grad, marks=SLOW),
        pytest.param("export, decomposed", torch.no_grad, marks=SLOW),
        ("trace", torch.no_grad),
        ("trace", torch.enable_grad),
        ("trace", torch.inference_mode),
        ("script", torch.no_grad),
    ],
)
def test_a_program_that_aliases_the_model_is_named(kind, mode):
    program, found, averaged, raw = inside(EXPORTS[kind], mode)
    (message,) = found
    assert ("ExportedProgram" if "export" in kind else "ScriptModule") in message
    run = program.module() if "export" in kind else program
    assert torch.equal(run(X), raw)
    assert not torch.equal(run(X), averaged), "what the warning is about"


@pytest.mark.parametrize(
    "what",
    [
        lambda model: model(X),
        lambda model: [model(X), model.state_dict(), list(model.parameters())],
        lambda model: torch.export.export(model, (X,)) and None,  # saved, say, and dropped
        pytest.param(lambda model: torch.export.export(model, (X,), strict=True) and None, marks=SLOW),
        lambda model: torch.jit.trace(model, X) and None,
        lambda model: torch.jit.trace(copy.deepcopy(model), X),
        lambda model: [list(model.parameters()), torch.jit.trace(net(), X)],
    ],
    ids=["graph", "lists", "dropped", "dropped, strict", "dropped trace", "a copy", "another model's"],
)
def test_what_is_no_program_on_the_models_memory_is_not_named(what):
    assert not inside(what, torch.enable_grad)[1]


def test_a_program_from_before_is_not_named():
    model = net()
    ema = trained(model)
    program = torch.export.export(model, (X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with ema.swapped():
            averaged = model(X)
            assert torch.equal(program.module()(X), averaged)


def test_evaluations_that_keep_a_graph_never_look_at_all_objects(monkeypatch):
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("looked at all objects"))
    inside(lambda model: [model(X), model(X), model.state_dict()], torch.enable_grad)
    with pytest.raises(pytest.fail.Exception):
        programs_on([])


# ---- The recipe of docs/frameworks.md, whose block runs in tests/docs


@pytest.fixture
def recipe():
    """A copy that copy_to has filled, and its output; afterwards the model is another."""
    model = net()
    ema = trained(model)
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged)
    with ema.swapped():
        wanted = model(X).detach()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    ema.update()
    return averaged, wanted


def test_a_copy_for_torch_export(recipe, tmp_path):
    averaged, wanted = recipe
    torch.export.save(torch.export.export(averaged, (X,)), tmp_path / "x.pt2")
    assert torch.equal(torch.export.load(tmp_path / "x.pt2").module()(X), wanted)


def test_a_copy_for_torchscript(recipe, tmp_path):
    averaged, wanted = recipe
    for script in (torch.jit.trace(averaged, X), torch.jit.script(averaged)):
        torch.jit.freeze(script).save(tmp_path / "x.pt")
        assert torch.equal(torch.jit.load(tmp_path / "x.pt")(X), wanted)


def test_a_copy_for_onnx(recipe, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    averaged, wanted = recipe
    torch.onnx.export(averaged, (X,), tmp_path / "x.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-6)


def test_save_pretrained(tmp_path):
    """Of the copy, of the model inside swapped(), and with the averages as its state."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LevitConfig(
        image_size=32, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4]
    )
    model = transformers.LevitForImageClassification(config)
    ema = trained(model)
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged)
    averaged.save_pretrained(tmp_path / "copy")
    with ema.swapped():
        model.save_pretrained(tmp_path / "swapped")
    model.save_pretrained(tmp_path / "state", state_dict=ema.averaged_state_dict())
    for folder in ("copy", "swapped", "state"):
        found = transformers.LevitForImageClassification.from_pretrained(tmp_path / folder)
        same_values(found.state_dict(), ema.averaged_state_dict())
