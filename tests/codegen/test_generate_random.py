"""Random graphs, plain and fused by the passes: compiled = loop interpreter = interpreter in f64, on every row."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.loop_verify import verify
from tensorwright.codegen.memory_plan import check_plan
from tensorwright.ir.target import row
from tensorwright.ir.testing import random_graph
from tensorwright.passes.manager import run_pipeline
from tensorwright.passes.pipeline import training

from .helpers import host_rows
from .programs import agree, decomposed, error, interpreted

ROWS = [r for r in host_rows() if r.startswith("x86")] or host_rows()
BUDGET = 3e-5  # of a graph: its ops' errors add up, and sums of either sign cancel


@pytest.mark.parametrize("seed", range(18))
def test_fused(seed: int) -> None:
    target = ROWS[seed % len(ROWS)]
    graph, arrays = random_graph(np.random.default_rng(seed), nodes=30)
    fused = run_pipeline(graph, training(row(target)))
    made = assemble(fused, row(target))
    verify(made.module)
    check_plan(made.plan, made.problem)
    agree(fused, arrays, target, BUDGET)


@pytest.mark.parametrize("seed", range(100, 109))
def test_one_kernel_for_each_node(seed: int) -> None:
    graph, arrays = random_graph(np.random.default_rng(seed), nodes=25)
    agree(decomposed(graph), arrays, ROWS[seed % len(ROWS)], BUDGET)


@pytest.mark.parametrize("seed", range(200, 206))
def test_loop_interpreter(seed: int) -> None:
    """Every access in range, initialised and free of races, in all kernels of a program."""
    target = ROWS[seed % len(ROWS)]
    graph, arrays = random_graph(np.random.default_rng(seed), nodes=15)
    fused = run_pipeline(graph, training(row(target)))
    runner = agree(fused, arrays, target, BUDGET)
    for x, y in zip(interpreted(fused, arrays, target), runner(arrays), strict=True):
        assert error(x, y) <= BUDGET
