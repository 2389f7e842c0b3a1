"""Random graphs through the whole compiler, every stage held against the interpreter in f64.

    python -m tensorwright.benchmarks.fuzz --seconds 600

Each seed is one graph: its operations, sizes, weights and donated inputs. What is compared, in this order:

    passes    the optimised graph, run by the interpreter
    prepare   what is computed from weights alone, and the rest, one after the other
    code      the native program of each target row that this machine runs, with one, two and three threads (same bits);
              the memory it works in is poisoned before, and what lies behind it is looked at afterwards
    checked   the program with a check of every access (one row)
    loops     small graphs: the loop IR, verified and interpreted, gives the bits of the native program

A graph that fails is shrunk and printed as text. The run's seeds are consecutive, so that a failure can be had again:
`--first SEED --count 1`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright.ir.ops  # noqa: F401  (registers the op records)
from tensorwright.codegen import generate, loop_interp
from tensorwright.codegen.contraction import preferred_panel
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.loop_verify import verify as verify_loops
from tensorwright.codegen.memory_plan import check_plan
from tensorwright.codegen.plan import calls
from tensorwright.ir.dtypes import f64
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.graphs import rebuild
from tensorwright.ir.interp import run as interpret
from tensorwright.ir.op import make
from tensorwright.ir.program import Program
from tensorwright.ir.target import Target, row
from tensorwright.ir.testing import random_arrays, random_graph
from tensorwright.ir.text import print_graph
from tensorwright.ir.types import TupleType
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.gradient import Gradient
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.oracle import budget_of, close_difference, exact_difference
from tensorwright.passes.prepare import split
from tensorwright.passes.reduce import reduce
from tensorwright.runtime import host, threads
from tensorwright.runtime.buffers import address_of, aligned_copy
from tensorwright.runtime.native import NativeProgram

Array = np.ndarray[Any, Any]
POISON = 0xFF  # as f32 a NaN, as an integer -1
GUARD = 64  # bytes behind an array that must stay as they are
SMALL = 1200  # elements over all nodes, up to which the loop interpreter is asked (it takes about a millisecond for each)


@dataclass(frozen=True)
class Case:
    """A graph with arguments, and how it is compiled.

    purpose   the pipeline: 'inference' or 'training'
    bound     weights are known beforehand: what depends on them alone is prepared
    shared    even the smallest loops are given to several threads
    """

    graph: Graph
    arrays: tuple[Array, ...]
    purpose: str = "inference"
    bound: bool = True
    shared: bool = False


@dataclass(frozen=True)
class Failure:
    """The stage that a graph fails in, and how."""

    stage: str
    what: str


def case(seed: int, nodes: int | None = None, gradients: bool = False) -> Case:
    """The graph of a seed. A third of them update inputs in place; half give every loop to several threads.

    With `gradients`, it computes the derivatives of such a graph instead. At a tie (of a maximum, at zero of an abs) a last
    bit decides which way a derivative flows: a failure there is none.
    """
    rng = np.random.default_rng(seed)
    graph, arrays = random_graph(rng, int(rng.integers(4, 36)) if nodes is None else nodes, matmul=bool(rng.integers(4)))
    if gradients:
        graph = with_gradients(graph)
    if rng.integers(3) == 0:
        graph = with_donations(graph, rng)
    purpose = "training" if graph.aliases else "inference"
    return Case(graph, tuple(arrays), purpose, bound=bool(rng.integers(2)), shared=bool(rng.integers(2)))


def with_donations(graph: Graph, rng: np.random.Generator) -> Graph:
    """The graph with more outputs that take the memory of inputs of their type: other inputs' values among them."""
    outputs = list(graph.outputs)
    aliases: list[tuple[int, int]] = []
    for i, x in enumerate(graph.inputs):
        alike = [n for n in graph.nodes() if n.type == x.type and n is not x]
        if x.attrs["role"] == "data" and alike and len(aliases) < 3:
            aliases.append((len(outputs), i))
            outputs.append(alike[int(rng.integers(len(alike)))])
    return Graph(graph.inputs, tuple(outputs), (), graph.name, tuple(aliases))


def with_gradients(graph: Graph) -> Graph:
    """The graph whose outputs are the derivatives of the sum of all outputs by the floating data inputs."""
    marks = {x: make("mark", x, id=k) for k, x in enumerate(graph.inputs) if x.dtype.is_float and x.attrs["role"] == "data"}
    if not marks:
        return graph
    outputs = rebuild(graph.outputs, marks)
    total: Node | None = None
    for o in outputs:
        if o.dtype.is_float:
            part = make("sum", o, axes=tuple(range(len(o.shape))))
            total = part if total is None else make("add", total, part)
    assert total is not None
    parts = make("gradient", total, *marks.values())
    found = tuple(make("get", parts, index=k) for k in range(len(marks)))
    return run_pipeline(Graph(graph.inputs, found, (), graph.name), (Gradient(),))


@contextmanager
def all_loops_shared() -> Iterator[None]:
    """Takes every loop to be worth several threads: random graphs are too small for that otherwise."""
    values = {"PARALLEL_NS": 0.0, "CHUNK_NS": 20.0, "PARALLEL_FROM": 0.0}
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("tensorwright.codegen.")]
    places = [(m, n) for n in values for m in modules if hasattr(m, n)]
    if missing := values.keys() - {n for _, n in places}:
        raise AssertionError(f"the code generator has no threshold called {', '.join(sorted(missing))} any more")
    before = [getattr(m, n) for m, n in places]
    for module, name in places:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


class Runner:
    """A program in memory, called with memory that nobody has written to."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._native = NativeProgram(program.object_code, program.entry)
        self._constants = [aligned_copy(c) for c in program.constants]

    def __call__(self, given: Mapping[str, Array], count: int) -> list[Array]:
        """The outputs for inputs by name. Raises AssertionError where the program touches what it must not."""
        p = self.program
        inputs = [aligned_copy(given[a.name]) for a in p.inputs]
        taken = dict(p.aliases)
        raw = [aligned_copy(np.full(a.type.nbytes + GUARD, POISON, np.uint8)) for a in p.outputs]
        arena = aligned_copy(np.full(p.arena_bytes + GUARD, POISON, np.uint8))
        places = [address_of(inputs[taken[k]] if k in taken else raw[k]) for k in range(len(p.outputs))]
        slots = [*map(address_of, inputs), *places, *map(address_of, self._constants), address_of(arena)]
        context = threads.context(count)
        table = (ctypes.c_void_p * len(slots))(*slots)
        status = self._native.run(ctypes.addressof(table), None, ctypes.addressof(context))
        assert status == 0, f"check {status - 1} of the checked build fired"
        for k, a in enumerate(p.inputs):
            assert k in taken.values() or inputs[k].tobytes() == np.asarray(given[a.name]).tobytes(), f"{a.name} was written to"
        for n, block in [(p.arena_bytes, arena), *((a.type.nbytes, b) for a, b in zip(p.outputs, raw, strict=True))]:
            assert (block[n:] == POISON).all(), "bytes behind an output or the arena were written to"
        return [
            inputs[taken[k]] if k in taken else b[: a.type.nbytes].view(a.type.dtype.numpy).reshape(a.type.static_shape)
            for k, (a, b) in enumerate(zip(p.outputs, raw, strict=True))
        ]


def interpret_loops(graph: Graph, target: Target, given: Mapping[str, Array]) -> list[Array]:
    """The outputs by the interpreter of the program's loop IR. Raises VerifyError for a broken rule, a race, a stray access."""
    made = assemble(graph, target)
    verify_loops(made.module)
    check_plan(made.plan, made.problem)
    taken = dict(graph.aliases)
    slots = [aligned_copy(given[str(n.attrs["name"])]).reshape(-1).view(np.uint8) for n in graph.inputs]
    for k, o in enumerate(graph.outputs):
        slots.append(slots[taken[k]] if k in taken else aligned_copy(np.full(o.tensor.nbytes, POISON, np.uint8)))
    slots += [aligned_copy(c.array).reshape(-1).view(np.uint8) for c in made.constants]
    slots.append(aligned_copy(np.full(made.plan.arena_bytes, POISON, np.uint8)))
    for kernel, at in calls(made.entry.steps, lambda slot, offset: bool(slots[slot][offset])):
        views = []
        for b, (slot, offset) in zip(made.module[kernel].buffers, at, strict=True):
            views.append(slots[slot][offset : offset + b.span * b.dtype.itemsize].view(b.dtype.numpy))
        loop_interp.run(made.module, kernel, views)
    first = len(graph.inputs)
    return [
        slots[first + k][: o.tensor.nbytes].view(o.dtype.numpy).reshape(o.tensor.static_shape)
        for k, o in enumerate(graph.outputs)
    ]


def elements(graph: Graph) -> int:
    """How many elements the nodes of a graph have in all."""
    types = [t for n in graph.nodes() for t in (n.type.items if isinstance(n.type, TupleType) else (n.type,))]
    return sum(math.prod(t.static_shape) for t in types)


def check(c: Case, rows: Sequence[str] = (), *, checked: bool = True, loops: bool = True) -> Failure | None:
    """How a graph fails, or None. `rows` are target rows (all that this machine runs if there are none)."""
    stage = ["interpreter"]
    try:
        if not c.shared:
            return _check(c, rows or host.runnable_rows(), checked, loops, stage)
        with all_loops_shared():
            return _check(c, rows or host.runnable_rows(), checked, loops, stage)
    except Exception as error:  # whatever goes wrong is what is looked for
        return Failure(stage[0], f"{type(error).__name__}: {error}")


def _check(c: Case, rows: Sequence[str], checked: bool, loops: bool, stage: list[str]) -> Failure | None:
    names = [str(i.attrs["name"]) for i in c.graph.inputs]
    given = dict(zip(names, c.arrays, strict=True))
    before, oracle = interpret(c.graph, c.arrays), interpret(c.graph, c.arrays, f64)
    # As in validation: each op that rounds may be off by its own budget, and a graph that is ill-conditioned, so that the
    # interpreter itself is off in f32, by eight times that.
    budget = budget_of(c.graph)

    def compare(found: Sequence[Array]) -> Failure | None:
        difference = close_difference(before, found, oracle, budget)
        return None if difference is None else Failure(stage[0], f"output {difference.output}: {difference.what}")

    for number, name in enumerate(rows):
        target = row(name)
        stage[0] = f"passes for {name}"
        ctx = Context(target=target, preferred_panel=preferred_panel)
        final = run_pipeline(c.graph, getattr(pipeline, c.purpose)(target), ctx, Hooks(verify=True))
        if failure := compare(interpret(final, c.arrays)):
            return failure
        stage[0] = f"prepare for {name}"
        first, run = split(final) if c.bound else (None, final)
        values = dict(given)
        if first is not None:
            values |= _prepared(first, interpret(first, [given[str(i.attrs["name"])] for i in first.inputs]))
        if failure := compare(interpret(run, [values[str(i.attrs["name"])] for i in run.inputs])):
            return failure
        stage[0] = f"code for {name}"
        if first is not None:
            values = given | _prepared(first, Runner(generate(first, target, texts=False))(given, 2))
        runner = Runner(generate(run, target, texts=False))
        found = [runner(values, count) for count in (1, 2, 3)]
        if failure := compare(found[0]):
            return failure
        stage[0] = f"threads for {name}"
        for more in found[1:]:
            if difference := exact_difference(found[0], more):
                return Failure(stage[0], f"output {difference.output} depends on the number of threads: {difference.what}")
        if checked and number == 0:
            stage[0] = f"checked code for {name}"
            careful = Runner(generate(run, target, texts=False, checked=True))
            if difference := exact_difference(found[0], careful(values, 2)):
                return Failure(stage[0], f"output {difference.output}: checks change the result: {difference.what}")
        if loops and elements(run) <= SMALL:
            stage[0] = f"loops for {name}"
            if difference := exact_difference(interpret_loops(run, target, values), found[0]):
                return Failure(stage[0], f"output {difference.output}: loop IR -> native: {difference.what}")
    return None


def _prepared(first: Graph, outputs: Sequence[Array]) -> dict[str, Array]:
    return dict(zip(first.output_names, outputs, strict=True))


def shrink(c: Case, failure: Failure, seconds: float = 30.0) -> Case:
    """A smaller case that fails in the same stage; the case itself if there is none."""
    rows = [r for r in host.runnable_rows() if failure.stage.endswith(r)]

    def with_arguments(graph: Graph) -> Case:
        return replace(c, graph=graph, arrays=tuple(random_arrays(graph, np.random.default_rng(0))))

    def fails(graph: Graph) -> bool:
        found = check(with_arguments(graph), rows)
        return found is not None and found.stage == failure.stage

    if not fails(c.graph):
        return c
    return with_arguments(reduce(c.graph, fails, seconds=seconds))


def inner_nodes(graph: Graph) -> list[Node]:
    """The nodes that compute something."""
    return [n for n in graph.nodes() if n.inputs]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs seeds until the time is over; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tensorwright.benchmarks.fuzz", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=None, help="at most so many seeds")
    parser.add_argument("--nodes", type=int, default=None, help="operations of a graph (default: 4 to 35, by seed)")
    parser.add_argument("--gradients", action="store_true", help="graphs of derivatives")
    parser.add_argument("--rows", default="", help="target rows, separated by commas (default: all that this machine runs)")
    parser.add_argument("--no-shrink", action="store_true", help="print failing graphs as they are")
    parser.add_argument("--json", metavar="FILE", help="write the failures there")
    args = parser.parse_args(argv)
    rows = tuple(r for r in args.rows.split(",") if r)
    for r in rows:
        host.check_runnable(row(r))
    end = time.monotonic() + args.seconds
    failures: list[dict[str, Any]] = []
    done = 0
    while time.monotonic() < end and (args.count is None or done < args.count):
        seed = args.first + done
        c = case(seed, args.nodes, args.gradients)
        failure = check(c, rows)
        done += 1
        if failure is None:
            continue
        small = c if args.no_shrink else shrink(c, failure)
        text = print_graph(small.graph, labels=False, constants=True)
        options = (
            f"{c.purpose}, {'bound' if c.bound else 'free'} weights, {'all loops shared' if c.shared else 'loops as they are'}"
        )
        print(f"seed {seed} fails: {failure.stage} ({options}): {failure.what}\n{text}\n", flush=True)
        failures.append({"seed": seed, "stage": failure.stage, "what": failure.what, "graph": text})
    names = ", ".join(rows or host.runnable_rows())
    print(f"{done} graphs (seeds {args.first} to {args.first + done - 1}) on {names}: {len(failures)} fail")
    if args.json:
        Path(args.json).write_text(json.dumps({"graphs": done, "failures": failures}, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
