"""Gradients of a loss by a model's weights, for criteria that weigh by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..driver import compile as compile_function
from ..frontend.gradients import grad
from ..frontend.module import Module
from ..frontend.tracing import spec
from ..ir.errors import InputError

Array = np.ndarray[Any, Any]


def gradients_of(model: Module, loss: Callable[..., Any], batches: Iterable[tuple[Any, Any]]) -> dict[str, Array]:
    """dL/dw by path, the mean over batches (x, y) of loss(model(x), y), with the model in inference mode.

    Raises InputError where there are no batches.
    """

    def value(m: Module, x: Any, y: Any) -> Any:
        return loss(m(x), y)

    def slopes(x: Any, y: Any) -> Any:
        return grad(value)(model, x, y)

    total: dict[str, Array] = {}
    count = 0
    programs: dict[Any, Any] = {}
    for x, y in batches:
        x, y = np.asarray(x), np.asarray(y)
        key = (x.shape, x.dtype, y.shape, y.dtype)
        if key not in programs:
            programs[key] = compile_function(slopes, spec(*x.shape, dtype=x.dtype), spec(*y.shape, dtype=y.dtype))
        for name, g in programs[key](x, y).items():
            total[name] = total.get(name, 0) + g.astype(np.float64)
        count += 1
    if not count:
        raise InputError("there are no batches to take gradients of")
    return {name: g / count for name, g in total.items()}
