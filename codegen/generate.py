"""Graph to Program: groups to kernels, values to memory, kernels to machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..ir.graph import Graph, Literal
from ..ir.memory import ArenaUse
from ..ir.program import Argument, KernelInfo, Program
from ..ir.target import Target
from .arena import arena_use
from .assembly import Builder, Choices, check_static, groups_of, problem_of, promises_of, steps_of
from .llvm import Emitted, Workers, begin_emit, emit
from .loop_ir import Call, Kernel, Module, statements
from .loop_text import print_module
from .loop_verify import verify as verify_loops
from .memory_plan import Plan, Problem, check_plan, plan_memory
from .plan import EntryPlan, Step, print_plan, walk
from .plan import Node as PlanNode


class _Texts(Mapping[str, str]):
    """The stages' texts; the long ones are made when they are asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], str]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, str] = {}

    def __getitem__(self, key: str) -> str:
        if key not in self._made:
            self._made[key] = self._makers[key]()
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Assembled:
    """A program before machine code. `entry`'s slots are the inputs, outputs, constants and the arena, in this order."""

    module: Module
    entry: EntryPlan
    problem: Problem
    plan: Plan
    constants: tuple[Literal, ...]
    kernels: tuple[KernelInfo, ...]
    output_align: tuple[tuple[int, int], ...] = ()
    use: ArenaUse = field(default_factory=ArenaUse)


def generate(
    graph: Graph,
    target: Target,
    *,
    name: str = "main",
    threads: int = 2,
    checked: bool = False,
    verify: bool = False,
    texts: bool = True,
    choices: Choices | None = None,
) -> Program:
    """The native program of a graph of static shapes, whose nodes are fused regions and lowered ops.

    `threads` is a hint: no result depends on it. With `checked`, every access compares its index
    with its buffer's shape. With `verify`, the loop IR and the memory plan are verified before code is made of them. With
    `texts`, the program keeps its loop IR, LLVM and assembly texts. `choices` are plans of contractions other than the first.
    Raises CompileError for a node that has no code (naming
    it, its type and what to do), VerifyError for a bug of the generator.
    """
    made = _checked(assemble(graph, target, name=name, threads=threads, choices=choices), checked, verify)
    return _program(graph, target, name, made, emit(made.module, made.entry, target, checked=checked), texts)


def begin(
    graph: Graph,
    target: Target,
    *,
    name: str = "main",
    threads: int = 2,
    checked: bool = False,
    verify: bool = False,
    texts: bool = True,
    choices: Choices | None = None,
    workers: Workers | None = None,
    most: int = 1,
    brief: bool = False,
) -> Callable[[], Program]:
    """As `generate`, but LLVM works in the background, or in `workers` (the program in `most` pieces at most); what is returned
    waits for it and gives the program. `brief` is for a program that runs once: what its code takes to compile counts too."""
    made = _checked(assemble(graph, target, name=name, threads=threads, choices=choices, brief=brief), checked, verify)
    emitted = begin_emit(made.module, made.entry, target, checked=checked, workers=workers, most=most)
    return lambda: _program(graph, target, name, made, emitted(), texts)


def _checked(made: Assembled, checked: bool, verify: bool) -> Assembled:
    if checked or verify:
        check_plan(made.plan, made.problem)
        verify_loops(made.module)
    return made


def _program(graph: Graph, target: Target, name: str, made: Assembled, emitted: Emitted, texts: bool) -> Program:
    return Program(
        name=name,
        target=target,
        inputs=tuple(Argument(str(n.attrs["name"]), n.tensor, str(n.attrs["role"])) for n in graph.inputs),
        outputs=tuple(Argument(o, n.tensor) for o, n in zip(graph.output_names, graph.outputs, strict=True)),
        constants=tuple(c.array for c in made.constants),
        arena_bytes=made.plan.arena_bytes,
        kernels=made.kernels,
        object_code=emitted.object_code,
        aliases=graph.aliases,
        output_align=made.output_align,
        use=made.use,
        texts=_texts(made, emitted) if texts else {},
    )


def assemble(
    graph: Graph,
    target: Target,
    *,
    name: str = "main",
    threads: int = 2,
    choices: Choices | None = None,
    brief: bool = False,
) -> Assembled:
    """The loop IR of a graph's program, with its memory plan: all of `generate` but the machine code."""
    check_static(graph)
    b = Builder(graph, target, threads, choices=choices or {}, brief=brief)
    b.promised = promises_of(b)
    groups = groups_of(b)
    problem, number, constants = problem_of(b, groups)
    plan = plan_memory(problem)
    steps, infos = steps_of(b, groups, plan, constants, number)
    module, entry = Module(_called(b, steps)), EntryPlan(name, tuple(steps))
    roots = enumerate(b.root((o, 0)) for o in graph.outputs)
    output_align = tuple((k, b.promised[r]) for k, r in roots if r in b.promised)
    return Assembled(module, entry, problem, plan, tuple(constants), tuple(infos), output_align, arena_use(problem, plan))


def _called(b: Builder, steps: Sequence[PlanNode]) -> tuple[Kernel, ...]:
    """The kernels that steps call, and those that these call. A body that was planned twice may have left others."""
    if not b.bodies:
        return tuple(b.kernels.values())
    wanted = {n.kernel for n in walk(steps) if isinstance(n, Step)}
    for k in reversed(b.kernels.values()):  # callees come first
        if k.name in wanted:
            wanted.update(s.kernel for s in statements(k.body) if isinstance(s, Call))
    return tuple(k for k in b.kernels.values() if k.name in wanted)


def _texts(made: Assembled, emitted: Emitted) -> Mapping[str, str]:
    def loops() -> str:
        """The kernels; and where there are loops or branches around them, those."""
        plain = all(isinstance(n, Step) for n in made.entry.steps)
        plan = "" if plain else "".join(f"# {line}\n" for line in print_plan(made.entry).splitlines())
        return print_module(made.module) + plan

    return _Texts({"loops": loops, "llvm": lambda: emitted.llvm, "asm": lambda: emitted.asm})


__all__ = ["Assembled", "assemble", "generate"]
