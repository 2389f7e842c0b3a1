"""Penalties on the size of parameters, added to the loss: `training_step(..., regularizers={"*.weight": L2(1e-4)})`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir.dtypes import f32
from ..ir.errors import AttributeValueError, ShapeError
from .context import error
from .core import TensorLike, Value, as_tensor, cast
from .elementwise import abs, square
from .patterns import select
from .reductions import sum

if TYPE_CHECKING:
    from .tensor import Tensor

Penalty = Callable[[Any], Value]
Regularizers = Penalty | Mapping[str, Penalty]


@dataclass(frozen=True)
class L1L2:
    """l1 * sum |w| + l2 * sum w^2, for one parameter w (any shape): a scalar. Sums, as in Keras; no half before l2."""

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        if not (self.l1 >= 0 and self.l2 >= 0):
            raise AttributeValueError(f"L1L2: the strengths are not negative: l1={self.l1!r}, l2={self.l2!r}")

    def __call__(self, w: TensorLike) -> Tensor:
        t = as_tensor(w, what="a regulariser")
        t = cast(t, f32) if t.dtype.bits < f32.bits else t
        parts = [self.l1 * sum(abs(t))] * bool(self.l1) + [self.l2 * sum(square(t))] * bool(self.l2)
        if not parts:
            return as_tensor(0.0, t.dtype)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def L1(l1: float = 0.01) -> L1L2:  # named like the class that it makes
    """l1 * sum |w|: drives small weights to zero (lasso: Tibshirani 1996)."""
    return L1L2(l1=l1)


def L2(l2: float = 0.01) -> L1L2:
    """l2 * sum w^2: keeps weights small (ridge). Its gradient is 2 * l2 * w."""
    return L1L2(l2=l2)


def choose(regularizers: Regularizers, paths: Sequence[str]) -> dict[str, list[Penalty]]:
    """The functions for each path that has some, in the order of the paths.

    One function applies to every parameter; a mapping applies each of its functions to the parameters whose path fits its
    pattern (those of `fnmatch`), and a parameter that fits several is penalised by each.

    Raises AttributeValueError for what is no function, for a pattern that no path fits (with the list of paths), and for
    an empty mapping.
    """
    given = regularizers if isinstance(regularizers, Mapping) else {"*": regularizers}
    if not given:
        raise AttributeValueError("regularizers: there is no pattern in the mapping; leave regularizers out instead")
    found: dict[str, list[Penalty]] = {path: [] for path in paths}
    for pattern, regularizer in given.items():
        if not callable(regularizer):
            raise AttributeValueError(f"regularizers: {pattern!r} takes a function of a parameter, not {regularizer!r}")
        for path in select(pattern, paths, "regularizers"):
            found[path].append(regularizer)
    return {path: own for path, own in found.items() if own}


def penalty(chosen: Mapping[str, Sequence[Penalty]], parameters: Mapping[str, Value]) -> Tensor:
    """The sum of all penalties, an f32 scalar, for parameters by path.

    Raises ShapeError, with the parameter's path, for a function whose value is no scalar.
    """
    total: Tensor | None = None
    for path, own in chosen.items():
        for regularizer in own:
            part = as_tensor(regularizer(parameters[path]), what=f"the penalty on {path}")
            if part.shape != ():
                raise error(ShapeError, f"the penalty on parameter {path!r} is a scalar; take .sum()", penalty=part)
            part = cast(part, f32)
            total = part if total is None else total + part
    return as_tensor(0.0, f32) if total is None else total
