"""Layouts, sizes and index maps of 2-D convolutions, whose weights are always [O, I / groups, KH, KW]; pooling shares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..contraction import Affine, Axis, affine
from ..dims import Dim, Shape, as_int
from ..errors import AttributeValueError, ShapeError
from ..graph import Attrs, Node
from ..op import make
from ..types import TensorType
from . import common as c

LAYOUTS: Final = ("NCHW", "NHWC")
TO_NHWC: Final = (0, 2, 3, 1)
TO_NCHW: Final = (0, 3, 1, 2)


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
class Geometry:
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


def geometry(op: str, x: Shape, k: Shape, attrs: Attrs, x_name: str, k_name: str) -> Geometry:
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
    return Geometry(
        n, groups, per_group, outputs // groups, (height, width), (kh, kw), (out[0], out[1]),
        (stride[0], stride[1]), padding, (dilation[0], dilation[1]), layout,
    )  # fmt: skip


def of_conv(node_types: Sequence[TensorType], attrs: Attrs) -> Geometry:
    return geometry("conv2d", node_types[0].shape, node_types[1].shape, attrs, "operand 0", "operand 1")


def of_input_grad(types: Sequence[TensorType], attrs: Attrs) -> Geometry:
    shape = c.check_shape("conv2d_input_grad", attrs["input_shape"])
    g = geometry("conv2d_input_grad", shape, types[1].shape, attrs, "input_shape", "operand 1")
    _check_cotangent("conv2d_input_grad", types, 0, g)
    return g


def of_weight_grad(types: Sequence[TensorType], attrs: Attrs) -> Geometry:
    shape = c.check_shape("conv2d_weight_grad", attrs["kernel_shape"])
    g = geometry("conv2d_weight_grad", types[0].shape, shape, attrs, "operand 0", "kernel_shape")
    _check_cotangent("conv2d_weight_grad", types, 1, g)
    return g


def _check_cotangent(op: str, types: Sequence[TensorType], k: int, g: Geometry) -> None:
    if types[k].shape != g.y_shape:
        raise ShapeError(
            f"operand {k} of {op} has shape {c.show(types[k].shape)}, expected {c.show(g.y_shape)}, the convolution's result"
        )


# --- index maps -----------------------------------------------------------------------------------------------------


def channel_of(name: str, per_group: Dim, g: Geometry) -> Affine:
    return affine(name) if g.groups == 1 else affine(name, ("g", as_int(per_group)))


def group_axis(g: Geometry) -> tuple[Axis, ...]:
    return () if g.groups == 1 else (Axis("g", g.groups, "batch"),)


def image(g: Geometry, channel: Affine, rows: Affine, columns: Affine) -> tuple[Affine, ...]:
    return join(affine("n"), channel, rows, columns, g.layout)


def window(g: Geometry) -> tuple[Affine, Affine]:
    (sy, sx), (dy, dx) = g.stride, g.dilation
    return affine(("y", sy), ("h", dy)), affine(("x", sx), ("w", dx))


def taps_of(g: Geometry, channel: Axis) -> tuple[Axis, ...]:
    """The axes of a kernel; channels innermost where they are so in memory."""
    taps = (Axis("h", g.kernel[0], "k"), Axis("w", g.kernel[1], "k"))
    return (*taps, channel) if g.layout == "NHWC" else (channel, *taps)
