"""Runs recorded by MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...ir.errors import RuntimeUnavailableError
from ..history import Row
from .base import Callback, as_number

if TYPE_CHECKING:
    from ..trainer import Trainer


class MLflow(Callback):
    """Records a run: the trainer's settings as parameters, every number of each epoch as a metric.

    `parameters` are recorded too. Where a run is already active (`mlflow.start_run()`), that one is used and left open. Raises
    RuntimeUnavailableError without MLflow (`mlflow-skinny` will do).
    """

    order = 50

    def __init__(
        self, experiment: str | None = None, *, run_name: str | None = None, uri: str | None = None, parameters: Any = None
    ) -> None:
        try:
            import mlflow
        except ImportError:
            raise RuntimeUnavailableError(
                "the MLflow callback needs MLflow, which is not installed: pip install 'tensorwright[mlflow]'"
            ) from None
        self._mlflow: Any = mlflow
        self.experiment, self.run_name, self.uri = experiment, run_name, uri
        self.parameters = dict(parameters or {})
        self._run: Any = None
        self._own = False

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Starts the run."""
        if self.uri is not None:
            self._mlflow.set_tracking_uri(self.uri)
        self._run = self._mlflow.active_run()
        if self._run is None:
            if self.experiment is not None:
                self._mlflow.set_experiment(self.experiment)
            self._run = self._mlflow.start_run(run_name=self.run_name)
            self._own = True
        settings = {k: str(v)[:500] for k, v in {**trainer.settings(), **self.parameters}.items()}
        self._mlflow.log_params(settings)

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """Records the epoch's numbers."""
        numbers = {k: n for k, v in row.items() if k != "epoch" and (n := as_number(v)) is not None}
        self._mlflow.log_metrics(numbers, step=row["epoch"])

    def on_exit(self, trainer: Trainer) -> None:
        """Ends the run that this callback started: FAILED where an exception ended it."""
        if self._own:
            self._mlflow.end_run("FINISHED" if trainer.finished else "FAILED")
            self._own = False
