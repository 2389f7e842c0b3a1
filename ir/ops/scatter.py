"""Ops that write at computed positions: scatter_add and scatter (set, mul, max, min)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..dims import Dim
from ..dtypes import f64, i32, i64
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, cast
from ..graph import Attrs, Node
from ..lowering import Load, Scatter
from ..op import REQUIRED, Array, Op, Sample, make, register
from ..types import TensorType, Type
from . import common as c
from .indexing import GATHERS, check_indices, positions, taken

_COMBINE: Final[dict[str, Any]] = {"mul": np.multiply, "max": np.maximum, "min": np.minimum}
_FORMS: Final = {"set": "set", "mul": "prod", "max": "max", "min": "min"}


def _infer(op: str, types: Sequence[TensorType], axis: int) -> Type:
    x, indices, updates = types
    axis = c.check_axis(op, axis, x.rank)
    check_indices(op, indices, 1)
    if updates.dtype is not x.dtype:
        raise DTypeError(f"operand 2 of {op} has dtype {updates.dtype}, expected {x.dtype} as operand 0")
    expected = taken(x.shape, indices.shape, axis)
    if updates.shape != expected:
        raise ShapeError(
            f"operand 2 of {op} has shape {c.show(updates.shape)}, expected {c.show(expected)}: "
            f"operand 0 {c.show(x.shape)} with axis {axis} replaced by the indices' {c.show(indices.shape)}"
        )
    return x


def _infer_scatter_add(types: Sequence[TensorType], attrs: Attrs) -> Type:
    c.check_dtype("scatter_add", types, 0, c.is_arithmetic)
    return _infer("scatter_add", types, attrs["axis"])


def _infer_scatter(types: Sequence[TensorType], attrs: Attrs) -> Type:
    kind = attrs["kind"]
    if kind not in _FORMS:
        raise AttributeValueError(f"kind of scatter is one of {', '.join(_FORMS)}, not {kind!r}; sums are scatter_add")
    if kind != "set":
        c.check_dtype("scatter", types, 0, c.is_arithmetic)
    return _infer("scatter", types, attrs["axis"])


def _updates(arrays: Sequence[Array], axis: int) -> tuple[Array, Array, Array]:
    """(a copy of operand 0 with the axis first, indices within range, their updates [n, rest...]), in row-major order."""
    x, indices, updates = arrays
    flat = indices.astype(np.int64).reshape(-1)
    moved = np.moveaxis(x, axis, 0).copy()
    parts = updates.reshape(*x.shape[:axis], flat.size, *x.shape[axis + 1 :])
    inside = (flat >= 0) & (flat < x.shape[axis])
    return moved, flat[inside], np.moveaxis(parts, axis, 0)[inside]


def _add_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    moved, flat, parts = _updates(arrays, attrs["axis"])
    with np.errstate(all="ignore"):
        np.add.at(moved, flat, parts.astype(np.result_type(arrays[0], arrays[2])))
    return np.ascontiguousarray(np.moveaxis(moved, 0, attrs["axis"]))


def _reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    moved, flat, parts = _updates(arrays, attrs["axis"])
    with np.errstate(all="ignore"):
        if attrs["kind"] == "set":
            for k, i in enumerate(flat):  # numpy leaves open which of several assignments stays
                moved[i] = parts[k]
        else:
            _COMBINE[attrs["kind"]].at(moved, flat, parts)
    return np.ascontiguousarray(np.moveaxis(moved, 0, attrs["axis"]))


def _lower(node: Node, kind: str) -> Scatter:
    axis, x = node.attrs["axis"], node.inputs[0].shape
    indices = node.inputs[1].shape
    count = len(indices)

    def position(u: tuple[Expr, ...], load: Load) -> tuple[Expr, ...]:
        return (*u[count : count + axis], cast(load(1, u[:count]), i64), *u[count + axis :])

    def value(u: tuple[Expr, ...], load: Load) -> Expr:
        return load(2, (*u[count : count + axis], *u[:count], *u[count + axis :]))

    return Scatter((*indices, *x[:axis], *x[axis + 1 :]), position, value, count, kind)


# --- gradients ------------------------------------------------------------------------------------------------------


def _inside(node: Node) -> Node:
    """Which updates count, as a bool of the updates' shape."""
    _, indices, updates = node.inputs
    axis = node.attrs["axis"]
    wide = make("cast", indices, dtype=i64)
    inside = make("and", make("less_equal", c.full(0, wide), wide), make("less", wide, _size(node.inputs[0].shape[axis], wide)))
    return _over(node, inside, updates)


def _over(node: Node, value: Node, updates: Node) -> Node:
    """A value of the indices' shape over that of the updates."""
    axis = node.attrs["axis"]
    tail = len(updates.shape) - axis - len(value.shape)
    return c.broadcast(c.reshaped(value, (1,) * axis + value.shape + (1,) * tail), updates.shape)


def _size(n: Dim, like: Node) -> Node:
    """The size of a dimension as an i64 constant over the shape of `like`; counted where it is symbolic."""
    if isinstance(n, int):
        return c.full(n, like)
    ones = c.full(1, TensorType(i64, (n,)))
    return c.broadcast(make("sum", ones, axes=(0,), keepdims=False), like.shape)


def _add_grad(node: Node, dy: Node) -> Sequence[Node | None]:
    """A dropped update gets no gradient."""
    axis = node.attrs["axis"]
    got = make("gather", dy, node.inputs[1], axis=axis)
    return dy, None, make("where", _inside(node), got, c.full(0.0, got))


def _grad(node: Node, dy: Node) -> Sequence[Node | None]:
    """Of `set`: what was written over gets none, and of several updates of one element only the last gets it."""
    if node.attrs["kind"] != "set":
        raise AttributeValueError(
            f"scatter with kind={node.attrs['kind']!r} has no gradient; scatter_add and kind='set' have one, or stop_gradient it"
        )
    x, indices, _ = node.inputs
    axis = node.attrs["axis"]
    flat = c.reshaped(indices, (_count(indices),))
    order = make("iota", shape=flat.shape, axis=0, dtype=i64)
    last = c.full(-1, TensorType(i64, (x.shape[axis],)))
    last = make("scatter", last, flat, order, axis=0, kind="set")
    wins = c.reshaped(make("equal", make("gather", last, flat, axis=0), order), indices.shape)
    got = make("gather", dy, indices, axis=axis)
    kept = make("and", _over(node, wins, got), _inside(node))
    dx = make("scatter", dy, indices, c.full(0.0, got), axis=axis, kind="set")
    return dx, None, make("where", kept, got, c.full(0.0, got))


def _count(x: Node) -> Dim:
    total: Dim = 1
    for n in x.shape:
        total = total * n
    return total


# --- records --------------------------------------------------------------------------------------------------------


def _samples(more: Attrs, reason: str = "") -> list[Sample]:
    smooth = more.get("kind", "set") == "set"

    def sample(draw: c.Draw, axis: int = 0, gradient: bool = True, label: str = "") -> Sample:
        return Sample(draw, {"axis": axis, **more}, gradient=gradient and smooth, label=label)

    made = [sample(c.together(c.uniform(x), positions(i, x[a]), c.uniform(x[:a] + i + x[a + 1 :])), a) for x, i, a in GATHERS]
    wild = np.array([-5, -1, 0, 6, 7, 100, 2**40, 0], np.int64)
    collide = c.together(c.uniform((3, 4)), c.integers((17,), low=0, high=3, dtype=i32), c.uniform((17, 4)))
    whole = c.together(c.integers((5,)), positions((9,), 5), c.integers((9,)))
    double = c.together(c.uniform((4, 3), dtype=f64), positions((9,), 4), c.uniform((9, 3), dtype=f64))
    return [
        *made,
        sample(c.together(c.uniform((7, 3)), c.fixed(wild), c.uniform((8, 3))), label="dropped"),
        sample(collide, label="collide"),
        sample(whole, gradient=False, label="i64 values"),
        sample(double, label="f64"),
    ]


scatter_add = register(
    Op(
        name="scatter_add",
        infer=_infer_scatter_add,
        reference=_add_reference,
        lower=lambda node: _lower(node, "sum"),
        grad=c.rule(_add_grad),
        doc="Operand 0 with the entries of operand 2 added along an axis at the positions of operand 1; out of range is dropped.",
        arity=3,
        traits=frozenset(),
        attrs={"axis": 0},
        samples=lambda: _samples({}),
    )
)


def _scatter_samples() -> list[Sample]:
    bools = c.together(c.booleans((6, 3)), positions((9,), 6), c.booleans((9, 3)))
    flags = Sample(bools, {"axis": 0, "kind": "set"}, gradient=False, label="bool")
    return [*(s for kind in _FORMS for s in _samples({"kind": kind})), flags]


scatter = register(
    Op(
        name="scatter",
        infer=_infer_scatter,
        reference=_reference,
        lower=lambda node: _lower(node, _FORMS[node.attrs["kind"]]),
        grad=c.rule(_grad),
        doc="As scatter_add, but an update replaces the entry (kind 'set': the last in row-major order of the indices stays), "
        "multiplies it ('mul'), or leaves the larger ('max') or smaller ('min') of both.",
        arity=3,
        traits=frozenset(),
        attrs={"axis": 0, "kind": REQUIRED},
        samples=_scatter_samples,
    )
)
