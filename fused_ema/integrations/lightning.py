"""A callback for Lightning's Trainer: `Trainer(callbacks=[EMACallback(decay=0.9999)])`."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any, Literal

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:  # the package's older name
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            'this callback needs Lightning; run pip install "fused-ema[lightning]", or pip install lightning'
        ) from error

import torch

from .. import checkpoints
from ..manager.ema import EMA
from ..manager.state import Whose, check_whose


class EMACallback(Callback):
    """Averages the module after each optimizer step, and puts the average into it for validation, test and prediction.

    Args:
        decay: as in `fused_ema.EMA`.
        evaluate: whether validation, test and prediction use the average. The module has its own weights back before
            any checkpoint is written, and after an exception.
        save: which weights a checkpoint has as its "state_dict", which `load_from_checkpoint` reads: "model", or
            "average", which puts the model's own under "current_model_state", as Lightning's own callback does. In
            both cases `fit(ckpt_path=...)` resumes both. It also resumes from a checkpoint of Lightning's own callback.
        optimizer: the position in `trainer.optimizers` of the optimizer whose steps the updates follow.
        index: which average is used, if `decay` is a sequence.
        schedules: whose decays and options hold after resuming: see `EMA.load_state_dict`.
        options: further arguments of `fused_ema.EMA`.

    `callback.ema` is the manager, from the start of `fit` on.

    Raises:
        ValueError: from `fit`, for save="average" with a ModelCheckpoint that saves weights only, since Lightning calls
            no callback for it.
    """

    ema: EMA | None = None

    def __init__(
        self,
        decay: Any = 0.9999,
        *,
        evaluate: bool = True,
        save: Literal["model", "average"] = "model",
        optimizer: int = -1,
        index: int = 0,
        schedules: Whose = "saved",
        **options: Any,
    ) -> None:
        if save not in ("model", "average"):
            raise ValueError(f"save: expected 'model' or 'average', found {save!r}")
        self.decay, self.evaluate, self.save, self.optimizer, self.index = decay, evaluate, save, optimizer, index
        check_whose(schedules)
        self.schedules, self.options = schedules, options
        self._state: dict[str, Any] | None = None
        self._of_lightning: dict[str, Any] | None = None  # the state that Lightning's own callback saved
        self._restored = False  # in this fit
        self._attached: Any = None
        self._inside = contextlib.ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saving = (getattr(each, "save_weights_only", False) for each in trainer.checkpoint_callbacks)
        if self.save == "average" and any(saving):
            raise ValueError(
                "save: expected 'model', found 'average' with a ModelCheckpoint that has save_weights_only=True; its "
                "files would hold the model's own weights, since Lightning calls no callback for them"
            )
        self._restored = False
        self._attached = self._manager(pl_module).attach(trainer.optimizers[self.optimizer])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._manager(pl_module)  # FSDP and DeepSpeed load the checkpoint after on_fit_start
        if trainer.ckpt_path is not None and not self._restored:
            warnings.warn(f"EMACallback: {trainer.ckpt_path} has no averages; new ones start here", stacklevel=2)

    def _manager(self, pl_module: LightningModule) -> EMA:
        """The manager of this module, with the state that was loaded for it."""
        if self.ema is None or self.ema.model is not pl_module:
            self._detach()
            self.ema = EMA(pl_module, self.decay, **self.options)
        if self._state is not None:
            self.ema.load_state_dict(self._state, schedules=self.schedules)
            self._state, self._restored = None, True
        elif self._of_lightning is not None:
            checkpoints.restore(self.ema, self._of_lightning)
            self._of_lightning, self._restored = None, True
        return self.ema

    def _detach(self, *_: Any) -> None:
        self._leave()
        if self._attached:
            self._attached.remove()
            self._attached = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        self._state = None

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.evaluate:
            return
        if trainer.state.fn == "fit":
            manager = self._manager(pl_module)
        elif trainer.ckpt_path is None:
            if self.ema is None or self.ema.model is not pl_module:
                return
            manager = self.ema
        elif self._state is None:
            warnings.warn(f"EMACallback: {trainer.ckpt_path} has no averages; its own weights are used", stacklevel=2)
            return
        else:  # the average of that checkpoint is wanted, not the latest one
            manager = EMA(pl_module, self.decay, **self.options)
            manager.load_state_dict(self._state, schedules="mine")  # there are no updates
        self._inside.enter_context(manager.swapped(self.index))

    def _leave(self, *_: Any) -> None:
        self._inside.close()

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave  # type: ignore[assignment]

    on_exception = _detach  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict() if self.ema else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None  # _manager() loads it

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        swapped = (
            self.ema is not None and self.ema.swapped_index is not None
        )  # the checkpoint is saved during an evaluation
        if swapped:
            self._leave()
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        if self.ema and self.save == "average":
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = self.ema.averaged_state_dict(self.index, copy=False)
        if swapped:
            for key in {"state_dict", "current_model_state"} & checkpoint.keys():
                checkpoint[key] = copy.deepcopy(checkpoint[key])  # the file is written after the next swap
            self._enter(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "current_model_state" in checkpoint and trainer.state.fn == "fit":
            if "averaging_state" in checkpoint:
                averages = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
                self._of_lightning = averages | checkpoint["averaging_state"]
            with torch.no_grad():
                pl_module.load_state_dict(checkpoint["current_model_state"])
