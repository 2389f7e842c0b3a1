"""Every op record's samples, compiled for each row that this machine runs, against the reference in f64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from tensorwright.ir.build import input_node
from tensorwright.ir.dtypes import as_dtype, f64
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.interp import run as interpret
from tensorwright.ir.op import REGISTRY, Op, Sample, Trait, make
from tensorwright.ir.types import TensorType

from .helpers import host_rows
from .programs import Array, compiled, decomposed, error, interpreted

OPS = [op for op in REGISTRY.values() if not op.has(Trait.STRUCTURAL)]
X86 = [r for r in host_rows() if r.startswith("x86")] or host_rows()


Case = tuple[Sample, list[Array], list[Node], Node, Array]


@functools.cache
def cases(op: Op) -> tuple[Case, ...]:
    """Per sample: operands, input nodes, the op's node, and the expected result."""
    found = []
    for k, s in enumerate(op.samples()):
        arrays = [np.asarray(x) for x in s.make(np.random.default_rng(k))]
        nodes = [input_node(f"x{k}_{j}", TensorType(as_dtype(x.dtype), x.shape)) for j, x in enumerate(arrays)]
        node = make(op, *nodes, **s.attrs)
        wide: list[Any] = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
        found.append((s, arrays, nodes, node, interpret(Graph(tuple(nodes), (node,)), wide, f64)[0]))
    return tuple(found)


def chosen(op: Op, target: str) -> tuple[Case, ...]:
    """All samples; of contractions a third where the target is not the widest (tests/contraction covers every row)."""
    return cases(op)[::3] if op.has(Trait.CONTRACTION) and target != X86[0] else cases(op)


def together(some: tuple[Case, ...], keep: tuple[type, ...] = ()) -> tuple[Graph, list[Array]]:
    """Samples as one graph: one compilation. Nodes of the forms to `keep` are not taken apart."""
    nodes = [n for _, _, its, _, _ in some for n in its]
    outputs = [n for _, _, _, n, _ in some]
    graph = Graph(tuple(nodes), tuple(outputs), tuple(f"y{k}" for k in range(len(outputs))))
    return decomposed(graph, keep), [a for _, its, _, _, _ in some for a in its]


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiled_equals_reference(op: Op, target: str) -> None:
    some = chosen(op, target)
    graph, arrays = together(some)
    runner = compiled(graph, target)
    one, two = runner(arrays, 1), runner(arrays, 2)
    for k, (s, _, _, _, expected) in enumerate(some):
        assert one[k].tobytes() == two[k].tobytes(), f"sample {k} depends on the number of threads"
        found = error(one[k], expected)
        assert found <= s.budget, (
            f"sample {k} ({s.label}) {dict(s.attrs)}: relative error {found:.2e}, the budget is {s.budget:.0e}"
        )


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_access_leaves_its_buffer(op: Op) -> None:
    graph, arrays = together(cases(op)[:: 3 if op.has(Trait.CONTRACTION) else 1])
    compiled(graph, X86[0], checked=True)(arrays, 1)  # Runner asserts that no check fires


SMALL = 40


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_loop_interpreter_agrees(op: Op) -> None:
    """The loop IR itself, on the smallest samples: what the emitter is given is right, and race-free."""
    small = sorted(
        (c for c in cases(op) if 0 < c[4].size <= SMALL and sum(a.size for a in c[1]) <= 4 * SMALL), key=lambda c: c[4].size
    )
    for s, arrays, nodes, node, expected in small[-2:]:
        graph = decomposed(Graph(tuple(nodes), (node,)))
        found = error(interpreted(graph, arrays, X86[0])[0], expected)
        assert found <= s.budget, f"{dict(s.attrs)}: relative error {found:.2e}, the budget is {s.budget:.0e}"
