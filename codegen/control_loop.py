"""Loops: how each carry is held, where the values of a pass lie, and which passes may run at once. See control.py."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ..ir.dims import as_int
from ..ir.graph import Graph, Node
from ..ir.lowering import Loop
from ..ir.places import Pointer, View
from ..ir.types import TensorType
from . import plan as tree
from .control import (
    Assembly,
    Carry,
    Control,
    Reads,
    Tools,
    Value,
    copy_steps,
    given_value,
    nanoseconds,
    op_names,
    part_of,
    placed,
    static_types,
    view_of,
)
from .control_check import Memory
from .memory_plan import ALIGN, Place, PlannedStep, aligned, check_plan
from .nests import PARALLEL_NS

REGIONS: Final = 16  # threads that a loop without carries can use at most
REGION_BYTES: Final = 32 * 1024 * 1024  # memory that their private regions take together, unless two take more
LONG_NS: Final = 1_000_000.0  # a kernel from which on its own threads serve it better than a loop beside it


@dataclass
class Layout:
    """Where a body's slots are, and the copies (kernel, from, to, carry) before the first and after the last pass."""

    slots: dict[int, View]
    pointers: list[Pointer] = field(default_factory=list)
    before: list[tuple[str, View, View, int]] = field(default_factory=list)
    after: list[tuple[str, View, View, int]] = field(default_factory=list)


@dataclass(frozen=True)
class LoopControl(Control):
    """A Loop. `kept` says what the body's outputs are: ('carry', k) or ('stack', k). `stacks` are positions in the results."""

    form: Loop
    count: int
    body: Assembly
    reads: Reads
    carries: tuple[Carry, ...]
    kept: tuple[tuple[str, int], ...]
    stacks: Mapping[int, int]
    strides: tuple[int, ...]  # bytes of a step of each sequence
    sizes: Mapping[int, int]  # bytes of a step of each stacked result
    names: tuple[int, ...]  # of pointers: two a carry, one for the regions
    regions: int = 0

    def layout(self, step: PlannedStep, count: int) -> Layout:
        """Places for a run of `count` passes (the check asks for fewer than there are)."""
        body, k = self.body, self.form.carries
        way = -1 if self.form.reverse else 1
        first, last = (count - 1, 0) if self.form.reverse else (0, count - 1)
        made = Layout(self.reads.slots(body, step))
        output = {what: body.first_output + q for q, what in enumerate(self.kept)}
        for i, c in enumerate(self.carries):
            init, final, inside = step.reads[i][1], c.final(step), self.names[2 * i : 2 * i + 2]
            stack = step.writes[self.stacks[c.stack]][1] if c.stack >= 0 else None
            made.slots[i] = view_of(init)
            if c.how == "keep":
                assert final is not None
                made.slots[i] = made.slots[output["carry", i]] = view_of(final)
                if final != init:
                    made.before.append((c.copy, view_of(init), view_of(final), i))
            elif c.how == "swap":
                assert final is not None
                spare = part_of(step.workspace, c.spare, c.nbytes)
                turns = (view_of(final), view_of(spare)) if count % 2 else (view_of(spare), view_of(final))
                made.pointers.append(Pointer(inside[0], (turns[1], turns[0]), first=view_of(init)))
                made.pointers.append(Pointer(inside[1], turns))
                made.slots[i], made.slots[output["carry", i]] = (inside[0], 0), (inside[1], 0)
            elif c.how == "stack":
                assert stack is not None
                before = view_of(stack, -way * c.nbytes, c.nbytes)
                made.pointers.append(Pointer(inside[0], (before,), first=view_of(init)))
                made.slots[i] = (inside[0], 0)
                if final is not None:
                    made.after.append((c.copy, view_of(stack, last * c.nbytes), view_of(final), i))
            elif c.how == "past":
                assert stack is not None and final is not None
                made.before.append((c.copy, view_of(init), view_of(stack, first * c.nbytes), i))
                made.slots[i] = view_of(stack, 0, c.nbytes)
                following = view_of(stack, way * c.nbytes, c.nbytes)
                made.pointers.append(Pointer(inside[1], (following,), last=view_of(final)))
                made.slots[output["carry", i]] = (inside[1], 0)
        for q in range(self.form.sequences):
            made.slots[k + q] = view_of(step.reads[k + q][1], 0, self.strides[q])
        for q in range(k + self.form.sequences, len(body.graph.inputs)):
            made.slots[q] = view_of(step.reads[q][1])
        for (kind, j), slot in output.items():
            if kind == "stack":
                made.slots[slot] = view_of(step.writes[self.stacks[j]][1], 0, self.sizes[j])
        if self.regions:
            made.slots[body.arena] = (self.names[-1], 0)
        else:
            made.slots[body.arena] = view_of(part_of(step.workspace, 0, body.plan.arena_bytes))
        for slot in output.values():  # of empty values
            made.slots.setdefault(slot, made.slots[body.arena])
        return made

    def bind(self, step: PlannedStep) -> tree.Node:
        made = self.layout(step, self.count)
        nodes = placed(self.body.nodes, made.slots, counter=True)
        regions = None
        if self.regions:
            size = aligned(self.body.plan.arena_bytes)
            regions = tree.Regions(self.names[-1], view_of(part_of(step.workspace, 0, size)), size, self.regions)
        used = {v[0] for n in tree.walk(nodes) for v in tree.views(n)}
        pointers = tuple(p for p in made.pointers if p.slot in used)
        loop = (tree.Loop(self.count, nodes, self.form.reverse, pointers, regions),) if nodes else ()
        return tree.Block((*copy_steps(made.before), *loop, *copy_steps(made.after)))

    def check(self, step: PlannedStep) -> None:
        body, form = self.body, self.form
        check_plan(body.plan, body.problem)
        count = self.count if self.count <= 5 else 4 + self.count % 2
        made, memory = self.layout(step, count), Memory(self.name, step)
        now = [given_value(step, i) for i in range(form.carries)]
        for _, source, to, i in made.before:
            memory.copy(source, to, self.carries[i].nbytes, now[i])
        constants = self.reads.values(body, step)
        stacked: list[tuple[Place, Value]] = []
        for n in range(count):
            t = count - 1 - n if form.reverse else n
            given = [*now, *(given_value(step, q, t * stride) for q, stride in enumerate(self.strides, form.carries))]
            given += [given_value(step, q) for q in range(len(given), len(body.graph.inputs))]
            slots = _resolved(made, n, count, t)
            results = memory.run(body, slots, given, constants, n)
            made_by = dict(zip(self.kept, results, strict=True))
            old = now
            now = [
                made_by["stack", c.stack] if c.how == "stack" else made_by.get(("carry", i), now[i])
                for i, c in enumerate(self.carries)
            ]
            whole = {j: made_by["stack", j] for kind, j in self.kept if kind == "stack"}
            whole |= {c.stack: old[i] for i, c in enumerate(self.carries) if c.how == "past"}
            for j, value in whole.items():
                at, size = step.writes[self.stacks[j]][1], self.sizes[j]
                stacked.append((Place(at.slot, at.offset + t * size, size), value))
        for _, source, to, i in made.after:
            memory.copy(source, to, self.carries[i].nbytes, now[i])
        for at, value in stacked:
            memory.expect(at, value, f"{self.name}: a stacked result")
        for i, c in enumerate(self.carries):
            if c.write >= 0:
                at = step.writes[c.write][1]
                memory.expect(Place(at.slot, at.offset, c.nbytes), now[i], f"{self.name}: the result of carry {i}")
        # places of the passes that were left out stay inside what the task owns
        made = self.layout(step, self.count)
        for n in {0, 1, self.count - 2, self.count - 1} & set(range(self.count)):
            slots = _resolved(made, n, self.count, self.count - 1 - n if form.reverse else n)
            memory.inside(body, slots)

    @property
    def independent_ns(self) -> float:
        # kernels that keep several threads busy for long are better off one after the other
        longest = max((nanoseconds(k) for k in self.body.kernels if k.parallel), default=0.0)
        return self.body.nanoseconds * self.count if self.carries and longest < LONG_NS else 0.0


def _resolved(made: Layout, n: int, count: int, t: int) -> dict[int, View]:
    """Fixed places of the slots in pass n, whose counter is t."""
    at = {p.slot: p.at(n, count) for p in made.pointers}
    found: dict[int, View] = {}
    for slot, view in made.slots.items():
        v = at.get(view[0], view)
        found[slot] = (v[0], v[1] + (v[2] * t if len(v) > 2 else 0))
    return found


def lower_loop(
    form: Loop, node: Node, used: Collection[int], inputs: Sequence[int], results: Mapping[int, int], tools: Tools, serial: bool
) -> Control:
    """A Loop whose results `used` are wanted. `inputs`, `results`: what addresses are multiples of; `serial`: see Tools."""
    count, k = as_int(form.length), form.carries
    types = static_types(node)
    if not count:  # the results are the operands, and empty stacks
        form = replace(form, body=Graph(form.body.inputs, form.body.inputs[:k]))
        used = [r for r in used if r < k]
    wanted = sorted(used)
    write = {r: position for position, r in enumerate(wanted)}
    stacks = {r - k: write[r] for r in wanted if r >= k}
    body = form.body
    roots = tools.roots(body)
    ways = [_way(form, i, roots, stacks) if types[i].nbytes else "" for i in range(k)]
    while True:
        made = _loop_body(form, ways, stacks, inputs, results, types, tools, serial, count)
        moved = _copied(made[0], made[1])
        if not moved:
            break
        for i in moved:
            ways[i] = "swap"
    block, kept, regions = made[0], made[1], made[2]
    size = aligned(block.plan.arena_bytes)
    workspace = size * max(regions, 1)
    carries: list[Carry] = []
    for i in range(k):
        nbytes, how = types[i].nbytes, ways[i].split()[0] if ways[i] else ""
        stack = int(ways[i].split()[1]) if " " in ways[i] else -1
        work = spare = -1
        if nbytes and i not in write and how != "stack":
            work, workspace = workspace, workspace + aligned(nbytes)
        if how == "swap":
            spare, workspace = workspace, workspace + aligned(nbytes)
        needs_copy = how in ("keep", "past") or (how == "stack" and i in write)
        kernel = tools.copy(types[i].dtype, nbytes) if needs_copy else ""
        carries.append(Carry(how, nbytes, kernel, write.get(i, -1) if nbytes else -1, work, spare, stack))
    in_place = frozenset((write[i], i) for i in range(k) if carries[i].how == "keep" and i in write)
    reads = Reads(len(node.inputs), [block])
    count_of = {h: sum(c.how == h for c in carries) for h in ("stack", "past", "keep", "swap")}
    held = [f"{n} {h}" for h, n in count_of.items() if n]
    note = f"{count} passes of {len(block.kernels)} kernels; carries: {', '.join(held) or 'none'}"
    if regions:
        note += f"; passes on up to {regions} threads"
    return LoopControl(
        name=node.op.name, constants=reads.constants, workspace=workspace, in_place=in_place,
        parallel=bool(regions) or any(x.parallel for x in block.kernels), note=note,
        flops=count * sum(x.flops for x in block.kernels), bytes=count * sum(x.bytes for x in block.kernels),
        nodes=op_names(node, block), form=form, count=count, body=block, reads=reads, carries=tuple(carries), kept=kept,
        stacks=stacks,
        strides=tuple(body.inputs[k + q].tensor.nbytes for q in range(form.sequences)),
        sizes={j: body.outputs[k + j].tensor.nbytes for j in stacks}, names=tuple(tools.pointer() for _ in range(2 * k + 1)),
        regions=regions,
    )  # fmt: skip


def _way(form: Loop, i: int, roots: Sequence[tuple[Node, int]], stacks: Collection[int]) -> str:
    """How to hold carry i, if it can be told before the body is planned: 'stack j', 'past j', else 'keep'."""
    k, inputs = form.carries, set(form.body.inputs)
    old = (form.body.inputs[i], 0)
    if roots[i] == old:
        return "keep"
    if roots[i][0] not in inputs and roots[i][0].inputs:
        for j in stacks:
            if roots[k + j] == roots[i]:
                return f"stack {j}"
    for j in stacks:
        if roots[k + j] == old:
            return f"past {j}"
    return "keep"


def _loop_body(
    form: Loop, ways: Sequence[str], stacks: Collection[int], inputs: Sequence[int], results: Mapping[int, int],
    types: Sequence[TensorType], tools: Tools, serial: bool, count: int,
) -> tuple[Assembly, tuple[tuple[str, int], ...], int]:  # fmt: skip
    """The body's code for carries held in given ways; what its outputs are; and its regions (0: passes in order)."""
    body, k = form.body, form.carries
    past = {int(w.split()[1]) for w in ways if w.startswith("past")}
    kept = [("carry", i) for i in range(k) if not ways[i].startswith("stack")]
    kept += [("stack", j) for j in sorted(stacks) if j not in past]
    outputs = [body.outputs[i if kind == "carry" else k + i] for kind, i in kept]
    aliases = tuple((q, i) for q, (kind, i) in enumerate(kept) if kind == "carry" and ways[i] in ("keep", ""))

    def carry(i: int) -> int:
        """What every place that carry i may have is a multiple of."""
        stacked = [results.get(k + int(w.split()[1]), ALIGN) for w in ways[i : i + 1] if " " in w]
        return math.gcd(inputs[i], results.get(i, ALIGN), *stacked, *([types[i].nbytes] if stacked else []))

    given = [carry(i) for i in range(k)]
    given += [math.gcd(inputs[k + q], body.inputs[k + q].tensor.nbytes) for q in range(form.sequences)]
    given += list(inputs[len(given) :])
    taken = [carry(i) if kind == "carry" else math.gcd(results[k + i], types[k + i].nbytes // max(count, 1)) for kind, i in kept]
    graph = Graph(body.inputs, tuple(outputs), aliases=aliases, name="body")
    block = tools.assemble(graph, given, taken, serial)
    if k or serial or count < 2:
        return block, tuple(kept), 0
    total = block.nanoseconds * count
    longest = max((nanoseconds(x) for x in block.kernels if x.parallel), default=0.0)
    if total < PARALLEL_NS or (longest and count < 8):
        return block, tuple(kept), 0
    block = tools.assemble(graph, given, taken, True)
    most = max(2, REGION_BYTES // max(aligned(block.plan.arena_bytes), 1))
    return block, tuple(kept), min(count, REGIONS, most)


def _copied(block: Assembly, kept: Sequence[tuple[str, int]]) -> set[int]:
    """The carries that were to stay where they are but are copied in a pass."""
    staying = {i for q, (kind, i) in enumerate(kept) if kind == "carry" and (q, i) in block.graph.aliases}
    copies = [(s.reads[0][1].slot, s.writes[0][1].slot) for s in block.plan.steps if s.task < 0]
    # it is written by copying, or saved first because it is read after it is overwritten
    return {i for i in staying if any(to == i or (source == i and to == block.arena) for source, to in copies)}
