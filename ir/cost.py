"""What a node costs: arithmetic operations and bytes moved, from its lowering. Sizes must be numbers."""

from __future__ import annotations

from dataclasses import dataclass

from .dims import as_int, product
from .expr import Expr, postorder, var
from .graph import Graph, Node
from .lowering import Branch, Coded, Contract, Decompose, Loop, Map, Reduce, Scan, Scatter, Sort, Sparse, Structural, View, While
from .op import Trait
from .types import TupleType


@dataclass(frozen=True, slots=True)
class Cost:
    """`flops`: arithmetic operations, a transcendental counted as one. `read`, `written`: bytes of operands and results."""

    flops: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)

    @property
    def bytes(self) -> int:
        return self.read + self.written


def node_bytes(node: Node) -> int:
    """Bytes of the node's results. Raises ShapeError when a size is symbolic."""
    return sum(t.nbytes for t in (node.type.items if isinstance(node.type, TupleType) else (node.type,)))


def moved(node: Node) -> int:
    """Bytes of a kernel's operands, each read once, and of its results. Raises ShapeError when a size is symbolic."""
    return sum(map(node_bytes, set(node.inputs))) + node_bytes(node)


def node_cost(node: Node) -> Cost:
    """The cost of one node run as a kernel of its own: operands read once, results written once.

    A fused region counts the arithmetic of its body, and moves only its operands and results. A loop costs what its body
    does, as often as it runs (a loop until a test fails: one run), a branch what the costlier of its bodies does. A view, an
    input, a constant and a part of a tuple cost nothing. Raises ShapeError when a size is symbolic.
    """
    body = node.attrs.get("body")
    if isinstance(body, Graph) and not node.op.has(Trait.CONTROL):
        flops = sum(node_cost(n).flops for n in body.nodes())
        return Cost(flops, sum(map(node_bytes, set(node.inputs))), node_bytes(node))
    low = node.op.lower(node)
    if isinstance(low, Structural | View):
        return Cost()
    if isinstance(low, Loop | Branch | While):
        return _control(low)
    if isinstance(low, Decompose):
        built = low.build(node)
        roots = built if isinstance(built, tuple) else (built,)
        return sum((node_cost(n) for n in _between(roots, node.inputs)), Cost())
    return Cost(_flops(node, low), sum(map(node_bytes, set(node.inputs))), node_bytes(node))


def _control(low: Loop | Branch | While) -> Cost:
    match low:
        case Loop(body, length):
            return _times(graph_cost(body), as_int(length))
        case Branch(then, orelse):
            return max(graph_cost(then), graph_cost(orelse), key=lambda c: (c.flops, c.bytes))
        case While(test, body):
            return graph_cost(test) + graph_cost(body)


def _times(cost: Cost, runs: int) -> Cost:
    return Cost(cost.flops * runs, cost.read * runs, cost.written * runs)


def graph_cost(graph: Graph) -> Cost:
    """The sum over the nodes of a graph."""
    return sum((node_cost(n) for n in graph.nodes()), Cost())


def _between(roots: tuple[Node, ...], stops: tuple[Node, ...]) -> list[Node]:
    found: dict[Node, None] = {}
    stack, edge = list(roots), set(stops)
    while stack:
        node = stack.pop()
        if node not in edge and node not in found:
            found[node] = None
            stack += node.inputs
    return list(found)


def _flops(node: Node, low: Map | Reduce | Scan | Scatter | Sort | Sparse | Coded | Contract) -> int:
    size = as_int(product(node.shape))

    def load(k: int, index: object, mask: Expr | None = None) -> Expr:
        return Expr("var", (), node.inputs[k].dtype, 1, f"operand{k}")

    def indices(count: int, name: str) -> tuple[Expr, ...]:
        return tuple(var(f"{name}{i}") for i in range(count))

    match low:
        case Contract(spec):
            return spec.flops
        case Map(value, _, together):
            return size * _arithmetic(value(indices(len(node.shape), "i"), load)) // together
        case Reduce(_, extents, value):
            inner = _arithmetic(value(indices(len(node.shape), "i"), indices(len(extents), "r"), load))
            return size * as_int(product(extents)) * (inner + 1)
        case Scan():
            return size
        case Sort():  # comparisons of a merge sort
            n = as_int(product(node.inputs[0].shape))
            return n * max(1, as_int(low.count).bit_length())
        case Sparse():
            return 2 * as_int(product(node.shape[:-1])) * as_int(product(node.inputs[1].shape))
        case Coded():
            return 2 * size * as_int(node.inputs[0].shape[-1])
        case Scatter(extents, _, value):
            return as_int(product(extents)) * (1 + _arithmetic(value(indices(len(extents), "u"), load)))


def _arithmetic(value: Expr) -> int:
    """Operations on values; those on i64 are index arithmetic and are not counted, nor are loads and constants."""
    free = {"const", "var", "load", "cast", "bitcast", "ramp", "broadcast"}
    total = 0
    for e in postorder([value]):
        if e.op not in free and not (e.args and all(a.dtype.name == "i64" for a in e.args)):
            total += 2 if e.op == "fma" else 1
    return total
