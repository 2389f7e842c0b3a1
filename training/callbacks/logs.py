"""What a run shows and writes down without further packages: a progress bar, a CSV file."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..history import Row
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer


class CSVLog(Callback):
    """One line per epoch in a CSV file; a resumed run adds to it. The columns are those of the first epoch.

    The file is written whole after each epoch from the trainer's history, so a killed run leaves no half line behind.
    """

    order = 50

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """Writes the history."""
        columns = list(dict.fromkeys(k for r in trainer.history for k, v in r.items() if not isinstance(v, list)))
        beside = self.path.with_name(f".{self.path.name}.tmp")
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(trainer.history)
        beside.replace(self.path)


class Progress(Callback):
    """A bar for the epoch that runs and a line for each that has ended, by rich. `fit(verbose=True)` adds it."""

    order = 60
    _PERIOD = 0.1  # seconds between two looks of the bar

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._next = 0.0

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Shows the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, transient=True)
        self._task = self._bar.add_task("compiling", total=trainer.batches)
        self._bar.start()

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """A new bar."""
        self._bar.reset(self._task, total=trainer.batches, completed=trainer.batch)

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """Moves the bar, at most ten times a second."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._PERIOD
            text = f"epoch {trainer.epoch + 1}/{trainer.last_epoch} loss {loss:.4f}"
            self._bar.update(self._task, completed=trainer.batch, description=text)

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """Prints the epoch's line."""
        shown = {k: v for k, v in row.items() if isinstance(v, float) and k not in ("seconds", "learning_rate")}
        figures = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
        line = f"epoch {row['epoch']}/{trainer.last_epoch}  {figures}  ({row['seconds']:.2f} s)"
        self.print(line)

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def on_exit(self, trainer: Trainer) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
