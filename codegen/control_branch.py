"""Branches, and loops that run until a test fails. See control.py."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..ir.graph import Graph, Node
from ..ir.lowering import Branch, While
from ..ir.places import View
from . import plan as tree
from .control import (
    Assembly,
    Carry,
    Control,
    Reads,
    Tools,
    copy_steps,
    given_value,
    op_names,
    part_of,
    placed,
    static_types,
    view_of,
)
from .control_check import Memory
from .memory_plan import ALIGN, Place, PlannedStep, aligned, check_plan


@dataclass(frozen=True)
class BranchControl(Control):
    """A Branch: both sides write the same results and share the workspace."""

    sides: tuple[Assembly, Assembly]
    reads: Reads

    def _slots(self, body: Assembly, step: PlannedStep) -> dict[int, View]:
        slots = self.reads.slots(body, step)
        slots |= {q: view_of(step.reads[1 + q][1]) for q in range(len(body.graph.inputs))}
        slots |= {body.first_output + q: view_of(at) for q, (_, at) in enumerate(step.writes)}
        slots[body.arena] = view_of(part_of(step.workspace, 0, body.plan.arena_bytes))
        return slots

    def bind(self, step: PlannedStep) -> tree.Node:
        then, orelse = (placed(side.nodes, self._slots(side, step), counter=False) for side in self.sides)
        return tree.Branch(view_of(step.reads[0][1]), then, orelse)

    def check(self, step: PlannedStep) -> None:
        for side in self.sides:
            check_plan(side.plan, side.problem)
            memory = Memory(self.name, step)
            given = [given_value(step, 1 + q) for q in range(len(side.graph.inputs))]
            slots = self._slots(side, step)
            memory.inside(side, slots)
            results = memory.run(side, slots, given, self.reads.values(side, step), 0)
            for k, value in enumerate(results):
                memory.expect(step.writes[k][1], value, f"{self.name}: result {k}")


def lower_branch(
    form: Branch, node: Node, used: Collection[int], inputs: Sequence[int], results: Mapping[int, int], tools: Tools, serial: bool
) -> Control:
    """A Branch whose results `used` are wanted; arguments as of `lower_loop`."""
    wanted = sorted(used)

    def side(body: Graph) -> Assembly:
        graph = Graph(body.inputs, tuple(body.outputs[r] for r in wanted), name="body")
        return tools.assemble(graph, inputs[1:], [results[r] for r in wanted], serial)

    sides = (side(form.then), side(form.orelse))
    reads = Reads(len(node.inputs), sides)
    rows = [s.kernels for s in sides]
    return BranchControl(
        name=node.op.name, constants=reads.constants, workspace=max(s.plan.arena_bytes for s in sides), in_place=frozenset(),
        parallel=any(k.parallel for r in rows for k in r), note=f"one of {len(rows[0])} or {len(rows[1])} kernels",
        flops=max(sum(k.flops for k in r) for r in rows), bytes=max(sum(k.bytes for k in r) for r in rows),
        nodes=op_names(node, *sides), sides=sides, reads=reads,
    )  # fmt: skip


@dataclass(frozen=True)
class WhileControl(Control):
    """A While: its carries stay in one place. The workspace holds the answer, the arena, and carries nobody wants."""

    form: While
    test: Assembly
    body: Assembly
    reads: Reads
    carries: tuple[Carry, ...]

    def _slots(self, body: Assembly, step: PlannedStep) -> tuple[dict[int, View], list[tuple[str, View, View, int]]]:
        slots = self.reads.slots(body, step)
        slots |= {q: view_of(step.reads[q][1]) for q in range(len(body.graph.inputs))}
        copies = []
        for i, c in enumerate(self.carries):
            final, init = c.final(step), step.reads[i][1]
            if final is not None:
                slots[i] = view_of(final)
                if final != init:
                    copies.append((c.copy, view_of(init), view_of(final), i))
        slots |= {body.first_output + q: slots[i] for q, i in body.graph.aliases}
        if body is self.test:
            slots[body.first_output] = view_of(part_of(step.workspace, 0, 1))
        slots[body.arena] = view_of(part_of(step.workspace, ALIGN, body.plan.arena_bytes))
        return slots, copies

    def bind(self, step: PlannedStep) -> tree.Node:
        slots, copies = self._slots(self.test, step)
        test = placed(self.test.nodes, slots, counter=False)
        body = placed(self.body.nodes, self._slots(self.body, step)[0], counter=False)
        return tree.Block((*copy_steps(copies), tree.While(test, view_of(part_of(step.workspace, 0, 1)), body)))

    def check(self, step: PlannedStep) -> None:
        memory = Memory(self.name, step)
        now = [given_value(step, i) for i in range(self.form.carries)]
        (ask, copies), (slots, _) = self._slots(self.test, step), self._slots(self.body, step)
        for body, places in ((self.test, ask), (self.body, slots)):
            check_plan(body.plan, body.problem)
            memory.inside(body, places)
        for _, source, to, i in copies:
            memory.copy(source, to, self.carries[i].nbytes, now[i])
        fixed = [given_value(step, q) for q in range(self.form.carries, len(self.body.graph.inputs))]
        for n in range(3):
            given = [*now, *fixed]
            (answer,) = memory.run(self.test, ask, given, self.reads.values(self.test, step), 2 * n)
            memory.expect(part_of(step.workspace, 0, 1), answer, f"{self.name}: the test")
            if n < 2:
                now = memory.run(self.body, slots, given, self.reads.values(self.body, step), 2 * n + 1)
        for i, c in enumerate(self.carries):
            if c.write >= 0:
                at = step.writes[c.write][1]
                memory.expect(Place(at.slot, at.offset, c.nbytes), now[i], f"{self.name}: the result of carry {i}")


def lower_while(
    form: While, node: Node, used: Collection[int], inputs: Sequence[int], results: Mapping[int, int], tools: Tools, serial: bool
) -> Control:
    """A While whose results `used` are wanted; arguments as of `lower_loop`."""
    types, k = static_types(node), form.carries
    write = {r: position for position, r in enumerate(sorted(used))}
    given = [math.gcd(inputs[i], results.get(i, ALIGN)) for i in range(k)] + list(inputs[k:])
    test = tools.assemble(Graph(form.test.inputs, form.test.outputs, name="test"), given, [ALIGN], serial)
    graph = Graph(form.body.inputs, form.body.outputs, aliases=tuple((i, i) for i in range(k)), name="body")
    body = tools.assemble(graph, given, given[:k], serial)
    workspace = ALIGN + aligned(max(test.plan.arena_bytes, body.plan.arena_bytes))
    carries: list[Carry] = []
    for i in range(k):
        nbytes, work = types[i].nbytes, -1
        if not nbytes:
            carries.append(Carry("", 0))
            continue
        if i not in write:
            work, workspace = workspace, workspace + aligned(nbytes)
        carries.append(Carry("keep", nbytes, tools.copy(types[i].dtype, nbytes), write.get(i, -1), work))
    reads = Reads(len(node.inputs), [test, body])
    rows = [*test.kernels, *body.kernels]
    return WhileControl(
        name=node.op.name, constants=reads.constants, workspace=workspace,
        in_place=frozenset((write[i], i) for i in range(k) if i in write and types[i].nbytes),
        parallel=any(x.parallel for x in rows), flops=sum(x.flops for x in rows), bytes=sum(x.bytes for x in rows),
        note=f"test of {len(test.kernels)} kernels, pass of {len(body.kernels)}; flops and bytes are those of one pass",
        nodes=op_names(node, test, body), form=form, test=test, body=body, reads=reads, carries=tuple(carries),
    )  # fmt: skip
