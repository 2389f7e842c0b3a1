"""Square blocks transposed in registers: what lies side by side along one axis, in vectors along another.

    y[i, j] = f(x[j, i])      rows of x loaded whole, n of n elements; shuffled into its columns; f of each; stored whole

A gather takes as long as one load for each lane, and the shuffles four to eight for n vectors of n. n is the lanes of a register.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ir.expr import Expr, binary, broadcast, const, load, postorder, shuffle, substitute, var
from .loop_ir import Buffer, For, If, Let, Stmt, Store, vector_variable
from .nests import Axis, from_lane
from .vectorize import vectorize

LANE_BYTES = 16  # shuffles within as many bytes are the cheap ones
Stores = Sequence[tuple[Buffer, Expr, Expr]]


def columns(rows: Sequence[Expr], numbers: Iterator[int]) -> tuple[list[Stmt], list[Expr]]:
    """Lets for the shuffles that transpose n vectors of n lanes, a power of two, and the variables that hold the result.

    Perfect shuffles of the elements of 16 bytes first, so that each holds n / w elements of w columns; then of those pieces.
    """
    n = len(rows)
    w = min(n, max(1, LANE_BYTES // rows[0].dtype.itemsize))
    lets: list[Stmt] = []

    def pairs(vectors: Sequence[tuple[Expr, Expr]], patterns: tuple[str, str]) -> list[list[Expr]]:
        made: list[list[Expr]] = []
        for a, b in vectors:
            both = []
            for pattern in patterns:
                name = vector_variable(f"s{next(numbers)}", a.dtype, n)
                lets.append(Let(name, shuffle(a, b, pattern)))
                both.append(name)
            made.append(both)
        return made

    groups: list[list[Expr]] = []  # of w rows each: element j of a group holds columns j, w + j, 2 w + j ... of its rows
    for k in range(0, n, w):
        group, size = list(rows[k : k + w]), 1
        while size < w:
            halves = list(zip(group[: w // 2], group[w // 2 :], strict=True))
            group, size = [x for both in pairs(halves, (f"low{w}", f"high{w}")) for x in both], 2 * size
        groups.append(group)
    done: list[Expr] = [rows[0]] * n
    for j in range(w):
        pieces, count = [g[j] for g in groups], 1
        while count < n // w:
            split = pairs(list(zip(pieces[::2], pieces[1::2], strict=True)), (f"even{w}", f"odd{w}"))
            pieces, count = [both[0] for both in split] + [both[1] for both in split], 2 * count
        done[j::w] = pieces
    return lets, done


@dataclass(frozen=True)
class Transposing:
    """Stores along an axis of what jumps along it (the loads `far`) and is contiguous along its partner, `lanes` by `lanes`."""

    stores: Stores
    far: Sequence[Expr]
    lanes: int
    axis: Axis
    partner: Axis
    numbers: Iterator[int]

    @property
    def possible(self) -> bool:
        """Whether the loads have no masks, elements of one size, and room for a block."""
        plain = all(len(e.args) == 1 and e.lanes == 1 and e.dtype.bits in (16, 32, 64) for e in self.far)
        still = plain and not any(x.op == "load" for e in self.far for x in postorder(e.args))
        room = self.lanes >= 4 and self.lanes & (self.lanes - 1) == 0 and min(self.axis.extent, self.partner.extent) >= self.lanes
        return bool(self.far) and still and room and len({e.dtype.itemsize for e in self.far}) == 1

    def along(self, block: Expr) -> list[Stmt]:
        """For a block number of the partner: the loop over the axis that computes and stores `lanes` of the partner's elements.

        What is left along the partner comes from the last `lanes` of it, of which only those are stored that are left; so it is
        along the axis, by masks.
        """
        lanes, partner = self.lanes, self.partner
        full, left = divmod(partner.extent, lanes)
        body = self._walk(binary("add", binary("mul", block, lanes), partner.start), range(lanes))
        if not left:
            return body
        rest = self._walk(const(partner.start + partner.extent - lanes), range(lanes - left, lanes))
        return [If(binary("lt", block, full), tuple(body), tuple(rest))]

    def _walk(self, first: Expr, taken: range) -> list[Stmt]:
        """The loop over the axis, and what is left of it: the partner's elements from `first` on, of which some are stored."""
        axis, lanes = self.axis, self.lanes
        whole, left = axis.extent // lanes * lanes, axis.extent % lanes
        stop = axis.start + whole
        body: list[Stmt] = [For(axis.var, const(axis.start), const(stop), tuple(self._block(axis.var, first, taken)), step=lanes)]
        if left:
            body += self._block(const(stop + left - lanes), first, taken, from_lane(lanes - left, lanes))
        return body

    def _block(self, position: Expr, first: Expr, taken: range, mask: Expr | None = None) -> list[Stmt]:
        """One block: its rows loaded, transposed, and every column's values stored."""
        v, partner, lanes, numbers = self.axis.var, self.partner.var, self.lanes, self.numbers
        done: list[Stmt] = []
        held: dict[Expr, Expr] = {}
        found: list[tuple[Expr, list[Expr]]] = []
        for e in self.far:
            rows: list[Expr] = []
            for k in range(lanes):
                at = substitute(e.args[0], {v: binary("add", position, k), partner: first})
                rows.append(vector_variable(f"r{next(numbers)}", e.dtype, lanes))
                done.append(Let(rows[-1], load(e.attr[0], (at,), e.dtype, None, lanes)))
            lets, its = columns(rows, numbers)
            done += lets
            held[e] = var(f"column{next(numbers)}", e.dtype)
            found.append((held[e], its))
        memo: dict[Expr, Expr] = {}
        values = [substitute(value, held, memo) for _, _, value in self.stores]
        for k in taken:
            bound = {name: its[k] for name, its in found}
            wide: dict[Expr, Expr] = {}
            place = {v: position, partner: binary("add", first, k)}
            results = [broadcast(substitute(vectorize(e, v, lanes, None, bound, wide), place), lanes) for e in values]
            if len(results) > 1:  # every value before any store: an output may take the memory of an operand
                for i, e in enumerate(results):
                    results[i] = vector_variable(f"t{next(numbers)}", e.dtype, lanes)
                    done.append(Let(results[i], e))
            for (buffer, index, _), e in zip(self.stores, results, strict=True):
                done.append(Store(buffer, (substitute(index, place),), e, mask))
        return done
