"""What a Value is: a dtype and a shape, or a tuple of such for an op with several outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .dims import Dim, DimExpr, Shape, as_int, evaluate, product, symbols
from .dtypes import DType, as_dtype
from .errors import ShapeError


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of one array: element type and shape (row-major, no other layout)."""

    dtype: DType
    shape: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def static_shape(self) -> tuple[int, ...]:
        """The shape as ints; raises ShapeError if a dimension is symbolic."""
        return tuple(map(as_int, self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the array; raises ShapeError if a dimension is symbolic."""
        return as_int(self.size) * self.dtype.itemsize

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset().union(*map(symbols, self.shape))

    def with_sizes(self, sizes: Mapping[str, Dim]) -> TensorType:
        """The type with named dimensions put in."""
        return TensorType(self.dtype, tuple(evaluate(d, sizes) for d in self.shape))

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class TupleType:
    """The type of a node with several outputs; a `get` node takes one of them out."""

    items: tuple[TensorType, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


Type = TensorType | TupleType


def tensor(dtype: object, shape: Iterable[Dim]) -> TensorType:
    """A TensorType from anything `as_dtype` takes and an iterable of dimensions.

    Raises ShapeError for a negative dimension, or one that is neither an integer nor a dimension expression.
    """
    dims: list[Dim] = []
    for d in shape:
        if isinstance(d, DimExpr):
            dims.append(d)
            continue
        if isinstance(d, bool) or not hasattr(d, "__index__"):
            raise ShapeError(f"a dimension is an integer or a symbolic dimension, not {d!r}")
        if (n := int(d)) < 0:
            raise ShapeError(f"a dimension cannot be negative: {tuple(shape)}")
        dims.append(n)
    return TensorType(as_dtype(dtype), tuple(dims))
