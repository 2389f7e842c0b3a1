"""Adaptive pooling: `out` windows share the `size` elements of an axis out as evenly as whole numbers allow.

Window i holds the elements from floor(i * size / out) up to, not including, ceil((i + 1) * size / out); so element p lies in
the windows from floor(p * out / size) up to, not including, ceil((p + 1) * out / size). That is the same formula with size
and out exchanged: the sum over windows is its own adjoint, and the gradient of sums to `out` is sums to `size`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..dims import Dim, Shape, as_int
from ..dtypes import DType, f64, i32
from ..errors import DTypeError, ShapeError
from ..expr import Expr, cast, const, eq, select
from ..graph import Attrs, Node
from ..lowering import Load, Reduce
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .conv_geometry import LAYOUTS, check_layout, join, moved, split


def _start(i: Any, size: int, out: int) -> Any:
    return i * size // out


def _stop(i: Any, size: int, out: int) -> Any:
    return (i * size + (size + out - 1)) // out


def _longest(size: int, out: int) -> int:
    """The greatest number of elements in a window."""
    return max((_stop(i, size, out) - _start(i, size, out) for i in range(out)), default=0)


@dataclass(frozen=True)
class _Shares:
    """The sizes of one pooling, height before width."""

    n: Dim
    channels: Dim
    size: tuple[Dim, Dim]
    out: tuple[Dim, Dim]
    layout: str

    @property
    def x_shape(self) -> Shape:
        return join(self.n, self.channels, *self.size, self.layout)

    @property
    def y_shape(self) -> Shape:
        return join(self.n, self.channels, *self.out, self.layout)

    def static(self, d: int) -> tuple[int, int]:
        return as_int(self.size[d]), as_int(self.out[d])

    @property
    def extents(self) -> tuple[int, int]:
        return _longest(*self.static(0)), _longest(*self.static(1))

    @property
    def reach(self) -> tuple[int, int]:
        """How many windows can contain one element."""
        (h, oh), (w, ow) = self.static(0), self.static(1)
        return _longest(oh, h), _longest(ow, w)


def _shares(op: str, shape: Shape, attrs: Attrs) -> _Shares:
    layout = check_layout(op, attrs["layout"])
    if len(shape) != 4:
        raise ShapeError(f"operand 0 of {op} has shape {c.show(shape)} of rank {len(shape)}, expected rank 4 ({layout})")
    n, channels, height, width = split(shape, layout)
    out = attrs["output"]
    if len(c.check_shape(op, out)) != 2:
        raise ShapeError(f"output of {op} is (height, width), not {out!r}")
    for name, size, want in (("height", height, out[0]), ("width", width, out[1])):
        if size == 0 and want != 0:
            raise ShapeError(f"operand 0 of {op} has {name} 0, which has nothing to share out to {want}")
    return _Shares(n, channels, (height, width), (out[0], out[1]), layout)


def _of(node: Node) -> _Shares:
    if "input_shape" not in node.attrs:
        return _shares(node.op.name, node.inputs[0].shape, node.attrs)
    _, _, height, width = split(node.inputs[0].shape, node.attrs["layout"])
    return _shares(node.op.name, node.attrs["input_shape"], {**node.attrs, "output": (height, width)})


# --- lowering -------------------------------------------------------------------------------------------------------


def _element(s: _Shares, idx: tuple[Expr, ...], r: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], Expr | None]:
    """The index into x of element r of window idx, and whether the window has so many (None: always)."""
    n, channel, y, x = split(idx, s.layout)
    at: list[Expr] = []
    inside: list[Expr] = []
    for d, i in enumerate((y, x)):
        size, out = s.static(d)
        at.append(_start(i, size, out) + r[d])
        if size % out:
            inside.append(at[d] < _stop(i, size, out))
    return join(n, channel, at[0], at[1], s.layout), c.all_of(inside)


def _window(s: _Shares, idx: tuple[Expr, ...], r: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], Expr | None, list[Expr]]:
    """For element idx: the index of the r-th window that contains it, whether there are so many, and its place there."""
    n, channel, y, x = split(idx, s.layout)
    at: list[Expr] = []
    places: list[Expr] = []
    inside: list[Expr] = []
    for d, p in enumerate((y, x)):
        size, out = s.static(d)
        at.append(_start(p, out, size) + r[d])
        if out % size:
            inside.append(at[d] < _stop(p, out, size))
        places.append(p - _start(at[d], size, out))
    return join(n, channel, at[0], at[1], s.layout), c.all_of(inside), places


def _lower_sum(node: Node) -> Reduce:
    s = _of(node)

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        index, mask = _element(s, idx, r)
        return c.at(load, 0, index, mask)

    return Reduce("sum", s.extents, value)


def _lower_max(kind: str) -> Callable[[Node], Reduce]:
    def lower(node: Node) -> Reduce:
        s = _of(node)

        def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
            index, mask = _element(s, idx, r)
            x = c.at(load, 0, index, mask)
            return x if mask is None else select(mask, x, const(float("-inf"), x.dtype))

        return Reduce(kind, s.extents, value)

    return lower


def _lower_max_grad(node: Node) -> Reduce:
    s = _of(node)

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        index, mask, (h, v) = _window(s, idx, r)
        chosen = eq(c.at(load, 1, index, mask), cast(h * s.extents[1] + v, i32))
        chosen = chosen if mask is None else chosen & mask
        return select(chosen, c.at(load, 0, index, mask), const(0.0, node.dtype))

    return Reduce("sum", s.reach, value)


# --- values ---------------------------------------------------------------------------------------------------------


def _windows(s: _Shares) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """For each window: its index in y, and the slices of x that it holds."""
    (h, oh), (w, ow) = s.static(0), s.static(1)
    every = slice(None)
    for i in range(oh):
        for j in range(ow):
            rows, columns = slice(_start(i, h, oh), _stop(i, h, oh)), slice(_start(j, w, ow), _stop(j, w, ow))
            yield join(every, every, i, j, s.layout), join(every, every, rows, columns, s.layout)


def _pixels(s: _Shares) -> tuple[int, int]:
    return (2, 3) if s.layout == "NCHW" else (1, 2)


def _sum_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    s = _shares("adaptive_sum_pool2d", arrays[0].shape, attrs)
    y = np.zeros(c.static(s.y_shape), arrays[0].dtype)
    with np.errstate(all="ignore"):
        for at, held in _windows(s):
            y[at] = arrays[0][held].sum(_pixels(s))
    return y


def _max_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    s = _shares("adaptive_max_pool2d", arrays[0].shape, attrs)
    y = np.zeros(c.static(s.y_shape), arrays[0].dtype)
    for at, held in _windows(s):
        y[at] = arrays[0][held].max(_pixels(s))
    return y


def _index_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    s = _shares("adaptive_max_pool2d_index", arrays[0].shape, attrs)
    y = np.zeros(c.static(s.y_shape), np.int32)
    for at, held in _windows(s):
        part = arrays[0][held] if s.layout == "NCHW" else np.moveaxis(arrays[0][held], 3, 1)
        n, channels, h, w = part.shape
        best = part.reshape(n, channels, h * w).argmax(-1)
        y[at] = best // w * s.extents[1] + best % w
    return y


def _max_grad_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    dy, index = arrays
    _, _, *out = split(dy.shape, attrs["layout"])
    s = _shares("adaptive_max_pool2d_grad", attrs["input_shape"], {**attrs, "output": tuple(out)})
    dx = np.zeros(c.static(s.x_shape), dy.dtype)
    with np.errstate(all="ignore"):
        for at, held in _windows(s):
            part = dx[held]  # a view
            h, w = (part.shape[a] for a in _pixels(s))
            places = (np.arange(h)[:, None] * s.extents[1] + np.arange(w)).reshape(join(1, 1, h, w, s.layout))
            wide = join(slice(None), slice(None), None, None, s.layout)
            part += np.where(index[at][wide] == places, dy[at][wide], dy.dtype.type(0))
    return dx


# --- gradients ------------------------------------------------------------------------------------------------------


def _sum_grad(node: Node, dy: Node) -> Sequence[Node]:
    _, _, height, width = split(node.inputs[0].shape, node.attrs["layout"])
    return (make(node.op, dy, output=(height, width), layout=node.attrs["layout"]),)


def _max_grad(node: Node, dy: Node) -> Sequence[Node]:
    x = node.inputs[0]
    index = make("adaptive_max_pool2d_index", x, **node.attrs)
    return (make("adaptive_max_pool2d_grad", dy, index, input_shape=x.shape, layout=node.attrs["layout"]),)


def _max_grad_grad(node: Node, g: Node) -> Sequence[Node | None]:
    """The elements of g at the recorded places, one window after the other: windows that overlap cannot be taken at once."""
    s, index = _of(node), node.inputs[1]
    (h, oh), (w, ow) = s.static(0), s.static(1)
    rows: list[Node] = []
    y_axis, x_axis = (2, 3) if s.layout == "NCHW" else (1, 2)
    for i in range(oh):
        cells: list[Node] = []
        for j in range(ow):
            top, left = _start(i, h, oh), _start(j, w, ow)
            height, width = _stop(i, h, oh) - top, _stop(j, w, ow) - left
            stops = join(s.n, s.channels, top + height, left + width, s.layout)
            part = make("slice", g, starts=join(0, 0, top, left, s.layout), stops=stops, steps=(1, 1, 1, 1))
            at = make(
                "slice", index, starts=join(0, 0, i, j, s.layout),
                stops=join(s.n, s.channels, i + 1, j + 1, s.layout), steps=(1, 1, 1, 1),
            )  # fmt: skip
            row = make("iota", shape=part.shape, axis=y_axis, dtype=i32)
            place = make("add", c.scaled(row, s.extents[1]), make("iota", shape=part.shape, axis=x_axis, dtype=i32))
            chosen = make("equal", place, c.broadcast(at, part.shape))
            kept = make("where", chosen, part, c.full(0.0, part))
            cells.append(make("sum", kept, axes=(y_axis, x_axis), keepdims=True))
        rows.append(make("concat", *cells, axis=x_axis))
    return make("concat", *rows, axis=y_axis), None


# --- types and records ------------------------------------------------------------------------------------------------


def _infer_forward(op: str, dtype: DType | None) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(op, types, 0, c.is_float)
        return TensorType(dtype or types[0].dtype, _shares(op, types[0].shape, attrs).y_shape)

    return infer


def _infer_max_grad(types: Sequence[TensorType], attrs: Attrs) -> Type:
    op = "adaptive_max_pool2d_grad"
    c.check_dtype(op, types, 0, c.is_float)
    c.check_same(op, types, dtype=False)
    c.check_rank(op, types, 0, 4)
    if types[1].dtype is not i32:
        raise DTypeError(f"operand 1 of {op} (the places) has dtype {types[1].dtype}, expected i32")
    n, channels, height, width = split(types[0].shape, check_layout(op, attrs["layout"]))
    s = _shares(op, c.check_shape(op, attrs["input_shape"]), {**attrs, "output": (height, width)})
    if (s.n, s.channels) != (n, channels):
        raise ShapeError(f"operand 0 of {op} has shape {c.show(types[0].shape)}, expected {c.show(s.y_shape)}")
    return TensorType(types[0].dtype, s.x_shape)


# NCHW shape, output
_CASES: Final[tuple[tuple[tuple[int, int, int, int], tuple[int, int]], ...]] = (
    ((2, 3, 7, 10), (3, 4)),
    ((1, 17, 5, 5), (5, 2)),
    ((1, 2, 4, 3), (7, 5)),
    ((2, 8, 6, 9), (2, 3)),
    ((1, 1, 1, 1), (1, 1)),
    ((0, 3, 5, 4), (2, 3)),
    ((1, 3, 8, 7), (1, 1)),
)


def _samples(draw: Callable[..., c.Draw], smooth: bool) -> list[Sample]:
    made = []
    for shape, output in _CASES:
        for layout in LAYOUTS:
            full = join(*shape, layout)
            made.append(Sample(draw(full), {"output": output, "layout": layout}, gradient=smooth))
    special = np.array([[np.nan, 1, 2], [1, np.inf, np.inf], [-np.inf, -np.inf, 0]], np.float32).reshape(1, 1, 3, 3)
    return [
        *made,
        Sample(draw((1, 2, 5, 4), dtype=f64), {"output": (3, 3)}, gradient=smooth, label="f64"),
        Sample(c.fixed(special), {"output": (2, 2)}, gradient=False, label="special"),
    ]


def _max_grad_samples() -> list[Sample]:
    made = []
    for shape, output in _CASES:
        for layout in LAYOUTS:
            x, y = join(*shape, layout), join(*shape[:2], *output, layout)

            def draw(rng: np.random.Generator, x: Any = x, y: Any = y, output: Any = output, layout: str = layout) -> Any:
                places = _index_value([rng.normal(size=x)], {"output": output, "layout": layout})
                return [rng.uniform(-2, 2, y).astype(np.float32), places]

            attrs = {"input_shape": x, "layout": layout}
            made.append(Sample(draw, attrs, budget=4e-6, reason="the order of a sum is free"))
    return made


def _forward(name: str, doc: str, value: Any, lower: Any, grad: Any, dtype: DType | None = None) -> Op:
    draw = c.uniform if name == "adaptive_sum_pool2d" else c.distinct
    return register(
        Op(
            name=name,
            infer=_infer_forward(name, dtype),
            reference=value,
            lower=lower,
            grad=grad,
            doc=doc,
            arity=1,
            traits=frozenset({Trait.REDUCTION}),
            attrs={"output": REQUIRED, "layout": "NCHW"},
            to_layout=lambda node, layout: moved(node, layout, (0,)),
            samples=lambda: _samples(draw, dtype is None),
        )
    )


adaptive_sum_pool2d = _forward(
    "adaptive_sum_pool2d",
    "The sum of each of `output` windows that share the image out evenly; they overlap where the sizes do not divide.",
    _sum_value,
    _lower_sum,
    c.rule(_sum_grad),
)
adaptive_max_pool2d = _forward(
    "adaptive_max_pool2d",
    "The largest element of each of `output` windows that share the image out evenly; NaN if any is NaN.",
    _max_value,
    _lower_max("max"),
    c.rule(_max_grad),
)
adaptive_max_pool2d_index = _forward(
    "adaptive_max_pool2d_index",
    "The place of the first largest element in each window, row-major with the longest window's width, as i32; NaN is largest.",
    _index_value,
    _lower_max("argmax"),
    c.no_flow,
    dtype=i32,
)
adaptive_max_pool2d_grad = register(
    Op(
        name="adaptive_max_pool2d_grad",
        infer=_infer_max_grad,
        reference=_max_grad_value,
        lower=_lower_max_grad,
        grad=c.rule(_max_grad_grad),
        doc="The gradient of adaptive_max_pool2d for x of `input_shape`, from dy and the places of the maxima.",
        arity=2,
        traits=frozenset({Trait.REDUCTION}),
        attrs={"input_shape": REQUIRED, "layout": "NCHW"},
        to_layout=lambda node, layout: moved(node, layout, (0, 1), ("input_shape",)),
        samples=_max_grad_samples,
    )
)
