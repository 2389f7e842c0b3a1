"""Graph text that lies, is cut off, or is meant to harm: a ParseError with line and column, soon and in little memory."""

from __future__ import annotations

import re
import time
import tracemalloc

import numpy as np
import pytest
from tensorwright.ir import REGISTRY, Graph, Literal, constant, fused, input_node, make, outputs, parse_graph, print_graph, tensor
from tensorwright.ir.errors import ParseError, TensorwrightError, VerifyError
from tensorwright.ir.ops import sample_node
from tensorwright.ir.testing import random_graph

HEAD = "graph @g(%a: f32[2] data) -> (y: f32[2]) {\n"


def body(line: str) -> str:
    return HEAD + f"  %0 = {line}\n  return %0\n}}"


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", (1, 1), "expected 'graph'"),
        ("graph main() -> () { return }", (1, 7), "graph name"),
        ("graph @g(%a: f32[2] data, %a: f32[2] data) -> () { return }", (1, 27), "two inputs are named 'a'"),
        ("graph @g(%0: f32[2] data) -> () { return }", (1, 10), "an input has a name"),
        ("graph @g(%a: f32[2]) -> () { return }", (1, 20), "a role"),
        ("graph @g(%a: f32[2] magic) -> () { return }", (1, 10), "unknown role 'magic'"),
        ("graph @g(%a: float[2] data) -> () { return }", (1, 14), "unknown dtype 'float'"),
        ("graph @g(%a: f32[-2] data) -> () { return }", (1, 14), "negative"),
        ("graph @g(%a: f32[2.5] data) -> () { return }", (1, 18), "expected a dimension"),
        ("graph @g(%a: f32[99999999999999999999] data) -> () { return }", (1, 14), "a type of"),
        ("graph @g(%a: f32[4000000000, 4000000000] data) -> () { return }", (1, 14), "a type of"),
        ("graph @g() -> (y: f32[], y: f32[]) { return }", (1, 26), "two outputs"),
        ("graph @g() -> (y: f32[]) { return }", (1, 28), "declares 1 outputs and returns 0"),
        (HEAD + "  return %a, %a\n}", (2, 3), "declares 1 outputs and returns 2"),
        (HEAD.replace("y: f32[2]", "y: f32[3]") + "  return %a\n}", (2, 3), "declared f32[3]"),
        (HEAD + "  return %b\n}", (2, 10), "not defined above"),
        (HEAD + "  return %a\n", (3, 1), "expected '}', found the end"),
        (HEAD + "  return %a\n} }", (3, 3), "expected the end"),
        (HEAD.replace(" {", " aliases(1: 0) {") + "  return %a\n}", (1, 7), "not there"),
        (HEAD.replace(" {", " aliases(0: 0, 0: 0) {") + "  return %a\n}", (1, 56), "repeats"),
        (body("sub(%a, %b) : f32[2]"), (2, 16), "value %b is not defined"),
        (body("sub(%a, %0) : f32[2]"), (2, 16), "value %0 is not defined"),
        (HEAD + "  %a = neg(%a) : f32[2]\n return %a }", (2, 3), "defined twice"),
        (body("mystery(%a) : f32[2]"), (2, 3), "there is no op 'mystery'"),
        (body("neg(%a, %a) : f32[2]"), (2, 3), "takes 1 operands"),
        (body("neg(%a) : f32[3]"), (2, 18), "gives f32[2] here, the text declares f32[3]"),
        (body("neg(%a) : (f32[2])"), (2, 18), "declares (f32[2])"),
        (body("neg(%a) {x = 1} : f32[2]"), (2, 3), "has no attribute ['x']"),
        (body("sum(%a) {axes = (0,), axes = (0,)} : f32[]"), (2, 30), "given twice"),
        (body("sum(%a) {axes = (5,)} : f32[]"), (2, 3), "axes"),
        (body("sum(%a) {axes = \"abc\"} : f32[]"), (2, 3), "axes"),
        (body("sum(%a) {axes = (0.5,)} : f32[]"), (2, 3), "axes"),
        (body("sum(%a) {axes = -(0,)} : f32[]"), (2, 25), "'-' is for numbers"),
        (body("sum(%a) {axes = (0,) + 1} : f32[]"), (2, 29), "'+' is for dimensions"),
        (body("sum(%a) {axes = true * 2} : f32[]"), (2, 29), "'*' is for dimensions"),
        (body("sum(%a) {axes = N // 0} : f32[]"), (2, 26), "divided by zero"),
        (body("sum(%a) {axes = } : f32[]"), (2, 24), "expected a value"),
        (body('sum(%a) {axes = "\\q"} : f32[]'), (2, 24), "malformed string"),
        (body("sum(%a) {axes = 123456789012345678901234567890} : f32[]"), (2, 24), "too large"),
        (body("constant() {value = f32[3](1.0, 2.0)} : f32[3]"), (2, 35), "3 elements, 2 are given"),
        (body("constant() {value = f32[2](1.0, x)} : f32[2]"), (2, 35), "is a number, not x"),
        (body("constant() {value = i8[1](300)} : i8[1]"), (2, 34), "outside the range of i8"),
        (body("constant() {value = i8[1](1.5)} : i8[1]"), (2, 34), "is an integer"),
        (body("constant() {value = bool[1](1)} : bool[1]"), (2, 36), "true or false"),
        (body("constant() {value = f32[2](0xff)} : f32[2]"), (2, 35), "takes 8 bytes, 1 are given"),
        (body("constant() {value = f32[2](0xf)} : f32[2]"), (2, 35), "malformed bytes"),
        (body("constant() {value = f32[2](@sha256:" + "0" * 64 + ")} : f32[2]"), (2, 35), "neither in the text"),
        (body("constant() {value = f32[N](1.0)} : f32[2]"), (2, 28), "made of numbers"),
        (body("constant() {value = 3} : f32[2]"), (2, 3), "Literal"),
        (body("get(%a) {index = 0} : f32[2]"), (2, 3), "has one output"),
        (body("fused(%a) {kind = \"map\", body = 3} : f32[2]"), (2, 3), "the body is a Graph"),
        (body("contract(%a, %a) {spec = contraction(m=2:m, m=2:m; A[m], B[], C[m])} : f32[2]"), (2, 52), "names distinct"),
        (body("contract(%a, %a) {spec = contraction(m=2:q; A[m], B[], C[m])} : f32[2]"), (2, 45), "kinds are"),
        (body("contract(%a, %a) {spec = contraction(m=2:m; A[z], B[], C[m])} : f32[2]"), (2, 54), "no axis 'z'"),
        (body("neg(%a) : f32[2] $"), (2, 25), "unexpected character"),
        (body('neg(%a) : "'), (2, 18), "unexpected character"),
    ],
)  # fmt: skip
def test_the_error_says_what_and_where(text, where, message):
    with pytest.raises(ParseError) as caught:
        parse_graph(text)
    said = str(caught.value)
    assert said.startswith(f"line {where[0]}, column {where[1]}: "), said
    assert message in said


def test_constants_are_checked_against_their_digest():
    array = np.arange(20, dtype=np.float32)
    text = print_graph(Graph((), (constant(array),)), constants=True)
    digest = Literal(array).digest
    bare = text[: text.index("constants {")]
    for given in (array + 1, array.astype(np.float64), array[:3], "text", None, np.array(["a"])):
        with pytest.raises(ParseError, match="line 2, column"):
            parse_graph(bare, {digest: given})
    with pytest.raises(ParseError, match="does not have this digest"):
        parse_graph(text.replace('"AAAA', '"BAAA'))
    with pytest.raises(ParseError, match="takes 80 bytes"):
        parse_graph(text.replace('"AAAAAAAA', '"'))
    with pytest.raises(ParseError, match="not base64"):
        parse_graph(text.replace('"AAAA', '"@@@@'))
    with pytest.raises(ParseError, match="takes 4000000000000 bytes"):
        parse_graph(text.replace("} = f32[20]", "}").replace(' = f32[20] "', ' = f32[1000000000000] "'))
    with pytest.raises(ParseError, match="the text declares f32"):
        parse_graph(bare.replace("f32[20](", "f32[2, 10]("), {digest: array})


def deep_bodies(levels: int) -> str:
    start = 'graph @g(%a: f32[2] data) -> (y: f32[2]) { %0 = fused(%a) {kind = "map", body = '
    return start * levels + "graph @g(%a: f32[2] data) -> (y: f32[2]) { return %a }" + "} : f32[2] return %0 }" * levels


@pytest.mark.parametrize(
    "text",
    [
        body("sum(%a) {axes = " + "(" * 20_000 + ")" * 20_000 + "} : f32[]"),
        body("sum(%a) {axes = " + "-" * 20_000 + "} : f32[]"),
        body("sum(%a) {axes = " + "-" * 20_000 + "(0,)} : f32[]"),
        body("sum(%a) {axes = N" + "*N" * 20_000 + "} : f32[]"),
        body("sum(%a) {axes = N" + " // 2" * 20_000 + "} : f32[]"),
        body("sum(%a) {axes = " + "*".join(["(a + b + c + d + e + f + g + h)"] * 1000) + "} : f32[]"),
        body("sum(%a) {axes = (" + "0, " * 40_000 + ")} : f32[]"),
        body("neg(" + "%a, " * 20_000 + ") : f32[2]"),
        body("neg(%a) : f32[" + "1, " * 20_000 + "]"),
        body("neg(%a) : (" + "f32[1], " * 20_000 + ")"),
        body("constant() {value = f32[1000000000000]()} : f32[1000000000000]"),
        body("iota() {shape = (1000000000000,), axis = 0, dtype = f32} : f32[3]"),
        body("one_hot(%a) {depth = 1000000000000} : f32[3]"),
        body('constant() {value = "' + "\\u0041" * 20_000 + '"} : f32[]'),
        body("sum(%a) {axes = " + "9" * 1_000_000 + "} : f32[]"),
        body("sum(%a) {axes = 1." + "9" * 1_000_000 + "e99} : f32[]"),
        "#" * 1_000_000,
        " " * 1_000_000,
        "graph @g(" + "%a" * 20_000,
        "graph " * 20_000,
        deep_bodies(17),
        deep_bodies(3000),
        "constants {\n" * 100_000,
        HEAD + "return %a }\n" + "constants {\n" * 100_000,
        "\x00", "\ud800", "graph @g() -> () { return } \x00",
    ],
    ids=lambda t: f"{t[:24]!r}...{len(t)}",
)  # fmt: skip
def test_text_made_to_harm_is_refused_soon_and_in_little_memory(text):
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ParseError):
            parse_graph(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 10
    assert peak < 20_000_000 + 200 * len(text)


def test_nesting_that_is_allowed_reads_back():
    graph = parse_graph(deep_bodies(16))
    assert parse_graph(str(graph)) == graph


def seeds() -> list[str]:
    x = input_node("x", tensor("f32", (4, 3)))
    p = input_node("p0", x.tensor)
    inner = Graph((p,), (make("exp", p), make("sum", p, axes=(1,))))
    g = Graph((x,), outputs(fused(inner, [x], "rows")), aliases=((0, 0),))
    texts = [print_graph(g), print_graph(random_graph(np.random.default_rng(3), 12)[0], constants=True)]
    for name in ("contract", "conv2d", "pad", "one_hot"):
        sample = next(iter(REGISTRY[name].samples()))
        texts.append(print_graph(sample_node(REGISTRY[name], sample)[0], constants=True))
    texts.append(print_graph(Graph((), (constant(np.arange(20)), constant(np.arange(3, dtype=np.float16)))), constants=True))
    return texts


INSTEAD_OF_A_NUMBER = ["0", "1", "-1", "7", "18446744073709551615", "4611686018427387904", "2.5", "N", "true", "()", '"s"']


def mutated(text: str, rng: np.random.Generator, words: list[str]) -> str:
    match int(rng.integers(6)):
        case 0:
            return text[: int(rng.integers(len(text)))]
        case 1:
            at = int(rng.integers(len(text)))
            return text[:at] + chr(int(rng.integers(32, 127))) + text[at + 1 :]
        case 2:
            a, b = sorted(int(v) for v in rng.integers(0, len(text), 2))
            return text[:a] + text[min(b, a + 30) :]
        case 3:
            numbers = list(re.finditer(r"\d+", text)) or list(re.finditer("$", text))
            m = numbers[int(rng.integers(len(numbers)))]
            return text[: m.start()] + str(rng.choice(INSTEAD_OF_A_NUMBER)) + text[m.end() :]
        case 4:
            tokens = list(re.finditer(r"\w+|[^\w\s]|$", text))
            m = tokens[int(rng.integers(len(tokens)))]
            return text[: m.start()] + words[int(rng.integers(len(words)))] + text[m.end() :]
        case _:
            lines = text.split("\n")
            i, j = (int(v) for v in rng.integers(0, len(lines), 2))
            lines[i], lines[j] = lines[j], lines[i]
            return "\n".join(lines)


@pytest.mark.parametrize("which", range(7))
def test_mutated_text_gives_a_graph_or_our_error(which):
    texts = seeds()
    rng = np.random.default_rng(which)
    words = sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]", t) if len(w) < 30})
    graphs = errors = 0
    for _ in range(150):
        text = texts[which]
        for _ in range(int(rng.integers(1, 4))):
            text = mutated(text, rng, words) or " "
        try:
            graph = parse_graph(text)
        except ParseError as e:
            assert re.match(r"line \d+, column \d+: ", str(e)), e
            errors += 1
        else:
            graphs += 1
            try:
                assert parse_graph(print_graph(graph, constants=True)) == graph
            except TensorwrightError as e:
                pytest.fail(f"{e} for what parsed from\n{text}")
    assert errors > 50, "mutations should mostly break the text"


def test_the_cap_on_tokens_fires(monkeypatch):
    from tensorwright.ir import textparse

    monkeypatch.setattr(textparse, "MAX_TOKENS", 20)
    with pytest.raises(ParseError, match="more than 20 tokens"):
        parse_graph(body("neg(%a) : f32[2]"))


def test_bodies_nested_deeper_than_the_reader_takes_do_not_print():
    p = input_node("p0", tensor("f32", (2,)))
    graph = Graph((p,), (make("exp", p),))
    for _ in range(17):
        graph = Graph((p,), (fused(graph, [p], "map"),))
    with pytest.raises(VerifyError, match="nested deeper than 16"):
        print_graph(graph)
