"""The text form: golden prints, and everything that prints reads back to the same objects."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tensorwright.ir import (
    REGISTRY,
    Affine,
    Axis,
    Contraction,
    Graph,
    Label,
    Literal,
    Location,
    Node,
    affine,
    constant,
    fused,
    input_node,
    make,
    outputs,
    parse_graph,
    print_graph,
    symbol,
    tensor,
)
from tensorwright.ir.dtypes import ALL, f32
from tensorwright.ir.errors import VerifyError
from tensorwright.ir.ops import sample_node
from tensorwright.ir.testing import random_graph
from tensorwright.ir.text import format_attribute

N = symbol("N")


def reads_back(graph: Graph) -> str:
    text = print_graph(graph, constants=True)
    again = parse_graph(text)
    assert again == graph and again.fingerprint() == graph.fingerprint()
    assert all(a is b for a, b in zip(again.outputs, graph.outputs, strict=True))
    assert print_graph(again, labels=False, constants=True) == print_graph(graph, labels=False, constants=True)
    return text


def attribute_reads_back(value: object) -> str:
    """Through a node that has any attributes at all: the parser makes `constant`, whose infer we do not reach."""
    from tensorwright.ir.textparse import _Parser

    text = format_attribute(value)
    parser = _Parser(text, 0, len(text), {})
    again = parser.attribute(0, 0)
    assert parser.kind == "end", text
    op = REGISTRY["constant"]
    type_ = tensor("f32", ())
    assert Node(op, (), {"value": again}, type_) is Node(op, (), {"value": value}, type_), f"{text} read as {again!r}"
    return text


def test_golden():
    x = input_node("x", tensor("f32", (N, 784)))
    w = input_node("layer.weight", tensor("f32", (128, 784)), "parameter")
    t = make("transpose", w, perm=(1, 0))
    y = make("maximum", make("matmul", x, t), make("broadcast_to", constant(0.0, "f32"), shape=(N, 128)))
    labels = {t: Label("layer", Location("net.py", 12, "x @ w.T")), y: Label(None, Location("net.py", 13))}
    g = Graph((x, w), (y,), ("logits",), "net", labels=labels)
    text = """\
graph @net(%x: f32[N, 784] data, %layer.weight: f32[128, 784] parameter) -> (logits: f32[N, 128]) {
  %0 = transpose(%layer.weight) {perm = (1, 0)} : f32[784, 128]  # layer net.py:12: x @ w.T
  %1 = matmul(%x, %0) : f32[N, 128]
  %2 = constant() {value = f32[](0.0)} : f32[]
  %3 = broadcast_to(%2) {shape = (N, 128)} : f32[N, 128]
  %4 = maximum(%1, %3) : f32[N, 128]  # net.py:13
  return %4
}
"""
    assert str(g) == text
    assert Graph.parse(text) == g
    reads_back(g)


def test_golden_fused_tuple_and_alias():
    p = input_node("p0", tensor("f32", (4,)))
    body = Graph((p,), (make("exp", p), make("sum", p, axes=(0,))), name="body")
    x = input_node("x", tensor("f32", (4,)), "state")
    a, b = outputs(fused(body, [x], "rows"))
    g = Graph((x,), (b, a), ("total", "x"), aliases=((1, 0),))
    text = """\
graph @main(%x: f32[4] state) -> (total: f32[], x: f32[4]) aliases(1: 0) {
  %0 = fused(%x) {kind = "rows", body = graph @body(%p0: f32[4] data) -> (y0: f32[4], y1: f32[]) {
    %0 = exp(%p0) : f32[4]
    %1 = sum(%p0) {axes = (0,), keepdims = false} : f32[]
    return %0, %1
  }} : (f32[4], f32[])
  %1 = get(%0) {index = 1} : f32[]
  %2 = get(%0) {index = 0} : f32[4]
  return %1, %2
}
"""
    assert str(g) == text
    reads_back(g)


def test_long_signatures_take_a_line_for_each_input():
    inputs = tuple(input_node(f"block{k}.weight", tensor("f32", (64, 64)), "parameter") for k in range(6))
    g = Graph(inputs, (inputs[0],), labels={inputs[1]: Label(location=Location("a.py", 1))})
    text = reads_back(g)
    assert "\n    %block1.weight: f32[64, 64] parameter,\n" in print_graph(g, labels=False, constants=True)
    assert "\n    %block1.weight: f32[64, 64] parameter,  # a.py:1\n" in text


@pytest.mark.parametrize("op", list(REGISTRY.values()), ids=lambda op: op.name)
def test_every_sample_of_every_op_reads_back(op):
    for sample in op.samples():
        graph, _ = sample_node(op, sample)
        node = graph.outputs[0]
        reads_back(Graph(graph.inputs, outputs(node)))


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_read_back(seed):
    graph, _ = random_graph(np.random.default_rng(seed), 30)
    reads_back(graph)


@pytest.mark.parametrize(
    "value",
    [
        0, -1, 2**63 - 1, -(2**63), 0.0, -0.0, 0.1, 1e300, 5e-324, 1e16, float("inf"), float("-inf"), float("nan"),
        True, False, None, "", "plain", 'quo"te', "back\\slash", "new\nline", "ünïcode ✓", "\x00\ud800", "# no comment",
        (), (1,), (1, 2), ((), ((1.0,),)), (True, None, "a", 1.5), f32, (f32, ALL[-1]),
        N, 2 * N + 3, -N, (N + 3) // 2, ((N + 3) // 2) * N - 7, N % 3, (N, 784), (N // 2,),
        symbol("graph"), symbol("contraction") + 1, (symbol("graph"), symbol("graph") % 2), np.int64(3),
    ],
    ids=repr,
)  # fmt: skip
def test_attribute_values_read_back(value):
    attribute_reads_back(value)


@pytest.mark.parametrize("dtype", ALL, ids=repr)
def test_literals_read_back_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    for count in (0, 1, 5, 16, 17, 40):
        if dtype.kind == "bool":
            array = rng.integers(0, 2, count).astype(bool)
        elif dtype.bits < 8:
            array = rng.integers(-8 if dtype.kind == "int" else 0, 8, count).astype(np.int8).astype(dtype.numpy)
        else:
            raw = rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8)  # any bits: NaNs with payloads, denormals
            array = raw.view(dtype.numpy)
        g = Graph((), (constant(array),))
        reads_back(g)
        digest = Literal(array).digest
        assert parse_graph(str(g), {digest: array}) == g
        for shape in ((1, count), (count, 1, 1)):
            reads_back(Graph((), (constant(array.reshape(shape)),)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_special_floats_are_legible(dtype):
    text = reads_back(Graph((), (constant(np.array([0.1, -0.0, np.inf, -np.inf, np.nan], dtype)),)))
    assert "-0.0, inf, -inf, nan)" in text
    assert "-nan" in reads_back(Graph((), (constant(np.copysign(np.array([np.nan], dtype), dtype(-1))),)))


def test_shortest_floats_are_exact():
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    for row in raw.reshape(-1, 16):
        reads_back(Graph((), (constant(row),)))
    assert "f32[](0.1)" in str(Graph((), (constant(0.1, "f32"),)))


def conv_spec(**more: object) -> Contraction:
    axes = (
        Axis("n", 1, "batch"), Axis("y", N, "m"), Axis("out channel", 64, "n"), Axis("h", 3, "k"), Axis("c", 8, "k"),
    )  # fmt: skip
    return Contraction(
        axes,
        (affine("n"), affine(("y", 2), ("h", -1), constant=2), affine("c")),
        (affine("out channel"), affine(("h", -3), constant=-4), affine(("c", 0))),
        (affine("n"), affine("y", "y"), Affine((), 0), Affine((), -5)),
        **more,
    )


def test_contractions_read_back():
    text = attribute_reads_back(conv_spec())
    assert text == (
        'contraction(n=1:batch, y=N:m, "out channel"=64:n, h=3:k, c=8:k; '
        'A[n, 2*y - h + 2, c], B["out channel", -3*h - 4, 0*c], C[n, y + y, 0, -5])'
    )
    packed = attribute_reads_back(conv_spec(panel=32, b_shape=(64, (N + 1) // 2, 8)))
    assert packed.endswith("; panel=32; b_shape=(64, ((N + 1) // 2), 8))")
    attribute_reads_back(Contraction((), (), (), ()))


def test_odd_names_are_quoted():
    odd = ["0", "a b", 'quo"te', "päram", "x\ny", "%0", "graph", "return", "a-b", "0x1"]
    inputs = tuple(input_node(n, tensor("f32", (k,))) for k, n in enumerate(odd))
    g = Graph(inputs, inputs, tuple(f"{n}!" for n in odd), "odd name {")
    text = reads_back(g)
    assert "%graph: f32[6]" in text and '%"0": f32[0]' in text and '@"odd name {"' in text


def test_labels_cannot_break_a_line():
    x = input_node("x", tensor("f32", ()))
    n = make("neg", x)
    g = Graph((x,), (n,), labels={n: Label("two\nlines\u2028", Location("weird\nfile", 3, "} # \x00"))})
    assert Graph.parse(str(g)) == g and str(g).count("\n") == 4


def test_undeclared_inputs_print_and_read_back_for_diagnosis():
    g = Graph((), (make("neg", input_node("x", tensor("f32", (2,)))),))
    assert "%0 = input()" in reads_back(g)


def test_empty_graph():
    reads_back(Graph((), ()))


def test_what_is_no_attribute_cannot_be_printed():
    for value in ({}, [1], object(), np.zeros(2), 1j):
        with pytest.raises(VerifyError, match="cannot be the value"):
            format_attribute(value)


def test_comments_and_line_breaks_are_free():
    text = """
      # a comment
      graph @g ( %a : f32[2]   data , # another
      ) -> ( y : f32[2] , ) { %7=neg(%a):f32[2] %"third one" = add(%7, %7,) { } : f32[2]
      return %"third one" }  # the end"""
    g = parse_graph(text)
    a = input_node("a", tensor("f32", (2,)))
    assert g.outputs == (make("add", make("neg", a), make("neg", a)),)


def test_omitted_attributes_take_their_defaults():
    g = parse_graph("graph @g(%a: f32[2] data) -> (y: f32[]) { %0 = sum(%a) {axes = (0,)} : f32[] return %0 }")
    assert g.outputs[0].attrs["keepdims"] is False


def test_fingerprint_sees_content_not_labels():
    x = input_node("x", tensor("f32", (2,)))
    n = make("neg", x)
    plain = Graph((x,), (n,))
    assert plain.fingerprint() == Graph((x,), (n,), labels={n: Label("name")}).fingerprint()
    assert plain.fingerprint() != Graph((x,), (make("abs", x),)).fingerprint()
    big = np.arange(100, dtype=np.float32)
    assert Graph((), (constant(big),)).fingerprint() != Graph((), (constant(big + 1),)).fingerprint()


def test_a_chain_of_50_000_nodes_reads_back():
    n = input_node("x", tensor("f32", (2,)))
    g_in = n
    for k in range(50_000):
        n = make("neg" if k % 2 else "exp", n)
    g = Graph((g_in,), (n,))
    assert parse_graph(str(g)) == g
