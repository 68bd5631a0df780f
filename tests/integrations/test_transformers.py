"""The callback for transformers' Trainer, with the real one."""

import json
import warnings

import pytest
import torch
from conftest import clones, same_values

import fused_ema

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fused_ema.integrations.transformers import EMACallback  # noqa: E402

CONFIG = {
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "vocab_size": 32,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def network():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def data(count):
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Trainer(transformers.Trainer):
    """Records the weights that are evaluated."""

    def prediction_step(self, model, *arguments, **options):
        self.evaluated = values(self.model)
        return super().prediction_step(model, *arguments, **options)


def trainer(folder, callback, model=None, **options):
    options = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
    } | options
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model or network(), arguments, train_dataset=data(32), eval_dataset=data(4), callbacks=[callback])


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


class Averages(transformers.TrainerCallback):
    """Averages by hand, after each step."""

    def on_train_begin(self, args, state, control, model, **_):
        self.averages = values(model)

    def on_step_end(self, args, state, control, model, **_):
        fused_ema.update(self.averages, values(model), 0.9)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_it_follows_each_step_evaluates_and_saves_the_average(tmp_path, accumulate, strategy):
    callback, by_hand = EMACallback(decay=0.9), Averages()
    options = {"eval_strategy": strategy, "save_strategy": strategy, "gradient_accumulation_steps": accumulate}
    run = trainer(tmp_path, callback, **options, **({"max_steps": 8 // accumulate} if strategy == "epoch" else {}))
    # It runs before the other callback, which puts the average into the model.
    run.callback_handler.callbacks.insert(0, by_hand)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMACallback")
        run.train()
    steps = run.state.global_step
    assert callback.ema.step == steps
    same_values(run.evaluated, by_hand.averages)
    same_values(callback.ema.state_dict()["averages"][0], by_hand.averages)
    assert not torch.equal(run.model.transformer.wte.weight, by_hand.averages["transformer.wte.weight"])
    folder = tmp_path / f"checkpoint-{steps}"
    same_values(values(transformers.GPT2LMHeadModel.from_pretrained(folder)), values(run.model))
    same_values(values(transformers.GPT2LMHeadModel.from_pretrained(folder / "ema")), by_hand.averages)


def test_resumed_training_has_the_same_bits(tmp_path):
    whole, callback = EMACallback(decay=0.9), EMACallback(decay=0.9)
    run = trainer(tmp_path, whole)
    run.train()
    resumed = trainer(tmp_path, callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same_values(values(resumed.model), values(run.model))
    same_values(callback.ema.state_dict()["averages"][0], whole.ema.state_dict()["averages"][0])
    assert callback.ema.step == 6


@pytest.mark.parametrize("whose", ["mine", pytest.param("saved", marks=pytest.mark.slow)])
def test_another_decay_on_resume(tmp_path, whose):
    trainer(tmp_path, EMACallback(0.9)).train()
    callback = EMACallback(0.5, schedules=whose)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    texts = [str(each.message) for each in caught if "the state was saved" in str(each.message)]
    assert len(texts) == (whose == "saved")
    assert all("saved with decay=0.9, and the manager that loads it has decay=0.5;" in text for text in texts)
    assert (callback.ema.step, callback.ema.decay) == (6, 0.9 if whose == "saved" else 0.5)


def test_training_goes_on_from_a_folder_elsewhere(tmp_path):
    """Although the output folder has a checkpoint of that number from another training."""
    whole, other, callback = (EMACallback(decay=decay) for decay in (0.9, 0.5, 0.9))
    trainer(tmp_path / "first", whole).train()
    trainer(tmp_path / "second", other).train()
    resumed = trainer(tmp_path / "second", callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    same_values(callback.ema.state_dict()["averages"][0], whole.ema.state_dict()["averages"][0])


def test_the_same_trainer_goes_back_to_a_checkpoint(tmp_path):
    callback = EMACallback(decay=0.9)
    run = trainer(tmp_path, callback)
    run.train()
    expected = clones(callback.ema.state_dict()["averages"][0])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.ema.step == 6
    same_values(callback.ema.state_dict()["averages"][0], expected)


def test_each_of_several_datasets_is_evaluated_with_the_average(tmp_path):
    callback, seen = EMACallback(decay=0.9), []
    run = trainer(tmp_path, callback)
    run.eval_dataset = {"a": data(4), "a_b": data(8), "b": data(4)}
    step = run.prediction_step
    run.prediction_step = lambda *given, **options: seen.append(values(run.model)) or step(*given, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMACallback")
        run.train()
    assert len(seen) >= 6
    for found in seen[-3:]:
        same_values(found, callback.ema.state_dict()["averages"][0])
    folder = tmp_path / "checkpoint-6"
    same_values(values(transformers.GPT2LMHeadModel.from_pretrained(folder)), values(run.model))
    assert not torch.equal(run.model.transformer.wte.weight, seen[-1]["transformer.wte.weight"])


def test_predicting_with_the_model_gives_a_warning(tmp_path):
    callback = EMACallback(decay=0.9)
    run = trainer(tmp_path, callback)
    run.train()
    with pytest.warns(UserWarning, match="the model's own weights"):
        run.predict(data(4))


def test_sharded_models_are_not_saved_by_the_callback(tmp_path, monkeypatch):
    monkeypatch.setattr("fused_ema.integrations.transformers.is_sharded", lambda _: True)
    with pytest.raises(ValueError, match="save=False"):
        trainer(tmp_path, EMACallback()).train()
    trainer(tmp_path, EMACallback(save=False)).train()


def test_a_checkpoint_without_averages_is_refused(tmp_path):
    trainer(tmp_path, EMACallback(save=False)).train()
    with pytest.raises(FileNotFoundError, match=r"expected the averages in .*checkpoint-3"):
        trainer(tmp_path, EMACallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_model_comes_with_its_average(tmp_path):
    callback = EMACallback(decay=0.9)
    run = trainer(
        tmp_path, callback, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False
    )
    run.train()
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["best_global_step"] == 3
    assert callback.ema.step == 3
    averages = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-3" / "ema")
    same_values(callback.ema.state_dict()["averages"][0], values(averages))
    same_values(values(run.model), values(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-3")))


def test_evaluating_the_model_after_training_gives_a_warning(tmp_path):
    callback = EMACallback(decay=0.9)
    run = trainer(tmp_path, callback)
    run.train()
    with pytest.warns(UserWarning, match="the model's own weights"):
        run.evaluate()
    same_values(run.evaluated, values(run.model))
    averages = callback.ema.state_dict()["averages"][0]
    with callback.ema.swapped(), warnings.catch_warnings():
        warnings.simplefilter("error")
        run.evaluate()
    same_values(run.evaluated, averages)
