"""A loop with what is computed for it alone, as one task: of loops that run at the same time, each with its own preparation.

A recurrence over a sequence follows a product over all its steps. Where as many loops run at once as there are threads, each
thread does both: the product's rows are then in the cache of the core that reads them, and no thread waits in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from . import plan as tree
from .control import Control
from .memory_plan import PlannedStep

Source = tuple[bool, int]  # whether a part's operand is a result of the chain, and which one; else which of its operands


@dataclass(frozen=True)
class KernelControl(Control):
    """A kernel as a part of a chain. `binder` gives its call for its places."""

    binder: Callable[[PlannedStep], tree.Node]

    def bind(self, step: PlannedStep) -> tree.Node:
        return self.binder(step)

    def check(self, step: PlannedStep) -> None:
        """It writes nothing but its results and its workspace, which the plan around the chain has found to be its own."""


@dataclass(frozen=True)
class ChainControl(Control):
    """Parts that run one after the other. `sources`: of each part's operands; `results`: how many each part has."""

    parts: tuple[Control, ...]
    sources: tuple[tuple[Source, ...], ...]
    results: tuple[int, ...]
    operands: int

    def _steps(self, step: PlannedStep) -> list[PlannedStep]:
        steps: list[PlannedStep] = []
        position = {c: self.operands + k for k, c in enumerate(self.constants)}
        put = 0
        for part, sources, m in zip(self.parts, self.sources, self.results, strict=True):
            reads = [step.writes[k] if inner else step.reads[k] for inner, k in sources]
            reads += [step.reads[position[c]] for c in part.constants]
            shared = frozenset(
                (a - put, sources.index((False, b))) for a, b in step.shared if put <= a < put + m and (False, b) in sources
            )
            work = replace(step.workspace, nbytes=part.workspace) if step.workspace and part.workspace else None
            steps.append(PlannedStep(step.task, part.name, tuple(reads), step.writes[put : put + m], work, shared))
            put += m
        return steps

    def bind(self, step: PlannedStep) -> tree.Node:
        return tree.Block(tuple(p.bind(s) for p, s in zip(self.parts, self._steps(step), strict=True)))

    def check(self, step: PlannedStep) -> None:
        for p, s in zip(self.parts, self._steps(step), strict=True):
            p.check(s)


def chain(parts: Sequence[Control], sources: Sequence[Sequence[Source]], results: Sequence[int], operands: int) -> ChainControl:
    """The parts as one task; the last one is what the others were computed for, and alone may write where an operand lies."""
    last, first = parts[-1], sum(results[:-1])
    outer = {j: k for j, (inner, k) in enumerate(sources[-1]) if not inner}
    once = [k for s in sources for inner, k in s if not inner]
    pairs = {(first + a, outer[b]) for a, b in last.in_place if b in outer and once.count(outer[b]) == 1}
    return ChainControl(
        name=last.name, constants=tuple(dict.fromkeys(c for p in parts for c in p.constants)),
        workspace=max(p.workspace for p in parts), in_place=frozenset(pairs), parallel=any(p.parallel for p in parts),
        note=" then ".join(p.note for p in parts), flops=sum(p.flops for p in parts), bytes=sum(p.bytes for p in parts),
        nodes=tuple(dict.fromkeys(n for p in parts for n in p.nodes)), parts=tuple(parts),
        sources=tuple(tuple(s) for s in sources), results=tuple(results), operands=operands,
    )  # fmt: skip


__all__ = ["ChainControl", "KernelControl", "Source", "chain"]
