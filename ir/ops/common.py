"""What the op records share: checks that name the operand, node builders for gradients and lowerings, sample makers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from ..dims import Dim, DimExpr, Shape, as_int, product
from ..dtypes import DType, bf16, f16, f32, f64, i64
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, const
from ..graph import Attrs, Graph, Literal, Node
from ..lowering import Load, Map
from ..op import Array, GradRule, Op, Sample, Trait, make
from ..types import TensorType, TupleType, Type

FLOATS: Final = frozenset({f32, f64, f16, bf16})
DRAWN: Final = frozenset({f32, f64})  # what random numbers are made in
ELEMENTWISE: Final = frozenset({Trait.ELEMENTWISE})
CHEAP: Final = frozenset({Trait.ELEMENTWISE, Trait.CHEAP})

Reference = Callable[[Sequence[Array], Attrs], Array]
Infer = Callable[[Sequence[TensorType], Attrs], Type]


# --- checks ---------------------------------------------------------------------------------------------------------


def show(shape: Iterable[Dim]) -> str:
    """A shape as errors print it."""
    return f"[{', '.join(map(str, shape))}]"


def is_arithmetic(dtype: DType) -> bool:
    """Whether arithmetic is defined: floats of 16 bits or more (those of 16 in f32, rounded once per op) and integers of 8
    bits or more. Narrower types are stored and cast."""
    return dtype in FLOATS or (dtype.is_integer and dtype.bits >= 8)


def is_integer(dtype: DType) -> bool:
    return dtype.is_integer and dtype.bits >= 8


def is_logical(dtype: DType) -> bool:
    return dtype.kind == "bool" or is_integer(dtype)


def is_any(dtype: DType) -> bool:
    return True


_WORDING: Final[dict[Callable[[DType], bool], str]] = {
    is_arithmetic: "f32, f64, f16, bf16 or an integer of 8 bits or more",
    is_integer: "an integer of 8 bits or more",
    is_logical: "bool or an integer of 8 bits or more",
}


def is_float(dtype: DType) -> bool:
    """Whether transcendental arithmetic is defined: f32, f64, f16 and bf16."""
    return dtype in FLOATS


def is_wide_float(dtype: DType) -> bool:
    """Whether arithmetic is done in the dtype itself: f32 and f64."""
    return dtype in (f32, f64)


_WORDING[is_float] = "f32, f64, f16 or bf16"
_WORDING[is_wide_float] = "f32 or f64"


def check_dtype(op: str, types: Sequence[TensorType], k: int, allowed: Callable[[DType], bool]) -> None:
    """Raises DTypeError, naming operand k, unless its dtype is allowed."""
    if not allowed(types[k].dtype):
        raise DTypeError(f"operand {k} of {op} has dtype {types[k].dtype}, expected {_WORDING[allowed]}; cast it first")


def check_same(op: str, types: Sequence[TensorType], first: int = 0, dtype: bool = True) -> TensorType:
    """The common type of operands first, first + 1, ...; raises ShapeError or DTypeError naming the one that differs."""
    expected = types[first]
    for k in range(first + 1, len(types)):
        t = types[k]
        if t.shape != expected.shape:
            raise ShapeError(
                f"operand {k} of {op} has shape {show(t.shape)}, expected {show(expected.shape)} as operand {first}; "
                "broadcast_to brings it there"
            )
        if dtype and t.dtype is not expected.dtype:
            raise DTypeError(
                f"operand {k} of {op} has dtype {t.dtype}, expected {expected.dtype} as operand {first}; cast one of them"
            )
    return expected


def check_rank(op: str, types: Sequence[TensorType], k: int, rank: int) -> None:
    if types[k].rank != rank:
        raise ShapeError(f"operand {k} of {op} has shape {show(types[k].shape)} of rank {types[k].rank}, expected rank {rank}")


def check_axis(op: str, axis: object, rank: int, name: str = "axis") -> int:
    """The axis, if it is an int in [0, rank). Raises AttributeValueError."""
    if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < rank:
        raise AttributeValueError(
            f"{name} {axis!r} of {op} is not a dimension of an operand of rank {rank}: expected 0 <= axis < {rank}"
        )
    return axis


def check_axes(op: str, axes: object, rank: int) -> tuple[int, ...]:
    """The axes, if they are an ascending tuple of distinct dimensions. Raises AttributeValueError."""
    if not isinstance(axes, tuple):
        raise AttributeValueError(f"axes of {op} are a tuple of ints, not {axes!r}")
    for a in axes:
        check_axis(op, a, rank, "axes entry")
    if list(axes) != sorted(set(axes)):
        raise AttributeValueError(f"axes {axes} of {op} must be ascending and distinct")
    return axes


def check_shape(op: str, shape: object) -> Shape:
    """The shape attribute, if it is a tuple of dimensions (none negative). Raises AttributeValueError."""
    if not isinstance(shape, tuple) or not all(
        isinstance(d, DimExpr) or (isinstance(d, int) and not isinstance(d, bool) and d >= 0) for d in shape
    ):
        raise AttributeValueError(f"shape of {op} is a tuple of non-negative dimensions, not {shape!r}")
    return shape


def check_ints(op: str, name: str, value: object, count: int, low: int) -> tuple[int, ...]:
    """The attribute, if it is a tuple of `count` ints, each >= low. Raises AttributeValueError."""
    ok = isinstance(value, tuple) and len(value) == count
    if not ok or not all(isinstance(v, int) and not isinstance(v, bool) and v >= low for v in value):  # type: ignore[attr-defined]
        raise AttributeValueError(f"{name} of {op} is a tuple of {count} ints, each at least {low}, not {value!r}")
    return value  # type: ignore[return-value]


def check_dtype_attr(op: str, value: object) -> DType:
    if not isinstance(value, DType):
        raise AttributeValueError(f"dtype of {op} is a DType, not {value!r}")
    return value


# --- references -----------------------------------------------------------------------------------------------------


def total(fn: Callable[..., Any]) -> Reference:
    """A reference from a function of the arrays: silent about NaN, Inf and overflow, and always returning an array."""

    def reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(fn(*arrays))

    return reference


def static(shape: Iterable[Dim]) -> tuple[int, ...]:
    """The shape as ints; ShapeError if a dimension is symbolic."""
    return tuple(map(as_int, shape))


# --- lowerings ------------------------------------------------------------------------------------------------------


def elementwise(fn: Callable[..., Expr]) -> Callable[[Node], Map]:
    """A `lower` from a scalar function of one element of each operand."""

    def lower(node: Node) -> Map:
        count = len(node.inputs)
        return Map(lambda idx, load: fn(*(load(k, idx) for k in range(count))), elementwise=True)

    return lower


def at(load: Load, k: int, index: Sequence[Expr], mask: Expr | None) -> Expr:
    """A load with a mask where there is one."""
    return load(k, index) if mask is None else load(k, index, mask)


def all_of(conditions: Iterable[Expr]) -> Expr | None:
    """The conjunction; None for none."""
    result: Expr | None = None
    for c in conditions:
        result = c if result is None else result & c
    return result


def number(value: float, dtype: DType) -> Expr:
    """A scalar constant of a dtype."""
    return const(value, dtype)


def accumulator(dtype: DType) -> DType:
    """What arithmetic on a float dtype is done in where it is done at once: 16-bit floats in f32."""
    return f32 if dtype.is_float and dtype.bits < 32 else dtype


# --- nodes ----------------------------------------------------------------------------------------------------------


def rule(fn: Callable[[Node, Node], Sequence[Node | None]]) -> GradRule:
    """A gradient rule from a function of (node, cotangent of its one output)."""

    def grad(node: Node, cotangents: tuple[Node | None, ...]) -> Sequence[Node | None]:
        dy = cotangents[0]
        return (None,) * len(node.inputs) if dy is None else fn(node, dy)

    return grad


def no_flow(node: Node, cotangents: tuple[Node | None, ...]) -> Sequence[Node | None]:
    """The gradient rule of what is locally constant: nothing flows to any input."""
    return (None,) * len(node.inputs)


def scalar(value: float, dtype: DType) -> Node:
    """A 0-d constant."""
    return make("constant", value=Literal(np.asarray(value), dtype))


def full(value: float, like: Node | TensorType) -> Node:
    """A constant of the dtype and shape of another value."""
    t = like.tensor if isinstance(like, Node) else like
    node = scalar(value, t.dtype)
    return node if t.shape == () else make("broadcast_to", node, shape=t.shape)


def scaled(x: Node, value: float) -> Node:
    """x times a number."""
    return make("mul", x, full(value, x))


def reshaped(x: Node, shape: Shape) -> Node:
    """x under another shape; x itself if it has that shape."""
    return x if x.shape == shape else make("reshape", x, shape=shape)


def broadcast(x: Node, shape: Shape) -> Node:
    """x broadcast to a shape; x itself if it has that shape."""
    return x if x.shape == shape else make("broadcast_to", x, shape=shape)


def kept(shape: Shape, axes: tuple[int, ...]) -> Shape:
    """The shape with the axes as size 1."""
    return tuple(1 if d in axes else n for d, n in enumerate(shape))


def expand(y: Node, axes: tuple[int, ...], shape: Shape) -> Node:
    """A reduced value (with or without the reduced axes) put back over `shape`."""
    return broadcast(reshaped(y, kept(shape, axes)), shape)


def reciprocal_count(x: Node, axes: tuple[int, ...], like: Node) -> Node:
    """1 / (number of elements reduced over the axes of x), over the shape of `like`; the size may be symbolic."""
    count = product([x.shape[a] for a in axes])
    if isinstance(count, int):
        return full(1.0 / count if count else float("inf"), like)
    ones = full(1.0, TensorType(x.dtype, tuple(x.shape[a] for a in axes)))
    n = make("sum", ones, axes=tuple(range(len(axes))), keepdims=False)
    return broadcast(make("div", scalar(1.0, x.dtype), n), like.shape)


def inverse(perm: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes perm."""
    return tuple(sorted(range(len(perm)), key=lambda d: perm[d]))


def transposed(x: Node, perm: Sequence[int]) -> Node:
    """transpose(x, perm), where transposes of transposes are one and the identity is x; constants' broadcasts absorb it."""
    perm = tuple(perm)
    while x.op.name == "transpose":
        before = x.attrs["perm"]
        perm = tuple(before[p] for p in perm)
        x = x.inputs[0]
    if perm == tuple(range(len(perm))):
        return x
    if x.op.name == "broadcast_to" and x.inputs[0].shape == ():
        return make("broadcast_to", x.inputs[0], shape=tuple(x.shape[p] for p in perm))
    return make("transpose", x, perm=perm)


def elementwise_transpose(node: Node, perm: tuple[int, ...]) -> Node:
    """The `transpose` rule of an op whose operands all have the shape of its output."""
    return make(node.op, *(transposed(x, perm) for x in node.inputs), **node.attrs)


# --- samples --------------------------------------------------------------------------------------------------------

SIZES: Final = (1, 7, 8, 9, 15, 16, 17, 31, 33)  # straddle the vector widths 4, 8, 16 and 32
SPECIAL: Final = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 2.5, -2.5, 0.5, 3e38, -3e38, 1e-20)

Draw = Callable[[np.random.Generator], Sequence[Array]]


def uniform(*shapes: tuple[int, ...], low: float = -2.0, high: float = 2.0, dtype: DType = f32) -> Draw:
    """Draws one array per shape, uniform in [low, high)."""
    return lambda rng: [rng.uniform(low, high, s).astype(dtype.numpy) for s in shapes]


def distinct(*shapes: tuple[int, ...], dtype: DType = f32) -> Draw:
    """Arrays without two values closer than 0.05, so that the largest stays the largest under a small step."""

    def draw(rng: np.random.Generator) -> Sequence[Array]:
        sizes = [int(np.prod(s)) for s in shapes]
        pool = rng.permutation(sum(sizes)).astype(np.float64) * 0.1 - 0.05 * sum(sizes)
        parts = np.split(pool + rng.uniform(-0.02, 0.02, pool.shape), np.cumsum(sizes)[:-1])
        return [p.reshape(s).astype(dtype.numpy) for p, s in zip(parts, shapes, strict=True)]

    return draw


def integers(*shapes: tuple[int, ...], low: int = -9, high: int = 10, dtype: DType = i64) -> Draw:
    """Draws one integer array per shape, in [low, high)."""
    return lambda rng: [rng.integers(low, high, s).astype(dtype.numpy) for s in shapes]


def booleans(*shapes: tuple[int, ...]) -> Draw:
    return lambda rng: [rng.random(s) < 0.5 for s in shapes]


def together(*draws: Draw) -> Draw:
    """The arrays of several draws, one after the other."""
    return lambda rng: [a for d in draws for a in d(rng)]


def fixed(*arrays: Any) -> Draw:
    """The given arrays."""
    values = [np.asarray(a) for a in arrays]
    return lambda rng: [v.copy() for v in values]


def some_shapes(name: str) -> tuple[tuple[int, ...], ...]:
    """A few shapes of rank 0 to 4; which sizes depends on the name, so that the ops together cover all of SIZES."""
    k = sum(name.encode())
    pick = [SIZES[(k + 4 * j) % len(SIZES)] for j in range(3)]
    return ((pick[0],), (pick[1], 2), (3, pick[2]), (), (2, 3, 5), (2, 1, 3, 4), (0,), (2, 0, 3))


def sample_node(op: Op, sample: Sample, seed: int = 0) -> tuple[Graph, list[Array]]:
    """The graph of one op applied to the operands of a sample (inputs x0, x1, ...), and those operands as arrays."""
    arrays = [np.ascontiguousarray(a).reshape(np.shape(a)) for a in sample.make(np.random.default_rng(seed))]
    types = [Literal(a).type for a in arrays]
    inputs = tuple(make("input", name=f"x{k}", role="data", dtype=t.dtype, shape=t.shape) for k, t in enumerate(types))
    node = make(op, *inputs, **sample.attrs)
    parts: tuple[Node, ...] = (node,)
    if isinstance(node.type, TupleType):
        parts = tuple(make("get", node, index=k) for k in range(len(node.type.items)))
    return Graph(inputs, parts), arrays
