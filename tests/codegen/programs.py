"""Compiles graphs and runs the programs natively on numpy arrays, and compares with the interpreter in f64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorwright.ir.ops  # noqa: F401  (registers the op records)
from tensorwright.codegen import generate
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.loop_interp import run as run_kernel
from tensorwright.codegen.loop_verify import verify
from tensorwright.codegen.memory_plan import check_plan
from tensorwright.codegen.plan import calls
from tensorwright.ir.dtypes import f64
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.interp import run as interpret
from tensorwright.ir.lowering import Decompose
from tensorwright.ir.op import Trait
from tensorwright.ir.program import Program
from tensorwright.ir.target import Target, row

from .helpers import Loaded, aligned, host

Array = np.ndarray[Any, Any]


def decomposed(graph: Graph, keep: tuple[type, ...] = ()) -> Graph:
    """The graph with every node that stands for others replaced by them, but for those of the forms to `keep`."""

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        return expand(node.replace(inputs))

    def expand(node: Node) -> Node:
        if node.op.has(Trait.STRUCTURAL):
            return node
        form = node.op.lower(node)
        if not isinstance(form, Decompose) or isinstance(form, keep):
            return node
        built = form.build(node)
        assert isinstance(built, Node)
        stops = set(node.inputs)
        return Graph((), (built,)).map_nodes(lambda n, i: n if n in stops else rule(n, i)).outputs[0]

    return graph.map_nodes(rule)


class Runner:
    """A loaded program. Calls return fresh outputs; memory that nobody wrote is NaN or a wild integer."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._loaded = Loaded(program, program.name)  # type: ignore[arg-type]
        self._constants = [aligned(c) for c in program.constants]

    def __call__(self, arrays: Sequence[Array], threads: int = 1) -> list[Array]:
        p = self.program
        given = [aligned(np.asarray(a)) for a in arrays]
        alias = dict(p.aliases)
        outputs = []
        for k, o in enumerate(p.outputs):
            if k in alias:
                outputs.append(given[alias[k]])
                continue
            raw = aligned(np.full(o.type.nbytes, 0xFF, np.uint8))
            outputs.append(raw.view(o.type.dtype.numpy).reshape(o.type.static_shape))
        arena = aligned(np.full(p.arena_bytes + 64, 0xFF, np.uint8))
        before = [a.copy() for a in given]
        code = self._loaded([a.ctypes.data for a in (*given, *outputs, *self._constants, arena)], threads)
        assert code == 0, f"check {code} fired"
        for i, (a, b) in enumerate(zip(given, before, strict=True)):
            if i not in alias.values():
                assert a.tobytes() == b.tobytes(), f"input {i} was written"
        assert (arena[p.arena_bytes :] == 0xFF).all(), "written beyond the arena"
        return [o.copy() for o in outputs]


def interpreted(graph: Graph, arrays: Sequence[Array], target: Target | str | None = None) -> list[Array]:
    """The program's loop IR, verified and run by the loop interpreter (bounds, races, uninitialised reads are errors)."""
    chosen = host() if target is None else row(target) if isinstance(target, str) else target
    made = assemble(graph, chosen)
    verify(made.module)
    check_plan(made.plan, made.problem)
    alias = dict(graph.aliases)
    slots = [aligned(np.asarray(a)).reshape(-1).view(np.uint8) for a in arrays]
    for k, o in enumerate(graph.outputs):
        slots.append(slots[alias[k]] if k in alias else aligned(np.full(o.tensor.nbytes, 0xFF, np.uint8)))
    slots += [aligned(c.array).reshape(-1).view(np.uint8) for c in made.constants]
    slots.append(aligned(np.full(made.plan.arena_bytes, 0xFF, np.uint8)))
    for kernel, places in calls(made.entry.steps, lambda slot, offset: bool(slots[slot][offset])):
        views = []
        for b, (slot, offset) in zip(made.module[kernel].buffers, places, strict=True):
            nbytes = b.span * b.dtype.itemsize
            views.append(slots[slot][offset : offset + nbytes].view(b.dtype.numpy))
            assert views[-1].size == b.span, f"{kernel}: {b.name} reaches beyond its slot"
        run_kernel(made.module, kernel, views)
    first = len(graph.inputs)
    return [
        slots[first + k][: o.tensor.nbytes].view(o.dtype.numpy).reshape(o.tensor.static_shape)
        for k, o in enumerate(graph.outputs)
    ]


def compiled(graph: Graph, target: Target | str | None = None, *, checked: bool = False) -> Runner:
    chosen = host() if target is None else row(target) if isinstance(target, str) else target
    return Runner(generate(graph, chosen, checked=checked, texts=True))


def error(found: Array, expected: Array) -> float:
    """max|found - expected| / max|expected| over finite elements; Inf where NaN, Inf or integers disagree."""
    assert found.shape == expected.shape
    if found.dtype.kind not in "f" and found.dtype.name not in ("bfloat16",):
        return 0.0 if np.array_equal(found, expected) else np.inf
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return np.inf
    if not finite.any():
        return 0.0
    worst, scale = np.abs(a[finite] - b[finite]).max(), np.abs(b[finite]).max()
    return float(worst / scale) if scale else float(worst)


def agree(graph: Graph, arrays: Sequence[Array], target: Target | str | None = None, budget: float = 2e-6) -> Runner:
    """Compiles, runs with one and two threads, and compares with the interpreter; returns the runner."""
    runner = compiled(graph, target)
    wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
    expected = interpret(graph, wide, f64)
    one, two = runner(arrays, 1), runner(arrays, 2)
    for k, (x, y, e) in enumerate(zip(one, two, expected, strict=True)):
        assert x.tobytes() == y.tobytes(), f"output {k} depends on the number of threads"
        found = error(x, e)
        assert found <= budget, f"output {k}: relative error {found:.2e} exceeds {budget:.0e}"
    return runner
