"""Elementwise ops of one operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from ..dtypes import DType, bool_, f64, i32, u8
from ..expr import Expr, const, eq, logical_not, maximum, select, unary
from ..graph import Attrs, Node
from ..op import Array, GradRule, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .erf import erf as _erf


def _infer(name: str, allowed: Callable[[DType], bool]) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(name, types, 0, allowed)
        return types[0]

    return infer


def _samples(name: str, low: float, high: float, special: bool, integer: bool, smooth: bool) -> list[Sample]:
    made = [Sample(c.uniform(s, low=low, high=high), gradient=smooth) for s in c.some_shapes(name)]
    made.append(Sample(c.uniform((5, 4), low=low, high=high, dtype=f64), gradient=smooth, label="f64"))
    if special:
        made.append(Sample(c.fixed(np.array(c.SPECIAL, np.float32)), gradient=False, label="special"))
    if integer:
        made.append(Sample(c.integers((3, 7), dtype=i32), gradient=False, label="i32"))
        made.append(Sample(c.integers((17,), low=0, high=256, dtype=u8), gradient=False, label="u8"))
    return made


def _unary(
    name: str,
    doc: str,
    reference: Callable[[Any], Any],
    lower: Callable[[Expr], Expr],
    grad: GradRule,
    *,
    allowed: Callable[[DType], bool] = c.is_float,
    domain: tuple[float, float] = (-2.0, 2.0),
    traits: frozenset[Trait] = c.ELEMENTWISE,
    special: bool = True,
    smooth: bool = True,
    onnx: int = 13,
    onnx_name: str | None = "",
) -> Op:
    return register(
        Op(
            name=name,
            infer=_infer(name, allowed),
            reference=c.total(reference),
            lower=c.elementwise(lower),
            grad=grad,
            doc=doc,
            arity=1,
            traits=traits,
            transpose=c.elementwise_transpose,
            onnx=None if onnx_name is None else (onnx_name or name.capitalize(), onnx),
            samples=lambda: _samples(name, *domain, special, allowed is c.is_arithmetic, smooth),
        )
    )


def _sigmoid(x: Array) -> Array:
    z = np.exp(-np.abs(x))
    one = x.dtype.type(1)
    return np.where(x < 0, z, one) / (one + z)  # type: ignore[no-any-return]


def _sign(x: Expr) -> Expr:
    zero = const(0, x.dtype)
    below = select(x < zero, const(-1, x.dtype), x if x.dtype.is_float else zero)
    return select(zero < x, const(1, x.dtype), select(eq(x, zero), zero, below))


def _not(x: Expr) -> Expr:
    return logical_not(x) if x.dtype is bool_ else x ^ const(-1, x.dtype)


def _expr(op: str) -> Callable[[Expr], Expr]:
    return lambda x: unary(op, x)


def _times(fn: Callable[[Node, Node], Node]) -> GradRule:
    """dy * fn(x, y)."""
    return c.rule(lambda node, dy: (make("mul", dy, fn(node.inputs[0], node)),))


def _neg(x: Node) -> Node:
    return make("neg", x)


def _one_minus_square(y: Node) -> Node:
    return make("sub", c.full(1.0, y), make("mul", y, y))


_IDEMPOTENT: Final = c.CHEAP | {Trait.IDEMPOTENT}

neg = _unary(
    "neg",
    "-x; integers wrap.",
    np.negative,
    _expr("neg"),
    c.rule(lambda n, dy: (_neg(dy),)),
    allowed=c.is_arithmetic,
    traits=c.CHEAP,
)
abs_ = _unary(
    "abs", "|x|; the least integer stays itself.", np.abs, _expr("abs"), _times(lambda x, y: make("sign", x)),
    allowed=c.is_arithmetic, traits=_IDEMPOTENT, domain=(0.1, 2.0),
)  # fmt: skip
sign = _unary(
    "sign", "-1, 0 or 1; NaN for NaN.", np.sign, _sign, c.no_flow,
    allowed=c.is_arithmetic, traits=_IDEMPOTENT, domain=(0.1, 2.0),
)  # fmt: skip
exp = _unary("exp", "e to the x.", np.exp, _expr("exp"), _times(lambda x, y: y))
log = _unary(
    "log", "Natural logarithm; NaN below 0, -Inf at 0.", np.log, _expr("log"),
    c.rule(lambda n, dy: (make("div", dy, n.inputs[0]),)), domain=(0.1, 4.0),
)  # fmt: skip
log1p = _unary(
    "log1p", "log(1 + x), accurate near 0.", np.log1p, _expr("log1p"),
    c.rule(lambda n, dy: (make("div", dy, make("add", n.inputs[0], c.full(1.0, dy))),)), domain=(-0.9, 4.0), onnx_name=None,
)  # fmt: skip
expm1 = _unary(
    "expm1", "exp(x) - 1, accurate near 0.", np.expm1, _expr("expm1"), _times(lambda x, y: make("exp", x)), onnx_name=None
)
sqrt = _unary(
    "sqrt", "Square root; NaN below 0.", np.sqrt, _expr("sqrt"),
    c.rule(lambda n, dy: (make("div", c.scaled(dy, 0.5), n),)), domain=(0.1, 4.0),
)  # fmt: skip
rsqrt = _unary(
    "rsqrt",
    "1 / sqrt(x).",
    lambda x: 1 / np.sqrt(x),
    lambda x: const(1.0, x.dtype) / unary("sqrt", x),
    c.rule(lambda n, dy: (make("mul", c.scaled(dy, -0.5), make("mul", n, make("mul", n, n))),)),
    domain=(0.1, 4.0),
    onnx_name=None,
)
tanh = _unary("tanh", "Hyperbolic tangent.", np.tanh, _expr("tanh"), _times(lambda x, y: _one_minus_square(y)))
sigmoid = _unary(
    "sigmoid", "1 / (1 + exp(-x)).", _sigmoid, _expr("sigmoid"),
    _times(lambda x, y: make("mul", y, make("sub", c.full(1.0, y), y))),
)  # fmt: skip
erf = _unary(
    "erf", "The error function, 2 / sqrt(pi) times the integral of exp(-t^2) from 0 to x.", _erf, _expr("erf"),
    _times(lambda x, y: c.scaled(make("exp", _neg(make("mul", x, x))), 2 / math.sqrt(math.pi))),
)  # fmt: skip
softplus = _unary(
    "softplus",
    "log(1 + e to the x), without overflow. One op, so that its derivative is the sigmoid, also at 0.",
    lambda x: np.maximum(x, x.dtype.type(0)) + np.log1p(np.exp(-np.abs(x))),
    lambda x: maximum(const(0, x.dtype), x) + unary("log1p", unary("exp", unary("neg", unary("abs", x)))),
    _times(lambda x, y: make("sigmoid", x)),
    onnx=1,
)


def _bounded(values: Iterable[float]) -> Array:
    return np.array([v for v in values if not abs(v) > 1e6], np.float32)


def _trigonometric(name: str, fn: Callable[[Any], Any], derivative: Callable[[Node, Node], Node]) -> Op:
    def samples() -> list[Sample]:
        made = _samples(name, -4.0, 4.0, False, False, True)
        return [
            *made,
            Sample(c.fixed(np.append(_bounded(c.SPECIAL), np.inf).astype(np.float32)), gradient=False, label="special"),
        ]

    return register(
        Op(
            name=name,
            infer=_infer(name, c.is_float),
            reference=c.total(fn),
            lower=c.elementwise(_expr(name)),
            grad=_times(derivative),
            doc=f"{name.capitalize()}e of x in radians; NaN for Inf."
            if name == "sin"
            else "Cosine of x in radians; NaN for Inf.",
            arity=1,
            traits=c.ELEMENTWISE,
            transpose=c.elementwise_transpose,
            onnx=(name.capitalize(), 7),
            samples=samples,
        )
    )


sin = _trigonometric("sin", np.sin, lambda x, y: make("cos", x))
cos = _trigonometric("cos", np.cos, lambda x, y: _neg(make("sin", x)))
floor = _unary("floor", "The greatest integer <= x.", np.floor, _expr("floor"), c.no_flow, traits=_IDEMPOTENT, domain=(0.1, 0.9))
ceil = _unary("ceil", "The least integer >= x.", np.ceil, _expr("ceil"), c.no_flow, traits=_IDEMPOTENT, domain=(0.1, 0.9))
round_ = _unary(
    "round", "The nearest integer, halves to even.", np.rint, _expr("round"), c.no_flow,
    traits=_IDEMPOTENT, domain=(0.6, 1.4), onnx=11,
)  # fmt: skip


def _not_samples() -> list[Sample]:
    made = [Sample(c.booleans(s), gradient=False, label="bool") for s in c.some_shapes("not")]
    return [
        *made,
        Sample(c.integers((9,), dtype=i32), gradient=False, label="i32"),
        Sample(c.integers((9,), low=0, dtype=u8), gradient=False),
    ]


not_ = register(
    Op(
        name="not",
        infer=_infer("not", c.is_logical),
        reference=c.total(np.invert),
        lower=c.elementwise(_not),
        grad=c.no_flow,
        doc="Logical not of booleans, all bits flipped of integers.",
        arity=1,
        traits=c.CHEAP,
        transpose=c.elementwise_transpose,
        onnx=("Not", 1),
        samples=_not_samples,
    )
)
