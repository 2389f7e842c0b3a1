"""Index expressions as linear forms: a constant plus coefficients times atoms (variables and whatever is not linear)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..ir.dtypes import i64
from ..ir.expr import Expr, binary, const, postorder


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + sum of coefficient * atom; no coefficient is 0, and each atom stands once."""

    constant: int
    terms: tuple[tuple[Expr, int], ...] = ()

    def __add__(self, other: Linear) -> Linear:
        if not other.terms:
            return Linear(self.constant + other.constant, self.terms)
        if not self.terms:
            return Linear(self.constant + other.constant, other.terms)
        total = dict(self.terms)
        for atom, c in other.terms:
            total[atom] = total.get(atom, 0) + c
        return Linear(self.constant + other.constant, tuple((a, c) for a, c in total.items() if c))

    def scaled(self, factor: int) -> Linear:
        if factor == 0:
            return Linear(0)
        return Linear(self.constant * factor, tuple((a, c * factor) for a, c in self.terms))

    def coefficient(self, atom: Expr) -> int:
        return next((c for a, c in self.terms if a is atom), 0)

    def expr(self) -> Expr:
        """The form as an expression again."""
        total: Expr | None = None
        for atom, c in self.terms:
            term = binary("mul", atom, c)
            total = term if total is None else binary("add", total, term)
        return const(self.constant) if total is None else binary("add", total, self.constant)


def linear(root: Expr, memo: dict[Expr, Linear] | None = None) -> Linear:
    """The linear form of a scalar i64 expression. `memo` keeps results between calls."""
    done = {} if memo is None else memo
    if root in done:
        return done[root]
    for e in postorder([root], done):
        if e.dtype is not i64 or e.lanes != 1:
            done[e] = Linear(0, ((e, 1),))
        elif e.op == "const":
            done[e] = Linear(int(e.attr))
        elif e.op == "add":
            done[e] = done[e.args[0]] + done[e.args[1]]
        elif e.op == "sub":
            done[e] = done[e.args[0]] + done[e.args[1]].scaled(-1)
        elif e.op == "neg":
            done[e] = done[e.args[0]].scaled(-1)
        elif e.op == "mul":
            a, b = done[e.args[0]], done[e.args[1]]
            if not b.terms:
                done[e] = a.scaled(b.constant)
            elif not a.terms:
                done[e] = b.scaled(a.constant)
            else:
                done[e] = Linear(0, ((e, 1),))
        else:
            done[e] = Linear(0, ((e, 1),))
    return done[root]


def flat_index(index: tuple[Expr, ...], strides: tuple[int, ...], memo: dict[Expr, Linear] | None = None) -> Linear:
    """The element offset of an index (scalars only) into a buffer with these strides."""
    total = Linear(0)
    for i, s in zip(index, strides, strict=True):
        total = total + linear(i, memo).scaled(s)
    return total


_NONE: Final[frozenset[Expr]] = frozenset()


def free_variables(root: Expr, memo: dict[Expr, frozenset[Expr]]) -> frozenset[Expr]:
    """The variables an expression reads."""
    if root in memo:
        return memo[root]
    for e in postorder([root], memo):
        found = [memo[a] for a in e.args if memo[a]]
        if e.op == "var":
            memo[e] = frozenset((e,))
        else:
            memo[e] = found[0].union(*found[1:]) if found else _NONE
    return memo[root]
