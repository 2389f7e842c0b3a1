"""Row kernels: softmax, norms and their gradients. Each row is walked a few times while it stays in the L1 cache.

The body is cut into passes: a reduction ends a pass, what depends on its result waits for the next one. A value that a
later pass needs again is computed anew where that is cheap and kept in a scratch row where it is not (an exp).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final

import numpy as np

from ..ir.errors import CompileError
from ..ir.expr import Expr, binary, broadcast, cast, const, load, postorder, rewrite, substitute, unary, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Reduce
from ..ir.target import Target
from .accumulate import POSITIONS, Accumulator
from .groups import Body, Lowered, body_name, cost, flat_index, is_constant, lanes_for, lowered, static_shape
from .loop_ir import Alloc, Buffer, If, Let, Prefetch, Stmt, Store, vector_variable
from .maps import BYTES_PER_NS, CYCLE_NS, Box, merge_axes, ranges_of, stride_along
from .nests import PARALLEL_NS, Axis, Spot, VectorLoop, has_masks, nest, parallel_nest, share, unit_axes, widen
from .row_maximum import Code, Item, use_maximum
from .row_pipeline import fits, pipelined
from .simplify_index import Simplifier

KEEP_COST: Final = 8  # instructions above which a value is kept rather than computed again
SCRATCH_BYTES: Final = 128 * 1024


@dataclass
class Pass:
    """One walk over a row: `reduces` are finished by it, `saves` kept in scratch rows, `outputs` (by number) stored."""

    reduces: list[Node] = field(default_factory=list)
    saves: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


class RowBody:
    """The body of a row group, analysed: shapes, levels, passes."""

    def __init__(self, graph: Graph, aligns: Sequence[int] = ()) -> None:
        self.graph = graph
        self.body = Body(graph, aligns)
        inner = [n for n in graph.nodes() if n not in self.body.operand and n.inputs]
        self.reduces = {n: form for n in inner if isinstance(form := self.body.lowering(n), Reduce) and form.axes is not None}
        first = next(iter(self.reduces), None)
        if first is None:
            raise CompileError(f"a row region needs a reduction over trailing axes; this one has {body_name(graph)}")
        self.full = static_shape(first.inputs[0])
        axes = self.reduces[first].axes or ()
        self.split = len(self.full) - len(axes)
        for n, form in self.reduces.items():
            if static_shape(n.inputs[0]) != self.full or form.axes != tuple(range(self.split, len(self.full))):
                raise CompileError(
                    f"{n.op.name} {n.type} in a row region reduces axes {form.axes} of {n.inputs[0].type}, where the region's "
                    f"rows are the last {len(axes)} axes of {self.full}; leave it outside the region"
                )
        self.rows, self.columns = self.full[: self.split], self.full[self.split :]
        self.level: dict[Node, int] = {}
        for n in graph.nodes():
            below = max((self.level[i] for i in n.inputs), default=0)
            self.level[n] = below + 1 if n in self.reduces else below
        self.row_shapes = (self.rows, self.rows + (1,) * len(self.columns))

    def is_row(self, node: Node) -> bool:
        """Whether a node has one value per row."""
        return static_shape(node) in self.row_shapes and static_shape(node) != self.full

    def row_index(self, node: Node, rows: Sequence[Expr]) -> tuple[Expr, ...]:
        """The index of a row's value of a per-row node."""
        return (*rows, *(const(0) for _ in range(len(static_shape(node)) - self.split)))


class _Lowering:
    """State of one lowering: what is bound to a variable or kept in a scratch row so far."""

    def __init__(self, graph: Graph, target: Target, aligns: Sequence[int]) -> None:
        self.r = RowBody(graph, aligns)
        self.target = target
        self.row_axes = [Axis(var(f"r{k}"), n) for k, n in enumerate(self.r.rows)]
        self.column_axes = [Axis(var(f"c{k}"), n) for k, n in enumerate(self.r.columns)]
        self.kept, fixed = unit_axes([*self.row_axes, *self.column_axes])
        self.row_at = tuple(fixed.get(a.var, a.var) for a in self.row_axes)
        self.column_at = tuple(fixed.get(a.var, a.var) for a in self.column_axes)
        self.simplifier = Simplifier(ranges_of(self.kept))
        self.r.body.normal = self.simplifier.simplify
        self.r.body.bound = self.bound
        self.scalars: dict[Node, Expr] = {}
        self.lets: list[tuple[Expr, Expr]] = []
        self.numbers = count()  # of names: the lets of all passes stand in one block
        self.busy: set[Node] = set()
        self.scratch: dict[Node, tuple[Buffer, Expr]] = {}  # where a value is kept: an array, and the flat index there
        self.saved: set[Node] = set()

    def full_index(self) -> tuple[Expr, ...]:
        return (*self.row_at, *self.column_at)

    def bound(self, node: Node, at: tuple[Expr, ...]) -> Expr | None:
        """What is known of a node's element: a row's scalar, or an element of a scratch row."""
        r = self.r
        if node in self.saved and at == self.full_index():
            b, place = self.scratch[node]
            return load(b, (place,), b.dtype)
        if node in r.reduces or (r.is_row(node) and node not in self.busy and not is_constant(node)):
            if at != r.row_index(node, self.row_at):
                if node in r.reduces:
                    raise CompileError(f"{node.op.name} {node.type} in a row region is read at another row than its own")
                return None
            found = self.scalars.get(node)
            if found is None:
                if node in r.reduces:
                    raise CompileError(f"{node.op.name} {node.type} in a row region is read before it is reduced")
                self.busy.add(node)
                value = self.r.body.value(node, at)
                found = value if value.is_const else var(f"s{next(self.numbers)}", node.dtype)
                if not value.is_const:
                    self.lets.append((found, value))
                self.scalars[node] = found
            return found
        return None

    def take_lets(self) -> list[tuple[Expr, Expr]]:
        done, self.lets = self.lets, []
        return done


def plan_passes(r: RowBody, target: Target) -> list[Pass]:
    """The passes over a row, in order."""
    levels = max(r.level.values()) + 1
    passes = [Pass() for _ in range(levels)]
    roots: list[list[Node]] = [[] for _ in range(levels)]
    for n in r.reduces:
        passes[r.level[n] - 1].reduces.append(n)
        roots[r.level[n] - 1].append(n.inputs[0])
    for k, n in enumerate(r.graph.outputs):
        passes[r.level[n]].outputs.append(k)
        if not r.is_row(n):
            roots[r.level[n]].append(n)
    prices = _prices(r)
    needed: list[set[Node]] = [set() for _ in range(levels)]
    room = SCRATCH_BYTES
    saved: dict[Node, int] = {}
    for p in range(levels):
        stack = list(roots[p])
        while stack:
            n = stack.pop()
            if n in needed[p] or n in r.body.operand or not n.inputs or n in r.reduces or r.is_row(n):
                continue
            earlier = next((q for q in range(p) if n in needed[q]), None)
            if earlier is not None and n not in saved and prices[n] > KEEP_COST and static_shape(n) == r.full:
                size = int(np.prod(r.columns, dtype=np.int64)) * n.dtype.itemsize
                if size <= room:
                    room -= size
                    saved[n] = earlier
                    passes[earlier].saves.append(n)
            if n in saved and saved[n] < p:
                continue
            needed[p].add(n)
            stack += n.inputs
    return passes


def _prices(r: RowBody) -> dict[Node, int]:
    """What computing each node from operands and row scalars costs, shared parts counted each time."""
    prices: dict[Node, int] = {}
    for n in r.graph.nodes():
        if n in r.body.operand or not n.inputs or n in r.reduces or r.is_row(n):
            prices[n] = 0
            continue
        own = 1
        form = r.body.lowering(n)
        if hasattr(form, "value") and not isinstance(form, Reduce):
            dummies = tuple(var(f"d{k}") for k in range(len(n.shape)))
            own = cost([form.value(dummies, lambda k, index, mask=None, n=n: var(f"x{k}", n.inputs[k].dtype))])
        prices[n] = own + sum(prices[i] for i in n.inputs)
    return prices


def lower_rows(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of a row group. Raises CompileError for a body that is not one."""
    state = _Lowering(graph, target, aligns)
    r, body = state.r, state.r.body
    passes = plan_passes(r, target)
    columns = int(np.prod(r.columns, dtype=np.int64))
    # Expressions first, so that all indices can be merged together; then the statements.
    plans: list[Code] = []
    dtypes = [n.dtype for n in graph.nodes() if static_shape(n) == r.full]
    lanes = lanes_for(target, dtypes)
    while lanes > 1 and lanes // 2 >= columns:
        lanes //= 2
    place = state.simplifier.simplify(flat_index(state.column_at, r.columns))
    _places(state, passes, place)
    position = 0
    for p in passes:
        body.forget()
        stores: list[Item] = []
        for n in p.saves:
            stores.append((*state.scratch[n], body.value(n, state.full_index())))
        scalar_stores: list[Item] = []
        for k in p.outputs:
            n = graph.outputs[k]
            at = r.row_index(n, state.row_at) if r.is_row(n) else state.full_index()
            item = (body.outputs[k], state.simplifier.simplify(flat_index(at, static_shape(n))), body.value(n, at))
            (scalar_stores if r.is_row(n) else stores).append(item)
        values = [(n, r.reduces[n], _reduced_value(state, n)) for n in p.reduces]
        work = cost([v for _, _, v in values] + [v for _, _, v in stores])
        most = 8 if target.registers >= 32 else 4
        units = max(1, (most if work <= 12 * max(1, len(values)) else 4) // max(1, len(values)))
        accumulators = [
            Accumulator(f"m{position + i}", form.kind, v, n.dtype, lanes, units, place if form.kind in POSITIONS else None)
            for i, (n, form, v) in enumerate(values)
        ]
        position += len(values)
        plans.append((state.take_lets(), stores, accumulators, scalar_stores))
        state.saved.update(p.saves)
        for n, acc in zip(p.reduces, accumulators, strict=True):
            state.scalars[n] = var(f"{acc.name}", n.dtype)
    results = [bool(p.outputs) for p in passes]
    return _emit(state, use_maximum(plans, results), name, lanes, columns)


def _places(state: _Lowering, passes: Sequence[Pass], place: Expr) -> None:
    """Where values are kept between passes: in the row of an output that the last pass overwrites, or in an array of our own.

    The output's row is then fetched into the cache while something is computed, not when there is nothing but stores.
    """
    r = state.r
    outputs = [k for k in passes[-1].outputs if static_shape(r.graph.outputs[k]) == r.full]
    direct = has_masks(state.target, [n.dtype for n in r.graph.nodes()]) and not _far(state)
    row = state.simplifier.simplify(flat_index(state.full_index(), r.full))
    for p in passes[:-1]:
        for n in p.saves:
            fits = (k for k in outputs if r.graph.outputs[k].dtype is n.dtype)
            k = next(fits, None) if direct else None  # a tail that overlaps would take the new value for the kept one
            if k is not None:
                outputs.remove(k)
                state.scratch[n] = (r.body.outputs[k], row)
            else:
                columns = int(np.prod(r.columns, dtype=np.int64))
                own = Buffer(f"kept{len(state.scratch)}", n.dtype, (columns,), scope="local", align=64)
                state.scratch[n] = (own, place)


def _far(state: _Lowering) -> bool:
    """Whether the outputs are streamed past the cache."""
    return sum(b.span * b.dtype.itemsize for b in state.r.body.outputs) >= 2 * state.target.l3


def _reduced_value(state: _Lowering, node: Node) -> Expr:
    """What a reduction of the region adds up at the row and column variables."""
    body, form = state.r.body, state.r.reduces[node]
    return state.simplifier.simplify(form.value(state.r.row_index(node, state.row_at), state.column_at, body.reader(node)))


def _emit(
    state: _Lowering,
    plans: list[Code],
    name: str,
    lanes: int,
    columns: int,
) -> Lowered:
    body, target = state.r.body, state.target
    everything = [e for lets, stores, accs, ends in plans for e in _expressions(lets, stores, accs, ends)]
    sink = Buffer("all", state.r.graph.outputs[0].dtype, (1,))
    merged, put = _merge(state, everything, sink)
    row_vars = {a.var for a in state.row_axes}
    rows = [a for a in merged.axes if a.var in row_vars]
    inner = [a for a in merged.axes if a.var not in row_vars] or [Axis(var("c"), 1)]
    scratch = [b for b, _ in state.scratch.values() if b.scope == "local"]
    used = {e.attr[0] for e in _loads(everything)} | set(body.outputs) | set(scratch)
    masks = has_masks(target, [b.dtype for b in used])
    numbers = count()
    how = _Columns(merged, tuple(inner), lanes, "mask" if masks else "overlap", _far(state), target.line)
    plans = [
        (
            [(v, put(e)) for v, e in lets],
            [(b, put(i), put(v)) for b, i, v in stores],
            [replace(a, value=put(a.value), place=None if a.place is None else put(a.place)) for a in accs],
            [(b, put(i), put(v)) for b, i, v in ends],
        )
        for lets, stores, accs, ends in plans
    ]
    work = sum(cost([v for _, _, v in s] + [a.value for a in accs]) + 2 * len(accs) + 2 * len(s) for _, s, accs, _ in plans)
    total = int(np.prod([a.extent for a in rows], dtype=np.int64))
    moved = sum(b.span * b.dtype.itemsize for b in (*body.buffers, *body.outputs))
    nanoseconds = max(moved / BYTES_PER_NS, total * columns * work * 0.5 * CYCLE_NS / lanes) + total * 20.0
    statements: list[Stmt] = [Alloc(b) for b in scratch]
    together = masks and len(rows) == 1 and moved <= target.l2 and nanoseconds < PARALLEL_NS and fits(plans)
    if together:
        inside = {a.var for a in inner}

        def walk(stores: Sequence[Item], accs: Sequence[Accumulator]) -> list[Stmt]:
            return _walk(how, stores, accs, numbers)

        def quick(stores: Sequence[Item], numbers: Iterator[int]) -> tuple[Sequence[Item], Expr | None, list[Stmt]]:
            fast, _, guard, lets = _reciprocals(stores, (), inside, numbers)
            return fast, guard, lets

        statements += pipelined(plans, rows[0], walk, quick, numbers)
    else:
        statements += _passes(state, how, plans, rows, put, numbers)
    nested, parallel = parallel_nest([] if together else rows, statements, nanoseconds)
    graph = state.r.graph
    doc = f"rows: {body_name(graph)}, {len(plans)} passes"
    note = f"{len(plans)} passes over rows of {columns}"
    pairs = _in_place(state, plans) if masks else frozenset()
    return lowered(body, name, nested, doc=doc, in_place=pairs, parallel=parallel, note=note)


def _passes(
    state: _Lowering, how: _Columns, plans: Sequence[Code], rows: Sequence[Axis], put: _Put, numbers: Iterator[int]
) -> list[Stmt]:
    """The passes over one row, one after the other."""
    statements: list[Stmt] = []
    walks = [n for n, (_, stores, accs, _) in enumerate(plans) if stores or accs]
    for number, (lets, stores, accs, ends) in enumerate(plans):
        statements += [Let(v, e) for v, e in lets]
        for a in accs:
            statements += a.start()
        if stores or accs:
            quick, quick_accs, guard, lets_of = _reciprocals(stores, accs, {a.var for a in how.axes}, numbers)
            ahead = _next_row(state, how, plans[walks[0]], put, rows) if number in walks[1:-1][:1] else ()
            walked = _walk(how, quick, quick_accs, numbers, ahead=ahead)
            if guard is None:
                statements += walked
            else:
                slow = _walk(how, stores, accs, numbers, 1)
                statements += [*lets_of, If(guard, tuple(walked), tuple(slow))]
        for a in accs:
            if a.kind in POSITIONS:
                before, _, where = a.position()
                statements += [*before, Let(var(a.name, a.dtype), cast(where, a.dtype))]
            else:
                statements.append(Let(var(a.name, a.dtype), cast(a.total(), a.dtype)))
        statements += [Store(b, (i,), v) for b, i, v in ends]
    return statements


def _reciprocals(
    stores: Sequence[Item], accs: Sequence[Accumulator], columns: set[Expr], numbers: Iterator[int]
) -> tuple[Sequence[Item], Sequence[Accumulator], Expr | None, list[Stmt]]:
    """Divisions by a value of the row as products with its reciprocal, under the condition that this is harmless.

    A division takes as long as an exp. x * (1 / s) is within 1.5 units of the last place of x / s as long as neither s nor
    1 / s comes near the ends of the exponent range: the condition asks for 2**-64 <= |s| <= 2**64.
    """
    roots = [v for _, _, v in stores] + [a.value for a in accs]
    depends: dict[Expr, bool] = {}
    divisors: dict[Expr, Expr] = {}
    for e in postorder(roots):
        depends[e] = e in columns or any(depends[a] for a in e.args)
        if (
            e.op == "div"
            and depends[e.args[0]]
            and not depends[e.args[1]]
            and not e.args[1].is_const
            and e.args[1] not in divisors
        ):
            divisors[e.args[1]] = var(f"inv{next(numbers)}", e.dtype)
    if not divisors or any(a.kind in POSITIONS for a in accs):
        return stores, accs, None, []

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op == "div" and e.args[1] in divisors and depends[e.args[0]]:
            return binary("mul", args[0], divisors[e.args[1]])
        return None

    memo: dict[Expr, Expr] = {}
    guard: Expr | None = None
    lets: list[Stmt] = []
    for s, r in divisors.items():
        size = unary("abs", s)
        test = binary("and", binary("le", const(2.0**-64, s.dtype), size), binary("le", size, const(2.0**64, s.dtype)))
        guard = test if guard is None else binary("and", guard, test)
        lets.append(Let(r, binary("div", const(1.0, s.dtype), s)))
    new_stores = [(b, i, rewrite(v, rule, memo)) for b, i, v in stores]
    new_accs = [replace(a, value=rewrite(a.value, rule, memo)) for a in accs]
    return new_stores, new_accs, guard, lets


def _expressions(
    lets: Iterable[tuple[Expr, Expr]],
    stores: Iterable[Item],
    accs: Iterable[Accumulator],
    ends: Iterable[Item],
) -> list[Expr]:
    found = [e for _, e in lets]
    for _, i, v in (*stores, *ends):
        found += (i, v)
    for a in accs:
        found.append(a.value)
        if a.place is not None:
            found.append(a.place)
    return found


def _loads(roots: Sequence[Expr]) -> list[Expr]:
    return [e for e in postorder(roots) if e.op == "load"]


class _Put:
    """Rewrites an expression for the merged axes."""

    def __init__(self, gone: dict[Expr, Expr], simplifier: Simplifier) -> None:
        self.gone, self.simplifier = gone, simplifier

    def __call__(self, e: Expr) -> Expr:
        return self.simplifier.simplify(substitute(e, self.gone) if self.gone else e)


def _merge(state: _Lowering, everything: Sequence[Expr], sink: Buffer) -> tuple[Box, _Put]:
    """Row axes merged with row axes and column axes with column axes, where every index allows it."""
    stores = tuple((sink, const(0), e) for e in everything)
    columns = {a.var for a in state.column_axes}
    fixed = unit_axes([*state.row_axes, *state.column_axes])[1]
    parts = [
        merge_axes(Box(tuple(a for a in state.kept if (a.var in columns) is side), stores, state.simplifier))
        for side in (False, True)
    ]
    axes = (*parts[0].axes, *parts[1].axes)
    left = {a.var for a in axes}
    gone = {a.var: const(0) for a in state.kept if a.var not in left} | fixed
    simplifier = Simplifier(ranges_of(axes))
    put = _Put(gone, simplifier)
    return Box(axes, tuple((sink, const(0), put(e)) for e in everything), simplifier), put


@dataclass(frozen=True, slots=True)
class _Columns:
    """How a row is walked: the axes of its columns (the last in vectors), and what the target allows."""

    box: Box
    axes: tuple[Axis, ...]
    lanes: int
    tail: str
    nontemporal: bool
    line: int


def _next_row(state: _Lowering, how: _Columns, first: Code, put: _Put, rows: Sequence[Axis]) -> list[tuple[Buffer, Expr]]:
    """What the first pass over the next row will read from beyond L2: (operand, flat index), for the second pass to ask for.

    The first pass waits for memory, the second for arithmetic: without this they take turns. The last pass has its stores to wait
    for, and would be slower.
    """
    target, columns = state.target, how.axes[-1].var
    lets, stores, accs, ends = first
    found: dict[Buffer, Expr] = {}
    for e in _loads([put(x) for x in _expressions(lets, stores, accs, ends)]) if rows else ():
        b, at = e.attr[0], e.args[0]
        step = stride_along(how.box, at, rows[-1].var)
        far = b.scope == "global" and b.span * b.dtype.itemsize > target.l2
        if far and step and stride_along(how.box, at, columns) == 1:
            found.setdefault(b, binary("add", at, step))
    return list(found.items())


def _walk(
    how: _Columns,
    stores: Sequence[Item],
    accs: Sequence[Accumulator],
    numbers: Iterator[int],
    most: int = 4,
    ahead: Sequence[tuple[Buffer, Expr]] = (),
) -> list[Stmt]:
    """One pass: the loops over the columns. `ahead`: places, over the columns, to ask for on the way."""
    axis = how.axes[-1]
    units = accs[0].units if accs else min(most, 4 if cost([v for _, _, v in stores]) <= 12 else 2)
    strides = [stride_along(how.box, i, axis.var) for _, i, _ in stores]

    def piece(spot: Spot) -> list[Stmt]:
        values = [a.taken(spot, axis.var) for a in accs]
        values += [broadcast(widen(v, axis.var, spot), spot.lanes) for _, _, v in stores]
        done, values = share(values, numbers) if len(values) > 1 else ([], values)
        if len(stores) > 1:  # every value before any store: one may read what is kept where another goes
            for k in range(len(accs), len(values)):
                if values[k].op not in ("const", "var", "broadcast"):
                    name = vector_variable(f"t{next(numbers)}", values[k].dtype, values[k].lanes)
                    done.append(Let(name, values[k]))
                    values[k] = name
        for a, v in zip(accs, values, strict=False):
            done += a.step(spot, axis.var, spot.unit % a.units, v)
        for (b, i, _), v, stride in zip(stores, values[len(accs) :], strides, strict=True):
            at = substitute(i, {axis.var: spot.position}) if stride == 1 or spot.lanes == 1 else widen(i, axis.var, spot)
            done.append(Store(b, (at,), v, spot.mask, how.nontemporal and b.scope == "global" and stride == 1))
        for b, i in ahead:
            if spot.unit * spot.lanes * b.dtype.itemsize % how.line == 0:
                done.append(Prefetch(b, (substitute(i, {axis.var: spot.position}),), 2))
        return done

    loop = VectorLoop(how.lanes, units, how.tail, shrink=False)
    return nest(how.axes[:-1], loop.over(axis, piece))


def _in_place(state: _Lowering, plans: Sequence[Code]) -> frozenset[tuple[int, int]]:
    """(output, operand): the last pass may overwrite, element by element, what the passes of the same row read.

    So may an earlier one that keeps values in the output's row, if no later pass reads the operand.
    """
    body = state.r.body
    _, stores, accs, ends = plans[-1]
    if len(stores) != 1 or accs or ends:
        return frozenset()
    buffer, index, _ = stores[0]
    for _, group, _, _ in plans[:-1]:
        if any(b.scope == "global" and b is not buffer for b, _, _ in group):
            return frozenset()
    first = next(q for q, (_, group, _, _) in enumerate(plans) if any(b is buffer for b, _, _ in group))
    if len(plans[first][1]) != 1:
        return frozenset()
    pairs = set()
    whole = [e for lets_, stores_, accs_, ends_ in plans for e in _expressions(lets_, stores_, accs_, ends_)]
    after = [e for lets_, stores_, accs_, ends_ in plans[first + 1 :] for e in _expressions(lets_, stores_, accs_, ends_)]
    for i, b in enumerate(body.buffers):
        if b.shape != buffer.shape or b.dtype is not buffer.dtype:
            continue
        reads = {e.args[0] for e in _loads(whole) if e.attr[0] == b}
        if reads <= {index} and not any(e.attr[0] == b for e in _loads(after)):
            pairs.add((body.outputs.index(buffer), i))
            break
    return frozenset(pairs)
