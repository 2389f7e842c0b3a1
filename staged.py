"""A compiled model whose shapes depend on numbers that only a run knows: it runs in stages, each compiled whole.

A stage is a program for some of the model's values; what comes out decides the next. The last stage is the model itself with
those numbers put in. Programs are kept by the numbers they were made for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .frontend.onnx.call import SIZE
from .ir.errors import InputError
from .ir.graph import Graph
from .ir.graphs import bind_sizes
from .runtime.executable import Executable

if TYPE_CHECKING:
    from .frontend.onnx.model import Model

Array = np.ndarray[Any, Any]

_KEPT: Final = 64  # programs of stages for different numbers; the oldest goes first


def staged(model: Model, compile: Callable[[Graph], Executable]) -> Executable | StagedExecutable:
    """The Executable of a model, or, where its shapes depend on numbers or are not declared, one that runs in stages."""
    if not model.unshaped():
        first = model.stage({})
        if not first.needs:
            return compile(first.graph)
    return StagedExecutable(model, compile)


@dataclass(frozen=True)
class _Stage:
    """A graph that gives what `needs` names (nothing: the model's outputs). No executable: arguments and shapes tell."""

    graph: Graph
    needs: tuple[str, ...]
    executable: Executable | None


def _sizes(stage: _Stage, given: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """The symbolic sizes among what a stage needs, from the arguments' shapes."""
    wanted = [k for k in stage.needs if k.startswith(SIZE)]
    if not wanted:
        return {}
    names = {str(i.attrs["name"]): i.shape for i in stage.graph.inputs}
    sizes = bind_sizes(stage.graph, {n: given.get(n, shape) for n, shape in names.items()})
    return {k: np.array(sizes[k.removeprefix(SIZE)]) for k in wanted}


class _Step:
    """A stage, for arguments of given shapes, and what was known before it; the steps that followed, by the numbers that came."""

    __slots__ = ("known", "sizes", "stage", "then")

    def __init__(self, stage: _Stage, known: dict[str, Array], sizes: dict[str, Array]) -> None:
        self.stage = stage
        self.known = known
        self.sizes = sizes
        self.then: dict[tuple[Any, ...], _Step] = {}


class StagedExecutable:
    """Calls like an Executable: arrays in the order of `inputs`, one array or a tuple back.

    Each distinct set of deciding numbers costs one compilation, or a look into the disk cache. Which stage follows which is
    remembered, so that a call of known shapes and numbers costs little more than its programs.
    """

    def __init__(self, model: Model, compile: Callable[[Graph], Executable]) -> None:
        self.model = model
        self.inputs = model.inputs
        self.output_names = model.outputs
        self._compile = compile
        self._made: dict[tuple[Any, ...], _Stage] = {}
        self._unshaped = model.unshaped()
        self._first: dict[tuple[tuple[int, ...], ...], _Step] = {}
        self._steps = 0
        self._lock = threading.RLock()

    def __call__(self, *inputs: Any) -> Any:
        """The outputs for these inputs. Raises InputError where their number does not fit, OnnxError where the numbers do not."""
        if len(inputs) != len(self.inputs):
            raise InputError(f"{self.model.name} takes {len(self.inputs)} inputs ({list(self.inputs)}), got {len(inputs)}")
        shapes = tuple([np.shape(x) for x in inputs])
        step = self._first.get(shapes)
        if step is None:
            step = self._step(shapes, {}, self._first, shapes)
        while True:
            stage = step.stage
            if not stage.needs:
                assert stage.executable is not None
                return stage.executable(*inputs)
            if stage.executable is None:
                found: Sequence[Any] = [inputs[self.inputs.index(k)] for k in stage.needs if k not in step.sizes]
            else:
                result = stage.executable(*inputs)
                found = result if isinstance(result, tuple) else (result,)
            arrays = [np.array(v) for v in found]
            key = tuple([(v.dtype.str, v.shape, v.tobytes()) for v in arrays])
            following = step.then.get(key)
            if following is None:
                names = [k for k in stage.needs if k not in step.sizes]
                known = step.known | step.sizes | dict(zip(names, arrays, strict=True))
                following = self._step(shapes, known, step.then, key)
            step = following

    def _step(self, shapes: tuple[tuple[int, ...], ...], known: dict[str, Array], into: dict[Any, _Step], key: Any) -> _Step:
        """The step that follows from what is known, entered into the steps after another."""
        with self._lock:
            given = dict(zip(self.inputs, shapes, strict=True))
            stage = self._stage(known, given)
            made = into[key] = _Step(stage, known, {} if stage.executable is not None else _sizes(stage, given))
            self._steps += 1
            if self._steps > _KEPT:  # what they lead to is kept in `_made`, or made again
                self._first.clear()
                self._steps = 0
            return made

    def _stage(self, known: dict[str, Array], given: dict[str, tuple[int, ...]]) -> _Stage:
        """The stage that follows from what is known, for arguments of these shapes."""
        # a named size is at least 1: arguments without elements are compiled for by their shape
        shapes = {n: shape for n, shape in given.items() if n in self._unshaped or 0 in shape}
        numbers = tuple((k, v.dtype.str, v.shape, v.tobytes()) for k, v in sorted(known.items()))
        key = (numbers, tuple(shapes.items()))
        found = self._made.get(key)
        if found is None:
            made = self.model.stage(known, shapes)
            at_hand = bool(made.needs) and all(k in given or k.startswith(SIZE) for k in made.needs)
            found = _Stage(made.graph, made.needs, None if at_hand else self._compile(made.graph))
            while len(self._made) >= _KEPT:
                self._made.pop(next(iter(self._made)))
            self._made[key] = found
        return found

    def programs(self) -> Sequence[Executable]:
        """The programs made so far, in order."""
        return [s.executable for s in self._made.values() if s.executable is not None]
