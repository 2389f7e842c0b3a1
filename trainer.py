"""Training loops around one compiled step: forward, backward and update are a single native call per batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from .driver import build
from .driver import compile as compile_model
from .frontend import tree
from .frontend.metrics import Metric, metric
from .frontend.module import Module
from .frontend.optim import Optimizer
from .frontend.specs import Spec
from .frontend.training import Loss, TracedStep, evaluation_step, training_step
from .ir.dims import symbol
from .ir.dtypes import as_dtype
from .ir.errors import InputError, TensorwrightError
from .ir.target import Target
from .runtime.buffers import Array
from .runtime.executable import Executable
from .settings import config, flags

Arrays = tuple[Array, ...]
Schedule = Callable[[int], float]


class NonFiniteLossError(TensorwrightError, ArithmeticError):
    """The loss became NaN or infinite; the model keeps its weights from the end of the epoch before."""


class Trainer:
    """Trains a Module. The training step (forward, backward, clipping, update) is compiled to one native call a batch.

    loss           loss(prediction, target) -> scalar, from tw.losses or any function of Tensors
    optimizer      tw.optim.SGD, Adam, AdamW, or anything with their methods
    metrics        names ('accuracy') or functions (prediction, target) -> scalar
    learning_rate  a number, or a function of the step number; the optimiser's own `lr` if not given
    clip_norm      the greatest global norm of the gradients
    seed           for shuffling and for random draws in the model (dropout): equal seeds give equal weights

    Nothing is compiled before the first `fit`. The last batch of an epoch, if smaller, has a program of its own, made once.
    """

    def __init__(
        self,
        model: Module,
        *,
        loss: Loss,
        optimizer: Optimizer,
        metrics: Sequence[str | Metric] = (),
        learning_rate: float | Schedule | None = None,
        clip_norm: float | None = None,
        seed: int = 0,
        target: str | Target | None = None,
        threads: int | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.metrics = tuple(metrics)
        self.learning_rate = learning_rate
        self.clip_norm = clip_norm
        self.seed = seed
        self.history: list[dict[str, float]] = []
        self.step_number = 0
        self.steps: dict[int, Executable] = {}
        self._target = target
        self._now = flags() if threads is None else replace(flags(), threads=threads)
        self._traced: TracedStep | None = None
        self._types: tuple[Spec, ...] = ()
        self._evaluate: tuple[tuple[Spec, ...], Executable] | None = None
        self._predict: tuple[tuple[Spec, ...], Executable] | None = None
        self._shuffle = np.random.default_rng(seed)
        self._names = tuple(metric(m)[0] for m in self.metrics)

    # ------------------------------------------------------------------ the three verbs

    def fit(
        self,
        x: Any,
        y: Any,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        validation_split: float = 0.0,
        validation_data: tuple[Any, Any] | None = None,
        shuffle: bool = True,
        verbose: bool = True,
    ) -> list[dict[str, float]]:
        """Trains for some epochs more; returns `history`, one row per epoch: loss, metrics, 'val_...' of both, seconds.

        x is an array, or a tuple of them for a model with several arguments; the first axis counts examples.
        `validation_split` sets the last share of the examples apart before shuffling. After each epoch the model holds the
        trained weights. Raises InputError for data that do not fit, NonFiniteLossError.
        """
        inputs, targets = _arrays(x, "x"), _arrays(y, "y")
        count = _count(inputs + targets)
        if epochs < 1 or batch_size < 1:
            raise InputError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
        if not 0 <= validation_split < 1:
            raise InputError(f"validation_split must be at least 0 and below 1, got {validation_split}")
        if validation_split and validation_data is not None:
            raise InputError("give validation_split or validation_data, not both")
        if validation_split:
            kept = count - round(count * validation_split)
            structures = (tree.flatten(x)[1], tree.flatten(y)[1])
            held = ([a[kept:] for a in inputs], [a[kept:] for a in targets])
            validation_data = (tree.unflatten(structures[0], held[0]), tree.unflatten(structures[1], held[1]))
            inputs, targets, count = tuple(a[:kept] for a in inputs), tuple(a[:kept] for a in targets), kept
            if not count:
                raise InputError(f"validation_split={validation_split} leaves no example to train on")
        types = (*_specs(inputs), *_specs(targets))
        if self.steps and types != self._types:
            raise InputError(f"fit was called with other types before: {_show(self._types)}, now {_show(types)}")
        self._types = types
        for step in self.steps.values():
            self._refresh(step)
        batches = _Batches(inputs + targets, batch_size)
        names = ("loss", *self._names)
        with _Progress(epochs, len(batches), verbose) as progress:
            for epoch in range(epochs):
                start = time.perf_counter()
                order = self._shuffle.permutation(count) if shuffle else None
                totals = np.zeros(len(names))
                for number, (size, batch) in enumerate(batches.epoch(order)):
                    results = self._step(size, inputs, targets, y)(np.array(self._rate(), np.float32), *batch)
                    values = [float(v) for v in (results if isinstance(results, tuple) else (results,))]
                    if not math.isfinite(values[0]):
                        self._recover()
                        raise NonFiniteLossError(
                            f"the loss became {values[0]} in epoch {epoch + 1}, batch {number + 1} (step {self.step_number}); "
                            "the model keeps its weights from the epoch before. Look for NaN in the data, lower the rate "
                            f"(now {self._rate():g}), or set clip_norm"
                        )
                    self.step_number += 1
                    totals += np.multiply(values[: len(names)], size)
                    progress.advance(epoch, values[0])
                row = {"epoch": len(self.history) + 1, **dict(zip(names, (totals / count).tolist(), strict=True))}
                self._store()
                if validation_data is not None:
                    scores = self.evaluate(*validation_data, batch_size=batch_size)
                    row |= {f"val_{k}": v for k, v in scores.items()}
                row["seconds"] = time.perf_counter() - start
                self.history.append(row)
                progress.epoch(epoch, row)
        return self.history

    def evaluate(self, x: Any, y: Any, *, batch_size: int = 256) -> dict[str, float]:
        """Mean loss and metrics over all examples, with the model in inference mode."""
        inputs, targets = _arrays(x, "x"), _arrays(y, "y")
        count = _count(inputs + targets)
        specs = (*_specs(inputs), _target_spec(y, targets))
        leaves = (*_specs(inputs), *_specs(targets))
        if self._evaluate is None or self._evaluate[0] != leaves:
            traced = evaluation_step(self.model, self.loss, *specs, metrics=self.metrics)
            self._evaluate = (leaves, build(traced.graph, traced.values(), target=self._target, now=self._now))
        exe = self._evaluate[1]
        self._refresh(exe)
        totals = np.zeros(1 + len(self._names))
        for size, batch in _Batches(inputs + targets, batch_size).epoch(None):
            results = exe(*batch)
            totals += np.multiply([float(v) for v in (results if isinstance(results, tuple) else (results,))], size)
        return dict(zip(("loss", *self._names), (totals / count).tolist(), strict=True))

    def predict(self, x: Any, *, batch_size: int = 256) -> Any:
        """The model's results for all examples, in inference mode: an array, or what the model returns, of arrays."""
        inputs = _arrays(x, "x")
        count = _count(inputs)
        specs = _specs(inputs)
        if self._predict is None or self._predict[0] != specs:
            with config(**asdict(self._now)):
                exe = compile_model(self.model, *specs, target=self._target)
            self._predict = (specs, exe)
        exe = self._predict[1]
        self._refresh(exe)
        found: list[Array] = []
        structure: Any = None
        at = 0
        for size, batch in _Batches(inputs, batch_size).epoch(None):
            leaves, structure = tree.flatten(exe(*batch))
            if not found:
                found = [np.empty((count, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
            for whole, leaf in zip(found, leaves, strict=True):
                whole[at : at + size] = leaf
            at += size
        return tree.unflatten(structure, found)

    # ------------------------------------------------------------------ state

    def _step(self, size: int, inputs: Arrays, targets: Arrays, y: Any) -> Executable:
        """The compiled step for batches of a size. Those for different sizes work on the same state."""
        found = self.steps.get(size)
        if found is None:
            specs = (*_specs(inputs, size), tree.unflatten(tree.flatten(y)[1], _specs(targets, size)))
            traced = training_step(
                self.model, self.loss, self.optimizer, *specs, metrics=self.metrics, clip_norm=self.clip_norm, seed=self.seed
            )
            first = next(iter(self.steps.values()), None)
            found = build(traced.graph, traced.state, purpose="training", target=self._target, now=self._now, shares=first)
            self.steps[size] = found
            if self._traced is None:
                self._traced = traced
        return found

    @property
    def step(self) -> Executable | None:
        """The compiled training step for the largest batches so far; None before the first `fit`."""
        return self.steps[max(self.steps)] if self.steps else None

    def _store(self) -> None:
        """Puts the trained weights into the model."""
        assert self.step is not None and self._traced is not None
        self._snapshot = self.step.parameters
        self._traced.store(self._snapshot)

    def _recover(self) -> None:
        """Takes the step's state back to the end of the last epoch."""
        assert self.step is not None and self._traced is not None
        for step in self.steps.values():
            step.set_parameters(getattr(self, "_snapshot", self._traced.state))

    def _refresh(self, exe: Executable) -> None:
        """Binds the model's weights of this moment, where they are others than those bound."""
        now = {f"{n}": p.data for n, p in _weights(self.model).items()}
        bound = exe.parameters
        changed = {n: v for n, v in now.items() if n in bound and not np.array_equal(bound[n], v, equal_nan=v.dtype.kind == "f")}
        if changed:
            exe.set_parameters(changed)

    def _rate(self) -> float:
        if self.learning_rate is None:
            return self.optimizer.lr
        return self.learning_rate(self.step_number) if callable(self.learning_rate) else self.learning_rate


def _weights(model: Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class _Batches:
    """Cuts arrays into batches; the arrays that hold a batch are made once per size."""

    def __init__(self, arrays: Arrays, size: int) -> None:
        self.arrays = arrays
        self.size = size
        self.count: int = arrays[0].shape[0]
        self._room: dict[int, Arrays] = {}

    def __len__(self) -> int:
        return (self.count + self.size - 1) // self.size

    def epoch(self, order: Array | None) -> Iterator[tuple[int, Arrays]]:
        """(size, batch) of one pass over the data, in this order."""
        for start in range(0, self.count, self.size):
            stop = min(start + self.size, self.count)
            if order is None:
                yield stop - start, tuple(a[start:stop] for a in self.arrays)
                continue
            room = self._room.get(stop - start)
            if room is None:
                room = tuple(np.empty((stop - start, *a.shape[1:]), a.dtype) for a in self.arrays)
                self._room[stop - start] = room
            for a, into in zip(self.arrays, room, strict=True):
                np.take(a, order[start:stop], axis=0, out=into, mode="clip")
            yield stop - start, room


def _arrays(value: Any, name: str) -> Arrays:
    """An array, or a tuple of arrays, as a tuple. Raises InputError for what is not numeric, or f64 (not converted silently)."""
    found = []
    for k, leaf in enumerate(tree.flatten(value)[0]):
        where = name if not isinstance(value, tuple) else f"{name}[{k}]"
        array = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
        if array.dtype == np.float64:
            raise InputError(f"{where} is float64; models compute in float32: pass {where}.astype(np.float32)")
        as_dtype(array.dtype)
        if array.ndim == 0:
            raise InputError(f"{where} has no axis of examples: it is a scalar")
        found.append(array)
    if not found:
        raise InputError(f"{name} holds no array")
    return tuple(found)


def _count(arrays: Arrays) -> int:
    counts = {a.shape[0] for a in arrays}
    if len(counts) > 1:
        raise InputError(f"the arrays have different numbers of examples: {[a.shape[0] for a in arrays]}")
    if not counts or 0 in counts:
        raise InputError("there are no examples")
    return int(counts.pop())


def _specs(arrays: Arrays, size: int | None = None) -> tuple[Spec, ...]:
    """Types of a batch; its size is symbolic unless given."""
    batch = symbol("batch") if size is None else size
    return tuple(Spec((batch, *a.shape[1:]), as_dtype(a.dtype)) for a in arrays)


def _target_spec(y: Any, targets: Arrays) -> Any:
    return tree.unflatten(tree.flatten(y)[1], _specs(targets))


def _show(types: Sequence[Spec]) -> str:
    return ", ".join(map(str, types))


class _Progress:
    """A bar for the epoch that runs and a line for each that has ended; nothing where not asked for."""

    def __init__(self, epochs: int, batches: int, verbose: bool) -> None:
        self.epochs, self.batches, self.verbose = epochs, batches, verbose
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        if self.verbose:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
            self._task = self._bar.add_task("compiling", total=self.epochs * self.batches)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, epoch: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=f"epoch {epoch + 1}/{self.epochs} loss {loss:.4f}")

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        if self._bar is not None:
            figures = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in ("epoch", "seconds"))
            line = f"epoch {epoch + 1}/{self.epochs}  {figures}  ({row['seconds']:.2f} s)"
            self._bar.console.print(line, soft_wrap=True, highlight=False)
