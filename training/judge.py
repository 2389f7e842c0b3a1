"""The model in inference mode: what evaluate and predict run, compiled once and given the weights of the moment."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..driver import build, tracing_for
from ..driver import compile as compile_model
from ..frontend import tree
from ..frontend.metrics import Accumulator, Metric
from ..frontend.module import Module
from ..frontend.training import Loss, evaluation_step
from ..ir.errors import InputError
from ..ir.target import Target
from ..runtime.buffers import Array
from ..runtime.executable import Executable
from ..settings import Flags, config
from .data import Source, batch_specs
from .position import Position

Structures = tuple[tree.Structure, tree.Structure]


def arguments(structure: tree.Structure, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What the model is called with: a tuple is several arguments, anything else is one."""
    value = tree.unflatten(structure, leaves)
    return value if isinstance(value, tuple) else (value,)


class Judge:
    """Programs for evaluation and prediction, by the types of a batch; batches of any size share one."""

    def __init__(
        self,
        model: Module,
        loss: Loss,
        functions: Mapping[str, Metric],
        objects: Mapping[str, Accumulator],
        target: str | Target | None,
        flags: Flags,
    ) -> None:
        self.model, self.loss, self.functions = model, loss, functions
        self.objects = copy.deepcopy(dict(objects))  # a fit may be in the middle of an epoch with those
        self._target, self._flags = target, flags
        self._evaluators: dict[Any, tuple[Executable, tree.Structure]] = {}
        self._predictors: dict[Any, Executable] = {}

    def evaluate(self, source: Source, weights: Mapping[str, Array]) -> dict[str, Any]:
        """Mean loss and metrics over all batches of a source."""
        at = Position(len(self.functions))
        for o in self.objects.values():
            o.reset()
        fresh: set[int] = set()
        for size, arrays in source.epoch(0):
            assert source.structures is not None
            exe, structure = self._evaluator(source.structures, arrays)
            if id(exe) not in fresh:
                _bind(exe, weights)
                fresh.add(id(exe))
            found = exe(*arrays)
            results = found if isinstance(found, tuple) else (found,)
            inputs, targets = (s.leaves for s in source.structures)
            weight = float(arrays[-1].sum(dtype=np.float64)) if len(arrays) > inputs + targets else size
            at.loss += float(results[0]) * weight
            at.weight += weight
            at.examples += size
            for k in range(at.metrics):
                at.totals[k] += float(results[k + 1]) * size
            if self.objects:
                prediction = tree.unflatten(structure, results[1 + at.metrics :])
                target = tree.unflatten(source.structures[1], arrays[inputs : inputs + targets])
                for o in self.objects.values():
                    o.update(prediction, target)
        return at.row(list(self.functions)) | results_of(self.objects)

    def _evaluator(self, structures: Structures, arrays: Sequence[Array]) -> tuple[Executable, tree.Structure]:
        specs = batch_specs(arrays)
        key = (structures, specs)
        found = self._evaluators.get(key)
        if found is None:
            inputs, targets = (s.leaves for s in structures)
            x = arguments(structures[0], specs[:inputs])
            y = tree.unflatten(structures[1], specs[inputs : inputs + targets])
            options: dict[str, Any] = {"sample_weight": True} if len(specs) > inputs + targets else {}
            if self.objects:
                options["predictions"] = True
            with tracing_for(self._target, self._flags):
                traced = evaluation_step(self.model, self.loss, *x, y, metrics=list(self.functions.values()), **options)
            exe = build(traced.graph, traced.values(), target=self._target, now=self._flags)
            structure = traced.structure.children[-1] if self.objects else traced.structure
            found = self._evaluators[key] = (exe, structure)
        return found

    def predict(self, source: Source, weights: Mapping[str, Array]) -> Any:
        """The model's results for all batches, one after the other."""
        pieces: list[list[Array]] = []
        whole: list[Array] = []
        structure: Any = None
        fresh: set[int] = set()
        at = 0
        for size, arrays in source.epoch(0):
            assert source.structures is not None
            inputs = source.structures[0].leaves
            exe = self._predictor(source.structures[0], arrays[:inputs])
            if id(exe) not in fresh:
                _bind(exe, weights)
                fresh.add(id(exe))
            leaves, structure = tree.flatten(exe(*arguments(source.structures[0], arrays[:inputs])))
            if any(leaf.shape[:1] != (size,) for leaf in leaves):
                shapes = [list(leaf.shape) for leaf in leaves]
                raise InputError(
                    f"predict puts batches together, and the model's results for {size} examples have shapes {shapes}"
                )
            if source.count is None:
                pieces.append([leaf.copy() for leaf in leaves])
                continue
            if not whole:
                whole = [np.empty((source.count, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
            for into, leaf in zip(whole, leaves, strict=True):
                into[at : at + size] = leaf
            at += size
        if pieces:
            whole = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
        return tree.unflatten(structure, whole)

    def _predictor(self, structure: tree.Structure, arrays: Sequence[Array]) -> Executable:
        specs = batch_specs(arrays)
        found = self._predictors.get((structure, specs))
        if found is None:
            with config(**asdict(self._flags)):
                found = compile_model(self.model, *arguments(structure, specs), target=self._target)
            self._predictors[structure, specs] = found
        return found


def results_of(objects: Mapping[str, Accumulator]) -> dict[str, Any]:
    """What the accumulators found: numbers as floats, arrays as nested lists."""
    found: dict[str, Any] = {}
    for name, o in objects.items():
        value = o.result()
        found[name] = float(value) if np.ndim(value) == 0 else np.asarray(value).tolist()
    return found


def _bind(exe: Executable, weights: Mapping[str, Array]) -> None:
    """Gives an executable these weights, where they are others than those it has."""
    bound = exe.parameters
    new = {n: w for n, w in weights.items() if n in bound and not _same(bound[n], w)}
    if new:
        exe.set_parameters(new)


def _same(a: Array, b: Array) -> bool:
    """Whether two weights have the same bits."""
    return a is b or bool(np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)))
