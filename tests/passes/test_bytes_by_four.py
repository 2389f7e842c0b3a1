"""Contractions of bytes become what one instruction multiplies, and give the same i32 to the bit, through the whole compiler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.codegen.contraction import preferred_panel
from tensorwright.frontend.core import apply, as_tensor
from tensorwright.ir.build import input_node
from tensorwright.ir.contraction import Contraction
from tensorwright.ir.dtypes import i8, u8
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.lowering import Contract
from tensorwright.ir.op import Trait, make
from tensorwright.ir.target import Target, row, with_vnni
from tensorwright.ir.types import TensorType
from tensorwright.passes.bytes_by_four import BytesByFour
from tensorwright.passes.contract import Context
from tensorwright.passes.contract_form import ContractForm
from tensorwright.runtime.host import host, runnable_rows

Array = np.ndarray[Any, Any]
VNNI = with_vnni(row("x86-64-v4"))
KINDS = {"i8": (np.int8, -128), "u8": (np.uint8, 0)}
CONV = {"stride": (1, 2), "padding": ((1, 1), (1, 0)), "dilation": (1, 1), "groups": 1, "layout": "NHWC"}


def octets(rng: np.random.Generator, kind: str, *shape: int) -> Array:
    dtype, low = KINDS[kind]
    return rng.integers(low, low + 256, shape).astype(dtype)


def passed(graph: Graph, target: Target) -> Graph:
    ctx = Context(target=target, preferred_panel=preferred_panel)
    return BytesByFour().apply(ContractForm().apply(graph, ctx), ctx)


def contractions(graph: Graph) -> list[tuple[str, Contraction]]:
    found = []
    for n in graph.nodes():
        if n.op.has(Trait.CONTRACTION):
            form = n.op.lower(n)
            assert isinstance(form, Contract)
            found.append((f"{n.inputs[0].dtype}{n.inputs[1].dtype}", form.spec))
    return found


@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_unlike_signs_and_steps_by_four(a: str, b: str) -> None:
    rng = np.random.default_rng(3)
    cases: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = [
        (lambda x, y: make("matmul", x, y), (5, 8), (8, 7)),
        (lambda x, y: make("matmul", x, y), (2, 3, 5), (2, 5, 9)),
        (lambda x, y: make("conv2d", x, make("transpose", y, perm=(3, 2, 0, 1)), **{**CONV, "padding": ((0, 0), (0, 0))}),
         (1, 5, 7, 3), (3, 3, 3, 6)),
    ]  # fmt: skip
    for build, left, right in cases:
        arrays = [octets(rng, a, *left), octets(rng, b, *right)]
        x, y = (
            input_node("x", TensorType({"i8": i8, "u8": u8}[a], left)),
            input_node("y", TensorType({"i8": i8, "u8": u8}[b], right)),
        )
        graph = Graph((x, y), (build(x, y),))
        wanted = run(graph, arrays)[0]
        for target in (VNNI, row("x86-64-v3")):
            after = passed(graph, target)
            assert np.array_equal(run(after, arrays)[0], wanted)
            for kinds, spec in contractions(after):
                assert kinds in (("u8i8", "i8u8") if target is VNNI else ("i16i16",))
                assert spec.of_kind("k")[-1].extent % (4 if target is VNNI else 2) == 0
            assert passed(after, target) is after or contractions(passed(after, target)) == contractions(after)


def test_what_has_no_steps_is_left_alone() -> None:
    x, y = input_node("x", TensorType(i8, (3, 0))), input_node("y", TensorType(i8, (0, 4)))
    graph = Graph((x, y), (make("matmul", x, y),))
    assert np.array_equal(run(passed(graph, VNNI), [np.zeros((3, 0), np.int8), np.zeros((0, 4), np.int8)])[0], np.zeros((3, 4)))


def product(a: Array, b: Array) -> Array:
    return np.matmul(a.astype(np.int32), b.astype(np.int32))


@pytest.mark.parametrize("target", ["host", *(r for r in runnable_rows() if r != host().name or host().vnni)])
def test_compiled_products_of_every_size_and_sign(target: str) -> None:
    """Sizes on both sides of a vector, in one program for each row; weights as inputs, and as parameters, which are packed."""
    rng = np.random.default_rng(1)
    sizes = (1, 7, 8, 9, 15, 16, 17, 31, 33)
    given, weights, kinds = [], [], []
    for k, (m, n, depth) in enumerate(zip(sizes, sizes[4:] + sizes[:4], sizes[7:] + sizes[:7], strict=True)):
        a, b = ("u8i8", "i8i8", "u8u8", "i8u8")[k % 4][:2], ("u8i8", "i8i8", "u8u8", "i8u8")[k % 4][2:]
        given.append(octets(rng, a, m, depth))
        weights.append(octets(rng, b, depth, n))
        kinds.append((a, b))
    count = len(sizes)

    class Products(tw.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for k, w in enumerate(weights):
                setattr(self, f"w{k}", tw.nn.Parameter(w))

        def forward(self, *xs: Any) -> tuple[Any, ...]:
            return (
                *(tw.matmul(xs[k], getattr(self, f"w{k}")) for k in range(count)),
                *(tw.matmul(xs[k], xs[count + k]) for k in range(count)),
            )

    specs = [tw.spec(*x.shape, dtype=str(x.dtype)) for x in (*given, *weights)]
    exe = tw.compile(Products(), *specs, target=target)
    found = exe(*given, *weights)
    for k in range(2 * count):
        wanted = product(given[k % count], weights[k % count])
        assert found[k].dtype == np.int32 and np.array_equal(found[k], wanted), (k, kinds[k % count])


def test_quantised_layers_end_in_bytes() -> None:
    """A convolution, its scale and bias, a rectifier and the next one's quantisation are one kernel: nothing wider is stored."""
    rng = np.random.default_rng(4)
    x, w = octets(rng, "u8", 1, 16, 9, 8), octets(rng, "i8", 20, 16, 3, 3)
    scale, bias = (rng.random(20) * 1e-3).astype(np.float32), rng.integers(-9999, 9999, 20).astype(np.int32)

    def layer(t: Any, w: Any, scale: Any, bias: Any) -> Any:
        sums = apply("conv2d", t, w, **{**CONV, "layout": "NCHW"}) + bias.reshape(1, -1, 1, 1)
        real = sums.astype("f32") * scale.reshape(1, -1, 1, 1)
        return (tw.maximum(real, 0.0).round() + 3.0).astype("u8")

    exe = tw.compile(lambda t: layer(t, *(as_tensor(v) for v in (w, scale, bias))), tw.spec(1, 16, 9, 8, dtype="u8"))
    padded = np.pad(x.astype(np.int32), ((0, 0), (0, 0), (1, 1), (1, 0)))
    sums = sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + 9, j : j + 7 : 2][..., :4], w[:, :, i, j].astype(np.int32))
        for i in range(3)
        for j in range(3)
    )
    real = np.maximum((sums + bias.reshape(1, -1, 1, 1)).astype(np.float32) * scale.reshape(1, -1, 1, 1), 0)
    wanted = np.clip(np.rint(real) + 3, 0, 255).astype(np.uint8)
    assert np.array_equal(exe(x), wanted)


@pytest.mark.parametrize("target", ["host", *runnable_rows()])
def test_products_of_i16_wrap_like_numpys(target: str) -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-(2**15), 2**15, s).astype(np.int16) for s in ((9, 33), (33, 17)))
    a[0], b[:, 0] = -(2**15), -(2**15)  # the one pair whose two products are 2^31
    exe = tw.compile(tw.matmul, tw.spec(9, 33, dtype="i16"), tw.spec(33, 17, dtype="i16"), target=target)
    found = exe(a, b)
    assert found.dtype == np.int32 and np.array_equal(found, product(a, b))
