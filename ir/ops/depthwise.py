"""Depthwise convolution, channels last: each channel has a kernel of its own, and no channel meets another.

    y[n, i, j, c] = sum over h, w of  x[n, i*s + h*d + o, j*s' + w*d' + o', c] * k[h, w, c]   pixels outside are `fill`

An image of bytes with a kernel of f32 is one of floats that are whole: they are converted where they are read.

The origin (o, o') is the pixel of the first tap of the first output: minus the padding. The passes make this op of the
contraction that a depthwise convolution or its input gradient is, once gradients are expanded: it has none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..dtypes import f32, i8, u8
from ..errors import AttributeValueError, ShapeError
from ..expr import Expr, cast, const, select
from ..graph import Attrs, Node
from ..lowering import Load, Reduce
from ..op import REQUIRED, Array, NotDifferentiable, Op, Sample, Trait, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON


def _ints(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise AttributeValueError(f"{name} of depthwise is two ints, not {value!r}")
    return value


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, k = types
    c.check_dtype("depthwise", types, 1, c.is_wide_float)
    if not (k.dtype is f32 and x.dtype in (i8, u8)):
        c.check_same("depthwise", [TensorType(t.dtype, ()) for t in types])
    if not isinstance(attrs["fill"], float):
        raise AttributeValueError(f"fill of depthwise is a float, not {attrs['fill']!r}")
    if x.rank != 4 or k.rank != 3 or k.shape[2] != x.shape[3]:
        raise ShapeError(
            f"depthwise takes x [n, height, width, C] and k [taps, taps, C], not {c.show(x.shape)} and {c.show(k.shape)}"
        )
    size = c.check_ints("depthwise", "size", attrs["size"], 2, 0)
    for name in ("stride", "dilation"):
        c.check_ints("depthwise", name, attrs[name], 2, 1)
    _ints("origin", attrs["origin"])
    return TensorType(k.dtype, (x.shape[0], *size, x.shape[3]))


def _value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, k = arrays
    size, stride, dilation, origin = (attrs[n] for n in ("size", "stride", "dilation", "origin"))
    y = np.zeros((x.shape[0], *size, x.shape[3]), k.dtype)
    with np.errstate(all="ignore"):
        for h in range(k.shape[0]):
            for w in range(k.shape[1]):
                tap = np.full(y.shape, attrs["fill"], k.dtype)
                at = [np.arange(n) * s + t * d + o for n, s, t, d, o in zip(size, stride, (h, w), dilation, origin, strict=True)]
                rows, columns = (np.flatnonzero((p >= 0) & (p < e)) for p, e in zip(at, x.shape[1:3], strict=True))
                tap[:, rows[:, None], columns] = x[:, at[0][rows][:, None], at[1][columns]]
                y += tap * k[h, w]
    return y


def _lower(node: Node) -> Reduce:
    x, k = (i.tensor for i in node.inputs)
    image, taps = x.shape[1:3], k.shape[:2]
    size, stride, dilation, origin = (node.attrs[n] for n in ("size", "stride", "dilation", "origin"))

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        n, y, x, channel = idx
        at: list[Expr] = []
        inside: list[Expr] = []
        for d, (i, t) in enumerate(zip((y, x), r, strict=True)):
            pixel = i * stride[d] + t * dilation[d] + origin[d]
            if origin[d] < 0:
                inside.append(const(0) <= pixel)
            room = image[d] - 1 - ((size[d] - 1) * stride[d] + (taps[d] - 1) * dilation[d] + origin[d])
            if not isinstance(room, int) or room < 0:
                inside.append(pixel < image[d])
            at.append(pixel)
        mask = c.all_of(inside)
        pixel = cast(c.at(load, 0, (n, *at, channel), mask), node.dtype)
        if mask is not None and node.attrs["fill"]:
            pixel = select(mask, pixel, const(node.attrs["fill"], node.dtype))
        return pixel * load(1, (*r, channel))

    return Reduce("sum", taps, value, fused=True)


def _samples() -> list[Sample]:
    cases: list[tuple[tuple[int, ...], tuple[int, int], dict[str, Any]]] = [
        ((1, 5, 6, 16), (3, 3), {"size": (5, 6), "origin": (-1, -1)}),
        ((2, 9, 8, 7), (3, 3), {"size": (5, 4), "origin": (-1, 0), "stride": (2, 2)}),
        ((1, 11, 9, 33), (5, 5), {"size": (11, 9), "origin": (-2, -2)}),
        ((1, 9, 17, 8), (7, 7), {"size": (9, 17), "origin": (-3, -3)}),
        ((1, 8, 19, 31), (3, 3), {"size": (8, 19), "origin": (-2, -3), "dilation": (2, 3)}),
        ((2, 1, 20, 9), (1, 4), {"size": (1, 17), "origin": (0, 0)}),
        ((1, 4, 4, 17), (2, 3), {"size": (2, 3), "origin": (2, 1)}),
        ((1, 3, 3, 5), (3, 3), {"size": (9, 10), "origin": (-7, 1)}),
        ((0, 4, 4, 8), (3, 3), {"size": (4, 4), "origin": (-1, -1)}),
    ]
    made = [
        Sample(
            c.uniform(x, (*k, x[3])), {"stride": (1, 1), "dilation": (1, 1), **attrs}, budget=5e-6, reason=REASON, gradient=False
        )
        for x, k, attrs in cases
    ]
    for dtype, low, fill, (x, k, attrs) in ((u8, 0, 0.0, cases[0]), (u8, 0, 119.0, cases[1]), (i8, -128, -3.0, cases[2])):
        draw = c.together(c.integers(x, low=low, high=low + 256, dtype=dtype), c.uniform((*k, x[3])))
        made.append(Sample(draw, {**attrs, "fill": fill}, budget=5e-6, reason=REASON, gradient=False, label=f"{dtype} {fill}"))
    return made


_DEFAULTS: Final[dict[str, Any]] = {
    "size": REQUIRED, "origin": (0, 0), "stride": (1, 1), "dilation": (1, 1), "fill": 0.0,
}  # fmt: skip

depthwise = register(
    Op(
        name="depthwise",
        infer=_infer,
        reference=_value,
        lower=_lower,
        grad=NotDifferentiable("it stands for a depthwise convolution once gradients are expanded; differentiate conv2d"),
        doc="Depthwise convolution of x [n, height, width, C] with k [taps, taps, C]: images of `size` from pixel `origin` on, "
        "of pixels `fill` outside.",
        arity=2,
        traits=frozenset({Trait.REDUCTION}),
        attrs=_DEFAULTS,
        samples=_samples,
    )
)
