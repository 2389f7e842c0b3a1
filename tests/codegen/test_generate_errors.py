"""What `generate` does at the edges: what has no code, empty arrays, outputs that are inputs, constants."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.codegen import generate, llvm
from tensorwright.codegen.generate import begin
from tensorwright.ir.build import constant, fused, input_node
from tensorwright.ir.dims import symbol
from tensorwright.ir.dtypes import f32
from tensorwright.ir.errors import CompileError
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType

from .helpers import host
from .programs import agree, compiled


def test_undecomposed_op_says_which_pass_is_missing() -> None:
    x = input_node("x", TensorType(f32, (3, 4)))
    with pytest.raises(CompileError, match=r"mean f32\[3\].*decompose pass"):
        generate(Graph((x,), (make("mean", x, axes=(1,)),)), host())


def test_symbolic_size_is_named() -> None:
    x = input_node("x", TensorType(f32, (symbol("N"), 4)))
    with pytest.raises(CompileError, match="N"):
        generate(Graph((x,), (make("exp", x),)), host())


def test_wrong_region_names_the_node() -> None:
    p = input_node("p0", TensorType(f32, (6, 8)))
    x = input_node("x", TensorType(f32, (6, 8)))
    body = Graph((p,), (make("add", make("sum", p, axes=(0,)), make("sum", p, axes=(0,))),))
    with pytest.raises(CompileError, match="sum"):
        generate(Graph((x,), (fused(body, [x], "rows"),)), host())


def test_outputs_that_are_inputs_constants_or_one_another() -> None:
    x = input_node("x", TensorType(f32, (5,)))
    y = make("exp", x)
    c = constant(np.arange(6, dtype=np.float32).reshape(2, 3))
    graph = Graph((x,), (x, y, y, make("reshape", y, shape=(5, 1)), c, make("reshape", c, shape=(6,))), tuple("abcdef"))
    agree(graph, [np.linspace(-1, 1, 5, dtype=np.float32)])


def test_donated_input_that_is_its_own_output_needs_no_code() -> None:
    x = input_node("x", TensorType(f32, (5,)), "state")
    program = generate(Graph((x,), (x,), aliases=((0, 0),)), host())
    assert program.kernels == ()


def test_empty_arrays() -> None:
    x, z = input_node("x", TensorType(f32, (0, 3))), input_node("z", TensorType(f32, (4, 0)))
    graph = Graph((x, z), (make("exp", x), make("sum", x, axes=(0,)), make("sum", make("exp", z), axes=(1,))), tuple("abc"))
    found = agree(graph, [np.zeros((0, 3), np.float32), np.zeros((4, 0), np.float32)])
    assert len(found.program.kernels) == 2


def test_scalars_are_immediates_and_arrays_are_constants() -> None:
    x = input_node("x", TensorType(f32, (2, 3)))
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    scaled = make("mul", x, make("broadcast_to", constant(np.float32(2.5)), shape=(2, 3)))
    graph = Graph(
        (x,), (make("add", scaled, constant(table)), make("sub", x, constant(np.full((2, 3), 7, np.float32)))), ("a", "b")
    )
    runner = agree(graph, [table])
    assert [c.shape for c in runner.program.constants] == [(2, 3)]
    assert len(runner.program.kernels) == 3


def test_unused_inputs_and_no_work() -> None:
    x, y = (input_node(n, TensorType(f32, (3,))) for n in "xy")
    agree(Graph((x, y), (make("neg", y),)), [np.ones(3, np.float32), np.ones(3, np.float32)])


def test_views_have_no_code() -> None:
    x = input_node("x", TensorType(f32, (4, 6)))
    y = make("reshape", make("exp", make("reshape", x, shape=(24,))), shape=(2, 12))
    assert len(compiled(Graph((x,), (y,))).program.kernels) == 1
    agree(Graph((x,), (y,)), [np.ones((4, 6), np.float32)])


def test_same_program_twice_is_the_same_code() -> None:
    def build() -> Graph:
        x = input_node("x", TensorType(f32, (4, 6)))
        return Graph((x,), (make("sum", make("exp", make("transpose", x, perm=(1, 0))), axes=(0,)),))

    a, b = (generate(build(), host()) for _ in range(2))
    assert a.object_code == b.object_code and a.texts["loops"] == b.texts["loops"]


def test_machine_code_made_in_the_background_is_the_same() -> None:
    x = input_node("x", TensorType(f32, (3, 40)))
    graph = Graph((x,), (make("exp", x),))
    assert begin(graph, host())().object_code == generate(graph, host()).object_code


def test_an_error_in_the_background_is_raised_where_the_program_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = input_node("x", TensorType(f32, (3, 40)))

    def refuse(text: str, target: object) -> bytes:
        raise CompileError(f"refused {len(text)} characters for {target}")

    monkeypatch.setattr(llvm, "object_code", refuse)
    waiting = begin(Graph((x,), (make("exp", x),)), host())
    for _ in range(2):
        with pytest.raises(CompileError, match="refused"):
            waiting()
