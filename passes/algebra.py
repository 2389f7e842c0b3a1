"""Rewrite rules of arithmetic that hold to the bit (any NaN counts as any other), for `simplify`.

What is *not* here is as telling: x + 0.0 is not x (-0.0 + 0.0 = 0.0), x * 0 is not 0 (NaN, Inf, the sign), x - x is not 0
(Inf), -(x - y) is not y - x (the zero's sign). Ops are recognised by their meaning on scalars, `Facts.scalar`.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from ..ir.build import constant, full
from ..ir.dtypes import DType, bool_
from ..ir.graph import Node
from ..ir.interp import evaluate
from ..ir.op import Trait, make
from .facts import Facts, constant_array, operand, size
from .rewrite import Miss, Outcome, rule, rule_on

FOLD_LIMIT: Final = 4096  # elements of a constant that folding may make


def _is(value: Any, wanted: float) -> bool:
    """Equality that tells -0.0 from 0.0."""
    return value is not None and value == wanted and math.copysign(1, value) == math.copysign(1, wanted)


@rule_on("add")
def add_zero(node: Node, facts: Facts) -> Outcome:
    """x + (-0.0) -> x for floats, x + 0 -> x for integers (constants stand on the right)."""
    value = facts.value(node.inputs[1])
    exact = _is(value, -0.0) if node.dtype.is_float else value is not None and value == 0
    return node.inputs[0] if exact else Miss("the right operand is not the neutral zero", node.inputs[1])


@rule_on("sub")
def subtract_zero(node: Node, facts: Facts) -> Outcome:
    """x - 0.0 -> x (not x - (-0.0), which turns -0.0 into 0.0)."""
    value = facts.value(node.inputs[1])
    exact = _is(value, 0.0) if node.dtype.is_float else value is not None and value == 0
    return node.inputs[0] if exact else Miss("the right operand is not the neutral zero", node.inputs[1])


@rule_on("mul", "div")
def times_one(node: Node, facts: Facts) -> Outcome:
    """x * 1 -> x    x / 1 -> x (floats)."""
    return node.inputs[0] if facts.value(node.inputs[1]) == 1 else Miss("the right operand is not 1", node.inputs[1])


@rule_on("mul", "div")
def times_minus_one(node: Node, facts: Facts) -> Outcome:
    """x * -1 -> -x    x / -1 -> -x (floats)."""
    if not node.dtype.is_float or facts.value(node.inputs[1]) != -1:
        return Miss("the right operand is not -1.0", node.inputs[1])
    return make("neg", node.inputs[0])


@rule_on("div")
def divide_by_power_of_two(node: Node, facts: Facts) -> Outcome:
    """x / 2^k -> x * 2^-k where 2^-k is a normal number: the same real number, rounded once."""
    value = facts.value(node.inputs[1])
    if value is None or not math.isfinite(value) or value == 0 or math.frexp(abs(value))[0] != 0.5:
        return Miss("the divisor is no power of two", node.inputs[1])
    info = np.finfo(node.dtype.numpy) if node.dtype.bits >= 32 else None
    if info is None or not float(info.tiny) <= abs(1 / value) <= float(info.max) or not float(info.tiny) <= abs(value):
        return Miss("the reciprocal would not be a normal number", node.inputs[1])
    return make("mul", node.inputs[0], full(1 / value, node.tensor))


@rule_on("max", "min", "and", "or")
def same_twice(node: Node, facts: Facts) -> Outcome:
    """max(x, x) -> x    min(x, x) -> x    x and x -> x    x or x -> x."""
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else Miss("the operands differ", node)


@rule_on("neg", "not")
def double_negation(node: Node, facts: Facts) -> Outcome:
    """-(-x) -> x    not not x -> x."""
    inner = node.inputs[0]
    if inner.op is not node.op:
        return Miss("the operand is not negated", inner)
    return inner.inputs[0]


@rule
def idempotent(node: Node, facts: Facts) -> Outcome:
    """f(f(x)) -> f(x) for |x|, floor, ceil, round, sign: ops whose record says so."""
    if not node.op.has(Trait.IDEMPOTENT) or len(node.inputs) != 1:
        return Miss("not idempotent", node)
    inner = node.inputs[0]
    return inner if inner.op is node.op and inner.attrs == node.attrs else Miss("the operand is another op", inner)


@rule_on("add", "sub")
def add_negated(node: Node, facts: Facts) -> Outcome:
    """x + (-y) -> x - y    (-x) + y -> y - x    x - (-y) -> x + y."""
    x, y = node.inputs
    if facts.form(y) == "neg":
        return make("sub" if facts.form(node) == "add" else "add", x, y.inputs[0])
    if facts.form(node) == "add" and facts.form(x) == "neg":
        return make("sub", y, x.inputs[0])
    return Miss("no operand is negated", node)


@rule_on("mul", "div")
def times_negated(node: Node, facts: Facts) -> Outcome:
    """(-x) * (-y) -> x * y    (-x) * c -> x * -c    (-x) / c -> x / -c for a constant c."""
    x, y = node.inputs
    if facts.form(x) != "neg" or not node.dtype.is_float:
        return Miss("the left operand is not negated", x)
    if facts.form(y) == "neg":
        return node.replace((x.inputs[0], y.inputs[0]))
    value = facts.value(y)
    return Miss("the right operand is no constant", y) if value is None else node.replace((x.inputs[0], full(-value, y.tensor)))


@rule_on("select")
def select_known(node: Node, facts: Facts) -> Outcome:
    """where(c, x, x) -> x    where(true, x, y) -> x    where(false, x, y) -> y."""
    c, x, y = node.inputs
    if x is y:
        return x
    known = facts.value(c)
    return Miss("the condition is not known", c) if known is None else x if known else y


@rule_on("and", "or")
def logic_with_constant(node: Node, facts: Facts) -> Outcome:
    """x and true -> x    x and false -> false    x or false -> x    x or true -> true (booleans)."""
    known = facts.value(node.inputs[1])
    if node.dtype is not bool_ or known is None:
        return Miss("not booleans with a constant", node)
    return node.inputs[0] if bool(known) == (facts.form(node) == "and") else node.inputs[1]


def _holds(narrow: DType, wide: DType) -> bool:
    """Whether every value of `narrow` is a value of `wide`, so that converting there and on is converting at once."""
    if narrow is wide:
        return True
    if narrow.is_float:
        precision = {"f64": (53, 1023), "f32": (24, 127), "f16": (11, 15), "bf16": (8, 127)}
        if narrow.name not in precision or wide.name not in precision:
            return False
        return precision[narrow.name][0] <= precision[wide.name][0] and precision[narrow.name][1] <= precision[wide.name][1]
    digits = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8}
    if narrow is bool_:
        return wide.is_float or wide.is_integer
    value_bits = narrow.bits - (narrow.kind == "int")
    if wide.is_float:
        return value_bits <= digits.get(wide.name, 0)
    if wide is bool_:
        return False
    return value_bits <= wide.bits - (wide.kind == "int") and not (narrow.kind == "int" and wide.kind == "uint")


def _is_cast(node: Node, facts: Facts) -> bool:
    e = facts.scalar(node)
    return e is not None and len(node.inputs) == 1 and (e.op == "cast" and e.args[0] is operand(0, node))


@rule
def cast_of_cast(node: Node, facts: Facts) -> Outcome:
    """cast(cast(x, b), c) -> cast(x, c) where b holds every value of x's dtype; x itself where c is x's dtype."""
    if not _is_cast(node, facts):
        return Miss("not a cast", node)
    inner = node.inputs[0]
    if not _is_cast(inner, facts):
        return Miss("the operand is not a cast", inner)
    x = inner.inputs[0]
    if not _holds(x.dtype, inner.dtype):
        return Miss(f"{inner.dtype} does not hold every {x.dtype}", inner)
    return x if x.dtype is node.dtype else make("cast", x, dtype=node.dtype)


@rule
def cast_to_itself(node: Node, facts: Facts) -> Outcome:
    """cast(x: t, t) -> x. (Marks and barriers are views: they stay.)"""
    if len(node.inputs) != 1 or node.type != node.inputs[0].type or facts.scalar(node) is not operand(0, node):
        return Miss("not a cast to the same dtype", node)
    return node.inputs[0]


@rule
def constants_right(node: Node, facts: Facts) -> Outcome:
    """f(c, x) -> f(x, c) for a commutative f, a constant c and an x that is none."""
    if not node.op.has(Trait.COMMUTATIVE) or len(node.inputs) != 2:
        return Miss("not commutative", node)
    c, x = node.inputs
    if facts.uniform(c) is None or facts.uniform(x) is not None:
        return Miss("the constant is not on the left alone", node)
    return node.replace((x, c))


@rule
def fold_constants(node: Node, facts: Facts) -> Outcome:
    """f(c1, ..., cn) -> the constant that f's reference computes, if it is small; elementwise ops of constants broadcast
    from scalars are computed once and broadcast."""
    if not node.inputs or node.op.has(Trait.STRUCTURAL) or node.op.has(Trait.BARRIER) or node.op.has(Trait.RANDOM):
        return Miss("not foldable", node)
    if facts.elementwise(node) and node.shape:
        scalars = [facts.uniform(i) for i in node.inputs]
        if all(s is not None for s in scalars):
            small = node.replace(tuple(s for s in scalars if s is not None))
            result = constant(evaluate(small, [s.attrs["value"].array for s in scalars if s is not None]), node.dtype)
            return make("broadcast_to", result, shape=node.shape)
    arrays = []
    for i in node.inputs:
        array = constant_array(i)
        if array is None:
            return Miss("an operand is no constant", i)
        arrays.append(array)
    count = size(node)
    if not isinstance(count, int) or count > FOLD_LIMIT:
        return Miss("the constant would be large", node)
    if facts.uniform(node) is not None and node.op.has(Trait.MOVEMENT):
        return Miss("a scalar, broadcast, is the better form", node)
    return constant(evaluate(node, arrays), node.dtype)


RULES: Final = (
    constants_right, fold_constants, add_zero, subtract_zero, times_one, times_minus_one, divide_by_power_of_two, same_twice,
    double_negation, idempotent, add_negated, times_negated, select_known, logic_with_constant, cast_to_itself, cast_of_cast,
)  # fmt: skip
