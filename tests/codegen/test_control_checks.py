"""Bugs planted in how loops and branches place their values: the check of the plan finds each, and passes without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tensorwright.codegen import control_loop
from tensorwright.codegen.control_branch import BranchControl, WhileControl
from tensorwright.codegen.control_loop import Layout, LoopControl
from tensorwright.codegen.generate import assemble, generate
from tensorwright.codegen.llvm import emit
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.memory_plan import PlanError, PlannedStep, check_plan
from tensorwright.codegen.plan import Block, Branch, EntryPlan, Loop, Regions, Section, Step, While, calls, walk
from tensorwright.ir.build import constant
from tensorwright.ir.errors import CompileError
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.places import Pointer
from tensorwright.ir.types import tensor

from .helpers import Loaded, host
from .programs import compiled
from .test_control import body, f, graph, lstm_like, parts, recurrence

Patch = pytest.MonkeyPatch


def swaps(length: int = 6) -> Graph:
    """A carry that cannot be updated where it lies and is not stacked."""
    step = body(lambda h, w: (make("matmul", h, w),), f(4, 8), f(8, 8))
    return graph(lambda h, w: parts(make("scan", h, w, body=step, length=length, carries=1, sequences=0)), f(4, 8), f(8, 8))


def keeps() -> Graph:
    """A carry that is updated where it lies, and an operand of it that lives on."""
    step = body(lambda a, x: (make("add", a, x), make("neg", x)), f(8), f(8))
    return graph(lambda a, x: (*parts(make("scan", a, x, body=step, length=6, carries=1, sequences=1)), a), f(8), f(6, 8))


def counts() -> Graph:
    types = (f(), f(4, 4), f(4, 4))
    test = body(lambda n, m, w: (make("less", n, constant(np.float32(9))),), *types)
    step = body(lambda n, m, w: (make("add", n, constant(np.float32(1))), make("matmul", m, w)), *types)
    return graph(lambda n, m, w: parts(make("while_loop", n, m, w, test=test, body=step, carries=2)), *types)


def chooses() -> Graph:
    then = body(lambda a, b: (make("matmul", a, b), a), f(4, 4), f(4, 4))
    other = body(lambda a, b: (make("exp", b), b), f(4, 4), f(4, 4))
    return graph(lambda p, a, b: parts(make("cond", p, a, b, then=then, orelse=other)), tensor("bool", ()), f(4, 4), f(4, 4))


Change = Callable[[LoopControl, Layout], None]


def _stride(c: LoopControl, made: Layout) -> None:
    slot = c.body.first_output + c.kept.index(("stack", 0))
    v = made.slots[slot]
    made.slots[slot] = (v[0], v[1], v[2] // 2)


def _sequence_stride(c: LoopControl, made: Layout) -> None:
    v = made.slots[c.form.carries]
    made.slots[c.form.carries] = (v[0], v[1], v[2] - 4)


def _over_the_sequence(c: LoopControl, made: Layout) -> None:
    made.slots[c.body.first_output + c.kept.index(("stack", 0))] = made.slots[c.form.carries]


def _no_copy_before(_: LoopControl, made: Layout) -> None:
    made.before.clear()


def _no_copy_after(_: LoopControl, made: Layout) -> None:
    made.after.clear()


def _same_pass(_: LoopControl, made: Layout) -> None:
    """The pointer names the slice of this pass instead of that of the pass before."""
    made.pointers = [replace(p, cycle=tuple((v[0], v[1] + v[2], v[2]) for v in p.cycle)) for p in made.pointers]


def _no_first(_: LoopControl, made: Layout) -> None:
    made.pointers = [replace(p, first=None) for p in made.pointers]


def _no_last(_: LoopControl, made: Layout) -> None:
    made.pointers = [replace(p, last=None) for p in made.pointers]


def _turned(_: LoopControl, made: Layout) -> None:
    made.pointers = [replace(p, cycle=p.cycle[::-1]) for p in made.pointers]


def _one_buffer(_: LoopControl, made: Layout) -> None:
    made.pointers = [replace(p, cycle=p.cycle[:1]) for p in made.pointers]


def _arena_on_the_carry(c: LoopControl, made: Layout) -> None:
    made.slots[c.body.arena] = made.slots[0]


PLANTS: list[tuple[str, Callable[[], Graph], Change]] = [
    ("stride of a stacked result", lambda: recurrence(16, 2, 7), _stride),
    ("stride of a sequence", lambda: recurrence(16, 2, 7), _sequence_stride),
    ("stacked over a live sequence", lambda: recurrence(16, 2, 7), _over_the_sequence),
    ("initial carry never read", lambda: recurrence(16, 2, 7), _no_first),
    ("carry read from this pass", lambda: recurrence(16, 2, 7), _same_pass),
    ("the last carry not handed over", lambda: recurrence(16, 2, 7), _no_copy_after),
    ("initial carry not copied", keeps, _no_copy_before),
    ("initial carry not stacked", lambda: lstm_like(16, 2, 5, save=True), _no_copy_before),
    ("last carry stacked beyond the end", lambda: lstm_like(16, 2, 5, save=True), _no_last),
    ("two buffers the wrong way round", swaps, _turned),
    ("one buffer in the place of two", swaps, _one_buffer),
    ("arena on a carry", lambda: lstm_like(16, 2, 5, save=False), _arena_on_the_carry),
]


@pytest.mark.parametrize(("build", "change"), [p[1:] for p in PLANTS], ids=[p[0] for p in PLANTS])
@pytest.mark.parametrize("checked", [True, False])
def test_a_loop_with_a_value_misplaced(build: Callable[[], Graph], change: Change, checked: bool, monkeypatch: Patch) -> None:
    """`checked`: generate itself refuses (with verify); else the check called by hand."""
    g = build()
    made = assemble(g, host())
    check_plan(made.plan, made.problem)
    original = LoopControl.layout

    def wrong(self: LoopControl, step: PlannedStep, count: int) -> Layout:
        found = original(self, step, count)
        change(self, found)
        return found

    monkeypatch.setattr(LoopControl, "layout", wrong)
    with pytest.raises(PlanError):
        if checked:
            generate(g, host(), verify=True)
        else:
            check_plan(made.plan, made.problem)


def test_a_carry_kept_in_place_that_its_body_still_reads(monkeypatch: Patch) -> None:
    """The body's own plan is checked: an update in place that its kernel does not allow."""
    g = swaps()
    monkeypatch.setattr(control_loop, "_copied", lambda *_: set())
    made = assemble(g, host())  # copies in each pass: slow, and right
    check_plan(made.plan, made.problem)
    (loop,) = (c for c in (t.inside for t in made.problem.tasks) if isinstance(c, LoopControl))
    kept = [replace(s, writes=((s.writes[0][0], s.reads[0][1]),)) for s in loop.body.plan.steps[:1]]
    bad = replace(loop, body=replace(loop.body, plan=replace(loop.body.plan, steps=tuple(kept))))
    with pytest.raises(PlanError):
        bad.check(next(s for s in made.plan.steps if s.name == "scan"))


def test_a_while_whose_carries_are_not_copied(monkeypatch: Patch) -> None:
    g = counts()
    made = assemble(g, host())
    check_plan(made.plan, made.problem)
    original = WhileControl._slots
    monkeypatch.setattr(WhileControl, "_slots", lambda self, body, step: (original(self, body, step)[0], []))
    with pytest.raises(PlanError, match="does not hold"):
        check_plan(made.plan, made.problem)


@pytest.mark.parametrize("turn", ["results", "operands"])
def test_a_branch_with_places_mixed_up(turn: str, monkeypatch: Patch) -> None:
    g = chooses()
    made = assemble(g, host())
    check_plan(made.plan, made.problem)
    original = BranchControl._slots

    def wrong(self: BranchControl, body: Any, step: PlannedStep) -> dict[int, Any]:
        slots = original(self, body, step)
        a, b = (body.first_output, body.first_output + 1) if turn == "results" else (0, 1)
        slots[a], slots[b] = slots[b], slots[a]
        return slots

    monkeypatch.setattr(BranchControl, "_slots", wrong)
    with pytest.raises(PlanError):
        check_plan(made.plan, made.problem)


def test_private_memory_of_threads_is_apart() -> None:
    """Each region is as large as the arena of a pass, and all are inside the workspace."""
    step = body(lambda x, w: (make("matmul", make("matmul", x, w), w),), f(64, 64), f(64, 64))
    g = graph(lambda x, w: parts(make("scan", x, w, body=step, length=20, carries=0, sequences=1)), f(20, 64, 64), f(64, 64))
    made = assemble(g, host())
    (loop,) = (n for n in walk(made.entry.steps) if isinstance(n, Loop))
    (task,) = made.problem.tasks
    inside = task.inside
    assert isinstance(inside, LoopControl) and loop.regions is not None
    assert loop.regions.stride >= inside.body.plan.arena_bytes > 0
    assert loop.regions.count * loop.regions.stride <= task.workspace == made.plan.arena_bytes


def test_memory_does_not_depend_on_the_threads_asked_for() -> None:
    g = recurrence(16, 2, 7)
    assert len({generate(g, host(), threads=n).arena_bytes for n in (1, 2, 8)}) == 1


# --- the tree itself ----------------------------------------------------------------------------------------------------


def test_the_text_of_a_program_shows_its_loops() -> None:
    text = compiled(recurrence(16, 2, 9)).program.texts["loops"]
    assert text.endswith(
        """# entry main
#   loop 9
#     p1 = s4 + -128 + 128 * t0; first s0
#     contraction_matmul_0(p1, s2, s5)
#     map_add_0_in_place_0(s1 + 128 * t0, s5)
#     map_tanh_0(s5, s4 + 128 * t0)
#   copy_0(s4 + 1024, s3)
"""
    )
    assert len(parse_module(text).kernels) == len(assemble(recurrence(16, 2, 9), host()).module.kernels)
    for g, words in (
        (counts(), ("while s5 after", "do")),
        (chooses(), ("if s0", "else")),
        (swaps(), ("p1 = s2 | s3; first s0",)),
    ):
        lines = [line.strip("# ") for line in compiled(g).program.texts["loops"].splitlines()]
        assert all(w in lines for w in words)


def test_calls_of_a_tree_in_order() -> None:
    swap = Pointer(-1, ((2, 0), (2, 64)), first=(1, 0))
    inner = Loop(2, (Step("k", ((0, 4, 100, 10), (-1, 8))),), reverse=True)
    tree = (Block((Loop(3, (inner,), pointers=(swap,)),)),)
    found = list(calls(tree, lambda slot, offset: True))
    assert [p[0] for _, p in found] == [(0, 4 + 100 * i + 10 * j) for i in range(3) for j in (1, 0)]
    assert [p[1] for _, p in found[::2]] == [(1, 8), (2, 72), (2, 8)]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((Step("nothing", ()),), "not in the module"),
        ((Step("copy_0", ((0, 0),)),), "it takes 2"),
        ((Step("copy_0", ((0, 2), (1, 0))),), "alignment"),
        ((Loop(4, (Step("copy_0", ((0, 0, 6), (1, 0))),)),), "alignment"),
        ((Loop(4, (Step("copy_0", ((-1, 0), (1, 0))),), pointers=(Pointer(-1, ((0, 0, 2),)),)),), "alignment"),
        ((Step("copy_0", ((-3, 0), (1, 0))),), "pointer -3"),
        ((Step("copy_0", ((0, 0, 4), (1, 0))),), "more strides"),
        ((Loop(0, ()),), "0 passes"),
    ],
)
def test_trees_that_are_refused(nodes: tuple[Any, ...], message: str) -> None:
    x = graph(lambda x: (x,), f(8))
    made = assemble(x, host())
    with pytest.raises(CompileError, match=message):
        emit(made.module, EntryPlan("main", nodes), host())


SPOIL = """
kernel spoil(x: f32[4]) {
  for i in 0 .. 5 serial {
    store x[i] = 1.0:f32
  }
}
kernel fine(x: f32[4]) {
  store x[0] = 1.0:f32
}
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", ["spoil", "fine"])
@pytest.mark.parametrize("kind", ["loop", "parallel", "section", "branch", "while"])
def test_a_checked_run_reports_a_violation_in_every_kind_of_node(kind: str, kernel: str, threads: int) -> None:
    """And ends: a while loop whose test may depend on what was not read does not run for ever."""
    step = (Step(kernel, ((0, 0),)),)
    tree: dict[str, Any] = {
        "loop": Loop(3, step),
        "parallel": Loop(9, step, regions=Regions(-1, (0, 0), 16, 4)),
        "section": Section((Block(step), Block(step))),
        "branch": Branch((1, 0), step, ()),
        "while": While((), (1, 0), step) if kernel == "spoil" else While((), (1, 1), step),
    }
    emitted = emit(parse_module(SPOIL), EntryPlan("main", (tree[kind],)), host(), checked=True)
    x, flag = np.zeros(64, np.float32), np.array([1, 0], np.uint8)
    code = Loaded(emitted)([x.ctypes.data, flag.ctypes.data], threads)
    if kernel == "fine":
        assert code == 0
    else:
        assert "spoil" in emitted.checks[code - 1]
        assert not x[4:].any(), "written out of range"


def test_results_nobody_wants_take_no_memory_and_no_time() -> None:
    def first(g: Graph) -> Graph:
        return Graph(g.inputs, g.outputs[:1])

    whole, part = assemble(lstm_like(16, 2, 50, save=True), host()), assemble(first(lstm_like(16, 2, 50, save=True)), host())
    assert part.plan.arena_bytes < whole.problem.sizes[-1] * 4
    (loop,) = (n for n in walk(part.entry.steps) if isinstance(n, Loop))
    assert not any(n.kernel.startswith("copy") for n in loop.nodes if isinstance(n, Step))


def test_a_node_of_which_nothing_is_wanted_is_not_run() -> None:
    g = recurrence(16, 2, 7)
    assert assemble(Graph(g.inputs, (g.inputs[0],)), host()).problem.tasks == ()
