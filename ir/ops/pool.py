"""2-D max and average pooling with their gradients, in NCHW or NHWC.

A gradient gathers: each pixel of x sums over the windows that contain it, so nothing collides. With p = pixel + padding,
those are the windows p // s, p // s - 1, ... of which ceil(extent / s) can reach the pixel, at offset p - window * s; the
extent is (kernel - 1) * dilation + 1, and with a dilation the offset must be a multiple of it. Averages have no dilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..dims import Dim, Shape, as_int
from ..dtypes import DType, as_dtype, f64, i8, i32, u8
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, cast, const, eq, lift, maximum, minimum, select
from ..graph import Attrs, Node
from ..lowering import Load, Reduce
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .conv_geometry import LAYOUTS, check_layout, check_padding, join, moved, split, window_count

_COMMON: Final[dict[str, Any]] = {"kernel": REQUIRED, "stride": REQUIRED, "padding": ((0, 0), (0, 0)), "layout": "NCHW"}


@dataclass(frozen=True)
class _Windows:
    """The sizes of one pooling, height before width."""

    n: Dim
    channels: Dim
    size: tuple[Dim, Dim]
    out: tuple[Dim, Dim]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    layout: str

    @property
    def extent(self) -> tuple[int, int]:
        """From the first element of a window to the last."""
        return ((self.kernel[0] - 1) * self.dilation[0] + 1, (self.kernel[1] - 1) * self.dilation[1] + 1)

    @property
    def x_shape(self) -> Shape:
        return join(self.n, self.channels, *self.size, self.layout)

    @property
    def y_shape(self) -> Shape:
        return join(self.n, self.channels, *self.out, self.layout)

    @property
    def reach(self) -> tuple[int, int]:
        """How many windows can contain one pixel."""
        return (-(-self.extent[0] // self.stride[0]), -(-self.extent[1] // self.stride[1]))


def _windows(op: str, shape: Shape, attrs: Attrs) -> _Windows:
    layout = check_layout(op, attrs["layout"])
    kernel = c.check_ints(op, "kernel", attrs["kernel"], 2, 1)
    stride = c.check_ints(op, "stride", attrs["stride"], 2, 1)
    dilation = c.check_ints(op, "dilation", attrs.get("dilation", (1, 1)), 2, 1)
    padding = check_padding(op, attrs["padding"])
    for d in range(2):
        if max(padding[d]) > (kernel[d] - 1) * dilation[d]:
            raise AttributeValueError(
                f"padding {padding} of {op} must be smaller than the kernel {kernel}: a window would hold no pixel"
            )
    if len(shape) != 4:
        raise ShapeError(f"operand 0 of {op} has shape {c.show(shape)} of rank {len(shape)}, expected rank 4 ({layout})")
    n, channels, height, width = split(shape, layout)
    out = [
        window_count(op, size, kernel[d], stride[d], padding[d], dilation[d], ("height", "width")[d])
        for d, size in enumerate((height, width))
    ]
    return _Windows(
        n, channels, (height, width), (out[0], out[1]),
        (kernel[0], kernel[1]), (stride[0], stride[1]), padding, (dilation[0], dilation[1]), layout,
    )  # fmt: skip


def _of(node: Node) -> _Windows:
    shape = node.attrs["input_shape"] if "input_shape" in node.attrs else node.inputs[0].shape
    return _windows(node.op.name, shape, node.attrs)


# --- lowering -------------------------------------------------------------------------------------------------------


def _pixel(w: _Windows, idx: tuple[Expr, ...], r: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], Expr | None]:
    """The index into x of tap r of window idx, and the mask that is true inside the image (None: always)."""
    n, channel, y, x = split(idx, w.layout)
    at: list[Expr] = []
    inside: list[Expr] = []
    for d, i in enumerate((y, x)):
        pixel = i * w.stride[d] + r[d] * w.dilation[d] - w.padding[d][0]
        size, last = w.size[d], (w.out[d] - 1) * w.stride[d] + w.extent[d] - 1 - w.padding[d][0]
        if w.padding[d][0]:
            inside.append(const(0) <= pixel)
        room = size - 1 - last
        if not isinstance(room, int) or room < 0:
            inside.append(pixel < size)
        at.append(pixel)
    return join(n, channel, at[0], at[1], w.layout), c.all_of(inside)


def _window(w: _Windows, idx: tuple[Expr, ...], r: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], Expr, list[Expr]]:
    """For pixel idx: the index of the r-th window that may contain it, whether it does, and which of its elements it is."""
    n, channel, y, x = split(idx, w.layout)
    at: list[Expr] = []
    taps: list[Expr] = []
    inside: list[Expr] = []
    for d, i in enumerate((y, x)):
        p = i + w.padding[d][0]
        window = p // w.stride[d] - r[d]
        offset = p - window * w.stride[d]
        inside += [const(0) <= window, window < w.out[d]]
        if w.extent[d] % w.stride[d]:
            inside.append(offset < w.extent[d])
        if w.dilation[d] > 1:
            inside.append(eq(offset % w.dilation[d], const(0)))
        at.append(window)
        taps.append(offset // w.dilation[d] if w.dilation[d] > 1 else offset)
    mask = c.all_of(inside)
    assert mask is not None
    return join(n, channel, at[0], at[1], w.layout), mask, taps


def _masked(value: Expr, mask: Expr | None, other: float) -> Expr:
    return value if mask is None else select(mask, value, const(other, value.dtype))


def _least(dtype: DType) -> float | int:
    """What padding counts as for a maximum."""
    return int(np.iinfo(dtype.numpy).min) if dtype.is_integer else float("-inf")


def _lower_max(kind: str) -> Callable[[Node], Reduce]:
    def lower(node: Node) -> Reduce:
        w = _of(node)

        def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
            index, mask = _pixel(w, idx, r)
            return _masked(c.at(load, 0, index, mask), mask, _least(node.inputs[0].dtype))

        return Reduce(kind, w.kernel, value)

    return lower


def _lower_max_grad(node: Node) -> Reduce:
    w = _of(node)

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        index, mask, (h, v) = _window(w, idx, r)
        chosen = eq(load(1, index, mask), cast(h * w.kernel[1] + v, i32))
        return select(chosen & mask, load(0, index, mask), const(0.0, node.dtype))

    return Reduce("sum", w.reach, value)


def _count_expr(w: _Windows, y: Expr, x: Expr, pad: bool, dtype: DType) -> Expr:
    """1 / (the number of elements that a window averages)."""
    if pad or w.padding == ((0, 0), (0, 0)):
        return const(1.0 / (w.kernel[0] * w.kernel[1]), dtype)
    count: Expr = const(1)
    for d, i in enumerate((y, x)):
        start = i * w.stride[d] - w.padding[d][0]
        count = count * (minimum(start + w.kernel[d], lift(w.size[d])) - maximum(start, 0))
    return const(1.0, dtype) / cast(maximum(count, 1), dtype)


def _lower_avg(node: Node) -> Reduce:
    w, pad = _of(node), node.attrs["count_include_pad"]

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        index, mask = _pixel(w, idx, r)
        _, _, y, x = split(idx, w.layout)
        return c.at(load, 0, index, mask) * _count_expr(w, y, x, pad, node.dtype)

    return Reduce("sum", w.kernel, value)


def _lower_avg_grad(node: Node) -> Reduce:
    w, pad = _of(node), node.attrs["count_include_pad"]

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        index, mask, _ = _window(w, idx, r)
        _, _, y, x = split(index, w.layout)
        return load(0, index, mask) * _count_expr(w, y, x, pad, node.dtype)

    return Reduce("sum", w.reach, value)


# --- values ---------------------------------------------------------------------------------------------------------


def _taps(w: _Windows) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """For each tap of the window in row-major order, the pixels of the padded image that it meets."""
    for h in range(w.kernel[0]):
        for v in range(w.kernel[1]):
            rows, columns = (
                slice(start, start + (as_int(w.out[d]) - 1) * w.stride[d] + 1, w.stride[d])
                for d, start in enumerate((h * w.dilation[0], v * w.dilation[1]))
            )
            yield h * w.kernel[1] + v, join(slice(None), slice(None), rows, columns, w.layout)


def _border(w: _Windows) -> tuple[tuple[int, int], ...]:
    return join((0, 0), (0, 0), *w.padding, w.layout)


def _max_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    w = _windows("max_pool2d", arrays[0].shape, attrs)
    least = _least(as_dtype(arrays[0].dtype))
    x = np.pad(arrays[0], _border(w), constant_values=least)
    y = np.full(c.static(w.y_shape), least, x.dtype)
    for _, pixels in _taps(w):
        y = np.maximum(y, x[pixels])
    return y


def _index_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    w = _windows("max_pool2d_index", arrays[0].shape, attrs)
    x = np.pad(arrays[0], _border(w), constant_values=-np.inf)
    return np.asarray(np.argmax(np.stack([x[pixels] for _, pixels in _taps(w)]), axis=0).astype(np.int32))


def _inner(x: Array, w: _Windows) -> Array:
    (top, _), (left, _) = w.padding
    height, width = c.static(w.size)
    index = join(slice(None), slice(None), slice(top, top + height), slice(left, left + width), w.layout)
    return np.ascontiguousarray(x[index])


def _max_grad_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    dy, index = arrays
    w = _windows("max_pool2d_grad", attrs["input_shape"], attrs)
    total = np.pad(np.zeros(c.static(w.x_shape), dy.dtype), _border(w))
    for k, pixels in _taps(w):
        total[pixels] += np.where(index == k, dy, dy.dtype.type(0))
    return _inner(total, w)


def _counts(w: _Windows, pad: bool, dtype: Any) -> Array:
    """How many elements each window averages, shaped to broadcast over y."""
    if pad:
        return np.asarray(w.kernel[0] * w.kernel[1], dtype)
    per: list[Array] = []
    for d in range(2):
        start = np.arange(as_int(w.out[d])) * w.stride[d] - w.padding[d][0]
        per.append(np.minimum(start + w.kernel[d], as_int(w.size[d])) - np.maximum(start, 0))
    count = np.maximum(per[0][:, None] * per[1][None, :], 1)
    return np.asarray(count.reshape(join(1, 1, count.shape[0], count.shape[1], w.layout)).astype(dtype))


def _avg_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    w = _windows("avg_pool2d", arrays[0].shape, attrs)
    x = np.pad(arrays[0], _border(w))
    y = np.zeros(c.static(w.y_shape), x.dtype)
    with np.errstate(all="ignore"):
        for _, pixels in _taps(w):
            y += x[pixels]
        return y / _counts(w, attrs["count_include_pad"], x.dtype)


def _avg_grad_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    w = _windows("avg_pool2d_grad", attrs["input_shape"], attrs)
    with np.errstate(all="ignore"):
        share = arrays[0] / _counts(w, attrs["count_include_pad"], arrays[0].dtype)
        total = np.pad(np.zeros(c.static(w.x_shape), share.dtype), _border(w))
        for _, pixels in _taps(w):
            total[pixels] += share
    return _inner(total, w)


# --- gradients ------------------------------------------------------------------------------------------------------


def _geometry_attrs(node: Node) -> dict[str, Any]:
    return {k: v for k, v in node.attrs.items() if k != "input_shape"}


def _max_grad(node: Node, dy: Node) -> Sequence[Node]:
    x, attrs = node.inputs[0], _geometry_attrs(node)
    return (make("max_pool2d_grad", dy, make("max_pool2d_index", x, **attrs), input_shape=x.shape, **attrs),)


def _max_grad_grad(node: Node, g: Node) -> Sequence[Node | None]:
    """The elements of g at the recorded positions: a choice among the taps of each window."""
    index, w = node.inputs[1], _of(node)
    (top, bottom), (left, right) = w.padding
    image = make(
        "pad", g, low=join(0, 0, top, left, w.layout), high=join(0, 0, bottom, right, w.layout), interior=(0, 0, 0, 0), value=0.0
    )
    total = c.full(0.0, node.inputs[0])
    for k in range(w.kernel[0] * w.kernel[1]):
        h, v = (tap * step for tap, step in zip(divmod(k, w.kernel[1]), w.dilation, strict=True))
        starts = join(0, 0, h, v, w.layout)
        last_row, last_column = (s + (out - 1) * step for s, out, step in zip((h, v), w.out, w.stride, strict=True))
        stops = join(w.n, w.channels, last_row + 1, last_column + 1, w.layout)
        tap = make("slice", image, starts=starts, stops=stops, steps=join(1, 1, *w.stride, w.layout))
        total = make("where", make("equal", index, c.full(k, index)), tap, total)
    return total, None


def _avg_grad(node: Node, dy: Node) -> Sequence[Node]:
    return (make("avg_pool2d_grad", dy, input_shape=node.inputs[0].shape, **_geometry_attrs(node)),)


def _avg_grad_grad(node: Node, g: Node) -> Sequence[Node]:
    return (make("avg_pool2d", g, **_geometry_attrs(node)),)


# --- types and records ------------------------------------------------------------------------------------------------


def _check_count(op: str, attrs: Attrs) -> None:
    if not isinstance(attrs.get("count_include_pad", True), bool):
        raise AttributeValueError(f"count_include_pad of {op} is a bool, not {attrs['count_include_pad']!r}")


def _infer_forward(op: str, dtype: DType | None) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        if op != "max_pool2d" or types[0].dtype not in (u8, i8):
            c.check_dtype(op, types, 0, c.is_float)
        _check_count(op, attrs)
        return TensorType(dtype or types[0].dtype, _windows(op, types[0].shape, attrs).y_shape)

    return infer


def _infer_backward(op: str) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(op, types, 0, c.is_float)
        _check_count(op, attrs)
        w = _windows(op, c.check_shape(op, attrs["input_shape"]), attrs)
        for k, t in enumerate(types):
            if t.shape != w.y_shape:
                raise ShapeError(
                    f"operand {k} of {op} has shape {c.show(t.shape)}, expected {c.show(w.y_shape)}, the pooling's result"
                )
        if len(types) == 2 and types[1].dtype is not i32:
            raise DTypeError(f"operand 1 of {op} (the positions) has dtype {types[1].dtype}, expected i32")
        return TensorType(types[0].dtype, w.x_shape)

    return infer


def _pads(top: int, bottom: int, left: int, right: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return ((top, bottom), (left, right))


# NCHW shape, kernel, stride, padding
_CASES: Final[tuple[tuple[tuple[int, int, int, int], tuple[int, int], tuple[int, int], Any], ...]] = (
    ((2, 3, 4, 6), (2, 2), (2, 2), _pads(0, 0, 0, 0)),
    ((1, 17, 7, 7), (3, 3), (2, 2), _pads(1, 1, 1, 1)),
    ((1, 8, 5, 9), (3, 2), (1, 2), _pads(1, 0, 0, 1)),
    ((1, 2, 8, 8), (2, 3), (3, 3), _pads(0, 0, 0, 0)),
    ((2, 1, 6, 5), (3, 3), (1, 1), _pads(2, 1, 1, 2)),
    ((1, 3, 1, 1), (1, 1), (1, 1), _pads(0, 0, 0, 0)),
    ((0, 3, 4, 4), (2, 2), (2, 2), _pads(0, 0, 0, 0)),
)
# NCHW shape, kernel, stride, padding, dilation
_DILATED: Final[tuple[tuple[Any, Any, Any, Any, Any], ...]] = (
    ((1, 3, 9, 10), (3, 2), (1, 1), _pads(1, 1, 2, 0), (2, 3)),
    ((2, 17, 8, 7), (2, 3), (2, 3), _pads(0, 2, 1, 1), (3, 2)),
)


def _cases(op: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    """(x shape, y shape, attributes) in both layouts; average pooling both ways of counting."""
    for shape, kernel, stride, padding in _CASES:
        for layout in LAYOUTS:
            attrs = {"kernel": kernel, "stride": stride, "padding": padding, "layout": layout}
            full = join(*shape, layout)
            if op.startswith("avg"):
                attrs["count_include_pad"] = layout == "NHWC"
            yield full, c.static(_windows(op, full, attrs).y_shape), attrs
    if op.startswith("max"):
        for shape, kernel, stride, padding, dilation in _DILATED:
            attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
            yield shape, c.static(_windows(op, shape, {**_COMMON, **attrs}).y_shape), attrs


def _forward_samples(op: str, smooth: bool) -> list[Sample]:
    draw = c.distinct if op.startswith("max") else c.uniform
    made = [Sample(draw(x), attrs, gradient=smooth) for x, _, attrs in _cases(op)]
    special = np.array(
        [[np.nan, 1, 2, 3], [1, 1, np.inf, np.inf], [-np.inf, -np.inf, 0, 0], [-np.inf, -np.inf, 0, -1]], np.float32
    )
    attrs = {"kernel": (2, 2), "stride": (2, 2)}
    return [
        *made,
        Sample(draw((1, 2, 4, 4), dtype=f64), attrs, gradient=smooth, label="f64"),
        Sample(c.fixed(special.reshape(1, 1, 4, 4)), attrs, gradient=False, label="special"),
    ]


def _backward_samples(op: str) -> list[Sample]:
    made = []
    for x, y, attrs in _cases(op):
        draw = c.uniform(y)
        if op.startswith("max"):
            taps = attrs["kernel"][0] * attrs["kernel"][1]
            draw = c.together(draw, c.integers(y, low=0, high=taps, dtype=i32))
        made.append(Sample(draw, {**attrs, "input_shape": x}, budget=4e-6, reason="the order of a sum is free"))
    return made


def _forward(name: str, doc: str, value: Any, lower: Any, grad: Any, dtype: DType | None = None, onnx: Any = None) -> Op:
    extra = {"count_include_pad": True} if name.startswith("avg") else {"dilation": (1, 1)}
    return register(
        Op(
            name=name,
            infer=_infer_forward(name, dtype),
            reference=value,
            lower=lower,
            grad=grad,
            doc=doc,
            arity=1,
            traits=frozenset({Trait.REDUCTION, Trait.ORDER} if name == "max_pool2d" else {Trait.REDUCTION}),
            attrs={**_COMMON, **extra},
            to_layout=lambda node, layout: moved(node, layout, (0,)),
            onnx=onnx,
            samples=lambda: _forward_samples(name, dtype is None),
        )
    )


def _backward(name: str, doc: str, value: Any, lower: Any, grad: Any, arity: int) -> Op:
    extra = {"count_include_pad": True} if name.startswith("avg") else {"dilation": (1, 1)}
    return register(
        Op(
            name=name,
            infer=_infer_backward(name),
            reference=value,
            lower=lower,
            grad=grad,
            doc=doc,
            arity=arity,
            traits=frozenset({Trait.REDUCTION}),
            attrs={"input_shape": REQUIRED, **_COMMON, **extra},
            to_layout=lambda node, layout: moved(node, layout, range(arity), ("input_shape",)),
            samples=lambda: _backward_samples(name),
        )
    )


max_pool2d = _forward(
    "max_pool2d", "The largest element of each window, also of 8-bit integers; padding counts as the least; NaN if any is NaN.",
    _max_value, _lower_max("max"), c.rule(_max_grad), onnx=("MaxPool", 12),
)  # fmt: skip
max_pool2d_index = _forward(
    "max_pool2d_index",
    "The position of the first largest element of each window, row-major in the window, as i32; NaN is largest.",
    _index_value,
    _lower_max("argmax"),
    c.no_flow,
    dtype=i32,
)
max_pool2d_grad = _backward(
    "max_pool2d_grad", "The gradient of max_pool2d for x of `input_shape`, from dy and the positions of the maxima.",
    _max_grad_value, _lower_max_grad, c.rule(_max_grad_grad), 2,
)  # fmt: skip
avg_pool2d = _forward(
    "avg_pool2d", "The mean of each window; `count_include_pad` says whether padding (zeros) counts as elements.",
    _avg_value, _lower_avg, c.rule(_avg_grad), onnx=("AveragePool", 11),
)  # fmt: skip
avg_pool2d_grad = _backward(
    "avg_pool2d_grad",
    "The gradient of avg_pool2d for x of `input_shape`, from dy.",
    _avg_grad_value,
    _lower_avg_grad,
    c.rule(_avg_grad_grad),
    1,
)
