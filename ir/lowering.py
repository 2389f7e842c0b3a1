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
    from .graph import Graph, Node


class Load(Protocol):
    """The element of operand `k` at `index`. With `mask`, zero where the mask is false, and the index may then be wild."""

    def __call__(self, k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr: ...


@dataclass(frozen=True)
class Map:
    """out[idx] = value(idx, load). Elementwise ops, data movement, gather, iota, one-hot, random draws.

    Where `elementwise`, operand k is read at idx exactly, so that loops over any shape may be flattened. `together` elements
    share the arithmetic of one value, which selects among them by the index (transforms of small tiles). `joins` is the axis
    along which the result is the operands one after the other, if it is that.
    """

    value: Callable[[tuple[Expr, ...], Load], Expr]
    elementwise: bool = False
    together: int = 1
    joins: int | None = None


@dataclass(frozen=True)
class Reduce:
    """out[idx] = the values value(idx, r, load) combined over all r in `extents`.

    kind: 'sum', 'prod', 'max', 'min', or 'argmax', 'argmin' (the row-major position of the first best r, as the output's
    integer dtype). If the reduction runs over whole axes of operand 0, `axes` lists them (ascending; extents in that order)
    and `keepdims` says whether they stay as size 1: the code generator then knows the access pattern.
    An empty sum is 0, an empty prod 1; an empty max or min is refused by `infer`. Where `fused`, the values of a sum are
    products, each of which may be added with a single rounding.
    """

    kind: str
    extents: tuple[Dim, ...]
    value: Callable[[tuple[Expr, ...], tuple[Expr, ...], Load], Expr]
    axes: tuple[int, ...] | None = None
    keepdims: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Scan:
    """Cumulative sum or product of operand 0 along one axis."""

    kind: str
    axis: int
    exclusive: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Scatter:
    """out = operand 0; then, for u over `extents` in row-major order: value(u, load) goes to out[index(u, load)].

    `kind` says how: 'set' replaces what is there, 'sum', 'prod', 'max' and 'min' combine with it. An index outside the output
    drops the update. `serial_dims` is how many leading dimensions of `extents` may collide; over the rest, updates touch
    distinct elements and may run in parallel.
    """

    extents: tuple[Dim, ...]
    index: Callable[[tuple[Expr, ...], Load], tuple[Expr, ...]]
    value: Callable[[tuple[Expr, ...], Load], Expr]
    serial_dims: int
    kind: str = "sum"


@dataclass(frozen=True)
class Sort:
    """Row by row along one axis of operand 0: the positions (i64) of the first `count` elements in ascending or descending order.

    NaN counts as larger than every number, and of equal elements the one before comes first.
    """

    axis: int
    count: Dim
    descending: bool = False


@dataclass(frozen=True)
class Window:
    """What a convolution without groups and dilation reads of images [N, H, W, C] for one pixel of its result: for channel c and
    tap t, in row t // kernel[1] and column t % kernel[1] of the kernel, step c * taps + t of the sum."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Sparse:
    """A product with a sparse matrix in blocks of `block` columns.

    Operands: x [..., K], values [E, block], offsets [E], starts [blocks + 1]; out[..., b * block + j] is the sum over the entries
    e from starts[b] to starts[b + 1], in this order, of x[..., offsets[e]] * values[e, j]. With a `window`, the rows that are
    multiplied are not those of x but what the window reads of images x, zeros around them.
    """

    block: int
    window: Window | None = None

    @property
    def taps(self) -> int:
        """Steps of the sum for each of x's last dimension."""
        return 1 if self.window is None else self.window.taps


@dataclass(frozen=True)
class Coded:
    """A product of a few rows with weights of `bits` bits.

    Operands: x [..., K], panels of weights and their scales, one for each `block` steps, as `ir.ops.coded` describes them.
    """

    bits: int
    block: int


@dataclass(frozen=True)
class View:
    """The bytes of operand 0 under another shape (reshape): no code unless the bytes must move."""


@dataclass(frozen=True)
class Contract:
    """A multiply-and-sum of operands 0 and 1. Where `tf32`, these are f32 that are tf32 numbers (`ir.ops.tf32`)."""

    spec: Contraction
    tf32: bool = False


@dataclass(frozen=True)
class Decompose:
    """Stands for other ops: `build(node)` gives the equivalent node (a tuple of nodes for several outputs)."""

    build: Callable[[Node], Node | tuple[Node, ...]]


@dataclass(frozen=True)
class Attention(Decompose):
    """Attention, which a device may have one kernel for; elsewhere it is taken apart by `build`.

    Operands and results are those of `ir.ops.attention`; `side` is '' forward, 'query' or 'keys' for the cotangents of these.
    """

    scale: float
    causal: bool
    side: str


@dataclass(frozen=True)
class Structural:
    """Handled by the graph machinery itself: input, constant, get, fused."""


# Control flow. The bodies are ordinary Graphs, whose inputs p0, p1, ... (role data) stand for operands; every pass runs on
# them as on the graph around them, so that at code generation a body holds fused regions and lowered ops as well.


@dataclass(frozen=True)
class Loop:
    """`length` runs of `body` one after the other, each on what the one before left in the carries.

    Operands: `carries` initial values, `sequences` arrays whose leading axis is `length`, then invariants. In step t the
    body's inputs are the carries, element t of each sequence (without the leading axis), and the invariants; its outputs are
    the new carries, then one value for each stacked result. Results: the last carries, then the stacked values [length, ...],
    those of step t at index t. `reverse` runs t from length - 1 down to 0. Zero steps give the initial carries and empty
    stacks. Without carries the steps are independent of each other and may run in any order, or at once. Where `small`, the
    loop is there to keep memory small: no pass may compute something for all steps at once.
    """

    body: Graph
    length: Dim
    carries: int
    sequences: int
    reverse: bool = False
    small: bool = False


@dataclass(frozen=True)
class Branch:
    """The results of `then` if operand 0 (a bool scalar) is true, else those of `orelse`: only that one runs.

    Both take the other operands as p0, p1, ... and give results of the same types.
    """

    then: Graph
    orelse: Graph


@dataclass(frozen=True)
class While:
    """`body` as long as `test` gives true, the test before the first run included.

    Operands: `carries` initial values, then invariants; both graphs take all of them. `test` gives a bool scalar, `body` the
    new carries. Results: the carries for which the test is false.
    """

    test: Graph
    body: Graph
    carries: int


Lowering = (
    Map | Reduce | Scan | Scatter | Sort | Sparse | Coded | View | Contract | Decompose | Structural | Loop | Branch | While
)
