"""Columns of a contraction in groups: whose tiles hold the same columns of all groups, so that what joins them is its epilogue.

    y = a @ w;  f(y[..., :U], y[..., U:2*U], ...)        contract{n: G * U}  ->  contract{n: G * U; groups = G}

Nothing changes but the order of the columns in a packed B (see `Contraction.groups`): a panel holds some columns of every
group, the four gates of a recurrent cell's units, for instance, which a register tile then ends with, and `fuse` makes what
joins them its epilogue. Only for a B that is packed beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from ..ir.contraction import Contraction
from ..ir.dims import Dim, as_int
from ..ir.graph import Graph, Node
from ..ir.target import Target
from ..ir.types import TupleType
from .contract_form import spec_of
from .facts import Facts, IndexMap, Term
from .labels import finish

MOST_GROUPS: Final = 8


def grouped(graph: Graph, fixed: Mapping[Node, bool], target: Target, facts: Facts) -> Graph:
    """The graph with grouped columns wherever all that reads a product with weights reads whole groups of its columns."""
    found: dict[Node, Contraction] = {}
    users = graph.users()
    for node in graph.nodes():
        spec = spec_of(node, facts) if "spec" in node.attrs else None
        if spec is None or spec.panel or len(node.inputs) != 2 or fixed.get(node.inputs[1]) is not True:
            continue
        count = _groups(node, graph, users, facts) if _plain(spec) else 0
        if count and as_int(spec.size("n")) // count % target.lanes(32) == 0:
            found[node] = replace(spec, groups=count)
    if not found:
        return graph
    done: dict[Node, Node] = {i: i for i in graph.inputs}
    labels = dict(graph.labels)
    for node in graph.nodes():
        if node not in done:
            new_node = node.replace(tuple(done[i] for i in node.inputs))
            done[node] = new_node.replace(spec=found[node]) if node in found else new_node
            if node in labels:
                labels.setdefault(done[node], labels[node])
    return finish(graph, [done[o] for o in graph.outputs], labels)


def _groups(core: Node, graph: Graph, users: Mapping[Node, Sequence[Node]], facts: Facts) -> int:
    """How many groups the columns of a result come in; 0 where something reads it otherwise."""
    if not core.shape or not isinstance(core.shape[-1], int):
        return 0
    total, widths = core.shape[-1], set[int]()
    pending, seen = [core], {core}
    while pending:
        n = pending.pop()
        if n in graph.outputs:
            return 0
        for u in users[n]:
            if isinstance(u.type, TupleType) or u in seen:
                continue
            if (width := columns_of(u, n, facts)) is not None:
                if u in graph.outputs or not all(facts.elementwise(v) and v.shape == u.shape for v in users[u]):
                    return 0
                widths.add(width)
            elif facts.elementwise(u) and u.shape == core.shape:
                seen.add(u)
                pending.append(u)
            else:
                return 0
    if len(widths) != 1:
        return 0
    count = total // widths.pop()
    return count if 2 <= count <= MOST_GROUPS else 0


def columns_of(node: Node, source: Node, facts: Facts) -> int | None:
    """The width of the whole group of columns of `source` that a slice is; None for anything else."""
    read = facts.read(node)
    if read is None or node.inputs[read.operand] is not source or len(node.shape) != len(source.shape):
        return None
    width, total = node.shape[-1], source.shape[-1]
    if not isinstance(width, int) or not isinstance(total, int) or width in (0, total) or total % width:
        return None
    return width if node.shape[:-1] == source.shape[:-1] and group_of(read.index, node.shape) is not None else None


def group_of(index: IndexMap, shape: Sequence[Dim]) -> int | None:
    """The group of columns that a tensor of the shape of one group reads at the index of its own column; None for another map."""
    last, width = index[-1], shape[-1]
    own = all(t == Term(k) or (shape[k] == 1 and t == Term(None, 0, 0)) for k, t in enumerate(index[:-1]))
    if not own or not isinstance(width, int) or (last.axis, last.coefficient) != (len(index) - 1, 1):
        return None
    return last.constant // width if last.constant % width == 0 and last.constant >= 0 else None


def _plain(spec: Contraction) -> bool:
    """Whether the columns are one axis, and the last dimension of the result."""
    columns = spec.of_kind("n")
    return len(columns) == 1 and spec.c[-1].terms == ((columns[0].name, 1),) and not spec.c[-1].constant


def whole_groups(spec: Contraction, panel: int, target: Target) -> bool:
    """Whether panels of a width hold whole vectors of the columns of each group."""
    width, columns = panel // spec.groups, as_int(spec.size("n"))
    return panel % spec.groups == 0 and width % target.lanes(32) == 0 and columns % panel == 0
