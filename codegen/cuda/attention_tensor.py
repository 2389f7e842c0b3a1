"""Attention forward on tensor cores, in bf16 and f16 (Dao 2023, "FlashAttention-2").

    for tiles of keys:   s = q k^T, -inf where forbidden
                         m' = max(m, max s)             a row's columns are in four lanes: two exchanges
                         p = 2^(c s - c m')             l = l 2^(c m - c m') + sum p
                         o = o 2^(c m - c m') + p v     p rounded to the operands' type
    y = o / l            row sum = m + log l

c is log2 e, times the scale where that is positive and no numbers are added: one multiply-add a score then. Sums are of the p
that are not rounded. Tiles and operands: attention_tiles.py.
"""

from __future__ import annotations

import math
from typing import Final

from ...ir.dtypes import f32
from ...ir.expr import Expr, binary, const, eq, fma, lane_xor, load, select, unary, var
from ...ir.graph import Node
from ...ir.lowering import Attention
from ...ir.target import Target
from ..groups import Body, flat_index
from ..loop_ir import Alloc, Buffer, If, Let, Stmt, Store, Warp
from .attention_form import TILE, Z
from .attention_tiles import LANE, LANES, LOG2E, MOST_WARPS, Tensor, registers, slots
from .grid import warp_tree
from .machine import sm_of
from .matrix_operands import STEP
from .matrix_units import Unit
from .thread import ZERO

TILE_BYTES: Final = 8192  # of keys, and of values: two of each fit beside each other twice


class TensorForward(Tensor):
    """The statements of attention forward on tensor cores."""

    def __init__(self, body: Body, node: Node, form: Attention, unit: Unit, target: Target) -> None:
        super().__init__(body, node, form, unit, target)
        copied = self.way(self.k).by_async and self.way(self.v).by_async
        many = -(-self.queries // (32 * MOST_WARPS)) * self.slices >= sm_of(target).multiprocessors
        # two tiles of queries a warp read keys and values once for both, where registers last: without masks and held copies
        two = self.wide <= 64 and many and copied and self.mask is None
        # an operand has registers for one step on its way
        self.sizes(self.queries, max(1, min(2, TILE_BYTES // (self.wide * STEP))) if copied else 1, 2 if two else 1)

    def launch(self) -> Stmt:
        k, v = self.walk(self.k, "k"), self.walk(self.v, "v")
        q = self.own(self.q, "q", k)
        left, o = self.resident(self.q, "queries"), registers("o", self.down * self.across(self.e) * 4)
        top, total = (registers(n, 2 * self.down) for n in ("top", "total"))
        first, stop = var("row0"), var("stop")
        blocks = -(-self.queries // self.rows)
        # the last queries see the most keys: they begin first
        place = binary("sub", blocks - 1, TILE) if self.form.causal else TILE
        body: list[Stmt] = [Let(first, binary("mul", place, self.rows)), Let(stop, self.upto(first, self.rows))]
        body += self.declared((q, k, v))
        body += [Alloc(b) for b in (left, o, top, total)]
        body += [Store(o, (const(i),), const(0.0, f32)) for i in range(o.shape[0])]
        for i in range(2 * self.down):
            body += [Store(top, (const(i),), const(-math.inf, f32)), Store(total, (const(i),), const(0.0, f32))]
        s = registers("s", self.down * self.tile // 8 * 4)

        def step(c0: Expr, half: Expr) -> list[Stmt]:
            done = self.product_across(s, left, k, self.d, half) + self.allowed(s, first, c0)
            for row in range(2 * self.down):
                done += self._online(row, s, o, top, total)
            return done + self.product_along(o, s, v, self.e, half)

        body += self.walked([(q, left, self.queries)], [k, v], first, const(0), stop, step)
        body += self._results(o, top, total, first)
        return self.blocks(blocks, self.threads, body)

    def _online(self, row: int, s: Buffer, o: Buffer, top: Buffer, total: Buffer) -> list[Stmt]:
        """A row of a tile: the new maximum, everything so far scaled to it, and p in the place of the scores."""
        at = (const(row),)
        mine = slots(row, self.tile // 8)
        most, power = self.register("most", 1), self.register("power", 1)
        done: list[Stmt] = [Alloc(most), Alloc(power), Store(most, ZERO, load(s, (const(mine[0]),), f32))]
        done += [Warp("larger", ((most, ZERO), (s, (const(slot),)))) for slot in mine[1:]]
        for distance in (1, 2):
            other = self.register("other", 1)
            done += [Alloc(other), Store(other, ZERO, lane_xor(load(most, ZERO, f32), distance))]
            done.append(Warp("larger", ((most, ZERO), (other, ZERO))))
        old, base, factor = (var(self.names(n), f32) for n in ("old", "base", "factor"))
        done += [Let(old, load(top, at, f32)), Warp("larger", ((top, at), (most, ZERO)))]
        new, c = load(top, at, f32), const(self.factor, f32)
        shift = binary("mul", new, const(-self.factor, f32))
        done.append(Let(base, select(eq(new, const(-math.inf, f32)), const(0.0, f32), shift)))
        done += [Store(power, ZERO, fma(old, c, base)), Warp("exp2_near", ((power, ZERO), (power, ZERO)))]
        done += [Let(factor, load(power, ZERO, f32)), Store(total, at, binary("mul", load(total, at, f32), factor))]
        for slot in mine:
            here = (const(slot),)
            done += [Store(s, here, fma(load(s, here, f32), c, base)), Warp("exp2_near", ((s, here), (s, here)))]
            done.append(Store(total, at, binary("add", load(total, at, f32), load(s, here, f32))))
        for slot in slots(row, self.across(self.e)):
            here = (const(slot),)
            done.append(Store(o, here, binary("mul", load(o, here, f32), factor)))
        return done

    def _results(self, o: Buffer, top: Buffer, total: Buffer, first: Expr) -> list[Stmt]:
        done: list[Stmt] = []
        for row in range(2 * self.down):
            lets, whole = warp_tree("sum", load(total, (const(row),), f32), self.names, LANES)
            query, inverse = self.row(first, row), var(self.names("inverse"), f32)
            done += [*lets, Let(inverse, binary("div", const(1.0, f32), whole))]
            place = binary("mul", flat_index((Z, query), (self.slices, self.queries)), self.e + 1)
            stores = self.columns_of(o, row, place, self.e, inverse)
            most = binary("mul", load(top, (const(row),), f32), const(self.factor / LOG2E, f32))
            most = select(eq(most, const(-math.inf, f32)), const(0.0, f32), most)
            logarithm = binary("add", most, unary("log", whole))
            only = eq(binary("mod", LANE, LANES), const(0))
            stores.append(If(only, (Store(self.out, (binary("add", place, self.e),), logarithm),)))
            done += stores if self.queries % self.rows == 0 else [If(binary("lt", query, const(self.queries)), tuple(stores))]
        return done


__all__ = ["TensorForward"]
