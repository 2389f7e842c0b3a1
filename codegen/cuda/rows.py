"""Row kernels: softmax, norms and their gradients. A warp takes a row, or a block where rows are long.

Each reduction of a row ends a walk over it; what the next walk needs again it computes again (the row is in the cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from ...ir.errors import CompileError
from ...ir.expr import Expr, binary, cast, const, eq, load, var
from ...ir.graph import Graph, Node
from ...ir.target import Target
from ..accumulate import POSITIONS
from ..groups import Lowered, accumulator, body_name, combine, flat_index, identity, is_constant, lowered, static_shape
from ..loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from ..maps import ranges_of
from ..nests import Axis, unit_axes
from ..rows import RowBody
from ..simplify_index import Simplifier
from .grid import BLOCK, TX, Names, block_tree, places, warp_tree
from .machine import WARP
from .reduces import group_launch, lower_threads
from .thread import ZERO

LONG: Final = 1024  # elements of a row from which on a block takes it


class _Rows:
    def __init__(self, graph: Graph, aligns: Sequence[int]) -> None:
        self.r = RowBody(graph, aligns)
        self.row_axes = [Axis(var(f"r{k}"), n) for k, n in enumerate(self.r.rows)]
        self.column_axes = [Axis(var(f"c{k}"), n) for k, n in enumerate(self.r.columns)]
        self.kept, fixed = unit_axes([*self.row_axes, *self.column_axes])
        self.row_at = tuple(fixed.get(a.var, a.var) for a in self.row_axes)
        self.column_at = tuple(fixed.get(a.var, a.var) for a in self.column_axes)
        self.simplifier = Simplifier(ranges_of(self.kept))
        self.r.body.normal = self.simplifier.simplify
        self.r.body.bound = self.bound
        self.scalars: dict[Node, Expr] = {}
        self.lets: list[Stmt] = []
        self.names = Names()
        self.busy: set[Node] = set()
        self.count = prod(self.r.columns)
        self.threads = WARP if self.count < LONG else BLOCK
        self.lane = binary("mod", TX, WARP) if self.threads == WARP else TX

    def bound(self, node: Node, at: tuple[Expr, ...]) -> Expr | None:
        """A row's scalar, where that is what is asked for: a variable, bound before the walk."""
        r = self.r
        if node not in r.reduces and (not r.is_row(node) or node in self.busy or is_constant(node)):
            return None
        if at != r.row_index(node, self.row_at):
            if node in r.reduces:
                raise CompileError(f"{node.op.name} {node.type} in a row region is read at another row than its own")
            return None
        found = self.scalars.get(node)
        if found is None:
            if node in r.reduces:
                raise CompileError(f"{node.op.name} {node.type} in a row region is read before it is reduced")
            self.busy.add(node)
            value = r.body.value(node, at)
            found = value if value.is_const else var(self.names("s"), node.dtype)
            if not value.is_const:
                self.lets.append(Let(found, value))
            self.scalars[node] = found
        return found

    def walk(self, reduces: Sequence[Node], outputs: Sequence[int]) -> list[Stmt]:
        """One walk over the row: what it reduces, and the outputs it stores."""
        r, body = self.r, self.r.body
        body.forget()
        values: list[Expr] = []
        for n in reduces:
            index = r.row_index(n, self.row_at)
            values.append(r.reduces[n].value(index, self.column_at, body.reader(n)))
        whole: list[Stmt] = []
        single: list[Stmt] = []
        for k in outputs:
            node = r.graph.outputs[k]
            if r.is_row(node):
                at = r.row_index(node, self.row_at)
                place = self.simplifier.simplify(flat_index(at, static_shape(node)))
                single.append(Store(body.outputs[k], (place,), body.value(node, at)))
            else:
                at = (*self.row_at, *self.column_at)
                place = self.simplifier.simplify(flat_index(at, static_shape(node)))
                whole.append(Store(body.outputs[k], (place,), body.value(node, at)))
        done, self.lets = self.lets, []
        accs: list[Buffer] = []
        inner: list[Stmt] = []
        for n, v in zip(reduces, values, strict=True):
            held = accumulator(v.dtype)
            acc = Buffer(self.names("acc"), held, (1,), scope="register", align=16)
            accs.append(acc)
            kind = r.reduces[n].kind
            done += [Alloc(acc), Store(acc, ZERO, identity(kind, held))]
            inner.append(Store(acc, ZERO, combine(kind, load(acc, ZERO, held), cast(v, held))))
        if inner or whole:
            q = var("q")
            stored = [s for s in whole if isinstance(s, Store)]
            named = [var(self.names("t"), s.value.dtype) for s in stored]  # every value is read before anything is written
            lets: list[Stmt] = [Let(n, s.value) for n, s in zip(named, stored, strict=True)]
            stores: list[Stmt] = [Store(s.buffer, s.index, n) for n, s in zip(named, stored, strict=True)]
            step = [*places(q, [a for a in self.kept if a in self.column_axes]), *inner, *lets, *stores]
            done.append(For(q, self.lane, const(self.count), tuple(step), "serial", self.threads))
        kinds = [r.reduces[n].kind for n in reduces]
        found: list[Expr] = [load(a, ZERO, a.dtype) for a in accs]
        if self.threads == WARP:
            for k, kind in enumerate(kinds):
                lets, found[k] = warp_tree(kind, found[k], self.names)
                done += lets
        elif found:
            lets, found = block_tree(kinds, found, self.threads, self.names)
            done += lets
        for n, v in zip(reduces, found, strict=True):
            self.scalars[n] = var(self.names("s"), n.dtype)
            done.append(Let(self.scalars[n], cast(v, n.dtype)))
        if single:
            done.append(If(eq(self.lane, const(0)), tuple(single)))
        return done


def lower_rows(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launch of a row group."""
    state = _Rows(graph, aligns)
    r = state.r
    if any(f.kind in POSITIONS for f in r.reduces.values()) or not prod(r.full):
        return lower_threads(graph, target, name, aligns)
    statements: list[Stmt] = []
    for level in range(max(r.level.values()) + 1):
        reduces = [n for n in r.reduces if r.level[n] == level + 1]
        outputs = [k for k, n in enumerate(graph.outputs) if r.level[n] == level]
        if reduces or outputs:
            statements += state.walk(reduces, outputs)
    rows = [a for a in state.kept if a in state.row_axes] or [Axis(var("one"), 1)]
    note = f"{'a warp' if state.threads == WARP else 'a block'} for each row of {state.count}"
    made = group_launch(rows, statements, state.threads)
    return lowered(r.body, name, [made], doc=f"rows: {body_name(graph)}", parallel=True, note=note)


__all__ = ["lower_rows"]
