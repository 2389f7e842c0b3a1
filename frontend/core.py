"""From values to nodes: lifting constants, dtype promotion, broadcasting, and `apply`, which makes every node.

Promotion follows numpy between arrays. Python numbers are weak: they take the other operand's dtype, and a Python float
beside an integer array gives f32, the default float. `np.float64` scalars count as the Python floats that they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ..ir import ops as _records  # noqa: F401  registers the op records
from ..ir.dims import Dim, DimExpr, Shape
from ..ir.dtypes import DType, as_dtype, bool_, f32, i64
from ..ir.errors import AttributeValueError, DTypeError, ShapeError, TensorwrightError, TraceError
from ..ir.graph import Literal, Node
from ..ir.op import make
from ..ir.types import TensorType
from .context import current, error

if TYPE_CHECKING:
    from .tensor import Tensor

__all__ = [
    "TensorLike",
    "Value",
    "apply",
    "apply_tuple",
    "as_tensor",
    "broadcast",
    "cast",
    "normalize_axes",
    "normalize_axis",
    "promote",
]
TensorLike = Union["Value", "np.ndarray[Any, Any]", np.generic, float, int, bool, DimExpr]


class Value:
    """What ops take: something with a node in the graph being traced. `Tensor` adds the operators."""

    __slots__ = ()

    @property
    def node(self) -> Node:
        """What subclasses give: the node that computes it."""
        raise NotImplementedError

    @property
    def type(self) -> TensorType:
        """dtype and shape together."""
        return self.node.tensor

    @property
    def shape(self) -> Shape:
        """A tuple of ints, and of dimension expressions where the size is symbolic."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def ndim(self) -> int:
        return len(self.type.shape)


_make_tensor: list[Callable[[Node], Tensor]] = []


def register_tensor_class(factory: Callable[[Node], Tensor]) -> None:
    """Called once by tensor.py: how a node becomes a Tensor. (Tensor's methods need the functions that need this.)"""
    _make_tensor[:] = [factory]


def wrap(node: Node) -> Tensor:
    """The Tensor of a node."""
    return _make_tensor[0](node)


def apply_tuple(op: str, operands: Sequence[Value], attrs: dict[str, Any]) -> Node:
    """The node that applies an op, labelled; an op's own complaint is raised with the user's line and the operands."""
    trace = current(op)
    nodes = tuple(o.node for o in operands)
    try:
        node = make(op, *nodes, **attrs)
    except TensorwrightError as e:
        raise error(type(e), str(e), **{f"operand {i}": o for i, o in enumerate(operands)}) from None
    trace.label(node)
    return node


def apply(op: str, *operands: Value, **attrs: Any) -> Tensor:
    """The Tensor that an op with one output gives for operands that already have the shapes and dtypes it wants."""
    return wrap(apply_tuple(op, operands, attrs))


def constant(array: np.ndarray[Any, Any], dtype: DType | None = None) -> Tensor:
    """An array as a constant of the graph."""
    return apply("constant", value=Literal(array, dtype))


def is_weak(value: object) -> bool:
    """Whether a value is a Python number (or a symbolic size), which takes its dtype from what it meets."""
    return isinstance(value, (bool, int, float, DimExpr)) and not isinstance(value, np.bool_)


def _size(value: DimExpr, dtype: DType) -> Tensor:
    # The last of 0, 1, ..., value: there is no op for a size, and this is one element of an index expression.
    numbers = apply("iota", shape=(value + 1,), axis=0, dtype=i64)
    last = apply("slice", numbers, starts=(value,), stops=(value + 1,), steps=(1,))
    return cast(apply("reshape", last, shape=()), dtype)


def as_tensor(value: object, dtype: DType | None = None, what: str = "operand") -> Tensor:
    """A Tensor as it is; an array or number as a constant (Python float: f32, int: i64). Raises TraceError for others."""
    if isinstance(value, Value):
        node = value.node
        return wrap(node) if dtype is None or node.tensor.dtype is dtype else cast(value, dtype)
    if isinstance(value, DimExpr):
        return _size(value, dtype or i64)
    if is_weak(value):
        chosen = dtype or (bool_ if isinstance(value, bool) else i64 if isinstance(value, int) else f32)
        return constant(_weak_array(value, chosen))
    if isinstance(value, (np.ndarray, np.generic)):
        current(what)
        try:
            return constant(np.asarray(value), dtype)
        except DTypeError as e:
            raise error(DTypeError, str(e), **{"value": value}) from None
    if isinstance(value, (list, tuple)):
        parts = np.asarray(value) if not any(isinstance(v, Value) for v in value) else None
        if parts is not None and parts.dtype != object:
            small = f32 if parts.dtype == np.float64 else None
            return constant(parts, dtype or small)
        raise error(TraceError, f"{what} is a list of Tensors; make one Tensor of them with tw.stack", given=value)
    raise error(
        TraceError,
        f"{what} is a {type(value).__name__}; expected a Tensor, a numpy array or a number",
        given=value,
    )


def _weak_array(value: object, dtype: DType) -> np.ndarray[Any, Any]:
    if dtype.is_integer and isinstance(value, int):
        low = -(1 << (dtype.bits - 1)) if dtype.kind == "int" else 0
        if not low <= int(value) < low + (1 << dtype.bits):
            raise error(DTypeError, f"the Python integer {value} does not fit {dtype}; cast the other operand to a wider dtype")
    return np.asarray(value, dtype=np.float64 if dtype.is_float else None).astype(dtype.numpy)


def promote(*values: object) -> DType:
    """The common dtype of operands: numpy's for arrays, with Python numbers weak. Raises DTypeError if there is none."""
    strong: list[DType] = []
    weak: list[object] = []
    for v in values:
        if isinstance(v, Value):
            strong.append(v.dtype)
        elif is_weak(v):
            weak.append(v)
        else:
            strong.append(as_dtype(np.asarray(v).dtype))
    if not strong:
        kinds = {type(v) for v in weak}
        return f32 if any(issubclass(k, float) for k in kinds) else bool_ if kinds == {bool} else i64
    result = strong[0]
    for other in strong[1:]:
        if other is not result:
            try:
                result = as_dtype(np.result_type(result.numpy, other.numpy))
            except TypeError:
                message = f"no common dtype for {result} and {other}; convert one of them with .astype(...)"
                raise error(DTypeError, message) from None
    for v in weak:
        if isinstance(v, float) and not result.is_float:
            result = f32
        elif isinstance(v, (int, DimExpr)) and not isinstance(v, bool) and result is bool_:
            result = i64
    return result


def cast(value: Value, dtype: object) -> Tensor:
    """The Tensor converted to a dtype; itself if it has that dtype already."""
    d = as_dtype(dtype)
    return wrap(value.node) if value.dtype is d else apply("cast", value, dtype=d)


def broadcast_to(value: Value, shape: Sequence[Dim]) -> Tensor:
    """The value repeated to a shape, by numpy's rules. Raises ShapeError where it does not fit."""
    target = tuple(shape)
    if value.shape == target:
        return wrap(value.node)
    padded = (1,) * (len(target) - value.ndim) + value.shape
    if len(padded) != len(target) or any(have not in (1, want) for have, want in zip(padded, target, strict=True)):
        raise error(ShapeError, f"a Tensor of shape {show(value.shape)} does not broadcast to {show(target)}", operand=value)
    return apply("broadcast_to", value, shape=target)


def broadcast_shapes(what: str, *values: Value, names: Sequence[str] = ()) -> Shape:
    """The common shape of operands. Raises ShapeError that says which dimensions clash and what would fit."""
    shapes = [v.shape for v in values]
    if shapes and all(s == shapes[0] for s in shapes):
        return shapes[0]
    rank = max(map(len, shapes), default=0)
    result: list[Dim] = []
    clashes: list[str] = []
    for axis in range(-rank, 0):
        dims = list(dict.fromkeys(s[axis] for s in shapes if len(s) >= -axis and s[axis] != 1))
        result.append(dims[0] if dims else 1)
        if len(dims) > 1:
            clashes.append(f"dimension {axis}: " + " against ".join(map(str, dims)))
    if clashes:
        named = dict(zip(names or [f"operand {i}" for i in range(len(values))], values, strict=True))
        first = values[0].shape
        hint = f"shapes fit when, counted from the right, dimensions are equal or 1; {show(first[-1:])} fits {show(first)}"
        other = next((v for v in values[1:] if v.ndim == 1 and v.shape[0] in first[:-1]), None)
        if other is not None:
            place = first.index(other.shape[0])
            column = show((-1,) + (1,) * (len(first) - 1 - place))
            hint += f"; to line {other.shape[0]} up with dimension {place}, reshape the other to {column}"
        elif all(v.ndim == 2 for v in values) and values[0].shape[1] == values[-1].shape[0]:
            hint += "; for a matrix product use @"
        raise error(ShapeError, f"{what}: the shapes do not broadcast together ({'; '.join(clashes)}). {hint}", **named)
    return tuple(result)


def show(shape: Sequence[Dim]) -> str:
    """A shape as Python writes a tuple, symbols bare."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def broadcast(what: str, *values: object, dtype: DType | None = None, names: Sequence[str] = ()) -> list[Tensor]:
    """Operands brought to one dtype (their common one, or the one given) and one shape."""
    types = [v.type for v in values if isinstance(v, Value)]
    if len(types) == len(values) and types.count(types[0]) == len(types) and dtype in (None, types[0].dtype):
        return [wrap(v.node) for v in values if isinstance(v, Value)]  # the usual case
    given = [v if is_weak(v) else as_tensor(v, what=f"an operand of {what}") for v in values]
    common = dtype or promote(*given)
    tensors = [as_tensor(v, common, what) for v in given]
    shape = broadcast_shapes(what, *tensors, names=names)
    return [broadcast_to(t, shape) for t in tensors]


def normalize_axis(axis: object, rank: int, what: str) -> int:
    """A non-negative axis. Raises ShapeError when it is outside [-rank, rank), AttributeValueError when no integer."""
    try:
        a = operator.index(axis)  # type: ignore[arg-type]
    except TypeError:
        raise error(AttributeValueError, f"{what}: an axis is an integer, not {axis!r}") from None
    if not -rank <= a < rank:
        raise error(ShapeError, f"{what}: axis {a} is out of range for {rank} dimensions; expected {-rank} to {rank - 1}")
    return a % rank


def normalize_axes(axes: object, rank: int, what: str) -> tuple[int, ...]:
    """Sorted non-negative axes from None (all), an int, or several. Raises ShapeError for a repeated or wrong one."""
    if axes is None:
        return tuple(range(rank))
    given: Iterable[object] = axes if isinstance(axes, (tuple, list)) else (axes,)
    result = tuple(sorted(normalize_axis(a, rank, what) for a in given))
    if len(set(result)) != len(result):
        raise error(ShapeError, f"{what}: an axis appears twice in {axes!r}")
    return result
