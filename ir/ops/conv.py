"""2-D convolution and its two gradients, in NCHW or NHWC; weights are always [O, I / groups, KH, KW].

All three come down to `contract` (a padded operand, an affine index, no im2col). With x padded, per group:

    y [n, i, j, o]  = sum over h, w, c of  x[n, i*s + h*d, j*s + w*d, c] * k[o, c, h, w]
    dx[n, p, q, c]  = sum over h, w, o of  z[n, p + h*d, q + w*d, o] * k[o, c, KH-1-h, KW-1-w]     z: dy spread by s, padded
    dk[h, w, c, o]  = sum over n, i, j of  x[n, i*s + h*d, j*s + w*d, c] * dy[n, i, j, o]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ..contraction import Affine, Axis, Contraction, affine
from ..dims import Dim, Shape, as_int
from ..dtypes import as_dtype, f64
from ..errors import AttributeValueError, ShapeError
from ..graph import Attrs, Node
from ..lowering import Contract, Decompose, Lowering
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON

LAYOUTS: Final = ("NCHW", "NHWC")
TO_NHWC: Final = (0, 2, 3, 1)
TO_NCHW: Final = (0, 3, 1, 2)
_COMMON: Final[dict[str, Any]] = {
    "stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": "NCHW",
}  # fmt: skip


# --- layouts --------------------------------------------------------------------------------------------------------


def check_layout(op: str, layout: object) -> str:
    if layout not in LAYOUTS:
        raise AttributeValueError(f"layout of {op} is one of {', '.join(LAYOUTS)}, not {layout!r}")
    return str(layout)


def check_padding(op: str, padding: object) -> tuple[tuple[int, int], tuple[int, int]]:
    if not isinstance(padding, tuple) or len(padding) != 2:
        raise AttributeValueError(f"padding of {op} is ((top, bottom), (left, right)), not {padding!r}")
    for side in padding:
        c.check_ints(op, "a side of padding", side, 2, 0)
    return padding


def split(shape: Sequence[Any], layout: str) -> tuple[Any, Any, Any, Any]:
    """(batch, channels, height, width) of a shape, or any sequence, in a layout."""
    n, x, y, z = shape
    return (n, x, y, z) if layout == "NCHW" else (n, z, x, y)


def join(n: Any, channels: Any, height: Any, width: Any, layout: str) -> tuple[Any, Any, Any, Any]:
    """The inverse of `split`."""
    return (n, channels, height, width) if layout == "NCHW" else (n, height, width, channels)


def window_count(op: str, size: Dim, kernel: Dim, stride: int, padding: tuple[int, int], dilation: int, dimension: str) -> Dim:
    """How many windows fit; ShapeError if none does."""
    room = size + (padding[0] + padding[1] - 1) - (kernel - 1) * dilation
    if isinstance(room, int) and room < 0:
        raise ShapeError(
            f"operand 0 of {op} has {dimension} {size}, padded to {size + sum(padding)}, smaller than the window of "
            f"{(kernel - 1) * dilation + 1}; expected at least that much, or more padding"
        )
    return room // stride + 1


def moved(node: Node, layout: str, operands: Sequence[int], shape_attrs: Sequence[str] = (), result: bool = True) -> Node:
    """The node computed in another layout: `operands`, the shapes in attributes and the result change places."""
    if node.attrs["layout"] == layout:
        return node
    there, back = (TO_NHWC, TO_NCHW) if layout == "NHWC" else (TO_NCHW, TO_NHWC)
    inputs = [c.transposed(x, there) if k in operands else x for k, x in enumerate(node.inputs)]
    attrs = {name: tuple(node.attrs[name][p] for p in there) for name in shape_attrs}
    new = make(node.op, *inputs, **{**node.attrs, **attrs, "layout": layout})
    return c.transposed(new, back) if result else new


# --- geometry -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Geometry:
    """The sizes of one convolution, named as in the head of this file; `c` and `o` are per group."""

    n: Dim
    groups: int
    c: Dim
    o: Dim
    size: tuple[Dim, Dim]
    kernel: tuple[Dim, Dim]
    out: tuple[Dim, Dim]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    layout: str

    @property
    def x_shape(self) -> Shape:
        return join(self.n, self.c * self.groups, *self.size, self.layout)

    @property
    def k_shape(self) -> Shape:
        return (self.o * self.groups, self.c, *self.kernel)

    @property
    def y_shape(self) -> Shape:
        return join(self.n, self.o * self.groups, *self.out, self.layout)

    @property
    def padded(self) -> bool:
        return self.padding != ((0, 0), (0, 0))


def _geometry(op: str, x: Shape, k: Shape, attrs: Attrs, x_name: str, k_name: str) -> _Geometry:
    layout = check_layout(op, attrs["layout"])
    stride = c.check_ints(op, "stride", attrs["stride"], 2, 1)
    dilation = c.check_ints(op, "dilation", attrs["dilation"], 2, 1)
    padding = check_padding(op, attrs["padding"])
    groups = attrs["groups"]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise AttributeValueError(f"groups of {op} is a positive int, not {groups!r}")
    if len(x) != 4 or len(k) != 4:
        raise ShapeError(f"{op}: {x_name} {c.show(x)} and {k_name} {c.show(k)} must have 4 dimensions each")
    n, channels, height, width = split(x, layout)
    outputs, per_group, kh, kw = k
    if channels != per_group * groups:
        raise ShapeError(
            f"{op}: {k_name} has shape {c.show(k)}, which takes {per_group * groups} input channels "
            f"({per_group} in each of {groups} groups), but {x_name} {c.show(x)} in {layout} has {channels}"
        )
    if isinstance(outputs, int) and outputs % groups:
        raise ShapeError(
            f"{op}: {k_name} has shape {c.show(k)}, whose {outputs} output channels do not split into {groups} groups"
        )
    if 0 in (kh, kw):
        raise ShapeError(f"{op}: {k_name} has shape {c.show(k)}, with an empty kernel")
    out = tuple(
        window_count(op, size, kernel, stride[d], padding[d], dilation[d], ("height", "width")[d])
        for d, (size, kernel) in enumerate(((height, kh), (width, kw)))
    )
    return _Geometry(
        n, groups, per_group, outputs // groups, (height, width), (kh, kw), (out[0], out[1]),
        (stride[0], stride[1]), padding, (dilation[0], dilation[1]), layout,
    )  # fmt: skip


def _of_conv(node_types: Sequence[TensorType], attrs: Attrs) -> _Geometry:
    return _geometry("conv2d", node_types[0].shape, node_types[1].shape, attrs, "operand 0", "operand 1")


def _of_input_grad(types: Sequence[TensorType], attrs: Attrs) -> _Geometry:
    shape = c.check_shape("conv2d_input_grad", attrs["input_shape"])
    g = _geometry("conv2d_input_grad", shape, types[1].shape, attrs, "input_shape", "operand 1")
    _check_cotangent("conv2d_input_grad", types, 0, g)
    return g


def _of_weight_grad(types: Sequence[TensorType], attrs: Attrs) -> _Geometry:
    shape = c.check_shape("conv2d_weight_grad", attrs["kernel_shape"])
    g = _geometry("conv2d_weight_grad", types[0].shape, shape, attrs, "operand 0", "kernel_shape")
    _check_cotangent("conv2d_weight_grad", types, 1, g)
    return g


def _check_cotangent(op: str, types: Sequence[TensorType], k: int, g: _Geometry) -> None:
    if types[k].shape != g.y_shape:
        raise ShapeError(
            f"operand {k} of {op} has shape {c.show(types[k].shape)}, expected {c.show(g.y_shape)}, the convolution's result"
        )


# --- contractions ---------------------------------------------------------------------------------------------------


def _channel(name: str, per_group: Dim, g: _Geometry) -> Affine:
    return affine(name) if g.groups == 1 else affine(name, ("g", as_int(per_group)))


def _group_axis(g: _Geometry) -> tuple[Axis, ...]:
    return () if g.groups == 1 else (Axis("g", g.groups, "batch"),)


def _image(g: _Geometry, channel: Affine, rows: Affine, columns: Affine) -> tuple[Affine, ...]:
    return join(affine("n"), channel, rows, columns, g.layout)


def _window(g: _Geometry) -> tuple[Affine, Affine]:
    (sy, sx), (dy, dx) = g.stride, g.dilation
    return affine(("y", sy), ("h", dy)), affine(("x", sx), ("w", dx))


def _taps(g: _Geometry, channel: Axis) -> tuple[Axis, ...]:
    """The axes of a kernel; channels innermost where they are so in memory."""
    taps = (Axis("h", g.kernel[0], "k"), Axis("w", g.kernel[1], "k"))
    return (*taps, channel) if g.layout == "NHWC" else (channel, *taps)


def _result(g: _Geometry, channel: str) -> tuple[Affine, ...]:
    """The index of an image with the group as a dimension of its own before the channel."""
    group = () if g.groups == 1 else ("g",)
    names = ("n", *group, channel, "y", "x") if g.layout == "NCHW" else ("n", "y", "x", *group, channel)
    return tuple(map(affine, names))


def _forward(g: _Geometry) -> Contraction:
    """x (padded), k -> y with groups apart."""
    pixels = (Axis("n", g.n, "m"), Axis("y", g.out[0], "m"), Axis("x", g.out[1], "m"))
    return Contraction(
        (*_group_axis(g), *pixels, Axis("o", g.o, "n"), *_taps(g, Axis("c", g.c, "k"))),
        _image(g, _channel("c", g.c, g), *_window(g)),
        (_channel("o", g.o, g), affine("c"), affine("h"), affine("w")),
        _result(g, "o"),
    )


def _backward_input(g: _Geometry) -> Contraction:
    """z (dy spread and padded), k -> dx with groups apart."""
    pixels = (Axis("n", g.n, "m"), Axis("y", g.size[0], "m"), Axis("x", g.size[1], "m"))
    kh, kw = as_int(g.kernel[0]), as_int(g.kernel[1])
    rows, columns = affine("y", ("h", g.dilation[0])), affine("x", ("w", g.dilation[1]))
    return Contraction(
        (*_group_axis(g), *pixels, Axis("c", g.c, "n"), *_taps(g, Axis("o", g.o, "k"))),
        _image(g, _channel("o", g.o, g), rows, columns),
        (_channel("o", g.o, g), affine("c"), affine(("h", -1), constant=kh - 1), affine(("w", -1), constant=kw - 1)),
        _result(g, "c"),
    )


def _backward_weight(g: _Geometry) -> Contraction:
    """x (padded), dy -> dk as [groups,] h, w, c, o."""
    taps = (Axis("h", g.kernel[0], "m"), Axis("w", g.kernel[1], "m"), Axis("c", g.c, "m"))
    pixels = (Axis("n", g.n, "k"), Axis("y", g.out[0], "k"), Axis("x", g.out[1], "k"))
    group = () if g.groups == 1 else ("g",)
    return Contraction(
        (*_group_axis(g), *taps, Axis("o", g.o, "n"), *pixels),
        _image(g, _channel("c", g.c, g), *_window(g)),
        _image(g, _channel("o", g.o, g), affine("y"), affine("x")),
        tuple(map(affine, (*group, "h", "w", "c", "o"))),
    )


def _padded(x: Node, g: _Geometry) -> Node:
    if not g.padded:
        return x
    (top, bottom), (left, right) = g.padding
    low, high = join(0, 0, top, left, g.layout), join(0, 0, bottom, right, g.layout)
    return make("pad", x, low=low, high=high, interior=(0, 0, 0, 0), value=0.0)


def _spread(dy: Node, g: _Geometry) -> Node:
    """dy with stride - 1 zeros between its pixels, and just the border that the kernel reaches from every pixel of x."""
    low: list[int] = []
    high: list[Dim] = []
    cut: list[tuple[Dim, Dim]] = []
    for size, kernel, out, stride, pad, dilation in zip(g.size, g.kernel, g.out, g.stride, g.padding, g.dilation, strict=True):
        reach = (as_int(kernel) - 1) * dilation
        before = reach - pad[0]
        spread = 0 if out == 0 else (out - 1) * stride + 1
        after = size + reach - before - spread  # may be negative, or symbolic
        start = max(0, -before)
        low.append(max(0, before))
        high.append(max(0, after) if isinstance(after, int) else after)
        cut.append((start, start + size + reach))
    interior = join(0, 0, g.stride[0] - 1, g.stride[1] - 1, g.layout)
    lows, highs = join(0, 0, low[0], low[1], g.layout), join(0, 0, high[0], high[1], g.layout)
    z = dy
    if any(interior) or any(lows) or any(h != 0 for h in highs):
        z = make("pad", z, low=lows, high=highs, interior=interior, value=0.0)
    n, channels, _, _ = split(z.shape, g.layout)
    starts, stops = join(0, 0, cut[0][0], cut[1][0], g.layout), join(n, channels, cut[0][1], cut[1][1], g.layout)
    return z if stops == z.shape else make("slice", z, starts=starts, stops=stops, steps=(1, 1, 1, 1))


def _lower_conv(node: Node) -> Lowering:
    g = _of_conv([x.tensor for x in node.inputs], node.attrs)
    if not g.padded and g.groups == 1:
        return Contract(_forward(g))

    def build(node: Node) -> Node:
        x, k = node.inputs
        if g.padded:
            return make(node.op, _padded(x, g), k, **{**node.attrs, "padding": ((0, 0), (0, 0))})
        return c.reshaped(make("contract", x, k, spec=_forward(g)), node.shape)

    return Decompose(build)


def _lower_input_grad(node: Node) -> Lowering:
    def build(node: Node) -> Node:
        g = _of_input_grad([x.tensor for x in node.inputs], node.attrs)
        dy, k = node.inputs
        if g.kernel == (1, 1) and g.stride != (1, 1) and not g.padded:
            return _pointwise_input_grad(node, g)
        return c.reshaped(make("contract", _spread(dy, g), k, spec=_backward_input(g)), node.shape)

    return Decompose(build)


def _pointwise_input_grad(node: Node, g: _Geometry) -> Node:
    """A strided 1x1 kernel meets every s-th pixel only: the contraction first, the zeros between its results after."""
    dense = replace(g, size=g.out, stride=(1, 1))
    dy, k = node.inputs
    dx = c.reshaped(make("contract", dy, k, spec=_backward_input(dense)), dense.x_shape)
    rest = [size - ((out - 1) * s + 1) for size, out, s in zip(g.size, g.out, g.stride, strict=True)]
    interior = join(0, 0, g.stride[0] - 1, g.stride[1] - 1, g.layout)
    return make("pad", dx, low=(0, 0, 0, 0), high=join(0, 0, rest[0], rest[1], g.layout), interior=interior, value=0.0)


def _lower_weight_grad(node: Node) -> Lowering:
    def build(node: Node) -> Node:
        g = _of_weight_grad([x.tensor for x in node.inputs], node.attrs)
        x, dy = node.inputs
        dk = make("contract", _padded(x, g), dy, spec=_backward_weight(g))
        perm = (3, 2, 0, 1) if g.groups == 1 else (0, 4, 3, 1, 2)
        return c.reshaped(c.transposed(dk, perm), node.shape)

    return Decompose(build)


# --- values: one matrix product per tap of the kernel, over all pixels and groups -------------------------------------


def _grouped(image: Array, layout: str, groups: int) -> Array:
    """An image as [n, height, width, group, channel]."""
    x = image.transpose(TO_NHWC) if layout == "NCHW" else image
    return x.reshape(*x.shape[:3], groups, x.shape[3] // groups)


def _ungrouped(x: Array, layout: str) -> Array:
    image = x.reshape(*x.shape[:3], x.shape[3] * x.shape[4])
    return np.ascontiguousarray(image.transpose(TO_NCHW) if layout == "NCHW" else image).reshape(
        join(x.shape[0], x.shape[3] * x.shape[4], x.shape[1], x.shape[2], layout)
    )


def _rows(x: Array) -> Array:
    """[n, height, width, group, channel] as matrices [group, pixels, channel]."""
    return np.ascontiguousarray(np.moveaxis(x, 3, 0)).reshape(x.shape[3], x.shape[0] * x.shape[1] * x.shape[2], x.shape[4])


def _pad_array(x: Array, g: _Geometry) -> Array:
    return np.pad(x, ((0, 0), *g.padding, (0, 0), (0, 0)))


def _kernel_matrices(k: Array, groups: int) -> Array:
    """Weights as [height, width, group, channel in, channel out]."""
    return k.reshape(groups, k.shape[0] // groups, *k.shape[1:]).transpose(3, 4, 0, 2, 1)


def _tap_slices(g: _Geometry) -> Iterator[tuple[int, int, tuple[slice, slice, slice]]]:
    """For each tap of the kernel, the pixels of the padded image that it meets."""
    (oh, ow), (kh, kw), (sy, sx), (dy, dx) = c.static(g.out), c.static(g.kernel), g.stride, g.dilation
    for h in range(kh):
        for w in range(kw):
            rows = slice(h * dy, h * dy + (oh - 1) * sy + 1, sy)
            yield h, w, (slice(None), rows, slice(w * dx, w * dx + (ow - 1) * sx + 1, sx))


def _types(arrays: Sequence[Array]) -> list[TensorType]:
    return [TensorType(as_dtype(a.dtype), a.shape) for a in arrays]


def _conv_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    g = _of_conv(_types(arrays), attrs)
    x, k = _pad_array(_grouped(arrays[0], g.layout, g.groups), g), _kernel_matrices(arrays[1], g.groups)
    n, o = as_int(g.n), as_int(g.o)
    total = np.zeros((g.groups, n * as_int(g.out[0]) * as_int(g.out[1]), o), x.dtype)
    with np.errstate(all="ignore"):
        for h, w, pixels in _tap_slices(g):
            total += _rows(x[pixels]) @ k[h, w]
    return _ungrouped(np.moveaxis(total.reshape(g.groups, n, *c.static(g.out), o), 0, 3), g.layout)


def _input_grad_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    g = _of_input_grad(_types(arrays), attrs)
    dy, k = _rows(_grouped(arrays[0], g.layout, g.groups)), _kernel_matrices(arrays[1], g.groups)
    (height, width), ((top, bottom), (left, right)) = c.static(g.size), g.padding
    n, channels = as_int(g.n), as_int(g.c)
    total = np.zeros((n, top + height + bottom, left + width + right, g.groups, channels), dy.dtype)
    with np.errstate(all="ignore"):
        for h, w, pixels in _tap_slices(g):
            part = dy @ k[h, w].swapaxes(-1, -2)
            total[pixels] += np.moveaxis(part.reshape(g.groups, n, *c.static(g.out), channels), 0, 3)
    return _ungrouped(total[:, top : top + height, left : left + width], g.layout)


def _weight_grad_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    g = _of_weight_grad(_types(arrays), attrs)
    x, dy = _pad_array(_grouped(arrays[0], g.layout, g.groups), g), _rows(_grouped(arrays[1], g.layout, g.groups))
    kh, kw = c.static(g.kernel)
    total = np.zeros((kh, kw, g.groups, as_int(g.o), as_int(g.c)), x.dtype)
    with np.errstate(all="ignore"):
        for h, w, pixels in _tap_slices(g):
            total[h, w] = dy.swapaxes(-1, -2) @ _rows(x[pixels])
    return np.ascontiguousarray(total.transpose(2, 3, 4, 0, 1)).reshape(c.static(g.k_shape))


# --- gradients: all three are bilinear, and each other's gradients ----------------------------------------------------


def _geometry_attrs(node: Node) -> dict[str, Any]:
    return {name: node.attrs[name] for name in _COMMON}


def _conv_grad(node: Node, dy: Node) -> Sequence[Node]:
    (x, k), attrs = node.inputs, _geometry_attrs(node)
    return (
        make("conv2d_input_grad", dy, k, input_shape=x.shape, **attrs),
        make("conv2d_weight_grad", x, dy, kernel_shape=k.shape, **attrs),
    )


def _input_grad_grad(node: Node, g: Node) -> Sequence[Node]:
    (dy, k), attrs = node.inputs, _geometry_attrs(node)
    return make("conv2d", g, k, **attrs), make("conv2d_weight_grad", g, dy, kernel_shape=k.shape, **attrs)


def _weight_grad_grad(node: Node, g: Node) -> Sequence[Node]:
    (x, dy), attrs = node.inputs, _geometry_attrs(node)
    return make("conv2d_input_grad", dy, g, input_shape=x.shape, **attrs), make("conv2d", x, g, **attrs)


# --- records --------------------------------------------------------------------------------------------------------


def _attrs(**given: Any) -> dict[str, Any]:
    return {**_COMMON, **given}


def _pads(top: int, bottom: int, left: int, right: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return ((top, bottom), (left, right))


# NCHW shape of x, weights, attributes.
_CASES: Final[tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...]] = (
    ((1, 1, 5, 5), (1, 1, 3, 3), _attrs()),
    ((2, 3, 6, 7), (9, 3, 3, 3), _attrs(padding=_pads(1, 1, 1, 1))),
    ((1, 8, 7, 9), (17, 8, 3, 2), _attrs(stride=(2, 1), padding=_pads(1, 0, 0, 1))),
    ((2, 4, 8, 8), (16, 4, 1, 1), _attrs()),
    ((2, 5, 7, 7), (8, 5, 1, 1), _attrs(stride=(2, 2))),
    ((1, 3, 9, 9), (7, 3, 3, 3), _attrs(stride=(2, 2), padding=_pads(1, 1, 1, 1))),
    ((1, 2, 9, 8), (3, 2, 3, 3), _attrs(dilation=(2, 1), padding=_pads(2, 2, 1, 1))),
    ((1, 4, 6, 6), (6, 2, 3, 3), _attrs(groups=2, padding=_pads(1, 1, 1, 1))),
    ((2, 8, 6, 5), (8, 1, 3, 3), _attrs(groups=8, padding=_pads(1, 1, 1, 1), stride=(2, 1))),
    ((1, 2, 4, 4), (3, 2, 2, 2), _attrs(stride=(3, 3), padding=_pads(2, 2, 3, 0))),
    ((0, 2, 4, 4), (3, 2, 3, 3), _attrs()),
)


def _cases() -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    """(x shape, weights shape, y shape, attributes) in both layouts."""
    for x, k, attrs in _CASES:
        for layout in LAYOUTS:
            shape = join(x[0], x[1], x[2], x[3], layout)
            full = {**attrs, "layout": layout}
            g = _geometry("conv2d", shape, k, full, "x", "w")
            yield shape, k, c.static(g.y_shape), full


def _sample(draw: c.Draw, attrs: dict[str, Any], **more: Any) -> Sample:
    return Sample(draw, attrs, budget=5e-6, reason=REASON, **more)


def _conv_samples() -> list[Sample]:
    made = [_sample(c.uniform(x, k), a) for x, k, _, a in _cases()]
    return [*made, _sample(c.uniform((1, 2, 5, 5), (3, 2, 3, 3), dtype=f64), _attrs(padding=_pads(1, 1, 1, 1)), label="f64")]


def _input_grad_samples() -> list[Sample]:
    return [_sample(c.uniform(y, k), {**a, "input_shape": x}) for x, k, y, a in _cases()]


def _weight_grad_samples() -> list[Sample]:
    return [_sample(c.uniform(x, y), {**a, "kernel_shape": k}) for x, k, y, a in _cases()]


def _infer(
    op: str, geometry: Callable[[Sequence[TensorType], Attrs], _Geometry], result: Callable[[_Geometry], Shape]
) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(op, types, 0, c.is_float)
        c.check_same(op, [TensorType(t.dtype, ()) for t in types])
        return TensorType(types[0].dtype, result(geometry(types, attrs)))

    return infer


_TRAITS: Final = frozenset({Trait.CONTRACTION})

conv2d = register(
    Op(
        name="conv2d",
        infer=_infer("conv2d", _of_conv, lambda g: g.y_shape),
        reference=_conv_value,
        lower=_lower_conv,
        grad=c.rule(_conv_grad),
        doc="2-D cross-correlation of x with weights [O, I / groups, KH, KW].",
        arity=2,
        traits=_TRAITS | {Trait.QUANTISABLE},
        attrs=_COMMON,
        to_layout=lambda node, layout: moved(node, layout, (0,)),
        onnx=("Conv", 11),
        samples=_conv_samples,
    )
)
conv2d_input_grad = register(
    Op(
        name="conv2d_input_grad",
        infer=_infer("conv2d_input_grad", _of_input_grad, lambda g: g.x_shape),
        reference=_input_grad_value,
        lower=_lower_input_grad,
        grad=c.rule(_input_grad_grad),
        doc="The gradient of conv2d for x of `input_shape`, from dy and the weights; also transposed convolution.",
        arity=2,
        traits=_TRAITS,
        attrs={"input_shape": REQUIRED, **_COMMON},
        to_layout=lambda node, layout: moved(node, layout, (0,), ("input_shape",)),
        samples=_input_grad_samples,
    )
)
conv2d_weight_grad = register(
    Op(
        name="conv2d_weight_grad",
        infer=_infer("conv2d_weight_grad", _of_weight_grad, lambda g: g.k_shape),
        reference=_weight_grad_value,
        lower=_lower_weight_grad,
        grad=c.rule(_weight_grad_grad),
        doc="The gradient of conv2d for weights of `kernel_shape`, from x and dy.",
        arity=2,
        traits=_TRAITS,
        attrs={"kernel_shape": REQUIRED, **_COMMON},
        to_layout=lambda node, layout: moved(node, layout, (0, 1), result=False),
        samples=_weight_grad_samples,
    )
)
