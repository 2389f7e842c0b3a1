"""Nodes are their content; graphs are values; nothing recurses."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from tensorwright.ir import Graph, Label, Literal, Location, Node, constant, get, input_node, make, tensor
from tensorwright.ir.errors import AttributeValueError, TensorwrightError, VerifyError
from tensorwright.ir.graph import postorder
from tensorwright.ir.op import REGISTRY, Op, Trait, lookup, register

X = input_node("x", tensor("f32", (2, 3)))
Y = input_node("y", tensor("f32", (2, 3)))


def test_the_same_expression_is_the_same_object():
    assert make("add", X, Y) is make("add", X, Y)
    assert make("add", X, Y) is not make("add", Y, X)
    assert input_node("x", tensor("f32", (2, 3))) is X
    assert input_node("x", tensor("f32", (2, 3)), "parameter") is not X


def test_attributes_that_compare_equal_in_python_do_not_merge():
    assert constant(0.0, "f32") is not constant(-0.0, "f32")
    assert constant(1, "i64") is not constant(True) and constant(1, "i64") is not constant(1.0, "f64")
    assert constant(np.zeros(2, np.float32)) is not constant(np.zeros((1, 2), np.float32))
    op = REGISTRY["constant"]
    nodes = {Node(op, (), {"value": v}, X.type) for v in (0, 0.0, -0.0, False, (0,), (0.0,), (-0.0,), (False,))}
    assert len(nodes) == 8
    nan = float("nan")
    assert Node(op, (), {"value": nan}, X.type) is Node(op, (), {"value": float("nan")}, X.type)


def test_threads_agree_on_one_object():
    barrier = threading.Barrier(4)
    found: list[list[Node]] = [[] for _ in range(4)]

    def work(k: int) -> None:
        barrier.wait()
        for i in range(200):
            found[k].append(make("mul", X, constant(float(i) * np.ones((2, 3)), "f32")))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found[0] == found[1] == found[2] == found[3]


def test_nodes_are_immutable_and_replace_is_exact():
    n = make("add", X, Y)
    with pytest.raises(AttributeError):
        n.inputs = ()
    with pytest.raises(TypeError):
        n.attrs["a"] = 1
    assert n.replace() is n and n.replace((X, Y)) is n
    assert n.replace((Y, X)) is make("add", Y, X)
    r = make("sum", X, axes=(0,))
    assert r.replace(keepdims=True).shape == (1, 3) and r.replace(keepdims=False) is r


def test_a_literal_is_its_content():
    a = np.arange(4, dtype=np.float32)
    one, two = Literal(a), Literal(a.astype(">f4"))
    assert one == two and hash(one) == hash(two) and two.array.dtype == np.float32
    a[0] = 9
    assert one.array[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        one.array[0] = 1
    assert one != Literal(a) and one != Literal(np.arange(4, dtype=np.int32)) and one != 3


def test_make_names_what_is_wrong():
    with pytest.raises(AttributeValueError, match="takes 2 operands, got 1"):
        make("add", X)
    with pytest.raises(AttributeValueError, match=r"no attribute \['axis'\]"):
        make("sum", X, axis=0)
    with pytest.raises(AttributeValueError, match=r"needs the attribute \['axes'\]"):
        make("sum", X)
    with pytest.raises(AttributeValueError, match=r"did you mean: .*transpose"):
        make("transpos", X)
    with pytest.raises(TensorwrightError, match="registered twice"):
        register(REGISTRY["add"])
    assert lookup("add") is REGISTRY["add"]


def test_graphs_are_values():
    n = make("add", X, Y)
    labels = {n: Label("total", Location("net.py", 3))}
    g = Graph((X, Y), (n,), labels=labels)
    assert g == Graph((X, Y), (n,)) and hash(g) == hash(Graph((X, Y), (n,)))
    assert g.output_names == ("y",) and Graph((X,), (X, X)).output_names == ("y0", "y1")
    assert g != Graph((Y, X), (n,)) and g != Graph((X, Y), (n,), name="other") and g != Graph((X, Y), (n,), ("z",))
    assert g.with_outputs([n]) is g and g.location(n) == Location("net.py", 3) and g.location(X) is None
    assert g.nodes() == [X, Y, n] and g.users() == {X: [n], Y: [n], n: []}


def test_map_nodes_keeps_labels_and_identity():
    a, b = make("exp", X), make("neg", X)
    n = make("add", a, b)
    g = Graph((X,), (n,), labels={a: Label("a")})
    assert g.map_nodes(lambda node, inputs: node.replace(inputs)) is g
    changed = g.map_nodes(lambda node, inputs: make("tanh", *inputs) if node is a else node.replace(inputs))
    assert changed.outputs[0] is make("add", make("tanh", X), b)
    assert changed.labels[make("tanh", X)] == Label("a")


def test_a_tuple_is_not_a_tensor():
    from tensorwright.ir import fused

    p = input_node("p0", X.tensor)
    both = fused(Graph((p,), (make("exp", p), make("neg", p))), [X], "map")
    with pytest.raises(VerifyError, match="take one with a get node"):
        _ = both.tensor
    assert get(both, 1).shape == (2, 3)
    with pytest.raises(AttributeValueError, match="index 2"):
        get(both, 2)


def test_a_chain_of_50_000_nodes_is_made_walked_and_freed():
    n = X
    for _ in range(50_000):
        n = make("neg", n)
    g = Graph((X,), (n,))
    assert len(g.nodes()) == 50_001
    assert g.map_nodes(lambda node, inputs: node.replace(inputs)) is g
    assert hash(g) == hash(Graph((X,), (n,)))
    del g, n
    gc.collect()
    assert len(list(postorder([X]))) == 1


def test_every_record_is_complete():
    for op in REGISTRY.values():
        assert isinstance(op, Op) and op.doc and op.name.isidentifier(), op
        assert op.has(Trait.STRUCTURAL) or op.samples is not tuple, f"{op} has no samples"
