"""Rematerialisation: the budget holds, every bit is the same, and what cannot be met is said."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.codegen import memory_plan
from tensorwright.codegen.footprint import Footprint
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.memory_plan import PlanError, Problem, Task, check_plan, plan_memory
from tensorwright.driver import build
from tensorwright.frontend.training import training_step
from tensorwright.ir.build import input_node
from tensorwright.ir.errors import CompileError, InputError, ShapeError, ValidationError
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.interp import run
from tensorwright.ir.op import make
from tensorwright.ir.target import row
from tensorwright.ir.types import tensor
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.rematerialise import Rematerialise, _Schedule
from tensorwright.passes.validate import Validator
from tensorwright.runtime.executable import Executable
from tensorwright.settings import flags

TARGET = row("x86-64-v3")
MODEL = Footprint(TARGET)
Array = np.ndarray[Any, Any]


class Residual(nn.Module):
    """Convolutions with batch norm around shortcuts: what a backward pass wants kept."""

    def __init__(self, width: int = 8, depth: int = 6) -> None:
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(depth)])
        self.fc = nn.Linear(width, 4)

    def __call__(self, x: Any) -> Any:
        x = tw.relu(self.stem(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + tw.relu(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


def step_graph(batch: int = 4, side: int = 12) -> tuple[Graph, dict[str, Array]]:
    nn.init.seed(3)
    traced = training_step(
        Residual(), tw.losses.cross_entropy, tw.optim.Adam(1e-2), tw.spec(batch, 3, side, side), tw.spec(batch, dtype="i64")
    )
    return traced.graph, traced.initial_state()


def compiled(graph: Graph, state: dict[str, Array], budget: int | None = None) -> Executable:
    own = {k: v.copy() for k, v in state.items()}
    return build(graph, own, purpose="training", now=replace(flags(), threads=1), memory_budget=budget)


def lowered(graph: Graph) -> Graph:
    return run_pipeline(graph, pipeline.training(TARGET), Context(target=TARGET, preferred_panel=lambda s, t, d: 8), Hooks())


def with_budget(graph: Graph, budget: int, fuel: int | None = None) -> tuple[Graph, Context]:
    ctx = Context(target=TARGET, memory_model=MODEL, fuel=fuel)
    return run_pipeline(graph, [Rematerialise(budget)], ctx, Hooks(verify=True, validate=Validator())), ctx


def test_a_training_step_stays_within_its_budget_with_the_same_bits() -> None:
    graph, state = step_graph()
    whole = compiled(graph, state)
    use = whole.memory
    gradients = sum(v.nbytes for k, v in state.items() if not k.startswith("optimizer"))
    budget = use.state + gradients + use.activations // 2 + use.inputs + use.outputs
    assert budget < use.total, "the budget would not bind, and the test show nothing"
    tight = compiled(graph, state, budget)
    assert tight.memory.total == tight.peak_bytes <= budget
    assert tight.remat is not None and tight.remat.points and tight.remat.peak_after == tight.memory.total
    assert tight.remat.peak_before == use.total
    rng = np.random.default_rng(0)
    rate = np.array(1e-2, np.float32)
    for _ in range(3):
        batch = rng.standard_normal((4, 3, 12, 12), np.float32), rng.integers(0, 4, 4)
        assert whole(rate, *batch).tobytes() == tight(rate, *batch).tobytes()
    before, after = whole.parameters, tight.parameters
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)


def test_gradients_are_the_same_bit_for_bit() -> None:
    """The gradients themselves as outputs, on inputs that make some of them denormal, infinite and NaN too."""

    def loss(x: Any, *weights: Any) -> Any:
        for w in weights:
            x = tw.tanh(tw.exp(x @ w) - 1.0)
        return x.sum()

    specs = [tw.spec(64, 48), *(tw.spec(48, 48) for _ in range(6))]
    fn = tw.grad(loss, argnums=tuple(range(7)))
    whole = tw.compile(fn, *specs, threads=1)
    budget = whole.memory.total - 3 * 64 * 48 * 4
    tight = tw.compile(fn, *specs, threads=1, memory_budget=budget)
    assert tight.memory.total <= budget and tight.remat is not None and tight.remat.points
    rng = np.random.default_rng(1)
    for scale in (0.1, 1.0, 1e-20, 30.0):
        arrays = [(rng.standard_normal(s.type.static_shape) * scale).astype(np.float32) for s in specs]
        for a, b in zip(whole(*arrays), tight(*arrays), strict=True):
            assert a.tobytes() == b.tobytes()


def chain(seed: int) -> Graph:
    """Values made one after the other and read again in another order, much later: random shapes of a backward pass."""
    rng = random.Random(seed)
    x = input_node("x", tensor("f32", (33, 17)))
    w = input_node("w", tensor("f32", (17, 17)))
    made: list[Node] = [x]
    for _ in range(rng.randint(6, 16)):
        a, b = rng.choice(made[-3:]), rng.choice(made)
        kind = rng.choice(("matmul", "exp", "add", "mean"))
        if kind == "matmul":
            made.append(make("matmul", a, w))
        elif kind == "add":
            made.append(make("sub", make("tanh", a), b))
        elif kind == "mean":
            total = make("sum", a, axes=(1,), keepdims=True)
            made.append(make("mul", b, make("broadcast_to", total, shape=a.shape)))
        else:
            made.append(make("sin", make("exp", a)))
    y = made[-1]
    for v in rng.sample(made, len(made)):
        y = make("mul", make("sin", make("matmul", y, w)), v)
    outputs = [y, make("sum", rng.choice(made), axes=(0, 1), keepdims=False)]
    return lowered(Graph((x, w), tuple(outputs)))


def ladder(rungs: int = 8) -> Graph:
    """A chain of products whose values are read once more on the way back."""
    x, w = input_node("x", tensor("f32", (64, 16))), input_node("w", tensor("f32", (16, 16)))
    kept, y = [], x
    for _ in range(rungs):
        y = make("tanh", make("matmul", y, w))
        kept.append(y)
    for v in reversed(kept):
        y = make("sin", make("mul", make("matmul", y, w), v))
    return lowered(Graph((x, w), (y,)))


def test_a_chain_goes_down_to_about_the_square_root() -> None:
    """64 values of a chain in the room of few more than 8 + 8 (Chen et al. 2016), and each is computed at most twice or so."""
    graph = ladder(64)
    use = MODEL(graph)
    one = 64 * 16 * 4
    assert use.arena >= 63 * one
    after, ctx = with_budget(graph, use.fixed + 20 * one)
    assert MODEL(after).arena <= 20 * one
    kernels = sum(p.kernels for p in ctx.notes["rematerialise"].points)  # type: ignore[attr-defined]
    assert kernels <= 2 * 64


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_keep_their_bits_at_any_budget(seed: int) -> None:
    graph = chain(seed)
    use = MODEL(graph)
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(i.tensor.static_shape, np.float32) for i in graph.inputs]
    expected = run(graph, arrays)
    for share in (0.9, 0.7, 0.5, 0.2):
        budget = use.fixed + int(use.arena * share)
        try:
            after, _ = with_budget(graph, budget)
        except CompileError as error:
            least = int(re.search(r"recomputation reached is ([\d,]+)", str(error))[1].replace(",", ""))
            assert budget < least <= use.peak
            if least < use.peak:  # what the error names can be had
                after, _ = with_budget(graph, least)
                assert MODEL(after).peak <= least
            continue
        assert MODEL(after).peak <= budget
        assert Graph.parse(str(after)) == after
        for a, b in zip(expected, run(after, arrays), strict=True):
            assert a.tobytes() == b.tobytes()
        made = assemble(after, TARGET)
        check_plan(made.plan, made.problem)


def test_a_budget_that_is_no_constraint_changes_nothing() -> None:
    graph = chain(0)
    peak = MODEL(graph).peak
    after, ctx = with_budget(graph, peak)
    assert after is graph
    found = ctx.notes["rematerialise"]
    assert found.points == () and found.peak_before == found.peak_after == peak  # type: ignore[attr-defined]
    assert with_budget(graph, 0)[0] is graph


def test_what_cannot_be_met_is_an_error_that_names_the_least() -> None:
    graph, state = step_graph()
    with pytest.raises(CompileError, match=r"a memory budget of 10,000 bytes \(10\.00 kB\) cannot be met: [\d,]+ are inputs"):
        compiled(graph, state, 10_000)
    for wrong in (0, -5, 1.5, True, "8"):
        with pytest.raises(InputError, match="memory_budget is a number of bytes of at least 1"):
            compiled(graph, state, wrong)  # type: ignore[arg-type]
    with pytest.raises(CompileError, match="needs the code generator's memory model"):
        Rematerialise(10).run(chain(0), Context(target=TARGET))


def test_fuel_stops_it_after_a_number_of_points() -> None:
    graph = ladder()
    use = MODEL(graph)
    budget = use.fixed + int(use.arena * 0.7)
    _, ctx = with_budget(graph, budget)
    count = len(ctx.notes["rematerialise"].points)  # type: ignore[attr-defined]
    assert count >= 2 and [a.rule for a in ctx.log] == ["recompute"] * count
    some = Context(target=TARGET, memory_model=MODEL, fuel=1)
    first = Rematerialise(budget).run(graph, some)
    assert len(some.log) == 1
    assert sum(n.op.name == "recompute" for n in first.nodes()) >= 1
    assert Rematerialise(budget).run(graph, Context(target=TARGET, memory_model=MODEL, fuel=0)) is graph


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """What runs again reads another value than it did: validation names the point, and its repro fails again."""
    graph = ladder()
    use = MODEL(graph)
    right = _Schedule.apply

    def wrong(self: _Schedule, choice: Any) -> None:
        right(self, choice)
        again = next(k for k in self.order if k.again == self.number)
        other = next(k for k in self.order if k.sizes and not k.again)
        again.reads = {v: (other, 0) for v in again.reads if v[0].type == other.node.type} or again.reads

    monkeypatch.setattr(_Schedule, "apply", wrong)
    budget = use.fixed + int(use.arena * 0.7)
    ctx = Context(target=TARGET, memory_model=MODEL)
    with pytest.raises(ValidationError, match="guilty rewrite: recompute") as e:
        run_pipeline(graph, [Rematerialise(budget)], ctx, Hooks(validate=Validator(folder=tmp_path)))
    assert f"--passes 'rematerialise{{memory_budget={budget}}}' --validate" in str(e.value)


def test_the_points_are_shown_and_survive_the_cache(tmp_path: Any) -> None:
    def fn(x: Any, w: Any) -> Any:
        kept = [x := tw.tanh(x @ w) for _ in range(6)]
        for v in reversed(kept):
            x = tw.sin(x @ w) * tw.exp(v)
        return x

    specs = tw.spec(128, 64), tw.spec(64, 64)
    with tw.config(cache=str(tmp_path), validate=False, dump=str(tmp_path / "dump")):
        whole = tw.compile(fn, *specs)
        budget = whole.memory.total - 3 * 128 * 64 * 4
        cold = tw.compile(fn, *specs, memory_budget=budget)
    with tw.config(cache=str(tmp_path), validate=False):
        warm = tw.compile(fn, *specs, memory_budget=budget)
    assert warm.compiled.from_cache and not cold.compiled.from_cache
    assert cold.remat is not None and warm.remat == cold.remat and warm.memory == cold.memory
    text = str(cold.remat)
    assert (
        "32.77 kB  f32[128, 64] contract+tanh at test_rematerialise.py:" in text
        and f"with {len(cold.remat.points)} values" in text
    )
    for exe in (cold, warm):
        assert "recompute" in exe.text("rematerialise") and "recompute" not in exe.text("fuse")
    assert whole.remat is None and "rematerialise" not in whole.stages
    assert any("recompute" in p.read_text() for p in (tmp_path / "dump").rglob("*_rematerialise.txt"))


def test_recompute_waits_for_its_other_operands() -> None:
    x = input_node("x", tensor("f32", (8, 8)))
    a = make("exp", x)
    late = make("sum", make("matmul", a, x), axes=(0, 1), keepdims=False)
    b = make("exp", make("recompute", x, late, id=1))
    graph = lowered(Graph((x,), (make("add", a, b), late)))
    made = assemble(graph, TARGET)
    names = [s.name for s in made.plan.steps]
    again = [k for k, s in enumerate(made.plan.steps) if made.problem.tasks[s.task].after]
    assert len(again) == 1 and names[again[0]].startswith("map")
    total = next(v for v in made.problem.tasks[made.plan.steps[again[0]].task].after)
    assert any(total in made.problem.tasks[s.task].writes for s in made.plan.steps[: again[0]])
    with pytest.raises(ShapeError, match="got no operand"):
        make("recompute", id=1)


def test_the_plan_checker_sees_a_step_that_did_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = (Task("late", (0,), (1,)), Task("early", (0,), (2,), after=(1,)))
    problem = Problem((64, 64, 64), 1, 0, (1, 2), tasks)
    plan = plan_memory(problem)
    check_plan(plan, problem)
    assert [s.name for s in plan.steps] == ["late", "early"]
    with pytest.raises(PlanError, match=r"\(early\) runs before the values \[1\]"):
        check_plan(replace(plan, steps=plan.steps[::-1]), problem)
    assert memory_plan.Task("t", (), ()).after == ()
