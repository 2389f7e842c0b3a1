"""Fusion: what becomes one region, what may not, and that putting the bodies back gives the same graph."""

from __future__ import annotations

import pytest
from tensorwright.ir.build import full, input_node
from tensorwright.ir.dtypes import f32, u8
from tensorwright.ir.graph import Graph, postorder
from tensorwright.ir.graphs import inline
from tensorwright.ir.interp import run
from tensorwright.ir.lowering import Contract, Reduce
from tensorwright.ir.op import make
from tensorwright.ir.ops.structural import FUSED, GET
from tensorwright.ir.types import tensor
from tensorwright.passes.contract_form import ContractForm
from tensorwright.passes.decompose import Decompose
from tensorwright.passes.facts import derived, weights
from tensorwright.passes.fuse import Fuse
from tensorwright.passes.oracle import draw, exact_difference
from tensorwright.passes.partition import Partition
from tensorwright.passes.pipeline import inference


def t(*shape, dtype="f32"):
    return tensor(dtype, shape)


def bc(x, shape):
    return make("broadcast_to", x, shape=shape)


def regions(graph):
    return [n for n in graph.nodes() if n.op is FUSED]


def kinds(graph):
    return sorted(n.attrs["kind"] for n in regions(graph))


def unfused(graph):
    """The graph with every body put back in place."""
    done = {}
    for n in postorder(graph.outputs):
        if n.op is FUSED:
            done[n] = inline(n.attrs["body"], [done[i] for i in n.inputs])
            if len(done[n]) == 1:
                (done[n],) = done[n]
        elif n.op is GET:
            done[n] = done[n.inputs[0]][n.attrs["index"]]
        else:
            done[n] = n.replace(tuple(done[i] for i in n.inputs))
    return [done[o] for o in graph.outputs]


@pytest.mark.parametrize("seed", range(200, 240))
def test_bodies_put_back_give_the_same_graph(seed, random_graph, checked, context):
    before = checked(random_graph(seed, 20), Decompose(), ContractForm())
    ctx = context()
    after = Fuse().run(before, ctx)
    assert unfused(after) == list(before.outputs)
    assert {a.rule for a in ctx.log} <= {f"fuse_{k}" for k in ("map", "rows", "reduce", "contraction")}
    assert len(ctx.log) == len({n.attrs["body"] for n in regions(after)}) or len(ctx.log) >= len(regions(after))
    for n in regions(after):
        assert len(n.attrs["body"].nodes()) <= Fuse().max_nodes * 4


@pytest.mark.parametrize("fuel", range(4))
def test_with_less_fuel_there_are_fewer_regions(fuel, random_graph, context):
    before = Decompose().run(random_graph(3, 20), context())
    ctx = context()
    ctx.fuel = fuel
    after = Fuse().run(before, ctx)
    assert len(regions(after)) <= fuel
    assert unfused(after) == list(before.outputs)


def test_no_region_mixes_weights_and_data(random_graph, context):
    """A region reads either weights alone (it is prepared) or computes nothing from weights alone that is work."""
    for seed in range(30):
        before = Decompose().run(random_graph(seed, 20, roles=("data", "parameter")), context())
        after = Fuse().run(before, context())
        fixed = derived(after.nodes(), weights(after))
        for n in regions(after):
            body = n.attrs["body"]
            inner = derived(body.nodes(), frozenset(p for p, x in zip(body.inputs, n.inputs, strict=True) if x in fixed))
            if n not in fixed:
                work = [
                    m
                    for m, source in inner.items()
                    if source and m.inputs and m.op.name not in ("broadcast_to", "reshape", "slice")
                ]
                assert not work, (seed, work)


def test_linear_layer_is_one_kernel(checked):
    x, w, b = input_node("x", t(4, 8)), input_node("w", t(16, 8), "parameter"), input_node("b", t(16), "parameter")
    r = input_node("r", t(4, 16))
    y = make("add", make("matmul", x, make("transpose", w, perm=(1, 0))), bc(b, (4, 16)))
    y = make("maximum", make("add", make("mul", y, make("sigmoid", y)), r), full(0.0, y.tensor))
    after = checked(Graph((x, w, b, r), (y,)), *inference())
    (region,) = [n for n in regions(after) if n.attrs["kind"] == "contraction"]
    assert after.outputs == (region,)
    assert region.inputs[0] is x


def test_a_value_needed_elsewhere_ends_the_epilogue(checked):
    x, w = input_node("x", t(4, 8)), input_node("w", t(8, 16))
    y = make("matmul", x, w)
    z = make("exp", y)
    after = checked(Graph((x, w), (y, z)), Decompose(), ContractForm(), Fuse())
    assert kinds(after) == []


def test_softmax_is_one_kernel(checked):
    x = input_node("x", t(6, 5))
    m = make("max", x, axes=(1,), keepdims=True)
    e = make("exp", make("sub", x, bc(m, (6, 5))))
    y = make("div", e, bc(make("sum", e, axes=(1,), keepdims=True), (6, 5)))
    after = checked(Graph((x,), (y,)), Fuse())
    assert kinds(after) == ["rows"] and len([n for n in after.nodes() if n.inputs]) == 1


def test_rows_without_keepdims(checked):
    x = input_node("x", t(2, 3, 5))
    s = make("sum", make("mul", x, x), axes=(2,), keepdims=False)
    r = make("rsqrt", make("reshape", s, shape=(2, 3, 1)))
    after = checked(Graph((x,), (make("mul", x, bc(r, x.shape)), s)), Fuse())
    assert kinds(after) == ["rows"] and len(after.nodes()) == 4  # x, the region, two gets


def test_a_reduction_of_a_reduction_over_one_row(checked):
    """The second sum reads the first one back: that is a row of its own kind, not two sums of one pass."""
    x = input_node("x", t(12))
    s = make("sum", x, axes=(0,), keepdims=False)
    y = make("sum", make("exp", bc(make("neg", s), (12,))), axes=(0,), keepdims=False)
    one = input_node("one", t(1))
    z = make("sum", make("sum", one, axes=(0,), keepdims=True), axes=(0,), keepdims=False)
    after = checked(Graph((x, one), (y, z, make("neg", s))), Fuse())
    assert set(kinds(after)) <= {"rows", "map"}


def test_long_rows_are_not_kept_in_cache(checked):
    x = input_node("x", t(2, 64))
    y = make("sub", x, bc(make("max", x, axes=(1,), keepdims=True), x.shape))
    after = checked(Graph((x,), (y,)), Fuse(max_columns=32))
    assert kinds(after) == ["map"]


def test_sibling_reductions_share_a_pass(checked):
    x, y = input_node("x", t(64, 8)), input_node("y", t(64, 8))
    a = make("sum", make("mul", x, y), axes=(0,), keepdims=False)
    b = make("mul", make("sum", x, axes=(0,), keepdims=False), full(0.5, t(8)))
    after = checked(Graph((x, y), (a, b)), Fuse())
    assert kinds(after) == ["reduce"]


def test_dependent_reductions_over_rows_do_not(checked):
    x = input_node("x", t(64, 8))
    m = make("sum", x, axes=(0,), keepdims=True)
    v = make("sum", make("exp", make("sub", x, bc(m, x.shape))), axes=(0,), keepdims=True)
    after = checked(Graph((x,), (v,)), Fuse())
    assert all(sum(isinstance(n.op.lower(n), Reduce) for n in r.attrs["body"].nodes() if n.inputs) <= 1 for r in regions(after))


def test_an_optimiser_update_is_one_kernel(checked):
    p, g, m = (input_node(k, t(32), "state") for k in "pgm")
    new_m = make("add", make("mul", m, full(0.9, m.tensor)), make("mul", g, full(0.1, g.tensor)))
    new_p = make("sub", p, make("mul", new_m, full(1e-3, p.tensor)))
    after = checked(Graph((p, g, m), (new_p, new_m), aliases=((0, 0), (1, 2))), Fuse(prepare=False))
    assert kinds(after) == ["map"] and len(regions(after)) == 1 and after.aliases == ((0, 0), (1, 2))


def test_no_circle_through_another_region(checked):
    """exp(x) is read by the root and, through a product, by the root again: one region would wait for itself."""
    x, w = input_node("x", t(4, 4)), input_node("w", t(4, 4))
    e = make("sqrt", x)
    y = make("add", make("matmul", e, w), make("mul", e, x))
    z = make("mul", make("matmul", y, w), make("exp", e))
    after = checked(Graph((x, w), (z, make("tanh", y))), Decompose(), ContractForm(), Fuse())
    order = {n: k for k, n in enumerate(after.nodes())}
    assert all(order[i] < order[n] for n in order for i in n.inputs)


def test_a_gather_reads_memory_not_the_region(checked):
    x, i = input_node("x", t(6, 4)), input_node("i", t(3, dtype="i64"))
    y = make("exp", make("gather", make("exp", x), i, axis=0))
    after = checked(Graph((x, i), (y,)), Fuse())
    for r in regions(after):
        body = r.attrs["body"]
        for n in body.nodes():
            if n.op.name == "gather":
                assert n.inputs[0] in body.inputs


def test_dear_values_are_computed_once(checked):
    x = input_node("x", t(4, 4))
    e = make("exp", make("sum", x, axes=(0,), keepdims=True))
    y = make("mul", bc(e, (4, 4)), x)
    after = checked(Graph((x,), (y,)), Fuse())
    for r in regions(after):
        if r.attrs["kind"] == "map" and r.tensor.size == 16:
            assert all(n.op.name != "exp" for n in r.attrs["body"].nodes())


def test_cheap_values_of_a_stored_tensor_are_computed_again(checked):
    """x - mean is one subtraction from a tensor that is stored anyway: both readers do it themselves."""
    x, w = input_node("x", t(32, 8)), input_node("w", t(8, 8))
    y = make("matmul", x, w)
    mean = make("mul", make("sum", y, axes=(0,), keepdims=True), full(1 / 32, t(1, 8)))
    d = make("sub", y, bc(mean, y.shape))
    var = make("sum", make("mul", d, d), axes=(0,), keepdims=True)
    after = checked(Graph((x, w), (make("mul", d, bc(make("rsqrt", var), d.shape)),)), ContractForm(), Fuse())
    assert sum(any(n.op.name == "sub" for n in r.attrs["body"].nodes()) for r in regions(after)) == 2


def test_bytes_are_made_where_their_sums_are(checked):
    """Of two products that meet in a sum, the one whose result is rounded to bytes is stored as such, not as what they are made
    of."""
    x, v, w = input_node("x", t(32, 8)), input_node("v", t(8, 8)), input_node("w", t(8, 8))
    octets = make("cast", make("round", make("mul", make("matmul", x, v), full(3.0, t(32, 8)))), dtype=u8)
    y = make("add", make("matmul", x, w), make("cast", octets, dtype=f32))
    after = checked(Graph((x, v, w), (y,)), ContractForm(), Fuse())
    first, last = regions(after)
    assert (first.dtype, last.dtype) == (u8, f32)
    assert "round" in [n.op.name for n in first.attrs["body"].nodes()]


def test_limits(checked):
    x = input_node("x", t(8))
    y = x
    for k in range(20):
        y = make("sin", make("add", y, full(float(k), x.tensor)))
    after = checked(Graph((x,), (y,)), Fuse(max_nodes=10))
    assert len(regions(after)) == 4
    only_rows = checked(Graph((x,), (y,)), Fuse(kinds=("rows",)))
    assert not regions(only_rows)


def test_partition_never_closes_a_circle():
    """Against brute force: on random acyclic graphs, merges that the partition allows leave the groups acyclic."""
    import networkx as nx
    import numpy as np

    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = 14
        users = [{int(j) for j in range(i + 1, n) if rng.random() < 0.2} for i in range(n)]
        p = Partition(users)
        for _ in range(40):
            a, b = (p.group[int(k)] for k in rng.integers(n, size=2))
            merged = {k: (a if p.group[k] in (a, b) else p.group[k]) for k in range(n)}
            groups = nx.DiGraph((merged[i], merged[j]) for i in range(n) for j in users[i] if merged[i] != merged[j])
            allowed = p.can_merge(a, b)
            assert allowed == (a == b or nx.is_directed_acyclic_graph(groups)), (seed, a, b)
            if allowed:
                p.merge(a, b)


def test_values_agree(random_graph, context):
    for seed in range(20):
        graph = Decompose().run(random_graph(seed + 900, 25), context())
        after = Fuse().run(graph, context())
        arrays = draw(graph, "special", seed)
        assert exact_difference(run(graph, arrays), run(after, arrays)) is None


def test_contraction_bodies_hold_one_contraction(random_graph, checked):
    found = 0
    for seed in range(300, 330):
        after = checked(random_graph(seed, 20), *inference())
        for r in regions(after):
            if r.attrs["kind"] == "contraction":
                body = r.attrs["body"]
                assert sum(isinstance(n.op.lower(n), Contract) for n in body.nodes()) == 1
                found += 1
    assert found > 3
