"""Curves for TensorBoard, written by tensorboardX (which needs no TensorFlow)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.errors import RuntimeUnavailableError
from ..history import Row
from .base import Callback, as_number

if TYPE_CHECKING:
    from ..trainer import Trainer


class TensorBoard(Callback):
    """Writes every number of each epoch as 'epoch/NAME', and with `every_steps` the loss as 'step/loss', for TensorBoard.

    A resumed run goes on in the same folder; steps that it repeats replace those written after the checkpoint. Raises
    RuntimeUnavailableError without tensorboardX.
    """

    order = 50

    def __init__(self, folder: str | Path, *, every_steps: int = 0) -> None:
        try:
            import tensorboardX
        except ImportError:
            raise RuntimeUnavailableError(
                "the TensorBoard callback writes with tensorboardX, which is not installed: pip install 'tensorwright[train]'"
            ) from None
        self.folder, self.every_steps = Path(folder), every_steps
        self._open: Any = tensorboardX.SummaryWriter
        self._writer: Any = None
        if not every_steps:
            self.on_step_end = super().on_step_end  # type: ignore[method-assign]

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Opens the file at the first epoch, when it is known where the run stands."""
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=trainer.step_number or None)

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """Writes the loss of every so manieth step."""
        if trainer.step_number % self.every_steps == 0:
            self._writer.add_scalar("step/loss", loss, trainer.step_number)

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """Writes the epoch's numbers."""
        for name, value in row.items():
            number = as_number(value)
            if number is not None and name != "epoch":
                self._writer.add_scalar(f"epoch/{name}", number, row["epoch"])
        self._writer.flush()

    def on_exit(self, trainer: Trainer) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
