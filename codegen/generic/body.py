"""The body of a group over buffers of unknown size: what an element of a node is, with indices simplified symbolically."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir.dims import Dim
from ...ir.errors import CompileError
from ...ir.expr import Expr, load
from ...ir.graph import Graph, Node
from ...ir.lowering import Lowering, Reduce, View
from ..groups import Body
from ..loop_ir import Buffer
from .index import Space
from .loops import UNKNOWN


class UnsupportedError(CompileError):
    """A node that programs for every size do not carry."""


class GenericBody(Body):
    """`Body` with flat buffers of unknown extent and indices over a Space."""

    refusal = UnsupportedError

    def __init__(self, graph: Graph, aligns: Sequence[int]) -> None:
        self.graph = graph
        self.space = Space()
        self.operand = {n: i for i, n in enumerate(graph.inputs)}
        self.aligns = tuple(aligns)
        after = len(graph.inputs)
        self.buffers = [Buffer(f"p{k}", n.dtype, (UNKNOWN,), align=aligns[k], writable=False) for k, n in enumerate(graph.inputs)]
        self.constants: dict[Node, Buffer] = {}
        self.outputs = [Buffer(f"y{k}", n.dtype, (UNKNOWN,), align=aligns[after + k]) for k, n in enumerate(graph.outputs)]
        self.workspaces: list[tuple[Buffer, Dim]] = []  # arrays of a run, and their elements
        self.reduced: Callable[[Node, Reduce, tuple[Expr, ...], Expr | None], Expr | None] | None = None
        self.bound: Callable[[Node, tuple[Expr, ...]], Expr | None] | None = None
        self.normal: Callable[[Expr], Expr] = self.space.simplify
        self._lowering: dict[Node, Lowering] = {}
        self._immediate: dict[Node, Expr | None] = {}
        self._memo: dict[tuple[Node, tuple[Expr, ...], Expr | None], Expr] = {}

    def extents(self, shape: Sequence[Dim]) -> tuple[Dim, ...]:
        return self.space.sizes(shape)

    def flat(self, node: Node, index: Sequence[Expr]) -> Expr:
        """The position of an element of a node."""
        return self.space.flat(index, self.extents(node.shape))

    def _value(self, node: Node, form: Lowering | None, at: tuple[Expr, ...], mask: Expr | None) -> Expr:
        if isinstance(form, View):
            source = node.inputs[0]
            return self.value(source, self.space.unflat(self.flat(node, at), self.extents(source.shape)), mask)
        return super()._value(node, form, at, mask)

    def _load(self, buffer: Buffer, node: Node, at: tuple[Expr, ...], mask: Expr | None) -> Expr:
        return load(buffer, (self.flat(node, at),), node.dtype, mask)

    def _constant(self, node: Node, at: tuple[Expr, ...], mask: Expr | None) -> Expr:
        known = node in self.constants
        found = super()._constant(node, at, mask)
        if not known and node in self.constants:  # made with its size; what is read is at positions over symbols
            b = self.constants[node]
            self.constants[node] = Buffer(b.name, b.dtype, (UNKNOWN,), align=b.align, writable=False)
            found = self._load(self.constants[node], node, at, mask)
        return found

    def source(self, node: Node) -> Buffer:
        """The memory that a node is, behind views. Raises UnsupportedError if it is computed in the body."""
        while node not in self.operand:
            if node.inputs and isinstance(self.lowering(node), View):
                node = node.inputs[0]
                continue
            if not node.inputs and "value" in node.attrs:
                if node not in self.constants:
                    size = UNKNOWN
                    self.constants[node] = Buffer(f"k{len(self.constants)}", node.dtype, (size,), align=64, writable=False)
                return self.constants[node]
            raise UnsupportedError(f"{node.op.name} {node.type} stands between memory and a contraction")
        return self.buffers[self.operand[node]]
