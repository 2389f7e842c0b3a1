"""Loops and branches as tasks of a memory plan: where the values of a body lie while it runs, and a check of that.

A body is assembled like a program of its own (`Assembly`): its inputs, outputs, constants and arena are slots. To the plan
around it, a control node is one task that reads its operands and the constants of its bodies, writes its results, and has the
bodies' arenas as workspace. `bind` puts places for the slots: operands and results themselves, so that the slice of a sequence
is read, and that of a stacked result written, where it lies. A carry is held in one of these ways, the first that is possible:

    stack   its new value is also stacked: it is written there, and the next pass reads it from there
    past    its old value is stacked: the new one is written to the next pass's slice, the last one to the result
    keep    it is updated where it lies, as a donated input
    swap    it goes to and fro between two buffers, so that the last pass writes the result; the first reads the operand

`check` carries the first passes out on values in place of bytes and knows nothing of how they were placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..ir.dtypes import DType
from ..ir.graph import Graph, Literal, Node
from ..ir.places import Pointer, View
from ..ir.program import KernelInfo
from ..ir.types import TensorType, TupleType
from . import plan as tree
from .memory_plan import Place, Plan, PlannedStep, Problem, aligned

FLOPS_PER_NS: Final = 50.0
BYTES_PER_NS: Final = 15.0
CALL_NS: Final = 20.0

Id = tuple[object, ...]
Value = tuple[Id, int]  # what bytes hold: a value's name, and from which of its bytes on


@dataclass(frozen=True)
class Assembly:
    """A graph's code with places in slots of its own: inputs, outputs, constants, arena. `kernels` has a row for each node."""

    graph: Graph
    problem: Problem
    plan: Plan
    constants: tuple[Literal, ...]
    nodes: tuple[tree.Node, ...]
    kernels: tuple[KernelInfo, ...]

    @property
    def first_output(self) -> int:
        return len(self.graph.inputs)

    @property
    def first_constant(self) -> int:
        return len(self.graph.inputs) + len(self.graph.outputs)

    @property
    def arena(self) -> int:
        return self.first_constant + len(self.constants)

    @property
    def nanoseconds(self) -> float:
        """About how long a pass takes on one thread."""
        return sum(nanoseconds(k) + CALL_NS for k in self.kernels)


def nanoseconds(k: KernelInfo) -> float:
    return max(k.flops / FLOPS_PER_NS, k.bytes / BYTES_PER_NS)


class Tools(Protocol):
    """What the lowering of a control node needs from the assembly of the graph it stands in."""

    def assemble(self, graph: Graph, inputs: Sequence[int], outputs: Sequence[int], serial: bool) -> Assembly:
        """A body's code; `inputs` and `outputs` are what their addresses are multiples of; `serial`: one thread runs it."""

    def copy(self, dtype: DType, nbytes: int) -> str:
        """The kernel that copies so many bytes."""

    def roots(self, graph: Graph) -> list[tuple[Node, int]]:
        """For each output, the value whose bytes it is."""

    def pointer(self) -> int:
        """A new name for a pointer."""


@dataclass(frozen=True)
class Control:
    """A control node as a task: what `groups.Lowered` is for a kernel."""

    name: str
    constants: tuple[Literal, ...]
    workspace: int
    in_place: frozenset[tuple[int, int]]
    parallel: bool
    note: str
    flops: int
    bytes: int
    nodes: tuple[str, ...]

    def bind(self, step: PlannedStep) -> tree.Node:
        """The node for a planned step: its reads are the operands and the constants, its writes the results."""
        raise NotImplementedError

    def check(self, step: PlannedStep) -> None:
        """Raises PlanError where a body would read what is not there, or write what it must not."""
        raise NotImplementedError

    @property
    def independent_ns(self) -> float:
        """For a loop that is better run beside another one than on threads of its own: about how long it takes. Else 0."""
        return 0.0


def static_types(node: Node) -> tuple[TensorType, ...]:
    return node.type.items if isinstance(node.type, TupleType) else (node.type,)


def view_of(at: Place, more: int = 0, stride: int = 0) -> View:
    return (at.slot, at.offset + more, stride) if stride else (at.slot, at.offset + more)


def part_of(space: Place | None, offset: int, nbytes: int) -> Place:
    return Place(0, 0, 0) if space is None else Place(space.slot, space.offset + offset, nbytes)


def placed(nodes: Iterable[tree.Node], slots: Mapping[int, View], counter: bool) -> tuple[tree.Node, ...]:
    """The nodes with places for slots; with `counter`, inside a loop whose counter the places' strides refer to."""

    def put(v: View) -> View:
        base = slots[v[0]] if v[0] >= 0 else (v[0], 0)
        stride = (*base[2:], 0)[:1] if counter else ()
        made = [base[0], base[1] + v[1], *stride, *v[2:]]
        while len(made) > 2 and made[-1] == 0:
            made.pop()
        return tuple(made)

    def maybe(v: View | None) -> View | None:
        return None if v is None else put(v)

    def block(nodes: Iterable[tree.Node]) -> tuple[tree.Node, ...]:
        return tuple(one(n) for n in nodes)

    def one(node: tree.Node) -> tree.Node:
        match node:
            case tree.Step(kernel, views):
                return tree.Step(kernel, tuple(put(v) for v in views))
            case tree.Block(nodes):
                return tree.Block(block(nodes))
            case tree.Section(nodes):
                return tree.Section(block(nodes))
            case tree.Branch(predicate, then, orelse):
                return tree.Branch(put(predicate), block(then), block(orelse))
            case tree.While(test, predicate, nodes):
                return tree.While(block(test), put(predicate), block(nodes))
            case tree.Loop(count, nodes, reverse, pointers, regions):
                moved = tuple(Pointer(p.slot, tuple(put(v) for v in p.cycle), maybe(p.first), maybe(p.last)) for p in pointers)
                if regions is not None:
                    regions = tree.Regions(regions.slot, put(regions.view), regions.stride, regions.count)
                return tree.Loop(count, block(nodes), reverse, moved, regions)

    return block(nodes)


def op_names(node: Node, *bodies: Assembly) -> tuple[str, ...]:
    return tuple(dict.fromkeys([node.op.name, *(n for b in bodies for k in b.kernels for n in k.nodes)]))


def given_value(step: PlannedStep, k: int, position: int = 0) -> Value:
    return ("given", step.reads[k][0]), position


class Reads:
    """The reads of a task: the operands, then the constants of all bodies, each once."""

    def __init__(self, operands: int, bodies: Sequence[Assembly]) -> None:
        self.operands = operands
        self.constants = tuple(dict.fromkeys(c for b in bodies for c in b.constants))
        self.position = {c: operands + k for k, c in enumerate(self.constants)}

    def slots(self, body: Assembly, step: PlannedStep) -> dict[int, View]:
        """Places for the slots of a body's constants."""
        return {body.first_constant + k: view_of(step.reads[self.position[c]][1]) for k, c in enumerate(body.constants)}

    def values(self, body: Assembly, step: PlannedStep) -> list[Value]:
        """The values of a body's constants, for the check."""
        return [given_value(step, self.position[c]) for c in body.constants]


@dataclass(frozen=True)
class Carry:
    """How a carry is held (`how`), its final place (`write`: the position in the results, or `work`: an offset of the
    workspace, or neither), a second buffer (`spare`: an offset), and the stacked result it shares memory with (`stack`)."""

    how: str
    nbytes: int
    copy: str = ""
    write: int = -1
    work: int = -1
    spare: int = -1
    stack: int = -1

    def final(self, step: PlannedStep) -> Place | None:
        if self.write >= 0:
            return step.writes[self.write][1]
        return None if self.work < 0 else part_of(step.workspace, self.work, self.nbytes)


def copy_steps(copies: Iterable[tuple[str, View, View, int]]) -> list[tree.Step]:
    return [tree.Step(kernel, (source, to)) for kernel, source, to, _ in copies]


@dataclass(frozen=True)
class SectionControl(Control):
    """Control nodes that do not depend on each other as one task, their operands, results and workspaces one after another."""

    parts: tuple[Control, ...]
    operands: tuple[int, ...]  # how many each part has
    results: tuple[int, ...]

    def _steps(self, step: PlannedStep) -> list[PlannedStep]:
        steps: list[PlannedStep] = []
        at = put = space = 0
        position = {c: sum(self.operands) + k for k, c in enumerate(self.constants)}
        for part, n, m in zip(self.parts, self.operands, self.results, strict=True):
            reads = (*step.reads[at : at + n], *(step.reads[position[c]] for c in part.constants))
            shared = frozenset((a - put, b - at) for a, b in step.shared if put <= a < put + m)
            work = part_of(step.workspace, space, part.workspace) if part.workspace else None
            steps.append(PlannedStep(step.task, part.name, reads, step.writes[put : put + m], work, shared))
            at, put, space = at + n, put + m, space + aligned(part.workspace)
        return steps

    def bind(self, step: PlannedStep) -> tree.Node:
        return tree.Section(tuple(p.bind(s) for p, s in zip(self.parts, self._steps(step), strict=True)))

    def check(self, step: PlannedStep) -> None:
        for p, s in zip(self.parts, self._steps(step), strict=True):
            p.check(s)


def join(parts: Sequence[Control], operands: Sequence[int], results: Sequence[int]) -> Control:
    """The parts as one task whose parts run at the same time."""
    pairs: set[tuple[int, int]] = set()
    at = put = 0
    for p, n, m in zip(parts, operands, results, strict=True):
        pairs |= {(put + a, at + b) for a, b in p.in_place}
        at, put = at + n, put + m
    return SectionControl(
        name="section", constants=tuple(dict.fromkeys(c for p in parts for c in p.constants)),
        workspace=sum(aligned(p.workspace) for p in parts), in_place=frozenset(pairs), parallel=True,
        note="at the same time: " + " | ".join(p.note for p in parts), flops=sum(p.flops for p in parts),
        bytes=sum(p.bytes for p in parts), nodes=tuple(dict.fromkeys(n for p in parts for n in p.nodes)), parts=tuple(parts),
        operands=tuple(operands), results=tuple(results),
    )  # fmt: skip
