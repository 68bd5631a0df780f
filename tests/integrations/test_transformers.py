"""The callback for transformers' Trainer, with the real one."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import clones, same_values

import fused_ema

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fused_ema.integrations import transformers as integration  # noqa: E402
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


def trainer(folder, *callbacks, model=None, **options):
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
    return Trainer(
        network() if model is None else model,
        arguments,
        train_dataset=data(32),
        eval_dataset=data(4),
        callbacks=[*callbacks],
    )


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


@pytest.mark.parametrize("path_type", [str, Path])
def test_training_goes_on_from_a_folder_elsewhere(tmp_path, path_type):
    """Although the output folder has a checkpoint of that number from another training."""
    whole, other, callback = (EMACallback(decay=decay) for decay in (0.9, 0.5, 0.9))
    trainer(tmp_path / "first", whole).train()
    trainer(tmp_path / "second", other).train()
    resumed = trainer(tmp_path / "second", callback)
    resumed.train(resume_from_checkpoint=path_type(tmp_path / "first" / "checkpoint-3"))
    same_values(callback.ema.state_dict()["averages"][0], whole.ema.state_dict()["averages"][0])


def test_the_same_trainer_goes_back_to_a_checkpoint(tmp_path):
    callback = EMACallback(decay=0.9)
    run = trainer(tmp_path, callback)
    run.train()
    expected = clones(callback.ema.state_dict()["averages"][0])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.ema.step == 6
    same_values(callback.ema.state_dict()["averages"][0], expected)


def test_the_evaluation_before_the_first_step_of_a_resumed_run_has_the_average(tmp_path):
    whole, callback = EMACallback(decay=0.9), EMACallback(decay=0.9)
    run = trainer(tmp_path, whole)
    run.train()
    resumed, seen = trainer(tmp_path, callback, eval_on_start=True), []
    step = resumed.prediction_step
    resumed.prediction_step = lambda *given, **options: seen.append(values(resumed.model)) or step(*given, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMACallback")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same_values(seen[0], torch.load(tmp_path / "checkpoint-3" / "ema.pt")["averages"][0])
    same_values(values(resumed.model), values(run.model))


def test_two_callbacks_do_not_write_the_same_files(tmp_path):
    with pytest.raises(ValueError, match="expected one callback with save=True, found several"):
        trainer(tmp_path, EMACallback(0.9), EMACallback(0.5)).train()
    trainer(tmp_path, EMACallback(0.5, save=False, evaluate=False), EMACallback((0.9, 0.5)), max_steps=3).train()


def test_the_first_of_two_callbacks_is_evaluated(tmp_path):
    first, second, by_hand = EMACallback(0.9), EMACallback(0.5, save=False), Averages()
    run = trainer(tmp_path, first, second)
    run.callback_handler.callbacks.insert(0, by_hand)
    with pytest.warns(UserWarning, match=r"2 callbacks have evaluate=True; .* decay=0.9; pass evaluate=False") as heard:
        run.train()
    assert sum("EMACallback" in str(each.message) for each in heard) == 1
    same_values(run.evaluated, by_hand.averages)
    assert first.ema.step == second.ema.step == 6
    run = trainer(tmp_path, EMACallback(0.9), EMACallback(0.5, save=False, evaluate=False))  # as the warning says
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMACallback")
        run.train()
    same_values(run.evaluated, by_hand.averages)


def test_two_callbacks_begin_again_after_an_evaluation_that_raised(tmp_path):
    other, evaluated = EMACallback(0.5, save=False, evaluate=False), EMACallback(0.9)
    run = trainer(tmp_path, other, evaluated)
    run.compute_metrics = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    run.compute_metrics = None
    run.train()
    assert other.ema.step == evaluated.ema.step == 6


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


@pytest.mark.hazard(44, "guarded")
@pytest.mark.parametrize("save", [True, False])
def test_averages_start_at_a_checkpoint_that_has_none(tmp_path, save):
    """As copies of the weights there, although the callback has averages of an earlier run."""
    callback, by_hand = EMACallback(decay=0.9, save=save), Averages()
    trainer(tmp_path / "other", callback).train()
    trainer(tmp_path, EMACallback(save=False)).train()
    if not save:
        torch.save(callback.ema.state_dict(), tmp_path / "checkpoint-3" / "ema.pt")  # is not looked at
    resumed = trainer(tmp_path, by_hand, callback)
    expected = r"checkpoint-3 has no averages .* start at step 3" if save else "load it into callback.ema in"
    with pytest.warns(UserWarning, match=expected):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.ema.step == 3
    same_values(callback.ema.state_dict()["averages"][0], by_hand.averages)


def test_a_later_callback_may_load_averages_or_weights(tmp_path):
    class Restoring(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            if "averages" in self.restore:
                callback.ema.load_state_dict(whole.ema.state_dict())
            if "weights" in self.restore:
                with torch.no_grad():
                    model.transformer.wte.weight.fill_(0.25)

    whole, restoring, by_hand = EMACallback(decay=0.9), Restoring(), Averages()
    trainer(tmp_path, whole, eval_strategy="no").train()
    for restoring.restore in ("weights", "averages", "averages and weights"):
        callback = EMACallback(decay=0.9, save=False)
        if "averages" in restoring.restore:
            expected = clones(whole.ema.state_dict()["averages"][0])
        run = trainer(tmp_path, callback, restoring, by_hand, eval_strategy="no", save_strategy="no", max_steps=4)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        warned = any("start at step 3" in str(each.message) for each in heard)
        assert warned == ("averages" not in restoring.restore)
        if "averages" in restoring.restore:
            fused_ema.update(expected, values(callback.ema.model), 0.9)
        else:
            expected = by_hand.averages
        assert callback.ema.step == 1 + 6 * ("averages" in restoring.restore)
        same_values(callback.ema.state_dict()["averages"][0], expected)


def test_a_save_warns_of_nan_once(tmp_path):
    class Breaking(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            with torch.no_grad():
                model.transformer.ln_f.bias[0] = torch.nan

    run = trainer(tmp_path, Breaking(), EMACallback(), eval_strategy="no", max_steps=3)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")  # which shows equal ones once
        run.train()
    assert sum("hold NaN or infinity" in str(each.message) for each in heard) == 1


def test_a_state_that_does_not_fit_is_loaded_by_hand(tmp_path):
    class Loading(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            with pytest.warns(UserWarning, match="load_state_dict"):
                callback.ema.load_state_dict(torch.load(path / "ema.pt"), names="common")

    path, options = tmp_path / "checkpoint-3", {"eval_strategy": "no", "max_steps": 4}
    trainer(tmp_path, EMACallback(select=lambda name, _: "wte" in name), **options).train()
    with pytest.raises(ValueError, match=r"ema\.pt: state: .*names='common'.*; .* pass save=False, and load it into"):
        trainer(tmp_path, EMACallback(), **options).train(resume_from_checkpoint=str(path))
    callback = EMACallback(save=False)
    trainer(tmp_path, callback, Loading(), **options).train(resume_from_checkpoint=str(path))
    assert callback.ema.step == 4


def test_averages_that_only_some_processes_find_are_refused(tmp_path, monkeypatch):
    trainer(tmp_path, EMACallback(), eval_strategy="no", max_steps=3).train()
    monkeypatch.setattr(integration, "gather_object", lambda found: [*found, False])
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3/ema\.pt on every process, found none on ranks \[1\]"):
        trainer(tmp_path, EMACallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.hazard(45, "good")
def test_each_fold_begins_anew(tmp_path):
    callback, by_hand = EMACallback(decay=0.9), Averages()
    for fold in "ab":
        trainer(tmp_path / fold, callback, by_hand, eval_strategy="no", save_strategy="no", max_steps=3).train()
        assert callback.ema.step == 3
        same_values(callback.ema.state_dict()["averages"][0], by_hand.averages)


def test_training_resumes_after_an_evaluation_that_raised(tmp_path):
    """The checkpoint is loaded while the average is still in the model."""
    whole, callback = EMACallback(decay=0.9), EMACallback(decay=0.9)
    run = trainer(tmp_path / "whole", whole)
    run.train()
    broken = trainer(tmp_path, callback)
    broken.compute_metrics = lambda _: 1 / (6 - broken.state.global_step) and {}
    with pytest.raises(ZeroDivisionError):
        broken.train()
    assert callback.ema.swapped_index == 0
    broken.compute_metrics = None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMA")
        broken.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same_values(values(broken.model), values(run.model))
    same_values(callback.ema.state_dict()["averages"][0], whole.ema.state_dict()["averages"][0])


def test_training_again_after_an_evaluation_that_raised_begins_with_the_model(tmp_path):
    class Weights(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            self.latest = values(model)

    weights, callback = Weights(), EMACallback(decay=0.9, save=False)
    run = trainer(tmp_path, weights, callback)
    run.compute_metrics = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    expected = weights.latest
    run.compute_metrics, run.optimizer, run.args.learning_rate = None, None, 0.0
    run.train()
    same_values(values(run.model), expected)


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


# ---- Where files go


@pytest.mark.hazard(42, "good")
def test_each_trial_keeps_its_averages_with_its_own_checkpoints(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    class Keeping(Averages):
        def on_save(self, args, state, control, **_):
            saved[f"run-{len(trials) - 1}", state.global_step] = clones(self.averages)

    def space(trial):
        trials.append(trial.number) if trial.number not in trials else None
        return {"learning_rate": [0.01, 0.02][trial.number]}

    trials, saved, callback = [], {}, EMACallback(decay=0.9)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 2}
    run = trainer(tmp_path, Keeping(), callback, save_steps=1, eval_steps=1, max_steps=4, **best)
    run.model_init = lambda: network()
    run.hyperparameter_search(space, n_trials=2, backend="optuna")
    assert {path.name for path in tmp_path.iterdir()} == {"run-0", "run-1"}
    folders = sorted(tmp_path.glob("run-*/checkpoint-*"))
    assert len(folders) == 4
    for folder in folders:
        step = int(folder.name.removeprefix("checkpoint-"))
        assert (folder / "trainer_state.json").is_file()
        averages = transformers.GPT2LMHeadModel.from_pretrained(folder / "ema")
        same_values(values(averages), saved[folder.parent.name, step])
        assert torch.load(folder / "ema.pt")["step"] == step
    best = Path(run.state.best_model_checkpoint)
    same_values(callback.ema.state_dict()["averages"][0], saved["run-1", callback.ema.step])
    assert best == tmp_path / "run-1" / f"checkpoint-{callback.ema.step}"


def test_a_best_model_without_averages_keeps_the_latest(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer(tmp_path, EMACallback(save=False), **best).train()
    callback = EMACallback(decay=0.9)
    resumed = trainer(tmp_path, callback, **best)
    with pytest.warns(UserWarning, match=r"best model was loaded from .*checkpoint-3, which has no averages"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.ema.step == 3


@pytest.mark.parametrize("uploads", [False, True])
def test_averages_are_there_when_the_checkpoint_is_uploaded(tmp_path, monkeypatch, uploads):
    """Once, and by the process that saves the model, on other nodes too."""
    written, uploaded = [], []

    class Hub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path, **_):
            uploaded.append((Path(folder_path).name, (Path(folder_path) / "ema.pt").is_file()))
            return SimpleNamespace(done=lambda: True)

    class OtherNode(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            state.is_world_process_zero = False

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    export = integration._export
    monkeypatch.setattr(integration, "_export", lambda *given: written.append(given[-1].parent.name) or export(*given))
    hub = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_model_id": "me/model"} if uploads else {}
    trainer(tmp_path, EMACallback(), *([] if uploads else [OtherNode()]), **hub).train()
    assert written == ["checkpoint-3", "checkpoint-6"]
    assert [each for each in uploaded if each[0].startswith("checkpoint")] == [
        (each, True) for each in written if uploads
    ]


def test_a_model_that_saves_its_own_weights_saves_the_average(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Model(torch.nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(32, 4), torch.nn.Linear(4, 32)

        def forward(self, input_ids, labels):
            logits = self.head(self.embed(input_ids))
            return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    callback = EMACallback(decay=0.9)
    run = trainer(tmp_path, callback, model=Model(), eval_strategy="no")
    run.train()
    saved = Model.from_pretrained(tmp_path / "checkpoint-6" / "ema")
    same_values(values(saved), callback.ema.state_dict()["averages"][0])
    assert not torch.equal(run.model.head.weight, saved.head.weight)


# ---- PEFT


def adapted(*more):
    """The network with adapters of these names after the default one."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(network(), config)
    for name in more:
        model.add_adapter(name, config)
    return model


def trainable(name, parameter):
    return parameter.requires_grad


@pytest.mark.hazard(42, "guarded")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("more", "select", "former"),
    [
        ((), None, False),
        ((), trainable, False),
        (("other", "ema"), None, False),
        ((), None, True),
        pytest.param((), trainable, True, marks=pytest.mark.slow),
    ],
)
def test_averages_of_adapters_are_no_adapters_to_the_trainer(tmp_path, more, select, former):
    import peft

    whole, callback = EMACallback(decay=0.9, select=select), EMACallback(decay=0.9, select=select)
    run = trainer(tmp_path, whole, model=adapted(*more))
    run.train()
    folder = tmp_path / "checkpoint-3"
    holding = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("adapter_model.safetensors")}
    assert holding == {".", "ema/adapter", *more, *(f"ema/adapter/{name}" for name in more)}
    averages = peft.PeftModel.from_pretrained(network(), tmp_path / "checkpoint-6" / "ema" / "adapter")
    expected = whole.ema.state_dict()["averages"][0]
    same_values(
        {name: each for name, each in values(averages).items() if "lora" in name},
        {name: each for name, each in expected.items() if ".default." in name},
    )
    if former:  # as earlier versions wrote it
        for path in (folder / "ema" / "adapter").iterdir():
            path.rename(folder / "ema" / path.name)
        (folder / "ema" / "adapter").rmdir()
    resumed = trainer(tmp_path, callback, model=adapted(*more))
    resumed.train(resume_from_checkpoint=str(folder))
    assert list(resumed.model.peft_config) == ["default", *more]
    same_values(values(resumed.model), values(run.model))
    same_values(callback.ema.state_dict()["averages"][0], expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_learned_prompts_are_saved_as_averages(tmp_path):
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(**CONFIG | {"n_positions": 10})
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), prompts)
    callback = EMACallback(decay=0.5, select=trainable)
    trainer(tmp_path, callback, model=model, eval_strategy="no").train()
    averages = peft.PeftModel.from_pretrained(
        transformers.GPT2LMHeadModel(config), tmp_path / "checkpoint-6" / "ema" / "adapter"
    )
    (expected,) = callback.ema.state_dict()["averages"][0].values()
    assert torch.equal(averages.prompt_encoder.default.embedding.weight, expected)
    assert not torch.equal(model.prompt_encoder.default.embedding.weight, expected)
