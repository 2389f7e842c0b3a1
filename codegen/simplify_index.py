"""Index arithmetic in a canonical form: sums of coefficient * atom, with the range each variable runs over.

An atom is a variable, or whatever is not linear: a quotient, a remainder, a clamp, an index loaded from memory. Equal
positions become equal expressions, so that a slice of a pad of a reshape is again one contiguous run: the rules are

    (c*q + r) // c = q               (c*q + r) % c = r               where 0 <= r < c
    (g*a + b) // (g*c) = a // c      (g*a + b) % (g*c) = g * (a % c) + b      where 0 <= b < g
    (x // a) // b  = x // (a*b)      c*(x // c) + x % c = x

and comparisons, clamps and selects that the ranges decide disappear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..ir.dtypes import bool_, i64
from ..ir.expr import COMPARE, Expr, binary, const, load, postorder, rebuild, select

HUGE = 1 << 62
_LINEAR = frozenset({"add", "sub", "mul", "floordiv", "mod", "max", "min", "neg"})


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + the sum of coefficient * atom; atoms in a canonical order, coefficients not 0."""

    terms: tuple[tuple[Expr, int], ...] = ()
    constant: int = 0

    def coefficient(self, atom: Expr) -> int:
        return next((c for a, c in self.terms if a is atom), 0)

    @property
    def is_const(self) -> bool:
        return not self.terms


def _key(atom: Expr) -> str:
    return str(atom.attr) if atom.op == "var" else repr(atom)


def _build(terms: Mapping[Expr, int], constant: int) -> Linear:
    kept = [(a, c) for a, c in terms.items() if c]
    if len(kept) > 1:
        kept.sort(key=lambda t: (-abs(t[1]), _key(t[0])))
    return Linear(tuple(kept), constant)


def add(a: Linear, b: Linear, scale: int = 1) -> Linear:
    """a + scale * b."""
    terms = dict(a.terms)
    for atom, c in b.terms:
        terms[atom] = terms.get(atom, 0) + scale * c
    return _build(terms, a.constant + scale * b.constant)


def to_expr(linear: Linear) -> Expr:
    """The expression of a linear form: largest coefficients first, the constant last."""
    total: Expr | None = None
    for atom, c in linear.terms:
        part = binary("mul", atom, c)
        total = part if total is None else binary("add", total, part)
    if total is None:
        return const(linear.constant)
    return binary("add", total, linear.constant)


class Simplifier:
    """Rewrites expressions for variables that run over the given ranges (inclusive).

    One object serves one set of ranges: it remembers what it has rewritten.
    """

    def __init__(self, ranges: Mapping[Expr, tuple[int, int]]) -> None:
        self.ranges = dict(ranges)
        self._done: dict[Expr, Expr] = {}
        self._linear: dict[Expr, Linear] = {}
        self._bounds: dict[Expr, tuple[int, int]] = {}

    def simplify(self, root: Expr) -> Expr:
        """The same value, its indices canonical."""
        done = self._done
        if root in done:
            return done[root]
        for e in postorder([root], done):
            done[e] = self._step(e, tuple(done[a] for a in e.args))
        return done[root]

    def _step(self, e: Expr, args: tuple[Expr, ...]) -> Expr:
        if e.lanes != 1:
            return e if args == e.args else rebuild(e, args)
        if e.dtype is i64 and e.op in _LINEAR:
            return to_expr(self._combine(e.op, args))
        if e.op in COMPARE and args[0].dtype is i64:
            return self._compare(e.op, args[0], args[1])
        if e.op == "load" and len(args) > e.attr[1]:
            mask = args[-1]
            if mask.is_const:
                return load(e.attr[0], args[:-1], e.dtype) if mask.attr else const(0, e.dtype)
        if e.op == "and" and e.dtype is bool_:
            return self._and(args[0], args[1])
        if e.op == "select" and args[0].op == "not":
            return select(args[0].args[0], args[2], args[1])
        if args == e.args and e.op != "select":
            return e
        return rebuild(e, args)

    def _and(self, a: Expr, b: Expr) -> Expr:
        return a if a is b else binary("and", a, b)

    def linear(self, e: Expr) -> Linear:
        """The linear form of an i64 expression."""
        found = self._linear.get(e)
        if found is None:
            found = self._of(self.simplify(e))
            self._linear[e] = found
        return found

    def _of(self, e: Expr) -> Linear:
        """The linear form of an expression that is simplified already."""
        if e.is_const:
            return Linear((), int(e.attr))
        found = self._linear.get(e)
        if found is not None:
            return found
        if e.op == "add":
            found = add(self._of(e.args[0]), self._of(e.args[1]))
        elif e.op == "mul" and e.args[1].is_const:
            found = add(Linear(), self._of(e.args[0]), int(e.args[1].attr))
        else:
            found = Linear(((e, 1),), 0)
        self._linear[e] = found
        return found

    def _combine(self, op: str, args: tuple[Expr, ...]) -> Linear:
        forms = [self._of(a) for a in args]
        if op == "add":
            return self._recombine(add(forms[0], forms[1]))
        if op == "sub":
            return self._recombine(add(forms[0], forms[1], -1))
        if op == "neg":
            return add(Linear(), forms[0], -1)
        x, y = forms
        if op == "mul" and (x.is_const or y.is_const):
            return add(Linear(), y, x.constant) if x.is_const else add(Linear(), x, y.constant)
        if op in ("floordiv", "mod") and y.is_const and y.constant > 0 and self._finite(x):
            return self._floordiv(x, y.constant) if op == "floordiv" else self._mod(x, y.constant)
        if op in ("max", "min") and self._finite(x) and self._finite(y):
            low, high = self.bounds(add(x, y, -1))
            if low >= 0:
                return x if op == "max" else y
            if high <= 0:
                return y if op == "max" else x
        return self._atom(binary(op, to_expr(x), to_expr(y)))

    def _finite(self, x: Linear) -> bool:
        """Whether it cannot wrap around. What is loaded from memory can: there only modular rules apply."""
        low, high = self.bounds(x)
        return low > -HUGE and high < HUGE

    def _atom(self, e: Expr) -> Linear:
        return Linear((), int(e.attr)) if e.is_const else Linear(((e, 1),), 0)

    def _split(self, x: Linear, c: int) -> tuple[Linear, Linear]:
        """x = c * q + r, with every term that c divides in q."""
        q: dict[Expr, int] = {}
        r: dict[Expr, int] = {}
        for atom, k in x.terms:
            if k % c == 0:
                q[atom] = k // c
            else:
                r[atom] = k
        rest = _build(r, x.constant % c)
        low, high = self.bounds(rest)
        # The remainder's constant is one of two values that differ by c: prefer the one that stays in [0, c).
        if not (low >= 0 and high < c) and x.constant % c:
            low, high = self.bounds(_build(r, x.constant % c - c))
            if low >= 0 and high < c:
                return _build(q, x.constant // c + 1), _build(r, x.constant % c - c)
        return _build(q, x.constant // c), rest

    def _floordiv(self, x: Linear, c: int) -> Linear:
        if c == 1:
            return x
        q, r = self._split(x, c)
        low, high = self.bounds(r)
        if low // c == high // c:
            return _build(dict(q.terms), q.constant + low // c)
        for g in sorted({math.gcd(abs(k), c) for _, k in r.terms}, reverse=True):
            if g == 1:
                continue
            outer, inner = self._split(r, g)
            low, high = self.bounds(inner)
            if low // g == high // g:
                small = self._floordiv(_build(dict(outer.terms), outer.constant + low // g), c // g)
                return self._recombine(add(q, small))
        if len(r.terms) == 1 and r.constant == 0 and r.terms[0][1] == 1:
            atom = r.terms[0][0]
            if atom.op == "floordiv" and atom.args[1].is_const and int(atom.args[1].attr) > 0:
                return self._recombine(add(q, self._floordiv(self._of(atom.args[0]), c * int(atom.args[1].attr))))
        return self._recombine(add(q, self._atom(binary("floordiv", to_expr(r), c))))

    def _mod(self, x: Linear, c: int) -> Linear:
        if c == 1:
            return Linear()
        _, r = self._split(x, c)
        low, high = self.bounds(r)
        if low // c == high // c:
            return _build(dict(r.terms), r.constant - low // c * c)
        for g in sorted({math.gcd(abs(k), c) for _, k in r.terms}, reverse=True):
            if g == 1:
                continue
            outer, inner = self._split(r, g)  # (g*a + b) % c = g * (a % (c / g)) + b
            low, high = self.bounds(inner)
            if low // g == high // g:
                small = self._mod(_build(dict(outer.terms), outer.constant + low // g), c // g)
                return self._recombine(add(_build(dict(inner.terms), inner.constant - low // g * g), small, g))
        if len(r.terms) == 1 and r.constant == 0 and r.terms[0][1] == 1:
            atom = r.terms[0][0]
            if atom.op == "mod" and atom.args[1].is_const and int(atom.args[1].attr) % c == 0 and int(atom.args[1].attr) > 0:
                return self._mod(self._of(atom.args[0]), c)
        return self._atom(binary("mod", to_expr(r), c))

    def _recombine(self, x: Linear) -> Linear:
        """c*(y // c) + y % c = y, as long as there is such a pair."""
        changed = True
        while changed:
            changed = False
            for atom, k in x.terms:
                if atom.op != "mod" or not atom.args[1].is_const:
                    continue
                c = int(atom.args[1].attr)
                y = self._of(atom.args[0])
                quotient = self._quotient(atom.args[0], c)
                if len(quotient.terms) != 1 or quotient.constant or quotient.terms[0][1] != 1:
                    continue
                if x.coefficient(quotient.terms[0][0]) == k * c:
                    x = add(add(add(x, quotient, -k * c), Linear(((atom, 1),)), -k), y, k)
                    changed = True
                    break
        return x

    def _quotient(self, y: Expr, c: int) -> Linear:
        if y.op == "floordiv" and y.args[1].is_const:
            return self._atom(binary("floordiv", y.args[0], int(y.args[1].attr) * c))
        return self._atom(binary("floordiv", y, c))

    def _compare(self, op: str, a: Expr, b: Expr) -> Expr:
        x, y = self._of(a), self._of(b)
        if not (self._finite(x) and self._finite(y)):
            return binary(op, a, b)
        difference = add(x, y, -1)
        low, high = self.bounds(difference)
        if op == "lt":
            truth = True if high < 0 else False if low >= 0 else None
        elif op == "le":
            truth = True if high <= 0 else False if low > 0 else None
        else:
            same = True if low == high == 0 else False if low > 0 or high < 0 else None
            if same is None and difference.terms:
                g = math.gcd(*(c for _, c in difference.terms))
                same = False if difference.constant % g else None
            truth = same if op == "eq" or same is None else not same
        if truth is not None:
            return const(truth, bool_)
        return binary(op, a, b)

    def bounds(self, x: Linear) -> tuple[int, int]:
        """The least and greatest value, as far as the ranges tell."""
        low = high = x.constant
        for atom, c in x.terms:
            a, b = self.range(atom)
            low += c * a if c > 0 else c * b
            high += c * b if c > 0 else c * a
        return max(low, -HUGE), min(high, HUGE)

    def range(self, e: Expr) -> tuple[int, int]:
        """The least and greatest value of an i64 expression."""
        if e.op == "var":
            return self.ranges.get(e, (-HUGE, HUGE))
        if e.is_const:
            return int(e.attr), int(e.attr)
        found = self._bounds.get(e)
        if found is None:
            found = self._range(e)
            self._bounds[e] = found
        return found

    def _range(self, e: Expr) -> tuple[int, int]:
        if e.op in ("add", "sub") or (e.op == "mul" and e.args[1].is_const):
            return self.bounds(self._of(e)) if e.op != "sub" else self.bounds(add(self._of(e.args[0]), self._of(e.args[1]), -1))
        if e.op in ("floordiv", "mod") and e.args[1].is_const and int(e.args[1].attr) > 0:
            c = int(e.args[1].attr)
            low, high = self.bounds(self._of(e.args[0]))
            if e.op == "floordiv":
                return low // c, high // c
            return (low % c, high % c) if low // c == high // c else (0, c - 1)
        if e.op in ("max", "min"):
            (a, b), (c, d) = self.range(e.args[0]), self.range(e.args[1])
            return (max(a, c), max(b, d)) if e.op == "max" else (min(a, c), min(b, d))
        if e.op == "select":
            (a, b), (c, d) = self.range(e.args[1]), self.range(e.args[2])
            return min(a, c), max(b, d)
        if e.op == "mul":
            ends = [a * b for a in self.range(e.args[0]) for b in self.range(e.args[1])]
            return max(min(ends), -HUGE), min(max(ends), HUGE)
        if e.op == "cast" and (e.args[0].dtype.is_integer or e.args[0].dtype is bool_) and e.args[0].dtype.bits < 64:
            source = e.args[0].dtype
            if source is bool_:
                return 0, 1
            half = 1 << (source.bits - 1)
            return (-half, half - 1) if source.kind == "int" else (0, 2 * half - 1)
        return -HUGE, HUGE

    def breakpoints(self, roots: Iterable[Expr]) -> dict[Expr, set[int]]:
        """For each variable, the values at which a comparison or clamp of it alone changes its outcome.

        `p` in the set of `v` says that v < p and v >= p behave differently. The roots must be simplified.
        """
        found: dict[Expr, set[int]] = {}
        for e in postorder(roots):
            if e.lanes != 1 or len(e.args) != 2 or e.args[0].dtype is not i64:
                continue
            if e.op in COMPARE or (e.op in ("max", "min") and e.dtype is i64):
                difference = add(self._of(e.args[0]), self._of(e.args[1]), -1)
                if len(difference.terms) == 1 and difference.terms[0][0].op == "var":
                    (v, c), k = difference.terms[0], difference.constant
                    low, high = self.range(v)
                    found.setdefault(v, set()).update(p for p in _thresholds(e.op, c, k) if low < p <= high)
        return found


def _thresholds(op: str, c: int, k: int) -> Iterator[int]:
    """Where the truth of `c*v + k op 0` changes."""
    if op in ("eq", "ne"):
        if -k % c == 0:
            yield -k // c
            yield -k // c + 1
        return
    if op == "le":  # c*v + k <= 0  is  c*v + k - 1 < 0
        k -= 1
    yield -(k // c) if c > 0 else k // -c + 1


def linear_roots(roots: Iterable[Expr]) -> list[Expr]:
    """The largest i64 expressions under the roots: indices, and positions used as values or compared."""
    found: dict[Expr, None] = {}
    roots = list(roots)
    found.update((r, None) for r in roots if r.dtype is i64 and r.op in _LINEAR | {"var"})
    for e in postorder(roots):
        if e.dtype is i64 and e.op in _LINEAR | {"var"}:
            continue
        for a in e.args:
            if a.dtype is i64 and not a.is_const:
                found[a] = None
    return list(found)
