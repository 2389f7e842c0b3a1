"""What passes know about a node, derived from its record's lowering and never from its name.

`Facts` computes each fact once per node and keeps it for the life of one pipeline run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..ir.dims import Dim
from ..ir.dtypes import DType
from ..ir.errors import ShapeError
from ..ir.expr import Expr, ExprLike, lift, load, postorder, var
from ..ir.graph import Graph, Literal, Node
from ..ir.lowering import (
    Attention,
    Branch,
    Coded,
    Contract,
    Decompose,
    Loop,
    Lowering,
    Map,
    Reduce,
    Scan,
    Scatter,
    Sort,
    Sparse,
    Structural,
    View,
    While,
)
from ..ir.op import Trait, make
from ..ir.ops.structural import CONSTANT, FUSED, GET, INPUT
from ..ir.types import TupleType


@dataclass(frozen=True, slots=True)
class Term:
    """The index of one operand dimension: `coefficient * out[axis] + constant`; `axis` None: the constant alone."""

    axis: int | None
    coefficient: int = 1
    constant: int = 0


IndexMap = tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """A movement that reads one operand at an affine index: out[idx] = operand[index(idx)], all in range."""

    operand: int
    index: IndexMap


_IDX: Final[dict[int, tuple[Expr, ...]]] = {}
_OPERANDS: Final[dict[tuple[int, DType], Expr]] = {}


def index_variables(rank: int) -> tuple[Expr, ...]:
    """The variables i0, i1, ... that stand for an output index."""
    if rank not in _IDX:
        _IDX[rank] = tuple(var(f"i{k}") for k in range(rank))
    return _IDX[rank]


def linear(e: Expr, axes: Mapping[Expr, int]) -> tuple[dict[int, int], int] | None:
    """e as (coefficient per axis, constant), or None where it is not an affine function of the variables `axes`."""
    done: dict[Expr, tuple[dict[int, int], int]] = {}
    for x in postorder([e]):
        if x in axes:
            done[x] = ({axes[x]: 1}, 0)
        elif x.is_const and isinstance(x.attr, int):
            done[x] = ({}, x.attr)
        elif x.op in ("add", "sub"):
            (left, c), (right, d) = done[x.args[0]], done[x.args[1]]
            sign = 1 if x.op == "add" else -1
            total = dict(left)
            for k, v in right.items():
                total[k] = total.get(k, 0) + sign * v
            done[x] = ({k: v for k, v in total.items() if v}, c + sign * d)
        elif x.op == "neg":
            terms, c = done[x.args[0]]
            done[x] = ({k: -v for k, v in terms.items()}, -c)
        elif x.op == "mul":
            (left, c), (right, d) = done[x.args[0]], done[x.args[1]]
            if left and right:
                return None
            terms, base, factor = (left, c, d) if left else (right, d, c)
            done[x] = ({k: v * factor for k, v in terms.items() if factor}, base * factor)
        else:
            return None
    return done[e]


class Facts:
    """Lowerings and what follows from them, remembered per node.

    `settled` holds, for a set of rules, the nodes to which none of them applies: rules see nothing but the node.
    """

    def __init__(self) -> None:
        self._lowering: dict[Node, Lowering] = {}
        self._scalar: dict[Node, Expr | None] = {}
        self._read: dict[Node, Read | None] = {}
        self._uniform: dict[Node, Node | None] = {}
        self._form: dict[Node, str] = {}
        self.settled: dict[object, set[Node]] = {}

    def lowering(self, node: Node) -> Lowering:
        """The record's lowering of the node."""
        found = self._lowering.get(node)
        if found is None:
            found = self._lowering[node] = node.op.lower(node)
        return found

    def elementwise(self, node: Node) -> bool:
        """Whether out[i] depends on the operands at i only."""
        low = self.lowering(node)
        return isinstance(low, Map) and low.elementwise

    def scalar(self, node: Node) -> Expr | None:
        """An elementwise op's meaning on scalars, over the variables x0, x1, ... for its operands; None for other ops."""
        if node in self._scalar:
            return self._scalar[node]
        if isinstance(node.type, TupleType):
            return None
        low, result = self.lowering(node), None
        if isinstance(low, Map) and low.elementwise:
            idx = index_variables(len(node.shape))

            def read(k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
                return operand(k, node)

            result = low.value(idx, read) if node.inputs else None
        self._scalar[node] = result
        return result

    def form(self, node: Node) -> str:
        """What rules are indexed by: the scalar operation of an elementwise op that is a single one of its operands in order
        ('add', 'select', ...), 'elementwise' for the others, 'movement' for affine reads and views, else `kind`."""
        found = self._form.get(node)
        if found is None:
            found = self._form[node] = self._find_form(node)
        return found

    def _find_form(self, node: Node) -> str:
        if not node.inputs or isinstance(node.type, TupleType):
            return self.kind(node)
        e = self.scalar(node)
        if e is not None:
            plain = len(e.args) == len(node.inputs) and all(a is operand(k, node) for k, a in enumerate(e.args))
            return e.op if plain and e.op != "cast" else "elementwise"
        kind = self.kind(node)
        return "movement" if kind == "view" or (kind == "map" and self.read(node) is not None) else kind

    def read(self, node: Node) -> Read | None:
        """The affine index map of a movement of one operand (transpose, slice, broadcast, ...; a reshape that only adds or
        drops dimensions of size 1); None for every other op."""
        if node in self._read:
            return self._read[node]
        self._read[node] = result = self._find_read(node)
        return result

    def _find_read(self, node: Node) -> Read | None:
        if not node.inputs or isinstance(node.type, TupleType) or node.op.has(Trait.BARRIER):
            return None
        low = self.lowering(node)
        if isinstance(low, View):
            return _unit_reshape(node)
        if not isinstance(low, Map) or not node.op.has(Trait.MOVEMENT) or low.elementwise:
            return None
        idx = index_variables(len(node.shape))
        try:
            value = low.value(idx, lambda k, index, mask=None: load(k, list(index), node.inputs[k].dtype, mask))
        except ShapeError:
            return None  # a symbolic dimension in an index: known to be a movement, not which
        if value.op != "load" or value.attr[1] != len(value.args):
            return None
        axes = {v: k for k, v in enumerate(idx)}
        k = value.attr[0]
        source = node.inputs[k].shape
        terms: list[Term] = []
        for e, size in zip(value.args, source, strict=True):
            found = linear(lift(e), axes)
            if found is None or len(found[0]) > 1:
                return None
            coefficients, constant = found
            if size == 1 or not coefficients:
                terms.append(Term(None, 0, 0 if size == 1 else constant))
                continue
            ((axis, coefficient),) = coefficients.items()
            terms.append(Term(None, 0, constant) if node.shape[axis] == 1 else Term(axis, coefficient, constant))
        return Read(k, tuple(terms))

    def uniform(self, node: Node) -> Node | None:
        """The 0-d constant that every element of the node equals, if it is one under nothing but movement; else None."""
        chain: list[Node] = []
        current = node
        while current not in self._uniform:
            chain.append(current)
            if current.op is CONSTANT:
                self._uniform[current] = _scalar_of(current)
                break
            if current.inputs and not isinstance(current.type, TupleType) and not current.op.has(Trait.BARRIER):
                low = self.lowering(current)
                if isinstance(low, View) or self.read(current) is not None:
                    read = self.read(current)
                    current = current.inputs[read.operand if read else 0]
                    continue
            self._uniform[current] = None
            break
        result = self._uniform[current]
        for n in chain:
            self._uniform[n] = result
        return result

    def value(self, node: Node) -> Any:
        """The Python number that every element of the node equals, or None where that is not known."""
        found = self.uniform(node)
        return None if found is None else found.attrs["value"].array.item()

    def replicates(self, node: Node) -> bool:
        """Whether it is a movement that reads some element more than once (a broadcast)."""
        read = self.read(node)
        if read is None:
            return False
        used = {t.axis for t in read.index}
        return any(size != 1 and axis not in used for axis, size in enumerate(node.shape))

    def is_marker(self, node: Node) -> bool:
        """An identity that only gradients need: a barrier that costs nothing to lose. One that is not CHEAP keeps a
        recomputed value apart, on purpose."""
        return len(node.inputs) == 1 and node.op.has(Trait.BARRIER) and node.op.has(Trait.CHEAP)

    def is_cheap(self, node: Node) -> bool:
        """Whether recomputing it costs no more than a load."""
        return node.op.has(Trait.CHEAP) and (not node.inputs or self.read(node) is not None or self.elementwise(node))

    def kind(self, node: Node) -> str:
        """One word for the form of a node's code: leaf, get, fused, map, reduce, scan, scatter, view, contract, decompose,
        control (loops and branches), attention, other (gradient and the like)."""
        if node.op is INPUT or node.op is CONSTANT:
            return "leaf"
        if node.op is GET:
            return "get"
        if node.op is FUSED:
            return "fused"
        if node.op.has(Trait.CONTROL):
            return "control"
        if isinstance(node.type, TupleType) and node.op.has(Trait.STRUCTURAL):
            return "other"
        low = self.lowering(node)
        for form, word in _WORDS:
            if isinstance(low, form):
                return word
        return "other"


_WORDS: Final = (
    (Attention, "attention"),
    (Map, "map"), (Reduce, "reduce"), (Scan, "scan"), (Scatter, "scatter"), (Sort, "sort"), (Sparse, "sparse"), (Coded, "coded"),
    (View, "view"),
    (Contract, "contract"), (Decompose, "decompose"), (Loop, "control"), (Branch, "control"), (While, "control"),
    (Structural, "other"),
)  # fmt: skip


def _scalar_of(node: Node) -> Node | None:
    """The 0-d constant that every element of a constant is, if it is small enough to look."""
    array = node.attrs["value"].array
    if not array.shape:
        return node
    if not 0 < array.size <= 4096:
        return None
    raw = array.reshape(-1).view(np.uint8).reshape(array.size, -1)
    return None if (raw != raw[0]).any() else make("constant", value=Literal(array.reshape(-1)[0], node.dtype))


def operand(k: int, node: Node) -> Expr:
    """The variable xk that `Facts.scalar` uses for operand k."""
    key = (k, node.inputs[k].dtype)
    found = _OPERANDS.get(key)
    if found is None:
        found = _OPERANDS[key] = var(f"x{k}", key[1])
    return found


def _unit_reshape(node: Node) -> Read | None:
    """A reshape that adds or drops dimensions of size 1 only: the others correspond in order."""
    source, target = node.inputs[0].shape, node.shape
    kept = [(axis, size) for axis, size in enumerate(target) if size != 1]
    if [s for s in source if s != 1] != [s for _, s in kept]:
        return None
    following = iter(kept)
    return Read(0, tuple(Term(None, 0, 0) if s == 1 else Term(next(following)[0]) for s in source))


def compose(outer: IndexMap, inner: IndexMap) -> IndexMap:
    """The map of inner read at outer: x[inner(outer(idx))]."""
    result: list[Term] = []
    for t in inner:
        if t.axis is None:
            result.append(t)
            continue
        o = outer[t.axis]
        constant = t.coefficient * o.constant + t.constant
        result.append(Term(None, 0, constant) if o.axis is None else Term(o.axis, t.coefficient * o.coefficient, constant))
    return tuple(result)


def size(node: Node) -> Dim:
    """Elements of a node, of all outputs together."""
    if isinstance(node.type, TupleType):
        total: Dim = 0
        for t in node.type.items:
            total = total + t.size
        return total
    return node.type.size


def constant_array(node: Node) -> Any:
    """The array of a constant node; None for any other."""
    value = node.attrs.get("value") if node.op is CONSTANT else None
    return value.array if isinstance(value, Literal) else None


def weights(graph: Graph) -> frozenset[Node]:
    """The inputs whose values stay the same from run to run: parameters, prepared values, and state that is not updated.

    Random state (a key) is used by random ops, which `derived` never follows.
    """
    updated = {graph.inputs[i] for _, i in graph.aliases}
    return frozenset(i for i in graph.inputs if i.attrs["role"] != "data" and i not in updated)


def derived(nodes: Iterable[Node], sources: frozenset[Node]) -> dict[Node, bool]:
    """The nodes that depend on `sources` and constants alone; the value says whether a source is among them."""
    result: dict[Node, bool] = {}
    for n in nodes:
        if n.op is INPUT:
            if n in sources:
                result[n] = True
        elif n.op.has(Trait.RANDOM):
            continue
        elif all(i in result for i in n.inputs):
            result[n] = any(result[i] for i in n.inputs)
    return result
