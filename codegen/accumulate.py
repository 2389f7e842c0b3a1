"""Accumulators of reductions: several vector registers, combined in an order that only the shape decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..ir.dtypes import DType, bool_, i32
from ..ir.expr import Expr, binary, broadcast, cast, const, load, reduce_lanes, select, var
from .groups import accumulator, better, combine, identity
from .loop_ir import Alloc, Buffer, Let, Stmt, Store
from .nests import Spot, widen

POSITIONS: Final = ("argmax", "argmin")
NOWHERE: Final = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Accumulator:
    """A reduction's running values in `units` register vectors of `lanes` lanes.

    `value` is the scalar expression that is reduced, `place` its row-major position (for argmax and argmin: i64).
    """

    name: str
    kind: str
    value: Expr
    dtype: DType  # of the result
    lanes: int
    units: int
    place: Expr | None = None
    forgets: bool = False  # a maximum or minimum that may be any number where a value is NaN

    @property
    def held(self) -> DType:
        return accumulator(self.value.dtype)

    @property
    def best(self) -> Buffer:
        return Buffer(f"{self.name}_acc", self.held, (self.units, self.lanes), scope="register", align=64)

    @property
    def where(self) -> Buffer:
        return Buffer(f"{self.name}_at", i32, (self.units, self.lanes), scope="register", align=64)

    def start(self) -> list[Stmt]:
        """Declares the accumulators and gives them the identity."""
        done: list[Stmt] = [Alloc(self.best)]
        first = identity(self.kind, self.held, self.lanes)
        done += [Store(self.best, (const(u), const(0)), first) for u in range(self.units)]
        if self.kind in POSITIONS:
            done.append(Alloc(self.where))
            nowhere = const(NOWHERE, i32, self.lanes)
            done += [Store(self.where, (const(u), const(0)), nowhere) for u in range(self.units)]
        return done

    def taken(self, spot: Spot, v: Expr) -> Expr:
        """The values at a spot of the vector axis `v`."""
        return cast(broadcast(widen(self.value, v, spot), spot.lanes), self.held)

    def step(self, spot: Spot, v: Expr, unit: int, new: Expr | None = None) -> list[Stmt]:
        """Takes in the values at a spot of the vector axis `v` (`new` where the caller has bound them)."""
        n = spot.lanes
        at = (const(unit), const(0))
        new = self.taken(spot, v) if new is None else new
        old = load(self.best, at, self.held, lanes=n)
        if self.kind in POSITIONS:
            assert self.place is not None
            wins = better(self.kind, new, old)
            if spot.live is not None:
                wins = binary("and", wins, spot.live)
            here = broadcast(widen(cast(self.place, i32), v, spot), n)
            was = load(self.where, at, i32, lanes=n)
            # The position first: its comparison reads the old best value.
            return [Store(self.where, at, select(wins, here, was)), Store(self.best, at, select(wins, new, old))]
        if spot.live is not None:
            new = select(spot.live, new, identity(self.kind, self.held, n))
        return [Store(self.best, at, self._combined(old, new))]

    def _combined(self, a: Expr, b: Expr) -> Expr:
        if not self.forgets:
            return combine(self.kind, a, b)
        return select(binary("lt", b, a) if self.kind == "max" else binary("lt", a, b), a, b)

    def _tree(self, buffer: Buffer) -> list[Expr]:
        return [load(buffer, (const(u), const(0)), buffer.dtype, lanes=self.lanes) for u in range(self.units)]

    def vector(self) -> Expr:
        """The units combined, lane by lane (not for positions)."""
        values = self._tree(self.best)
        while len(values) > 1:
            half = len(values) // 2
            paired = [self._combined(a, b) for a, b in zip(values[:half], values[half : 2 * half], strict=True)]
            values = paired + values[2 * half :]
        return values[0]

    def total(self) -> Expr:
        """The one value that everything is reduced to, in the dtype it is held in (not for positions)."""
        v = self.vector()
        if v.dtype is bool_ and v.lanes > 1:
            # A vector of truths is reduced as bytes.
            from ..ir.dtypes import u8

            top = reduce_lanes("max" if self.kind in ("sum", "max") else "min", cast(v, u8))
            return binary("ne", top, const(0, u8))
        if self.forgets and v.lanes > 1:
            return Expr(f"reduce_{self.kind}", (v,), v.dtype, 1, "forgets")
        return reduce_lanes({"sum": "add", "prod": "mul"}.get(self.kind, self.kind), v)

    def position(self) -> tuple[list[Stmt], Expr, Expr]:
        """For argmax and argmin: statements, then the best value and its first position (i32)."""
        top = "max" if self.kind == "argmax" else "min"
        held = self.held
        values, places = self._tree(self.best), self._tree(self.where)
        if held is bool_:
            from ..ir.dtypes import u8

            values = [cast(v, u8) for v in values]
            held = u8
        best = var(f"{self.name}_best", held)
        pool = values[0]
        for v in values[1:]:
            pool = binary(top, pool, v)
        first: Expr | None = None
        wide = broadcast(best, self.lanes)
        for v, p in zip(values, places, strict=True):
            same = binary("eq", v, wide)
            if held.is_float:
                same = binary("or", same, binary("and", binary("ne", v, v), binary("ne", wide, wide)))
            mine = select(same, p, const(NOWHERE, i32, self.lanes))
            first = mine if first is None else binary("min", first, mine)
        assert first is not None
        found = reduce_lanes("min", first)
        # Nothing was strictly better than the identity: all elements are equal to it, the first one is at 0.
        found = select(binary("eq", found, const(NOWHERE, i32)), const(0, i32), found)
        return [Let(best, reduce_lanes(top, pool))], best, found
