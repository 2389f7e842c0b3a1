"""Brings the projection of a loop's inputs back into the loop, where a step has rows enough to make good use of its weights.

    gates = x @ wx + b;  scan(gates; f(gates[t] + h @ wh))   ->   scan(x; f([x[t], h] @ [wx; wh] + b))

One longer reduction in place of two: the projections of all steps are neither written to memory nor read back from there, and
a register tile starts and ends once. Where x is several arrays joined (both directions of the layer before), a step reads each of
them: they are never joined in memory. It is the opposite of `hoist`'s batching, and right where the weights of a step stay in L2
and every one of them meets several rows; with a single row the loop waits for weights, and has to read as few as it can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.contraction import Axis, Contraction, affine
from ..ir.graph import Graph, Label, Node
from ..ir.graphs import closed, rebuild
from ..ir.lowering import Loop, Map
from ..ir.op import Trait, make
from .bodies import has_control, invariants
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts, Term, derived
from .labels import finish

FEWEST_ROWS: Final = 6  # of a step, which share each weight that is read
SHARE: Final = 0.8  # of L2 that the weights of a step may take

Users = Mapping[Node, Sequence[Node]]


@dataclass(frozen=True)
class _Product:
    """A contraction of two matrices per step: its node, and where the axes are in its operands."""

    node: Node
    rows: str
    columns: str
    sums: str
    time: str
    spec: Contraction

    def operand(self, which: int, x: Node, order: Sequence[str]) -> Node:
        """Operand A (0) or B (1), for which `x` stands, with its dimensions in the order of these axes."""
        names = [m.terms[0][0] for m in (self.spec.a, self.spec.b)[which]]
        perm = tuple(names.index(n) for n in order)
        return x if perm == tuple(range(len(perm))) else make("transpose", x, perm=perm)


@dataclass(frozen=True)
class Sink(Pass):
    """Nothing without a target, whose cache says what fits."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with projections inside loops; the graph itself if there is none to move."""
        if ctx.target is None or not has_control(graph):
            return graph
        users = graph.users()
        done: dict[Node, Node] = {i: i for i in graph.inputs}
        labels: dict[Node, Label] = dict(graph.labels)
        for node in graph.nodes():
            if node in done:
                continue
            new = node.replace(tuple(done[i] for i in node.inputs))
            if node.op.has(Trait.CONTROL):
                new = _sunk(node, new, graph, users, done, ctx, int(ctx.target.l2 * SHARE)) or new
            done[node] = new
            if node in labels:
                labels.setdefault(new, labels[node])
        return finish(graph, [done[o] for o in graph.outputs], labels)


def _sunk(node: Node, new: Node, graph: Graph, users: Users, done: Mapping[Node, Node], ctx: Context, most: int) -> Node | None:
    """The loop `node`, which is `new` now, with the projection of one of its sequences inside; None where it has none."""
    low = node.op.lower(node)
    if not isinstance(low, Loop) or not low.carries or low.small:
        return None
    facts, body = ctx.facts, low.body
    inner_users = body.users()
    for q in range(low.carries, low.carries + low.sequences):
        outer, bias = _projection(node.inputs[q], node, graph, users, facts)
        inner = _addend(body.inputs[q], body, inner_users, invariants(node, body), facts)
        if outer is None or inner is None or outer.node.op is not inner.node.op:
            continue
        k, n = (outer.spec.axis(outer.sums).extent, inner.spec.axis(inner.sums).extent), inner.spec.axis(inner.columns).extent
        rows = inner.spec.axis(inner.rows).extent
        if not all(isinstance(d, int) for d in (*k, n, rows)):
            continue
        if rows < FEWEST_ROWS or (k[0] + k[1]) * n * inner.node.dtype.itemsize > most:  # type: ignore[operator]
            continue
        if not ctx.spend("sink_projection", node):
            return None
        return _inside(new, low, q, outer, inner, bias, done)
    return None


def _inside(new: Node, low: Loop, q: int, outer: _Product, inner: _Product, bias: Node | None, done: Mapping[Node, Node]) -> Node:
    body = low.body
    x = outer.operand(0, done[outer.node.inputs[0]], (outer.time, outer.rows, outer.sums))
    w = outer.operand(1, done[outer.node.inputs[1]], (outer.columns, outer.sums))
    joined = x.op.lower(x)
    parts = x.inputs if isinstance(joined, Map) and joined.joins == len(x.shape) - 1 else (x,)  # read where they lie
    steps = [make("input", name=f"sunk_x{k}", role="data", dtype=v.dtype, shape=v.shape[1:]) for k, v in enumerate(parts)]
    weights = make("input", name="sunk_w", role="data", dtype=w.dtype, shape=w.shape)
    a = make("concat", *steps, inner.operand(0, inner.node.inputs[0], (inner.rows, inner.sums)), axis=1)
    b = make("concat", weights, inner.operand(1, inner.node.inputs[1], (inner.columns, inner.sums)), axis=1)
    axes = (Axis("m", a.shape[0], "m"), Axis("n", b.shape[0], "n"), Axis("k", a.shape[1], "k"))
    spec = Contraction(axes, (affine("m"), affine("k")), (affine("n"), affine("k")), (affine("m"), affine("n")))
    total = make(inner.node.op, a, b, spec=spec)
    fixed, extra = [weights], [w]
    if bias is not None:
        fixed.append(make("input", name="sunk_b", role="data", dtype=bias.dtype, shape=bias.shape))
        extra.append(done[bias])
        total = make("add", total, make("broadcast_to", fixed[1], shape=total.shape))
    (sum_node,) = body.users()[body.inputs[q]]
    outputs = rebuild(body.outputs, {sum_node: total})
    inputs = [*body.inputs[:q], *steps, *body.inputs[q + 1 :], *fixed]
    operands = [*new.inputs[:q], *parts, *new.inputs[q + 1 :], *extra]
    labels = {**body.labels, **({total: body.labels[sum_node]} if sum_node in body.labels else {})}
    sequences = low.sequences + len(parts) - 1
    return make(new.op, *operands, **{**new.attrs, "body": closed(inputs, outputs, body.name, labels), "sequences": sequences})


def _product(node: Node, facts: Facts, rank: int) -> _Product | None:
    """A contraction of A (time, rows, sums), in any order and with time only for rank 3, and B (columns, sums) that gives
    (time, rows, columns)."""
    spec = spec_of(node, facts)
    if spec is None or spec.panel or "spec" not in node.attrs or len(node.inputs) != 2:
        return None
    if any(len(m.terms) != 1 or m.terms[0][1] != 1 or m.constant for m in (*spec.a, *spec.b, *spec.c)):
        return None
    a, b, c = ([m.terms[0][0] for m in maps] for maps in (spec.a, spec.b, spec.c))
    if len(c) != rank or len(set(a)) != rank or len(a) != rank or len(b) != 2:
        return None
    sums = [x for x in a if x not in c]
    if len(sums) != 1 or sorted(b) != sorted((sums[0], c[-1])) or c[-1] in a:
        return None
    return _Product(node, c[-2], c[-1], sums[0], c[0] if rank == 3 else "", spec)


def _only(users: Users, graph: Graph, node: Node, user: Node) -> bool:
    return list(users[node]) == [user] and node not in graph.outputs


def _projection(e: Node, loop: Node, graph: Graph, users: Users, facts: Facts) -> tuple[_Product | None, Node | None]:
    """A sequence that is a product for all steps, which nothing but the loop reads, and the row that is added to it if any."""
    if not _only(users, graph, e, loop) or list(loop.inputs).count(e) != 1:
        return None, None
    if (found := _product(e, facts, 3)) is not None:
        return found, None
    if facts.form(e) != "add":
        return None, None
    for p, other in (e.inputs, e.inputs[::-1]):
        read = facts.read(other)
        row = read is not None and read.index == (Term(2),) and other.inputs[read.operand].shape == e.shape[-1:]
        if row and read is not None and _only(users, graph, p, e) and (found := _product(p, facts, 3)) is not None:
            return found, other.inputs[read.operand]
    return None, None


def _addend(x: Node, body: Graph, users: Users, fixed: frozenset[Node], facts: Facts) -> _Product | None:
    """The product with weights of the loop that a step's slice of a sequence is added to, and nothing else done with either."""
    if len(users[x]) != 1 or x in body.outputs or facts.form(users[x][0]) != "add":
        return None
    total = users[x][0]
    other = total.inputs[1] if total.inputs[0] is x else total.inputs[0]
    if other is x or not _only(users, body, other, total):
        return None
    found = _product(other, facts, 2)
    return found if found is not None and derived(body.nodes(), fixed).get(found.node.inputs[1]) else None
