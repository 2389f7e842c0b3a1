"""What an optimiser is: pure functions `init` and `update`, traced into the training step.

    state = optimizer.init(params)                                numpy arrays
    params, state = optimizer.update(params, grads, state, lr)    Tensors

Parameters, gradients and states are nested dicts, lists or tuples of one form; a training step passes a dict by parameter
path. The state is a dict: for each *slot* ('m', 'v') an array per parameter, and 'step', a count, where the rule needs one.
The learning rate is an operand of `update`, so that a schedule does not change the compiled step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from ...ir.dtypes import f32
from ...ir.errors import AttributeValueError, DTypeError, ShapeError
from .. import tree
from ..context import error
from ..core import TensorLike, Value, as_tensor, broadcast_to, cast
from ..elementwise import expm1
from ..tensor import Tensor

Rate = float | Callable[[int], float]
Slots = Mapping[str, Tensor]


@runtime_checkable
class Optimizer(Protocol):
    """What a training step needs of an optimiser. `lr` is a learning rate, or a schedule: a function of the step number."""

    @property
    def lr(self) -> Rate:
        """What a trainer passes as the learning rate unless it is told otherwise."""
        ...

    def init(self, params: Any) -> Any:
        """The state before the first step: numpy arrays, for parameters given as arrays."""
        ...

    def update(self, params: Any, grads: Any, state: Any, lr: TensorLike | None = None) -> tuple[Any, Any]:
        """(new parameters, new state), as Tensors."""
        ...


@dataclass(frozen=True)
class PerParameter:
    """Base of optimisers whose rule looks at one parameter at a time. A subclass says what it keeps, and one step:

    slots()             name of each array kept per parameter -> the value it starts with
    counts              whether the rule needs the number of the step
    scalars(rate, t)    what all parameters share, computed once a step; t counts from 1 (None unless `counts`)
    step(p, g, s, k)    (new parameter, new slots) from parameter, gradient, slots and scalars
    """

    lr: Rate

    def __post_init__(self) -> None:
        if not callable(self.lr) and not (isinstance(self.lr, Real) and self.lr > 0):
            message = f"{type(self).__name__}: the learning rate is a positive number or a schedule, not {self.lr!r}"
            raise AttributeValueError(message)
        self._check()

    def _check(self) -> None:
        """Raises AttributeValueError for options outside their domain."""

    def _demand(self, good: bool, name: str, domain: str) -> None:
        if not good:
            raise AttributeValueError(f"{type(self).__name__}: {name} {domain}, not {getattr(self, name)!r}")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            self._demand(getattr(self, name) >= 0, name, "is at least 0")

    def _positive(self, *names: str) -> None:
        for name in names:
            self._demand(getattr(self, name) > 0, name, "is above 0")

    def _share(self, *names: str) -> None:
        for name in names:
            self._demand(0 <= getattr(self, name) < 1, name, "lies in [0, 1)")

    def _betas(self) -> None:
        pair = self.betas  # type: ignore[attr-defined]
        good = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(0 <= b < 1 for b in pair)
        self._demand(good, "betas", "are two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(pair))  # hashable, so that equal optimisers make one group

    @property
    def counts(self) -> bool:
        """Whether the rule needs the number of the step."""
        return False

    def slots(self) -> dict[str, float]:
        """Arrays kept for each parameter, by name, and the value that they start with."""
        return {}

    def scalars(self, rate: Tensor, t: Tensor | None) -> Any:
        """What the update of every parameter uses, from the learning rate and the number of the step."""
        return rate

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(the new parameter, its new slots)."""
        raise NotImplementedError

    def init(self, params: Any) -> dict[str, Any]:
        """The state before the first step: 'step' where it is counted, and a tree of arrays for each slot."""
        leaves, structure = tree.flatten(params)
        state: dict[str, Any] = {"step": np.zeros((), np.int64)} if self.counts else {}
        for name, value in self.slots().items():
            state[name] = tree.unflatten(structure, [np.full_like(np.asarray(p), value) for p in leaves])
        return state

    def update(self, params: Any, grads: Any, state: Any, lr: TensorLike | None = None) -> tuple[Any, Any]:
        """(new parameters, new state), of the form of the old ones, with the learning rate `lr` (the optimiser's own if None).

        Raises ShapeError or DTypeError, with the parameter's path, where a gradient is not of the parameter's type.
        """
        rate = as_tensor(self._own_rate() if lr is None else lr, what="the learning rate")
        leaves, structure = tree.flatten(params)
        paths = list(tree.paths(structure, ""))
        values = [as_tensor(p) for p in leaves]
        gradients = check_gradients(paths, values, tree.flatten(grads)[0])
        names = list(self.slots())
        kept = [tree.flatten(state[n])[0] for n in names]
        new_state: dict[str, Any] = dict(state)
        count = None
        if self.counts:
            new_state["step"] = as_tensor(state["step"]) + 1
            count = cast(new_state["step"], rate.dtype)
        shared = self.scalars(rate, count)
        moved: list[Tensor] = []
        columns: list[list[Tensor]] = [[] for _ in names]
        for k, (p, g) in enumerate(zip(values, gradients, strict=True)):
            own = {n: as_tensor(column[k]) for n, column in zip(names, kept, strict=True)}
            p, own = self.step(p, g, own, shared)
            moved.append(p)
            for n, column in zip(names, columns, strict=True):
                column.append(own[n])
        new_state |= {n: tree.unflatten(structure, column) for n, column in zip(names, columns, strict=True)}
        return tree.unflatten(structure, moved), new_state

    def _own_rate(self) -> float:
        if callable(self.lr):
            raise error(
                AttributeValueError,
                f"{type(self).__name__}: the learning rate is a schedule, so that each step needs its value: pass lr= to update",
            )
        return self.lr


def check_gradients(paths: Sequence[str], values: Sequence[Value], gradients: Iterable[Any]) -> list[Tensor]:
    """The gradients as Tensors. Raises ShapeError or DTypeError with the path of the parameter that one does not fit."""
    found = [as_tensor(g) for g in gradients]
    if len(found) != len(values):
        raise error(ShapeError, f"there are {len(values)} parameters and {len(found)} gradients")
    for path, p, g in zip(paths, values, found, strict=True):
        if not p.dtype.is_float:
            raise error(DTypeError, f"parameter {path!r} is {p.type}; only floats are trained: set requires_grad=False", value=p)
        if g.shape != p.shape:
            raise error(ShapeError, f"the gradient of parameter {path!r} has another shape", parameter=p, gradient=g)
        if g.dtype is not p.dtype:
            raise error(DTypeError, f"the gradient of parameter {path!r} has another dtype", parameter=p, gradient=g)
    return found


def scaled(value: Tensor, factor: Tensor) -> Tensor:
    """value * factor in value's dtype, for a factor that all parameters share."""
    return value * cast(factor, value.dtype)


def bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, as -expm1(t log beta): nothing cancels while beta^t is near 1."""
    return -expm1(t * math.log(beta)) if beta else broadcast_to(as_tensor(1.0, t.dtype), t.shape)


def decayed(p: Tensor, rate: Tensor, weight_decay: float) -> Tensor:
    """p - rate * weight_decay * p: decoupled weight decay (Loshchilov and Hutter 2019)."""
    return scaled(p, 1.0 - rate * weight_decay) if weight_decay else p


def coupled(p: Tensor, g: Tensor, weight_decay: float) -> Tensor:
    """g + weight_decay * p: the gradient with that of an L2 penalty."""
    return g + weight_decay * p if weight_decay else g


WIDE: Final = f32  # what norms over a whole parameter are summed in
