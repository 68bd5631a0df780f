"""checkpoints.restore: what is taken from a state, and refusals that change nothing."""

import copy

import pytest
import torch
from checkpoint_checks import PARAMETERS, contents, good, net, ours, refuses, same, train, values_of
from conftest import all_averages, averages, refused, trained
from torch import nn

import fused_ema
from fused_ema.checkpoints import LAYOUTS, export, load, restore, save_safetensors
from fused_ema.checkpoints.layouts import BY_NAME
from fused_ema.posthoc import reconstruct, save_snapshot
from fused_ema.schedules import constant, inverse_power, power_function, tf_warmup


def test_a_state_without_a_count():
    """It is refused if the next update copies the model, whatever the schedule says about steps without an update."""
    state = {"state_dict_ema": net().state_dict()}
    restore(fused_ema.EMA(net(), inverse_power(0.999), update_every=4), state)  # 0 at step 1, more at step 4
    resumed = fused_ema.EMA(net(), power_function(0.1), update_every=4)
    for schedule, options in ((power_function(0.1), {"update_every": 4}), (constant(0.9), {"update_after_step": 1})):
        with pytest.raises(
            ValueError,
            match="has no count of steps, and the next update would copy",
        ):
            restore(fused_ema.EMA(net(), schedule, **options), state)
    for _ in range(5):
        resumed.update()
    restore(resumed, state)


def test_averages_that_are_replaced_give_no_warning(recwarn):
    """Neither of NaN in them, nor of weights that were loaded after an optimizer was attached."""
    ema = fused_ema.EMA(net(), 0.9)
    state = ema.averaged_state_dict()
    ema.attach(torch.optim.SGD(ema.model.parameters()))
    with torch.no_grad():
        ema.model.get_parameter(PARAMETERS[0]).fill_(torch.nan)
    ema.begin()
    with torch.no_grad():
        ema.model.get_parameter(PARAMETERS[0]).fill_(1)
    restore(ema, state, step=3)
    assert not recwarn
    assert same(averages(ema).values(), [state[name] for name in averages(ema)])


def test_schedules_stay_and_give_the_decay():
    state = {**good("ema_pytorch")[1], "step": torch.tensor(40)}
    for schedule, decay in [(inverse_power(0.7, start=2), 0.7), (lambda n: n / 100, 0.4), (tf_warmup(0.9), 41 / 50)]:
        ema = fused_ema.EMA(net(), schedule)
        restore(ema, state)
        assert ema.schedules == (schedule,)
        assert (ema.step, ema.decay) == (40, decay), "of update 40"


@pytest.mark.parametrize(
    ("layout", "key", "step"),
    [
        ("averaged_model", "n_averaged", 4 + 3 * 6),
        ("diffusers", "optimization_step", 7),
        ("ema_pytorch", "step", 7),
        ("torch_ema", "num_updates", 4 + 7),
        ("lit_ema", "num_updates", 4 + 7),
        ("mmengine", "steps", 7),
    ],
)
def test_counts_where_not_every_step_is_an_update(layout, key, step):
    ema = fused_ema.EMA(net(), tf_warmup(0.9), update_every=3, update_after_step=4)
    for seven in (7, torch.tensor(7), torch.tensor([7])):  # older versions of ema_pytorch have the last
        restore(ema, {**export(ema, layout), key: seven})
        assert ema.step == step
        assert (ema.update_every, ema.update_after_step) == (3, 4)
        assert export(ema, layout)[key] == 7
        restore(ema, {**export(ema, layout), key: 0})
        assert ema.step == export(ema, layout)[key] == 0


def test_values_for_what_is_not_averaged_are_not_read():
    ema, state = fused_ema.EMA(net(seed=1), select=lambda name, tensor: name.startswith("norm")), good()[1]
    before = contents(ema.model.state_dict())
    state["module.norm.running_mean"] = "not read"
    restore(ema, state)
    assert same(ours(ema), [state["module.norm.weight"], state["module.norm.bias"]])
    assert contents(ema.model.state_dict()) == before


def test_one_of_several_averages_is_restored():
    ema, state = fused_ema.EMA(net(seed=1), [0.5, 0.9, 0.99]), good()[1]
    train(ema.model)
    ema.update()
    others = copy.deepcopy([ours(ema, 0), ours(ema, 2)])
    restore(ema, state, index=1)
    assert same(ours(ema, 1), [state[f"module.{name}"] for name in PARAMETERS])
    assert same(ours(ema, 0), others[0])
    assert same(ours(ema, 2), others[1])
    for index in (-1, 3):
        with pytest.raises(IndexError, match="expected one of 3 averages"):
            restore(ema, state, index=index)


class Renamed(nn.Module):
    """Its state_dict has other names, and an extra state."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("cache", torch.randn(2), persistent=False)
        self.register_state_dict_post_hook(lambda self, state, *rest: state.update(w=state.pop("weight")))

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        pass


def test_names_are_those_of_the_state_dict():
    model = Renamed()
    ema = fused_ema.EMA(model, 0.9)
    state = {"state_dict_ema": {"w": torch.arange(3.0), "_extra_state": None}}
    restore(ema, state)
    assert contents(export(ema, "timm")) == contents(state)
    refuses(
        ema,
        {"state_dict_ema": {"weight": torch.arange(3.0)}},
        "missing from the state: 'weight'; unexpected in the state: 'weight'",
    )


# ---- Averaged weights by name


def test_every_dict_of_averaged_weights_is_taken(tmp_path):
    """Of a plain, a compiled and a DDP-wrapped manager, from memory and from files."""
    for wrap in (nn.Module.eval, torch.compile, nn.DataParallel):
        ema = trained(wrap(net()), buffers="average")
        save_safetensors(tmp_path / "x.safetensors", ema)
        torch.save(ema.averaged_state_dict(), tmp_path / "x.pt")
        weights = ema.averaged_state_dict()
        bare = {name: weights[key] for key, name in zip(weights, net().state_dict(), strict=True)}
        for state in (weights, bare, load(tmp_path / "x.safetensors"), load(tmp_path / "x.pt"), export(ema, "plain")):
            other = fused_ema.EMA(net(seed=5), buffers="average")
            restore(other, state)
            assert contents(averages(other)) == contents(averages(ema))
            assert other.step == 0
            restore(other, state, step=7)
            assert other.step == 7


def test_what_posthoc_reconstructs_is_taken(tmp_path):
    ema = fused_ema.EMA(net(), power_function(0.1))
    ema.update()
    save_snapshot(tmp_path, ema)
    other = fused_ema.EMA(net(seed=5), 0.9)
    restore(other, reconstruct(tmp_path, 0.1))
    assert same(ours(other), ours(ema))


def test_weights_whose_next_update_would_copy_need_a_step():
    state = net().state_dict()
    refuses(fused_ema.EMA(net(), inverse_power(0.9)), state, "'plain'", "no count of steps", "pass step=")
    restore(ema := fused_ema.EMA(net(), inverse_power(0.9)), state, step=10)
    assert ema.step == 10


def test_weights_of_another_model_are_refused():
    state = net().state_dict()
    other = {key.replace("middle", "center"): value for key, value in state.items()}
    refuses(fused_ema.EMA(net()), other, "missing from the state: 'middle.weight', 'middle.bias'", "'center.weight'")
    state["middle.bias"] = torch.zeros(3)
    refuses(fused_ema.EMA(net()), state, "'middle.bias': expected shape (4,), found (3,)")


def test_a_managers_own_state_is_sent_to_load_state_dict():
    ema = fused_ema.EMA(net())
    refuses(ema, ema.state_dict(), "call ema.load_state_dict(state)")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_state_dict_sends_other_states_to_restore(layout):
    ema, state = good(layout)
    called = "checkpoints.restore(ema, state)"
    refused(ValueError, lambda: ema.load_state_dict(state), ema.model, *all_averages(ema), names=[called])
    restore(ema, state, step=1)  # as the error says
    whole = {"model": ema.model.state_dict(), "ema": ema.state_dict()}
    with pytest.raises(ValueError, match="such a state is in it under 'ema'"):
        ema.load_state_dict(whole)
    ema.load_state_dict(whole["ema"])
    del whole["ema"]["step"]
    with pytest.raises(ValueError, match=r"missing from the state: 'step'$"):
        ema.load_state_dict(whole["ema"])


# ---- Other packages' checkpoints, as their training scripts write them


def test_the_teacher_of_dino():
    """Of a script that wraps backbone and head into one module, each with or without DDP."""

    class Wrapper(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.backbone, self.head = net(seed=seed), nn.Linear(4, 2)

    teacher, wanted = Wrapper(1), net(seed=1)
    for source in (teacher, nn.DataParallel(teacher)):
        checkpoint = {"student": Wrapper(2).state_dict(), "teacher": source.state_dict(), "epoch": 3}
        for model in (Wrapper(3), nn.DataParallel(Wrapper(3))):
            ema = fused_ema.EMA(model)
            restore(ema, checkpoint)
            found = [*averages(ema).values()]
            assert same(found, [tensor for _, tensor in teacher.named_parameters(remove_duplicate=False)])
        for state in (checkpoint, checkpoint["teacher"]):  # a backbone alone leaves the head
            restore(ema := fused_ema.EMA(nn.DataParallel(net())), state)
            assert same(ours(ema), wanted.parameters())
    del checkpoint["teacher"]["module.backbone.middle.bias"]
    refuses(fused_ema.EMA(net()), checkpoint, "missing from the state: 'middle.bias'")


def test_the_checkpoint_of_mmengines_hook():
    """It has the averages as the model's state, and the model's own weights as the averages'."""
    average, model = net(seed=1).state_dict(), net(seed=2).state_dict()
    checkpoint = {
        "meta": {"iter": 9},
        "state_dict": average,
        "ema_state_dict": {"steps": torch.tensor(9), **{f"module.{key}": value for key, value in model.items()}},
    }
    ema = fused_ema.EMA(net(), buffers="average", update_after_step=1)
    restore(ema, checkpoint)
    assert ema.step == 9
    assert same(averages(ema).values(), [average[name] for name in averages(ema)])


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 2}])
def test_lit_ema_in_the_state_of_a_lightning_module(wrap):
    ema, state = good("lit_ema")
    whole = {f"model.{name}": value for name, value in net(seed=8).state_dict().items()}
    whole |= {f"model_ema.{name}": value for name, value in state.items()}
    restore(other := fused_ema.EMA(net(seed=9), tf_warmup(0.9)), wrap(whole))
    assert same(ours(other)[1:], ours(ema)[1:])
    assert other.step == ema.step == 1
    assert same(ours(other)[:1], [other.model.frozen]), "which LitEma leaves out"
    whole["model_ema.num_updates"] = torch.tensor(-1)  # of use_num_updates=False
    restore(other := fused_ema.EMA(net(seed=9), 0.9), wrap(whole))
    assert other.step == 0
    del whole["model_ema.middlebias"]
    refuses(other, wrap(whole), "missing from the state: 'middle.bias'")


# ---- Tied tensors


def test_one_tied_name_is_enough():
    for key in ("module.embed.weight", "module.head.weight"):
        ema, state = fused_ema.EMA(net(seed=1)), good()[1]
        wanted = [state[f"module.{name}"] for name in PARAMETERS]
        del state[key]
        restore(ema, state)
        assert same(ours(ema), wanted)
    state = {key: value for key, value in state.items() if not key.endswith(("embed.weight", "head.weight"))}
    refuses(fused_ema.EMA(net()), state, "missing from the state: 'embed.weight', 'head.weight'")


def test_tied_names_with_two_values():
    ema, state = good()
    state["module.head.weight"] = state["module.embed.weight"] + 1
    refuses(ema, state, "'head.weight'", "tied")
    state["module.head.weight"] = torch.zeros(2, 2)
    refuses(ema, state, "'head.weight': expected shape (7, 4), found (2, 2)")
    state["module.head.weight"] = state.pop("module.embed.weight")
    state["module.embed.weight"] = torch.zeros(2, 2)
    refuses(ema, state, "'embed.weight': expected shape (7, 4), found (2, 2)")
    state["module.embed.weight"] = torch.full((7, 4), torch.nan)
    state["module.head.weight"] = torch.full((7, 4), torch.nan)
    restore(ema, state)
    assert ours(ema)[1].isnan().all()


# ---- What is refused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3,), (1, 4), (), (0,)], ids=str)
def test_wrong_shapes(layout, shape):
    ema, state = good(layout)
    values, at = values_of(layout, state)
    values[at] = torch.zeros(shape)
    word = at if isinstance(at, str) else "shadow_params[5]"
    refuses(ema, state, word.removeprefix(getattr(BY_NAME[layout], "prefix", "")), "(4,)", str(shape))


@pytest.mark.parametrize("layout", ["averaged_model", "timm", "ema_pytorch", "mmengine", "dino", "plain"])
def test_other_names(layout):
    ema, state = good(layout)
    values, _ = values_of(layout, state)
    prefix = BY_NAME[layout].prefix
    values[f"{prefix}a.weight"] = torch.zeros(4)
    refuses(ema, state, "unexpected in the state: 'a.weight'")
    del values[f"{prefix}norm.weight"]
    values[f"{prefix}b.weight"] = values.pop(f"{prefix}middle.bias")
    missing, unexpected = "'norm.weight', 'middle.bias'", "'a.weight', 'b.weight'"
    refuses(ema, state, f"missing from the state: {missing}; unexpected in the state: {unexpected}")


@pytest.mark.parametrize("layout", ["diffusers", "torch_ema"])
def test_other_positions(layout):
    ema, state = good(layout)
    shadows = state["shadow_params"]
    for others in (shadows[:-1], [*shadows, torch.zeros(4)], []):
        refuses(ema, {**state, "shadow_params": others}, "expected 6 tensors", f"found {len(others)}")
    moved = {**state, "shadow_params": [shadows[i] for i in (1, 0, 2, 3, 4, 5)]}
    refuses(ema, moved, "'shadow_params[0]': expected shape (3,), found (7, 4)", "'shadow_params[1]'")
    some = fused_ema.EMA(net(), select=lambda name, tensor: name == "norm.bias")
    refuses(some, moved, "'shadow_params[0]'", "'shadow_params[1]'")  # though neither is averaged


@pytest.mark.parametrize(
    "state", [None, 3, "n_averaged", [1], torch.zeros(2), object()], ids=lambda state: type(state).__name__
)
def test_states_that_are_not_dicts(state):
    for layout in (None, *LAYOUTS):
        ema, whole = good(layout or "timm")
        refuses(ema, state, "expected a dict", type(state).__name__, error=TypeError, layout=layout)
        if layout == "timm":
            refuses(ema, {"state_dict_ema": state}, type(state).__name__, error=TypeError)
        elif layout in ("diffusers", "torch_ema") and not isinstance(state, list):
            refuses(ema, {**whole, "shadow_params": state}, type(state).__name__, error=TypeError)
        elif layout == "averaged_model":
            refuses(ema, {**whole, 3: state}, "by name", error=TypeError)


def test_unknown_and_ambiguous_layouts():
    ema, state = good()
    for keys in ({}, {"a": 1}, {1: 2}, {"shadow_params": []}, {"module.x": 1, "step": 2}):
        refuses(ema, keys, *LAYOUTS, *map(repr, keys))
    refuses(ema, {str(i): i for i in range(20)}, "'4' and 15 more")
    refuses(ema, {**state, "state_dict_ema": {}}, "averaged_model and timm")
    refuses(ema, state, *LAYOUTS, "'swa'", layout="swa")
    refuses(ema, state, "the layout 'diffusers'", "optimization_step", "n_averaged", layout="diffusers")
    restore(ema, {**state, "state_dict_ema": {}}, "averaged_model")
    with pytest.raises(ValueError, match=r"expected one of averaged_model, timm, .*, plain, found 'swa'"):
        export(ema, "swa")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, TypeError),
        (1.5, TypeError),
        ([[1.0]], TypeError),
        (torch.zeros(4, device="meta"), ValueError),
        (torch.zeros(4).to_sparse(), TypeError),
        (torch.zeros(4, dtype=torch.complex64), ValueError),
        (torch.zeros(4, dtype=torch.int64), ValueError),
    ],
    ids=["None", "number", "list", "meta", "sparse", "complex", "integer"],
)
def test_values_that_do_not_fit(layout, value, error):
    ema, state = good(layout)
    values, at = values_of(layout, state)
    values[at] = value
    refuses(ema, state, error=error)


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if BY_NAME[each].count])
@pytest.mark.parametrize("count", [-2, 1.5, True, "7", [], torch.tensor([1, 2]), torch.tensor(0.5), torch.tensor(-3)])
def test_invalid_counts(layout, count):
    ema, state = good(layout)
    key = BY_NAME[layout].count
    refuses(ema, {**state, key: count}, key, "whole number")


def test_names_that_are_equal_without_wrappers():
    ema, state = good("timm")
    state["state_dict_ema"]["module.middle.bias"] = torch.zeros(4)
    refuses(ema, state, "unexpected in the state: 'module.middle.bias'")


def test_a_schedule_that_fails_changes_nothing():
    ema = fused_ema.EMA(net(), lambda n: 0.5 if n < 5 else 2.0)
    refuses(ema, {**good()[1], "n_averaged": 6}, "2.0")
