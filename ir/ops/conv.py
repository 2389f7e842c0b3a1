"""2-D convolution and its two gradients, in NCHW or NHWC; weights are always [O, I / groups, KH, KW].

All three come down to `contract` (a padded operand, an affine index, no im2col). With x padded, per group:

    y [n, i, j, o]  = sum over h, w, c of  x[n, i*s + h*d, j*s + w*d, c] * k[o, c, h, w]
    dx[n, p, q, c]  = sum over h, w, o of  dy[n, (p - h*d) / s, (q - w*d) / s, o] * k[o, c, h, w]   where both divide
    dk[h, w, c, o]  = sum over n, i, j of  x[n, i*s + h*d, j*s + w*d, c] * dy[n, i, j, o]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from ..contraction import Affine, Axis, Contraction, affine
from ..dims import Shape, as_int
from ..dtypes import as_dtype, f64, i8, u8
from ..graph import Attrs, Node
from ..lowering import Contract, Decompose, Lowering
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON, check_factors, exactly, wrapped
from .conv_geometry import (
    LAYOUTS,
    TO_NCHW,
    TO_NHWC,
    Geometry,
    channel_of,
    geometry,
    group_axis,
    image,
    join,
    moved,
    of_conv,
    of_input_grad,
    of_weight_grad,
    taps_of,
    window,
)
from .conv_phases import input_grad

_COMMON: Final[dict[str, Any]] = {
    "stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": "NCHW",
}  # fmt: skip


# --- contractions ---------------------------------------------------------------------------------------------------


def _result(g: Geometry, channel: str) -> tuple[Affine, ...]:
    """The index of an image with the group as a dimension of its own before the channel, where it has more than one."""
    group = () if g.groups == 1 else ("g",)
    channels = (*group, channel) if channel else group
    return tuple(map(affine, ("n", *channels, "y", "x") if g.layout == "NCHW" else ("n", "y", "x", *channels)))


def _forward(g: Geometry) -> Contraction:
    """x (padded), k -> y with groups apart; a group of one output is the channel itself."""
    pixels = (Axis("n", g.n, "m"), Axis("y", g.out[0], "m"), Axis("x", g.out[1], "m"))
    alone = g.groups > 1 and g.o == 1
    return Contraction(
        (*group_axis(g), *pixels, *(() if alone else (Axis("o", g.o, "n"),)), *taps_of(g, Axis("c", g.c, "k"))),
        image(g, channel_of("c", g.c, g), *window(g)),
        (affine("g") if alone else channel_of("o", g.o, g), affine("c"), affine("h"), affine("w")),
        _result(g, "" if alone else "o"),
    )


def _backward_weight(g: Geometry) -> Contraction:
    """x (padded), dy -> dk as [groups,] c, h, w, o: whole vectors of o, and one transposition of a matrix from there to dk."""
    taps = (Axis("h", g.kernel[0], "m"), Axis("w", g.kernel[1], "m"), Axis("c", g.c, "m"))
    pixels = (Axis("n", g.n, "k"), Axis("y", g.out[0], "k"), Axis("x", g.out[1], "k"))
    group = () if g.groups == 1 else ("g",)
    return Contraction(
        (*group_axis(g), *taps, Axis("o", g.o, "n"), *pixels),
        image(g, channel_of("c", g.c, g), *window(g)),
        image(g, channel_of("o", g.o, g), affine("y"), affine("x")),
        tuple(map(affine, (*group, "c", "h", "w", "o"))),
    )


def _padded(x: Node, g: Geometry) -> Node:
    if not g.padded:
        return x
    (top, bottom), (left, right) = g.padding
    low, high = join(0, 0, top, left, g.layout), join(0, 0, bottom, right, g.layout)
    return make("pad", x, low=low, high=high, interior=(0, 0, 0, 0), value=0.0)


def _lower_conv(node: Node) -> Lowering:
    g = of_conv([x.tensor for x in node.inputs], node.attrs)
    if not g.padded and g.groups == 1:
        return Contract(_forward(g))

    def build(node: Node) -> Node:
        x, k = node.inputs
        if g.padded:
            return make(node.op, _padded(x, g), k, **{**node.attrs, "padding": ((0, 0), (0, 0))})
        return c.reshaped(make("contract", x, k, spec=_forward(g)), node.shape)

    return Decompose(build)


def _lower_input_grad(node: Node) -> Lowering:
    return Decompose(input_grad)


def _lower_weight_grad(node: Node) -> Lowering:
    def build(node: Node) -> Node:
        g = of_weight_grad([x.tensor for x in node.inputs], node.attrs)
        x, dy = node.inputs
        dk = make("contract", _padded(x, g), dy, spec=_backward_weight(g))
        perm = (3, 0, 1, 2) if g.groups == 1 else (0, 4, 1, 2, 3)
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


def _pad_array(x: Array, g: Geometry) -> Array:
    return np.pad(x, ((0, 0), *g.padding, (0, 0), (0, 0)))


def _kernel_matrices(k: Array, groups: int) -> Array:
    """Weights as [height, width, group, channel in, channel out]."""
    return k.reshape(groups, k.shape[0] // groups, *k.shape[1:]).transpose(3, 4, 0, 2, 1)


def _tap_slices(g: Geometry) -> Iterator[tuple[int, int, tuple[slice, slice, slice]]]:
    """For each tap of the kernel, the pixels of the padded image that it meets."""
    (oh, ow), (kh, kw), (sy, sx), (dy, dx) = c.static(g.out), c.static(g.kernel), g.stride, g.dilation
    for h in range(kh):
        for w in range(kw):
            rows = slice(h * dy, h * dy + (oh - 1) * sy + 1, sy)
            yield h, w, (slice(None), rows, slice(w * dx, w * dx + (ow - 1) * sx + 1, sx))


def _types(arrays: Sequence[Array]) -> list[TensorType]:
    return [TensorType(as_dtype(a.dtype), a.shape) for a in arrays]


def _conv_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    g = of_conv(_types(arrays), attrs)
    image, weights = exactly(arrays[0], arrays[1], as_int(g.c) * as_int(g.kernel[0]) * as_int(g.kernel[1]))
    x, k = _pad_array(_grouped(image, g.layout, g.groups), g), _kernel_matrices(weights, g.groups)
    n, o = as_int(g.n), as_int(g.o)
    total = np.zeros((g.groups, n * as_int(g.out[0]) * as_int(g.out[1]), o), x.dtype)
    with np.errstate(all="ignore"):
        for h, w, pixels in _tap_slices(g):
            total += _rows(x[pixels]) @ k[h, w]
    total = wrapped(total, arrays[0], arrays[1])
    return _ungrouped(np.moveaxis(total.reshape(g.groups, n, *c.static(g.out), o), 0, 3), g.layout)


def _input_grad_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    g = of_input_grad(_types(arrays), attrs)
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
    g = of_weight_grad(_types(arrays), attrs)
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
            g = geometry("conv2d", shape, k, full, "x", "w")
            yield shape, k, c.static(g.y_shape), full


def _sample(draw: c.Draw, attrs: dict[str, Any], **more: Any) -> Sample:
    return Sample(draw, attrs, budget=5e-6, reason=REASON, **more)


def _conv_samples() -> list[Sample]:
    made = [_sample(c.uniform(x, k), a) for x, k, _, a in _cases()]
    image, kernel = ((1, 4, 6, 5), 0, u8), ((9, 4, 3, 3), -128, i8)
    octets = c.together(*(c.integers(s, low=low, high=low + 256, dtype=t) for s, low, t in (image, kernel)))
    return [
        *made,
        _sample(c.uniform((1, 2, 5, 5), (3, 2, 3, 3), dtype=f64), _attrs(padding=_pads(1, 1, 1, 1)), label="f64"),
        Sample(octets, _attrs(padding=_pads(1, 0, 1, 1), groups=1, stride=(2, 1)), gradient=False, label="bytes"),
    ]


def _input_grad_samples() -> list[Sample]:
    return [_sample(c.uniform(y, k), {**a, "input_shape": x}) for x, k, y, a in _cases()]


def _weight_grad_samples() -> list[Sample]:
    return [_sample(c.uniform(x, y), {**a, "kernel_shape": k}) for x, k, y, a in _cases()]


def _infer(op: str, geometry: Callable[[Sequence[TensorType], Attrs], Geometry], result: Callable[[Geometry], Shape]) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        sums = check_factors(op, types, c.is_float)
        return TensorType(sums, result(geometry(types, attrs)))

    return infer


_TRAITS: Final = frozenset({Trait.CONTRACTION})

conv2d = register(
    Op(
        name="conv2d",
        infer=_infer("conv2d", of_conv, lambda g: g.y_shape),
        reference=_conv_value,
        lower=_lower_conv,
        grad=c.rule(_conv_grad),
        doc="2-D cross-correlation of x with weights [O, I / groups, KH, KW]. Of i8 and u8, also one of each, the sums are i32.",
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
        infer=_infer("conv2d_input_grad", of_input_grad, lambda g: g.x_shape),
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
        infer=_infer("conv2d_weight_grad", of_weight_grad, lambda g: g.k_shape),
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
