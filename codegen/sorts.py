"""Sorts: a merge sort of each row that keeps no more of a run than is asked for.

Level 0 holds runs of one element; a level merges pairs of runs from one scratch array into the other. Run r of length w
stands from position r * w on, of which the first min(w, count, elements there) are kept: rest can never be among the first
`count`. So a full sort costs n log2 n steps, the best `count` of n about n log2 count.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.dims import as_int
from ..ir.dtypes import i64
from ..ir.expr import Expr, binary, const, load, logical_not, maximum, minimum, select, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Sort
from ..ir.target import Target
from .groups import Body, Lowered, flat_index, lowered, static_shape
from .loop_ir import Alloc, Buffer, For, Let, Stmt, Store
from .maps import ranges_of
from .nests import Axis, parallel_nest, unit_axes
from .simplify_index import Simplifier

MERGE_NS = 3.0  # of one element in one level


def lower_sort(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of a sort: rows in threads, one row after the other in each."""
    body = Body(graph, aligns)
    node, form = body.sole(Sort)
    if body.outputs[0].span == 0:
        return lowered(body, name, [], doc="sort of nothing")
    kept, statements, used = sort_statements(body, node, form)
    n, count = static_shape(node.inputs[0])[form.axis], as_int(form.count)
    levels = (n - 1).bit_length()
    nested, parallel = parallel_nest(kept, statements, body.outputs[0].span // count * n * (levels + 1) * MERGE_NS)
    note = f"first {count} of {n}" if count < n else f"{n} a row"
    return lowered(body, name, nested, doc=f"sort along axis {form.axis}", workspaces=used, parallel=parallel, note=note)


def sort_statements(body: Body, node: Node, form: Sort) -> tuple[list[Axis], list[Stmt], list[Buffer]]:
    """The axes of rows, the statements that sort one, and the scratch arrays."""
    source = node.inputs[0]
    shape, n, count = static_shape(source), static_shape(source)[form.axis], as_int(form.count)
    rows = [Axis(var(f"i{k}"), m) for k, m in enumerate(shape) if k != form.axis]
    out = body.outputs[0]
    kept, fixed = unit_axes(rows)
    simplifier = Simplifier(ranges_of([*kept, Axis(var("e"), n)]))
    body.normal = simplifier.simplify
    outer = [fixed.get(a.var, a.var) for a in rows]
    row = simplifier.simplify(flat_index(outer, [m for k, m in enumerate(shape) if k != form.axis]))

    def index(e: Expr) -> list[Expr]:
        return [*outer[: form.axis], e, *outer[form.axis :]]

    total = out.span // count * n
    keys = [Buffer(f"keys{k}", source.dtype, (total,), align=64) for k in range(2)]
    places = [Buffer(f"places{k}", i64, (total,), align=64) for k in range(2)]
    start, e = binary("mul", row, n), var("e")
    at = binary("add", start, e)
    first = [Store(keys[0], (at,), body.value(source, index(e))), Store(places[0], (at,), e)]
    statements: list[Stmt] = [For(e, const(0), const(n), tuple(first))]
    level = 0
    while 1 << level < n:
        read, write = level % 2, (level + 1) % 2
        one = _Level(keys[read], places[read], keys[write], places[write], start, 1 << level, n, count, form.descending, level)
        statements += one.statements()
        level += 1
    there = simplifier.simplify(flat_index(index(e), static_shape(node)))
    result = Store(out, (there,), load(places[level % 2], (at,), i64))
    statements.append(For(e, const(0), const(count), (result,)))
    return kept, statements, [b for pair in (keys, places) for b in pair[: 1 + (level > 0)]]


class _Level:
    """Merges runs of `width` elements, of which at most `count` are kept, into runs of twice the width."""

    def __init__(
        self, keys: Buffer, places: Buffer, keys_out: Buffer, places_out: Buffer, start: Expr, width: int, n: int, count: int,
        descending: bool, level: int,
    ) -> None:  # fmt: skip
        self.keys, self.places, self.keys_out, self.places_out = keys, places, keys_out, places_out
        self.start, self.width, self.n, self.count = start, width, n, count
        self.descending, self.level = descending, level

    def statements(self) -> list[Stmt]:
        k, w, n = self.level, self.width, self.n
        run, m = var(f"run{k}"), var(f"m{k}")
        base, a_end, b_start, b_end, stop = (var(f"{word}{k}") for word in ("base", "a_end", "b_start", "b_end", "stop"))
        most = min(w, self.count)
        taken = Buffer(f"taken{k}", i64, (1,), scope="register", align=64)
        # how many of the first run are used up; of the second it is m less that
        low = var(f"low{k}")
        a = binary("add", base, low)
        b = binary("add", b_start, binary("sub", m, low))
        # A run that is used up is not read: the index is held inside it, and the select does not take what it gives.
        a_safe, b_safe = minimum(a, binary("sub", a_end, 1)), minimum(b, const(n - 1))
        a_key, b_key = (var(f"{word}{k}", self.keys.dtype) for word in ("a_key", "b_key"))
        from_b = var(f"from_b{k}", const(True, "bool").dtype)
        left_a, left_b = binary("lt", a, a_end), binary("lt", b, b_end)
        wins = binary("and", left_b, binary("or", logical_not(left_a), before(b_key, a_key, self.descending)))
        source = binary("add", self.start, select(from_b, b_safe, a_safe))
        target = binary("add", binary("add", self.start, base), m)
        step: list[Stmt] = [
            Let(low, load(taken, (const(0),), i64)),
            Let(a_key, load(self.keys, (binary("add", self.start, a_safe),), self.keys.dtype)),
            Let(b_key, load(self.keys, (binary("add", self.start, b_safe),), self.keys.dtype)),
            Let(from_b, wins),
            Store(self.keys_out, (target,), select(from_b, b_key, a_key)),
            Store(self.places_out, (target,), load(self.places, (source,), i64)),
            Store(taken, (const(0),), select(from_b, low, binary("add", low, 1))),
        ]
        both = binary("add", binary("sub", a_end, base), maximum(binary("sub", b_end, b_start), 0))
        body: list[Stmt] = [
            Let(base, binary("mul", run, 2 * w)),
            Let(a_end, minimum(binary("add", base, most), const(n))),
            Let(b_start, binary("add", base, w)),
            Let(b_end, minimum(binary("add", b_start, most), const(n))),
            Let(stop, minimum(both, const(self.count))),
            Alloc(taken),
            Store(taken, (const(0),), const(0)),
            For(m, const(0), stop, tuple(step)),
        ]
        return [For(run, const(0), const(-(-n // (2 * w))), tuple(body))]


def before(b: Expr, a: Expr, descending: bool) -> Expr:
    """Whether b comes strictly before a."""
    if a.dtype.name == "bool":
        return binary("and", b, logical_not(a)) if descending else binary("and", a, logical_not(b))
    wins = binary("lt", a, b) if descending else binary("lt", b, a)
    if not a.dtype.is_float:
        return wins
    x, y = (b, a) if descending else (a, b)  # x is NaN and y is not
    return binary("or", wins, binary("and", binary("ne", x, x), binary("eq", y, y)))


__all__ = ["lower_sort", "sort_statements"]
