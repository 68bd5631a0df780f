"""A callback for transformers' Trainer: `Trainer(..., callbacks=[EMACallback(decay=0.9999)])`."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        'this callback needs transformers; run pip install "fused-ema[transformers]", or pip install transformers '
        "accelerate"
    ) from error

from ..manager.ema import EMA
from ..manager.state import Whose, check_whose
from ..pairs.shards import is_sharded

FOLDER, STATE = "ema", "ema.pt"  # in a checkpoint's folder


class EMACallback(TrainerCallback):
    """Averages the model after each optimizer step, evaluates the average, and saves it with each checkpoint.

    Args:
        decay: as in `fused_ema.EMA`.
        evaluate: whether the evaluations during training use the average. For an evaluation of your own, and for
            `trainer.save_model()`, write ``with callback.ema.swapped(): trainer.evaluate()``. If other callbacks ask
            for evaluations, pass this one last.
        save: whether each `checkpoint-N` gets a folder `ema`, which `from_pretrained` reads, and a file `ema.pt`, from
            which `train(resume_from_checkpoint=...)` resumes.
        index: which average is used, if `decay` is a sequence.
        schedules: whose decays and options hold after resuming: see `EMA.load_state_dict`.
        options: further arguments of `fused_ema.EMA`.

    `callback.ema` is the manager, from the start of `train` on.

    Raises:
        FileNotFoundError: from `train`, if it resumes from a checkpoint that has no averages.
        ValueError: from `train`, for save=True with a sharded model.
    """

    ema: EMA | None = None

    def __init__(
        self,
        decay: Any = 0.9999,
        *,
        evaluate: bool = True,
        save: bool = True,
        index: int = 0,
        schedules: Whose = "saved",
        **options: Any,
    ) -> None:
        check_whose(schedules)
        self.decay, self.evaluate, self.save, self.index, self.options = decay, evaluate, save, index, options
        self.schedules = schedules
        self._inside = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self._inside.close()  # an exception may have ended the previous training during an evaluation
        model = given["model"]
        if self.ema is None or self.ema.model is not model or state.global_step == 0:
            self.ema = EMA(model, self.decay, **self.options)
        if self.save and any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "EMACallback: expected save=False for a sharded model, found True; save and load "
                "callback.ema.state_dict() with torch.distributed.checkpoint"
            )
        if state.global_step:
            self._load(_resumed_from() or _checkpoint(args, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        assert self.ema
        if not getattr(given["optimizer"], "step_was_skipped", False):
            self.ema.update()
        self._enter(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._enter(control)

    def _enter(self, control: TrainerControl) -> None:
        if self.ema and self.evaluate and control.should_evaluate and self.ema.swapped_index is None:
            self._inside.enter_context(self.ema.swapped(self.index))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._warn_of_raw_weights()
        if not _more_datasets(given.get("metrics") or {}):
            self._inside.close()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **given: Any
    ) -> None:
        self._warn_of_raw_weights()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.ema and self.ema.swapped_index is not None:
            raise RuntimeError("EMACallback: a checkpoint was saved inside swapped(), with the averages as the model")
        if not (self.ema and self.save and state.is_world_process_zero):
            return
        model, folder = given["model"], _checkpoint(args, state)
        averages = self.ema.averaged_state_dict(self.index, copy=False)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder / FOLDER, state_dict=averages)
        else:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            torch.save(averages, folder / FOLDER / "pytorch_model.bin")
        torch.save(self.ema.state_dict(), folder / STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.save and args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(Path(state.best_model_checkpoint))  # the trainer has loaded its model

    def _warn_of_raw_weights(self) -> None:
        if self.ema and self.evaluate and self.ema.updates and self.ema.swapped_index is None:
            warnings.warn(
                "EMACallback: these are the metrics of the model's own weights; to evaluate the average, write "
                "`with callback.ema.swapped(): trainer.evaluate()`",
                stacklevel=3,
            )

    def _load(self, checkpoint: Path) -> None:
        assert self.ema
        if not (checkpoint / STATE).is_file():
            raise FileNotFoundError(f"EMACallback: expected the averages in {checkpoint / STATE}, found no such file")
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        self.ema.load_state_dict(state, schedules=self.schedules)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _trainer_frames(function: str) -> Iterator[dict[str, Any]]:
    """The variables of the Trainer's calls of that function on the stack, since callbacks are not told enough."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name == function and isinstance(frame.f_locals.get("self"), Trainer):
            yield frame.f_locals


def _resumed_from() -> Path | None:
    for variables in _trainer_frames("_inner_training_loop"):
        if isinstance(path := variables.get("resume_from_checkpoint"), str):
            return Path(path)
    return None


def _more_datasets(metrics: Mapping[str, float]) -> bool:
    """Whether this is one of several datasets and not the last, so that the next is evaluated right away."""
    for variables in _trainer_frames("evaluate"):
        if isinstance(datasets := variables.get("eval_dataset"), dict):
            return f"{variables.get('metric_key_prefix', 'eval')}_{list(datasets)[-1]}_runtime" not in metrics
    return False
