"""Arithmetic on 16-bit floats: computed in f32, rounded once per op, as the interpreter says, on every row of targets."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tensorwright.ir import dtypes as d
from tensorwright.ir.build import input_node
from tensorwright.ir.dtypes import DType, as_dtype
from tensorwright.ir.errors import DTypeError
from tensorwright.ir.expr import postorder
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.interp import run as interpret
from tensorwright.ir.op import REGISTRY, Op, Sample, Trait, make
from tensorwright.ir.types import TensorType, TupleType, tensor
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.facts import Facts
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.validate import Validator
from tensorwright.passes.widen import Widen, rounds
from tensorwright.runtime import host as machine

from .helpers import host_rows
from .programs import Array, compiled, decomposed

X86 = [r for r in host_rows() if r.startswith("x86")] or host_rows()
HALVES = (d.bf16, d.f16)
# What makes its own numbers has a dtype of its own; all other ops take 16-bit floats wherever they take f32.
REFUSE = {op.name for op in REGISTRY.values() if op.has(Trait.RANDOM)}
MADE = (
    "attention",
    "round_tf32",
    "contract_tf32",
    "attention_grad",
    "attention_f32",
    "attention_grad_f32",
    "depthwise",
    "coded_matmul",
    "codebook_matmul",
    "dequantize_codebook",
    "multiply_add",
    "sparse_matmul",
    "sparse_conv2d",
)  # by passes, tw.prune and traces for CUDA, in f32 (the last also f64)
REFUSE |= {*MADE, *(f"winograd_{p}" for p in ("weight", "input", "output", "spread", "gather"))}
OPS = [op for op in REGISTRY.values() if not op.has(Trait.STRUCTURAL) and not op.has(Trait.CONTROL) and op.name not in REFUSE]
_WORDS = "var const load add sub mul div neg abs sqrt floor ceil round trunc max min select lt le eq ne and or xor not cast fma"
ROUNDED = frozenset(_WORDS.split())  # what IEEE 754 rounds rightly: no choice is left to an implementation

Case = tuple[Op, Sample, list[Array], list[Node], Node, Array]


def narrowed(values: Array, dtype: DType) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(dtype.numpy) if values.dtype == np.float32 else values


@functools.cache
def cases(dtype: DType) -> tuple[Case, ...]:
    """Samples of all ops that have f32 operands, in `dtype`: of each op a few, and those with special values."""
    found = []
    for op in OPS:
        samples = list(op.samples())
        step = max(1, len(samples) // 3)
        some = [s for j, s in enumerate(samples) if j % step == 0 or s.label == "special"]
        for k, s in enumerate(some):
            arrays = [np.asarray(x) for x in s.make(np.random.default_rng(k))]
            if not any(a.dtype == np.float32 for a in arrays):
                continue
            arrays = [narrowed(a, dtype) for a in arrays]
            nodes = [input_node(f"{op.name}{k}_{j}", TensorType(as_dtype(x.dtype), x.shape)) for j, x in enumerate(arrays)]
            node = make(op, *nodes, **s.attrs)
            if isinstance(node.type, TupleType):
                continue
            found.append((op, s, arrays, nodes, node, interpret(Graph(tuple(nodes), (node,)), arrays)[0]))
    return tuple(found)


def together(some: tuple[Case, ...]) -> tuple[Graph, list[Array]]:
    """Samples as one graph, widened: one compilation."""
    nodes = [n for _, _, _, its, _, _ in some for n in its]
    outputs = tuple(c[4] for c in some)
    graph = Graph(tuple(nodes), outputs, tuple(f"y{k}" for k in range(len(outputs))))
    return decomposed(Widen().run(graph, Context())), [a for _, _, its, _, _, _ in some for a in its]


def ulps(dtype: DType, values: Array) -> Array:
    """A unit in the last place of each value."""
    digits, least = (8, -133) if dtype is d.bf16 else (11, -24)
    exponent = np.frexp(np.maximum(np.abs(values), 1e-300))[1]
    return np.ldexp(1.0, np.maximum(exponent - digits, least))


def exact(node: Node) -> bool:
    """Whether IEEE 754 leaves no choice: elementwise, of operations that are rounded rightly."""
    scalar = Facts().scalar(node)
    return scalar is not None and all(e.op in ROUNDED for e in postorder([scalar]))


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_op_computes_in_f32_and_rounds_once(dtype: DType, target: str) -> None:
    """Where IEEE 754 decides, every value is the reference's. A sum in another order, or our exp, may be an ulp of f32 or so
    from it, which moves the result by at most one unit in the last place of 16 bits."""
    everything = cases(dtype)
    checked = 0
    for start in range(0, len(everything), 40):
        some = everything[start : start + 40]
        graph, arrays = together(some)
        for (op, s, _, _, node, expected), got in zip(some, compiled(graph, target)(arrays, 1), strict=True):
            what = f"{op.name} {s.label} {dict(s.attrs)} on {target}"
            assert got.dtype == expected.dtype, what
            checked += 1
            a, b = got.astype(np.float64), expected.astype(np.float64)
            if not node.dtype.is_float:
                assert np.array_equal(got, expected), what
                continue
            special = ~np.isfinite(b)
            if exact(node):
                assert np.array_equal(a, b, equal_nan=True), what
                continue
            at_edge = np.isinf(b) & (np.abs(a) == float(ml_dtypes.finfo(node.dtype.numpy).max))  # rounded down, not up to Inf
            assert np.array_equal(a[special & ~at_edge], b[special & ~at_edge], equal_nan=True), what
            scale = np.abs(b[~special]).max(initial=0.0)
            assert (np.abs(a[~special] - b[~special]) <= ulps(node.dtype, b[~special]) + s.budget * scale).all(), what
    assert checked > 150


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_values_of_16_bits_pass_through_arithmetic(dtype: DType, target: str) -> None:
    """x + 0, x * 1.5 and x - x/3 over every bit pattern: subnormals, both zeros, infinities, NaN stays NaN."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype.numpy)
    node = input_node("x", tensor(dtype.name, (1 << 16,)))

    def full(value: float) -> Node:
        return make("broadcast_to", make("constant", value=_literal(value, dtype)), shape=(1 << 16,))

    third = make("div", node, full(3.0))
    outputs = (
        make("add", node, full(0.0)),
        make("mul", node, full(1.5)),
        make("sub", node, third),
        make("sqrt", make("abs", node)),
    )
    graph = Graph((node,), outputs)
    target_row = next(r for r in [machine.resolve(target)])
    after = run_pipeline(graph, pipeline.inference(target_row), Context(target=target_row), Hooks(validate=Validator()))
    assert not any(rounds(n, Facts()) for n in Widen().run(graph, Context()).nodes())
    for got, want in zip(compiled(after, target)([x], 1), interpret(graph, [x]), strict=True):
        nan = np.isnan(want.astype(np.float32))
        assert np.isnan(got.astype(np.float32))[nan].all()
        assert np.array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


def _literal(value: float, dtype: DType) -> Any:
    from tensorwright.ir.graph import Literal

    return Literal(value, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fusing_changes_no_bits(dtype: DType) -> None:
    """A chain with reductions and a softmax: every op rounds, whether it is a kernel of its own or part of one."""
    x, y = (input_node(n, tensor(dtype.name, (9, 33))) for n in "xy")
    a = make("add", make("mul", x, y), make("exp", x))
    total = make("sum", a, axes=(1,), keepdims=True)
    b = make("div", a, make("broadcast_to", total, shape=(9, 33)))
    graph = Graph((x, y), (make("sub", b, y), make("max", b, axes=(0,), keepdims=False)))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((9, 33)).astype(dtype.numpy) for _ in range(2)]
    target = machine.resolve(X86[-1])
    passes = pipeline.inference(target)
    fused = run_pipeline(graph, passes, Context(target=target), Hooks(validate=Validator()))
    apart = run_pipeline(graph, passes[:-1], Context(target=target), Hooks())
    assert len(fused.nodes()) < len(apart.nodes())
    for p, q in zip(compiled(fused, X86[-1])(arrays, 1), compiled(apart, X86[-1])(arrays, 1), strict=True):
        assert p.tobytes() == q.tobytes()


def test_a_sum_is_kept_in_f32() -> None:
    """4,096 times 1.0 in bf16 would stop at 256, and in f16 lose its tail."""
    for dtype in HALVES:
        x = input_node("x", tensor(dtype.name, (4096,)))
        graph = Graph((x,), (make("sum", x, axes=(0,), keepdims=False),))
        ones = np.ones(4096, dtype.numpy)
        assert float(interpret(graph, [ones])[0]) == 4096
        assert float(compiled(decomposed(Widen().run(graph, Context())))([ones], 1)[0]) == 4096


def test_narrower_types_are_still_stored_and_cast_only() -> None:
    for dtype in (d.f8e4m3fn, d.f8e5m2):
        with pytest.raises(DTypeError, match="expected f32, f64, f16, bf16 or an integer"):
            make("add", *(input_node(n, tensor(dtype.name, (3,))) for n in "ab"))
    with pytest.raises(DTypeError, match="expected f32, f64, f16 or bf16"):
        make("exp", input_node("x", tensor("f8e5m2", (3,))))


def test_widen_touches_nothing_else() -> None:
    x, h = input_node("x", tensor("f32", (4, 5))), input_node("h", tensor("bf16", (4, 5)))
    graph = Graph(
        (x, h),
        (
            make("exp", x),
            make("transpose", h, perm=(1, 0)),
            make("cast", h, dtype=d.f32),
            make("matmul", h, make("transpose", h, perm=(1, 0))),
        ),
    )
    assert Widen().run(graph, Context()) is graph
    ctx = Context(fuel=1)
    two = Graph((h,), (make("exp", make("tanh", h)),))
    assert sum(n.op.name == "cast" for n in Widen().run(two, ctx).nodes()) == 2 and len(ctx.log) == 1
