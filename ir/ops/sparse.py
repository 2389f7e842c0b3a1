"""Products with a sparse matrix, whose pattern is data: a stream of offsets beside the values.

The columns of the result come in blocks of W, a power of two. Block b is the sum over its entries e, from starts[b] to
starts[b + 1], of

    y[..., b*W + j]  +=  x[..., offsets[e]] * values[e, j]          0 <= j < W

so that W = 1 holds a matrix row by row (CSR) and W = 16 is made of blocks of one step of the reduction and 16 neighbouring
columns, which fill a vector. What is not stored is not multiplied: an infinity in x meets only the entries there are.
Offsets and starts are held inside their ranges, so that no pattern can read beyond its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..dims import as_int
from ..dtypes import i32
from ..errors import DTypeError, ShapeError
from ..graph import Attrs, Node
from ..lowering import Sparse
from ..op import Array, NotDifferentiable, Op, Sample, Trait, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, values, offsets, starts = types
    c.check_dtype("sparse_matmul", types, 0, c.is_wide_float)
    c.check_same("sparse_matmul", [TensorType(t.dtype, ()) for t in (x, values)])
    for k, t in ((2, offsets), (3, starts)):
        if t.dtype is not i32:
            raise DTypeError(f"operand {k} of sparse_matmul has dtype {t.dtype}, expected i32")
    if x.rank < 1 or values.rank != 2 or offsets.rank != 1 or starts.rank != 1:
        shapes = ", ".join(c.show(t.shape) for t in types)
        raise ShapeError(f"sparse_matmul takes x [..., K], values [E, W], offsets [E] and starts [N / W + 1], not {shapes}")
    entries, width = c.static(values.shape)
    (count,) = c.static(starts.shape)
    if offsets.shape != (entries,):
        raise ShapeError(
            f"operand 2 of sparse_matmul has shape {c.show(offsets.shape)}, expected [{entries}], one for each entry"
        )
    if count < 1 or width < 1:
        raise ShapeError(f"sparse_matmul needs a start for each block and one more, and blocks of a column at least: {starts}")
    if width & (width - 1):
        raise ShapeError(f"operand 1 of sparse_matmul has blocks of {width} columns; their width is a power of two")
    if x.shape[-1] == 0 and entries:
        raise ShapeError(
            f"operand 0 of sparse_matmul has shape {c.show(x.shape)}: there is nothing for {entries} entries to meet"
        )
    return TensorType(x.dtype, (*x.shape[:-1], (count - 1) * width))


def _value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, values, offsets, starts = arrays
    entries, width = values.shape
    at = np.clip(offsets, 0, max(x.shape[-1] - 1, 0))
    bounds = np.clip(starts, 0, entries)
    y = np.zeros((*x.shape[:-1], (len(starts) - 1) * width), x.dtype)
    with np.errstate(all="ignore"):
        for b in range(len(starts) - 1):
            part = slice(int(bounds[b]), max(int(bounds[b]), int(bounds[b + 1])))
            y[..., b * width : (b + 1) * width] = x[..., at[part]] @ values[part]
    return y


def _lower(node: Node) -> Sparse:
    return Sparse(as_int(node.inputs[1].shape[1]))


def _pattern(
    lead: tuple[int, ...], k: int, blocks: int, width: int, density: float, hostile: bool = False
) -> Callable[[np.random.Generator], list[Array]]:
    """Operands with about this share of entries present; `hostile` ones point beyond what there is."""

    def draw(rng: np.random.Generator) -> list[Array]:
        kept = rng.random((blocks, k)) < density
        starts = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
        offsets = np.nonzero(kept)[1].astype(np.int32)
        if hostile:
            offsets[::3], offsets[1::3] = -(2**31), 2**31 - 1
            starts[1], starts[-1] = -5, 2**31 - 1
        x = rng.uniform(-2, 2, (*lead, k)).astype(np.float32)
        return [x, rng.uniform(-2, 2, (len(offsets), width)).astype(np.float32), offsets, starts]

    return draw


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        ((5,), 7, 3, 1, 0.5),
        ((33,), 40, 2, 16, 0.25),
        ((2, 3, 7), 17, 9, 1, 0.3),
        ((1,), 64, 17, 4, 0.2),
        ((65,), 31, 35, 1, 0.2),
        ((16,), 16, 1, 32, 0.5),
        ((3,), 9, 4, 8, 0.0),
        ((0,), 9, 4, 8, 0.4),
        ((), 20, 3, 16, 0.4),
        ((20,), 30, 4, 2, 0.5, True),
    ]
    return [Sample(_pattern(*case), budget=5e-6, reason=REASON, gradient=False) for case in cases]


sparse_matmul = register(
    Op(
        name="sparse_matmul",
        doc="x [..., K] times a sparse matrix [K, N] of values [E, W] at offsets [E], block after block by starts [N / W + 1].",
        arity=4,
        infer=_infer,
        reference=_value,
        lower=_lower,
        grad=NotDifferentiable("its pattern is fixed: train the dense weights under their mask, and make them sparse after that"),
        traits=frozenset({Trait.CONTRACTION}),
        samples=_samples,
    )
)
