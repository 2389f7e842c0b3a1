"""The way back of attention on tensor cores, in bf16 and f16 (Dao 2023, algorithm 2), for queries, or for keys and values.

    first, a warp a row:        dy rounded; l log2 e; D = sum dy y - dl
    a block of queries:         for tiles of keys:     s = q k^T   dp = dy v^T   p = 2^(c s - l)   ds = p (dp - D)   dq += ds k
    a block of keys, turned:    for tiles of queries:  s = k q^T   dp = v dy^T   p, ds alike      dv += p dy        dk += ds q

dq and dk times the scale at the end. Both are the same walk: the first two products read the tile across, the others along; p and
ds go there in their registers, rounded. Beyond 64 features dv has a launch of its own, which computes p once more. Tiles and
operands: attention_tiles.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from ...ir.dtypes import bool_, f32
from ...ir.expr import Expr, binary, cast, const, eq, fma, load, minimum, select, var
from ...ir.graph import Node
from ...ir.lowering import Attention
from ...ir.target import Target
from ..groups import Body, flat_index
from ..loop_ir import Alloc, Buffer, If, Let, Stmt, Store, Warp
from .attention_form import TILE, Matrix, Z
from .attention_tiles import LOG2E, Tensor, registers, slots
from .matrix_units import Unit

WIDEST_BOTH: Final = 64  # features up to which registers hold keys, values and the sums of both; beyond, dv has its own launch


class TensorBackward(Tensor):
    """The statements of the way back on tensor cores."""

    def __init__(self, body: Body, node: Node, form: Attention, unit: Unit, target: Target) -> None:
        super().__init__(body, node, form, unit, target)
        self.turned = form.side == "keys"
        rows = self.slices * self.queries
        self.minus = Buffer("minus", f32, (2 * rows,), align=64)  # of each query l log2 e, then D of each
        self.rounded = Buffer("rounded", self.dtype, (rows * self.e,), align=64)
        gradient = Matrix(self.rounded, self.queries, self.e, ((self.slices, self.queries * self.e),) if self.slices > 1 else ())
        pairs = [(self.q, self.k), (gradient, self.v)]
        self.pairs = [(b, a) for a, b in pairs] if self.turned else pairs  # the block's own matrix, and that of the tiles
        copied = all(self.way(m).by_async for _, m in self.pairs)
        # beyond that there are no registers for copies on their way, or for a mask
        self.fits = self.wide <= WIDEST_BOTH or (copied and self.mask is None)
        steps = 2 if copied and self.wide <= WIDEST_BOTH and not self.turned else 1
        self.sizes(self.keys if self.turned else self.queries, steps, 1)

    @property
    def workspaces(self) -> list[Buffer]:
        return [self.minus, self.rounded]

    def statements(self) -> list[Stmt]:
        parts = [(0,), (1,)] if self.turned and self.wide > WIDEST_BOTH else [(0, 1)] if self.turned else [(0,)]
        return [self.deltas(self._number, self._round, self.dtype), *(self.launch(p) for p in parts)]

    def _number(self, at: Expr, rows: Expr, delta: Expr) -> list[Stmt]:
        further = binary("add", at, self.slices * self.queries)
        scaled = binary("mul", rows, const(LOG2E, f32))
        return [Store(self.minus, (at,), scaled), Store(self.minus, (further,), delta)]

    def _round(self, at: Expr, column: Expr, dy: Expr) -> list[Stmt]:
        place = binary("add", binary("mul", at, self.e), column)
        return [If(binary("lt", column, const(self.e)), (Store(self.rounded, (place,), cast(dy, self.dtype)),))]

    def launch(self, parts: Sequence[int]) -> Stmt:
        """dq, or of dk and dv those that are asked for: 0, 1."""
        walked = [self.walk(m, n) for (_, m), n in zip(self.pairs, ("first", "second"), strict=True)]
        used = 2 if 0 in parts else 1  # matrices of its own that the block needs: dv is made of the scores alone
        own = [self.own(m, f"own_{x.name}", x) for (m, _), x in zip(self.pairs[:used], walked, strict=False)]
        held = [self.resident(m, f"held_{x.name}") for (m, _), x in zip(self.pairs[:used], walked, strict=False)]
        mine, others = (self.keys, self.queries) if self.turned else (self.queries, self.keys)
        widths = [self.d, self.e]
        sums = {k: registers(f"sum{k}", 4 * self.across(widths[k])) for k in parts}
        scores = [registers(n, self.tile // 8 * 4) for n in ("s", "dp")]
        first, begin, stop = var("row0"), var("begin"), var("stop")
        blocks = -(-mine // self.rows)
        # what sees the most, or is seen by the most, begins first
        place = binary("sub", blocks - 1, TILE) if self.form.causal and not self.turned else TILE
        start: Expr = const(0)
        if self.form.causal and self.turned:
            start = binary("mul", binary("floordiv", first, self.tile), self.tile)
        end = const(others) if self.turned else self.upto(first, self.rows)
        body: list[Stmt] = [Let(first, binary("mul", place, self.rows)), Let(begin, start), Let(stop, end)]
        body += self.declared([*own, *walked])
        body += [Alloc(b) for b in (*held, *sums.values())]
        body += [Store(b, (const(i),), const(0.0, f32)) for b in sums.values() for i in range(b.shape[0])]
        numbers = [] if self.turned else [self._numbers(self.row(first, row), body) for row in range(2)]

        def step(c0: Expr, half: Expr) -> list[Stmt]:
            done: list[Stmt] = []
            for to, left, x, width in zip(scores, held, walked, widths, strict=False):
                done += self.product_across(to, left, x, width, half)
            done += self.allowed(scores[0], first, c0, self.turned)
            of = numbers
            if self.turned:
                of = [self._numbers(self.column(c0, n), done) for n in range(self.tile // 4)]
            for row in range(2):
                for n, slot in enumerate(slots(row, self.tile // 8)):
                    done += self._scaled(scores[:used], slot, *of[n if self.turned else row])
            for k in sorted(parts, reverse=True):  # ds is made of p, and dk of ds
                done += self.product_along(sums[k], scores[1 - k], walked[k], widths[k], half)
            return done

        taken = [(x, to, mine) for x, to in zip(own, held, strict=True)]
        body += self.walked(taken, walked, first, begin, stop, step)
        body += self._results(sums, first, mine)
        return self.blocks(blocks, self.threads, body)

    def _numbers(self, query: Expr, to: list[Stmt]) -> tuple[Expr, Expr]:
        """l log2 e and D of a query, the last one's where there is none."""
        rows = self.slices * self.queries
        at = flat_index((Z, minimum(query, const(self.queries - 1))), (self.slices, self.queries))
        found = var(self.names("l"), f32), var(self.names("delta"), f32)
        to += [Let(found[0], load(self.minus, (at,), f32)), Let(found[1], load(self.minus, (binary("add", at, rows),), f32))]
        return found

    def _scaled(self, scores: Sequence[Buffer], slot: int, rows: Expr, delta: Expr) -> list[Stmt]:
        """p in the place of a score, ds in that of dp: nothing flows where the score is forbidden, not even NaN."""
        here, s = (const(slot),), scores[0]
        forbidden = var(self.names("forbidden"), bool_)
        score = load(s, here, f32)
        done: list[Stmt] = [Let(forbidden, eq(score, const(-math.inf, f32)))] if len(scores) > 1 else []
        done.append(Store(s, here, fma(score, const(self.factor, f32), binary("sub", const(0.0, f32), rows))))
        done.append(Warp("exp2_near", ((s, here), (s, here))))
        for dp in scores[1:]:
            inner = binary("mul", load(s, here, f32), binary("sub", load(dp, here, f32), delta))
            done.append(Store(dp, here, select(forbidden, const(0.0, f32), inner)))
        return done

    def _results(self, sums: Mapping[int, Buffer], first: Expr, own: int) -> list[Stmt]:
        done: list[Stmt] = []
        length = self.d + self.e if self.turned else self.d
        for row in range(2):
            at = self.row(first, row)
            place = binary("mul", flat_index((Z, at), (self.slices, own)), length)
            stores: list[Stmt] = []
            for k, b in sums.items():
                factor = const(1.0 if k else self.form.scale, f32)
                stores += self.columns_of(b, row, binary("add", place, k * self.d), self.e if k else self.d, factor)
            done += stores if own % self.rows == 0 else [If(binary("lt", at, const(own)), tuple(stores))]
        return done


__all__ = ["TensorBackward"]
