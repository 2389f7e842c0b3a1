"""How order, scattered writes, running sums and products, shifts, bits and quantised numbers are written in ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...ir.dims import as_int
from ...ir.dtypes import DType, bool_, f32, f64, i32, i64
from ...ir.graph import Node
from ...ir.types import TensorType
from ..resize import COORDINATES, ROUNDINGS, tables
from .description import Array
from .export_registry import writes
from .types import type_number

if TYPE_CHECKING:
    from .exporter import Emitter

FEW: Final = 8  # taps of a resampling that are written as so many weighted terms; more are a matrix product


def _cast(e: Emitter, name: str, dtype: DType) -> str:
    return e.emit("Cast", [name], to=type_number(dtype))


# -- order and scattered writes -----------------------------------------------------------------------------------------
@writes("argsort")
def _argsort(e: Emitter, node: Node) -> str:
    """TopK; its second output. Types that readers of TopK lack are cast to one that holds them exactly."""
    x, a = node.inputs[0], node.attrs
    name, dtype = e.name(x), x.dtype
    if dtype.is_float and dtype.bits < 32:
        name = _cast(e, name, f32)
    elif dtype is bool_ or (dtype.is_integer and dtype.bits < 32):
        name = _cast(e, name, i32)
    elif dtype.kind == "uint" and dtype.bits == 32:
        name = _cast(e, name, i64)
    return e.emit_all(
        "TopK", [name, e.size(a["count"])], count=2, axis=a["axis"], largest=int(a["descending"]), sorted=1, hint="order"
    )[1]


_REDUCTIONS: Final = {"set": "none", "mul": "mul", "max": "max", "min": "min"}


@writes("scatter_add", "scatter")
def _scatter(e: Emitter, node: Node) -> str:
    """Along axis 0 by ScatterND; other axes are brought there. Positions outside are dropped by ours: they go to one more
    row at the end, which is cut off."""
    x, index, updates = node.inputs
    kind = "add" if node.op.name == "scatter_add" else _REDUCTIONS[node.attrs["kind"]]
    axis, rank, count = node.attrs["axis"], len(x.shape), len(index.shape)
    size = x.shape[axis]
    order = [axis, *(k for k in range(rank) if k != axis)]
    moved = e.emit("Transpose", [e.name(x)], perm=order) if axis else e.name(x)
    inner = [*range(axis, axis + count), *(k for k in range(rank - 1 + count) if not axis <= k < axis + count)]
    added = e.emit("Transpose", [e.name(updates)], perm=inner) if axis else e.name(updates)
    known = index.attrs["value"].array if index.op.name == "constant" else None
    inside = known is not None and isinstance(size, int) and bool(np.all((known >= 0) & (known < size)))
    at = e.name(index) if index.dtype is i64 else _cast(e, e.name(index), i64)
    if not inside:
        end = e.emit("Squeeze", [e.size(size), e.array(np.array([0]))])
        zero = e.array(np.asarray(0, np.int64))
        valid = e.emit("And", [e.emit("GreaterOrEqual", [at, zero]), e.emit("Less", [at, end])])
        at = e.emit("Where", [valid, at, end])
        widths = e.array(np.array([0] * rank + [1] + [0] * (rank - 1), np.int64))
        moved = e.emit("Pad", [moved, widths])
    at = e.emit("Unsqueeze", [at, e.array(np.array([count]))])
    result = e.emit("ScatterND", [moved, at, added], reduction=kind)
    if not inside:
        result = e.emit("Slice", [result, e.array(np.array([0])), e.size(size), e.array(np.array([0]))])
    return e.emit("Transpose", [result], perm=[*range(1, axis + 1), 0, *range(axis + 1, rank)]) if axis else result


# -- running sums and products ------------------------------------------------------------------------------------------
@writes("cumsum")
def _cumsum(e: Emitter, node: Node) -> str:
    axis = e.array(np.asarray(node.attrs["axis"], np.int64))
    flags: dict[str, Any] = {k: int(node.attrs[k]) for k in ("exclusive", "reverse")}
    return e.emit("CumSum", [e.name(node.inputs[0]), axis], **flags)


@writes("cumprod")
def _cumprod(e: Emitter, node: Node) -> str:
    """CumProd from opset 26 on; before, a Scan that carries the product."""
    x, axis, dtype = node.inputs[0], node.attrs["axis"], node.dtype
    flags: dict[str, Any] = {k: int(node.attrs[k]) for k in ("exclusive", "reverse")}
    if e.opset >= 26 and dtype.bits >= 16:
        return e.emit("CumProd", [e.name(x), e.array(np.asarray(axis, np.int64))], **flags)
    thin = (*x.shape[:axis], *x.shape[axis + 1 :])
    start = e.emit("Expand", [e.array(np.ones((), dtype.numpy)), e.shape(thin)])
    inner, item = e.inside(), TensorType(dtype, thin)
    before, factor = e.fresh("product"), e.fresh("factor")
    after = inner.emit("Mul", [before, factor])
    given = inner.emit("Identity", [before if flags["exclusive"] else after])
    body = inner.graph_of("step", [(before, item), (factor, item)], [(after, item), (given, item)])
    back = flags["reverse"]
    return e.emit_all(
        "Scan", [start, e.name(x)], count=2, body=body, num_scan_inputs=1, scan_input_axes=[axis], scan_output_axes=[axis],
        scan_input_directions=[back], scan_output_directions=[back], hint="cumprod",
    )[1]  # fmt: skip


# -- bits ---------------------------------------------------------------------------------------------------------------
@writes("shift_left", "shift_right")
def _shift(e: Emitter, node: Node) -> str:
    """BitShift of unsigned integers of 32 or 64 bits: the types that its readers have. Signed ones are turned around their sign
    first, which an arithmetic shift to the right keeps; counts outside of the width shift everything out."""
    left, dtype = node.op.name == "shift_left", node.dtype
    a, b = (e.name(i) for i in node.inputs)
    wide = np.dtype(np.uint64 if dtype.bits == 64 else np.uint32)
    width, nothing = (e.array(np.asarray(v, dtype.numpy)) for v in (dtype.bits, 0))
    counts = node.inputs[1].inputs[0] if node.inputs[1].op.name == "broadcast_to" else node.inputs[1]
    known = counts.attrs["value"].array if counts.op.name == "constant" else None
    valid = None
    if known is None or np.any((known < 0) | (known >= dtype.bits)):
        valid = e.emit("Less", [b, width])
        if dtype.kind == "int":
            valid = e.emit("And", [valid, e.emit("GreaterOrEqual", [b, nothing])])
        b = e.emit("Where", [valid, b, nothing])
    sign = None
    if not left and dtype.kind == "int":
        ones = e.array(np.asarray(-1, dtype.numpy))
        sign = e.emit("Where", [e.emit("Less", [a, nothing]), ones, nothing])
        a = e.emit("BitwiseXor", [a, sign])
    same = dtype.numpy == wide
    number = e.number(wide)
    given = [n if same else e.emit("Cast", [n], to=number) for n in (a, b)]
    result = e.emit("BitShift", given, direction="LEFT" if left else "RIGHT")
    result = result if same else _cast(e, result, dtype)
    if sign is not None:
        result = e.emit("BitwiseXor", [result, sign])
    return result if valid is None else e.emit("Where", [valid, result, sign or nothing])


@writes("bit_cast", since=26)
def _bit_cast(e: Emitter, node: Node) -> str:
    return e.emit("BitCast", [e.name(node.inputs[0])], to=type_number(node.dtype))


# -- quantised numbers --------------------------------------------------------------------------------------------------
def _over(e: Emitter, x: Node, t: Node, axis: int | None) -> str:
    """A scale or zero point in a shape that broadcasts over x."""
    if axis is None:
        return e.name(t)
    return e.emit("Reshape", [e.name(t), e.array(np.array([-1 if k == axis else 1 for k in range(len(x.shape))], np.int64))])


def _axis(node: Node) -> dict[str, Any]:
    return {} if node.attrs["axis"] is None else {"axis": node.attrs["axis"]}


@writes("quantize")
def _quantize(e: Emitter, node: Node) -> str:
    """QuantizeLinear; of f64, which that does not take, its formula."""
    x, scale, zero = node.inputs
    if x.dtype is not f64:
        return e.emit("QuantizeLinear", [e.name(i) for i in node.inputs], **_axis(node))
    axis, dtype = node.attrs["axis"], node.dtype
    whole = e.emit("Round", [e.emit("Div", [e.name(x), _over(e, x, scale, axis)])])
    whole = e.emit("Add", [whole, _cast(e, _over(e, x, zero, axis), f64)])
    limits = np.iinfo(dtype.numpy)
    low, high = (e.array(np.asarray(v, np.float64)) for v in (limits.min, limits.max))
    return _cast(e, e.emit("Clip", [whole, low, high]), dtype)


@writes("dequantize")
def _dequantize(e: Emitter, node: Node) -> str:
    """DequantizeLinear; of types that it does not take, its formula."""
    x, scale, zero = node.inputs
    axis = node.attrs["axis"]
    if x.dtype.bits <= 16 and scale.dtype is not f64:
        return e.emit("DequantizeLinear", [e.name(i) for i in node.inputs], **_axis(node))
    if x.dtype is i32 and scale.dtype is not f64 and _is_zero(zero):
        return e.emit("DequantizeLinear", [e.name(x), e.name(scale)], **_axis(node))
    wide = f64 if scale.dtype is f64 or x.dtype.bits > 16 else f32
    centred = e.emit("Sub", [_cast(e, e.name(x), i64), _cast(e, _over(e, x, zero, axis), i64)])
    scaled = e.emit("Mul", [_cast(e, centred, wide), _cast(e, _over(e, x, scale, axis), wide)])
    return scaled if wide is node.dtype else _cast(e, scaled, node.dtype)


def _is_zero(node: Node) -> bool:
    while node.op.name == "broadcast_to":
        node = node.inputs[0]
    return node.op.name == "constant" and not np.any(node.attrs["value"].array)


# -- resampling ---------------------------------------------------------------------------------------------------------
@writes("resample")
def _resample(e: Emitter, node: Node) -> str:
    """Resize along one axis where the tables are those of one of its modes; otherwise the weighted terms, or their matrix."""
    x, index, weights = node.inputs
    axis, size = node.attrs["axis"], x.shape[node.attrs["axis"]]
    if index.op.name == "constant" and weights.op.name == "constant" and isinstance(size, int):
        places, strengths = index.attrs["value"].array, weights.attrs["value"].array
        mode = _mode(places, strengths, size)
        # readers of Resize take images, and two axes at a time: the other one is given as it is
        if mode is not None and len(x.shape) == 4 and axis >= 2 and size:
            sizes = e.shape([d if k != axis else as_int(node.shape[axis]) for k, d in enumerate(x.shape)][2:])
            return e.emit("Resize", [e.name(x), "", "", sizes], axes=[2, 3], **mode)
        if places.shape[0] > FEW:
            return _as_product(e, node, places, strengths, size)
    total: str | None = None
    for t in range(as_int(index.shape[0])):
        at, w = (_row(e, i, t) for i in (index, weights))
        line = [-1, *(1,) * (len(x.shape) - axis - 1)]
        w = e.emit("Reshape", [w, e.array(np.array(line, np.int64))])
        part = e.emit("Mul", [e.emit("Gather", [e.name(x), at], axis=axis), w])
        part = e.emit(
            "Where",
            [e.emit("Equal", [w, e.array(np.zeros((), node.dtype.numpy))]), e.array(np.zeros((), node.dtype.numpy)), part],
        )
        total = part if total is None else e.emit("Add", [total, part])
    assert total is not None
    return total


def _row(e: Emitter, table: Node, t: int) -> str:
    if table.op.name == "constant":
        return e.array(table.attrs["value"].array[t])
    return e.emit("Gather", [e.name(table), e.array(np.asarray(t, np.int64))], axis=0)


def _as_product(e: Emitter, node: Node, places: Array, strengths: Array, size: int) -> str:
    """x times the matrix [elements, results] of the weights."""
    axis, rank, out = node.attrs["axis"], len(node.shape), places.shape[1]
    matrix = np.zeros((size, out), strengths.dtype)
    np.add.at(matrix, (np.clip(places, 0, size - 1), np.arange(out)[None, :]), strengths)
    last = [k for k in range(rank) if k != axis]
    moved = e.name(node.inputs[0]) if axis == rank - 1 else e.emit("Transpose", [e.name(node.inputs[0])], perm=[*last, axis])
    result = e.emit("MatMul", [moved, e.array(matrix)])
    return result if axis == rank - 1 else e.emit("Transpose", [result], perm=[*range(axis), rank - 1, *range(axis, rank - 1)])


_ONNX_CUBIC: Final = (-0.75, -0.5)


def _mode(places: Array, strengths: Array, n: int) -> dict[str, Any] | None:
    """The attributes of the Resize that has these tables; None where there is none."""
    out = places.shape[1]
    names = [c for c in COORDINATES if c != "tf_half_pixel_for_nn"]
    found: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
    for c in names:
        found += [({"mode": "nearest", "nearest_mode": r}, ("nearest", c, r, -0.75, False, False)) for r in ROUNDINGS]
        for anti in (False, True):
            for outside in (False, True):
                flags: dict[str, Any] = {"antialias": int(anti), "exclude_outside": int(outside)}
                found.append(({"mode": "linear", **flags}, ("linear", c, ROUNDINGS[0], -0.75, anti, outside)))
                found += [
                    ({"mode": "cubic", "cubic_coeff_a": a, **flags}, ("cubic", c, ROUNDINGS[0], a, anti, outside))
                    for a in _ONNX_CUBIC
                ]
    for attrs, (mode, c, rounding, cubic, anti, outside) in found:
        if mode != "cubic" and attrs.get("exclude_outside") and not anti:
            continue
        p, w = tables(n, out, out / n if n else 1.0, mode, c, rounding, cubic, anti, outside)
        if p.shape == places.shape and np.array_equal(p, places) and np.array_equal(w.astype(strengths.dtype), strengths):
            return {**attrs, "coordinate_transformation_mode": c}
    return None
