"""Stopping when nothing gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...ir.errors import InputError
from ...runtime.buffers import Array
from ..history import Row, direction
from .base import Callback, monitored

if TYPE_CHECKING:
    from ..trainer import Trainer


class EarlyStopping(Callback):
    """Stops when `monitor` has not improved by more than `min_delta` for `patience` epochs.

    With `restore_best`, the model then gets the weights of its best epoch back (at the end of fit in any case). `mode` is 'min'
    or 'max' (default: by the name). NaN is never an improvement. A new fit starts counting anew.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 5,
        *,
        min_delta: float = 0.0,
        mode: str | None = None,
        restore_best: bool = True,
    ) -> None:
        if patience < 1 or min_delta < 0:
            raise InputError(f"EarlyStopping: patience is at least 1 and min_delta not negative; got {patience}, {min_delta}")
        self.monitor, self.patience, self.min_delta, self.restore_best = monitor, patience, min_delta, restore_best
        self._sign = direction(monitor, mode)
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.best_epoch = 0
        self.waited = 0
        self._weights: dict[str, Array] = {}

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Forgets the fit before."""
        self._reset()

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """Looks at the epoch's result."""
        value = monitored(row, self.monitor, "EarlyStopping")
        better = self.best is None or self._sign * value < self._sign * self.best - self.min_delta
        if better and not math.isnan(value):
            self.best, self.best_epoch, self.waited = value, trainer.epoch, 0
            if self.restore_best:
                self._weights = trainer.weights()
        else:
            self.waited += 1
            if self.waited >= self.patience:
                trainer.stop(f"{self.monitor} has not improved since epoch {self.best_epoch}")

    def on_fit_end(self, trainer: Trainer) -> None:
        """Brings the best weights back."""
        if self.restore_best and self._weights and self.best_epoch != trainer.epoch:
            trainer.set_weights(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """The best value, its epoch and weights, the epochs waited since."""
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from there."""
        self.best, self.best_epoch, self.waited = state["best"], state["best_epoch"], state["waited"]
        self._weights = dict(state["weights"])
