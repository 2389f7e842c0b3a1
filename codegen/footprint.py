"""How much memory a graph would need as a program, without making machine code of it.

`Footprint` is the memory model that the driver hands to passes. It writes the loops of every kernel (their scratch is part
of the answer), but only once for each body: asked again about a slightly different graph, it takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.graph import Graph, Node
from ..ir.memory import Lifetime, MemoryUse
from ..ir.target import Target
from .assembly import Builder, Group, groups_of, problem_of, promises_of
from .groups import Lowered
from .memory_plan import Plan, aligned, plan_memory


@dataclass
class Footprint:
    """The memory that graphs would need on a target; `threads` as for `generate`."""

    target: Target
    threads: int = 2
    cache: dict[tuple[object, ...], Lowered] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def __call__(self, graph: Graph) -> MemoryUse:
        """What a program of this graph of fused regions would use. Raises CompileError as `generate` does."""
        b = Builder(graph, self.target, self.threads, cache=self.cache, names=self.names)
        b.promised = promises_of(b)
        groups = groups_of(b)
        problem, _, _ = problem_of(b, groups)
        plan = plan_memory(problem)
        taken = {o for o, _ in problem.aliases}
        fixed = sum(problem.sizes[: problem.inputs + problem.constants])
        fixed += sum(t.tensor.nbytes for k, t in enumerate(graph.outputs) if k not in taken)
        return MemoryUse(
            order=tuple(groups[s.task].node for s in plan.steps if s.task >= 0),
            values=tuple(lifetimes(groups, plan)),
            workspace=tuple(s.workspace.nbytes if s.workspace else 0 for s in plan.steps if s.task >= 0),
            arena=plan.arena_bytes,
            fixed=fixed,
        )


def lifetimes(groups: Sequence[Group], plan: Plan) -> list[Lifetime]:
    """When each value of the arena is written and needed for the last time, in steps that are kernels."""
    arena = plan.slots - 1
    made: dict[int, tuple[Node, int, int, int, bool]] = {}
    last: dict[int, int] = {}
    at = 0
    for s in plan.steps:
        for v, _ in s.reads:
            last[v] = at
        if s.task < 0:
            continue
        reused = {a for a, _ in s.shared}
        for k, (v, place) in enumerate(s.writes):
            if place.slot == arena and place.nbytes:
                node, index = groups[s.task].results[k]
                made[v] = (node, index, aligned(place.nbytes), at, k in reused)
        at += 1
    return [Lifetime(node, k, n, first, last.get(v, first), shared) for v, (node, k, n, first, shared) in made.items()]
