"""Inference: symbolic sizes, and errors that name the operand, what it has and what would fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tensorwright.ir import dtypes as d
from tensorwright.ir.dims import Dim, symbol
from tensorwright.ir.errors import AttributeValueError, DTypeError, GradientError, ShapeError, TensorwrightError
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import lookup, make
from tensorwright.ir.ops.contract import product_spec
from tensorwright.ir.types import TupleType

from .support import gradients

N = symbol("N")
counter = iter(range(10**6))


def x(*shape: Dim, dtype: d.DType = d.f32) -> Node:
    return make("input", name=f"v{next(counter)}", role="data", dtype=dtype, shape=shape)


def test_symbolic_sizes_go_through() -> None:
    assert make("add", x(N, 3), x(N, 3)).shape == (N, 3)
    assert make("sum", x(N, 3), axes=(1,)).shape == (N,)
    assert make("reshape", x(N, 4, 3), shape=(N * 4, 3)).shape == (4 * N, 3)
    assert make("transpose", x(N, 4, 3), perm=(2, 0, 1)).shape == (3, N, 4)
    assert make("broadcast_to", x(4), shape=(N, 4)).shape == (N, 4)
    assert make("slice", x(N, 4), starts=(0, 1), stops=(N, 3), steps=(1, 1)).shape == (N, 2)
    assert make("pad", x(N, 4), low=(1, 0), high=(1, 0), interior=(0, 0)).shape == (N + 2, 4)
    assert make("concat", x(N, 4), x(3, 4), x(N, 4), axis=0).shape == (2 * N + 3, 4)
    assert make("gather", x(9, 4), x(N, 5, dtype=d.i64), axis=0).shape == (N, 5, 4)
    assert make("matmul", x(N, 7, 4), x(4, 5)).shape == (N, 7, 5)
    y = make("conv2d", x(N, 3, 8, 8), x(6, 3, 3, 3), padding=((1, 1), (1, 1)), stride=(2, 2))
    assert y.shape == (N, 6, 4, 4)
    assert make("conv2d", x(1, 3, N, 8), x(6, 3, 3, 3)).shape == (1, 6, N - 2, 6)
    assert make("max_pool2d", x(N, 3, 8, 8), kernel=(2, 2), stride=(2, 2)).shape == (N, 3, 4, 4)
    assert make("random_uniform", x(dtype=d.u64), shape=(N, 3)).shape == (N, 3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: make("mean", x(N, 3), axes=(0,)),
        lambda: make("slice", x(N, 4), starts=(0, 1), stops=(N, 3), steps=(1, 2)),
        lambda: make("concat", x(N, 4), x(3, 4), axis=0),
        lambda: make("broadcast_to", x(4), shape=(N, 4)),
        lambda: make("matmul", x(N, 7, 4), x(4, 5)),
        lambda: make("conv2d", x(N, 3, 8, 8), x(6, 3, 3, 3), padding=((1, 1), (1, 1)), stride=(2, 2)),
        lambda: make("max_pool2d", x(N, 3, 8, 8), kernel=(3, 3), stride=(2, 2), padding=((1, 1), (1, 1))),
        lambda: make("avg_pool2d", x(N, 3, 8, 8), kernel=(2, 2), stride=(2, 2)),
        lambda: make("gather", x(N, 4), x(5, dtype=d.i64)),
        lambda: make("max", x(N, 4), axes=(0,)),
    ],
)
def test_gradients_and_lowerings_keep_symbolic_sizes(build: Callable[[], Node]) -> None:
    node = build()
    node.op.lower(node)
    seed = x(*node.shape)
    backward, wrt = gradients(Graph(node.inputs, (node,)), seed)
    assert [g.type for g in backward.outputs] == [w.type for w in wrt]
    for n in backward.nodes():
        n.op.lower(n)


BAD: list[tuple[type[TensorwrightError], str, Callable[[], Any]]] = [
    (ShapeError, r"operand 1 of add has shape \[3, 4\], expected \[3, 5\] as operand 0", lambda: make("add", x(3, 5), x(3, 4))),
    (ShapeError, r"operand 1 of add has shape \[N, 4\], expected \[N \+ 1, 4\]", lambda: make("add", x(N + 1, 4), x(N, 4))),
    (DTypeError, r"operand 1 of mul has dtype i32, expected f32 as operand 0", lambda: make("mul", x(3), x(3, dtype=d.i32))),
    (DTypeError, r"operand 0 of exp has dtype i64, expected f32, f64, f16 or bf16", lambda: make("exp", x(3, dtype=d.i64))),
    (DTypeError, r"operand 0 of add has dtype bool, expected f32", lambda: make("add", x(3, dtype=d.bool_), x(3, dtype=d.bool_))),
    (DTypeError, r"operand 0 of neg has dtype f8e5m2", lambda: make("neg", x(3, dtype=d.f8e5m2))),
    (DTypeError, r"operand 0 of and has dtype f32, expected bool", lambda: make("and", x(3), x(3))),
    (DTypeError, r"operand 0 of where has dtype f32, expected bool", lambda: make("where", x(3), x(3), x(3))),
    (ShapeError, r"operand 1 of where has shape \[4\], expected \[3\]", lambda: make("where", x(3, dtype=d.bool_), x(4), x(4))),
    (DTypeError, r"operand 2 of where has dtype f64", lambda: make("where", x(3, dtype=d.bool_), x(3), x(3, dtype=d.f64))),
    (AttributeValueError, r"dtype of cast is a DType, not 'f32'", lambda: make("cast", x(3), dtype="f32")),
    (AttributeValueError, r"axes entry 2 of sum .* rank 2", lambda: make("sum", x(3, 4), axes=(2,))),
    (AttributeValueError, r"axes \(1, 0\) of sum must be ascending", lambda: make("sum", x(3, 4), axes=(1, 0))),
    (AttributeValueError, r"axes of sum are a tuple", lambda: make("sum", x(3, 4), axes=0)),
    (AttributeValueError, r"keepdims of max is a bool", lambda: make("max", x(3, 4), axes=(0,), keepdims=1)),
    (ShapeError, r"max over dimension 1 of \[3, 0\], which is empty", lambda: make("max", x(3, 0), axes=(1,))),
    (ShapeError, r"argmax over dimension 0 of \[0\], which is empty", lambda: make("argmax", x(0), axis=0)),
    (AttributeValueError, r"axis -1 of cumsum", lambda: make("cumsum", x(3), axis=-1)),
    (
        ShapeError,
        r"shape \[2, 3\] with 6 elements, which does not fit \[4\] with 4",
        lambda: make("reshape", x(2, 3), shape=(4,)),
    ),
    (AttributeValueError, r"shape of reshape is a tuple of non-negative", lambda: make("reshape", x(2, 3), shape=(-1,))),
    (AttributeValueError, r"perm of transpose is a permutation of 0..1", lambda: make("transpose", x(2, 3), perm=(0, 0))),
    (ShapeError, r"\[3\], which does not broadcast to \[3, 4\]", lambda: make("broadcast_to", x(3), shape=(3, 4))),
    (ShapeError, r"slice 0:5:1 of dimension 0 does not lie in", lambda: make("slice", x(4), starts=(0,), stops=(5,), steps=(1,))),
    (ShapeError, r"slice 3:2:1 of dimension 0", lambda: make("slice", x(4), starts=(3,), stops=(2,), steps=(1,))),
    (AttributeValueError, r"steps of slice .* at least 1", lambda: make("slice", x(4), starts=(0,), stops=(4,), steps=(0,))),
    (AttributeValueError, r"low .* need 2 entries", lambda: make("pad", x(3, 4), low=(1,), high=(0, 0), interior=(0, 0))),
    (
        AttributeValueError,
        r"pad \(low\) is a tuple of non-negative",
        lambda: make("pad", x(3), low=(-1,), high=(0,), interior=(0,)),
    ),
    (
        AttributeValueError,
        r"value of pad is 0.5, which operand 0 of dtype i32",
        lambda: make("pad", x(3, dtype=d.i32), low=(1,), high=(0,), interior=(0,), value=0.5),
    ),
    (
        AttributeValueError,
        r"value of pad is inf, which operand 0 of dtype i64",
        lambda: make("pad", x(3, dtype=d.i64), low=(1,), high=(0,), interior=(0,), value=float("inf")),
    ),
    (ShapeError, r"operand 1 of concat has shape \[2, 4\], expected \[\*, 3\]", lambda: make("concat", x(2, 3), x(2, 4), axis=0)),
    (DTypeError, r"operand 1 of concat has dtype i64", lambda: make("concat", x(2), x(2, dtype=d.i64), axis=0)),
    (ShapeError, r"concat takes at least one operand", lambda: make("concat", axis=0)),
    (DTypeError, r"operand 1 of gather \(the indices\) has dtype f32", lambda: make("gather", x(3), x(2))),
    (ShapeError, r"operand 0 of gather has shape \[0\], with nothing", lambda: make("gather", x(0), x(2, dtype=d.i64))),
    (
        ShapeError,
        r"operand 2 of scatter_add has shape \[2, 3\], expected \[2, 4\]",
        lambda: make("scatter_add", x(3, 4), x(2, dtype=d.i64), x(2, 3)),
    ),
    (AttributeValueError, r"depth of one_hot is an int >= 0, not -1", lambda: make("one_hot", x(2, dtype=d.i64), depth=-1)),
    (AttributeValueError, r"axis 0 of iota", lambda: make("iota", shape=())),
    (ShapeError, r"operand 1 of matmul has shape \[5, 4\], expected 3 rows", lambda: make("matmul", x(2, 3), x(5, 4))),
    (ShapeError, r"operand 0 of matmul has shape \[3\], expected at least 2", lambda: make("matmul", x(3), x(3, 4))),
    (ShapeError, r"batch dimensions \[3\], which do not broadcast with \[2\]", lambda: make("matmul", x(2, 3, 4), x(3, 4, 5))),
    (
        ShapeError,
        r"operand 1 has shape \[6, 4, 3, 3\], which takes 4 input",
        lambda: make("conv2d", x(1, 3, 8, 8), x(6, 4, 3, 3)),
    ),
    (ShapeError, r"height 2, padded to 2, smaller than the window of 3", lambda: make("conv2d", x(1, 3, 2, 8), x(6, 3, 3, 3))),
    (ShapeError, r"5 output channels do not split into 2", lambda: make("conv2d", x(1, 4, 8, 8), x(5, 2, 3, 3), groups=2)),
    (AttributeValueError, r"layout of conv2d is one of", lambda: make("conv2d", x(1, 3, 8, 8), x(6, 3, 3, 3), layout="CHW")),
    (AttributeValueError, r"stride of conv2d", lambda: make("conv2d", x(1, 3, 8, 8), x(6, 3, 3, 3), stride=(0, 1))),
    (AttributeValueError, r"padding of conv2d is", lambda: make("conv2d", x(1, 3, 8, 8), x(6, 3, 3, 3), padding=1)),
    (
        ShapeError,
        r"operand 0 of conv2d_input_grad has shape \[1, 6, 5, 6\], expected \[1, 6, 6, 6\]",
        lambda: make("conv2d_input_grad", x(1, 6, 5, 6), x(6, 3, 3, 3), input_shape=(1, 3, 8, 8)),
    ),
    (
        ShapeError,
        r"operand 0 of contract has shape \[3, 3\], but index k",
        lambda: make("contract", x(3, 3), x(4, 5), spec=product_spec(3, 5, 4)),
    ),
    (AttributeValueError, r"spec of contract is a Contraction", lambda: make("contract", x(3, 3), x(3, 3), spec=1)),
    (
        AttributeValueError,
        r"must be smaller than the kernel",
        lambda: make("max_pool2d", x(1, 1, 4, 4), kernel=(2, 2), stride=(2, 2), padding=((2, 0), (0, 0))),
    ),
    (ShapeError, r"of rank 3, expected rank 4", lambda: make("max_pool2d", x(1, 4, 4), kernel=(2, 2), stride=(2, 2))),
    (
        DTypeError,
        r"operand 1 of max_pool2d_grad \(the positions\) has dtype i64, expected i32",
        lambda: make(
            "max_pool2d_grad", x(1, 1, 2, 2), x(1, 1, 2, 2, dtype=d.i64), kernel=(2, 2), stride=(2, 2), input_shape=(1, 1, 4, 4)
        ),
    ),
    (DTypeError, r"\(the key\) has dtype i64, expected u64", lambda: make("random_uniform", x(dtype=d.i64), shape=(3,))),
    (ShapeError, r"\(the key\) has shape \[1\], expected a scalar", lambda: make("random_normal", x(1, dtype=d.u64), shape=(3,))),
    (AttributeValueError, r"stream of random_normal", lambda: make("random_normal", x(dtype=d.u64), shape=(3,), stream=-1)),
    (ShapeError, r"operand 0 of gradient has shape \[3\], expected a scalar", lambda: make("gradient", x(3), x(3))),
    (AttributeValueError, r"add takes 2 operands, got 1", lambda: make("add", x(3))),
]


@pytest.mark.parametrize(("error", "message", "build"), BAD, ids=[str(k) for k in range(len(BAD))])
def test_bad_operands_are_named(error: type[TensorwrightError], message: str, build: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_gradient_node_has_types_but_no_value() -> None:
    y, a, b = x(), x(3), x(2, 2)
    node = make("gradient", y, a, b)
    assert isinstance(node.type, TupleType) and node.type.items == (a.type, b.type)
    with pytest.raises(TensorwrightError, match="run the gradient pass"):
        lookup("gradient").reference([], {})


def test_a_strided_contraction_refuses_a_gradient() -> None:
    op = lookup("contract")
    strided = next(s for s in op.samples() if s.label == "strided")
    node = make("contract", x(11, 10, 4), x(17, 4, 3, 3), **strided.attrs)
    assert callable(op.grad)
    with pytest.raises(GradientError, match="before the pass"):
        op.grad(node, (node,))


def test_identities_with_other_ids_stay_apart() -> None:
    a = x(3)
    assert make("mark", a, id=1) is make("mark", a, id=1) is not make("mark", a, id=2)
