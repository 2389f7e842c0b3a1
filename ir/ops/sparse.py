"""Products with a sparse matrix, whose pattern is data: a stream of offsets beside the values.

The columns of the result come in blocks of W, a power of two. Block b is the sum over its entries e, from starts[b] to
starts[b + 1], of

    y[..., b*W + j]  +=  x[..., offsets[e]] * values[e, j]          0 <= j < W

so that W = 1 holds a matrix row by row (CSR) and W = 16 is made of blocks of one step of the reduction and 16 neighbouring
columns, which fill a vector. What is not stored is not multiplied: an infinity in x meets only the entries there are.
Offsets and starts are held inside their ranges, so that no pattern can read beyond its operands.

`sparse_conv2d` is the same over images [N, H, W, C]: the rows are what the window of a convolution reads for each pixel, channel
after channel, its taps within each (ir/lowering.py, Window).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..dims import Dim, as_int
from ..dtypes import i32
from ..errors import DTypeError, ShapeError
from ..graph import Attrs, Node
from ..lowering import Sparse, Window
from ..op import REQUIRED, Array, NotDifferentiable, Op, Sample, Trait, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON
from .conv_geometry import check_padding, window_count


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, *matrix = types
    if x.rank < 1:
        raise ShapeError(f"operand 0 of sparse_matmul is [..., K], not {c.show(x.shape)}")
    return TensorType(x.dtype, (*x.shape[:-1], _columns("sparse_matmul", x, matrix)))


def _columns(op: str, x: TensorType, matrix: Sequence[TensorType]) -> int:
    """How many columns a sparse matrix has, after a look at its types."""
    values, offsets, starts = matrix
    types = (x, *matrix)
    c.check_dtype(op, types, 0, c.is_wide_float)
    c.check_same(op, [TensorType(t.dtype, ()) for t in (x, values)])
    for k, t in ((2, offsets), (3, starts)):
        if t.dtype is not i32:
            raise DTypeError(f"operand {k} of {op} has dtype {t.dtype}, expected i32")
    if values.rank != 2 or offsets.rank != 1 or starts.rank != 1:
        shapes = ", ".join(c.show(t.shape) for t in types)
        raise ShapeError(f"{op} takes x, values [E, W], offsets [E] and starts [N / W + 1], not {shapes}")
    entries, width = c.static(values.shape)
    (count,) = c.static(starts.shape)
    if offsets.shape != (entries,):
        raise ShapeError(f"operand 2 of {op} has shape {c.show(offsets.shape)}, expected [{entries}], one for each entry")
    if count < 1 or width < 1:
        raise ShapeError(f"{op} needs a start for each block and one more, and blocks of a column at least: {starts}")
    if width & (width - 1):
        raise ShapeError(f"operand 1 of {op} has blocks of {width} columns; their width is a power of two")
    if x.shape[-1] == 0 and entries:
        raise ShapeError(f"operand 0 of {op} has shape {c.show(x.shape)}: there is nothing for {entries} entries to meet")
    return (count - 1) * width


def window_of(attrs: Attrs) -> Window:
    """The window that a sparse convolution's attributes describe."""
    kernel = c.check_ints("sparse_conv2d", "kernel", attrs["kernel"], 2, 1)
    stride = c.check_ints("sparse_conv2d", "stride", attrs["stride"], 2, 1)
    return Window((kernel[0], kernel[1]), (stride[0], stride[1]), check_padding("sparse_conv2d", attrs["padding"]))


def _infer_conv(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, *matrix = types
    w = window_of(attrs)
    if x.rank != 4:
        raise ShapeError(f"operand 0 of sparse_conv2d is [N, H, W, C], not {c.show(x.shape)}")
    columns = _columns("sparse_conv2d", x, matrix)
    size: list[Dim] = [
        window_count("sparse_conv2d", x.shape[1 + d], w.kernel[d], w.stride[d], w.padding[d], 1, name)
        for d, name in enumerate(("height", "width"))
    ]
    return TensorType(x.dtype, (x.shape[0], *size, columns))


def _conv_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, *matrix = arrays
    w = window_of(attrs)
    padded = np.pad(x, ((0, 0), *w.padding, (0, 0)))
    seen = sliding_window_view(padded, w.kernel, axis=(1, 2))[:, :: w.stride[0], :: w.stride[1]]  # [N, OH, OW, C, KH, KW]
    return _value([seen.reshape(*seen.shape[:3], x.shape[3] * w.taps), *matrix], attrs)


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


def _lower_conv(node: Node) -> Sparse:
    return Sparse(as_int(node.inputs[1].shape[1]), window_of(node.attrs))


def _pattern(
    lead: tuple[int, ...], k: int, blocks: int, width: int, density: float, hostile: bool = False, taps: int = 1
) -> Callable[[np.random.Generator], list[Array]]:
    """Operands with about this share of entries present; `hostile` ones point beyond what there is."""

    def draw(rng: np.random.Generator) -> list[Array]:
        kept = rng.random((blocks, k * taps)) < density
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


def _conv_samples() -> list[Sample]:
    # images, channels, blocks, their width, density, hostile; kernel, stride, padding
    around = ((1, 1), (1, 1))
    cases: list[tuple[Any, ...]] = [
        ((1, 6, 7), 5, 2, 16, 0.3, False, (3, 3), (1, 1), around),
        ((2, 9, 9), 17, 1, 16, 0.2, False, (3, 3), (2, 2), around),
        ((1, 5, 33), 18, 3, 8, 0.3, False, (1, 1), (2, 2), ((0, 0), (0, 0))),
        ((1, 8, 6), 3, 5, 1, 0.4, False, (5, 3), (1, 2), ((2, 1), (0, 3))),
        ((1, 4, 4), 2, 3, 4, 0.5, True, (2, 2), (3, 3), ((2, 2), (3, 0))),
        ((0, 5, 5), 4, 1, 16, 0.4, False, (3, 3), (1, 1), around),
    ]
    return [
        Sample(
            _pattern(lead, channels, blocks, width, density, hostile, kernel[0] * kernel[1]),
            {"kernel": kernel, "stride": stride, "padding": padding},
            budget=5e-6,
            reason=REASON,
            gradient=False,
        )
        for lead, channels, blocks, width, density, hostile, kernel, stride, padding in cases
    ]


_FIXED = "its pattern is fixed: train the dense weights under their mask, and make them sparse after that"

sparse_matmul = register(
    Op(
        name="sparse_matmul",
        doc="x [..., K] times a sparse matrix [K, N] of values [E, W] at offsets [E], block after block by starts [N / W + 1].",
        arity=4,
        infer=_infer,
        reference=_value,
        lower=_lower,
        grad=NotDifferentiable(_FIXED),
        traits=frozenset({Trait.CONTRACTION}),
        samples=_samples,
    )
)
sparse_conv2d = register(
    Op(
        name="sparse_conv2d",
        doc="Cross-correlation of images [N, H, W, C] with a sparse matrix [C * KH * KW, N], given as for sparse_matmul.",
        arity=4,
        infer=_infer_conv,
        reference=_conv_value,
        lower=_lower_conv,
        grad=NotDifferentiable(_FIXED),
        traits=frozenset({Trait.CONTRACTION}),
        attrs={"kernel": REQUIRED, "stride": (1, 1), "padding": ((0, 0), (0, 0))},
        samples=_conv_samples,
    )
)
