"""Scalar expressions: folding of index arithmetic is exact, constants keep their lanes and their bits."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
from tensorwright.ir import expr as ex
from tensorwright.ir.dtypes import bool_, f32, i8, i64, u8
from tensorwright.ir.errors import DTypeError

I, J = ex.var("i"), ex.var("j")


def evaluate(e: ex.Expr, env: dict[str, int]) -> int:
    ops = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "max": max, "min": min,
        "floordiv": lambda a, b: a // b if b else 0, "mod": lambda a, b: a % b if b else 0,
        "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    }  # fmt: skip
    if e.op == "const":
        return e.attr
    if e.op == "var":
        return env[e.attr]
    return ops[e.op](*(evaluate(a, env) for a in e.args))


def test_index_folding_is_exact():
    rng = np.random.default_rng(0)
    names = ["add", "sub", "mul", "floordiv", "mod", "max", "min", "lt", "le", "eq", "ne"]
    for _ in range(300):
        pool: list[tuple[ex.Expr, object]] = [(I, lambda v: v["i"]), (J, lambda v: v["j"])]
        env = {"i": int(rng.integers(-5, 6)), "j": int(rng.integers(0, 4))}
        values = [env["i"], env["j"]]
        for _ in range(6):
            op = str(rng.choice(names[:7]))
            a = int(rng.integers(len(pool)))
            if rng.random() < 0.5:
                other = int(rng.integers(-3, 4))
                made, right = ex.binary(op, pool[a][0], other), other
            else:
                b = int(rng.integers(len(pool)))
                made, right = ex.binary(op, pool[a][0], pool[b][0]), values[b]
            pool.append((made, None))
            values.append(evaluate(ex.Expr(op, (ex.const(values[a]), ex.const(right)), i64), {}))
            assert evaluate(made, env) == values[-1]


def test_identities():
    assert I + 0 is I and I * 1 is I and (I * 0).attr == 0 and I // 1 is I and (I % 1).attr == 0
    assert (I + 3) + 4 is I + 7 and (I * 3) * 4 is I * 12 and 3 + I is I + 3 and (I + 3) - 3 is I
    assert (I - J).op == "sub"
    yes = ex.const(True, bool_)
    assert (yes & (I < J)) is (I < J) and (yes | (I < J)) is yes
    assert ex.select(yes, I, J) is I


def test_constants():
    assert ex.const(300, u8).attr == 44 and ex.const(200, i8).attr == -56
    assert ex.const(0.0, f32) is not ex.const(-0.0, f32) and ex.const(1, f32) is not ex.const(1, i64)
    assert ex.const(float("nan"), f32) is ex.const(float("nan"), f32)
    for bad in (0.5, float("nan"), float("inf")):
        with pytest.raises(DTypeError):
            ex.const(bad, i64)
    with pytest.raises(DTypeError, match="cast one of them"):
        ex.binary("add", I, ex.var("x", f32))
    with pytest.raises(DTypeError, match="bytes"):
        ex.bitcast(I, f32)


def test_lanes_survive_folding():
    wide = ex.const(True, bool_, 8)
    assert ex.logical_not(wide).lanes == 8
    x = ex.var("x", f32)
    assert ex.select(wide, x, x + 1.0).lanes == 8
    assert ex.select(ex.broadcast(I < J, 4), x, x).lanes == 4
    assert (ex.broadcast(x, 4) + x).lanes == 4
    with pytest.raises(DTypeError):
        ex.broadcast(ex.broadcast(x, 4), 8)
    assert ex.broadcast(ex.const(2.0, f32), 4) is ex.const(2.0, f32, 4)


def test_rewriting_shares_and_does_not_recurse():
    e = I
    for _ in range(20_000):
        e = ex.binary("max", e, J)
        e = ex.Expr("neg", (e,), i64)
    assert sum(1 for _ in ex.postorder([e])) == 40_002
    swapped = ex.substitute(e, {I: J})
    assert I not in set(ex.postorder([swapped]))
    assert ex.substitute(e, {}) is e
    with pytest.raises(AttributeError):
        e.op = "x"


def test_postorder_leaves_out_what_is_known():
    e = (I + J) * I
    assert list(ex.postorder([e])) == [I, J, I + J, e]
    assert list(ex.postorder([e], {I + J})) == [I, e]
    assert list(ex.postorder([e], {e})) == []


def test_equal_expressions_are_one_object_while_one_lives():
    first = ex.var("only here") + 123_456
    assert ex.var("only here") + 123_456 is first
    assert ex.const(-0.0, f32) is not ex.const(0.0, f32)
    assert ex.const(True, bool_).attr is True and ex.const(1).attr is not True
    nan = ex.const(float("nan"), f32)
    assert ex.const(float("nan"), f32) is nan
    forgotten = weakref.ref(first)
    del first
    gc.collect()
    assert forgotten() is None
    assert (ex.var("only here") + 123_456).args[1].attr == 123_456


def test_a_dtype_is_one_object_also_when_copied():
    assert copy.deepcopy(f32) is f32 and copy.copy(i8) is i8
