"""How an op becomes code: the forms that a record's `lower` may return. The code generator knows these and no op names.

`idx` are i64 expressions, one per output dimension; `load(k, index)` is the element of operand `k` at an index, which
must be in range even where a `select` drops the value (clamp it, or use `load_or` to guard it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .contraction import Contraction
from .dims import Dim
from .expr import Expr, ExprLike

if TYPE_CHECKING:
    from .graph import Node


class Load(Protocol):
    """The element of operand `k` at `index`. With `mask`, zero where the mask is false, and the index may then be wild."""

    def __call__(self, k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr: ...


@dataclass(frozen=True)
class Map:
    """out[idx] = value(idx, load). Elementwise ops, data movement, gather, iota, one-hot, random draws.

    Where `elementwise`, operand k is read at idx exactly, so that loops over any shape may be flattened.
    """

    value: Callable[[tuple[Expr, ...], Load], Expr]
    elementwise: bool = False


@dataclass(frozen=True)
class Reduce:
    """out[idx] = the values value(idx, r, load) combined over all r in `extents`.

    kind: 'sum', 'prod', 'max', 'min', or 'argmax', 'argmin' (the row-major position of the first best r, as the output's
    integer dtype). If the reduction runs over whole axes of operand 0, `axes` lists them (ascending; extents in that order)
    and `keepdims` says whether they stay as size 1: the code generator then knows the access pattern.
    An empty sum is 0, an empty prod 1; an empty max or min is refused by `infer`.
    """

    kind: str
    extents: tuple[Dim, ...]
    value: Callable[[tuple[Expr, ...], tuple[Expr, ...], Load], Expr]
    axes: tuple[int, ...] | None = None
    keepdims: bool = False


@dataclass(frozen=True)
class Scan:
    """Cumulative sum or product of operand 0 along one axis."""

    kind: str
    axis: int
    exclusive: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Scatter:
    """out = operand 0; then, for u over `extents` in row-major order: out[index(u, load)] += value(u, load).

    An index outside the output drops the update. `serial_dims` is how many leading dimensions of `extents` may collide;
    over the rest, updates touch distinct elements and may run in parallel.
    """

    extents: tuple[Dim, ...]
    index: Callable[[tuple[Expr, ...], Load], tuple[Expr, ...]]
    value: Callable[[tuple[Expr, ...], Load], Expr]
    serial_dims: int


@dataclass(frozen=True)
class View:
    """The bytes of operand 0 under another shape (reshape): no code unless the bytes must move."""


@dataclass(frozen=True)
class Contract:
    """A multiply-and-sum of operands 0 and 1."""

    spec: Contraction


@dataclass(frozen=True)
class Decompose:
    """Stands for other ops: `build(node)` gives the equivalent node (a tuple of nodes for several outputs)."""

    build: Callable[[Node], Node | tuple[Node, ...]]


@dataclass(frozen=True)
class Structural:
    """Handled by the graph machinery itself: input, constant, get, fused."""


Lowering = Map | Reduce | Scan | Scatter | View | Contract | Decompose | Structural
