"""Index simplification: the same value at every point of the ranges, and the forms that vector loads need."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwright.codegen.simplify_index import Simplifier, linear_roots
from tensorwright.ir.dtypes import bool_, i64
from tensorwright.ir.expr import Expr, binary, const, eq, maximum, minimum, postorder, select, var

I, J, K = (var(n) for n in "ijk")
RANGES = {I: (0, 5), J: (0, 11), K: (2, 4)}


def value(root: Expr, at: dict[Expr, int]) -> int:
    """An index expression at a point, by the definition of its ops."""
    found: dict[Expr, int] = {}
    for e in postorder([root]):
        a = [found[x] for x in e.args]
        match e.op:
            case "var":
                found[e] = at[e]
            case "const":
                found[e] = int(e.attr)
            case "add":
                found[e] = a[0] + a[1]
            case "sub":
                found[e] = a[0] - a[1]
            case "mul":
                found[e] = a[0] * a[1]
            case "floordiv":
                found[e] = a[0] // a[1] if a[1] else 0
            case "mod":
                found[e] = a[0] % a[1] if a[1] else 0
            case "max":
                found[e] = max(a)
            case "min":
                found[e] = min(a)
            case "lt":
                found[e] = a[0] < a[1]
            case "le":
                found[e] = a[0] <= a[1]
            case "eq":
                found[e] = a[0] == a[1]
            case "ne":
                found[e] = a[0] != a[1]
            case "and":
                found[e] = a[0] & a[1]
            case "select":
                found[e] = a[1] if a[0] else a[2]
            case _:
                raise AssertionError(e.op)
    return found[root]


def random_index(rng: random.Random, depth: int) -> Expr:
    if depth == 0:
        return rng.choice([I, J, K, const(rng.randint(-3, 12))])
    a, b = random_index(rng, depth - 1), random_index(rng, depth - 1)
    match rng.randrange(8):
        case 0 | 1:
            return a + b
        case 2:
            return a - b
        case 3:
            return a * rng.choice([1, 2, 3, 4, 12, -1])
        case 4:
            return a // rng.choice([1, 2, 3, 4, 6, 12])
        case 5:
            return a % rng.choice([1, 2, 3, 4, 6, 12])
        case 6:
            return rng.choice([maximum, minimum])(a, b)
        case _:
            return select(binary(rng.choice(["lt", "le", "eq", "ne"]), a, b), a, b)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 40))
def test_simplified_is_equal_everywhere(seed: int) -> None:
    root = random_index(random.Random(seed), 4)
    simplifier = Simplifier(RANGES)
    simple = simplifier.simplify(root)
    low, high = simplifier.bounds(simplifier.linear(root))
    for point in itertools.product(*(range(a, b + 1) for a, b in RANGES.values())):
        at = dict(zip(RANGES, point, strict=True))
        expected = value(root, at)
        assert value(simple, at) == expected
        assert low <= expected <= high


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 40))
def test_between_breakpoints_nothing_is_left_to_decide(seed: int) -> None:
    rng = random.Random(seed)
    c = binary(rng.choice(["lt", "le", "eq", "ne"]), J * rng.choice([1, 2, 3, -1, -2]), const(rng.randint(-8, 30)))
    simplifier = Simplifier(RANGES)
    points = simplifier.breakpoints([simplifier.simplify(c)]).get(J, set())
    ends = [0, *sorted(points), 12]
    for a, b in itertools.pairwise(ends):
        assert Simplifier({J: (a, b - 1)}).simplify(c).is_const


def test_reshape_and_slices_come_out_linear() -> None:
    s = Simplifier({I: (0, 7), J: (0, 15)})
    flat = I * 16 + J
    assert s.simplify(flat // 16) is I
    assert s.simplify(flat % 16) is J
    back = (flat // 32) * 32 + (flat // 8 % 4) * 8 + flat % 8
    assert s.simplify(back) is s.simplify(flat)
    assert s.simplify((I * 12 + J % 4 * 3) // 3) is s.simplify(I * 4 + J % 4)
    assert s.simplify(maximum(J - 20, 0)) is const(0)
    assert s.simplify(select(binary("lt", J, const(16)), I, J)) is I
    assert s.simplify(eq(I * 2, const(3))) is const(False, bool_)


def test_values_that_may_wrap_are_left_alone() -> None:
    """x + 1 > x is false at the greatest integer: what is loaded has no bounds."""
    x = Expr("load", (const(0),), i64, 1, ("operand", 1))
    s = Simplifier({})
    assert not s.simplify(binary("lt", x, x + 1)).is_const
    assert s.simplify((x * 4) // 4) is not x
    assert s.simplify((x + 1) - 1) is x


def test_roots_are_whole_indices() -> None:
    load = Expr("load", (I * 4 + J,), i64, 1, ("operand", 1))
    assert set(linear_roots([load * 2 + I])) >= {I * 4 + J}
