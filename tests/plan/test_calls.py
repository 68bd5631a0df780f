"""What a call does besides the arithmetic: version counters, PyTorch's modes, swap_ and describe()."""

import pytest
import torch
from conftest import bits, label, net, refused, same_bits, source, versions
from torch import nn

import fused_ema

# ---- Autograd


@pytest.mark.hazard(24, "good")
def test_version_counters(update):
    ema, model = net(), net()
    before = versions(ema), versions(model)
    update(ema, model, 0.5)
    assert versions(ema) == [version + 1 for version in before[0]]
    assert versions(model) == before[1]
    fused_ema.copy_(ema, model)
    assert versions(ema) == [version + 2 for version in before[0]]
    fused_ema.swap_(ema, model)
    assert versions(ema) == [version + 3 for version in before[0]]
    assert versions(model) == [version + 1 for version in before[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_version_counter_of_a_large_average(update, dtype):
    e, p = torch.ones(300_000, dtype=dtype), torch.zeros(300_000, dtype=dtype)
    update([e], [p], 0.5)
    assert e._version == 1


@pytest.mark.parametrize("decay", [1, 1.0, torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_decay_1_writes_nothing_and_leaves_the_counters(update, decay, buffers):
    ema, model = net(), net()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    values, counters = bits(ema), versions(ema)
    update(ema, model, decay, buffers=buffers)
    assert same_bits(values, ema)
    assert versions(ema) == counters


@pytest.mark.hazard(24, "guarded")
def test_backward_through_a_changed_average_is_an_error(update):
    ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
    loss = (ema.weight**2).sum()
    update(ema, model, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_through_the_model_still_works(update):
    ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
    loss = (model.weight**2).sum() + (model.bias**3).sum()
    update(ema, model, 0.5)
    loss.backward()
    assert torch.equal(model.weight.grad, 2 * model.weight)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_leaves_that_require_grad_views_and_results(update, kind, decay):
    leaf, other = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    ema = {"leaf": other, "row": leaf[0], "result": torch.ones(2, requires_grad=True) * 1}
    model = {
        "leaf": torch.zeros(2, requires_grad=True),
        "row": leaf.detach().new_zeros(2),
        "result": other.new_zeros(2),
    }
    version = leaf._version
    update(source(kind, ema), source(kind, model), decay)
    assert all(tensor.tolist() == [decay] * 2 for tensor in ema.values())
    assert leaf._version == version + 1
    assert other.is_leaf
    assert other.grad_fn is None
    assert not any(tensor.requires_grad for tensor in (model["row"], model["result"]))


def test_averages_from_unbind(update):
    leaf = torch.ones(2, 3, requires_grad=True)
    update(list(leaf.unbind()), [torch.zeros(3), torch.full((3,), 2.0)], 0.5)
    assert leaf.tolist() == [[0.5] * 3, [1.5] * 3]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_grad_mode_changes_nothing(update, mode):
    ema, model = net(), net()
    before = versions(ema)
    with mode():
        update(ema, model, 0.0)
    assert same_bits(bits(model), ema)
    assert versions(ema) == [version + 1 for version in before]
    assert ema[0].weight.requires_grad
    assert ema[0].weight.grad_fn is None


# ---- Autocast and the transforms of torch.func


@pytest.mark.hazard(26, "good")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(update, dtype):
    e, p = torch.randn(1000), torch.randn(1000)
    expected = e.clone()
    update([expected], [p], 0.9)
    with torch.autocast("cpu", dtype=dtype):
        update([e], [p], 0.9)
    assert torch.equal(e, expected)


KEPT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),  # 16-bit copies of tensors that require grad
    "parametrized": torch.nn.utils.parametrize.cached,  # what parametrizations gave
}
CALLS = {
    "update": lambda teacher, student: fused_ema.update(teacher, student, 0.0),
    "copy_": fused_ema.copy_,
    "swap_": fused_ema.swap_,
    "bind": lambda teacher, student: fused_ema.bind(teacher, student).update(0.0),
    "lists": lambda teacher, student: fused_ema.update([*teacher.parameters()], [*student.parameters()], 0.0),
}


@pytest.mark.hazard(26, "good")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kept", KEPT)
def test_what_pytorch_keeps_of_a_teacher_is_forgotten(backend, call, kept):
    student, teacher = (torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2))
    x = torch.randn(4, 3)
    CALLS[call](teacher.requires_grad_(False), student)
    teacher.requires_grad_()  # the plan is there already
    for _ in range(2):
        with torch.no_grad():
            for tensor in student.parameters():
                tensor.add_(1)
        with KEPT[kept]():
            wanted = student(x)
        with KEPT[kept]():
            teacher(x)
            CALLS[call](teacher, student)
            assert torch.equal(teacher(x), wanted)


def test_autocast_sees_a_replaced_teacher_that_requires_grad(backend):
    """Though the one it replaced did not, of which autocast keeps no copy."""
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    x, handle = torch.randn(4, 3), fused_ema.bind(teacher, student)
    handle.update(0.5)
    for name, parameter in dict(teacher.named_parameters()).items():
        setattr(teacher, name, nn.Parameter(torch.zeros_like(parameter)))
    handle.update(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        teacher(x)
        handle.update(0.0)
        assert torch.equal(teacher(x), student(x))


@pytest.mark.hazard(26, "guarded")
@pytest.mark.parametrize("batched", ["ema", "model", "both"])
def test_vmap_is_refused(backend, kind, batched):
    e, p = torch.ones(3, 2) if batched != "model" else torch.ones(2), torch.zeros(3, 2)

    where = f"{'model' if batched == 'model' else 'ema'}{label(kind, 'w', 0)}"
    for operation in (lambda e, m: fused_ema.update(e, m, 0.5), fused_ema.copy_, fused_ema.bind):

        def one(e, p, operation=operation):
            operation(source(kind, {"w": e}), source(kind, {"w": p if batched != "ema" else p.new_zeros(2)}))
            return p

        mapped = torch.vmap(one, in_dims=(None if batched == "model" else 0, 0))
        refused(RuntimeError, lambda run=mapped: run(e, p), e, p, names=[where, "vmap", "expected", "found"])


def test_grad_transform_is_refused(update):
    e, p = torch.ones(2), torch.ones(2)
    transformed = torch.func.grad(lambda p: (update([e], [p], 0.5), p.sum())[1])
    refused(RuntimeError, lambda: transformed(p), e, p, names=["model[0]", "torch.func"])


# ---- swap_


def test_swap_leaves_ignored_buffers(backend):
    ema, model = net(), net()
    buffers = bits(*ema.buffers(), *model.buffers())
    fused_ema.swap_(ema, model, buffers="ignore")
    assert same_bits(buffers, *ema.buffers(), *model.buffers())


def test_swap_does_not_reach_a_lazy_clone_of_the_model(backend):
    # A lazy clone shares the tensor's memory until one of them is written to.
    ema, model = [torch.ones(4)], [torch.zeros(4)]
    handle = fused_ema.bind(ema, model)
    handle.swap_()
    clone = model[0]._lazy_clone()
    handle.swap_()
    assert clone.tolist() == [1.0] * 4
    assert model[0].tolist() == [0.0] * 4
    clone = ema[0]._lazy_clone()
    handle.update(0.5)
    assert clone.tolist() == [1.0] * 4


# ---- describe()


@pytest.mark.hazard(11, "good")
def test_describe_counts_what_an_update_does(backend):
    ema, model = net(), net()
    model[2].to(torch.bfloat16)
    ema.register_parameter("tied", ema[0].weight), model.register_parameter("tied", model[0].weight)
    ema.register_buffer("empty", torch.empty(0)), model.register_buffer("empty", torch.empty(0))
    about = fused_ema.bind(ema, model).describe()
    averaged = 12 + 4 + 4 + 4 + 8 + 2  # elements
    assert about["backend"] == backend
    assert about["devices"] == ["cpu"]
    assert about["averaged"] == 6
    assert about["copied"] == 3
    assert about["tensors"] == 9
    assert about["elements"] == averaged + 4 + 4 + 1
    assert about["bytes_per_update"] == 24 * 12 + 10 * 10 + 8 * 8 + 16
    assert about["launches_per_update"] == (1 if backend != "torch" else 4 + 2 * 2 + 3)  # bfloat16 is cast first
    assert about["dtypes"] == {"float32←float32": 4, "float32←bfloat16": 2}
    assert "9 tensors" in repr(fused_ema.bind(ema, model))


def test_describe_hands_out_copies(backend):
    handle = fused_ema.bind([torch.ones(2)], [torch.zeros(2)])
    handle.describe()["devices"].append("cuda:7")
    handle.describe()["dtypes"].clear()
    assert handle.describe()["devices"] == ["cpu"]
    assert handle.describe()["dtypes"] == {"float32←float32": 1}
