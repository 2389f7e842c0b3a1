"""Widening of expressions, and the loop rewrite: main vectors and one masked tail."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorwright.codegen.loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_text import block_lines, print_module
from tensorwright.codegen.vectorize import vectorize, vectorize_loop
from tensorwright.ir.dtypes import bool_, f32
from tensorwright.ir.errors import CompileError
from tensorwright.ir.expr import Expr, const, load, ramp, unary, var

X = Buffer("x", f32, (100,))
T = Buffer("t", f32, (10, 100), strides=(1, 10))
I, J = var("i"), var("j")


def shape(e: Expr) -> str:
    """How a widened load reads: vector, gather or scalar."""
    if e.op != "load":
        return e.op
    wide = any(a.lanes > 1 for a in e.args[: e.attr[1]])
    return "gather" if wide else "vector" if e.lanes > 1 else "scalar"


def test_loads() -> None:
    for index, expected in (
        (I + 3, "vector"),
        (J * 4 + I, "vector"),
        (I * 2, "gather"),
        (99 - I, "gather"),
        (J, "scalar"),
        (I // 2, "gather"),
    ):
        assert shape(vectorize(load(X, (index,), f32), I, 8)) == expected, index
    assert shape(vectorize(load(T, (J, I), f32), I, 8)) == "gather"  # the last stride is not 1
    assert shape(vectorize(load(T, (I, J), f32), I, 8)) == "gather"


def test_what_does_not_depend_stays_scalar() -> None:
    e = unary("exp", load(X, (J,), f32))
    assert vectorize(e, I, 8) is e
    wide = vectorize(e * load(X, (I,), f32), I, 8)
    assert wide.lanes == 8
    assert wide.args[0].op == "broadcast"
    assert wide.args[0].args[0] is e


def test_masks_join() -> None:
    mask = Expr("var", (), bool_, 8, "m")
    own = vectorize(load(X, (I,), f32, mask=I < 5), I, 8, mask)
    assert own.args[-1].op == "and"
    assert vectorize(load(X, (I,), f32), I, 8, mask).args[-1] is mask
    assert shape(vectorize(load(X, (J,), f32, mask=I < 5), I, 8)) == "gather"  # only the mask varies


def test_vectors_cannot_be_widened_again() -> None:
    with pytest.raises(CompileError, match="vector already"):
        vectorize(ramp(I, 4), I, 8)


def rewritten(stop: int, lanes: int = 8) -> str:
    body: tuple[Stmt, ...] = (Let(var("a", f32), load(X, (I,), f32)), Store(X, (I,), var("a", f32) + load(X, (const(0),), f32)))
    return "\n".join(block_lines(vectorize_loop(For(I, const(0), const(stop), body, "vector"), lanes)))


def test_loop_golden() -> None:
    assert (
        rewritten(20)
        == """\
for i in 0 .. 16 step 8 serial {
  let a = x[i]:8
  store x[i] = a + broadcast(x[0], 8)
}
for i in 16 .. 20 step 8 serial {
  let i.mask = ramp(i, 8) < 20:i64x8
  let a = x[i; i.mask]:8
  store x[i] = a + broadcast(x[0], 8) if i.mask
}"""
    )
    assert "mask" not in rewritten(16)
    assert rewritten(5).count("for") == 1
    assert rewritten(20, 1).count("for") == 1


def test_what_cannot_be_vectorised() -> None:
    cases: list[tuple[Stmt, str]] = [
        (Store(X, (const(0),), load(X, (I,), f32)), "does not depend on i"),
        (If(I < 3, ()), "which depends on i"),
        (Alloc(Buffer("r", f32, (4,), "register")), "Alloc statement"),
    ]
    for statement, message in cases:
        with pytest.raises(CompileError, match=message):
            vectorize_loop(For(I, const(0), const(20), (statement,), "vector"), 8)
    with pytest.raises(CompileError, match="its step is 2"):
        vectorize_loop(For(I, const(0), const(20), (), "vector", 2), 8)


def test_the_example_in_the_docs_parses() -> None:
    page = (Path(__file__).parents[2] / "docs" / "loop-ir.md").read_text()
    example = page.split("```")[1].strip() + "\n"
    assert print_module(parse_module(example)) == example
