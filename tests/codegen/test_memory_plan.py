"""The memory plan: its checker catches bad plans, and finds nothing in good ones, on random problems and on graphs."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.memory_plan import Place, Plan, PlanError, PlannedStep, Problem, Task, check_plan, packing, plan_memory
from tensorwright.ir.build import input_node
from tensorwright.ir.dtypes import f32
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType

from .helpers import host
from .programs import agree, compiled


def problem_from(seed: int) -> Problem:
    """A random program: tasks over earlier values, in-place pairs, outputs that repeat or pass through, donated inputs."""
    rng = random.Random(seed)
    inputs, constants = rng.randint(1, 4), rng.randint(0, 2)
    sizes = [64 * rng.randint(1, 3) for _ in range(inputs)] + [rng.choice((4, 64, 100)) for _ in range(constants)]
    tasks: list[Task] = []
    for t in range(rng.randint(1, 14)):
        reads = tuple(rng.randrange(len(sizes)) for _ in range(rng.randint(0, 3)))
        writes: list[int] = []
        for _ in range(rng.choice((1, 1, 1, 2))):
            same = [sizes[r] for r in reads]
            writes.append(len(sizes))
            sizes.append(rng.choice([*same, 64, 0, 192, 130]))
        pairs = {
            (a, b)
            for a in range(len(writes))
            for b in range(len(reads))
            if sizes[writes[a]] == sizes[reads[b]] and rng.random() < 0.5
        }
        kept = {}
        for a, b in pairs:
            if a not in kept and b not in kept.values():
                kept[a] = b
        keeps = tuple(v for v in dict.fromkeys(reads) if rng.random() < 0.1)
        made = Task(f"t{t}", reads, tuple(writes), rng.choice((0, 0, 300)), frozenset(kept.items()), keeps=keeps)
        tasks.append(replace(made, keeps_workspace=rng.random() < 0.2))
    outputs = tuple(rng.randrange(len(sizes)) for _ in range(rng.randint(1, 4)))
    aliases: list[tuple[int, int]] = []
    free = set(range(inputs))
    for k, v in enumerate(outputs):
        fitting = [i for i in sorted(free) if sizes[i] == sizes[v]]
        if fitting and rng.random() < 0.7:
            aliases.append((k, rng.choice(fitting)))
            free.discard(aliases[-1][1])
    return Problem(tuple(sizes), inputs, constants, outputs, tuple(tasks), tuple(aliases))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 40))
def test_random_plans_are_sound(seed: int) -> None:
    problem = problem_from(seed)
    check_plan(plan_memory(problem), problem)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 40))
def test_packing_of_very_many_values_is_sound_too(seed: int) -> None:
    problem = problem_from(seed)
    with mock.patch.object(packing, "MANY", 0):
        plan = plan_memory(problem)
    check_plan(plan, problem)
    run(problem, plan)


def test_a_chain_of_thousands_is_planned_in_seconds() -> None:
    tasks = tuple(Task(f"t{k}", (k,), (k + 1,)) for k in range(20_000))
    plan = plan_memory(Problem((1024,) * 20_001, 1, 0, (20_000,), tasks))
    assert plan.arena_bytes == 2048


def run(problem: Problem, plan: Plan) -> None:
    """Carries a plan out on bytes: each value is a pattern derived from what it was computed from."""
    slots = {s: bytearray(1 << 12) for s in range(plan.slots)}
    truth: dict[int, bytes] = {}

    def put(at: Place, data: bytes) -> None:
        slots[at.slot][at.offset : at.offset + at.nbytes] = data

    def pattern(value: int, *parts: bytes) -> bytes:
        return random.Random(repr((value, parts))).randbytes(problem.sizes[value])

    for v, at in (*plan.inputs, *plan.constants):
        truth[v] = pattern(v)
        put(at, truth[v])
    for t in problem.tasks:
        for v in t.writes:
            truth[v] = pattern(v, *(truth[r] for r in t.reads))
    for step in plan.steps:
        found = [bytes(slots[at.slot][at.offset : at.offset + at.nbytes]) for _, at in step.reads]
        if step.workspace is not None:
            put(step.workspace, b"\xee" * step.workspace.nbytes)
        for v, at in step.writes:
            put(at, found[0] if step.task < 0 else pattern(v, *found))
    for v, at in plan.outputs:
        assert bytes(slots[at.slot][at.offset : at.offset + at.nbytes]) == truth[v]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 40))
def test_random_plans_compute_the_right_bytes(seed: int) -> None:
    problem = problem_from(seed)
    run(problem, plan_memory(problem))


def simple() -> Problem:
    """Input 0 is donated to output 0 (value 2, by task 1), while task 0 reads it for output 1 (value 1)."""
    return Problem(
        (64, 64, 64), 1, 0, (2, 1), (Task("reads", (0,), (1,)), Task("updates", (0,), (2,), 0, frozenset({(0, 0)}))), ((0, 0),)
    )


def test_readers_of_a_donated_input_come_before_its_update() -> None:
    problem = simple()
    swapped = replace(problem, tasks=(problem.tasks[1], problem.tasks[0]))
    for p in (problem, swapped):
        plan = plan_memory(p)
        assert [s.name for s in plan.steps] == ["reads", "updates"]
        check_plan(plan, p)


def test_missing_dependence_is_caught() -> None:
    problem = simple()
    plan = plan_memory(problem)
    with pytest.raises(PlanError, match="does not hold it"):
        check_plan(replace(plan, steps=plan.steps[::-1]), problem)


def test_update_that_its_reader_needs_is_copied_in_at_the_end() -> None:
    # task 1 reads both the donated input and the update of it
    tasks = (Task("updates", (0,), (1,), 0, frozenset({(0, 0)})), Task("reads", (0, 1), (2,)))
    problem = Problem((64, 64, 64), 1, 0, (1, 2), tasks, ((0, 0),))
    plan = plan_memory(problem)
    assert [s.name for s in plan.steps] == ["updates", "reads", "copy"]
    check_plan(plan, problem)


def test_swapped_state_goes_through_a_temporary() -> None:
    problem = Problem((64, 64), 2, 0, (1, 0), (), ((0, 0), (1, 1)))
    plan = plan_memory(problem)
    check_plan(plan, problem)
    run(problem, plan)
    assert plan.arena_bytes == 128


def test_overlapping_places_are_caught() -> None:
    tasks = (Task("a", (0,), (1,)), Task("b", (0,), (2,)), Task("c", (1, 2), (3,)))
    problem = Problem((64, 64, 64, 64), 1, 0, (3,), tasks)
    plan = plan_memory(problem)
    check_plan(plan, problem)

    def moved(s: PlannedStep) -> PlannedStep:
        def zero(at: Place) -> Place:
            return replace(at, offset=0) if at.slot == plan.slots - 1 else at

        return replace(s, reads=tuple((v, zero(at)) for v, at in s.reads), writes=tuple((v, zero(at)) for v, at in s.writes))

    with pytest.raises(PlanError, match="does not hold it"):
        check_plan(replace(plan, steps=tuple(map(moved, plan.steps))), problem)
    with pytest.raises(PlanError, match="not in the plan"):
        check_plan(replace(plan, steps=plan.steps[:-1]), problem)


def test_in_place_that_a_kernel_does_not_allow_is_caught() -> None:
    problem = Problem((64, 64), 1, 0, (1,), (Task("a", (0,), (1,)),), ((0, 0),))
    with pytest.raises(PlanError, match="overwrites its operand"):
        at = Place(0, 0, 64)
        step = PlannedStep(0, "a", ((0, at),), ((1, at),))
        check_plan(Plan((step,), 0, ((1, at),), ((0, at),), (), 3), problem)


@pytest.mark.parametrize("keeps", [{"keeps": (1,)}, {"keeps_workspace": True}])
def test_what_a_task_keeps_is_not_used_again(keeps: dict[str, Any]) -> None:
    """A chain of five: what the second task reads, or its workspace, is there at the end."""
    tasks = [Task(f"t{k}", (k,), (k + 1,), 64) for k in range(5)]
    plain = Problem((64,) * 6, 1, 0, (5,), tuple(tasks))
    tasks[1] = replace(tasks[1], **keeps)
    wanted = replace(plain, tasks=tuple(tasks))
    for beside in (False, True):
        plan = plan_memory(wanted, beside=beside)
        check_plan(plan, wanted)
        assert plan.arena_bytes > plan_memory(plain, beside=beside).arena_bytes
        with pytest.raises(PlanError, match=r"step 1 \(t1\) keeps .* used again"):
            check_plan(plan_memory(plain, beside=beside), wanted)


def test_arena_is_no_larger_than_two_values_of_a_chain() -> None:
    tasks = tuple(Task(f"t{k}", (k,), (k + 1,)) for k in range(20))
    plan = plan_memory(Problem((1024,) * 21, 1, 0, (20,), tasks))
    assert plan.arena_bytes == 2048


def test_chain_of_in_place_tasks_needs_one_value() -> None:
    tasks = tuple(Task(f"t{k}", (k,), (k + 1,), 0, frozenset({(0, 0)})) for k in range(20))
    plan = plan_memory(Problem((1024,) * 21, 1, 0, (20,), tasks))
    assert plan.arena_bytes == 1024


def test_elementwise_nodes_work_in_place() -> None:
    x = input_node("x", TensorType(f32, (33,)))
    y = make("exp", make("neg", make("tanh", x)))
    graph = Graph((x,), (make("sin", y),))
    made = assemble(graph, host())
    assert made.plan.arena_bytes == 192
    agree(graph, [np.linspace(-2, 2, 33, dtype=np.float32)])


def test_donated_parameters_are_updated_where_they_lie() -> None:
    w, g = (input_node(n, TensorType(f32, (5, 7)), r) for n, r in (("w", "parameter"), ("g", "data")))
    new = make("sub", w, make("mul", g, g))
    loss = make("sum", make("mul", w, g), axes=(0, 1), keepdims=False)
    graph = Graph((w, g), (new, loss), ("w", "loss"), aliases=((0, 0),))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((5, 7)).astype(np.float32) for _ in range(2))
    found, total = compiled(graph)([a, b])
    np.testing.assert_allclose(found, a - b * b, rtol=1e-6)
    np.testing.assert_allclose(total, (a * b).sum(), rtol=1e-5)
    places = [at.slot for s in assemble(graph, host()).plan.steps for _, at in s.writes]
    assert places.count(0) == 1 and places.count(3) == 1  # no copy: the update writes the input, the loss its output


def test_values_that_an_output_joins_are_written_into_it() -> None:
    """Also where others read them later; a part that stands twice, an input or an output itself leaves the copy there."""
    x, y = (input_node(n, TensorType(f32, (6, 4))) for n in "xy")
    a, b = make("exp", x), make("neg", y)

    def kernels(*parts: object, axis: int = 0) -> list[str]:
        joined = make("concat", *(make("reshape", p, shape=(1, 6, 4)) for p in parts), axis=axis)  # type: ignore[call-overload]  # by op
        graph = Graph((x, y), (joined, make("tanh", make("matmul", a, make("transpose", b, perm=(1, 0))))))
        rng = np.random.default_rng(1)
        runner = agree(graph, [rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2)])
        made = assemble(graph, host())
        check_plan(made.plan, made.problem)
        assert len(runner.program.kernels) == len(made.plan.steps) - sum(s.joined for s in made.plan.steps)
        return [s.name for s in made.plan.steps if s.joined]

    assert len(kernels(a, b)) == 1 and len(kernels(b, a, make("abs", x))) == 1
    assert not kernels(a, b, a) and not kernels(a, x) and not kernels(a, b, axis=2)


def test_a_part_that_lies_elsewhere_is_caught() -> None:
    problem = Problem((8, 8, 16), 1, 0, (2,), (Task("a", (0,), (1,)), Task("join", (1,), (2,), joins=(0,))))
    plan = plan_memory(problem)
    assert plan.steps[-1].joined
    with pytest.raises(PlanError, match="do not lie in its result"):
        check_plan(plan, problem)  # half of the result is nobody's
