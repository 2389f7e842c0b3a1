"""The interpreter: declared dtypes, the f64 oracle, narrow floats, symbols, memory, errors."""

from __future__ import annotations

import weakref

import ml_dtypes
import numpy as np
import pytest
from tensorwright.ir import REGISTRY, Graph, Node, constant, evaluate, full, fused, input_node, make, outputs, run, symbol, tensor
from tensorwright.ir.dtypes import bf16, f32, f64
from tensorwright.ir.errors import DTypeError, InputError, VerifyError
from tensorwright.ir.op import Op
from tensorwright.ir.ops import sample_node
from tensorwright.ir.testing import random_graph

X = input_node("x", tensor("f32", (2, 3)))
DATA = np.arange(6, dtype=np.float32).reshape(2, 3)


def cases():
    for op in REGISTRY.values():
        for k, sample in enumerate(op.samples()):
            yield pytest.param(op, sample, id=f"{op.name}-{sample.label or k}")


@pytest.mark.parametrize(("op", "sample"), list(cases()))
def test_every_sample_has_the_declared_types_in_both_precisions(op: Op, sample):
    graph, arrays = sample_node(op, sample)
    if any(not hasattr(o.type, "shape") for o in graph.outputs):
        graph = Graph(graph.inputs, tuple(part for o in graph.outputs for part in outputs(o)))
    for got, node in zip(run(graph, arrays), graph.outputs, strict=True):
        assert got.dtype == node.dtype.numpy and got.shape == node.shape
    for got, node in zip(run(graph, arrays, dtype=f64), graph.outputs, strict=True):
        assert got.dtype == (f64 if node.dtype.is_float else node.dtype).numpy and got.shape == node.shape


def test_arguments_by_position_and_by_name():
    y = input_node("y", X.tensor)
    g = Graph((X, y), (make("sub", X, y),))
    by_name = run(g, {"y": DATA, "x": 3 * DATA})[0]
    np.testing.assert_array_equal(by_name, run(g, [3 * DATA, DATA])[0])
    np.testing.assert_array_equal(by_name, 2 * DATA)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], "takes 1 inputs"),
        ([DATA, DATA], "takes 1 inputs"),
        ({"z": DATA}, "missing"),
        ({"x": DATA, "z": DATA}, "not an input"),
        ([DATA[0]], "expected 2 dimensions"),
        ([DATA.T], "dimension 0 must be 2"),
        ([DATA.astype(np.float64)], "got an array of f64"),
        ([DATA.astype(complex)], "complex"),
        ([[["a", "b"]]], "got an array of"),
        ([None], "got an array of object"),
    ],
)
def test_wrong_arguments(arrays, message):
    with pytest.raises(InputError, match=message):
        run(Graph((X,), (make("neg", X),)), arrays)


def test_strided_and_foreign_byte_order_arguments_work():
    g = Graph((X,), (make("neg", X),))
    wide = np.zeros((4, 6), np.float32)
    wide[::2, ::2] = DATA
    for given in (wide[::2, ::2], DATA.astype(">f4"), np.asfortranarray(DATA)):
        np.testing.assert_array_equal(run(g, [given])[0], -DATA)


def test_results_are_fresh_arrays():
    c = constant(DATA)
    g = Graph((X,), (X, c, make("transpose", X, perm=(1, 0))))
    data = DATA.copy()
    for result in run(g, [data]):
        assert result.flags.writeable and result.flags.c_contiguous and not np.shares_memory(result, data)
        result[...] = -1
    np.testing.assert_array_equal(data, DATA)
    np.testing.assert_array_equal(run(g, [data])[1], DATA)


def test_the_oracle_computes_in_f64_throughout():
    tenth = full(0.1, X.tensor)
    narrow = make("cast", make("add", X, tenth), dtype=bf16)
    g = Graph((X,), (make("cast", narrow, dtype=f32),))
    exact = run(g, [DATA], dtype=f64)[0]
    np.testing.assert_array_equal(exact, DATA.astype(np.float64) + np.float64(np.float32(0.1)))
    rounded = run(g, [DATA])[0]
    np.testing.assert_array_equal(rounded, (DATA + np.float32(0.1)).astype(ml_dtypes.bfloat16).astype(np.float32))
    third = DATA.astype(np.float64) / 3
    np.testing.assert_array_equal(run(g, [third], dtype=f64)[0], third + np.float64(np.float32(0.1)))
    with pytest.raises(DTypeError):
        run(g, [DATA], dtype=f32)


@pytest.mark.parametrize("name", ["f16", "bf16", "f8e4m3fn", "f8e5m2"])
def test_narrow_floats_are_moved_and_cast(name):
    t = tensor(name, (2, 3))
    x = input_node("x", t)
    values = DATA.astype(t.dtype.numpy)
    moved = make("transpose", make("concat", x, x, axis=0), perm=(1, 0))
    got = run(Graph((x,), (moved, make("cast", x, dtype=f32))), [values])
    assert got[0].dtype == t.dtype.numpy
    np.testing.assert_array_equal(got[0].astype(np.float32), np.concatenate([DATA, DATA]).T)
    np.testing.assert_array_equal(got[1], DATA)


@pytest.mark.parametrize("name", ["i4", "u4"])
def test_four_bit_integers_are_moved_and_cast(name):
    x = input_node("x", tensor(name, (2, 3)))
    values = DATA.astype(np.int8).astype(x.dtype.numpy)
    got = run(Graph((x,), (make("reverse", x, axes=(1,)), make("cast", x, dtype=f32))), [values])
    assert got[0].dtype == x.dtype.numpy
    np.testing.assert_array_equal(got[0].astype(np.int8), DATA.astype(np.int8)[:, ::-1])
    np.testing.assert_array_equal(got[1], DATA)


def test_symbols_are_bound_from_the_arguments():
    n = symbol("N")
    x = input_node("x", tensor("f32", (n, 3)))
    flat = make("reshape", x, shape=(3 * n,))
    g = Graph((x,), (make("concat", flat, flat, axis=0),))
    assert run(g, [DATA])[0].shape == (12,)
    assert run(g, [np.ones((5, 3), np.float32)])[0].shape == (30,)


def test_fused_regions_run_as_their_body():
    p, q = input_node("p0", X.tensor), input_node("p1", X.tensor)
    body = Graph((p, q), (make("mul", p, q), make("cast", make("exp", p), dtype=f32)))
    both = fused(body, [X, make("neg", X)], "map")
    a, b = run(Graph((X,), outputs(both)), [DATA])
    np.testing.assert_array_equal(a, -DATA * DATA)
    np.testing.assert_array_equal(b, np.exp(DATA))
    wide = run(Graph((X,), outputs(both)), [DATA], dtype=f64)
    np.testing.assert_allclose(wide[1], np.exp(DATA.astype(np.float64)), rtol=1e-15)
    direct = both.op.reference([DATA.astype(np.float64), DATA.astype(np.float64)], both.attrs)
    assert direct[0].dtype == np.float64


def test_observe_sees_every_node_once_and_memory_is_freed():
    n = X
    for _ in range(30):
        n = make("neg", n)
    alive: list[weakref.ref] = []
    counts: list[int] = []
    seen: list[Node] = []

    def observe(node, value):
        seen.append(node)
        alive.append(weakref.ref(value))
        counts.append(sum(r() is not None for r in alive))

    run(Graph((X,), (n,)), [DATA], observe=observe)
    assert len(seen) == 30 and max(counts) <= 2


def test_a_reference_that_contradicts_its_type_is_found():
    wrong = Node(REGISTRY["neg"], (X,), {}, tensor("f32", (3, 2)))
    with pytest.raises(VerifyError, match="its value has shape"):
        run(Graph((X,), (wrong,)), [DATA])
    wrong = Node(REGISTRY["neg"], (X,), {}, tensor("i64", (2, 3)))
    with pytest.raises(VerifyError, match="array of f32, its type says i64"):
        run(Graph((X,), (wrong,)), [DATA])
    with pytest.raises(VerifyError, match="not among the inputs"):
        run(Graph((), (make("neg", X),)), [])


def test_evaluate_folds_one_node():
    node = make("add", constant(DATA), constant(DATA))
    np.testing.assert_array_equal(evaluate(node, [DATA, DATA]), 2 * DATA)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_are_the_same_for_a_seed_and_well_conditioned(seed):
    g, arrays = random_graph(np.random.default_rng(seed), 25)
    again, _ = random_graph(np.random.default_rng(seed), 25)
    assert g == again
    for low, high in zip(run(g, arrays), run(g, arrays, dtype=f64), strict=True):
        assert np.isfinite(high).all()
        scale = np.abs(high).max(initial=0.0) or 1.0
        # 25 ops whose condition numbers are below ~100, at 6e-8 each
        assert np.abs(low - high).max(initial=0.0) <= 2e-4 * scale


def test_a_chain_of_50_000_nodes_runs():
    n = X
    for k in range(50_000):
        n = make("neg" if k % 2 else "abs", n)
    np.testing.assert_array_equal(run(Graph((X,), (n,)), [DATA])[0], -DATA)
