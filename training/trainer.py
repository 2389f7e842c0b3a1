"""The Trainer: fit, evaluate, predict around one compiled step, forward, backward and update in a single native call a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..frontend import tree
from ..frontend.metrics import Accumulator, Metric, separate
from ..frontend.module import Module
from ..frontend.optim import EMA, Optimizer
from ..frontend.optim.base import Rate
from ..frontend.regularizers import Regularizers
from ..frontend.schedules import Schedule
from ..frontend.training import Loss, TracedStep, training_step
from ..ir.errors import InputError
from ..ir.memory import MemoryReport, show_bytes
from ..ir.target import Target
from ..runtime.buffers import Array
from ..runtime.executable import Executable
from ..settings import flags
from . import checkpoint, saving
from .callbacks.base import Callback, monitored
from .callbacks.checkpoint import Checkpoint
from .callbacks.logs import Progress
from .data import (
    Arrays,
    ArraySource,
    Augment,
    ClassWeight,
    IterableSource,
    Source,
    arrays_of,
    batch_specs,
    count_of,
    described,
    is_array_like,
    pays_to_prefetch,
    prefetched,
    split_off,
    weights_of,
)
from .diagnose import Finding, explain
from .errors import CheckpointError, NonFiniteLossError
from .history import History, Row
from .judge import Judge, arguments, results_of
from .labels import ClassNumbers, class_numbers
from .position import Position
from .steps import Steps, weights_of_model


class Trainer:
    """Trains a Module. The training step (forward, backward, clipping, update) is compiled to one native call a batch.

    loss              loss(prediction, target) -> scalar, from tw.losses or any function of Tensors
    optimizer         from tw.optim, or anything with their methods
    metrics           names ('accuracy', 'top_5', 'f1', 'auc'), functions (prediction, target) -> scalar, or objects that see
                      all predictions (tw.metrics.F1(), ...)
    learning_rate     a number, a tw.schedules object, or a function of the step number; the optimiser's own `lr` if not
                      given. A schedule that observes is shown 'val_loss' (without validation data 'loss') after each epoch
    regularizers      penalties on parameters: tw.regularizers.L2(1e-4), or a dict of them by pattern of parameter paths
    clip_value        cuts each gradient to [-clip_value, clip_value]
    clip_norm         the greatest norm of each parameter's gradient
    clip_global_norm  the greatest norm of all gradients together
    accumulate        cuts each batch into this many equal parts, one after another inside the step: the gradients are
                      averaged, and only one part's activations are in memory
    ema               keeps a moving average of the weights: a decay, or tw.optim.EMA; evaluation and predictions use it
    precision         'bf16' lets the step compute in bf16 where that is safe; weights stay f32
    memory_budget     the most bytes a step may need: what does not fit is computed again instead of kept
    seed              for shuffling, augmentation and random draws in the model (dropout): equal seeds give equal weights
    target, threads   as for `tw.compile`

    Nothing is compiled before the first `fit`. The last batch of an epoch, if smaller, has a program of its own, made once.
    Weights live in the compiled step and are updated in place; the model gets them at the end of each epoch.

    Attributes to read: `history`, `epoch` (epochs done), `batch` (batches done in the running epoch), `step_number` (steps
    done in all), `step` (the compiled step), `learning_rate` (which may be assigned).
    """

    def __init__(
        self,
        model: Module,
        *,
        loss: Loss,
        optimizer: Optimizer,
        metrics: Sequence[str | Metric | Accumulator] = (),
        learning_rate: Rate | None = None,
        regularizers: Regularizers | None = None,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        clip_global_norm: float | None = None,
        accumulate: int = 1,
        ema: float | EMA | None = None,
        precision: str = "f32",
        memory_budget: int | None = None,
        seed: int = 0,
        target: str | Target | None = None,
        threads: int | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.learning_rate: Rate = optimizer.lr if learning_rate is None else learning_rate
        self.ema = ema
        self.seed = seed
        self.history = History()
        self.epoch = 0
        self.batch = 0
        self.step_number = 0
        self.last_epoch = 0
        self.batches: int | None = None
        self.stopped = ""
        self.finished = False
        self.rate_monitor: str | None = None
        self._given_rate = self.learning_rate
        self._functions, self._objects = separate(metrics)
        given: dict[str, Any] = {
            "regularizers": regularizers,
            "clip_value": clip_value,
            "clip_norm": clip_norm,
            "clip_global_norm": clip_global_norm,
            "accumulate": None if accumulate == 1 else accumulate,
            "ema": ema,
            "precision": None if precision == "f32" else precision,
        }
        self._options = {k: v for k, v in given.items() if v is not None}
        self._built = {"memory_budget": memory_budget, "precision": given["precision"]}
        self._target = target
        self._flags = flags() if threads is None else replace(flags(), threads=threads)
        self._structures: tuple[tree.Structure, tree.Structure] | None = None
        self._types: tuple[Any, ...] = ()
        self._weighted = False
        self._labels: list[ClassNumbers] | None = None
        self._steps = self._new_steps()
        self._judge = Judge(model, loss, self._functions, self._objects, target, self._flags)
        self._callbacks: list[Callback] = []
        self._run_data: dict[str, Any] = {}
        self._pending: dict[str, Any] | None = None  # what a checkpoint says of callbacks and data, until a fit has them
        self._at = Position(len(self._functions))
        self._fitting = False

    # ------------------------------------------------------------------ the three verbs

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        validation_split: float = 0.0,
        validation_data: Any = None,
        sample_weight: Any = None,
        class_weight: ClassWeight | None = None,
        shuffle: bool = True,
        augment: Augment | None = None,
        drop_last: bool = False,
        prefetch: int | None = None,
        callbacks: Sequence[Callback] = (),
        resume: str | Path | bool | None = None,
        verbose: bool = True,
    ) -> History:
        """Trains for some epochs more; returns `history`, one row per epoch: loss, metrics, 'val_...' of both, seconds.

        x, y              arrays, or nests of arrays; a tuple x is for a model with several arguments; the first axis counts
                          examples. Or x alone: an iterable of batches (x, y) or (x, y, sample_weight) that can be iterated
                          again, or a function that returns an iterator, given the epoch's number if it takes an argument
        validation_split  sets the last share of the examples apart, before shuffling
        validation_data   (x, y), (x, y, sample_weight), or an iterable of batches
        sample_weight     a weight per example: the loss is sum(weight * loss) / sum(weight) over a batch
        class_weight      {class: weight} or a sequence, multiplied to the weight of each example of that class
        shuffle           a new order each epoch, which depends on `seed` and the epoch's number alone
        augment           augment(x, y, rng) -> (x, y), called with each batch (its own to change) and a numpy Generator that
                          depends on seed, epoch and batch alone
        drop_last         leave out the last batch of an epoch where it is smaller
        prefetch          how many batches a thread prepares ahead; 0 for none, None: 2 where it pays
        callbacks         from tw.callbacks, or of your own
        resume            a checkpoint or a folder of them to go on from; True: the folder of the Checkpoint callback. Then
                          `epochs` counts from the run's start, so that a killed script can simply be started again. A folder
                          without a checkpoint starts anew
        verbose           a progress bar, a line for each epoch, and the peak memory of a step before the first

        After each epoch, and when fit is left by an exception, the model holds the trained weights. Raises InputError for data
        that do not fit, NonFiniteLossError, CheckpointError; what a callback raises.
        """
        if epochs < 1 or batch_size < 1:
            raise InputError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
        if not 0 <= validation_split < 1:
            raise InputError(f"validation_split must be at least 0 and below 1, got {validation_split}")
        if validation_split and validation_data is not None:
            raise InputError("give validation_split or validation_data, not both")
        if prefetch is not None and prefetch < 0:
            raise InputError(f"prefetch is a number of batches, at least 0; got {prefetch}")
        if validation_split:
            (x, y, sample_weight), validation_data = split_off(x, y, sample_weight, validation_split)
        options: dict[str, Any] = {"shuffle": shuffle, "augment": augment, "drop_last": drop_last}
        source = self._source(x, y, batch_size, sample_weight, class_weight, **options)
        ahead = (2 if pays_to_prefetch(source) else 0) if prefetch is None else prefetch
        if isinstance(source, ArraySource):
            source.rooms = ahead + 1
            self._accept(source)
        judged = None if validation_data is None else self._validation(validation_data, batch_size)
        self._callbacks = sorted([*callbacks, *([Progress()] if verbose else [])], key=lambda c: c.order)
        self._run_data = described(source, **options)
        self.finished, self.stopped = False, ""
        resumed = self._resume_for_fit(resume)
        self._steps.refresh(self.model)
        self.last_epoch = self.epoch + epochs if resume in (None, False) else epochs
        self.batches = source.batches
        try:
            self._fitting = True
            self._begin(resumed, verbose)
            while self.epoch < self.last_epoch and not self.stopped:
                self._train_epoch(source, ahead)
                self._end_epoch(judged)
            for c in self._callbacks:
                c.on_fit_end(self)
            self.finished = True
        except NonFiniteLossError:
            raise
        except BaseException:
            self._steps.store(self.model)  # nothing that was learnt is lost
            raise
        finally:
            self._fitting = False
            self._steps.announce = None
            for c in self._callbacks:
                c.on_exit(self)
        return self.history

    def evaluate(
        self, x: Any, y: Any = None, *, batch_size: int = 256, sample_weight: Any = None, averaged: bool | None = None
    ) -> dict[str, Any]:
        """Mean loss and metrics over all examples, with the model in inference mode.

        x, y, sample_weight as for `fit`; or x is an iterable of batches. With `ema`, the averaged weights are judged unless
        `averaged` is False.
        """
        source = self._source(x, y, batch_size, sample_weight, None)
        if isinstance(source, ArraySource):
            self._check_labels(source)
        return self._judge.evaluate(source, self._current(averaged))

    def predict(self, x: Any, *, batch_size: int = 256, averaged: bool | None = None) -> Any:
        """The model's results for all examples, in inference mode: an array, or what the model returns, of arrays."""
        source: Source
        if is_array_like(x):
            source = ArraySource(x, None, batch_size)
        else:
            source = IterableSource(x)
        return self._judge.predict(source, self._current(averaged))

    # ------------------------------------------------------------------ the loop

    def _begin(self, resumed: bool, verbose: bool) -> None:
        """Starts the callbacks, and hands them what a checkpoint knew of them."""
        for c in self._callbacks:
            c.on_fit_begin(self)
        if self._pending is not None:
            saving.restore_callbacks(self, self._pending)
            saving.check_data(self, self._pending)
            self._pending = None
        if not resumed:
            self.batch, self._at = 0, Position(len(self._functions))
        if verbose and not self._steps.programs:
            show = next(c for c in self._callbacks if isinstance(c, Progress)).print

            def announce(exe: Executable) -> None:
                if not self._steps.programs:
                    show(f"memory of one step: {_memory_line(exe.memory)}")

            self._steps.announce = announce

    def _train_epoch(self, source: Source, ahead: int) -> None:
        """The batches of an epoch that are still to be done."""
        began = time.perf_counter()
        for c in self._callbacks:
            c.on_epoch_begin(self)
        for o in self._objects.values():
            if not self.batch:
                o.reset()
        hooks = [c.on_step_end for c in self._callbacks if _overrides(c)]
        at, before = self._at, self._at.seconds
        program, rate, metrics = self._steps.program, np.zeros((), np.float32), len(self._functions)
        finite = 0  # where the step's results say whether they are
        check = not isinstance(source, ArraySource) or source.augment is not None
        with prefetched(source, self.epoch, self.batch, ahead) as batches:
            for size, arrays in batches:
                if check:
                    self._check_batch(source, arrays)
                exe = program(arrays)
                if not finite:
                    assert self._steps.traced is not None
                    finite = self._steps.traced.results.index("finite")
                rate[()] = self.rate()
                results = exe(rate, *arrays)
                if not results[finite]:
                    self._non_finite(source, exe, float(results[0]), rate, size, arrays)
                loss = results[0].item()
                weight = arrays[-1].sum(dtype=np.float64).item() if self._weighted else size
                at.loss += loss * weight
                at.weight += weight
                at.examples += size
                for k in range(metrics):
                    at.totals[k] += results[k + 1].item() * size
                if finite != metrics + 1:
                    at.penalty += results[metrics + 1].item() * size
                if self._objects:
                    self._observe(results[finite + 1 :], arrays)
                self.step_number += 1
                self.batch += 1
                if hooks:
                    at.seconds = before + time.perf_counter() - began
                    for hook in hooks:
                        hook(self, loss)
        at.seconds = before + time.perf_counter() - began

    def _observe(self, predictions: Sequence[Array], arrays: Arrays) -> None:
        """Shows a batch to the metrics that see all of them; copies, as batches and results are used again."""
        assert self._structures is not None and self._steps.traced is not None
        inputs, targets = (s.leaves for s in self._structures)
        prediction = tree.unflatten(self._steps.traced.structure, [p.copy() for p in predictions])
        target = tree.unflatten(self._structures[1], [a.copy() for a in arrays[inputs : inputs + targets]])
        for o in self._objects.values():
            o.update(prediction, target)

    def _end_epoch(self, judged: Source | None) -> None:
        """The epoch's row, validation, callbacks."""
        began = time.perf_counter()
        at = self._at
        row: Row = {"epoch": self.epoch + 1}
        penalised = self._steps.traced is not None and "penalty" in self._steps.traced.results
        row |= at.row(list(self._functions), penalised) | results_of(self._objects)
        self._steps.store(self.model)
        if judged is not None:
            row |= {f"val_{k}": v for k, v in self._judge.evaluate(judged, self._current(None)).items()}
        row["learning_rate"] = float(self.rate(max(0, self.step_number - 1)))
        if isinstance(self.learning_rate, Schedule) and self.learning_rate.observes:
            name = self.rate_monitor or ("val_loss" if "val_loss" in row else "loss")
            self.learning_rate.observe(monitored(row, name, "the learning rate's schedule"))
        row["seconds"] = at.seconds + time.perf_counter() - began
        self.history.append(row)
        self.epoch += 1
        self.batch, self._at = 0, Position(len(self._functions))
        for c in self._callbacks:
            c.on_epoch_end(self, row)

    def rate(self, step: int | None = None) -> float:
        """The learning rate of a step (default: the next)."""
        rate = self.learning_rate
        return rate(self.step_number if step is None else step) if callable(rate) else float(rate)

    def stop(self, reason: str = "stopped by a callback") -> None:
        """Ends the fit after this epoch; for callbacks."""
        self.stopped = reason

    def _non_finite(self, source: Source, exe: Executable, loss: float, rate: Array, size: int, arrays: Arrays) -> NoReturn:
        """Says where it came from. The step has left the state as it was before."""
        where = f"epoch {self.epoch + 1}, batch {self.batch + 1} (step {self.step_number})"
        names = [n for n, _ in exe.arguments]
        state = exe.parameters
        try:
            found = explain(exe.graph, state, dict(zip(names, (rate, *arrays), strict=True)))
        except Exception as error:  # the loss is what has to be reported, whatever happens while looking for its cause
            found = Finding(f"Looking for where it came from failed: {error!r}")
        examples = source.examples(self.epoch, self.batch, size)
        if found.row is not None and examples is not None and found.row < len(examples):
            found.text += f" (example {int(examples[found.row])} of the data)"
        if found.in_state:
            # a gradient of an earlier step was not finite, though its loss was: that state is worth nothing
            self._steps = self._new_steps()
            kept = "The model keeps its weights from the end of the epoch before, the optimiser starts anew"
        else:
            self._steps.store(self.model)
            kept = "Model and optimiser keep what they held before this step"
        what = f"the loss became {loss}" if not math.isfinite(loss) else "the gradients are not finite"
        raise NonFiniteLossError(
            f"{what} in {where}. {found.text}\n{kept}. Look for such values in the data, lower the learning rate (now "
            f"{float(rate):g}), or set clip_global_norm"
        )

    # ------------------------------------------------------------------ data

    def _source(
        self, x: Any, y: Any, batch_size: int, sample_weight: Any, class_weight: ClassWeight | None, **options: Any
    ) -> Source:
        if not is_array_like(x):
            if y is not None or sample_weight is not None:
                raise InputError(
                    f"x is a {type(x).__name__}, taken as an iterable of batches (x, y); y and sample_weight belong into them. "
                    "For a list of numbers pass np.asarray(x, np.float32)"
                )
            return IterableSource(x, class_weight=class_weight, augment=options.get("augment"))
        if y is None:
            arrays_of(x, "x")
            raise InputError("y is missing: fit and evaluate need targets; without any, pass x again or an array of zeros")
        weight = None
        if sample_weight is not None or class_weight is not None:
            targets = arrays_of(y, "y")
            weight = weights_of(targets, sample_weight, class_weight, count_of((*arrays_of(x, "x"), *targets)))
        return ArraySource(x, y, batch_size, weight=weight, seed=self.seed, **options)

    def _validation(self, data: Any, batch_size: int) -> Source:
        weight = None
        if isinstance(data, tuple) and len(data) in (2, 3) and is_array_like(data[0]):
            x, y, weight = (*data, None) if len(data) == 2 else data
        else:
            x, y = data, None
        source = self._source(x, y, batch_size, weight, None)
        if isinstance(source, ArraySource):
            self._check_labels(source, "the validation y")
        return source

    def _accept(self, source: ArraySource) -> None:
        """Checks the data of a fit against those of the fits before. Raises InputError."""
        data = source.split + source.structures[1].leaves
        weighted = len(source.arrays) > data
        types = (source.structures, batch_specs(source.arrays[:data]))
        if self._types and self._types != types:
            shown = ["; ".join(map(str, t[1])) for t in (self._types, types)]
            raise InputError(f"fit was called with other types before: {shown[0]}, now {shown[1]}")
        self._types, self._structures, self._weighted = types, source.structures, weighted
        self._check_labels(source)

    def _check_labels(self, source: ArraySource, name: str = "y") -> None:
        """Raises InputError for class numbers that the loss has no class for."""
        inputs, targets = source.split, source.structures[1].leaves
        arrays = source.arrays[inputs : inputs + targets]
        if any(a.dtype.kind in "iu" for a in arrays):
            for label in self._class_numbers(source.structures, source.arrays):
                label.check(arrays, name)

    def _class_numbers(self, structures: tuple[tree.Structure, tree.Structure], arrays: Arrays) -> list[ClassNumbers]:
        if self._labels is None:
            inputs, targets = (s.leaves for s in structures)
            specs = batch_specs(arrays, size=min(2, len(arrays[0])))
            y = tree.unflatten(structures[1], specs[inputs : inputs + targets])
            self._labels = class_numbers(self.model, self.loss, (*arguments(structures[0], specs[:inputs]), y))
        return self._labels

    def _check_batch(self, source: Source, arrays: Arrays) -> None:
        """What is known of arrays before the fit, and of the caller's batches only now."""
        structures = source.structures
        assert structures is not None
        inputs, targets = (s.leaves for s in structures)
        if not targets:
            raise InputError("the batches hold no targets: fit needs (x, y)")
        self._weighted = len(arrays) > inputs + targets
        if self._structures is None:
            self._structures = structures
        elif self._structures != structures:
            raise InputError(f"batch {self.batch} of epoch {self.epoch + 1} is not made up as those before")
        leaves = arrays[inputs : inputs + targets]
        if any(a.dtype.kind in "iu" for a in leaves):
            for label in self._class_numbers(structures, arrays):
                label.check(leaves, f"y of batch {self.batch} of epoch {self.epoch + 1}")

    # ------------------------------------------------------------------ programs and weights

    def _new_steps(self) -> Steps:
        options = {k: v for k, v in self._built.items() if v is not None}
        return Steps(self._trace, self._target, self._flags, **options)

    def _trace(self, arrays: Sequence[Array]) -> TracedStep:
        """The training step for batches like these."""
        assert self._structures is not None
        inputs, targets = (s.leaves for s in self._structures)
        specs = batch_specs(arrays, exact=True)
        y = tree.unflatten(self._structures[1], specs[inputs : inputs + targets])
        options = dict(self._options)
        if "accumulate" in options:  # a smaller last batch is cut into as many equal parts as it can be
            options["accumulate"] = math.gcd(options["accumulate"], len(arrays[0]))
        return training_step(
            self.model,
            self.loss,
            self.optimizer,
            *arguments(self._structures[0], specs[:inputs]),
            y,
            metrics=list(self._functions.values()),
            sample_weight=self._weighted,
            guard=True,
            seed=self.seed,
            predictions=bool(self._objects),
            **options,
        )

    @property
    def step(self) -> Executable | None:
        """The compiled training step for the largest batches so far; None before the first `fit`."""
        return self._steps.largest

    @property
    def steps(self) -> dict[int, Executable]:
        """The compiled training steps by batch size."""
        return {shapes[0][0]: exe for shapes, exe in self._steps.programs.items()}

    def weights(self) -> dict[str, Array]:
        """Copies of the model's parameters and buffers by path, as trained so far."""
        state = self._steps.state()
        return {n: state.get(n, p.data).copy() for n, p in weights_of_model(self.model).items()}

    def set_weights(self, weights: Mapping[str, Array]) -> None:
        """Gives the model and the training step these weights; the optimiser's state stays."""
        self.model.load_state_dict(dict(weights), strict=False)
        self._steps.refresh(self.model)

    def set_masks(self, masks: Mapping[str, Array]) -> None:
        """Gives parameters of the model masks by path: what a mask leaves out is zero now, and stays so in every step.

        Raises InputError for a path without parameter, and where the compiled step knows no mask of it: give parameters their
        masks before the first fit (all true, if nothing is to go yet).
        """
        own, state = dict(self.model.named_parameters()), self._steps.state()
        unknown = [path for path in masks if path not in own or (state and f"mask.{path}" not in state)]
        if unknown:
            raise InputError(f"the training step has no masks of {', '.join(unknown[:5])}: set them before the first fit")
        values: dict[str, Array] = {}
        for path, mask in masks.items():
            own[path].mask = mask
            values[f"mask.{path}"] = np.asarray(mask)
            for name in (path, self._steps.averages.get(path, path)):
                if name in state:
                    values[name] = np.where(mask, state[name], np.zeros((), state[name].dtype))
        if state:
            self._steps.load(values)

    def averaged_weights(self) -> dict[str, Array]:
        """The moving averages of the weights (`ema`), buffers as they are; for `model.load_state_dict`.

        Raises InputError without `ema`, or before the first fit.
        """
        averages = self._steps.averages
        if not averages:
            raise InputError("there are no averaged weights: give the Trainer ema=0.999, say, and fit it")
        state = self._steps.state()
        return {n: state.get(averages.get(n, n), p.data) for n, p in weights_of_model(self.model).items()}

    def _current(self, averaged: bool | None) -> dict[str, Array]:
        """The weights to judge: the averaged ones where there are, else the model's."""
        if averaged or (averaged is None and self._steps.averages):
            return self.averaged_weights()
        return {n: p.data for n, p in weights_of_model(self.model).items()}

    def memory(self, x: Any = None, y: Any = None, *, batch_size: int = 32) -> MemoryReport:
        """Bytes that one training step needs, by purpose and in `total`; known before it runs. `print` shows a table.

        Of the step compiled for the largest batch so far; or give x and y to compile one without running it. Raises InputError
        for neither.
        """
        if x is not None:
            source = self._source(x, y, batch_size, None, None)
            _, arrays = next(source.epoch(0))
            if isinstance(source, ArraySource):
                self._accept(source)
            else:
                self._check_batch(source, arrays)
            return self._steps.program(arrays).memory
        if self.step is None:
            raise InputError("nothing is compiled yet: fit first, or give memory(x, y, batch_size=...) the data")
        return self.step.memory

    def settings(self) -> dict[str, str]:
        """What decides how training goes, as text: loss, optimiser, learning rate, clipping, seed."""
        found = {
            "model": type(self.model).__name__,
            "loss": saving.spelled(self.loss),
            "optimizer": saving.spelled(self.optimizer),
        }
        found |= {"learning_rate": saving.spelled(self._given_rate), "seed": str(self.seed)}
        return found | {k: saving.spelled(v) for k, v in self._options.items()}

    # ------------------------------------------------------------------ saving and resuming

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint: weights, optimiser, random key, the place in the data, callbacks, history.

        The file is written whole or not at all and holds no code. Raises CheckpointError where it cannot be written: nothing is
        lost then, neither the file that was there nor the trainer's state.
        """
        if not self._fitting:  # within a fit the model's weights may be older than the step's
            self._steps.refresh(self.model)
        meta, state = saving.snapshot(self)
        checkpoint.write(Path(path), meta, state)

    def resume(self, path: str | Path) -> Path:
        """Takes over a checkpoint, or the newest sound one of a folder; the file it was. The next `fit` goes on from there.

        Raises CheckpointError where there is none, and for the checkpoint of another model, listing what differs. A damaged
        file in a folder is passed over with a CheckpointWarning.
        """
        found = checkpoint.find(path)
        if found is None:
            raise CheckpointError(f"there is no checkpoint in {path}")
        saving.restore(self, *found)
        return found[2]

    def _resume_for_fit(self, resume: str | Path | bool | None) -> bool:
        """Whether the fit goes on with a run: from the checkpoint it names, or from one taken over before."""
        if resume is None or resume is False:
            return self._pending is not None
        if resume is True:
            folders = [c.folder for c in self._callbacks if isinstance(c, Checkpoint)]
            if not folders:
                raise InputError("resume=True takes the folder of the Checkpoint callback, and there is none among callbacks")
            resume = folders[0]
        found = checkpoint.find(resume)
        if found is not None:
            saving.restore(self, *found)
            return True
        return False


def _memory_line(memory: MemoryReport) -> str:
    parts = {"state": memory.state, "batch": memory.inputs, "arena": memory.arena, "constants": memory.constants}
    listed = ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items() if size)
    return f"{show_bytes(memory.total)} at its peak ({listed})"


def _overrides(callback: Callback) -> bool:
    """Whether a callback does anything after a step."""
    return getattr(callback.on_step_end, "__func__", None) is not Callback.on_step_end
