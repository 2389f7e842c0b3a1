"""Attention without its scores in memory, after FlashAttention (Dao et al. 2022; the loops are those of Dao 2023).

A block has a tile of queries and walks over tiles of keys; of the scores, only those of one tile exist, in registers:

    m[i], l[i], o[i, :] = -inf, 0, 0
    for tiles of keys:   s = scale q k^T, -inf where forbidden       m' = max(m, max s)      p = exp(s - m')
                         l = l exp(m - m') + sum p                   o = o exp(m - m') + p v          m = m'
    y = o / l            row sum = m + log l

A row is eight lanes of a warp, so maxima and sums of rows are shuffles; tiles of operands, and p on its way from rows to steps,
are in shared memory. Tiles of keys that causality forbids altogether are not visited. The way back computes the tiles of p again
from the row sums, in two launches: a block of queries walks over keys for dq, a block of keys over queries for dk and dv, so
that every element has one writer and sums have one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ...ir.dims import as_int
from ...ir.dtypes import f32, f64
from ...ir.errors import CompileError
from ...ir.expr import Expr, binary, cast, const, eq, fma, load, maximum, minimum, select, unary, var
from ...ir.graph import Graph, Node
from ...ir.lowering import Attention
from ...ir.target import Target
from ..groups import Body, Lowered, flat_index, lowered, static_shape
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store
from ..nests import Axis
from .attention_form import TILE, Matrix, Problem, Z
from .attention_tensor import TensorForward
from .attention_tensor_grad import TensorBackward
from .grid import TX, over, warp_tree
from .machine import STATIC_SHARED
from .matrix_units import unit_for
from .thread import ZERO

THREADS: Final = 128
WAYS: Final = 8  # threads of a row
GROUPS: Final = THREADS // WAYS  # of rows
STEP: Final = 32  # rows or columns of the tiles that a block walks over
ROWS: Final = (64, 32, 16)  # of a block's own tile: the most that fit
PAD: Final = 4  # elements after each line of a tile that is turned: its lines then begin on banks of their own
UNROLL: Final = 4
TY, TXX = var("ty_"), var("tx_")


class _Tile:
    """A tile in shared memory: its lines are columns of the matrix (`turned`) or rows, filled up with zeros."""

    def __init__(self, name: str, lines: int, line: int, space: Buffer | None = None) -> None:
        self.line = line
        self.space = space or Buffer(name, f32, (lines * line,), scope="shared", align=16)

    def at(self, k: Expr | int, column: Expr) -> tuple[Expr, ...]:
        k = const(k) if isinstance(k, int) else k
        return (binary("add", binary("mul", k, self.line), column),)


class _Kernel(Problem):
    """What the launches share: sizes, operands, and the statements that their loops are made of."""

    def __init__(self, body: Body, node: Node, form: Attention) -> None:
        super().__init__(body, node, form)
        backward = bool(form.side)
        if any(body.buffers[body.operand[i]].dtype is f64 for i in node.inputs):
            raise CompileError(f"{node.op.name} {node.type}: the kernel adds up in f32; attention in f64 is taken apart")
        # the tiles that are walked over take turns in one stage
        wide = [-(-n // STEP) * STEP for n in (self.d, self.e)]
        self.stage = Buffer("stage", f32, (max(max(self.d, self.e) * (STEP + PAD), STEP * max(wide)),), scope="shared", align=16)
        resident = self.d + (self.e if backward else 0)
        moved = {"": 1, "query": 1, "keys": 2}[form.side]

        def shared(rows: int) -> int:
            return 4 * (resident * (rows + PAD) + self.stage.shape[0] + moved * STEP * (rows + PAD))

        fits = [n for n in ROWS if shared(n) <= STATIC_SHARED]
        own = self.keys if form.side == "keys" else self.queries
        if not fits:
            raise CompileError(f"{node.op.name} {node.type}: {self.d} and {self.e} features exceed what fits into shared memory")
        # no larger than the matrix has use for
        self.rows = next((n for n in reversed(fits) if n >= own), fits[0])
        self.thread_rows = self.rows // GROUPS

    # ------------------------------------------------------------------ pieces

    def bring(self, m: Matrix, first: Expr, count: int, tile: _Tile, *, turned: bool, columns: int = 0) -> list[Stmt]:
        """Rows `first` to `first` + count of a matrix to shared memory, zeros beyond its last row, and beyond its last column
        where lines are longer; the first `columns` of each row, where it has more."""
        columns = columns or m.columns
        width = m.width() if columns == m.columns else 1
        fill = -(-columns // STEP) * STEP if not turned else columns
        # the first step of a division by the width that divides the padded line, too
        inner = fill // width
        e, r, c = var(self.names("e")), var(self.names("r")), var(self.names("c"))
        stage = self.register("got", width)
        row = binary("add", first, r)
        place = binary("add", binary("add", m.offset(), binary("mul", row, m.stride)), c)
        test: Expr | None = None
        if m.rows % count:
            test = binary("lt", row, const(m.rows))
        if fill != columns:
            inside = binary("lt", c, const(columns))
            test = inside if test is None else binary("and", test, inside)
        got = Store(stage, ZERO, cast(load(m.buffer, (place,), m.buffer.dtype, None, width), f32))
        zero = Store(stage, ZERO, const(0.0, f32, width))
        body: list[Stmt] = [
            Let(r, binary("floordiv", e, inner)),
            Let(c, binary("mul", binary("mod", e, inner), width)),
            Alloc(stage),
            got if test is None else If(test, (got,), (zero,)),
        ]
        for j in range(width if turned else 1):
            where = tile.at(binary("add", c, j), r) if turned else tile.at(r, c)
            value = load(stage, (const(j),), f32, None, 1 if turned else width)
            body.append(Store(tile.space, where, value))
        return [For(e, TX, const(count * inner), tuple(body), "serial", THREADS)]

    def product(self, acc: Buffer, left: _Tile, right: _Tile, steps: int) -> list[Stmt]:
        """acc[i, j] += sum over k of left[k, row i] right[k, column j]."""
        rows, columns = acc.shape
        k = var(self.names("k"))

        def step(at: Expr) -> list[Stmt]:
            a, b = self.register("a", rows), self.register("b", columns)
            done: list[Stmt] = [Alloc(a), Alloc(b)]
            mine = binary("mul", TY, rows)
            done.append(Store(a, ZERO, load(left.space, left.at(at, mine), f32, None, rows)))
            for j in range(0, columns, 4):
                other = binary("add", binary("mul", TXX, 4), j // 4 * STEP)
                done.append(Store(b, (const(j),), load(right.space, right.at(at, other), f32, None, 4)))
            for i in range(rows):
                for j in range(columns):
                    x, y = load(a, (const(i),), f32), load(b, (const(j),), f32)
                    done.append(Store(acc, (const(i), const(j)), fma(x, y, load(acc, (const(i), const(j)), f32))))
            return done

        unroll = next(n for n in (UNROLL, 2, 1) if steps % n == 0)
        inner = [s for u in range(unroll) for s in step(binary("add", k, u))]
        return [For(k, const(0), const(steps), tuple(inner), "serial", unroll)]

    def zeros(self, acc: Buffer) -> list[Stmt]:
        rows, columns = acc.shape
        return [Store(acc, (const(i), const(j)), const(0.0, f32)) for i in range(rows) for j in range(columns)]

    def row(self, first: Expr, i: int) -> Expr:
        """The row that element i of a thread stands in, of the block's own tile that begins at `first`."""
        return binary("add", first, binary("add", binary("mul", TY, self.thread_rows), i))

    def column(self, first: Expr, j: int) -> Expr:
        """The column of element j of a thread, of a tile of STEP that begins at `first`; beyond STEP in further groups."""
        return binary("add", first, binary("add", binary("mul", TXX, 4), j // 4 * STEP + j % 4))

    def score(self, product: Expr, query: Expr, key: Expr) -> tuple[list[Stmt], Expr]:
        """The score of a query and a key, -inf where it is forbidden or one of them does not exist."""
        done: list[Stmt] = []
        s = var(self.names("s"), f32)
        allowed: list[Expr] = []
        if self.queries % self.rows if self.form.side != "keys" else self.queries % STEP:
            allowed.append(binary("lt", query, const(self.queries)))
        if self.keys % STEP if self.form.side != "keys" else self.keys % self.rows:
            allowed.append(binary("lt", key, const(self.keys)))
        if self.form.causal:
            allowed.append(binary("le", key, query))
        value = binary("mul", product, const(self.form.scale, f32))
        lets, value = self.masked(value, query, key, allowed)
        done += lets
        test: Expr | None = None
        for a in allowed:
            test = a if test is None else binary("and", test, a)
        done.append(Let(s, value if test is None else select(test, value, const(-math.inf, f32))))
        return done, s

    def grid(self, tiles: int, body: Sequence[Stmt]) -> Stmt:
        lanes: list[Stmt] = [Let(TXX, binary("mod", TX, WAYS)), Let(TY, binary("floordiv", TX, WAYS))]
        return self.blocks(tiles, THREADS, [*lanes, *body])

    # ------------------------------------------------------------------ forward

    def forward(self) -> list[Stmt]:
        rows, tr = self.rows, self.thread_rows
        wide = -(-self.e // STEP) * STEP
        q = _Tile("q_tile", self.d, rows + PAD)
        k, v = _Tile("", self.d, STEP + PAD, self.stage), _Tile("", STEP, wide, self.stage)
        p = _Tile("p_tile", STEP, rows + PAD)
        o, s = self.register("o", tr, wide // WAYS), self.register("s", tr, STEP // WAYS)
        top, total = self.register("top", tr), self.register("total", tr)
        first, c0 = var("row0"), var("col0")
        body: list[Stmt] = [Let(first, binary("mul", TILE, rows)), Alloc(self.stage), Alloc(q.space), Alloc(p.space)]
        body += [Alloc(b) for b in (o, top, total)]
        body += self.bring(self.q, first, rows, q, turned=True)
        body += self.zeros(o)
        for i in range(tr):
            body += [Store(top, (const(i),), const(-math.inf, f32)), Store(total, (const(i),), const(0.0, f32))]
        step: list[Stmt] = [Barrier(), *self.bring(self.k, c0, STEP, k, turned=True), Barrier()]
        step += [Alloc(s), *self.zeros(s), *self.product(s, q, k, self.d)]
        step += [Barrier(), *self.bring(self.v, c0, STEP, v, turned=False)]
        for i in range(tr):
            step += self._online(i, first, c0, s, o, top, total, p)
        step += [Barrier(), *self.product(o, p, v, STEP)]
        body.append(For(c0, const(0), self.upto(first, self.rows), tuple(step), "serial", STEP))
        for i in range(tr):
            lets, whole = warp_tree("sum", load(total, (const(i),), f32), self.names, WAYS)
            body += lets
            row = self.row(first, i)
            at = flat_index((Z, row), (self.slices, self.queries))
            place = binary("mul", at, self.e + 1)
            stores: list[Stmt] = []
            for j in range(o.shape[1]):
                column = self.column(const(0), j)
                one = Store(self.out, (binary("add", place, column),), binary("div", load(o, (const(i), const(j)), f32), whole))
                stores.append(one if self.e % STEP == 0 else If(binary("lt", column, const(self.e)), (one,)))
            logarithm = binary("add", self._base(load(top, (const(i),), f32)), unary("log", whole))
            stores.append(If(eq(TXX, const(0)), (Store(self.out, (binary("add", place, self.e),), logarithm),)))
            body += stores if self.queries % rows == 0 else [If(binary("lt", row, const(self.queries)), tuple(stores))]
        return [self.grid(-(-self.queries // rows), body)]

    def _base(self, top: Expr) -> Expr:
        """What is subtracted from scores before exp: their maximum, or 0 where all are -inf."""
        return select(eq(top, const(-math.inf, f32)), const(0.0, f32), top)

    def _online(self, i: int, first: Expr, c0: Expr, s: Buffer, o: Buffer, top: Buffer, total: Buffer, p: _Tile) -> list[Stmt]:
        """Row i of a tile of scores: the new maximum, everything so far scaled to it, and p."""
        row = self.row(first, i)
        done: list[Stmt] = []
        scores: list[Expr] = []
        for j in range(s.shape[1]):
            lets, value = self.score(load(s, (const(i), const(j)), f32), row, self.column(c0, j))
            done += lets
            scores.append(value)
        most = scores[0]
        for x in scores[1:]:
            most = maximum(most, x)
        lets, most = warp_tree("max", most, self.names, WAYS)
        at = (const(i),)
        new, old, factor = (var(self.names(n), f32) for n in ("new", "old", "factor"))
        done += [*lets, Let(old, load(top, at, f32)), Let(new, maximum(old, most))]
        base = var(self.names("base"), f32)
        done += [Let(base, self._base(new)), Let(factor, unary("exp", binary("sub", old, base))), Store(top, at, new)]
        sums = binary("mul", load(total, at, f32), factor)
        for j, x in enumerate(scores):
            value = var(self.names("p"), f32)
            done.append(Let(value, unary("exp", binary("sub", x, base))))
            sums = binary("add", sums, value)
            mine = binary("add", binary("mul", TY, self.thread_rows), i)
            done.append(Store(p.space, p.at(self.column(const(0), j), mine), value))
        done.append(Store(total, at, sums))
        for j in range(o.shape[1]):
            here = (const(i), const(j))
            done.append(Store(o, here, binary("mul", load(o, here, f32), factor)))
        return done

    # ------------------------------------------------------------------ backward

    def of_query(self, m: Matrix | Buffer, query: Expr) -> Expr:
        """A number of a query: its row sum, or its delta."""
        at = minimum(query, const(self.queries - 1))
        if isinstance(m, Buffer):
            return load(m, (flat_index((Z, at), (self.slices, self.queries)),), f32)
        place = binary("add", m.offset(), binary("add", binary("mul", at, m.stride), self.e))
        return load(m.buffer, (place,), f32)

    def gradient(self, delta: Buffer) -> list[Stmt]:
        """dq of a block of queries, or dk and dv of a block of keys."""
        by_query = self.form.side == "query"
        rows, tr = self.rows, self.thread_rows
        widths = [-(-n // STEP) * STEP for n in (self.d, self.e)]
        mine = (self.q, self.dy) if by_query else (self.k, self.v)
        others = (self.k, self.v) if by_query else (self.q, self.dy)
        held = [_Tile(n, w, rows + PAD) for n, w in (("first_tile", self.d), ("second_tile", self.e))]
        stages = [_Tile("", w, STEP + PAD, self.stage) for w in (self.d, self.e)]
        s, dp = self.register("s", tr, STEP // WAYS), self.register("dp", tr, STEP // WAYS)
        ds_tile, p_tile = _Tile("ds_tile", STEP, rows + PAD), _Tile("p_tile", STEP, rows + PAD)
        sums = [self.register("sum", tr, w // WAYS) for w in (widths[:1] if by_query else widths)]
        first, c0 = var("row0"), var("col0")
        body: list[Stmt] = [Let(first, binary("mul", TILE, rows)), Alloc(self.stage), Alloc(ds_tile.space)]
        body += [Alloc(t.space) for t in (*held, *([] if by_query else [p_tile]))]
        body += [Alloc(b) for b in sums]
        for m, t, n in zip(mine, held, (self.d, self.e), strict=True):
            body += self.bring(m, first, rows, t, turned=True, columns=n)
        for b in sums:
            body += self.zeros(b)
        of_rows: list[tuple[Expr, Expr]] = []
        if by_query:
            for i in range(tr):
                of_rows.append((var(f"l{i}", f32), var(f"d{i}", f32)))
                query = self.row(first, i)
                body += [Let(of_rows[i][0], self.of_query(self.y, query)), Let(of_rows[i][1], self.of_query(delta, query))]
        step: list[Stmt] = []
        for acc, m, tile, stage, n in zip((s, dp), others, held, stages, (self.d, self.e), strict=True):
            step += [Barrier(), *self.bring(m, c0, STEP, stage, turned=True, columns=n), Barrier()]
            step += [Alloc(acc), *self.zeros(acc), *self.product(acc, tile, stage, n)]
        numbers: list[tuple[Expr, Expr]] = []
        if not by_query:
            for j in range(STEP // WAYS):
                numbers.append((var(f"l{j}", f32), var(f"d{j}", f32)))
                query = self.column(c0, j)
                step += [Let(numbers[j][0], self.of_query(self.y, query)), Let(numbers[j][1], self.of_query(delta, query))]
        for i in range(tr):
            for j in range(STEP // WAYS):
                here = (const(i), const(j))
                own, other = self.row(first, i), self.column(c0, j)
                query, key = (own, other) if by_query else (other, own)
                lets, score = self.score(load(s, here, f32), query, key)
                total, minus = of_rows[i] if by_query else numbers[j]
                p, ds = var(self.names("p"), f32), var(self.names("ds"), f32)
                forbidden = eq(score, const(-math.inf, f32))  # nothing flows there, not even NaN
                inner = binary("mul", p, binary("sub", load(dp, here, f32), minus))
                step += [*lets, Let(p, unary("exp", binary("sub", score, total)))]
                scaled = binary("mul", inner, const(self.form.scale, f32))
                step.append(Let(ds, select(forbidden, const(0.0, f32), scaled)))
                at = ds_tile.at(self.column(const(0), j), binary("add", binary("mul", TY, tr), i))
                step.append(Store(ds_tile.space, at, ds))
                if not by_query:
                    step.append(Store(p_tile.space, at, p))
        pairs = [(sums[0], ds_tile, others[0], self.d)] + ([] if by_query else [(sums[1], p_tile, others[1], self.e)])
        for (acc, turned, m, n), w in zip(pairs, widths, strict=False):
            whole = _Tile("", STEP, w, self.stage)
            step += [Barrier(), *self.bring(m, c0, STEP, whole, turned=False, columns=n), Barrier()]
            step += self.product(acc, turned, whole, STEP)
        begin, end = const(0), self.upto(first, self.rows) if by_query else const(self.queries)
        if self.form.causal and not by_query:
            begin = binary("mul", binary("floordiv", first, STEP), STEP)
        body.append(For(c0, begin, end, tuple(step), "serial", STEP))
        body += self._stores(first, sums)
        return [self.grid(-(-(self.queries if by_query else self.keys) // rows), body)]

    def _stores(self, first: Expr, sums: Sequence[Buffer]) -> list[Stmt]:
        own = self.queries if self.form.side == "query" else self.keys
        columns = [self.d, self.e][: len(sums)]
        done: list[Stmt] = []
        for i in range(self.thread_rows):
            row = self.row(first, i)
            place = binary("mul", flat_index((Z, row), (self.slices, own)), sum(columns))
            stores: list[Stmt] = []
            for acc, n, before in zip(sums, columns, (0, self.d), strict=False):
                for j in range(acc.shape[1]):
                    column = self.column(const(0), j)
                    at = binary("add", place, binary("add", column, before))
                    one = Store(self.out, (at,), load(acc, (const(i), const(j)), f32))
                    stores.append(one if n % STEP == 0 else If(binary("lt", column, const(n)), (one,)))
            done += stores if own % self.rows == 0 else [If(binary("lt", row, const(own)), tuple(stores))]
        return done


def lower_attention(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launches of attention, or of its gradient. Raises CompileError for types and widths that the kernel is not for."""
    body = Body(graph, aligns)
    node, form = body.sole(Attention)
    if not as_int(node.tensor.size):
        return lowered(body, name, [], doc="attention of nothing")
    if not static_shape(node.inputs[0])[-2]:  # nobody asks: dk and dv of nothing
        at = var("at")
        zeros = over([Axis(at, body.outputs[0].span)], [Store(body.outputs[0], (at,), const(0.0, f32))])
        return lowered(body, name, [zeros], doc="attention without queries", parallel=True)
    unit = unit_for(node.inputs[0].dtype, node.inputs[2].dtype, target, False)
    what = {"": "forward", "query": "of the queries", "keys": "of keys and values"}[form.side]
    doc = f"attention {what}"
    if unit is not None and not form.side:
        made = TensorForward(body, node, form, unit, target)
        return lowered(body, name, [made.launch()], doc=doc, parallel=True, note=str(made))
    back = None if unit is None else TensorBackward(body, node, form, unit, target)
    if back is not None and back.fits:
        return lowered(body, name, back.statements(), doc=doc, workspaces=back.workspaces, parallel=True, note=str(back))
    kernel = _Kernel(body, node, form)
    spaces: list[Buffer] = []
    if not form.side:
        statements = kernel.forward()
    else:
        delta = Buffer("delta", f32, (kernel.slices * kernel.queries,), align=64)
        spaces.append(delta)
        statements = [kernel.deltas(lambda at, rows, d: [Store(delta, (at,), d)]), *kernel.gradient(delta)]
    note = f"a block for {kernel.rows} rows, {STEP} columns at a time"
    return lowered(body, name, statements, doc=doc, workspaces=spaces, parallel=True, note=note)


__all__ = ["lower_attention"]
