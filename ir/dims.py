"""Dimensions: integers, or integer expressions over named symbols.

A `Dim` is a polynomial with integer coefficients over atoms; an atom is a symbol, a floor division or a remainder that
does not simplify. Polynomials are kept in a canonical form, so that equal expressions that arise from shape arithmetic
(`N + N`, `2 * N`) compare equal. Whatever is constant is a plain `int`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Union

from .dtypes import ALL
from .errors import ParseError, ShapeError


@dataclass(frozen=True, slots=True)
class Symbol:
    """A named size, positive and unknown until a run."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Quotient:
    """`floor(numerator / denominator)` (op '//') or the remainder (op '%') that did not simplify."""

    op: str
    numerator: Dim
    denominator: Dim

    def __str__(self) -> str:
        return f"({_nested(self.numerator)} {self.op} {_nested(self.denominator)})"


Atom = Symbol | Quotient
Dim = Union[int, "DimExpr"]
Shape = tuple[Dim, ...]
_Monomial = tuple[Atom, ...]
RESERVED = frozenset({"true", "false", "none", "inf", "nan", *(d.name for d in ALL)})
MAX_WEIGHT, MAX_DEPTH, MAX_NUMBER = 256, 16, 1 << 62  # of a parsed dimension; see `is_modest`


def _order(monomial: _Monomial) -> tuple[int, str]:
    return (-len(monomial), "*".join(map(str, monomial)))


@dataclass(frozen=True, slots=True)
class DimExpr:
    """A non-constant polynomial: `terms` maps a product of atoms to its coefficient, in a canonical order."""

    terms: tuple[tuple[_Monomial, int], ...]

    def __add__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        total = dict(_terms(self))
        for monomial, coefficient in _terms(other):
            total[monomial] = total.get(monomial, 0) + coefficient
        return _build(total)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        return self + other * -1

    def __rsub__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        total: dict[_Monomial, int] = {}
        for left, a in _terms(self):
            for right, b in _terms(other):
                key = tuple(sorted(left + right, key=str))
                total[key] = total.get(key, 0) + a * b
        return _build(total)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        return mod(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        if not isinstance(other, _DIMENSIONS):
            return NotImplemented
        return mod(other, self)

    def __str__(self) -> str:
        parts: list[str] = []
        for monomial, coefficient in self.terms:
            body = "*".join(map(str, monomial))
            if not body:
                text = str(abs(coefficient))
            else:
                text = body if abs(coefficient) == 1 else f"{abs(coefficient)}*{body}"
            sign = "-" if coefficient < 0 else "+"
            parts.append(f" {sign} {text}" if parts else ("-" if coefficient < 0 else "") + text)
        return "".join(parts)

    __repr__ = __str__


# Beside anything else (a Tensor, say), arithmetic is the other operand's business.
_DIMENSIONS = (Integral, DimExpr)


def _nested(value: Dim) -> str:
    text = str(value)
    return f"({text})" if " " in text or "*" in text else text


def _terms(value: Dim) -> tuple[tuple[_Monomial, int], ...]:
    return value.terms if isinstance(value, DimExpr) else (((), value),)


def _build(terms: Mapping[_Monomial, int]) -> Dim:
    kept = sorted(((m, c) for m, c in terms.items() if c), key=lambda t: _order(t[0]))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return DimExpr(tuple(kept))


def symbol(name: str) -> DimExpr:
    """The dimension named `name`: an ASCII identifier that the text form does not use otherwise. Raises ShapeError."""
    if not (name.isidentifier() and name.isascii()):
        raise ShapeError(f"a symbolic dimension is an identifier such as 'N', not {name!r}")
    if name in RESERVED:
        raise ShapeError(f"a symbolic dimension cannot be named {name!r}, which means something else in the text form")
    return DimExpr((((Symbol(name),), 1),))


def _divide_exactly(a: Dim, b: Dim) -> Dim | None:
    """a / b when every term of a is a multiple of b, a single term; None otherwise."""
    if a == 0:
        return 0
    divisor = _terms(b)
    if len(divisor) != 1:
        return 1 if a == b else None
    (atoms, factor), result = divisor[0], dict[_Monomial, int]()
    for monomial, coefficient in _terms(a):
        rest = list(monomial)
        for atom in atoms:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient % factor:
            return None
        result[tuple(rest)] = coefficient // factor
    return _build(result)


def floordiv(a: Dim, b: Dim) -> Dim:
    """floor(a / b)."""
    if isinstance(b, int) and b == 0:
        raise ShapeError(f"dimension {a} divided by zero")
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = _divide_exactly(a, b)
    if exact is not None:
        return exact
    return DimExpr((((Quotient("//", a, b),), 1),))


def mod(a: Dim, b: Dim) -> Dim:
    """a - floor(a / b) * b."""
    if isinstance(b, int) and b == 0:
        raise ShapeError(f"dimension {a} modulo zero")
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    if _divide_exactly(a, b) is not None:
        return 0
    return DimExpr((((Quotient("%", a, b),), 1),))


def product(dims: Sequence[Dim]) -> Dim:
    """The product of dims; 1 when there are none."""
    total: Dim = 1
    for d in dims:
        total = total * d
    return total


def symbols(value: Dim) -> frozenset[str]:
    """The names that occur in a dimension."""
    found: set[str] = set()
    stack: list[Dim] = [value]
    while stack:
        for monomial, _ in _terms(stack.pop()):
            for atom in monomial:
                if isinstance(atom, Symbol):
                    found.add(atom.name)
                else:
                    stack += (atom.numerator, atom.denominator)
    return frozenset(found)


def has_division(value: Dim) -> bool:
    """Whether a quotient or remainder that does not simplify occurs in a dimension."""
    return any(isinstance(atom, Quotient) for monomial, _ in _terms(value) for atom in monomial)


def is_modest(value: Dim) -> bool:
    """Whether a dimension is of a size that shapes have. Parsers ask after each operation: products of sums, and divisions
    of them, otherwise grow exponentially in the length of a text."""
    weight = 0
    stack: list[tuple[Dim, int]] = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        for monomial, coefficient in _terms(part):
            weight += 1 + len(monomial)
            if abs(coefficient) > MAX_NUMBER or depth > MAX_DEPTH or weight > MAX_WEIGHT:
                return False
            for atom in monomial:
                if isinstance(atom, Quotient):
                    stack += [(atom.numerator, depth + 1), (atom.denominator, depth + 1)]
    return True


def evaluate(value: Dim, sizes: Mapping[str, Dim]) -> Dim:
    """The dimension with the named sizes put in; an int when all its symbols are given as ints."""
    if isinstance(value, int):
        return value
    total: Dim = 0
    for monomial, coefficient in value.terms:
        part: Dim = coefficient
        for atom in monomial:
            if isinstance(atom, Symbol):
                part = part * sizes.get(atom.name, symbol(atom.name))
            else:
                apply = floordiv if atom.op == "//" else mod
                part = part * apply(evaluate(atom.numerator, sizes), evaluate(atom.denominator, sizes))
        total = total + part
    return total


def as_int(value: Dim) -> int:
    """The value of a constant dimension. Raises ShapeError when it is symbolic."""
    if not isinstance(value, int):
        raise ShapeError(f"dimension {value} is symbolic where a number is needed; give its size first")
    return value


_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|(//|[-+*%()]))")


def parse_dim(text: str) -> Dim:
    """Parses what `str` of a dimension prints: integers, names, + - * // % and parentheses. Raises ParseError."""
    tokens: list[str] = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or len(tokens) > 10_000:
            raise ParseError(f"dimension {text[:80]!r}: unexpected character at column {at + 1}")
        tokens.append(match.group(1) or match.group(2) or match.group(3))
        at = match.end()
    tokens.append("")
    value, rest = _sum(tokens, 0, text, 0)
    if tokens[rest]:
        raise ParseError(f"dimension {text[:80]!r}: unexpected {tokens[rest]!r}")
    return value


def _sum(tokens: list[str], at: int, text: str, depth: int) -> tuple[Dim, int]:
    value, at = _product(tokens, at, text, depth)
    while tokens[at] in ("+", "-"):
        right, following = _product(tokens, at + 1, text, depth)
        value = _modest(value + right if tokens[at] == "+" else value - right, text)
        at = following
    return value, at


def _product(tokens: list[str], at: int, text: str, depth: int) -> tuple[Dim, int]:
    value, at = _atom(tokens, at, text, depth)
    while tokens[at] in ("*", "//", "%"):
        right, following = _atom(tokens, at + 1, text, depth)
        if tokens[at] == "*":
            value = value * right
        elif right == 0:
            raise ParseError(f"dimension {text[:80]!r}: division by zero")
        else:
            value = floordiv(value, right) if tokens[at] == "//" else mod(value, right)
        value, at = _modest(value, text), following
    return value, at


def _modest(value: Dim, text: str) -> Dim:
    if not is_modest(value):
        raise ParseError(f"dimension {text[:80]!r} is too large")
    return value


def _atom(tokens: list[str], at: int, text: str, depth: int) -> tuple[Dim, int]:
    if depth > 100:
        raise ParseError(f"dimension {text[:80]!r}: nested deeper than 100 levels")
    token = tokens[at]
    if token == "(":
        value, at = _sum(tokens, at + 1, text, depth + 1)
        if tokens[at] != ")":
            raise ParseError(f"dimension {text[:80]!r}: missing ')'")
        return value, at + 1
    if token == "-":
        value, at = _atom(tokens, at + 1, text, depth + 1)
        return value * -1, at
    if token.isdigit():
        if len(token) > 18:
            raise ParseError(f"dimension {text[:80]!r}: {token[:24]}... is too large")
        return int(token), at + 1
    if token.isidentifier():
        return symbol(token), at + 1
    raise ParseError(f"dimension {text[:80]!r}: expected a number, a name or '(', found {token or 'the end'!r}")
