"""`precision="bf16"`: every form of contraction at odd sizes, on every row that this machine runs, against f64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.dtypes import bf16, f32, f64
from tensorwright.ir.errors import AttributeValueError
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.op import Trait, make
from tensorwright.ir.ops.contract import product_spec
from tensorwright.ir.target import Target, row, with_bf16
from tensorwright.ir.text import print_graph
from tensorwright.ir.textparse import parse_graph
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.runtime.host import host

from .codegen.helpers import host_rows

PAIRS = with_bf16(row("x86-64-v4"))
TARGETS = [row(name) for name in host_rows()] + ([PAIRS] if host().bf16 else [])
NATIVE = pytest.mark.skipif(not host().bf16, reason="this machine has no AVX512_BF16")
Array = np.ndarray[Any, Any]


class Everything(nn.Module):
    """One output for each form: products, and convolutions of several windows, strides and channels."""

    def __init__(self) -> None:
        self.even, self.odd = nn.Linear(34, 19), nn.Linear(31, 7)
        self.stem = nn.Conv2d(3, 17, 7, stride=2, padding=3)
        self.plain = nn.Conv2d(6, 20, 3, padding=1)
        self.point, self.strided = nn.Conv2d(10, 33, 1), nn.Conv2d(8, 18, 1, stride=2)
        self.dilated, self.grouped = nn.Conv2d(5, 9, 3, dilation=2), nn.Conv2d(8, 12, 3, groups=2)
        self.single, self.depthwise = nn.Conv2d(1, 4, 5), nn.Conv2d(7, 7, 3, groups=7)

    def __call__(self, r: Any, q: Any, x: Any, y: Any) -> Any:
        image = tw.concatenate([x, y], 1)  # 10 channels
        return (
            self.even(r), self.odd(r[:, :31]), r @ q, tw.matmul(tw.transpose(r, (1, 0)), r), (r[0:1] @ q)[0],
            self.stem(x[:, :3]), self.plain(x[:, :6]), self.point(image), self.strided(x),
            self.dilated(x[:, :5]), self.grouped(x), self.single(y[:, :1]), self.depthwise(x[:, :7]),
        )  # fmt: skip


SHAPES = ((21, 34), (34, 23), (2, 8, 13, 11), (2, 2, 13, 11))


@pytest.fixture(scope="module")
def everything() -> tuple[nn.Module, list[Array], list[Array], list[Array]]:
    """The model, its arguments, the results in f64, and the sums of the absolute values of the products."""
    nn.init.seed(3)
    model = Everything()
    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in SHAPES]
    graph = tw.trace(model, *[tw.spec(*s) for s in SHAPES])
    state = {k: np.asarray(v) for k, v in model.state_dict().items()}

    def values(change: Any) -> list[Array]:
        data = iter(arrays)
        given = [state[n] if (n := str(i.attrs["name"])) in state else next(data) for i in graph.inputs]
        return [np.asarray(y) for y in run(graph, [change(a.astype(np.float64)) for a in given], dtype=f64)]

    return model, arrays, values(lambda a: a), values(np.abs)


@pytest.mark.unvalidated("the pass is validated in tests/passes; here programs run on every row")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name + "-bf16" * t.bf16)
def test_every_contraction_is_within_what_rounding_its_operands_makes(everything: Any, target: Target) -> None:
    """Each product is off by at most (1 + 2**-8)**2 - 1 of itself, so a sum by that times the sum of the absolute products, and
    what f32 adds. Measured relative to the largest result they are off by 0.5% at most: 2e-2 is the promise."""
    model, arrays, exact, most = everything
    exe = tw.compile(model, *[tw.spec(*s) for s in SHAPES], precision="bf16", target=target, threads=2)
    assert ("vdpbf16ps" in exe.text("asm")) == target.bf16
    for k, (y, ref, bound) in enumerate(zip(exe(*arrays), exact, most, strict=True)):
        assert (np.abs(y - ref) <= (2.0**-7 + 2.0**-16) * bound + 1e-5).all(), k
        assert np.abs(y - ref).max() <= 2e-2 * np.abs(ref).max(), k


def test_rows_without_the_instruction_round_operands_and_compute_in_f32(everything: Any) -> None:
    """So that a model gives the same numbers there, up to the order of sums."""
    graph = tw.trace(everything[0], *[tw.spec(*s) for s in SHAPES])
    forms = {}
    for target in (PAIRS, row("x86-64-v3")):
        ctx = Context(target=target)
        after = run_pipeline(graph, pipeline.inference(target, "bf16"), ctx, Hooks())
        nodes = [
            n
            for g in (after, *(n.attrs["body"] for n in after.nodes() if isinstance(n.attrs.get("body"), Graph)))
            for n in g.nodes()
        ]
        forms[target.name] = sorted(n.op.name for n in nodes if n.op.has(Trait.CONTRACTION))
        assert ctx.notes["mixed_precision"] == 11, "all but one channel's, which has no pairs, and the depthwise one"
    assert forms["x86-64-v4"].count("contract_f32") == 11 and "contract_f32" not in forms["x86-64-v3"]
    if host().bf16:
        results = [
            tw.compile(everything[0], *[tw.spec(*s) for s in SHAPES], precision="bf16", target=t)(*everything[1])
            for t in (PAIRS, row("x86-64-v3"))
        ]
        assert all(np.abs(a - b).max() <= 1e-5 * np.abs(b).max() for a, b in zip(*results, strict=True))


class Block(nn.Module):
    """A bottleneck with a pool before it: activations that contractions and others read."""

    def __init__(self) -> None:
        self.stem, self.a, self.b, self.c = (
            nn.Conv2d(3, 64, 3),
            nn.Conv2d(64, 16, 1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 64, 1),
        )
        self.head = nn.Linear(64, 10)

    def __call__(self, x: Any) -> Any:
        x = tw.max_pool2d(tw.relu(self.stem(x)), 2)
        x = tw.relu(x + self.c(tw.relu(self.b(tw.relu(self.a(x))))))
        return self.head(tw.mean(x, (2, 3)))


@NATIVE
@pytest.mark.unvalidated("bits are compared; values are above")
def test_activations_are_stored_in_two_bytes_and_threads_do_not_change_a_bit() -> None:
    nn.init.seed(0)
    model, x = Block(), np.random.default_rng(0).standard_normal((8, 3, 66, 66)).astype(np.float32)
    got = [tw.compile(model, x, precision="bf16", threads=n) for n in (1, 2, 4)]
    assert any(k.parallel for k in got[0].compiled.run.kernels)
    first = got[0](x)
    assert all(e(x).tobytes() == first.tobytes() for e in got[1:])
    exact = tw.compile(model, x, precision="f32")(x)
    assert np.abs(first - exact).max() <= 2e-2 * np.abs(exact).max()
    large = [line for line in got[0].text("fuse").splitlines() if "fused" in line and "f32[8, 32, 32" in line.split("=")[1]]
    assert not large, "an activation of the block is stored in f32"


@NATIVE
def test_rounding_by_the_instruction_is_rounding_to_the_bit() -> None:
    """It takes denormals for zero, which the code around it must make good; every exponent, both signs, halves, NaN."""
    high = np.repeat(np.arange(1 << 16, dtype=np.uint32) << 16, 6)
    x = (high + np.tile(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32), 1 << 16)).view(np.float32)
    exe = tw.compile(lambda v: v.astype("bf16"), tw.spec(x.size), target=PAIRS)
    assert "vcvtneps2bf16" in exe.text("asm")
    got, nan = exe(x), np.isnan(x)
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16)
    assert np.array_equal(got.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(got[nan].astype(np.float32)).all() and nan.any()


def test_panels_of_pairs_are_text_and_are_checked() -> None:
    spec = product_spec(4, 20, 6).packed(16, (6, 20), 2)
    assert spec.packed_shape(16) == (2, 3, 16, 2)
    from tensorwright.ir.build import input_node
    from tensorwright.ir.types import TensorType

    a, b = input_node("a", TensorType(bf16, (4, 6))), input_node("b", TensorType(bf16, (2, 3, 16, 2)))
    graph = Graph((a, b), (make("contract_f32", a, b, spec=spec),))
    text = print_graph(graph)
    assert "panel=16; pairs=2" in text and print_graph(parse_graph(text)) == text
    wide = input_node("b", TensorType(f32, (2, 3, 16, 2)))
    with pytest.raises(AttributeValueError, match="pairs are two of 16 bits or four bytes, in panels"):
        make("contract", input_node("a", TensorType(f32, (4, 6))), wide, spec=spec)
    with pytest.raises(AttributeValueError, match="last k axis is a multiple of them"):
        make("contract_f32", a, b, spec=product_spec(4, 20, 5).packed(16, (5, 20), 2))
