"""Elementwise arithmetic of two operands of one shape and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from ..dtypes import DType, f32, f64, u8
from ..expr import Expr, binary, const, eq, fma, maximum, minimum, ne, select, unary
from ..graph import Attrs, Node
from ..op import Array, GradRule, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c


def infer_pair(name: str, allowed: Callable[[DType], bool]) -> c.Infer:
    """Two operands of one shape and dtype give that type."""

    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(name, types, 0, allowed)
        return c.check_same(name, types)

    return infer


def _binary(
    name: str,
    doc: str,
    reference: Callable[..., Any],
    lower: Callable[[Expr, Expr], Expr],
    grad: GradRule,
    samples: Callable[[], list[Sample]],
    *,
    allowed: Callable[[DType], bool] = c.is_arithmetic,
    traits: frozenset[Trait] = c.CHEAP,
    onnx: tuple[str, int] | None = None,
) -> Op:
    return register(
        Op(
            name=name,
            infer=infer_pair(name, allowed),
            reference=c.total(reference),
            lower=c.elementwise(lower),
            grad=grad,
            doc=doc,
            arity=2,
            traits=traits,
            transpose=c.elementwise_transpose,
            onnx=onnx,
            samples=samples,
        )
    )


def _pairs() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Every pair of special values whose sum, difference and product fit f32 where they are finite."""
    values = np.array([v for v in c.SPECIAL if (not 0 < abs(v) < 1e-10 and not abs(v) > 1e10) or np.isinf(v)], np.float32)
    a, b = np.meshgrid(values, values)
    return a.reshape(-1), b.reshape(-1)


def _float_samples(name: str, low: float, high: float, low2: float, high2: float, smooth: bool = True) -> list[Sample]:
    def both(shape: tuple[int, ...], dtype: DType = f32) -> c.Draw:
        return c.together(c.uniform(shape, low=low, high=high, dtype=dtype), c.uniform(shape, low=low2, high=high2, dtype=dtype))

    made = [Sample(both(s), gradient=smooth) for s in c.some_shapes(name)]
    return [*made, Sample(both((4, 5), f64), gradient=smooth, label="f64")]


def _special(budget: float = 2e-6, reason: str = "") -> Sample:
    return Sample(c.fixed(*_pairs()), budget=budget, reason=reason, gradient=False, label="special")


def integer_samples(low: int = -9, high: int = 10) -> list[Sample]:
    """Pairs of small integers, zero among them, and the extremes of i32."""
    edge = np.array([-(2**31), 2**31 - 1, 0, 1, -1, 7], np.int32)
    a, b = np.meshgrid(edge, edge)
    return [
        Sample(c.integers((33,), (33,), low=low, high=high), gradient=False, label="i64"),
        Sample(c.integers((3, 5), (3, 5), low=0, high=10, dtype=u8), gradient=False, label="u8"),
        Sample(c.fixed(a.reshape(-1), b.reshape(-1)), gradient=False, label="i32 extremes"),
    ]


_COMMUTES: Final = c.CHEAP | {Trait.COMMUTATIVE, Trait.ASSOCIATIVE}
_WRAPS: Final = "integers wrap"

add = _binary(
    "add", f"a + b; {_WRAPS}.", np.add, lambda a, b: a + b, c.rule(lambda n, dy: (dy, dy)),
    lambda: [*_float_samples("add", -2, 2, -2, 2), _special(), *integer_samples()], traits=_COMMUTES, onnx=("Add", 14),
)  # fmt: skip
sub = _binary(
    "sub", f"a - b; {_WRAPS}.", np.subtract, lambda a, b: a - b, c.rule(lambda n, dy: (dy, make("neg", dy))),
    lambda: [*_float_samples("sub", -2, 2, -2, 2), _special(), *integer_samples()], onnx=("Sub", 14),
)  # fmt: skip
mul = _binary(
    "mul", f"a * b; {_WRAPS}.", np.multiply, lambda a, b: a * b,
    c.rule(lambda n, dy: (make("mul", dy, n.inputs[1]), make("mul", dy, n.inputs[0]))),
    lambda: [*_float_samples("mul", -2, 2, -2, 2), _special(), *integer_samples()], traits=_COMMUTES, onnx=("Mul", 14),
)  # fmt: skip


def _div_grad(node: Node, dy: Node) -> Sequence[Node]:
    b = node.inputs[1]
    da = make("div", dy, b)
    return da, make("neg", make("mul", da, node))


div = _binary(
    "div", "a / b of floats; 0 / 0 is NaN.", np.divide, lambda a, b: a / b, c.rule(_div_grad),
    lambda: [*_float_samples("div", -2, 2, 0.5, 2), _special()], allowed=c.is_float, traits=c.ELEMENTWISE, onnx=("Div", 14),
)  # fmt: skip


# --- floor division and remainder: numpy's, where a == q * b + r and r has the sign of b --------------------------------


def _remainder(a: Expr, q: Expr, b: Expr) -> Expr:
    """a - q * b with the product exact. f64 takes it from Dekker's product (1971), as a row without FMA has none for f64:
    with x = xh + xl split in halves of 26 bits (Veltkamp), q * b = p + e exactly. Splitting overflows beyond 2**990."""
    if a.dtype is not f64:
        return fma(-q, b, a)

    def halves(x: Expr) -> tuple[Expr, Expr]:
        t = x * 134217729.0  # 2**27 + 1
        high = t - (t - x)
        return high, x - high

    (qh, ql), (bh, bl) = halves(q), halves(b)
    p = q * b
    e = ((qh * bh - p) + qh * bl + ql * bh) + ql * bl
    small = (unary("abs", b) < 2.0**990) & (unary("abs", q) < 2.0**990)
    return select(small, (a - p) - e, a - p)


def _divmod(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Quotient and remainder of floats. floor(a / b) may be one off, as a / b is rounded; the exact remainder of
    that quotient (for quotients below 2**24, in f64 2**53) tells by its sign and size."""
    zero, one = const(0.0, a.dtype), const(1.0, a.dtype)
    q0 = unary("floor", a / b)
    r0 = _remainder(a, q0, b)
    low = select(b < zero, zero < r0, r0 < zero)
    high = unary("abs", b) <= unary("abs", r0)
    q = select(low, q0 - one, select(high, q0 + one, q0))
    r = select(low, r0 + b, select(high, r0 - b, r0))
    # A finite a over an infinite b: 0 and a for equal signs, else -1 and b.
    infinite = eq(unary("abs", b), float("inf")) & (unary("abs", a) < const(float("inf"), a.dtype))
    same = (zero <= a) & (zero < b) | (a <= zero) & (b < zero)
    q = select(infinite, select(same, zero, -one), q)
    r = select(infinite, select(same, a, b), r)
    return select(eq(b, zero), a / b, select(ne(r, r), r, q)), r


def _floordiv(a: Expr, b: Expr) -> Expr:
    return _divmod(a, b)[0] if a.dtype.is_float else a // b


def _mod(a: Expr, b: Expr) -> Expr:
    return _divmod(a, b)[1] if a.dtype.is_float else a % b


def _mod_grad(node: Node, dy: Node) -> Sequence[Node]:
    a, b = node.inputs
    return dy, make("neg", make("mul", dy, make("floordiv", a, b)))


def _division_samples(name: str) -> list[Sample]:
    # Away from multiples of b, where both jump.
    smooth = [Sample(partial(_between_multiples, shape=s), label="float") for s in c.some_shapes(name)]
    exact = np.array([6.0, -6.0, 7.5, -7.5, 1.0, 0.3, -0.3, 5.0], np.float32)
    a, b = np.meshgrid(exact, np.array([2.0, -2.0, 0.1, 3.0, -0.25], np.float32))
    return [
        *smooth, Sample(c.fixed(a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)), gradient=False, label="f64"),
        _special(), *integer_samples(),
    ]  # fmt: skip


def _between_multiples(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    b = rng.uniform(0.5, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
    q = rng.integers(-4, 5, shape) + rng.uniform(0.2, 0.8, shape)
    return [np.asarray(q * b, np.float32), np.asarray(b, np.float32)]


floordiv = _binary(
    "floordiv", "The quotient rounded down; of integers, x // 0 = 0.", np.floor_divide, _floordiv, c.no_flow,
    lambda: _division_samples("floordiv"), traits=c.ELEMENTWISE,
)  # fmt: skip
mod = _binary(
    "mod", "a - floor(a / b) * b, with the sign of b; of integers, x % 0 = 0.", np.mod, _mod, c.rule(_mod_grad),
    lambda: _division_samples("mod"), traits=c.ELEMENTWISE,
)  # fmt: skip


# --- powers ---------------------------------------------------------------------------------------------------------


def _pow_reference(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return np.power(a, b)
    negative = b < 0
    result = np.power(a, np.where(negative, 0, b).astype(b.dtype))
    # 1 / a^|b| rounded toward zero: not 0 for a = 1 and a = -1 only.
    odd = (b & 1) == 1
    inverse = np.where(a == 1, 1, np.where(a == -1, np.where(odd, -1, 1), 0)) if a.dtype.kind == "i" else result
    return np.where(negative, inverse, result).astype(a.dtype)


def _pow(a: Expr, b: Expr) -> Expr:
    if a.dtype.is_float:
        return binary("pow", a, b)
    dtype = a.dtype
    zero, one = const(0, dtype), const(1, dtype)
    result, square = one, a
    bits = dtype.bits - (dtype.kind == "int")
    for k in range(bits):  # square and multiply
        result = select(ne(b & const(1 << k, dtype), zero), result * square, result)
        square = square * square
    if dtype.kind == "uint":
        return result
    minus = const(-1, dtype)
    inverse = select(eq(a, one), one, select(eq(a, minus), select(ne(b & one, zero), minus, one), zero))
    return select(b < zero, inverse, result)


def _pow_grad(node: Node, dy: Node) -> Sequence[Node]:
    a, b = node.inputs
    zero, one = c.full(0.0, a), c.full(1.0, a)
    # b * a^(b-1) is 0 * Inf at a = b = 0, where a^0 is constant; log(0) * 0^b is 0 for b > 0.
    slope = make("mul", b, make("pow", a, make("sub", b, one)))
    da = make("where", make("equal", b, zero), zero, slope)
    db = make("mul", node, make("log", make("where", make("equal", a, zero), one, a)))
    return make("mul", dy, da), make("mul", dy, db)


def _pow_samples() -> list[Sample]:
    reason = "pow multiplies the error of log by the exponent"
    made = [
        Sample(c.together(c.uniform(s, low=0.3, high=3.0), c.uniform(s, low=-2.5, high=2.5)), budget=4e-6, reason=reason)
        for s in c.some_shapes("pow")
    ]
    bases = np.array([-2.0, -0.5, -1.0, 0.0, 1.0, 2.0, 0.5, np.inf, np.nan], np.float32)
    a, b = np.meshgrid(bases, np.array([0.0, 1.0, 2.0, 3.0, -1.0, -2.0, 0.5], np.float32))
    return [
        *made,
        Sample(c.fixed(a.reshape(-1), b.reshape(-1)), budget=4e-6, reason=reason, gradient=False, label="special"),
        *integer_samples(-4, 5),
    ]


pow_ = _binary(
    "pow", "a to the b; integers wrap, and a negative integer exponent gives 0 unless a is 1 or -1.",
    _pow_reference, _pow, c.rule(_pow_grad), _pow_samples, traits=c.ELEMENTWISE, onnx=("Pow", 15),
)  # fmt: skip


# --- the larger and the smaller -------------------------------------------------------------------------------------


def _choice_grad(larger: bool) -> GradRule:
    def grad(node: Node, dy: Node) -> Sequence[Node]:
        a, b = node.inputs
        first = make("less", b, a) if larger else make("less", a, b)
        # Half to each where they are equal; NaN takes the second.
        half, one, zero = c.full(0.5, dy), c.full(1.0, dy), c.full(0.0, dy)
        share = make("where", first, one, make("where", make("equal", a, b), half, zero))
        return make("mul", dy, share), make("mul", dy, make("sub", one, share))

    return c.rule(grad)


def _choice_samples(name: str) -> list[Sample]:
    made = [Sample(c.distinct(s, s)) for s in c.some_shapes(name)]
    return [*made, Sample(c.distinct((4, 5), (4, 5), dtype=f64), label="f64"), _special(), *integer_samples()]


maximum_ = _binary(
    "maximum", "The larger; NaN if either is NaN.", np.maximum, maximum, _choice_grad(True),
    lambda: _choice_samples("maximum"), traits=c.CHEAP | {Trait.ASSOCIATIVE}, onnx=("Max", 13),
)  # fmt: skip
minimum_ = _binary(
    "minimum", "The smaller; NaN if either is NaN.", np.minimum, minimum, _choice_grad(False),
    lambda: _choice_samples("minimum"), traits=c.CHEAP | {Trait.ASSOCIATIVE}, onnx=("Min", 13),
)  # fmt: skip
