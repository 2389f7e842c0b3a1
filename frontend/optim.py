"""Optimisers as pure functions: `init` gives arrays of state, `update` is traced into the training step.

Parameters, gradients and states are nested dicts, lists or tuples of one form. The learning rate is an operand of
`update`, so that a schedule does not change the compiled step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..ir.dtypes import f32
from ..ir.errors import AttributeValueError
from . import tree
from .core import TensorLike, as_tensor, broadcast_to, cast
from .elementwise import expm1, minimum, rsqrt, sqrt, square
from .movement import zeros
from .reductions import sum
from .tensor import Tensor


class Optimizer(Protocol):
    """What a training step needs of an optimiser. `lr` is the learning rate to start with."""

    @property
    def lr(self) -> float:
        """The learning rate that a trainer passes unless a schedule says otherwise."""
        ...

    def init(self, params: Any) -> Any:
        """The state before the first step: numpy arrays, for parameters given as arrays."""
        ...

    def update(self, params: Any, grads: Any, state: Any, lr: TensorLike | None = None) -> tuple[Any, Any]:
        """(new parameters, new state), as Tensors."""
        ...


def _check(lr: float, weight_decay: float, **shares: float) -> None:
    if not lr > 0:
        raise AttributeValueError(f"the learning rate is positive, not {lr!r}")
    if weight_decay < 0:
        raise AttributeValueError(f"weight_decay is not negative: {weight_decay!r}")
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise AttributeValueError(f"{name} lies in [0, 1), not {value!r}")


def _zeros(params: Any) -> Any:
    return tree.map_leaves(lambda p: np.zeros_like(np.asarray(p)), params)


def _scale(value: Tensor, factor: Tensor) -> Tensor:
    return value * cast(factor, value.dtype)


@dataclass(frozen=True)
class SGD:
    """p <- p - lr * d, where d = g + weight_decay * p, through momentum: v <- momentum * v + (1 - dampening) * d.

    With `nesterov`, the step is d + momentum * v. As PyTorch's (whose first v is d even with dampening: not here).
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    dampening: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, momentum=self.momentum, dampening=self.dampening)
        if self.nesterov and (self.momentum == 0 or self.dampening):
            raise AttributeValueError("nesterov needs a momentum, and no dampening")

    def init(self, params: Any) -> Any:
        """One array per parameter with momentum, nothing without."""
        return {"momentum": _zeros(params)} if self.momentum else {}

    def update(self, params: Any, grads: Any, state: Any, lr: TensorLike | None = None) -> tuple[Any, Any]:
        """(new parameters, new state)."""
        rate = as_tensor(self.lr if lr is None else lr)
        if self.weight_decay:
            grads = tree.map_leaves(lambda g, p: g + self.weight_decay * p, grads, params)
        step, state = grads, dict(state)
        if self.momentum:
            keep = self.momentum
            velocity = tree.map_leaves(lambda v, g: keep * v + (1.0 - self.dampening) * g, state["momentum"], grads)
            step = tree.map_leaves(lambda g, v: g + keep * v, grads, velocity) if self.nesterov else velocity
            state["momentum"] = velocity
        return tree.map_leaves(lambda p, d: p - _scale(d, rate), params, step), state


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015), as PyTorch's: weight decay is added to the gradient.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, beta1=self.betas[0], beta2=self.betas[1])

    def init(self, params: Any) -> Any:
        """The step count and two arrays per parameter."""
        return {"step": np.zeros((), np.int64), "m": _zeros(params), "v": _zeros(params)}

    def update(self, params: Any, grads: Any, state: Any, lr: TensorLike | None = None) -> tuple[Any, Any]:
        """(new parameters, new state)."""
        if self.weight_decay:
            grads = tree.map_leaves(lambda g, p: g + self.weight_decay * p, grads, params)
        return self._step(params, grads, state, as_tensor(self.lr if lr is None else lr))

    def _step(self, params: Any, grads: Any, state: Any, rate: Tensor) -> tuple[Any, Any]:
        b1, b2 = self.betas
        count = state["step"] + 1
        t = cast(count, f32)
        # 1 - b^t = -expm1(t log b): no cancellation while b^t is near 1.
        rate = rate / _share(b1, t)
        spread = rsqrt(_share(b2, t))
        m = tree.map_leaves(lambda m, g: b1 * m + (1.0 - b1) * g, state["m"], grads)
        v = tree.map_leaves(lambda v, g: b2 * v + (1.0 - b2) * square(g), state["v"], grads)

        def moved(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
            return p - _scale(m, rate) / (_scale(sqrt(v), spread) + self.eps)

        return tree.map_leaves(moved, params, m, v), {"step": count, "m": m, "v": v}


def _share(beta: float, t: Tensor) -> Tensor:
    return -expm1(t * math.log(beta)) if beta else broadcast_to(as_tensor(1.0), t.shape)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): p <- p - lr * weight_decay * p before the step."""

    weight_decay: float = 1e-2

    def update(self, params: Any, grads: Any, state: Any, lr: TensorLike | None = None) -> tuple[Any, Any]:
        """(new parameters, new state)."""
        rate = as_tensor(self.lr if lr is None else lr)
        if self.weight_decay:
            shrink = 1.0 - rate * self.weight_decay
            params = tree.map_leaves(lambda p: _scale(p, shrink), params)
        return self._step(params, grads, state, rate)


def global_norm(grads: Any) -> Tensor:
    """The Euclidean norm of all gradients together."""
    total = zeros(())
    for g in tree.flatten(grads)[0]:
        total = total + cast(sum(square(g)), f32)
    return sqrt(total)


def clip_by_global_norm(grads: Any, max_norm: float) -> Any:
    """All gradients scaled down together so that their norm is at most max_norm (Pascanu et al. 2013)."""
    factor = minimum(max_norm / (global_norm(grads) + 1e-6), 1.0)
    return tree.map_leaves(lambda g: _scale(g, factor), grads)
