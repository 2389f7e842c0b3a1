"""Index arithmetic over symbolic sizes: i64 expressions as polynomials (`ir.dims`) over sizes, loop variables and opaque parts.

What the static generator decides with ranges of numbers is decided here by proofs over polynomials. A size is at least 1; an
extent that is no plain product of sizes (H + 2, (H - 2) // 2 + 1) gets a name of its own, so that strides stay products and
divide exactly. The rules are those of `codegen.simplify_index`:

    (c*q + r) // c = q      (c*q + r) % c = r      where 0 <= r < c is proved
    (g*a + b) // (g*c) = a // c      (g*a + b) % (g*c) = g * (a % c) + b      where 0 <= b < g is
    c*(x // c) + x % c = x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Final

from ...ir.dims import Dim, DimExpr, Quotient, Symbol
from ...ir.dtypes import i64
from ...ir.expr import COMPARE, SIZE, Expr, ExprLike, binary, const, lift, load, postorder, rebuild, select, var

Monomial = tuple[Symbol | Quotient, ...]
_LINEAR: Final = frozenset({"add", "sub", "mul", "floordiv", "mod", "max", "min", "neg"})
_MOST_TERMS: Final = 48  # of a polynomial; what would be larger stays as it is written


@dataclass(frozen=True, slots=True)
class Axis:
    """A loop variable that runs over 0 .. extent, a polynomial over sizes."""

    var: Expr
    extent: Dim


def terms_of(p: Dim) -> tuple[tuple[Monomial, int], ...]:
    return p.terms if isinstance(p, DimExpr) else (((), p),) if p else ()


def poly_of(terms: Sequence[tuple[Monomial, int]]) -> Dim:
    """The sum of terms."""
    total: Dim = 0
    for monomial, c in terms:
        total = total + (DimExpr(((monomial, c),)) if monomial else c)
    return total


def name_symbol(name: str) -> DimExpr:
    return DimExpr((((Symbol(name),), 1),))


class Space:
    """The sizes and axes that one kernel's expressions range over."""

    def __init__(self) -> None:
        self.axes: dict[str, Axis] = {}
        self.named: dict[Dim, str] = {}  # extents with names of their own
        self.definitions: dict[str, Expr] = {}  # ... and what they are, over sizes
        self._meaning: dict[str, Dim] = {}
        self._opaque: dict[str, Expr] = {}
        self._names: dict[Expr, str] = {}
        self._polys: dict[Expr, Dim] = {}
        self._simple: dict[Expr, Expr] = {}
        self._count = 0

    # -- sizes and axes -----------------------------------------------------------------------------------------------

    def size(self, d: Dim) -> Dim:
        """A dimension of a shape as a polynomial over this kernel's sizes."""
        if isinstance(d, int):
            return d
        (first, *rest) = d.terms
        if not rest and first[1] > 0 and all(isinstance(a, Symbol) for a in first[0]):
            return self.poly(lift(d))
        name = self.named.get(d)
        if name is None:
            name = self.named[d] = f"dim{len(self.named)}"
            self.definitions[name] = lift(d)
            self._meaning[name] = self._poly_of_sizes(lift(d))
            self._opaque[name] = var(name)
            self._names[var(name)] = name
        return name_symbol(name)

    def sizes(self, shape: Sequence[Dim]) -> tuple[Dim, ...]:
        return tuple(map(self.size, shape))

    def axis(self, stem: str, extent: Dim) -> Axis:
        """A fresh axis; `extent` is a polynomial of this space."""
        name = f"{stem}{self._count}"
        self._count += 1
        made = Axis(var(name), extent)
        self.axes[name] = made
        return made

    def axes_over(self, stem: str, shape: Sequence[Dim]) -> list[Axis]:
        return [self.axis(stem, self.size(d)) for d in shape]

    def extent(self, axis: Axis) -> Expr:
        return self.expr(axis.extent)

    def unit(self, axis: Axis) -> bool:
        return axis.extent == 1

    # -- polynomials --------------------------------------------------------------------------------------------------

    def _poly_of_sizes(self, e: Expr) -> Dim:
        return self.poly(e)

    def poly(self, root: Expr) -> Dim:
        """An i64 scalar as a polynomial."""
        done = self._polys
        if root in done:
            return done[root]
        for e in postorder([root], done):
            if e.dtype is i64 and e.lanes == 1:
                done[e] = self._step(e)
        return done[root]

    def _step(self, e: Expr) -> Dim:
        if e.op == "const":
            return int(e.attr)
        if e.op == "var":
            self._opaque.setdefault(str(e.attr), e)
            return name_symbol(str(e.attr))
        if e.op in _LINEAR:
            args = [self._polys[a] for a in e.args]
            a, b = args[0], args[-1]
            match e.op:
                case "neg":
                    return a * -1
                case "add" | "sub":
                    return self._recombined(a + b if e.op == "add" else a - b)
                case "mul":
                    if len(terms_of(a)) * len(terms_of(b)) <= _MOST_TERMS:
                        return self._recombined(a * b)
                case "floordiv" | "mod":
                    if self._positive(b):
                        return self.divide("//" if e.op == "floordiv" else "%", a, b)
                case "max" | "min":
                    if self.at_least(a - b, 0):
                        return a if e.op == "max" else b
                    if self.at_least(b - a, 0):
                        return b if e.op == "max" else a
            return self._hidden(binary(e.op, self.expr(a), self.expr(b)) if e.op != "neg" else e)
        return self._hidden(self._rebuilt(e))

    def _hidden(self, e: Expr) -> Dim:
        if e.is_const:
            return int(e.attr)
        name = self._names.get(e)
        if name is None:
            name = self._names[e] = f"~{len(self._names)}"
            self._opaque[name] = e
        return name_symbol(name)

    def _positive(self, b: Dim) -> bool:
        """Whether a divisor is a number or a product of sizes, above 0 where anything is divided by it."""
        if isinstance(b, int):
            return b > 0
        return len(b.terms) == 1 and b.terms[0][1] > 0 and all(self._is_size(a) for a in b.terms[0][0])

    def _is_size(self, atom: Symbol | Quotient) -> bool:
        return isinstance(atom, Symbol) and (atom.name.startswith(SIZE) or atom.name in self.definitions)

    def divide(self, op: str, a: Dim, b: Dim) -> Dim:
        """a // b or a % b for a positive b."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b if op == "//" else a % b
        if b == 1:
            return a if op == "//" else 0
        whole: Dim = 0
        rest: list[tuple[Monomial, int]] = []
        for term in terms_of(a):
            part = _exact(term, b)
            if part is None:
                rest.append(term)
            else:
                whole = whole + part
        left = poly_of(rest)
        if isinstance(left, int) and isinstance(b, int):
            return whole + left // b if op == "//" else left % b
        if self._within(left, b):
            return whole if op == "//" else left
        factor = b if isinstance(b, int) else b.terms[0][1]
        for g in sorted({gcd(abs(c), factor) for _, c in rest}, reverse=True):
            if g == 1:
                continue
            outer = poly_of([(m, c // g) for m, c in rest if c % g == 0])
            inner = poly_of([(m, c) for m, c in rest if c % g])
            if self._within(inner, g):
                smaller = (
                    b // g if isinstance(b, int) else DimExpr(((b.terms[0][0], factor // g),)) if b.terms[0][0] else factor // g
                )
                found = self.divide(op, outer, smaller)
                return whole + found if op == "//" else found * g + inner
        atom = DimExpr((((Quotient(op, left, b),), 1),))
        return whole + atom if op == "//" else atom

    def _recombined(self, p: Dim) -> Dim:
        """c*(y // c) + y % c = y, as long as there is such a pair."""
        changed = isinstance(p, DimExpr)
        while changed and isinstance(p, DimExpr):
            changed = False
            known = dict(p.terms)
            for monomial, c in p.terms:
                for k, atom in enumerate(monomial):
                    if not isinstance(atom, Quotient) or atom.op != "%":
                        continue
                    cofactor = poly_of([((*monomial[:k], *monomial[k + 1 :]), c)])
                    # y % c with y = r + c*q (what c divides was dropped): (y // c) stands for r // c
                    quotient = DimExpr((((Quotient("//", atom.numerator, atom.denominator),), 1),))
                    wanted = terms_of(cofactor * atom.denominator * quotient)
                    if len(wanted) == 1 and known.get(wanted[0][0]) == wanted[0][1]:
                        p = p - poly_of([wanted[0]]) - poly_of([(monomial, c)]) + cofactor * atom.numerator
                        changed = True
                        break
                if changed:
                    break
        return p

    # -- proofs -------------------------------------------------------------------------------------------------------

    def _within(self, p: Dim, below: Dim) -> bool:
        return self.at_least(p, 0) and self.at_least(below - 1 - p, 0)

    def at_least(self, p: Dim, bound: int) -> bool:
        """Whether p >= bound is proved."""
        low = self._lower(p)
        return low is not None and self._no_less(low - bound)

    def _lower(self, p: Dim) -> Dim | None:
        """A bound from below that has no axes in it; None if there is none known."""
        total: Dim = 0
        for monomial, c in terms_of(p):
            moving = [a for a in monomial if not self._is_size(a)]
            fixed = tuple(a for a in monomial if self._is_size(a))
            if not moving:
                total = total + poly_of([(monomial, c)])
                continue
            if len(moving) != 1:
                return None
            ends = self._range(moving[0])
            if ends is None or (c < 0 and ends[1] is None):
                return None
            end = ends[0] if c > 0 else ends[1]
            assert end is not None
            total = total + poly_of([(fixed, c)]) * end
        return total

    def _range(self, atom: Symbol | Quotient) -> tuple[Dim, Dim | None] | None:
        if isinstance(atom, Symbol):
            axis = self.axes.get(atom.name)
            return None if axis is None else (0, axis.extent - 1)
        if atom.op == "%":
            return (0, atom.denominator - 1)
        return (0, None) if self.at_least(atom.numerator, 0) else None

    def _no_less(self, p: Dim) -> bool:
        """Whether a polynomial over sizes is proved to be at least 0: every size is 1 + something that is not negative."""
        if isinstance(p, int):
            return p >= 0
        direct = self._shifted(p)
        if direct is not None and all(c >= 0 for _, c in terms_of(direct)):
            return True
        meant = self._shifted(self._expanded(p))
        return meant is not None and all(c >= 0 for _, c in terms_of(meant))

    def _expanded(self, p: Dim) -> Dim:
        total: Dim = 0
        for monomial, c in terms_of(p):
            part: Dim = c
            for a in monomial:
                known = self._meaning.get(a.name) if isinstance(a, Symbol) else None
                part = part * (known if known is not None else poly_of([((a,), 1)]))
            total = total + part
        return total

    def _shifted(self, p: Dim) -> Dim | None:
        total: Dim = 0
        for monomial, c in terms_of(p):
            part: Dim = c
            for a in monomial:
                if isinstance(a, Quotient):
                    if a.op == "//" and not self._no_less(a.numerator):
                        return None
                    part = part * poly_of([((a,), 1)])
                elif a.name.startswith(SIZE):
                    part = part * (poly_of([((a,), 1)]) + 1)
                elif a.name in self.definitions:  # an extent may be 0
                    part = part * poly_of([((a,), 1)])
                else:
                    return None
            total = total + part
        return total

    # -- back to expressions ------------------------------------------------------------------------------------------

    def expr(self, p: Dim) -> Expr:
        """The expression of a polynomial: what moves with loops times what sizes give."""
        if isinstance(p, int):
            return const(p)
        groups: dict[Monomial, list[tuple[Monomial, int]]] = {}
        for monomial, c in p.terms:
            moving = tuple(a for a in monomial if not self._only_sizes(a))
            groups.setdefault(moving, []).append((tuple(a for a in monomial if self._only_sizes(a)), c))
        total: Expr | None = None
        for moving, parts in sorted(groups.items(), key=lambda g: (not g[0], str(g[0]))):
            factor = self._sum(parts)
            term = factor
            if moving:
                product = self._atom(moving[0])
                for a in moving[1:]:
                    product = binary("mul", product, self._atom(a))
                term = binary("mul", product, factor)
            total = term if total is None else binary("add", total, term)
        assert total is not None
        return total

    def _only_sizes(self, atom: Symbol | Quotient) -> bool:
        if isinstance(atom, Symbol):
            return self._is_size(atom)
        return all(self._only_sizes(a) for d in (atom.numerator, atom.denominator) for m, _ in terms_of(d) for a in m)

    def _sum(self, parts: Sequence[tuple[Monomial, int]]) -> Expr:
        total: Expr | None = None
        for monomial, c in parts:
            term: Expr = const(c)
            for a in monomial:
                term = binary("mul", self._atom(a), term)
            total = term if total is None else binary("add", total, term)
        return const(0) if total is None else total

    def _atom(self, atom: Symbol | Quotient) -> Expr:
        if isinstance(atom, Symbol):
            return self._opaque[atom.name] if atom.name in self._opaque else var(atom.name)
        return binary("floordiv" if atom.op == "//" else "mod", self.expr(atom.numerator), self.expr(atom.denominator))

    def simplify(self, root: Expr) -> Expr:
        """The same value, its indices canonical, and comparisons that are proved decided."""
        done = self._simple
        if root in done:
            return done[root]
        for e in postorder([root], done):
            done[e] = self._simplified(e)
        return done[root]

    def _simplified(self, e: Expr) -> Expr:
        if e.lanes == 1 and e.dtype is i64 and e.op in _LINEAR:
            return self.expr(self.poly(e))
        args = tuple(self._simple[a] for a in e.args)
        if e.op in COMPARE and args[0].dtype is i64 and e.lanes == 1:
            return self._compared(e.op, args[0], args[1])
        if e.op == "load" and len(args) > e.attr[1] and args[-1].is_const:
            return load(e.attr[0], args[:-1], e.dtype) if args[-1].attr else const(0, e.dtype)
        if e.op == "select" and args[0].op == "not":
            return select(args[0].args[0], args[2], args[1])
        return e if args == e.args and e.op != "select" else rebuild(e, args)

    def _rebuilt(self, e: Expr) -> Expr:
        for a in e.args:
            self.simplify(a)
        args = tuple(self._simple[a] for a in e.args)
        return e if args == e.args else rebuild(e, args)

    def _compared(self, op: str, a: Expr, b: Expr) -> Expr:
        d = self.poly(b) - self.poly(a)
        if op in ("lt", "le"):
            if self.at_least(d, 1 if op == "lt" else 0):
                return const(True, "bool")
            if self.at_least(d * -1, 0 if op == "lt" else 1):
                return const(False, "bool")
        elif d == 0:
            return const(op == "eq", "bool")
        elif self.at_least(d, 1) or self.at_least(d * -1, 1):
            return const(op == "ne", "bool")
        return binary(op, a, b)

    # -- shapes -------------------------------------------------------------------------------------------------------

    def flat(self, index: Sequence[ExprLike], extents: Sequence[Dim]) -> Expr:
        """The position of an element in a row-major array; extents are polynomials of this space."""
        total: Dim = 0
        stride: Dim = 1
        for i, n in zip(reversed(index), reversed(extents), strict=True):
            if n != 1:
                total = total + self.poly(lift(i)) * stride
            stride = stride * n
        return self.expr(self._recombined(total))

    def unflat(self, position: Expr, extents: Sequence[Dim]) -> tuple[Expr, ...]:
        """The index of the element at a position of a row-major array."""
        p = self.poly(position)
        found: list[Expr] = []
        stride: Dim = 1
        for k in range(len(extents) - 1, -1, -1):
            n = extents[k]
            if n == 1:
                found.insert(0, const(0))
                continue
            here = self.divide("//", p, stride)
            others = any(m != 1 for m in extents[:k])
            found.insert(0, self.expr(self.divide("%", here, n) if others else here))
            stride = stride * n
        return tuple(found)

    def stride(self, index: Expr, v: Expr) -> Dim | None:
        """How a flat index moves with v: a polynomial over sizes; None where it is not linear in it."""
        total: Dim = 0
        for monomial, c in terms_of(self.poly(index)):
            held = [a for a in monomial if isinstance(a, Symbol) and a.name == v.attr]
            rest = tuple(a for a in monomial if not (isinstance(a, Symbol) and a.name == v.attr))
            if any(self._mentions(a, v) for a in rest) or len(held) > 1:
                return None
            if held:
                if not all(self._only_sizes(a) for a in rest):
                    return None
                total = total + poly_of([(rest, c)])
        return total

    def _mentions(self, atom: Symbol | Quotient, v: Expr) -> bool:
        if isinstance(atom, Symbol):
            e = self._opaque.get(atom.name)
            return e is not None and e.op != "var" and any(x is v for x in postorder([e]))
        return any(
            a == Symbol(str(v.attr)) or self._mentions(a, v)
            for d in (atom.numerator, atom.denominator)
            for m, _ in terms_of(d)
            for a in m
        )


def _exact(term: tuple[Monomial, int], b: Dim) -> Dim | None:
    """One term divided by a monomial, if it comes out even."""
    monomial, c = term
    atoms, factor = ((), b) if isinstance(b, int) else b.terms[0]
    rest = list(monomial)
    for a in atoms:
        if a not in rest:
            return None
        rest.remove(a)
    return None if c % factor else poly_of([(tuple(rest), c // factor)])
