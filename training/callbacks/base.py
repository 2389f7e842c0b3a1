"""The hooks of a callback.

Each is given the trainer: its `epoch` (epochs done), `batch` (batches done in this epoch), `step_number`, `history`,
`learning_rate`, `model` (holding the weights of now in `on_epoch_end`), `stop()`. A callback that raises stops the run; model
and optimiser keep what they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.errors import InputError
from ..history import Row

if TYPE_CHECKING:
    from ..trainer import Trainer


class Callback:
    """Base of callbacks. Those of greater `order` are called later; checkpoints come last, so that they hold what others did."""

    order: int = 0

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Before the first epoch of a fit, also of one that resumes a run: its state is loaded afterwards."""

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Before the first batch of an epoch; `trainer.epoch` is its number from 0."""

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """After each step. Costs time only where it is overridden."""

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """After an epoch, with its row of the history: entries may be added to it."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last epoch, or when training stopped early."""

    def on_exit(self, trainer: Trainer) -> None:
        """When fit is left, also by an exception: the place to close files."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know: numbers, strings, lists, dicts and numpy arrays."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""


def monitored(row: Row, name: str, who: str) -> float:
    """The value to watch. Raises InputError where the epoch did not report it."""
    value = row.get(name)
    if not isinstance(value, (int, float)):
        given = ", ".join(k for k, v in row.items() if isinstance(v, (int, float)) and k not in ("epoch", "seconds"))
        hint = "; pass validation_data or validation_split to fit" if name.startswith("val_") else ""
        raise InputError(f"{who} watches {name!r}, which the epoch does not report as a number; there are {given}{hint}")
    return float(value)


def as_number(value: Any) -> float | None:
    """The value as a float where it is one number, for loggers."""
    return float(value) if isinstance(value, (int, float, np.generic)) and np.ndim(value) == 0 else None
