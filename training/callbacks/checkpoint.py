"""Checkpoints while a fit runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...ir.errors import InputError
from ..checkpoint import SUFFIX, check_writable, in_folder, step_file
from ..history import Row, direction
from .base import Callback, monitored

if TYPE_CHECKING:
    from ..trainer import Trainer

BEST: Final = f"best{SUFFIX}"


class Checkpoint(Callback):
    """Saves the run to `folder`, after every `every_epochs` epochs and, if given, every `every_steps` steps.

    keep          how many of the newest are kept; None: all
    best          a name of the history ('val_loss'): its best epoch is kept as 'best.checkpoint' as well
    mode          'min' or 'max' for `best` (default: by the name)

    `fit(..., resume=folder)` goes on from the newest. Raises CheckpointError when the fit begins where the folder cannot be
    written to, and when a checkpoint cannot be written (a full disk): the run then stops with its state intact.
    """

    order = 100

    def __init__(
        self,
        folder: str | Path,
        *,
        every_epochs: int = 1,
        every_steps: int = 0,
        keep: int | None = 3,
        best: str | None = None,
        mode: str | None = None,
    ) -> None:
        if every_epochs < 0 or every_steps < 0 or not (every_epochs or every_steps or best):
            raise InputError("Checkpoint: every_epochs and every_steps are not negative, and one of them (or best) is given")
        if keep is not None and keep < 1:
            raise InputError(f"Checkpoint: keep is at least 1, or None for all; got {keep}")
        self.folder, self.every_epochs, self.every_steps, self.keep, self.best = (
            Path(folder),
            every_epochs,
            every_steps,
            keep,
            best,
        )
        self._sign = direction(best or "", mode)
        self._best = math.inf
        if not every_steps:
            self.on_step_end = super().on_step_end  # type: ignore[method-assign]

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Makes the folder."""
        check_writable(self.folder)

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """Saves after every so manieth step."""
        if trainer.step_number % self.every_steps == 0:
            self._save(trainer)

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """Saves after every so manieth epoch, and the best."""
        if self.best is not None:
            value = self._sign * monitored(row, self.best, "Checkpoint")
            if value < self._best:
                self._best = value
                trainer.save(self.folder / BEST)
        last = trainer.epoch == trainer.last_epoch or trainer.stopped
        if self.every_epochs and (last or trainer.epoch % self.every_epochs == 0):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save(step_file(self.folder, trainer.step_number))
        if self.keep is not None:
            for old in in_folder(self.folder)[self.keep :]:
                old.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {} if self.best is None else {"best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._best = float(state.get("best", math.inf))
