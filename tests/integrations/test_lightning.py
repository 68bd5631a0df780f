"""The callback for Lightning, with its real trainer."""

import copy
import re
import warnings

import pytest
import torch
from conftest import same_values
from torch import nn

import fused_ema

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402

from fused_ema.integrations.lightning import EMACallback  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.validated, self.tested, self.averages = [], [], []

    def training_step(self, batch, _):
        return self.network(batch).square().mean()

    def validation_step(self, batch, _):
        self.validated.append(values(self))

    def on_validation_epoch_end(self):
        self.validated.append(values(self))

    def test_step(self, batch):
        self.tested.append(values(self))

    def predict_step(self, batch, _):
        return self.network(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def values(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def data(count=6):
    batches = torch.randn(count, 16, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(batches, batch_size=None)


def trainer(tmp_path, *callbacks, **options):
    options = {
        "max_epochs": 2,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning.Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_hand(epochs, accumulate=1, decay=0.9):
    """The same training without a trainer."""
    module = Module()
    module.train()
    optimizer = module.configure_optimizers()
    ema = {name: value.clone() for name, value in values(module).items()}
    for _ in range(epochs):
        for i, batch in enumerate(data()):
            (module.training_step(batch, 0) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                fused_ema.update(ema, values(module), decay)
    return module, ema


@pytest.mark.parametrize("accumulate", [1, 3])
def test_averages_follow_each_step_and_validation_uses_them(tmp_path, accumulate):
    callback, module = EMACallback(decay=0.9), Module()
    trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(module, data(), data(1))
    expected, averages = by_hand(2, accumulate)
    same_values(values(module), values(expected))
    same_values(callback.ema.state_dict()["averages"][0], averages)
    assert callback.ema.step == 12 // accumulate
    same_values(module.validated[-1], averages)
    same_values(module.validated[-2], averages)
    trainer(tmp_path, callback).test(module, data(1), verbose=False)
    same_values(module.tested[-1], averages)
    same_values(values(module), values(expected))


def test_evaluate_false_leaves_the_model(tmp_path):
    callback, module = EMACallback(decay=0.9, evaluate=False), Module()
    trainer(tmp_path, callback).fit(module, data(), data(1))
    same_values(module.validated[-1], values(module))


@pytest.mark.parametrize("save", ["model", "average"])
def test_checkpoints_hold_either_copy(tmp_path, save):
    callback, module = EMACallback(decay=0.9, save=save), Module()
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, callback, keeper).fit(module, data(), data(1))
    expected = callback.ema.averaged_state_dict() if save == "average" else module.state_dict()
    loaded = torch.load(keeper.last_model_path, weights_only=True)["state_dict"]
    same_values({name: loaded[name] for name in values(module)}, {name: expected[name] for name in values(module)})
    same_values(values(Module.load_from_checkpoint(keeper.last_model_path)), {n: expected[n] for n in values(module)})


@pytest.mark.parametrize("save", ["model", "average"])
def test_resumed_training_has_the_same_bits(tmp_path, save):
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, EMACallback(decay=0.9, save=save), keeper, max_epochs=1).fit(Module(), data(), data(1))
    callback, module = EMACallback(decay=0.9, save=save), Module()
    trainer(tmp_path, callback, max_epochs=2).fit(module, data(), data(1), ckpt_path=keeper.last_model_path)
    expected, averages = by_hand(2)
    same_values(values(module), values(expected))
    same_values(callback.ema.state_dict()["averages"][0], averages)
    assert callback.ema.step == 12


@pytest.mark.parametrize("whose", ["saved", "mine"])
def test_another_decay_on_resume(tmp_path, whose):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, EMACallback(0.9), saving).fit(Module(), data())
    callback = EMACallback(0.5, update_every=2, schedules=whose)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, max_epochs=3).fit(Module(), data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    texts = [str(each.message) for each in caught if "the state was saved" in str(each.message)]
    assert len(texts) == (whose == "saved")
    assert all("decay=0.9, update_every=1," in text and "decay=0.5, update_every=2;" in text for text in texts)
    assert callback.ema.schedules == (fused_ema.schedules.constant(0.9 if whose == "saved" else 0.5),)
    assert callback.ema.update_every == (1 if whose == "saved" else 2)
    with warnings.catch_warnings():  # to test an average, no decay matters
        warnings.filterwarnings("error", message="EMA:")
        trainer(tmp_path, EMACallback(0.3)).test(Module(), data(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


def test_an_exception_in_validation_restores_the_model(tmp_path):
    class Breaks(Module):
        def validation_step(self, batch, _):
            super().validation_step(batch, _)
            raise ZeroDivisionError

    callback, module = EMACallback(decay=0.9), Breaks()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callback, num_sanity_val_steps=0).fit(module, data(), data(1))
    expected, averages = by_hand(1)
    same_values(module.validated[-1], averages)
    same_values(values(module), values(expected))


def test_a_wrong_copy_is_refused():
    with pytest.raises(ValueError, match="save: expected 'model' or 'average', found 'ema'"):
        EMACallback(save="ema")


def test_a_checkpoint_of_lightnings_own_callback_goes_on(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    keeper, theirs = ModelCheckpoint(tmp_path, save_last=True), EMAWeightAveraging(decay=0.9)
    trainer(tmp_path, theirs, keeper, max_epochs=1).fit(Module(), data(), data(1))
    saved = torch.load(keeper.last_model_path, weights_only=True)
    callback, module = EMACallback(decay=0.9, buffers="average"), Module()
    started = []
    module.on_train_start = lambda: started.append((values(module), copy.deepcopy(callback.ema.averaged_state_dict())))
    trainer(tmp_path, callback, max_epochs=2).fit(module, data(), data(1), ckpt_path=keeper.last_model_path)
    model, averages = started[0]
    same_values(model, {name: saved["current_model_state"][name] for name in model})
    same_values({name: averages[name] for name in model}, {name: saved["state_dict"][name] for name in model})
    assert callback.ema.step == 12


@pytest.mark.parametrize("save", ["model", "average"])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_average_of_the_checkpoint_is_tested(tmp_path, save, fresh):
    averages = {}

    class Noting(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            averages[trainer.current_epoch] = copy.deepcopy(callback.ema.state_dict()["averages"][0])

    callback, keep = EMACallback(decay=0.9, save=save), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    module = Module()
    run = trainer(tmp_path, callback, keep, Noting())
    run.fit(module, data())
    final = copy.deepcopy(averages[1])
    if fresh:
        module, callback = Module(), EMACallback(decay=0.9, save=save)
        run = trainer(tmp_path, callback)
    run.test(module, data(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    same_values(module.tested[0], {name: averages[0][name] for name in module.tested[0]})
    assert not torch.equal(module.tested[0]["network.0.weight"], final["network.0.weight"])
    module.tested.clear()
    if not fresh:
        run.test(module, data(), verbose=False)
        same_values(module.tested[0], {name: final[name] for name in module.tested[0]})


def test_a_checkpoint_without_averages_gives_a_warning(tmp_path):
    plain = trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"))
    plain.fit(Module(), data())
    with pytest.warns(UserWarning, match="has no averages; new ones start here"):
        trainer(tmp_path, EMACallback(), max_epochs=3).fit(Module(), data(), ckpt_path=tmp_path / "plain.ckpt")
    module = Module()
    with pytest.warns(UserWarning, match="has no averages beside its weights, which are used"):
        trainer(tmp_path, EMACallback()).test(module, data(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    same_values(module.tested[0], values(module))


@pytest.mark.parametrize("save", ["model", "average"])
def test_a_checkpoint_written_during_validation_has_the_trained_weights(tmp_path, save):
    class Saving(lightning.Callback):
        def on_validation_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt")
            assert callback.ema.describe()["swapped"] == 0

        def on_validation_end(self, trainer, module):  # before the callback's
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    callback = EMACallback(decay=0.9, save=save)
    module = Module()
    trainer(tmp_path, Saving(), callback, num_sanity_val_steps=0).fit(module, data(), data(2))
    for file in ("inside.ckpt", "end.ckpt"):
        saved = torch.load(tmp_path / file, weights_only=True)
        trained = saved["state_dict" if save == "model" else "current_model_state"]
        same_values({name: trained[name] for name, _ in module.named_parameters()}, values(module))
        if save == "average":
            averages = callback.ema.state_dict()["averages"][0]
            same_values({name: saved["state_dict"][name] for name in averages}, averages)


@pytest.mark.parametrize("again", [False, True])
def test_another_fit_after_an_exception(tmp_path, again):
    class Failing(Module):
        fails = True

        def training_step(self, batch, index):
            if self.fails and index == 3:
                raise KeyError("a bad batch")
            return super().training_step(batch, index)

    callback, module = EMACallback(decay=0.9), Failing()
    run = trainer(tmp_path, callback)
    with pytest.raises(KeyError):
        run.fit(module, data())
    module.fails = False
    (run if again else trainer(tmp_path, callback)).fit(module, data())
    assert callback.ema.step == (run.global_step if again else 12)


def test_another_module_is_tested_and_saved_as_it_is(tmp_path):
    callback, module, other = EMACallback(decay=0.9, save="average"), Module(), Module()
    run = trainer(tmp_path, callback)
    run.fit(module, data())
    before = values(module)
    run.test(other, data(), verbose=False)
    same_values(other.tested[0], values(other))
    same_values(values(module), before)
    for weights_only in (False, True):
        run.save_checkpoint(tmp_path / "other.ckpt", weights_only=weights_only)
        same_values(values(Module.load_from_checkpoint(tmp_path / "other.ckpt")), values(other))


def test_a_strategy_that_restores_late_resumes_with_the_same_bits(tmp_path):
    """Strategies of FSDP and DeepSpeed restore after on_fit_start."""

    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    def run(callback, epochs, **options):
        strategy = Late(device="cpu")
        each = trainer(
            tmp_path, callback, ModelCheckpoint(tmp_path, filename="last"), max_epochs=epochs, strategy=strategy
        )
        each.fit(Module(), data(), **options)

    whole, first, resumed = (EMACallback(decay=0.9) for _ in range(3))
    run(whole, 2)
    (tmp_path / "last.ckpt").unlink()
    run(first, 1)
    run(resumed, 2, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.ema.step == 12
    same_values(resumed.ema.state_dict()["averages"][0], whole.ema.state_dict()["averages"][0])


def averages_of(callback, k=0):
    return copy.deepcopy(callback.ema.state_dict()["averages"][k])


class Noting(lightning.Callback):
    """Keeps an average of its own, after each batch, from the weights before the first."""

    def __init__(self, decay=0.9):
        self.decay, self.averages, self.steps = decay, {}, 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.averages = self.averages or values(module)

    def on_train_batch_end(self, trainer, module, *_):
        fused_ema.update(self.averages, values(module), self.decay)
        self.steps += 1


class Exchanging(Module):
    """Gets a new optimizer in the second epoch."""

    def __init__(self, hook):
        super().__init__()
        self.hook = hook

    def on_train_epoch_start(self):
        if self.hook == "epoch" and self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_batch_start(self, batch, index):
        if self.hook == "batch" and self.current_epoch == 1 and index == 2:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.01)]

    def training_step(self, batch, index):
        if self.hook == "step" and self.current_epoch == 1 and index == 2:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.01)]
        return super().training_step(batch, index)


@pytest.mark.hazard(41, "good")
@pytest.mark.parametrize("hook", ["epoch", "batch", "step"])
def test_updates_follow_an_optimizer_that_is_exchanged(tmp_path, hook):
    callback, noting = EMACallback(decay=0.9), Noting()
    trainer(tmp_path, callback, noting).fit(Exchanging(hook), data())
    assert callback.ema.step == noting.steps == 12
    same_values(averages_of(callback), noting.averages)


@pytest.mark.parametrize("position", [0, 1, -1])
def test_the_optimizer_at_a_position_is_followed(tmp_path, position):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization, self.steps = False, [0, 0]

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (self.network[0], self.network[2])]

        def training_step(self, batch, index):
            if index == 3:
                self.trainer.optimizers = self.configure_optimizers()
            for i, optimizer in enumerate(self.optimizers()):
                if i == 0 or index % 2:  # the second steps half as often
                    self.manual_backward(super().training_step(batch, index))
                    optimizer.step()
                    self.steps[i] += 1

    callback, module = EMACallback(decay=0.9, optimizer=position), Two()
    trainer(tmp_path, callback).fit(module, data())
    assert module.steps == [12, 6]
    assert callback.ema.step == module.steps[position]


def test_an_optimizer_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"expected optimizer= to be a position .* has 0: Adam; found 1; leave it out"):
        trainer(tmp_path, EMACallback(optimizer=1)).fit(Module(), data())


@pytest.mark.hazard(41, "guarded")
def test_a_module_that_is_exchanged_has_a_new_average(tmp_path):
    other = Module()

    class Exchange(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 3:
                trainer.strategy.connect(other)
                other.trainer = trainer
                trainer.optimizers = [other.configure_optimizers()]

    callback = EMACallback(decay=0.9)
    with pytest.warns(UserWarning, match="goes on with another module; a new average starts here"):
        trainer(tmp_path, callback, Exchange(), max_epochs=1).fit(Module(), data())
    assert callback.ema.model is other
    assert callback.ema.step == 3


# ---- Several callbacks


def test_two_callbacks_keep_and_resume_their_own_averages(tmp_path):
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    pair, module = [EMACallback(decay=0.9), EMACallback(decay=0.5, evaluate=False)], Module()
    trainer(tmp_path, *pair, keeper, max_epochs=1).fit(module, data(), data(1))
    first = [averages_of(callback) for callback in pair]
    for decay, found in zip((0.9, 0.5), first, strict=True):
        same_values(found, by_hand(1, decay=decay)[1])
    same_values(module.validated[-1], first[0])
    resumed = [EMACallback(decay=0.5, evaluate=False), EMACallback(decay=0.9)]
    trainer(tmp_path, *resumed).fit(Module(), data(), ckpt_path=keeper.last_model_path)
    for callback in resumed:
        assert callback.ema.step == 12
        same_values(averages_of(callback), by_hand(2, decay=callback.decay)[1])


def test_two_callbacks_whose_functions_have_two_names(tmp_path):
    def weights(name, _):
        return name.endswith("weight")

    def biases(name, _):
        return name.endswith("bias")

    keeper = ModelCheckpoint(tmp_path, save_last=True)
    pair = [EMACallback(select=select, evaluate=False) for select in (weights, biases)]
    trainer(tmp_path, *pair, keeper, max_epochs=1).fit(Module(), data())
    resumed = [EMACallback(select=select, evaluate=False) for select in (biases, weights)]
    trainer(tmp_path, *resumed, max_epochs=1).fit(Module(), data(), ckpt_path=keeper.last_model_path)
    for callback, other in zip(resumed, reversed(pair), strict=True):
        same_values(averages_of(callback), averages_of(other))
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, *(EMACallback(select=lambda *_, value=value: value) for value in (True, False)))


@pytest.mark.parametrize("order", [1, -1])
def test_two_callbacks_and_a_checkpoint_during_validation(tmp_path, order):
    class Saving(lightning.Callback):
        def on_validation_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    pair, module = [EMACallback(decay=0.9), EMACallback(decay=0.5, evaluate=False, save="average")], Module()
    trainer(tmp_path, *pair[::order], Saving(), num_sanity_val_steps=0).fit(module, data(), data(1))
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    trained, averages = by_hand(2, decay=0.5)
    same_values({name: saved["current_model_state"][name] for name in averages}, values(trained))
    same_values({name: saved["state_dict"][name] for name in averages}, averages)
    for callback in pair:
        same_values(saved["callbacks"][callback.state_key]["averages"][0], by_hand(2, decay=callback.decay)[1])
    same_values(module.validated[-1], by_hand(2)[1])


def test_two_callbacks_that_would_both_be_evaluated_or_saved(tmp_path):
    pair, module = [EMACallback(decay=0.9), EMACallback(decay=0.5)], Module()
    with pytest.warns(UserWarning, match=r"2 callbacks have evaluate=True; .* first, .*0\.9.*; pass evaluate=False"):
        trainer(tmp_path, *pair).fit(module, data(), data(1))
    same_values(module.validated[-1], averages_of(pair[0]))
    same_values(averages_of(pair[1]), by_hand(2, decay=0.5)[1])
    pair = [EMACallback(decay=decay, save="average") for decay in (0.9, 0.5)]
    with pytest.raises(ValueError, match="expected one callback with save='average', found 2"):
        trainer(tmp_path, *pair).fit(Module(), data())


def test_an_average_that_was_saved_with_other_options_is_found(tmp_path):
    """Earlier versions had one key for all options."""
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    before = EMACallback(decay=0.9)
    trainer(tmp_path, before, keeper, max_epochs=1).fit(Module(), data())
    saved = torch.load(keeper.last_model_path, weights_only=True)
    saved["callbacks"]["EMACallback"] = saved["callbacks"].pop(before.state_key)
    torch.save(saved, tmp_path / "old.ckpt")
    other, same = EMACallback(decay=0.5), EMACallback(decay=0.9, evaluate=False)
    with pytest.warns(UserWarning, match=r"no averages under EMACallback\{.*0\.9.*; takes those under EMACallback$"):
        trainer(tmp_path, other, same, max_epochs=2).fit(Module(), data(), ckpt_path=tmp_path / "old.ckpt")
    assert (other.ema.step, same.ema.step) == (6, 12)
    same_values(averages_of(same), by_hand(2)[1])
    changed, module = EMACallback(decay=0.5), Module()
    with pytest.warns(UserWarning, match="takes those under EMACallback{"):
        trainer(tmp_path, changed).test(module, data(1), ckpt_path=keeper.last_model_path, verbose=False)
    same_values(module.tested[0], by_hand(1)[1])


def test_keys_are_the_same_in_every_process():
    def chosen(name, tensor):
        return True

    callback = EMACallback(decay=[0.9, fused_ema.schedules.tf_warmup(0.5), lambda n: 0.5], select=chosen)
    assert "'decay': [0.9, tf_warmup(D=0.5), 'test_keys" in callback.state_key
    assert "chosen" in callback.state_key
    assert " at 0x" not in callback.state_key


# ---- Where the average begins


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_start", "training_step"])
def test_an_average_begins_with_the_weights_that_the_module_loads(tmp_path, hook):
    class Loading(Module):
        def training_step(self, batch, index):
            if hook == "training_step":
                load()
            return super().training_step(batch, index)

    def load(*_):
        with torch.no_grad():
            module.network[2].weight.fill_(100.0)

    callback, module = EMACallback(decay=1.0), Loading()
    if hook != "training_step":
        setattr(module, hook, load)
    trainer(tmp_path, callback, max_epochs=1, limit_train_batches=1).fit(module, data(), data(1))
    assert callback.ema.step == 1
    assert averages_of(callback)["network.2.weight"].eq(100).all()
    if hook == "on_fit_start":
        assert module.validated[0]["network.2.weight"].eq(100).all()  # by the sanity check


def test_an_average_begins_before_a_step_that_asks_for_several_gradients(tmp_path):
    class Searching(Module):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    callback, module = EMACallback(decay=1.0), Searching()
    before = values(module)
    trainer(tmp_path, callback, max_epochs=1, limit_train_batches=1).fit(module, data())
    same_values(averages_of(callback), before)


def test_an_average_does_not_follow_weights_that_no_optimizer_moves(tmp_path):
    """Else it would look as if it averaged."""

    class ByHand(Module):
        def training_step(self, batch, index):
            with torch.no_grad():
                self.network[2].weight.add_(1.0)

    callback, module = EMACallback(decay=0.9), ByHand()
    module.automatic_optimization = False
    before = values(module)
    trainer(tmp_path, callback, max_epochs=1).fit(module, data())
    same_values(averages_of(callback), before)


@pytest.mark.hazard(44, "guarded")
def test_an_average_that_the_user_loads_is_kept(tmp_path):
    class Loading(Module):
        def on_train_start(self):  # a state without a count of steps
            callback.ema.load_state_dict(given)

    given = fused_ema.EMA(Module(), 1.0).state_dict()
    given["averages"][0]["network.2.weight"].fill_(7.0)
    callback = EMACallback(decay=1.0)
    trainer(tmp_path, callback, max_epochs=1).fit(Loading(), data())
    assert averages_of(callback)["network.2.weight"].eq(7).all()


@pytest.mark.hazard(44, "good")
def test_a_strategy_that_restores_late_begins_with_what_it_restored(tmp_path):
    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    first = Module()
    trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"), max_epochs=1).fit(first, data())
    callback, module = EMACallback(decay=1.0), Module()
    run = trainer(tmp_path, callback, max_epochs=2, strategy=Late(device="cpu"))
    run.fit(module, data(), data(1), ckpt_path=tmp_path / "plain.ckpt")
    assert callback.ema.step == 6
    for found in (averages_of(callback), module.validated[0], module.validated[-1]):
        same_values(found, values(first))


@pytest.mark.hazard(45, "good")
def test_one_callback_for_several_folds(tmp_path):
    callback, module = EMACallback(decay=0.9), Module()
    start = copy.deepcopy(module.state_dict())
    for _ in range(2):
        module.load_state_dict(start)
        run = trainer(tmp_path, callback, max_epochs=1)
        run.fit(module, data())
        assert callback.ema.step == 6
        same_values(averages_of(callback), by_hand(1)[1])
    manager = callback.ema
    run.fit_loop.max_epochs = 2  # the same fit goes on
    run.fit(module, data())
    assert callback.ema is manager
    assert manager.step == 12


@pytest.mark.hazard(45, "guarded")
def test_a_checkpoint_without_averages_begins_anew(tmp_path):
    callback, module = EMACallback(decay=0.9), Module()
    trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"), max_epochs=1).fit(module, data())
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, data())
    run.fit_loop.max_epochs = 2
    run.fit(module, data(), ckpt_path=tmp_path / "plain.ckpt")
    assert callback.ema.step == 6


def test_a_search_for_a_learning_rate_leaves_no_trace(tmp_path):
    class Searched(Module):
        lr = 0.05

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=5, update_attr=False)  # too few for a suggestion
    callback, module = EMACallback(decay=0.9), Searched()
    run = trainer(tmp_path, finder, callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "EMACallback")
        run.fit(module, data())
    assert callback.ema.step == 12
    same_values(averages_of(callback), by_hand(2)[1])


def test_a_state_that_an_exception_left_is_not_loaded_later(tmp_path):
    class Failing(SingleDeviceStrategy):
        def setup(self, trainer):
            raise KeyError("after the checkpoint was read, before the averages were loaded")

    keeper = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, EMACallback(decay=0.9), keeper, max_epochs=1).fit(Module(), data())
    callback = EMACallback(decay=0.9)
    with pytest.raises(KeyError):
        trainer(tmp_path, callback, strategy=Failing(device="cpu")).fit(
            Module(), data(), ckpt_path=keeper.last_model_path
        )
    trainer(tmp_path, callback, max_epochs=1).fit(Module(), data())
    assert callback.ema.step == 6


# ---- Modules that save only a part


class Partial(Module):
    """Its first layer is not trained, and in no checkpoint; as Lightning's documentation shows it."""

    def __init__(self):
        super().__init__()
        self.network[0].requires_grad_(False)
        self.strict_loading = False

    def state_dict(self):
        return {name: value for name, value in super().state_dict().items() if not name.startswith("network.0.")}

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Renaming(Module):
    """Its checkpoints have other names, and its first layer is filled in when they are loaded."""

    def __init__(self):
        super().__init__()
        self.network[0].requires_grad_(False)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"saved.{name}": state[name] for name in state if not name.startswith("network.0.")}

    def on_load_checkpoint(self, checkpoint):
        state = {name.removeprefix("saved."): value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = {**self.state_dict(), **state}

    configure_optimizers = Partial.configure_optimizers


@pytest.mark.parametrize("select", [None, lambda name, tensor: tensor.requires_grad])
@pytest.mark.parametrize("kind", [Partial, Renaming])
def test_a_module_that_leaves_frozen_parts_out_of_its_checkpoints(tmp_path, kind, select):
    def callback():
        return EMACallback(decay=0.9, save="average", select=select)

    keeper, noting, whole = ModelCheckpoint(tmp_path, save_last=True), Noting(), Noting()
    trainer(tmp_path, callback(), noting, keeper, max_epochs=1).fit(module := kind(), data())
    saved = torch.load(keeper.last_model_path, weights_only=True)
    prefix = "saved." if kind is Renaming else ""
    kept = [name for name, _ in module.named_parameters() if not name.startswith("network.0.")]
    for key, expected in (("state_dict", noting.averages), ("current_model_state", values(module))):
        assert not any("network.0." in name for name in saved[key])
        same_values({name: saved[key][prefix + name] for name in kept}, {name: expected[name] for name in kept})
    loaded = values(kind.load_from_checkpoint(keeper.last_model_path))
    same_values({name: loaded[name] for name in kept}, {name: noting.averages[name] for name in kept})
    trainer(tmp_path, whole).fit(expected := kind(), data())
    resumed = callback()
    trainer(tmp_path, resumed).fit(module := kind(), data(), ckpt_path=keeper.last_model_path)
    same_values(values(module), values(expected))
    assert resumed.ema.step == 12
    same_values({n: averages_of(resumed)[n] for n in kept}, {n: whole.averages[n] for n in kept})


def test_a_select_that_takes_one_of_tied_names_resumes_without_a_word(tmp_path):
    class Tied(Module):
        def __init__(self):
            super().__init__()
            self.again = self.network[0]

    def select(name, _):
        return name == "again.weight"

    keeper = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, EMACallback(select=select), keeper, max_epochs=1).fit(Tied(), data())
    resumed, whole = EMACallback(select=select), EMACallback(select=select)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "EMACallback")
        trainer(tmp_path, resumed).fit(Tied(), data(), ckpt_path=keeper.last_model_path)
    trainer(tmp_path, whole).fit(Tied(), data())
    same_values(averages_of(resumed), averages_of(whole))


def test_running_out_of_memory_is_no_reason_to_save_in_another_way(tmp_path):
    class Full(Module):
        def state_dict(self, *args, keep_vars=False, **kw):
            if keep_vars:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().state_dict(*args, **kw)

    run = trainer(tmp_path, EMACallback(decay=0.9, save="average"), max_epochs=1)
    run.fit(Full(), data())
    with pytest.raises(torch.OutOfMemoryError):
        run.save_checkpoint(tmp_path / "end.ckpt")


# ---- What a file holds


class Measured(Module):
    def validation_step(self, batch, _):
        self.log("loss", self.network(batch).square().mean())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_of_the_average_has_the_metric_that_chose_it(tmp_path, weights_only):
    keeper = ModelCheckpoint(tmp_path, monitor="loss", save_weights_only=weights_only)
    callback, module = EMACallback(decay=0.9, save="average"), Measured()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "EMACallback")
        run = trainer(tmp_path, callback, keeper)
        run.fit(module, data(), data(1))
    loaded = Measured.load_from_checkpoint(keeper.best_model_path)
    (found,) = trainer(tmp_path).validate(loaded, data(1), verbose=False)
    assert found["loss"] == keeper.best_model_score.item()
    run.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
    same_values(values(Measured.load_from_checkpoint(tmp_path / "end.ckpt")), averages_of(callback))
    same_values(values(module), values(by_hand(2)[0]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "measures an average, but load_from_checkpoint will read the model's own weights .* by 'loss'; pass"),
        ({"evaluate": False, "save": "average"}, "measures the model's own weights, but .* will read an average"),
        ({"evaluate": False}, None),
    ],
)
def test_a_file_of_other_weights_than_were_measured_gives_a_warning(tmp_path, options, text):
    keeper = ModelCheckpoint(tmp_path, monitor="loss")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, EMACallback(decay=0.9, **options), keeper).fit(Measured(), data(), data(1))
    ours = [str(each.message) for each in found if "EMACallback" in str(each.message)]
    assert len(ours) == bool(text)
    if text:
        assert re.search(text, ours[0])


@pytest.mark.parametrize("save", ["model", "average"])
def test_weights_that_are_saved_during_validation_are_those_that_were_asked_for(tmp_path, save):
    class Saving(lightning.Callback):
        def on_validation_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt", weights_only=True)

    callback, module = EMACallback(decay=0.9, save=save), Module()
    trainer(tmp_path, callback, Saving(), num_sanity_val_steps=0).fit(module, data(), data(1))
    trained, averages = by_hand(2)
    expected = averages if save == "average" else values(trained)
    same_values(values(Module.load_from_checkpoint(tmp_path / "inside.ckpt")), expected)
    same_values(module.validated[-1], averages)


def test_a_checkpoint_inside_a_block_of_the_users(tmp_path):
    callback, module = EMACallback(decay=0.9), Module()
    run = trainer(tmp_path, callback)
    run.fit(module, data())
    with callback.ema.swapped():
        with pytest.raises(RuntimeError, match=r"saved inside callback\.ema\.swapped\(\).* weights_only=True"):
            run.save_checkpoint(tmp_path / "end.ckpt")
        run.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)  # as the error says
    same_values(values(Module.load_from_checkpoint(tmp_path / "end.ckpt")), by_hand(2)[1])
    same_values(values(module), values(by_hand(2)[0]))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"decay": 90}, ValueError, r"decay: expected a value in \[0, 1\], found 90"),
        ({"dtypo": 1}, TypeError, "expected those of fused_ema.EMA .*, found dtypo"),
        ({"dtype": torch.int32}, ValueError, "dtype: expected float64"),
        ({"index": 1}, IndexError, "index: expected one of 1 averages, found 1"),
        ({"evaluate": "no"}, TypeError, "evaluate: expected True or False, found 'no'"),
        ({"optimizer": "Adam"}, TypeError, "optimizer: expected a position in trainer.optimizers, found str"),
        ({"optimizer": True}, TypeError, "optimizer: expected a position in trainer.optimizers, found bool"),
    ],
)
def test_options_are_checked_when_the_callback_is_made(options, error, text):
    with pytest.raises(error, match=text):
        EMACallback(**options)
