"""Matrix products with broadcast batch dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..contraction import Affine, Axis, Contraction, affine
from ..dims import Dim, Shape
from ..dtypes import DType, f64, i8, u8
from ..errors import ShapeError
from ..graph import Attrs, Node
from ..lowering import Contract
from ..op import Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON, check_factors, exactly, wrapped


def batch_shape(a: Shape, b: Shape) -> Shape | None:
    """The broadcast of two batch shapes; None where they do not fit."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    out: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        if 1 not in (x, y) and x != y:
            return None
        out.append(y if x == 1 else x)
    return tuple(out)


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    a, b = types
    sums = check_factors("matmul", types, c.is_float)
    for k, t in enumerate(types):
        if t.rank < 2:
            raise ShapeError(
                f"operand {k} of matmul has shape {c.show(t.shape)}, expected at least 2 dimensions; reshape it to a matrix"
            )
    if a.shape[-1] != b.shape[-2]:
        raise ShapeError(
            f"operand 1 of matmul has shape {c.show(b.shape)}, expected {a.shape[-1]} rows (dimension {b.rank - 2}) as operand 0 "
            f"of shape {c.show(a.shape)} has {a.shape[-1]} columns"
        )
    batch = batch_shape(a.shape[:-2], b.shape[:-2])
    if batch is None:
        raise ShapeError(
            f"operand 1 of matmul has batch dimensions {c.show(b.shape[:-2])}, which do not broadcast with "
            f"{c.show(a.shape[:-2])} of operand 0: aligned at the right, each must be equal or 1"
        )
    return TensorType(sums, (*batch, a.shape[-2], b.shape[-1]))


def spec_of(a: Shape, b: Shape) -> Contraction:
    """The contraction of a matrix product. A batch axis that B lacks counts as rows of A."""
    batch = batch_shape(a[:-2], b[:-2])
    assert batch is not None
    rank = len(batch)
    axes: list[Axis] = []
    maps: tuple[list[Affine], list[Affine]] = ([], [])
    for d, extent in enumerate(batch):
        present = []
        for shape, index in zip((a, b), maps, strict=True):
            at = d - (rank - (len(shape) - 2))
            here = at >= 0 and (shape[at] != 1 or extent == 1)
            if at >= 0:
                index.append(affine(f"b{d}") if here else affine())
            present.append(here)
        axes.append(Axis(f"b{d}", extent, "m" if present == [True, False] else "batch"))
    axes += [Axis("m", a[-2], "m"), Axis("n", b[-1], "n"), Axis("k", a[-1], "k")]
    names = [f"b{d}" for d in range(rank)]
    return Contraction(
        tuple(axes),
        (*maps[0], affine("m"), affine("k")),
        (*maps[1], affine("k"), affine("n")),
        tuple(map(affine, (*names, "m", "n"))),
    )


def _reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    a, b = arrays
    with np.errstate(all="ignore"):
        return wrapped(np.matmul(*exactly(a, b, a.shape[-1])), a, b)


def swapped(x: Node) -> Node:
    rank = len(x.shape)
    return c.transposed(x, (*range(rank - 2), rank - 1, rank - 2))


def unbroadcast(g: Node, shape: Shape) -> Node:
    """The sum of g over the batch dimensions in which an operand of `shape` was broadcast."""
    lead = len(g.shape) - len(shape)
    axes = tuple(range(lead)) + tuple(lead + d for d, n in enumerate(shape[:-2]) if n == 1 and g.shape[lead + d] != 1)
    return c.reshaped(make("sum", g, axes=axes), shape) if axes else g


def _grad(node: Node, dy: Node) -> Sequence[Node]:
    a, b = node.inputs
    if len(b.shape) == 2 and len(a.shape) > 2:
        # One matrix for a batch: its gradient is one product over all rows, not a product per batch and their sum.
        rows: Dim = 1
        for n in a.shape[:-1]:
            rows = rows * n
        left, right = c.reshaped(a, (rows, a.shape[-1])), c.reshaped(dy, (rows, dy.shape[-1]))
        return make("matmul", dy, swapped(b)), make("matmul", swapped(left), right)
    da = unbroadcast(make("matmul", dy, swapped(b)), a.shape)
    return da, unbroadcast(make("matmul", swapped(a), dy), b.shape)


_CASES: Final[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = (
    ((1, 1), (1, 1)),
    ((7, 8), (8, 9)),
    ((16, 33), (33, 17)),
    ((31, 15), (15, 1)),
    ((1, 33), (33, 16)),
    ((3, 0), (0, 4)),
    ((0, 3), (3, 4)),
    ((2, 5, 8), (8, 9)),
    ((2, 5, 8), (2, 8, 7)),
    ((3, 5, 8), (1, 8, 7)),
    ((5, 8), (3, 8, 7)),
    ((2, 1, 3, 4), (1, 3, 4, 9)),
    ((2, 3, 5, 4), (2, 3, 4, 5)),
)


def _bytes(a: Shape, b: Shape, left: DType, right: DType) -> c.Draw:
    given = ((c.static(s), -128 if d is i8 else 0, d) for s, d in ((a, left), (b, right)))
    return c.together(*(c.integers(s, low=low, high=low + 256, dtype=d) for s, low, d in given))


def _samples() -> list[Sample]:
    made = [Sample(c.uniform(a, b), budget=5e-6, reason=REASON) for a, b in _CASES]
    special = np.array([[1, np.inf, 2], [0, 1, np.nan], [1, 2, 3]], np.float32)
    return [
        *made,
        Sample(c.uniform((5, 9), (9, 8), dtype=f64), label="f64"),
        Sample(c.fixed(special, special[:, ::-1].copy()), gradient=False, label="special"),
        Sample(_bytes((9, 33), (33, 17), u8, i8), gradient=False, label="u8 i8"),
        Sample(_bytes((2, 7, 15), (15, 8), i8, i8), gradient=False, label="i8"),
    ]


matmul = register(
    Op(
        name="matmul",
        infer=_infer,
        reference=_reference,
        lower=lambda node: Contract(spec_of(node.inputs[0].shape, node.inputs[1].shape)),
        grad=c.rule(_grad),
        doc="Matrix products of the last two dimensions, (..., M, K) x (..., K, N); the leading ones broadcast as in numpy. "
        "Of i8 and u8, also one of each, the sums are i32, modulo 2^32.",
        arity=2,
        traits=frozenset({Trait.CONTRACTION, Trait.QUANTISABLE}),
        onnx=("MatMul", 13),
        samples=_samples,
    )
)
