"""A callback for Lightning's Trainer: `Trainer(callbacks=[EMACallback(decay=0.9999)])`."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, Literal

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

from .. import checkpoints, schedules
from .._warning import warn
from ..manager.ema import EMA
from ..manager.state import WAYS_ON, Whose, check_whose
from ..manager.timetable import schedules_of
from ..pairs import shards
from ..pairs.pairing import listed
from ..schedules import Schedule
from .options import Options, check_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..manager.attach import Attachment

OWN = "current_model_state"  # Lightning's own callback has the trained weights there too, beside the average
_WAYS_ON = (
    "give the callback the options that it was saved with, and the module the layers, in its on_load_checkpoint at the "
    "latest; to load only what both have, set strict_loading = False in the module"
)


class EMACallback(Callback):
    """Averages the module after each optimizer step, and puts the average into it for validation, test and prediction.

    Args:
        decay: as in `fused_ema.EMA`.
        evaluate: whether validation, test and prediction use the average. The module has its own weights back before
            any checkpoint is written, and after an exception.
        save: which weights a checkpoint has as its "state_dict", which `load_from_checkpoint` reads: "model", or
            "average", which puts the model's own under "current_model_state", as Lightning's own callback does. In
            both cases `fit(ckpt_path=...)` resumes both. It also resumes from a checkpoint of Lightning's own callback.
            A file with weights only has the average alone then, in the types of the module's parameters.
        optimizer: the position in `trainer.optimizers` of the optimizer whose steps the updates follow. Where the
            trainer gets other optimizers during a fit, the updates follow the one that is at this position then.
        index: which average is used, if `decay` is a sequence.
        schedules: whose decays and options hold after resuming: see `EMA.load_state_dict`.
        options: further arguments of `fused_ema.EMA`.

    A run that resumes averages what the checkpoint has averaged, whatever `select` would take then: a warning names
    what it decides otherwise though it trains, and `callback.ema.reselect()` asks it again.

    `callback.ema` is the manager, from the start of `fit` on. A fit that starts at step 0, or from a checkpoint without
    averages, has a new one, whose average starts with the weights that the module has right before its first step. A
    further fit of the same trainer goes on with the average.

    A trainer may have several of these callbacks with different options; each finds its own average in a checkpoint.
    (Functions are told apart by their names, which lambdas share: callbacks that differ in `select` alone need
    functions that are defined under two names, or Lightning refuses them.) The first one that has evaluate=True is
    evaluated, and only one can have save="average". An average that was saved with other options is taken by the
    callback that has none, with a warning.

    Raises:
        TypeError, ValueError, IndexError: an argument or option can't be used with any module. From `fit`: there is no
            such optimizer; several callbacks of one trainer have save="average", or one for a sharded module.
        RuntimeError: from `trainer.save_checkpoint`, inside `callback.ema.swapped()`, unless it saves weights only.
    """

    ema: EMA | None = None

    def __init__(
        self,
        decay: float | Schedule | Sequence[float | Schedule] = 0.9999,
        *,
        evaluate: bool = True,
        save: Literal["model", "average"] = "model",
        optimizer: int = -1,
        index: int = 0,
        schedules: Whose = "saved",
        **options: Unpack[Options],
    ) -> None:
        check_options(decay, index, options, evaluate=evaluate)
        if save not in ("model", "average"):
            raise ValueError(f"save: expected 'model' or 'average', found {save!r}")
        if not isinstance(optimizer, int) or isinstance(optimizer, bool):
            raise TypeError(f"optimizer: expected a position in trainer.optimizers, found {type(optimizer).__name__}")
        self.decay, self.evaluate, self.save, self.optimizer, self.index = decay, evaluate, save, optimizer, index
        check_whose(schedules)
        self.schedules, self.options = schedules, options
        self._state: Mapping[str, Any] | None = None
        self._of_lightning: dict[str, Any] | None = None  # the state that Lightning's own callback saved
        self._restored = False  # in this fit
        self._begun = False  # the module is past the first optimizer step, or the first batch
        self._followed: object = None  # the optimizer that it is attached to
        self._attached: Attachment | None = None
        self._evaluating = False
        self._inside = contextlib.ExitStack()

    @property
    def state_key(self) -> str:
        """The key in a checkpoint: all options, since Lightning refuses two callbacks that have one key."""
        own = {name: getattr(self, name) for name in ("decay", "evaluate", "save", "optimizer", "index")} | self.options
        return self._generate_state_key(**{name: _readable(value) for name, value in own.items()})

    # ---- Training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(vars(trainer).get("save_checkpoint"), functools.partial):  # not wrapped yet
            save = functools.partial(_save_checkpoint, trainer, trainer.save_checkpoint)
            trainer.save_checkpoint = save  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self is (_callbacks(trainer) or [self])[0]:
            _check_roles(trainer)
        if self.save == "average" and any(shards.is_sharded(each) for each in pl_module.parameters()):
            raise ValueError(
                "EMACallback: expected save='model' for a sharded module, found 'average': its strategy loads a file's "
                "state_dict for training too; for a file of the average, write `with callback.ema.swapped(): "
                "trainer.save_checkpoint(path, weights_only=True)`"
            )
        self._restored = False
        if trainer.global_step == 0 or trainer.ckpt_path is not None:
            self._detach()
            self.ema = None
        self._follow(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._manager(trainer, pl_module)  # FSDP and DeepSpeed load the checkpoint after on_fit_start
        if trainer.ckpt_path is not None and trainer.global_step and not self._restored:  # at 0 a search was undone
            warn(f"EMACallback: {trainer.ckpt_path} has no averages; new ones start here")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._follow(trainer, pl_module)
        self._begin()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if optimizer is self._chosen(trainer):  # set by a hook that runs after on_train_batch_start
            self._follow(trainer, pl_module)
        self._begin()
        self._begun = True  # some optimizers call this again, with weights that they have moved

    def on_train_batch_end(self, *_: Any) -> None:
        self._begun = True

    def _manager(self, trainer: Trainer, pl_module: LightningModule) -> EMA:
        """The manager of this module, with the state that was loaded for it."""
        if self.ema is None or self.ema.model is not pl_module:
            if self.ema is not None and trainer.global_step:
                warn("EMACallback: the trainer goes on with another module; a new average starts here")
            self._detach()
            self.ema = None  # frees its memory first
            self.ema, self._begun = EMA(pl_module, self.decay, **self.options), False
        if self._state is not None:
            self._load(self.ema, pl_module, self._state, self.schedules)
            self._state, self._restored = None, True
        elif self._of_lightning is not None:
            checkpoints.restore(self.ema, self._of_lightning)
            self._of_lightning, self._restored = None, True
        return self.ema

    def _load(self, ema: EMA, pl_module: LightningModule, state: Mapping[str, Any], schedules: Whose) -> None:
        """Loads a state, and averages what it has averaged: what trains may be frozen, or not yet, when a run resumes.
        From then on a `reselect` asks the callback's own `select` again."""
        own = self.options.get("select")
        saved = set().union(*state["averages"])
        taken: set[int] = set()  # by the callback's own `select`; of tied names, one is enough
        trained: dict[str, int] = {}
        loading = own is not None

        def select(name: str, tensor: torch.Tensor) -> bool:
            wanted = bool(own and own(name, tensor))
            if loading and wanted:
                taken.add(id(tensor))
            if loading and tensor.requires_grad:
                trained[name] = id(tensor)
            return name in saved if loading else wanted

        if own:
            ema.reselect(select)
        try:
            ema.load_state_dict(state, schedules=schedules, names="equal" if pl_module.strict_loading else "common")
        except ValueError as error:
            raise ValueError(str(error).replace(WAYS_ON, _WAYS_ON)) from None
        loading = False
        if differ := [name for name, key in trained.items() if (key in taken) != (name in saved)]:
            warn(
                "EMACallback: the average goes on with the tensors that it has in the checkpoint, though `select` now "
                f"decides otherwise for {listed(differ)}; call callback.ema.reselect() to apply it again"
            )

    def _begin(self) -> None:
        """Starts from the weights that the module has now, which it may have loaded since the manager was made."""
        if self.ema and not self._begun and self.ema.swapped_index is None:
            self.ema.begin()

    def _chosen(self, trainer: Trainer) -> Any:
        try:
            return trainer.optimizers[self.optimizer]
        except IndexError:
            found = ", ".join(f"{i}: {type(each).__name__}" for i, each in enumerate(trainer.optimizers)) or "none"
            raise ValueError(
                f"EMACallback: expected optimizer= to be a position in trainer.optimizers, which has {found}; found "
                f"{self.optimizer}; leave it out to follow the last one"
            ) from None

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the manager to the optimizer that the trainer has now."""
        manager, optimizer = self._manager(trainer, pl_module), self._chosen(trainer)
        if not self._attached or optimizer is not self._followed:
            self._detach()
            self._followed, self._attached = optimizer, manager.attach(optimizer)

    def _detach(self) -> None:
        self._leave()
        if self._attached:
            self._attached.remove()
        self._followed = self._attached = None

    def _end(self, *_: Any, **__: Any) -> None:
        self._detach()
        self._state = self._of_lightning = None

    teardown = on_exception = _end

    # ---- Evaluating

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.evaluate or any(each._evaluating for each in _callbacks(trainer)):
            return
        if trainer.state.fn == "fit":
            manager = self._manager(trainer, pl_module)
            self._begin()
        elif trainer.ckpt_path is None:
            if self.ema is None or self.ema.model is not pl_module:
                return
            manager = self.ema
        elif self._state is None:
            warn(f"EMACallback: {trainer.ckpt_path} has no averages beside its weights, which are used as they are")
            return
        else:  # the average of that checkpoint is wanted, not the latest one
            manager = EMA(pl_module, self.decay, **self.options)
            self._load(manager, pl_module, self._state, "mine")  # there are no updates
        self._inside.enter_context(manager.swapped(self.index))
        self._evaluating = True

    def _leave(self, *_: Any) -> None:
        self._evaluating = False
        self._inside.close()

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave  # type: ignore[assignment]

    # ---- Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The manager's, with whole tensors in the place of sharded ones, since Lightning writes what rank 0 has."""
        if self.ema is None:
            return {}
        state = self.ema.state_dict()
        state["averages"] = [{name: _whole(value) for name, value in each.items()} for each in state["averages"]]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._state = state_dict or None  # _manager() loads it

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.ema and self.ema.swapped_index is not None:
            raise RuntimeError(
                "EMACallback: a checkpoint was saved inside callback.ema.swapped(), with the average as the model; "
                "leave the block first, or call trainer.save_checkpoint(path, weights_only=True)"
            )
        if self.ema and self.ema.model is pl_module and self.save == "average":
            trained = {**checkpoint}
            pl_module.on_save_checkpoint(trained)  # which may leave out what was not trained
            checkpoint[OWN], checkpoint["state_dict"] = trained["state_dict"], self._averaged(trainer, self.ema)

    def _averaged(self, trainer: Trainer, ema: EMA) -> dict[str, Any]:
        try:
            if _takes_keep_vars(ema.model.state_dict):
                return ema.averaged_state_dict(self.index, copy=False)
        except RuntimeError as error:  # the module's state_dict() is its own, and leaves some parameters out
            if type(error) is not RuntimeError:  # but out of memory
                raise
        with ema.swapped(self.index):
            return copy.deepcopy(trainer.strategy.lightning_module_state_dict())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("callbacks", {})
        if key := _taken(trainer, saved).get(self):
            warn(f"EMACallback: the checkpoint has no averages under {self.state_key}; takes those under {key}")
            self.load_state_dict(saved[key])
        if OWN not in checkpoint or trainer.state.fn != "fit":
            return
        if "averaging_state" in checkpoint:
            averages = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
            self._of_lightning = averages | checkpoint["averaging_state"]
        trained = {**checkpoint, "state_dict": dict(checkpoint[OWN])}
        if any(name not in trained["state_dict"] for name, _ in pl_module.named_parameters(remove_duplicate=False)):
            pl_module.on_load_checkpoint(trained)  # which may add what was left out
        with torch.no_grad():
            pl_module.load_state_dict(trained["state_dict"], strict=pl_module.strict_loading)


def _callbacks(trainer: Trainer) -> list[EMACallback]:
    return [each for each in trainer.callbacks if isinstance(each, EMACallback)]  # type: ignore[attr-defined]


def _check_roles(trainer: Trainer) -> None:
    """Says which callback is evaluated, and where a file has other weights than those that were evaluated."""
    ours = _callbacks(trainer)
    evaluated, saved = ([c for c in ours if c.evaluate], [c for c in ours if c.save == "average"])
    if len(saved) > 1:
        raise ValueError(f"EMACallback: expected one callback with save='average', found {len(saved)}")
    if len(evaluated) > 1:
        warn(
            f"EMACallback: {len(evaluated)} callbacks have evaluate=True; validation uses the average of the first, "
            f"{evaluated[0].state_key}; pass evaluate=False to the others"
        )
    monitors = [name for each in trainer.checkpoint_callbacks if (name := getattr(each, "monitor", None))]
    if monitors and trainer.enable_validation and evaluated[:1] != saved:
        measured, kept = ("an average" if each else "the model's own weights" for each in (evaluated, saved))
        warn(
            f"EMACallback: validation measures {measured}, but load_from_checkpoint will read {kept} from the files "
            f"that ModelCheckpoint chooses by {monitors[0]!r}; pass evaluate=True and save='average' to one callback "
            "for the average in both, or evaluate=False and save='model' for the model's own weights in both"
        )


def _save_checkpoint(
    trainer: Trainer, save: Callable[..., None], filepath: Any, weights_only: bool | None = None, *args: Any, **kw: Any
) -> None:
    """`trainer.save_checkpoint`, but never of a module that is being evaluated, and of the average where only weights
    are saved: Lightning calls no callback for these."""
    ours, module = _callbacks(trainer), trainer.lightning_module
    with contextlib.ExitStack() as inside:
        for each in ours:
            if each._evaluating:
                each._leave()
                inside.callback(each._enter, trainer, module)
        for each in ours:
            each._begin()
            ema = each.ema
            if weights_only and each.save == "average" and ema and ema.model is module and ema.swapped_index is None:
                inside.enter_context(ema.swapped(each.index))
        save(filepath, weights_only, *args, **kw)


def _taken(trainer: Trainer, saved: Mapping[str, Any]) -> dict[EMACallback, str]:
    """The key in a checkpoint for each callback whose own key is not there: of an average that no other callback has,
    with its decays if there is one. (Its options may have changed; earlier versions had one key for all options.)"""
    ours = _callbacks(trainer)
    keys = {each.state_key for each in ours}
    free = [key for key, state in saved.items() if key not in keys and {"schedules", "averages"} <= {*state}]
    taken: dict[EMACallback, str] = {}
    for alike in (True, False):
        for each in ours:
            decays = [schedules.to_state(schedule) for schedule in schedules_of(each.decay)]
            fits = [key for key in free if not alike or saved[key]["schedules"] == decays]
            if fits and each not in taken and each.state_key not in saved:
                taken[each] = fits[0]
                free.remove(fits[0])
    return taken


def _takes_keep_vars(state_dict: Callable[..., Any]) -> bool:
    try:
        inspect.signature(state_dict).bind(keep_vars=True)
    except TypeError:
        return False
    return True


def _whole(average: torch.Tensor) -> torch.Tensor:
    return shards.whole(average).cpu() if shards.is_sharded(average) else average


def _readable(value: Any) -> Any:
    """A value whose repr is the same in every process."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_readable(each) for each in value]
    if callable(value) and not is_dataclass(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value
