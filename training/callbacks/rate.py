"""Callbacks that set the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...frontend.schedules import ReduceOnPlateau as Plateau
from ...frontend.schedules import Schedule, as_schedule
from ...ir.errors import InputError
from ..history import direction
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer


class _OfEpoch(Schedule):
    """A schedule that counts epochs, for a trainer that asks by steps."""

    def __init__(self, schedule: Schedule, trainer: Trainer) -> None:
        self.schedule, self._trainer = schedule, trainer

    def parts(self) -> tuple[Schedule, ...]:
        """The one that counts epochs."""
        return (self.schedule,)

    def rate(self, step: int) -> float:
        """The rate of the epoch that the trainer is in."""
        return self.schedule(self._trainer.epoch)


class _Installed(Plateau):
    """The schedule that a ReduceOnPlateau callback gave its trainer."""


class LearningRate(Callback):
    """Sets the learning rate from a schedule of epochs (or of steps): a tw.schedules object, or a function of the number.

    A schedule that observes (tw.schedules.ReduceOnPlateau) is shown `monitor` at the end of each epoch. What it remembers is
    saved with the trainer's checkpoints.
    """

    def __init__(self, schedule: Any, per: str = "epoch", monitor: str | None = None) -> None:
        if per not in ("epoch", "step"):
            raise InputError(f"LearningRate: per is 'epoch' or 'step', not {per!r}")
        self.schedule: Schedule = as_schedule(schedule)
        self.per, self.monitor = per, monitor

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Takes over the trainer's learning rate."""
        trainer.learning_rate = _OfEpoch(self.schedule, trainer) if self.per == "epoch" else self.schedule
        trainer.rate_monitor = self.monitor


class ReduceOnPlateau(Callback):
    """Multiplies the learning rate by `factor` when `monitor` has not improved for more than `patience` epochs.

    Works on top of whatever rate or schedule the trainer has. `mode` is 'min' or 'max' (default: by the name). The other
    arguments are those of `tw.schedules.ReduceOnPlateau`. A later fit keeps the rate that was reached.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        *,
        mode: str | None = None,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        self.monitor = monitor
        self._options: dict[str, Any] = {
            "mode": "min" if direction(monitor, mode) > 0 else "max",
            "factor": factor,
            "patience": patience,
            "threshold": threshold,
            "threshold_mode": threshold_mode,
            "cooldown": cooldown,
            "min_lr": min_lr,
        }
        self._plateau: _Installed | None = None
        _Installed(1.0, **self._options)  # so that wrong arguments are refused here

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Puts the factor on top of the trainer's learning rate."""
        trainer.rate_monitor = self.monitor
        rate = trainer.learning_rate
        if rate is self._plateau:
            return
        before = rate if isinstance(rate, _Installed) else None
        self._plateau = _Installed(rate if before is None else before.schedule, **self._options)
        if before is not None:  # another callback's: what it reached stays, and it observes no longer
            self._plateau.load_state_dict({**self._plateau.state_dict(), "scale": before.state_dict()["scale"]})
        trainer.learning_rate = self._plateau
