"""quantize and dequantize: floats as integers over a scale and a zero point, whole or along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dtypes import DType, f16, f32, f64, i8, i32, i64, u8
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, cast, unary
from ..graph import Attrs, Node
from ..lowering import Load, Map
from ..op import REQUIRED, Array, NotDifferentiable, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .compare import cast_array


def limits(dtype: DType) -> tuple[int, int]:
    """The least and the largest integer of a dtype."""
    return (0, (1 << dtype.bits) - 1) if dtype.kind == "uint" else (-(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1)


def _check(op: str, x: TensorType, scale: TensorType, zero: TensorType, attrs: Attrs) -> None:
    axis = attrs["axis"]
    if axis is None:
        wanted: tuple[Any, ...] = ()
    else:
        wanted = (x.shape[c.check_axis(op, axis, x.rank)],)
    for k, t in ((1, scale), (2, zero)):
        if t.shape != wanted:
            what = "a number" if axis is None else f"one for each entry of axis {axis} of {c.show(x.shape)}"
            raise ShapeError(f"operand {k} of {op} has shape {c.show(t.shape)}, expected {c.show(wanted)}: {what}")


def _infer_quantize(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, scale, zero = types
    dtype = c.check_dtype_attr("quantize", attrs["dtype"])
    c.check_dtype("quantize", types, 0, c.is_float)
    if not dtype.is_integer or not 8 <= dtype.bits <= 16:
        raise AttributeValueError(f"dtype of quantize is an integer of 8 or 16 bits, not {dtype}")
    if scale.dtype is not x.dtype or zero.dtype is not dtype:
        raise DTypeError(f"quantize takes a scale of {x.dtype} and a zero point of {dtype}, not {scale.dtype} and {zero.dtype}")
    _check("quantize", x, scale, zero, attrs)
    return TensorType(dtype, x.shape)


def _infer_dequantize(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, scale, zero = types
    c.check_dtype("dequantize", types, 1, c.is_float)
    if not x.dtype.is_integer or x.dtype.bits > 32 or zero.dtype is not x.dtype:
        raise DTypeError(
            f"dequantize takes integers of 32 bits at most and a zero point of their dtype, not {x.dtype} and {zero.dtype}"
        )
    _check("dequantize", x, scale, zero, attrs)
    return TensorType(scale.dtype, x.shape)


def _over(t: Array, x: Array, axis: int | None) -> Array:
    return t if axis is None else t.reshape([-1 if k == axis else 1 for k in range(x.ndim)])


def _quantize_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, scale, zero = arrays
    wide = np.promote_types(x.dtype, np.float32) if x.dtype.kind == "f" else np.dtype(np.float32)
    x, scale = x.astype(wide), scale.astype(wide)
    with np.errstate(all="ignore"):
        whole = np.rint(x / _over(scale, x, attrs["axis"])) + _over(zero, x, attrs["axis"]).astype(wide)
        return cast_array(np.clip(np.where(np.isnan(whole), 0, whole), *limits(attrs["dtype"])), attrs["dtype"])


def _dequantize_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, scale, zero = arrays
    wide = np.promote_types(scale.dtype, np.float32) if scale.dtype.kind == "f" else np.dtype(np.float32)
    centred = x.astype(np.int64) - _over(zero, x, attrs["axis"]).astype(np.int64)
    with np.errstate(all="ignore"):
        return np.asarray((centred.astype(wide) * _over(scale, x, attrs["axis"]).astype(wide)).astype(scale.dtype))


def _at(idx: tuple[Expr, ...], axis: int | None) -> tuple[Expr, ...]:
    return () if axis is None else (idx[axis],)


def _lower_quantize(node: Node) -> Map:
    axis, dtype = node.attrs["axis"], node.dtype

    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        wide = c.accumulator(node.inputs[0].dtype)
        at = _at(idx, axis)
        whole = unary("round", cast(load(0, idx), wide) / cast(load(1, at), wide)) + cast(load(2, at), wide)
        return cast(whole, dtype)  # which saturates

    return Map(value)


def _lower_dequantize(node: Node) -> Map:
    axis = node.attrs["axis"]

    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        at, dtype = _at(idx, axis), node.dtype
        wide = c.accumulator(dtype)
        x, zero, scale = load(0, idx), load(2, at), cast(load(1, at), wide)
        # differences of narrow integers are exact in f32; wider ones are taken in i64, whose cast rounds once
        middle = wide if x.dtype.bits <= 16 else i64
        return cast(cast(cast(x, middle) - cast(zero, middle), wide) * scale, dtype)

    return Map(value)


def _transpose(node: Node, perm: tuple[int, ...]) -> Node:
    axis = node.attrs["axis"]
    moved = None if axis is None else perm.index(axis)
    return make(node.op, c.transposed(node.inputs[0], perm), *node.inputs[1:], **{**node.attrs, "axis": moved})


def _scales(shape: tuple[int, ...], dtype: DType = f32) -> c.Draw:
    return c.uniform(shape, low=0.01, high=0.3, dtype=dtype)


def _quantize_samples() -> list[Sample]:
    def sample(shape: tuple[int, ...], axis: int | None, dtype: DType, of: DType = f32, label: str = "") -> Sample:
        thin = () if axis is None else (shape[axis],)
        zero = c.integers(thin, low=limits(dtype)[0] // 4, high=limits(dtype)[1] // 4 + 1, dtype=dtype)
        draw = c.together(c.uniform(shape, low=-30, high=30, dtype=of), _scales(thin, of), zero)
        return Sample(draw, {"axis": axis, "dtype": dtype}, gradient=False, label=label)

    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 0.5, 1.5, 2.5, -0.5, 1e30, -1e30], np.float32)
    edges = c.fixed(special, np.asarray(1.0, np.float32), np.asarray(3, np.uint8))
    return [
        *(sample(s, None, u8) for s in c.some_shapes("quantize")),
        sample((3, 17, 5), 1, i8),
        sample((33, 4), 0, u8),
        sample((4, 9), 1, i8, f64, "f64"),
        sample((2, 16), None, i8, f16, "f16"),
        Sample(edges, {"axis": None, "dtype": u8}, gradient=False, label="special"),
    ]


def _dequantize_samples() -> list[Sample]:
    def sample(shape: tuple[int, ...], axis: int | None, dtype: DType, to: DType = f32, label: str = "") -> Sample:
        thin = () if axis is None else (shape[axis],)
        low, high = max(limits(dtype)[0], -(2**20)), min(limits(dtype)[1], 2**20)
        numbers = c.together(c.integers(shape, low=low, high=high, dtype=dtype), _scales(thin, to))
        draw = c.together(numbers, c.integers(thin, low=low // 4, high=high // 4, dtype=dtype))
        budget, reason = (5e-4, "one rounding to f16") if to is f16 else (2e-6, "")
        return Sample(draw, {"axis": axis}, budget=budget, reason=reason, gradient=False, label=label)

    return [
        *(sample(s, None, u8) for s in c.some_shapes("dequantize")),
        sample((3, 17, 5), 1, i8),
        sample((33, 4), 0, i32, label="i32"),
        sample((4, 9), 1, i8, f64, "f64"),
        sample((2, 16), None, i8, f16, "f16"),
    ]


_NONE = NotDifferentiable("rounding has no gradient; train with tw.stop_gradient(rounded - x) + x in its place")

quantize = register(
    Op(
        name="quantize",
        infer=_infer_quantize,
        reference=_quantize_reference,
        lower=_lower_quantize,
        grad=_NONE,
        doc="round(x / scale) + zero point, half to even, saturated to an integer dtype, NaN to 0; in f32 at least. "
        "Operands x, scale and zero point, the latter two numbers, or vectors along `axis`.",
        arity=3,
        traits=frozenset({Trait.CHEAP, Trait.QUANTIZE}),
        attrs={"axis": None, "dtype": REQUIRED},
        transpose=_transpose,
        onnx=("QuantizeLinear", 13),
        samples=_quantize_samples,
    )
)
dequantize = register(
    Op(
        name="dequantize",
        infer=_infer_dequantize,
        reference=_dequantize_reference,
        lower=_lower_dequantize,
        grad=_NONE,
        doc="(x - zero point) * scale in the scale's dtype, computed in f32 at least. "
        "Operands x, scale and zero point, the latter two numbers, or vectors along `axis`.",
        arity=3,
        traits=frozenset({Trait.CHEAP, Trait.DEQUANTIZE}),
        attrs={"axis": None},
        transpose=_transpose,
        onnx=("DequantizeLinear", 13),
        samples=_dequantize_samples,
    )
)
