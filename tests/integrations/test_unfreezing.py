"""Layers that a trainer unfreezes, and adapters that are added, in the packages themselves."""

import warnings

import pytest
import torch
from conftest import averages, equal
from torch import nn

from fused_ema import EMA


def by_requires_grad(name, parameter):
    return parameter.requires_grad


@pytest.mark.parametrize("reselects", [False, True])
def test_lightning_unfreezes_the_backbone(tmp_path, reselects):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import BaseFinetuning

    from fused_ema.integrations.lightning import EMACallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def training_step(self, batch):
            return self.head(self.backbone(batch)).square().mean()

        def validation_step(self, batch):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    class Unfreezing(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.backbone)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.backbone, optimizer)
                if reselects:
                    assert average.ema.reselect() == (["backbone.weight", "backbone.bias"], [])

    torch.manual_seed(0)
    module, data = Module(), torch.randn(8, 3)
    steps = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            steps.append({name: p.detach().clone() for name, p in module.named_parameters()})

    average = EMACallback(0.5, select=by_requires_grad)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[Unfreezing(), average, Recorder()],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.fit(module, torch.utils.data.DataLoader(data, 4), torch.utils.data.DataLoader(data, 4))
    assert sum("call ema.reselect()" in str(each.message) for each in heard) == (not reselects)
    for step in steps:
        before = {name: value.lerp(step[name], 0.5) for name, value in before.items()}
    names = [name for name in before if reselects or "head" in name]
    assert sorted(averages(average.ema)) == sorted(names)
    for name in names:
        torch.testing.assert_close(averages(average.ema)[name], before[name])


def test_lightning_resumes_after_an_unfreezing(tmp_path):
    """The module unfreezes what it had unfrozen, before the callback makes its manager."""
    pl = pytest.importorskip("lightning.pytorch")

    from fused_ema.integrations.lightning import EMACallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)

        def training_step(self, batch):
            return self.head(self.backbone(batch)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.backbone.requires_grad_()
                self.trainer.callbacks[0].ema.reselect()

        def on_load_checkpoint(self, checkpoint):
            self.backbone.requires_grad_(checkpoint["epoch"] >= 1)

    def fit(epochs, path=None):
        torch.manual_seed(0)
        average = EMACallback(0.5, select=by_requires_grad)
        quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[average], default_root_dir=tmp_path, accelerator="cpu", **quiet
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 3), 4), ckpt_path=path)
        return trainer, averages(average.ema)

    fit(2)[0].save_checkpoint(tmp_path / "last.ckpt")
    assert equal(fit(3, tmp_path / "last.ckpt")[1], fit(3)[1])


@pytest.mark.parametrize("best", [False, True])
def test_transformers_resumes_after_an_unfreezing(tmp_path, best):
    """The layers are frozen when the run that resumes begins. The best model is of a time before they train."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    from fused_ema.integrations.transformers import EMACallback

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)

        def forward(self, x, labels=None):
            loss = self.head(self.backbone(x)).square().mean()
            return {"loss": loss, "logits": loss.reshape(1)}

    class Unfreezing(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step >= 2 and not model.backbone.weight.requires_grad:
                model.backbone.requires_grad_()
                average.ema.reselect()

    def fit(folder, checkpoint=None):
        torch.manual_seed(0)
        model = Network()
        more = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True} if best else {}
        arguments = transformers.TrainingArguments(
            tmp_path / folder,
            max_steps=6,
            save_strategy="steps",
            save_steps=1,
            learning_rate=0.1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            metric_for_best_model="eval_score",
            greater_is_better=False,
            **more,
        )
        rows = [{"x": torch.ones(3), "labels": torch.zeros(1)}] * 64
        run = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows[:8],
            compute_metrics=lambda _: {"score": run.state.global_step},
            callbacks=[Unfreezing(), average],
        )
        run.train(resume_from_checkpoint=checkpoint)
        return averages(average.ema)

    average = EMACallback(0.5, select=by_requires_grad)
    whole = fit("whole")
    if best:
        assert equal(whole, torch.load(tmp_path / "whole" / "checkpoint-1" / "ema.pt")["averages"][0])
        assert "backbone.weight" not in whole
        assert average.ema.reselect()[0] == ["backbone.weight", "backbone.bias"], "the select of the user holds again"
        return
    assert "backbone.weight" in whole
    average = EMACallback(0.5, select=by_requires_grad)
    assert equal(fit("again", str(tmp_path / "whole" / "checkpoint-4")), whole)


def test_peft_adds_an_adapter():
    peft = pytest.importorskip("peft")

    def config():
        return peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)

    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config())
    ema = EMA(model, 0.5, select=by_requires_grad)
    first = dict(averages(ema))
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match=r"second.*call ema.reselect\(\)"):
        ema.update()
    assert ema.reselect() == ([], []), "a new adapter is frozen until it is chosen"
    ema.update()
    model.set_adapter("second")
    with pytest.warns(UserWarning, match=r"second.*call ema.reselect\(\)"):
        ema.state_dict()
    added, dropped = ema.reselect()
    assert added
    assert all("second" in name for name in added)
    assert sorted(dropped) == sorted(first), "the first adapter is frozen now"
    assert equal(averages(ema), {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
