"""The callback for Lightning, with its real trainer."""

import copy
import warnings

import pytest
import torch
from conftest import same_values
from torch import nn

import fused_ema

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
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


def test_a_checkpoint_that_would_have_the_wrong_copy_is_refused(tmp_path):
    """Lightning calls no callback where only weights are saved."""
    keeper = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(
        ValueError,
        match="found 'average' with a ModelCheckpoint that has save_weights_only=True",
    ):
        trainer(tmp_path, EMACallback(save="average"), keeper).fit(Module(), data(), data(1))
    module = Module()
    trainer(tmp_path, EMACallback(decay=0.9), keeper).fit(module, data(), data(1))
    loaded = torch.load(keeper.best_model_path, weights_only=True)["state_dict"]
    same_values({name: loaded[name] for name in values(module)}, values(module))


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
    with pytest.warns(UserWarning, match="has no averages; its own weights"):
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


def test_another_fit_after_an_exception(tmp_path):
    class Failing(Module):
        fails = True

        def training_step(self, batch, index):
            if self.fails and index == 3:
                raise KeyError("a bad batch")
            return super().training_step(batch, index)

    callback, module = EMACallback(decay=0.9), Failing()
    with pytest.raises(KeyError):
        trainer(tmp_path, callback).fit(module, data())
    module.fails = False
    trainer(tmp_path, callback).fit(module, data())
    assert callback.ema.step == 3 + 12


def test_another_module_is_tested_as_it_is(tmp_path):
    callback, module, other = EMACallback(decay=0.9), Module(), Module()
    run = trainer(tmp_path, callback)
    run.fit(module, data())
    before = values(module)
    run.test(other, data(), verbose=False)
    same_values(other.tested[0], values(other))
    same_values(values(module), before)


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
