"""Scalar expressions: what one element of an op's result is, and the right-hand sides of the loop IR.

One hash-consed node, `Expr`: equal expressions are one object, so a shared subexpression is computed once and a
traversal can memoise on identity. Op records build expressions with `lanes == 1`; the loop IR's vectoriser widens them.

Operations (`op`), with `a`, `b`, `c` the args:

    const                     attr: the value                      var        attr: the name
    load  (index..., [mask])  attr: a loop-IR Buffer, or in an op record the operand's number
    add sub mul max min       of two numbers; max and min return NaN if either is NaN
    div                       of floats; floordiv, mod: of integers, rounding down; x // 0 = 0 and x % 0 = 0
    and or xor shl shr        of integers or (not the shifts) booleans; a shift count outside [0, bits) gives 0
    lt le eq ne               -> bool; comparisons with NaN are false, but ne is true
    neg abs not               sqrt floor ceil round (half to even) trunc
    exp log log1p expm1 sin cos tanh erf sigmoid pow              see codegen/vecmath for the error bounds; attr of an exp may be
                              "nonpositive": its argument is a rounded difference from a maximum
    fma                       a * b + c, rounded once
    select                    b where a else c (both sides are evaluated: an index must be in range on both)
    cast                      to `dtype`; float to int saturates and NaN gives 0; int to narrower int wraps
    bitcast                   same bits, other dtype of the same size
    ramp                      a, a + 1, ... a + lanes - 1           broadcast   a in every lane
    lane_xor                  a in the lane of the warp (GPU) whose number differs in the bits of attr: 1, 2, 4, 8 or 16
    four_bits                 the number that the lowest four bits of an i32 stand for, as f32
    lookup                    the lane of a vector of sixteen f32 (first arg) whose number is in the lowest four bits of an i32
    shuffle                   lanes of two vectors, of as many lanes as one of them; attr: which (`picks`)
    reduce_add reduce_mul reduce_max reduce_min                   vector -> scalar, in a fixed halving tree; attr of the latter
                              two may be "forgets": if a lane is NaN, any of the others may come out

A load whose mask is false yields zero and does not touch memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

from .dims import Dim, DimExpr, Symbol
from .dtypes import DType, as_dtype, bool_, f32, i32, i64
from .errors import DTypeError

BINARY: Final = frozenset({"add", "sub", "mul", "div", "floordiv", "mod", "max", "min", "and", "or", "xor", "shl", "shr", "pow"})
COMPARE: Final = frozenset({"lt", "le", "eq", "ne"})
MATH: Final = frozenset({"exp", "log", "log1p", "expm1", "sin", "cos", "tanh", "erf", "sigmoid"})
UNARY: Final = frozenset({"neg", "abs", "not", "sqrt", "floor", "ceil", "round", "trunc"}) | MATH
REDUCE: Final = frozenset({"reduce_add", "reduce_mul", "reduce_max", "reduce_min"})
SIZE: Final = "size."  # what the variable of a named size is called by: 'size.N'
BYTE_FACTORS: Final = ("u8i8", "i8u8", "i8i8", "u8u8")
INTEGER_FACTORS: Final = (*BYTE_FACTORS, "i16")
SHUFFLES: Final = ("low", "high", "even", "odd")
MOVES: Final = frozenset({"cast", "bitcast", "ramp", "broadcast", "shuffle", "four_bits", "lookup"})
OPS: Final = BINARY | COMPARE | UNARY | REDUCE | MOVES | {"const", "var", "load", "fma", "select", "lane_xor"}

_interned: weakref.WeakValueDictionary[tuple[object, ...], Expr] = weakref.WeakValueDictionary()
_known: Final[Callable[[tuple[object, ...]], Callable[[], Expr | None] | None]] = vars(_interned)["data"].get
_lock = threading.Lock()


class Expr:
    """An immutable scalar (lanes == 1) or vector expression. Make one with the functions of this module."""

    __slots__ = ("__weakref__", "args", "attr", "dtype", "lanes", "op")
    op: str
    args: tuple[Expr, ...]
    attr: Any
    dtype: DType
    lanes: int

    def __new__(cls, op: str, args: tuple[Expr, ...], dtype: DType, lanes: int = 1, attr: Any = None) -> Expr:
        # A NaN constant is keyed by its text: NaN is not equal to itself. -0.0 == 0.0, so text there too.
        kind = type(attr)
        key = (op, args, dtype, lanes, repr(attr) if kind is float else attr, kind)
        reference = _known(key)  # looked up without the lock: most are found, and a dead reference is one not found
        if reference is not None and (found := reference()) is not None:
            return found
        with _lock:
            found = _interned.get(key)
            if found is None:
                found = object.__new__(cls)
                _set_op(found, op)
                _set_args(found, args)
                _set_dtype(found, dtype)
                _set_lanes(found, lanes)
                _set_attr(found, attr)
                _interned[key] = found
            return found

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an Expr is immutable")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Expr, (self.op, self.args, self.dtype, self.lanes, self.attr))

    # Operators build expressions; == and hash stay identity, use eq() and ne() for comparisons.
    def __add__(self, other: ExprLike) -> Expr:
        return binary("add", self, other)

    def __radd__(self, other: ExprLike) -> Expr:
        return binary("add", other, self)

    def __sub__(self, other: ExprLike) -> Expr:
        return binary("sub", self, other)

    def __rsub__(self, other: ExprLike) -> Expr:
        return binary("sub", other, self)

    def __mul__(self, other: ExprLike) -> Expr:
        return binary("mul", self, other)

    def __rmul__(self, other: ExprLike) -> Expr:
        return binary("mul", other, self)

    def __truediv__(self, other: ExprLike) -> Expr:
        return binary("div", self, other)

    def __rtruediv__(self, other: ExprLike) -> Expr:
        return binary("div", other, self)

    def __floordiv__(self, other: ExprLike) -> Expr:
        return binary("floordiv", self, other)

    def __mod__(self, other: ExprLike) -> Expr:
        return binary("mod", self, other)

    def __neg__(self) -> Expr:
        return unary("neg", self)

    def __and__(self, other: ExprLike) -> Expr:
        return binary("and", self, other)

    def __or__(self, other: ExprLike) -> Expr:
        return binary("or", self, other)

    def __xor__(self, other: ExprLike) -> Expr:
        return binary("xor", self, other)

    def __lshift__(self, other: ExprLike) -> Expr:
        return binary("shl", self, other)

    def __rshift__(self, other: ExprLike) -> Expr:
        return binary("shr", self, other)

    def __lt__(self, other: ExprLike) -> Expr:
        return binary("lt", self, other)

    def __le__(self, other: ExprLike) -> Expr:
        return binary("le", self, other)

    def __gt__(self, other: ExprLike) -> Expr:
        return binary("lt", other, self)

    def __ge__(self, other: ExprLike) -> Expr:
        return binary("le", other, self)

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.args))
        if self.op in ("const", "var"):
            return str(self.attr)
        return f"{self.op}({inner})" if self.attr is None else f"{self.op}[{self.attr}]({inner})"


_set_op, _set_args, _set_dtype, _set_lanes, _set_attr = (
    Expr.__dict__[name].__set__ for name in ("op", "args", "dtype", "lanes", "attr")
)

ExprLike = Expr | int | float | bool


@lru_cache(maxsize=4096)
def _index(value: int) -> Expr:
    """A constant of i64."""
    return Expr("const", (), i64, 1, (value + (1 << 63)) % (1 << 64) - (1 << 63))


def const(value: float | int | bool, dtype: object = i64, lanes: int = 1) -> Expr:
    """A literal of `dtype`; integers wrap into range, and a float is rounded to the dtype when it is emitted.

    Raises DTypeError for a fraction, NaN or infinity where the dtype is an integer.
    """
    if dtype is i64 and lanes == 1 and type(value) is int:
        return _index(value)
    d = as_dtype(dtype)
    if d is bool_:
        return Expr("const", (), d, lanes, bool(value))
    if d.is_float:
        return Expr("const", (), d, lanes, float(value))
    if isinstance(value, float) and not value.is_integer():
        raise DTypeError(f"{value} is no constant of {d}")
    number = int(value)
    low = -(1 << (d.bits - 1)) if d.kind == "int" else 0
    number = (number - low) % (1 << d.bits) + low
    return Expr("const", (), d, lanes, number)


def var(name: str, dtype: DType = i64) -> Expr:
    """A loop variable, a size, or a value bound by Let."""
    return Expr("var", (), dtype, 1, name)


def lift(value: ExprLike | DimExpr, like: Expr | None = None) -> Expr:
    """A Python number as a constant of `like`'s dtype and lanes (i64 or f32 without); an Expr as it is; a symbolic dimension
    as the i64 that it is when the sizes are known."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, DimExpr):
        return _dimension(value)
    if like is not None:
        return const(value, like.dtype, like.lanes)
    return const(value, bool_ if isinstance(value, bool) else i64 if isinstance(value, int) else f32)


def _dimension(value: Dim) -> Expr:
    """A dimension over the variables of its named sizes."""
    if isinstance(value, int):
        return const(value)
    total: Expr | None = None
    for monomial, coefficient in value.terms:
        part: Expr = const(coefficient)
        for atom in monomial:
            if isinstance(atom, Symbol):
                factor = var(SIZE + atom.name)
            else:
                op = "floordiv" if atom.op == "//" else "mod"
                factor = binary(op, _dimension(atom.numerator), _dimension(atom.denominator))
            part = binary("mul", part, factor)
        total = part if total is None else binary("add", total, part)
    assert total is not None
    return total


def _pair(a: ExprLike, b: ExprLike) -> tuple[Expr, Expr]:
    left = lift(a, b if isinstance(b, Expr) else None)
    right = lift(b, left)
    if left.lanes != right.lanes:
        lanes = max(left.lanes, right.lanes)
        left, right = broadcast(left, lanes), broadcast(right, lanes)
    return left, right


def _index_rule(op: str, x: Expr, y: Expr) -> Expr | None:
    """Folds index arithmetic (i64 scalars): constants, and identities that are exact on integers."""
    if x.is_const and y.is_const:
        a, b = int(x.attr), int(y.attr)
        match op:
            case "add":
                return const(a + b)
            case "sub":
                return const(a - b)
            case "mul":
                return const(a * b)
            case "floordiv":
                return const(a // b if b else 0)
            case "mod":
                return const(a % b if b else 0)
            case "max":
                return const(max(a, b))
            case "min":
                return const(min(a, b))
            case "lt":
                return const(a < b, bool_)
            case "le":
                return const(a <= b, bool_)
            case "eq":
                return const(a == b, bool_)
            case "ne":
                return const(a != b, bool_)
        return None
    if y.is_const:
        b = int(y.attr)
        if (b == 0 and op in ("add", "sub")) or (b == 1 and op in ("mul", "floordiv")):
            return x
        if (b == 0 and op == "mul") or (b == 1 and op == "mod"):
            return const(0)
        if op == "add" and x.op == "add" and x.args[1].is_const:
            return binary("add", x.args[0], int(x.args[1].attr) + b)
        if op == "mul" and x.op == "mul" and x.args[1].is_const:
            return binary("mul", x.args[0], int(x.args[1].attr) * b)
        if op == "sub":
            return binary("add", x, -b)
    elif x.is_const and op in ("add", "mul"):
        return binary(op, y, x)  # constants to the right
    return None


def binary(op: str, a: ExprLike, b: ExprLike) -> Expr:
    """A binary operation or comparison on operands of one dtype. Raises DTypeError when they differ."""
    x, y = _pair(a, b)
    if x.dtype is not y.dtype:
        raise DTypeError(f"{op} of {x.dtype} and {y.dtype}: cast one of them")
    if x.dtype is i64 and x.lanes == 1 and (folded := _index_rule(op, x, y)) is not None:
        return folded
    if x.dtype is bool_ and op in ("and", "or"):
        for p, q in ((x, y), (y, x)):
            if p.is_const:
                return (q if p.attr else p) if op == "and" else (p if p.attr else q)
    if op not in BINARY and op not in COMPARE:
        raise DTypeError(f"unknown binary operation {op!r}")
    return Expr(op, (x, y), bool_ if op in COMPARE else x.dtype, x.lanes)


def unary(op: str, a: Expr) -> Expr:
    """A unary operation of UNARY."""
    if op not in UNARY:
        raise DTypeError(f"unknown unary operation {op!r}")
    return Expr(op, (a,), a.dtype, a.lanes)


def maximum(a: ExprLike, b: ExprLike) -> Expr:
    """The larger; NaN if either is NaN."""
    return binary("max", a, b)


def minimum(a: ExprLike, b: ExprLike) -> Expr:
    """The smaller; NaN if either is NaN."""
    return binary("min", a, b)


def eq(a: ExprLike, b: ExprLike) -> Expr:
    return binary("eq", a, b)


def ne(a: ExprLike, b: ExprLike) -> Expr:
    return binary("ne", a, b)


def logical_not(a: Expr) -> Expr:
    return const(not a.attr, bool_, a.lanes) if a.is_const and a.dtype is bool_ else unary("not", a)


def select(condition: Expr, a: ExprLike, b: ExprLike) -> Expr:
    """a where condition, else b."""
    x, y = _pair(a, b)
    if condition.is_const:
        return broadcast(x if condition.attr else y, max(condition.lanes, x.lanes))
    if condition.lanes != x.lanes:
        lanes = max(condition.lanes, x.lanes)
        condition, x, y = broadcast(condition, lanes), broadcast(x, lanes), broadcast(y, lanes)
    if x.dtype is not y.dtype:
        raise DTypeError(f"select between {x.dtype} and {y.dtype}: cast one of them")
    return Expr("select", (condition, x, y), x.dtype, x.lanes)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c with a single rounding."""
    lanes = max(a.lanes, b.lanes, c.lanes)
    args = tuple(broadcast(x, lanes) for x in (a, b, c))
    return Expr("fma", args, a.dtype, lanes)


def fma_bf16(a: Expr, b: Expr, c: Expr) -> Expr:
    """c + a1 * b1 + a0 * b0, where each f32 lane of a and b holds two bf16 (a0 in its low half); denormals count as zero.

    It is `fma` with the attribute 'bf16', one instruction on targets that have it and an error on others.
    """
    lanes = max(a.lanes, b.lanes, c.lanes)
    return Expr("fma", tuple(broadcast(x, lanes) for x in (a, b, c)), c.dtype, lanes, "bf16")


def fma_integers(a: Expr, b: Expr, c: Expr, factors: str) -> Expr:
    """c + a0 * b0 + a1 * b1 + ... modulo 2^32, where each i32 lane of a and b holds four bytes or two i16 (a0 the lowest).

    It is `fma` with the attribute `factors`, one of INTEGER_FACTORS: i16, or which of the two operands' bytes are signed.
    """
    lanes = max(a.lanes, b.lanes, c.lanes)
    return Expr("fma", tuple(broadcast(x, lanes) for x in (a, b, c)), c.dtype, lanes, factors)


def cast(a: Expr, dtype: object) -> Expr:
    """a converted to dtype; saturates from float to integer, with NaN becoming 0."""
    d = as_dtype(dtype)
    if a.dtype is d:
        return a
    if a.is_const and a.dtype is i64 and not d.is_float:
        return const(a.attr, d, a.lanes)
    return Expr("cast", (a,), d, a.lanes)


def bitcast(a: Expr, dtype: object) -> Expr:
    """The bits of a as another dtype of the same size. Raises DTypeError when the sizes differ."""
    d = as_dtype(dtype)
    if d.itemsize != a.dtype.itemsize:
        raise DTypeError(f"bitcast from {a.dtype} ({a.dtype.itemsize} bytes) to {d} ({d.itemsize} bytes)")
    return a if d is a.dtype else Expr("bitcast", (a,), d, a.lanes)


def load(source: Any, index: Sequence[ExprLike], dtype: DType, mask: Expr | None = None, lanes: int = 1) -> Expr:
    """One element (or `lanes` consecutive ones along the last index) of a buffer or operand."""
    args = tuple(lift(i) for i in index) + (() if mask is None else (mask,))
    return Expr("load", args, dtype, lanes, (source, len(index)))


def ramp(base: ExprLike, lanes: int) -> Expr:
    """base, base + 1, ... base + lanes - 1."""
    start = lift(base)
    return start if lanes == 1 else Expr("ramp", (start,), start.dtype, lanes)


def broadcast(a: Expr, lanes: int) -> Expr:
    """a in each of the lanes; a itself when it has that many already."""
    if a.lanes == lanes:
        return a
    if a.lanes != 1:
        raise DTypeError(f"cannot broadcast {a.lanes} lanes to {lanes}")
    if a.is_const:
        return const(a.attr, a.dtype, lanes)
    return Expr("broadcast", (a,), a.dtype, lanes)


def lane_xor(a: Expr, distance: int) -> Expr:
    """The value of the lane `distance` (a power of two below 32) away in the warp: all its lanes must evaluate it."""
    if distance not in (1, 2, 4, 8, 16) or a.lanes != 1:
        raise DTypeError(f"lane_xor of {a.lanes} lanes at distance {distance}; it takes a scalar and 1, 2, 4, 8 or 16")
    return Expr("lane_xor", (a,), a.dtype, 1, distance)


def four_bits(a: Expr) -> Expr:
    """The number that the lowest four bits of an i32 stand for in two's complement, as f32."""
    if a.dtype is not i32:
        raise DTypeError(f"four bits are taken from an i32, not from {a.dtype}")
    return Expr("four_bits", (a,), f32, a.lanes)


def lookup(table: Expr, a: Expr) -> Expr:
    """The lanes of a vector of sixteen f32 whose numbers are in the lowest four bits of an i32."""
    if a.dtype is not i32 or table.dtype is not f32 or table.lanes != 16:
        raise DTypeError(f"lookup takes sixteen f32 and an i32, not {table.lanes} {table.dtype} and {a.dtype}")
    return Expr("lookup", (table, a), f32, a.lanes)


def picks(pattern: str, lanes: int) -> tuple[int, ...]:
    """Which lanes of a, followed by those of b, a shuffle takes: `pattern` is one of SHUFFLES and the lanes w of a block.

    low: of blocks of w lanes, each by itself: the lower halves of a and b in turn, a0 b0 a1 b1 ...; high: the upper halves.
    even: whole blocks, those of a with even numbers and then those of b; odd: those with odd numbers.
    Raises DTypeError for another pattern, or blocks that do not fill the lanes.
    """
    kind = pattern.rstrip("0123456789")
    w = int(pattern[len(kind) :] or 0)
    if kind not in SHUFFLES or w < 1 or lanes % (w if kind in ("low", "high") else 2 * w) or (w % 2 and kind in ("low", "high")):
        raise DTypeError(f"shuffle {pattern} of {lanes} lanes: expected one of {', '.join(SHUFFLES)} and the lanes of a block")
    if kind in ("low", "high"):
        first = 0 if kind == "low" else w // 2
        return tuple(k + first + j + n for k in range(0, lanes, w) for j in range(w // 2) for n in (0, lanes))
    start = 0 if kind == "even" else w
    return tuple(n + k + j for n in (0, lanes) for k in range(start, lanes, 2 * w) for j in range(w))


def shuffle(a: Expr, b: Expr, pattern: str) -> Expr:
    """Lanes of a and b by `picks`. Raises DTypeError where they differ in type, or the pattern does not fit."""
    if a.dtype is not b.dtype or a.lanes != b.lanes:
        raise DTypeError(f"shuffle of {a.dtype} with {a.lanes} lanes and {b.dtype} with {b.lanes}")
    picks(pattern, a.lanes)
    return Expr("shuffle", (a, b), a.dtype, a.lanes, pattern)


def reduce_lanes(op: str, a: Expr) -> Expr:
    """A vector's lanes combined ('add', 'mul', 'max', 'min') by halving: lane i with lane i + lanes / 2, again and again."""
    return a if a.lanes == 1 else Expr(f"reduce_{op}", (a,), a.dtype, 1)


def postorder(roots: Iterable[Expr], known: Container[Expr] = ()) -> Iterator[Expr]:
    """Every expression under the roots once, args before what uses them; nothing that is `known`, nor under it alone."""
    seen: set[Expr] = set()
    stack: list[Expr | None] = list(roots)
    stack.reverse()
    waiting: list[Expr] = []  # whose args are being visited: a None on the stack closes the last of them
    while stack:
        e = stack.pop()
        if e is None:
            yield waiting.pop()
        elif e not in seen and e not in known:
            seen.add(e)
            if not e.args:
                yield e
                continue
            waiting.append(e)
            stack.append(None)
            stack += e.args[::-1]


def rewrite(root: Expr, rule: Callable[[Expr, tuple[Expr, ...]], Expr | None], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Rebuilds an expression bottom-up: `rule(old, new_args)` gives the replacement, or None to keep the operation."""
    done = {} if memo is None else memo
    stack = [root]
    while stack:
        e = stack[-1]
        if e in done:
            stack.pop()
            continue
        waiting = [a for a in e.args if a not in done]
        if waiting:
            stack += reversed(waiting)
            continue
        stack.pop()
        args = tuple([done[a] for a in e.args])
        new = rule(e, args)
        done[e] = new if new is not None else e if args == e.args else rebuild(e, args)
    return done[root]


def rebuild(e: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operation on other args, through the folding constructors."""
    if e.op in BINARY or e.op in COMPARE:
        return binary(e.op, *args)
    if e.op == "select":
        return select(*args)
    if e.op == "not":
        return logical_not(args[0])
    if e.op == "cast":
        return cast(args[0], e.dtype)
    return Expr(e.op, args, e.dtype, e.lanes, e.attr)


def substitute(root: Expr, values: dict[Expr, Expr], memo: dict[Expr, Expr] | None = None) -> Expr:
    """The expression with some subexpressions (variables, usually) put in place of others.

    `memo` keeps what was done, for further expressions in which the same is put in place.
    """
    get = values.get
    return rewrite(root, lambda e, _args: get(e), memo)
