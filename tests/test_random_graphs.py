"""Random graphs through the whole compiler: interpreter, passes, loop interpreter and native code on each row agree.

`python -m tensorwright.benchmarks.fuzz` does the same for as long as one likes, and shrinks what fails.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tensorwright.benchmarks.fuzz import Case, all_loops_shared, case, check, elements, shrink, with_donations
from tensorwright.codegen import nests
from tensorwright.ir.build import input_node
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.testing import random_arrays
from tensorwright.ir.text import parse_graph
from tensorwright.ir.types import tensor
from tensorwright.runtime import host

SEEDS = range(1000, 1012)
SMALL_SEEDS = range(2000, 2008)


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("seed", SEEDS)
def test_agrees(seed: int, target: str) -> None:
    """Passes, prepare graph, native code with one, two and three threads, and the checked build, on one row."""
    if lacking := host.missing_features(target):
        pytest.skip(f"this machine cannot run {target} code: it lacks {', '.join(lacking)}")
    assert check(case(seed, 14), (target,), loops=False) is None


@pytest.mark.parametrize("seed", range(4))
def test_derivatives_agree(seed: int) -> None:
    """Graphs of gradients, which hold ops that no forward graph has, on the best row."""
    assert check(case(seed, 8, gradients=True), host.runnable_rows()[-1:], checked=False, loops=False) is None


@pytest.mark.parametrize("seed", SMALL_SEEDS)
def test_loop_interpreter_gives_the_same_bits(seed: int) -> None:
    """Tiny graphs, their loops all shared between threads, where a race or a stray access would be an error."""
    c = replace(case(seed, 4), shared=True)
    assert elements(c.graph) < 20_000
    assert check(c, host.runnable_rows()[-1:], checked=False) is None


# What earlier runs found, in its smallest form.
FOUND = {
    "names of lets in two boxes of one kernel": """
graph @main(%x: f32[4, 4] data, %y: f32[4, 4] data) -> (a: f32[8, 4], b: f32[8, 4]) {
  %0 = concat(%x, %y) {axis = 0} : f32[8, 4]
  %1 = neg(%0) : f32[8, 4]
  return %0, %1
}""",
    "scalars hoisted from two boxes of one kernel": """
graph @main(%x: f32[] data) -> (y: f32[6]) {
  %0 = broadcast_to(%x) {shape = (3,)} : f32[3]
  %1 = concat(%0, %0) {axis = 0} : f32[6]
  return %1
}""",
    "scan before an axis of one element": """
graph @main(%x: f32[8, 8, 1] data) -> (y: f32[8, 8, 1]) {
  %0 = cumsum(%x) {axis = 1, exclusive = false, reverse = true} : f32[8, 8, 1]
  return %0
}""",
    "row scalars of two passes": """
graph @main(%x: f32[2, 3] data, %i: i64[3] data) -> (y: f32[3, 1]) {
  %0 = gather(%x, %i) {axis = 0} : f32[3, 3]
  %1 = max(%0) {axes = (1,), keepdims = true} : f32[3, 1]
  %2 = abs(%1) : f32[3, 1]
  return %2
}""",
    "an output beside a reduction that nothing is reduced for": """
graph @main(%x: f32[] data, %y: f32[4] data, %z: f32[] data) -> (a: f32[], b: f32[]) {
  %0 = add(%x, %z) : f32[]
  %1 = sum(%y) {axes = (0,), keepdims = false} : f32[]
  %2 = minimum(%0, %1) : f32[]
  return %2, %0
}""",
    "a scalar updated in place that another output reads": """
graph @main(%x: i64[] data) -> (a: i64[], b: f32[]) aliases(0: 0) {
  %0 = constant() {value = i64[](1)} : i64[]
  %1 = add(%x, %0) : i64[]
  %2 = cast(%1) {dtype = f32} : f32[]
  return %1, %2
}""",
}


@pytest.mark.parametrize("name", FOUND)
def test_found_before(name: str) -> None:
    graph = parse_graph(FOUND[name].strip())
    arrays = tuple(random_arrays(graph, np.random.default_rng(0)))
    purpose = "training" if graph.aliases else "inference"
    for shared in (False, True):
        assert check(Case(graph, arrays, purpose, shared=shared)) is None


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail mask that is one lane short is found in the native code, and the graph is shrunk to one op, or a copy."""
    if host.missing_features("x86-64-v3"):
        pytest.skip("this machine has no row with masked stores, where the bug is planted")
    x = input_node("x", tensor("f32", (37,)))
    graph = Graph((x,), (make("neg", make("exp", make("reverse", x, axes=(0,)))),))
    c = Case(graph, (np.linspace(-1, 1, 37, dtype=np.float32),))
    assert check(c, ("x86-64-v3",)) is None
    right = nests.first_lanes
    monkeypatch.setattr(nests, "first_lanes", lambda count, lanes: right(count - 1, lanes))
    failure = check(c, ("x86-64-v3",))
    assert failure is not None
    assert failure.stage == "code for x86-64-v3"
    small = shrink(c, failure, seconds=5.0).graph
    assert sum(1 for n in small.nodes() if n.inputs) <= 1


def test_what_the_cases_cover() -> None:
    """The seeds above have graphs with donated inputs, with prepared weights, and with loops given to all threads."""
    cases = [case(s, 14) for s in SEEDS]
    assert {c.purpose for c in cases} == {"inference", "training"}
    assert {c.bound for c in cases} == {c.shared for c in cases} == {True, False}
    before = nests.PARALLEL_NS
    with all_loops_shared():
        assert before != nests.PARALLEL_NS
    assert before == nests.PARALLEL_NS
    x = input_node("x", tensor("f32", (3,)))
    graph = with_donations(Graph((x,), (make("exp", x),)), np.random.default_rng(0))
    assert graph.aliases == ((1, 0),)
    assert graph.outputs[1].type == x.type
