"""What a checkpoint holds of a Trainer, and how a Trainer takes it over."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..frontend.schedules import Schedule
from ..runtime.buffers import Array
from .callbacks.base import Callback
from .errors import CheckpointError, CheckpointWarning
from .position import Position
from .steps import check_state, differences, weights_of_model

if TYPE_CHECKING:
    from .trainer import Trainer


def snapshot(t: Trainer) -> tuple[dict[str, Any], dict[str, Array]]:
    """(meta, arrays) of everything that decides how the run goes on."""
    state = t._steps.state()
    weights = weights_of_model(t.model)
    pending = t._pending or {}
    meta: dict[str, Any] = {
        "model": {n: _kind(p.data) for n, p in weights.items()},
        "settings": t.settings(),
        "state": list(state),
        "averages": dict(t._steps.averages),
        "step": t.step_number,
        "epoch": t.epoch,
        "batch": t.batch,
        "at": t._at.state_dict(),
        "stopped": t.stopped,
        "history": list(t.history),
        "schedule": pending.get("schedule", t.learning_rate.state_dict() if isinstance(t.learning_rate, Schedule) else {}),
        "callbacks": pending.get("callbacks", {n: c.state_dict() for n, c in _named(t._callbacks)}),
        "metrics": {n: _memory(o) for n, o in t._objects.items()} if t.batch else {},
        "data": pending.get("data", t._run_data),
    }
    return meta, {**{n: p.data for n, p in weights.items()}, **state}


def restore(t: Trainer, meta: Mapping[str, Any], arrays: Mapping[str, Array], path: Path) -> None:
    """Takes over a checkpoint; the trainer is as it was unless all of it fits. Raises CheckpointError."""
    try:
        model, settings, names = dict(meta["model"]), dict(meta["settings"]), list(meta["state"])
        state = {n: arrays[n] for n in names}
        weights = {n: arrays[n] for n in model}
        at, history = Position.of(meta["at"]), [dict(row) for row in meta["history"]]
        numbers = {k: int(meta[k]) for k in ("step", "epoch", "batch")}
        if any(_kind(weights[n]) != kind for n, kind in model.items()):
            raise ValueError("its weights are not those it lists")
        metrics, stopped, averages = dict(meta["metrics"]), str(meta["stopped"]), dict(meta["averages"])
        pending = {k: meta[k] for k in ("schedule", "callbacks", "data")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold the state of a Trainer: {error!r}") from error
    here = {n: _kind(p.data) for n, p in weights_of_model(t.model).items()}
    if lines := differences(here, model):
        listed = "\n".join(f"  {line}" for line in lines)
        raise CheckpointError(
            f"{path} is the checkpoint of another model ({settings.get('model', 'unknown')}); this one is a "
            f"{type(t.model).__name__}. Parameters that differ:\n{listed}"
        )
    now = t.settings()
    changed = [f"{k}: {settings.get(k)} then, {now.get(k)} now" for k in {**settings, **now} if settings.get(k) != now.get(k)]
    if len(at.totals) != len(t._functions):
        raise CheckpointError(f"{path} was made with {len(at.totals)} metrics in the graph; this trainer has {len(t._functions)}")
    if t._steps.any is not None and state:
        check_state(t._steps.any.parameters, state)
    if changed:
        warnings.warn(
            f"the run of {path} goes on under other settings, and not as it would have: " + "; ".join(changed),
            CheckpointWarning,
            stacklevel=4,
        )
    for name, p in weights_of_model(t.model).items():
        p.data = weights[name]
    t._steps.restored, t._steps.averages = state, averages
    t._steps.load(state)
    t.history[:] = history
    t.step_number, t.epoch, t.batch = numbers["step"], numbers["epoch"], numbers["batch"]
    t._at, t.stopped = at, stopped
    for name, memory in metrics.items():
        if name in t._objects:
            _remember(t._objects[name], memory)
    t._pending = pending


def restore_callbacks(t: Trainer, pending: Mapping[str, Any]) -> None:
    """Gives the callbacks of the fit that begins, and the schedule, the state they had. Warns of those that are not there."""
    if isinstance(t.learning_rate, Schedule) and pending["schedule"]:
        t.learning_rate.load_state_dict(pending["schedule"])
    states = dict(pending["callbacks"])
    for name, callback in _named(t._callbacks):
        if name in states:
            callback.load_state_dict(states.pop(name))
    missing = [n for n, state in states.items() if state]
    if missing:
        warnings.warn(
            f"the run had callbacks that this fit lacks, and goes on without them: {', '.join(missing)}",
            CheckpointWarning,
            stacklevel=4,
        )


def check_data(t: Trainer, pending: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a run stopped within an epoch cannot go on with these data; warns at the end of an epoch."""
    before, now = dict(pending["data"]), t._run_data
    changed = [f"{k}: {before.get(k)} then, {now.get(k)} now" for k in {**before, **now} if before.get(k) != now.get(k)]
    if not before or not changed:
        return
    text = "; ".join(changed)
    if t.batch:
        raise CheckpointError(
            f"the run stopped after batch {t.batch} of epoch {t.epoch + 1} and cannot go on there with other data: {text}. Give "
            "fit the same, or resume from a checkpoint made at the end of an epoch"
        )
    warnings.warn(f"the run goes on with other data than before: {text}", CheckpointWarning, stacklevel=4)


def spelled(value: Any) -> str:
    """A setting as text that is the same in every process: no addresses."""
    if isinstance(value, str):
        return value
    if isinstance(value, functools.partial):
        inner = [spelled(value.func), *map(spelled, value.args), *(f"{k}={spelled(v)}" for k, v in value.keywords.items())]
        return f"partial({', '.join(inner)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {spelled(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(spelled, value))}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _named(callbacks: list[Callback]) -> list[tuple[str, Callback]]:
    """Each with its class's name; the second of a class gets '.2'."""
    seen: dict[str, int] = {}
    found = []
    for c in callbacks:
        name = type(c).__name__
        seen[name] = seen.get(name, 0) + 1
        found.append((name if seen[name] == 1 else f"{name}.{seen[name]}", c))
    return found


def _memory(metric: Any) -> dict[str, Any]:
    """What a metric that sees all batches has seen so far in an epoch: by its `state_dict`, else its attributes."""
    return dict(metric.state_dict() if hasattr(metric, "state_dict") else vars(metric))


def _remember(metric: Any, memory: Mapping[str, Any]) -> None:
    if hasattr(metric, "load_state_dict"):
        metric.load_state_dict(memory)
    else:
        vars(metric).update(memory)


def _kind(array: Array) -> str:
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"
