"""The text of the loop IR: golden forms, exact round trips, and errors with a place."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tensorwright.codegen.loop_ir import Buffer, Call, For, If, Kernel, Let, Module, Store, vector_variable
from tensorwright.codegen.loop_parse import parse_kernel, parse_module
from tensorwright.codegen.loop_text import print_kernel, print_module
from tensorwright.ir.dtypes import ALL, bf16, bool_, f32, f64, i32, i64, u8
from tensorwright.ir.errors import ParseError
from tensorwright.ir.expr import (
    Expr,
    binary,
    bitcast,
    broadcast,
    cast,
    const,
    eq,
    fma,
    load,
    ramp,
    reduce_lanes,
    select,
    shuffle,
    unary,
    var,
)  # fmt: skip

GOLDEN = """\
# Softmax of nothing in particular.
# Second line.
kernel rows(x: f32[4, 32] align 64, at: i32[4], y: f32[4, 32] strides [40, 1], n: i64) noinline noalias {
  for r in 0 .. min(n, 4) step 2 parallel {
    alloc t: f32[2, 16] register
    let base = cast(i64, at[r]) * 8 + tid
    for j in 0 .. 2 unrolled {
      store t[j, 0] = fma(x[r, j * 16]:16, broadcast(x[r, 0], 16), 1.5:f32x16)
    }
    if base < 3 & x[r, 1] == -0.0:f32 {
      %0 = t[0, 0]:16
      store y[r, 0] = %0 * (%0 - t[1, 0]:16) if ramp(r, 16) < 7:i64x16 nontemporal
    } else {
      store y[r, 3] = reduce_add(t[0, 0]:16)
      call other(x @ r * 32, y @ 0; n + 1; 7)
    }
  }
}"""


def test_golden() -> None:
    assert print_kernel(parse_kernel(GOLDEN)) == GOLDEN


def test_what_is_parsed_is_what_was_printed() -> None:
    x, y, i = Buffer("x", f32, (8, 16)), Buffer("y", bool_, (8, 16), align=1), var("i")
    v = load(x, (i, 0), f32, lanes=16)
    t = vector_variable("t", f32, 16)
    condition = binary("lt", t, binary("mul", v, v))
    rare = Expr("select", (condition, v, t), f32, 16, "rare")
    body = (
        For(
            i,
            const(0),
            const(8),
            (Let(t, unary("exp", v)), Store(y, (i, const(0)), condition), Store(x, (i, const(0)), rare)),
            "serial",
        ),
        If(eq(load(x, (1, 2), f32, mask=const(True, bool_)), 0.0), (Call("f", ((x, i * 0 + 3),)),)),
    )
    text = print_module(Module((Kernel("k", (x, y), body),)))
    again = parse_module(text)
    assert print_module(again) == text
    loop = again["k"].body[0]
    assert isinstance(loop, For)
    let, store, last = loop.body
    assert isinstance(let, Let)
    assert isinstance(store, Store)
    assert isinstance(last, Store)
    assert let.value is unary("exp", v)
    assert store.value is condition
    assert last.value is rare


LEAVES = st.sampled_from([
    load(Buffer("x", f32, (64,)), (var("i"),), f32), const(-1.5, f32), const(float("inf"), f32), const(-0.0, f32),
    const(1e-40, f32),
    cast(var("i"), f32), load(Buffer("x", f32, (64,)), (var("i") + 1,), f32, mask=var("i") < 5),
])  # fmt: skip


def grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    two = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "div", "max", "min", "pow"]), two).map(lambda t: binary(t[0], *t[1])),
        st.tuples(st.sampled_from(["neg", "exp", "floor", "erf"]), inner).map(lambda t: unary(*t)),
        st.tuples(inner, inner, inner).map(lambda t: select(binary("lt", t[0], t[1]) | eq(t[1], t[2]), t[1], t[2])),
        st.tuples(inner, inner, inner).map(lambda t: fma(*t)),
        inner.map(lambda e: bitcast((bitcast(e, i32) << const(3, i32)) % const(7, i32), f32)),
        inner.map(lambda e: cast(cast(e, bf16), f32)),
        inner.map(lambda e: reduce_lanes("max", broadcast(e, 8))),
        st.tuples(inner, inner).map(lambda t: reduce_lanes("add", shuffle(broadcast(t[0], 8), ramp(t[1], 8), "odd2"))),
        inner.map(lambda e: reduce_lanes("add", cast(ramp(cast(e, i64), 4), f32))),
    )


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, grow, max_leaves=30))
def test_any_expression_comes_back_as_the_same_object(e: Expr) -> None:
    x, i = Buffer("x", f32, (64,)), var("i")
    m = Module((Kernel("k", (x,), (For(i, const(0), const(60), (Store(x, (i,), e),), "serial"),)),))
    loop = parse_module(print_module(m))["k"].body[0]
    assert isinstance(loop, For)
    store = loop.body[0]
    assert isinstance(store, Store)
    assert store.value is e


def test_long_chains_stay_shallow() -> None:
    x = Buffer("x", f32, (64,))
    e = load(x, (0,), f32)
    for k in range(3000):
        e = unary("neg", e) if k % 2 else e * load(x, (k % 64,), f32)
    m = Module((Kernel("k", (x,), (Store(x, (const(0),), e),)),))
    again = parse_module(print_module(m))["k"].body[0]
    assert isinstance(again, Store)
    assert again.value is e


def test_constants_of_every_dtype() -> None:
    for d in ALL:
        value = True if d is bool_ else 0.5 if d.is_float else 1
        b = Buffer("b", d, (4,), align=d.itemsize)
        for lanes in (1, 4):
            m = Module((Kernel("k", (b,), (Store(b, (const(0),), const(value, d, lanes)),)),))
            again = parse_module(print_module(m))["k"].body[0]
            assert isinstance(again, Store)
            assert again.value is const(value, d, lanes)
    assert f64 in ALL
    assert u8 in ALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel k(x: f32[4]) {\n  store x[0] = y[0]\n}", "line 2, column 16: there is no buffer y"),
        ("kernel k(x: f32[4]) {\n  store x[0] = z\n}", "line 2, column 16: there is no variable z"),
        ("kernel k(x: f32[4]) {\n  store x[0] = 1.0:f32 +\n}", "line 3, column 1: expected an expression"),
        ("kernel k(x: f32[4]) {\n  store x[0] = 1.0:f32 + 1\n}", "add of operands of f32, i64"),
        ("kernel k(x: f99[4]) {\n}", "line 1, column 13: expected a dtype"),
        ("kernel k(x: f32[4]) {\n  for i in 0 .. 4 sideways {\n  }\n}", "expected a loop kind"),
        ("kernel k(x: f32[4]) {\n  jump\n}", "expected a statement"),
        ("kernel k(x: f32[4]) {\n", "line 2, column 1: expected a statement"),
        ("kernel k(x: f32[4]) {\n  store x[0] = frob(x[0])\n}", "there is no operation frob"),
        ("kernel k(x: f32[4]) {\n  store x[0] = fma(x[0], x[1])\n}", "fma takes 3 operands, got 2"),
        ("kernel k(x: f32[4]) {\n  store x[0] = %3\n}", "expected a part"),
        ("kernel k(x: f32[4] strides [1, 2]) {\n}", "1 dimensions and 2 strides"),
        ("kernel k(x: f32[4]) {\n  store x[0] = x[0]:2 + x[0]\n}", "2, 1 lanes"),
        ("kernel k(x: f32[4]) {\n  \x00\n}", "line 2, column 3: unexpected character"),
        ("kernel k(x: f32[4]) {\n  store x[0] = 1:f32x0\n}", "at least one lane"),
    ],
)
def test_errors_say_where(text: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_module(text)
    assert message in str(caught.value)


def test_cut_off_text_never_parses_to_something_else() -> None:
    whole = parse_kernel(GOLDEN)
    assert whole.name == "rows"
    for end in range(0, len(GOLDEN) - 1, 7):
        try:
            module = parse_module(GOLDEN[:end])
        except ParseError:
            continue
        assert not module.kernels, GOLDEN[:end]
