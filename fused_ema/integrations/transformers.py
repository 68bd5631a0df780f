"""A callback for transformers' Trainer: `Trainer(..., callbacks=[EMACallback(decay=0.9999)])`."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

try:
    from accelerate.utils import gather_object
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        'this callback needs transformers; run pip install "fused-ema[transformers]", or pip install transformers '
        "accelerate"
    ) from error

from .._warning import warn
from ..checkpoints.files import replacing
from ..manager.ema import EMA
from ..manager.state import Whose, check_whose
from ..pairs.shards import is_sharded
from ..schedules import Schedule
from .options import Options, check_options, reselect_as_saved

if TYPE_CHECKING:
    from typing_extensions import Unpack

FOLDER, STATE = "ema", "ema.pt"  # in a checkpoint's folder
ADAPTER = "adapter"  # in FOLDER: the Trainer takes each folder of a checkpoint that has an adapter's files for one


class EMACallback(TrainerCallback):
    """Averages the model after each optimizer step, evaluates the average, and saves it with each checkpoint.

    Args:
        decay: as in `fused_ema.EMA`.
        evaluate: whether the evaluations during training use the average. For an evaluation of your own, and for
            `trainer.save_model()`, write ``with callback.ema.swapped(): trainer.evaluate()``. If other callbacks ask
            for evaluations, pass this one last. Of several callbacks of this class, the first with evaluate=True is
            evaluated.
        save: whether each `checkpoint-N` gets a folder `ema`, which `from_pretrained` reads (`ema/adapter` for a PEFT
            model), and a file `ema.pt`, from which `train(resume_from_checkpoint=...)` resumes. With save=False no file
            is looked for either.
        index: which average is used, if `decay` is a sequence.
        schedules: whose decays and options hold after resuming: see `EMA.load_state_dict`.
        options: further arguments of `fused_ema.EMA`.

    `callback.ema` is the manager, from the start of `train` on. Each run has a new one. It starts with the weights that
    the model has before the first step; where the run resumes, it goes on with the averages in that checkpoint, and
    without any it starts there, with a warning.

    Raises:
        TypeError, ValueError, IndexError: an argument or option can't be used with any model.
        FileNotFoundError: from `train`, if only some processes find averages in the checkpoint that it resumes from.
        ValueError: from `train`, for save=True with a sharded model, or in two callbacks of one trainer.
    """

    ema: EMA | None = None

    def __init__(
        self,
        decay: float | Schedule | Sequence[float | Schedule] = 0.9999,
        *,
        evaluate: bool = True,
        save: bool = True,
        index: int = 0,
        schedules: Whose = "saved",
        **options: Unpack[Options],
    ) -> None:
        check_whose(schedules)
        check_options(decay, index, options, evaluate=evaluate, save=save)
        self.decay, self.evaluate, self.save, self.index, self.options = decay, evaluate, save, index, options
        self.schedules = schedules
        self._inside = contextlib.ExitStack()
        self._all = [self]  # the trainer's callbacks of this class
        self._begun = False  # the first step of this run
        self._resumed = False  # this run, with no averages of the callback's own
        self._evaluated: list[tuple[int, int]] = []  # what the model was when the average had been put into it
        self._written: Path | None = None  # before `on_save`

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        model, checkpoint = given["model"], _resumed_from(args, state)
        self._look_at_others()
        for each in self._all:
            each._leave_interrupted()
        if checkpoint:
            _drop_former_adapter(model, checkpoint)
        self.ema = None  # frees the averages of the last run first
        self.ema = EMA(model, self.decay, **self.options)
        if self.save and any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "EMACallback: expected save=False for a sharded model, found True; save and load "
                "callback.ema.state_dict() with torch.distributed.checkpoint"
            )
        self._begun, self._resumed, self._written = False, False, None
        if checkpoint:
            self._resume(checkpoint, state.global_step)
        if (chosen := self._chosen()) and chosen.ema and chosen.ema.updates:
            self._enter(args.eval_on_start)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        # Other callbacks may have restored weights, or loaded averages, since on_train_begin.
        if self.ema and not self._begun and self.ema.begin() and self._resumed:
            warn(
                f"EMACallback: with save=False no averages are loaded, so they start at step {state.global_step}, as "
                "copies of the model; to go on with a state of your own, load it into callback.ema in the "
                "on_train_begin of a callback that is passed after this one"
            )
        self._begun = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        assert self.ema
        if not getattr(given["optimizer"], "step_was_skipped", False):
            self.ema.update()
        self._enter(control.should_evaluate)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._enter(control.should_evaluate)

    def _enter(self, evaluates: bool) -> None:
        if not evaluates or self is not self._all[-1]:  # the others have yet to update from the model
            return
        if (chosen := self._chosen()) and chosen.ema and chosen.ema.swapped_index is None:
            chosen._inside.enter_context(chosen.ema.swapped(chosen.index))
            chosen._evaluated = _marks(chosen.ema.model.parameters())

    def _chosen(self) -> EMACallback | None:
        """The callback whose average is evaluated."""
        return next((each for each in self._all if each.evaluate), None)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._warn_of_raw_weights()
        if not _more_datasets(given.get("metrics") or {}):
            self._inside.close()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **given: Any
    ) -> None:
        self._warn_of_raw_weights()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Saves the averages before the checkpoint is uploaded, which comes before `on_save`."""
        if any(_trainer_frames("_push_from_checkpoint")):
            self._write(args, state, given["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._write(args, state, given["model"])
        self._written = None

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if self.ema and self.ema.swapped_index is not None:
            raise RuntimeError("EMACallback: a checkpoint was saved inside swapped(), with the averages as the model")
        folder = _checkpoint(args, state)
        if self.ema and self.save and args.should_save and self._written != folder:
            saved = self.ema.state_dict()
            _export(self.ema, self.index, model, folder / FOLDER)
            with replacing(folder / STATE) as temporary:
                torch.save(saved, temporary)
            self._written = folder

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if not (self.save and args.load_best_model_at_end and state.best_model_checkpoint):
            return
        if (path := Path(state.best_model_checkpoint) / STATE).is_file():  # the trainer has loaded its model
            self._load(path, drop=True)  # what was frozen then is the model's own
        else:
            warn(
                f"EMACallback: the best model was loaded from {path.parent}, which has no averages (no {STATE}); "
                "callback.ema holds those of the last step"
            )

    def _look_at_others(self) -> None:
        self._all = [self]
        for variables in _trainer_frames("_inner_training_loop"):
            callbacks = variables["self"].callback_handler.callbacks
            self._all = [each for each in callbacks if isinstance(each, EMACallback)]
        if self.save and sum(each.save for each in self._all) > 1:
            raise ValueError(
                "EMACallback: expected one callback with save=True, found several, which would write the same "
                f"files ({FOLDER}, {STATE}); pass a sequence of decays to one callback, or save=False to all but one"
            )
        if self is self._chosen() and (count := sum(each.evaluate for each in self._all)) > 1:
            warn(
                f"EMACallback: {count} callbacks have evaluate=True; evaluations use the average of the first, "
                f"decay={self.decay}; pass evaluate=False to the others"
            )

    def _warn_of_raw_weights(self) -> None:
        if self.ema and self is self._chosen() and self.ema.updates and self.ema.swapped_index is None:
            warn(
                "EMACallback: these are the metrics of the model's own weights; to evaluate the average, write "
                "`with callback.ema.swapped(): trainer.evaluate()`"
            )

    def _resume(self, checkpoint: Path, step: int) -> None:
        path = checkpoint / STATE
        found = gather_object([self.save and path.is_file()])
        if all(found):
            try:
                self._load(path)
            except ValueError as error:
                raise ValueError(
                    f"EMACallback: {path}: {error}; to load it in a way of your own, pass save=False, and load it into "
                    "callback.ema in the on_train_begin of a callback that is passed after this one"
                ) from error
        elif any(found):
            ranks = [rank for rank, there in enumerate(found) if not there]
            raise FileNotFoundError(
                f"EMACallback: expected {path} on every process, found none on ranks {ranks}; copy it there"
            )
        elif self.save:
            warn(
                f"EMACallback: {checkpoint} has no averages (no {STATE}), so they start at step {step}, as copies of "
                "the model; to go on with earlier ones, resume from a checkpoint that has them"
            )
        else:
            self._resumed = True  # on_step_begin warns, unless another callback has loaded some

    def _load(self, path: Path, *, drop: bool = False) -> None:
        assert self.ema
        state = torch.load(path, map_location="cpu", weights_only=True)
        reselect_as_saved(self.ema, self.options.get("select"), state, drop=drop)
        self.ema.load_state_dict(state, schedules=self.schedules)

    def _leave_interrupted(self) -> None:
        """Takes the average out of the model if an exception ended the last run during an evaluation. Weights that were
        restored since, by the trainer that resumes, stay."""
        if self.ema and self.ema.swapped_index is not None:
            model, before = self.ema.model, dict(self._evaluated)
            if any(before.get(tensor, now) != now for tensor, now in _marks(model.parameters())):
                restored = copy.deepcopy(model.state_dict())
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "EMA.swapped: writes to")
                    self._inside.close()
                model.load_state_dict(restored)
        self._inside.close()


def _export(ema: EMA, index: int, model: Any, folder: Path) -> None:
    """Saves the average as `from_pretrained` reads it."""
    adapters = getattr(model, "peft_config", {})
    learned_prompts = any(getattr(config, "is_prompt_learning", False) for config in adapters.values())
    if not hasattr(model, "save_pretrained"):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(ema.averaged_state_dict(index, copy=False), folder / "pytorch_model.bin")
    elif isinstance(model, PreTrainedModel) or (adapters and not learned_prompts):
        model.save_pretrained(
            folder / ADAPTER if adapters else folder, state_dict=ema.averaged_state_dict(index, copy=False)
        )
    else:  # it saves what the model holds, whatever state it is given
        with ema.swapped(index):
            model.save_pretrained(folder / ADAPTER if adapters else folder)


def _drop_former_adapter(model: Any, checkpoint: Path) -> None:
    """The averages of adapters used to lie in FOLDER itself, which the Trainer has taken for one more adapter; some of
    its versions then skip the default one."""
    folder = checkpoint / FOLDER
    ours = (checkpoint / STATE).is_file() and (folder / "adapter_config.json").is_file()
    theirs = (folder / ADAPTER).is_dir() or (folder / FOLDER).is_dir()  # an adapter of that name
    if ours and not theirs and FOLDER in getattr(model, "peft_config", {}):
        model.delete_adapter(FOLDER)
        if (checkpoint / "adapter_config.json").is_file():
            model.load_adapter(str(checkpoint), "default", is_trainable="default" in model.active_adapters)


def _marks(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Differ after a write, except one through `.data`, and after a tensor was replaced."""
    return [(id(tensor), tensor._version) for tensor in tensors]


def _trainer_frames(function: str = "") -> Iterator[dict[str, Any]]:
    """The variables of the Trainer's calls (of that function) on the stack, since callbacks are not told enough."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if function in ("", frame.f_code.co_name) and isinstance(frame.f_locals.get("self"), Trainer):
            yield frame.f_locals


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer saves now. A trial of a hyperparameter search has a folder of its own."""
    trainers = (variables["self"] for variables in _trainer_frames())
    run = next((trainer._get_output_dir(trainer._trial) for trainer in trainers), args.output_dir)
    return Path(str(run)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _resumed_from(args: TrainingArguments, state: TrainerState) -> Path | None:
    for variables in _trainer_frames("_inner_training_loop"):
        path = variables.get("resume_from_checkpoint")
        return Path(path) if path else None
    return _checkpoint(args, state) if state.global_step else None


def _more_datasets(metrics: Mapping[str, float]) -> bool:
    """Whether this is one of several datasets and not the last, so that the next is evaluated right away."""
    for variables in _trainer_frames("evaluate"):
        if isinstance(datasets := variables.get("eval_dataset"), dict):
            return f"{variables.get('metric_key_prefix', 'eval')}_{list(datasets)[-1]}_runtime" not in metrics
    return False
