"""Hyper-parameter search by Optuna: a grid, or Bayesian (TPE), with pruning of trials that fall behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..ir.errors import InputError, RuntimeUnavailableError
from .callbacks.base import Callback, monitored
from .history import Row, direction

if TYPE_CHECKING:
    from .trainer import Trainer

SAMPLERS: Final = ("bayesian", "grid", "random")
_GRID_LIMIT: Final = 10_000
Space = Mapping[str, Any]


@dataclass(frozen=True)
class Float:
    """A number in [low, high]; even in its logarithm with `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Int:
    """An integer in [low, high], of `step`; even in its logarithm with `log`."""

    low: int
    high: int
    step: int = 1
    log: bool = False


@dataclass
class Found:
    """What a search found. `study` is Optuna's, for everything else."""

    best: dict[str, Any]
    value: float
    rows: list[dict[str, Any]]
    study: Any = field(repr=False)

    def __str__(self) -> str:
        pruned = sum(row["state"] == "pruned" for row in self.rows)
        return f"best of {len(self.rows)} trials ({pruned} pruned): {self.value:.6g} with {self.best}"


class Pruning(Callback):
    """Reports `monitor` after each epoch, and ends the trial where Optuna finds that it falls behind."""

    order = 40

    def __init__(self, trial: Any, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """Reports; raises optuna.TrialPruned."""
        self.trial.report(monitored(row, self.monitor, "the search"), row["epoch"])
        if self.trial.should_prune():
            raise _optuna().TrialPruned(f"{self.monitor} fell behind in epoch {row['epoch']}")


def search(
    make: Callable[..., Any],
    space: Space,
    *,
    fit: Mapping[str, Any] | None = None,
    sampler: str = "bayesian",
    trials: int | None = None,
    monitor: str = "val_loss",
    mode: str | None = None,
    seed: int = 0,
    prune: bool = True,
    warmup_epochs: int = 1,
    seconds: float | None = None,
    verbose: bool = False,
) -> Found:
    """Tries settings and keeps the best.

    make      with `fit`: make(settings) -> Trainer, which is fitted with these arguments (x=, y=, epochs=, ...); the trial's
              value is the best `monitor` of its epochs. Without: make(settings, pruning) -> float, which trains by itself and
              passes `pruning` among the callbacks
    space     name -> a list of choices, a range (low, high) of floats or ints, (low, high, 'log') for one that is even in its
              logarithm, or `Float` and `Int` of this module
    sampler   'grid': every combination (lists and Ints only), in an order that the seed decides; 'bayesian': TPE (Bergstra
              et al. 2011); 'random'
    trials    how many; default 20, or the whole grid
    monitor   what is reported each epoch; smaller is better, or larger for accuracies and scores (`mode` 'min' or 'max')
    prune     end trials whose value is worse than the median of the others at that epoch, after `warmup_epochs`
    seconds   no trial is started after this time

    The same seed tries the same settings. Raises RuntimeUnavailableError without Optuna, InputError for a wrong space, and
    where no trial was completed; what `make` raises.
    """
    optuna = _optuna()
    if sampler not in SAMPLERS:
        raise InputError(f"sampler is one of {', '.join(SAMPLERS)}, not {sampler!r}")
    if not space:
        raise InputError("the space holds no setting to search over")
    if trials is not None and trials < 1:
        raise InputError(f"trials is at least 1, got {trials}")
    axes = {name: _axis(name, value) for name, value in space.items()}
    sign = direction(monitor, mode)
    if sampler == "grid":
        grid = {name: _choices(name, axis) for name, axis in axes.items()}
        size = 1
        for values in grid.values():
            size *= len(values)
        if size > _GRID_LIMIT:
            raise InputError(f"the grid has {size:,} points, more than {_GRID_LIMIT:,}; search it with sampler='bayesian'")
        # Optuna is given positions: its grid takes plain numbers and strings only, a choice may be anything
        chosen = optuna.samplers.GridSampler({name: list(range(len(v))) for name, v in grid.items()}, seed=seed)
        axes, trials = {name: list(values) for name, values in grid.items()}, min(trials or size, size)
    else:
        chosen = (optuna.samplers.TPESampler if sampler == "bayesian" else optuna.samplers.RandomSampler)(seed=seed)
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=warmup_epochs + 1) if prune else optuna.pruners.NopPruner()

    def objective(trial: Any) -> float:
        settings = {name: _suggest(trial, name, axis) for name, axis in axes.items()}
        trial.set_user_attr("settings", {k: v if isinstance(v, (int, float, str)) else repr(v) for k, v in settings.items()})
        pruning = Pruning(trial, monitor)
        tried.append(settings)
        if fit is None:
            return float(make(settings, pruning))
        options = dict(fit)
        options["callbacks"] = [*options.get("callbacks", ()), pruning]
        trainer = make(settings)
        history = trainer.fit(**{"verbose": False, **options})
        return float(history.best(monitor, mode)[monitor])

    tried: list[dict[str, Any]] = []
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO if verbose else optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=chosen, pruner=pruner, direction="minimize" if sign > 0 else "maximize")
        study.optimize(objective, n_trials=trials or 20, timeout=seconds)
    finally:
        optuna.logging.set_verbosity(before)
    rows = [
        {**settings, "value": t.value, "state": t.state.name.lower(), "epochs": len(t.intermediate_values)}
        for settings, t in zip(tried, study.trials, strict=True)
    ]
    done = [k for k, t in enumerate(study.trials) if t.state.name == "COMPLETE"]
    if not done:
        raise InputError("no trial was completed: all were pruned, or the time was over")
    best = min(done, key=lambda k: sign * study.trials[k].value)
    return Found(tried[best], float(study.trials[best].value), rows, study)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise RuntimeUnavailableError(
            "tw.search searches with Optuna, which is not installed: pip install 'tensorwright[search]'"
        ) from None
    return optuna


def _axis(name: str, value: Any) -> Any:
    """A list, a Float or an Int. Raises InputError for others."""
    if isinstance(value, tuple) and len(value) in (2, 3) and value[2:] in ((), ("log",)):
        low, high = value[:2]
        log = len(value) == 3
        if all(isinstance(v, int) and not isinstance(v, bool) for v in (low, high)):
            value = Int(low, high, log=log)
        elif all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high)):
            value = Float(float(low), float(high), log)
    if isinstance(value, list) and value:
        return value
    if isinstance(value, (Float, Int)):
        if not value.low < value.high or (value.log and value.low <= 0) or (isinstance(value, Int) and value.step < 1):
            raise InputError(f"space[{name!r}]: {value} needs low < high, a positive low where log, and a step of at least 1")
        return value
    raise InputError(f"space[{name!r}] is a list of choices, (low, high) or (low, high, 'log'), a Float or an Int; got {value!r}")


def _choices(name: str, axis: Any) -> list[Any]:
    if isinstance(axis, Int):
        return list(range(axis.low, axis.high + 1, axis.step))
    if isinstance(axis, Float):
        raise InputError(f"space[{name!r}] is a range of floats, of which a grid cannot try each: give a list of values")
    return list(axis)


def _suggest(trial: Any, name: str, axis: Any) -> Any:
    if isinstance(axis, Float):
        return trial.suggest_float(name, axis.low, axis.high, log=axis.log)
    if isinstance(axis, Int):
        return trial.suggest_int(name, axis.low, axis.high, step=axis.step, log=axis.log)
    return axis[trial.suggest_categorical(name, list(range(len(axis))))]
