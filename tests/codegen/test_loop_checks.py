"""The verifier and the interpreter: every rule has a kernel that breaks it."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.codegen.loop_interp import run
from tensorwright.codegen.loop_ir import Alloc, Buffer, For, Kernel, Let, Module, Stmt, Store, vector_variable
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_verify import verify
from tensorwright.ir.dtypes import bool_, f32, i32, i64
from tensorwright.ir.errors import VerifyError
from tensorwright.ir.expr import Expr, const, load, var


def kernel(body: str, before: str = "", parameters: str = "x: f32[8, 16], y: f32[8, 16], r: f32[4] readonly") -> Module:
    return parse_module(f"{before}\nkernel main({parameters}) {{\n{body}\n}}")


CALLEE = "kernel f(a: f32[16], n: i64) {\n store a[0] = cast(f32, n)\n}"
PARALLEL = "kernel f(a: f32[16]) {\n for i in 0 .. 16 parallel {\n store a[i] = 0.0:f32\n }\n}"


@pytest.mark.parametrize(
    ("body", "before", "message"),
    [
        (
            "for i in 0 .. 9 serial {\n store y[i, 0] = 0.0:f32\n }",
            "",
            "index i of y runs from 0 to 8, outside dimension 0 of size 8",
        ),
        ("for i in 0 .. 8 serial {\n store y[i, 8] = x[7 - i, 3]:16\n }", "", "outside dimension 1 of size 16"),
        ("store y[0 - 1, 0] = 0.0:f32", "", "runs from -1"),
        ("store y[0] = 0.0:f32", "", "2 dimensions, the store gives it 1"),
        ("store r[0] = 0.0:f32", "", "read-only"),
        ("for i in 0 .. 8 serial {\n for i in 0 .. 2 serial {\n store y[i, 0] = 0.0:f32\n }\n }", "", "name i is taken"),
        ("for i in 0 .. 8 step 0 serial {\n store y[i, 0] = 0.0:f32\n }", "", "step of loop i is 0"),
        ("alloc t: f32[4] register\nfor i in 0 .. 4 serial {\n store t[i] = 0.0:f32\n }", "", "varies once loops are unrolled"),
        ("for i in 0 .. cast(i64, x[0, 0]) unrolled {\n store y[i, 0] = 0.0:f32\n }", "", "bounds of unrolled loop i"),
        ("for i in 0 .. 4 parallel {\n for j in 0 .. 4 parallel {\n store y[i, j] = 0.0:f32\n }\n }", "", "inside another one"),
        ("alloc t: f32[4] register\nfor i in 0 .. 4 parallel {\n store y[i, 0] = t[0]\n }", "", "t is not visible"),
        ("store y[tid, 0] = 0.0:f32", "", "variable tid"),
        ("alloc x: f32[4] local", "", "name x is taken"),
        ("for i in 0 .. 2 serial {\n alloc t: f32[4] local\n }\nalloc t: f32[5] local", "", "name t is taken"),
        ("call f(x @ 0; 1)", "", "f is not a kernel that comes before"),
        ("call f(x @ 0)", CALLEE, "takes 1 buffers and 1 scalars, got 1 and 0"),
        ("call f(r @ 0; 1)", CALLEE, "r spans 4 elements, a of f needs 16"),
        ("call f(x @ 0)", PARALLEL, "has a parallel loop"),
        ("store y[0, 0] = reduce_add(x[0, 0]:3)", "", "2^k lanes"),
        ("store y[0, 0] = shuffle.low3(x[0, 0]:4, x[1, 0]:4)", "", "shuffle.low3"),
        ("store y[0, 0] = shuffle.even2(x[0, 0]:2, x[1, 0]:2)", "", "shuffle.even2"),
        ("if x[0, 0]:2 < x[0, 0]:2 {\n barrier\n }", "", "an if needs one bool"),
        ("alloc t: f32[4] global", "", "scope 'global'"),
        ("alloc t: f32[4] local align 3", "", "aligned to 3 bytes"),
        ("barrier", "kernel main(y: f32[1]) {\n}", "the name is taken"),
        (
            "store y[0, 0] = x[cast(i64, x[0, 0]), 0]:4 if 0 < 1\nstore y[0, 0] = exp(x[0, 0]) if x[0, 0]",
            "",
            "mask of an access to y",
        ),
    ],
)
def test_verifier(body: str, before: str, message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(kernel(body, before))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([Store(Buffer("y", f32, (4,)), (const(0),), const(1, i32))], "a i32 is stored to y"),
        ([Store(Buffer("y", f32, (4,)), (const(0, i32),), const(1.0, f32))], "an index of y is i32"),
        ([Store(Buffer("y", f32, (4,)), (const(0),), Expr("add", (const(1.0, f32), const(1, i32)), f32))], "add -> f32"),
        (
            [Store(Buffer("y", f32, (4,)), (const(0),), Expr("div", (const(1, i32), const(1, i32)), i32))],
            "div of i32; it takes floats",
        ),
        ([Store(Buffer("y", f32, (4,)), (const(0),), Expr("frob", (const(1.0, f32),), f32))], "frob"),
        ([Store(Buffer("y", f32, (4,)), (const(0),), load(Buffer("y", f32, (9,)), (0,), f32))], "another buffer has its name"),
        ([Let(var("a", f32), const(1, i32))], "binds i32"),
        ([Let(vector_variable("a", f32, 4), const(1.0, f32))], "binds f32"),
        ([For(var("i", i32), const(0), const(4), ())], "must be scalar i64"),
        ([For(var("i"), const(0), const(4), (), "sideways")], "loop kind 'sideways'"),
        ([Alloc(Buffer("t", bool_, (4,), "register", writable=False))], "read-only"),
    ],
)
def test_verifier_of_what_text_cannot_say(body: list[Stmt], message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(Module((Kernel("k", (Buffer("y", f32, (4,)),), tuple(body)),)))
    assert message in str(caught.value)


def test_verifier_lets_undecidable_and_guarded_accesses_pass() -> None:
    verify(
        kernel(
            "for i in 0 .. 12 serial {\n if i < 8 {\n store y[i, 0] = 1.0:f32\n }\n store y[i, 0] = 0.0:f32 if i < 8\n"
            "store y[min(i, 7), 0] = x[i % 8, 1]\n }\nfor i in 9 .. 9 serial {\n store y[i, 0] = 0.0:f32\n }"
        )
    )


def fails(body: str, message: str, before: str = "") -> None:
    module = kernel(body, before)
    x = np.zeros((8, 16), np.float32)
    with pytest.raises(VerifyError) as caught:
        run(module, "main", [x, x.copy(), np.zeros(4, np.float32)])
    assert message in str(caught.value)


def test_interpreter_finds_what_goes_wrong() -> None:
    fails("store y[cast(i64, x[0, 0]) + 8, 0] = 0.0:f32", "index 8 of y is out of range in dimension 0 of size 8")
    fails("store y[0, 1] = x[0, 1]:16", "out of range in dimension 1")
    fails(
        "alloc t: f32[4] local\nstore t[0] = 1.0:f32\nstore y[0, 0] = t[0] + t[1]", "element 1 of t is read before it is written"
    )
    fails("alloc t: f32[4] register\nstore y[0, 0] = t[0]", "element 0 of t is read before it is written")
    fails(
        "for i in 0 .. 4 serial {\n alloc t: f32[1] local\n if i == 0 {\n store t[0] = 0.0:f32\n }\n store y[i, 0] = t[0]\n }",
        "read before",
    )
    fails("call f(x @ 120; 0)", "the view of x from 120 on is smaller", CALLEE)
    fails("store r[0] = 0.0:f32", "read-only")


def test_interpreter_finds_races() -> None:
    loop = "for i in 0 .. 4 parallel {{\n {}\n }}"
    fails(loop.format("store y[0, 0] = 1.0:f32"), "race")
    fails(loop.format("store y[i, 0] = y[(i + 1) % 4, 0]"), "race")
    fails(loop.format("store y[i, 0] = 1.0:f32\n store y[i + 1, 0] = 2.0:f32"), "race")
    fails(loop.format("call f(y @ i * 15; 1)\n call f(y @ i * 15 + 15; 1)"), "race", CALLEE)
    for fine in ("store y[i, 0] = x[0, 0] + y[i, 0]", "store y[tid, 0] = 1.0:f32\n store x[i, 1] = y[tid, 0]"):
        module = kernel(loop.format(fine))
        run(module, "main", [np.zeros((8, 16), np.float32) for _ in range(2)] + [np.zeros(4, np.float32)])


def test_in_place_update_is_no_race() -> None:
    module = kernel("for i in 0 .. 8 parallel {\n for j in 0 .. 16 vector {\n store y[i, j] = x[i, j] * 2.0:f32\n }\n }")
    x = np.ones((8, 16), np.float32)
    run(module, "main", [x, x, np.zeros(4, np.float32)])
    assert (x == 2).all()


def test_linear_forms() -> None:
    from tensorwright.codegen.linear import Linear, linear

    i, j = var("i"), var("j")
    form = linear((i * 4 + j - 3) * 2 - (i - j) + (i // 3) * 6)
    assert form.constant == -6
    assert form.coefficient(i) == 7
    assert form.coefficient(j) == 3
    assert form.coefficient(i // 3) == 6
    assert linear(i - i) == Linear(0)
    assert linear(form.expr()) == form
    assert i.dtype is i64
