"""Resampling along one axis: each element of the result is a weighted sum of a few elements of the operand.

    y[..., i, ...] = sum over t of  w[t, i] * x[..., p[t, i], ...]          where w[t, i] is not 0

p and w are tables; `frontend/resize.py` makes those of the usual filters. Taps of weight 0 do not count, so that rows of the
tables may be filled up to one length: they never spread a NaN or an infinity. The gradient resamples by the transposed tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..build import constant
from ..dims import as_int
from ..dtypes import i32, i64
from ..errors import DTypeError, GradientError, ShapeError
from ..expr import Expr, cast, const, eq, lift, maximum, minimum, select
from ..graph import Attrs, Literal, Node
from ..lowering import Load, Reduce
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, index, weights = types
    c.check_dtype("resample", types, 0, c.is_float)
    axis = c.check_axis("resample", attrs["axis"], x.rank)
    if index.dtype is not i32 or weights.dtype is not x.dtype:
        raise DTypeError(f"resample takes places of i32 and weights of {x.dtype}, not {index.dtype} and {weights.dtype}")
    if index.rank != 2 or index.shape != weights.shape:
        raise ShapeError(f"places {c.show(index.shape)} and weights {c.show(weights.shape)} of resample are both [taps, out]")
    return TensorType(x.dtype, (*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :]))


def _value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, index, weights = arrays
    axis, n = attrs["axis"], x.shape[attrs["axis"]]
    shape = (*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :])
    y = np.zeros(shape, x.dtype)
    if n == 0 or y.size == 0:
        return y
    along = (-1, *(1,) * (x.ndim - axis - 1))
    with np.errstate(all="ignore"):
        for t in range(index.shape[0]):
            w = weights[t].reshape(along)
            y += np.where(w != 0, np.take(x, np.clip(index[t], 0, n - 1), axis=axis) * w, x.dtype.type(0))
    return y


def _lower(node: Node) -> Reduce:
    axis = node.attrs["axis"]
    n = node.inputs[0].shape[axis]
    last = const(max(0, n - 1), i32) if isinstance(n, int) else cast(lift(n - 1), i32)

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        place = cast(maximum(minimum(load(1, (*r, idx[axis])), last), const(0, i32)), i64)
        w = load(2, (*r, idx[axis]))
        zero = const(0.0, node.dtype)
        return select(eq(w, zero), zero, load(0, (*idx[:axis], place, *idx[axis + 1 :])) * w)

    return Reduce("sum", (node.inputs[1].shape[0],) if n != 0 else (0,), value)


def _table(node: Node) -> Array:
    value = node.attrs.get("value")
    if not isinstance(value, Literal):
        raise GradientError("the gradient of resample needs tables that are constants; these are computed")
    return value.array


def transposed_tables(index: Array, weights: Array, n: int) -> tuple[Array, Array]:
    """The tables of the transposed map, from results back to n elements: for each element what it goes into."""
    taps, out = index.shape
    rows = np.tile(np.arange(out), taps)
    places, w = np.clip(index, 0, max(0, n - 1)).reshape(-1), weights.reshape(-1)
    kept = np.flatnonzero(w != 0)
    order = kept[np.argsort(places[kept], kind="stable")]
    rows, places, w = rows[order], places[order], w[order]
    counts = np.bincount(places, minlength=n)
    width = max(1, int(counts.max(initial=0)))
    slot = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    back, strengths = np.zeros((width, n), np.int32), np.zeros((width, n), weights.dtype)
    back[slot, places], strengths[slot, places] = rows, w
    return back, strengths


def _grad(node: Node, dy: Node) -> Sequence[Node | None]:
    x, index, weights = node.inputs
    axis = node.attrs["axis"]
    back, strengths = transposed_tables(_table(index), _table(weights), as_int(x.shape[axis]))
    return make("resample", dy, constant(back, i32), constant(strengths, x.dtype), axis=axis), None, None


def _transpose(node: Node, perm: tuple[int, ...]) -> Node:
    x, index, weights = node.inputs
    return make("resample", c.transposed(x, perm), index, weights, axis=perm.index(node.attrs["axis"]))


def _samples() -> list[Sample]:
    def draw(shape: tuple[int, ...], axis: int, out: int, taps: int, dtype: Any = np.float32) -> c.Draw:
        def made(rng: np.random.Generator) -> list[Array]:
            x = rng.uniform(-2, 2, shape).astype(dtype)
            index = rng.integers(0, max(1, shape[axis]), (taps, out)).astype(np.int32)
            weights = rng.uniform(-1, 1, (taps, out)) * (rng.random((taps, out)) < 0.8)
            return [x, index, weights.astype(dtype)]

        return made

    cases = [
        ((5,), 0, 9, 2), ((2, 3, 4, 5), 3, 8, 2), ((2, 3, 4, 5), 2, 8, 4), ((1, 7, 6, 17), 1, 13, 2), ((1, 5, 6, 33), 2, 3, 1),
        ((3, 40), 1, 2, 37), ((0, 3), 1, 4, 2), ((2, 3), 1, 0, 2),
    ]  # fmt: skip
    made = [Sample(draw(*case), {"axis": case[1]}, budget=5e-6, reason=REASON, gradient=False) for case in cases]
    return [*made, Sample(draw((3, 9), 1, 4, 2, np.float64), {"axis": 1}, gradient=False, label="f64")]


resample = register(
    Op(
        name="resample",
        infer=_infer,
        reference=_value,
        lower=_lower,
        grad=c.rule(_grad),
        doc="Weighted sums of elements along `axis`: of x at places [taps, out] (i32, clipped) with weights [taps, out].",
        arity=3,
        traits=frozenset({Trait.REDUCTION}),
        attrs={"axis": REQUIRED},
        transpose=_transpose,
        samples=_samples,
    )
)
