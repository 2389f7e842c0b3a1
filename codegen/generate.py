"""Graph to Program: groups to kernels, values to memory, kernels to machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ..ir.build import input_node
from ..ir.cost import node_cost
from ..ir.dims import DimExpr
from ..ir.errors import CompileError
from ..ir.graph import Graph, Literal, Node
from ..ir.lowering import Contract, Decompose, Lowering, Map, Reduce, Scan, Scatter, Structural, View
from ..ir.op import Trait
from ..ir.program import Argument, KernelInfo, Program
from ..ir.target import Target
from ..ir.types import TensorType, TupleType
from .contractions import lower_contraction
from .groups import Lowered, body_name, immediate, is_constant, share_buffers
from .llvm import Emitted, begin_emit, emit
from .loop_ir import Kernel, Module
from .loop_text import print_module
from .loop_verify import verify as verify_loops
from .maps import lower_map
from .memory_plan import Plan, PlannedStep, Problem, Task, check_plan, plan_memory
from .plan import EntryPlan, Step
from .reduces import lower_reduce
from .rows import lower_rows
from .scans import lower_scan
from .scatter import lower_scatter

Value = tuple[Node, int]
_COPY: Final = "copy"
STREAM_ALIGN: Final = 16


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


@dataclass
class _Group:
    """A node that becomes a kernel: its body, and the outer values that are its operands and results."""

    node: Node
    body: Graph
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    lowered: Lowered


@dataclass
class _Builder:
    graph: Graph
    target: Target
    threads: int
    forms: dict[Node, Lowering] = field(default_factory=dict)
    cache: dict[tuple[object, ...], Lowered] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    shared: dict[tuple[str, tuple[tuple[int, int], ...]], Kernel] = field(default_factory=dict)
    promised: dict[Value, int] = field(default_factory=dict)  # outputs that the runtime aligns: see `_promises`

    def form(self, node: Node) -> Lowering:
        found = self.forms.get(node)
        if found is None:
            found = self.forms[node] = node.op.lower(node)
        return found

    def root(self, value: Value) -> Value:
        """The value whose bytes these are: through views, and through the parts of several outputs."""
        node, k = value
        while True:
            if node.op.has(Trait.STRUCTURAL) and "index" in node.attrs:
                node, k = node.inputs[0], int(node.attrs["index"])
            elif not node.op.has(Trait.STRUCTURAL) and isinstance(self.form(node), View):
                node, k = node.inputs[0], 0
            else:
                return node, k

    def type(self, value: Value) -> TensorType:
        t = value[0].type
        return t.items[value[1]] if isinstance(t, TupleType) else t

    def fresh_name(self, stem: str) -> str:
        n = self.names.get(stem, 0)
        self.names[stem] = n + 1
        return f"{stem}_{n}"


def generate(
    graph: Graph,
    target: Target,
    *,
    name: str = "main",
    threads: int = 2,
    checked: bool = False,
    verify: bool = False,
    texts: bool = True,
) -> Program:
    """The native program of a graph of static shapes, whose nodes are fused regions and lowered ops.

    `threads` is a hint: neither the result nor the memory depends on it. With `checked`, every access compares its index
    with its buffer's shape. With `verify`, the loop IR and the memory plan are verified before code is made of them. With
    `texts`, the program keeps its loop IR, LLVM and assembly texts. Raises CompileError for a node that has no code (naming
    it, its type and what to do), VerifyError for a bug of the generator.
    """
    made = _checked(assemble(graph, target, name=name, threads=threads), checked, verify)
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
) -> Callable[[], Program]:
    """As `generate`, but LLVM works in the background; what is returned waits for it and gives the program."""
    made = _checked(assemble(graph, target, name=name, threads=threads), checked, verify)
    emitted = begin_emit(made.module, made.entry, target, checked=checked)
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
        texts=_texts(made.module, emitted) if texts else {},
    )


def assemble(graph: Graph, target: Target, *, name: str = "main", threads: int = 2) -> Assembled:
    """The loop IR of a graph's program, with its memory plan: all of `generate` but the machine code."""
    _check_static(graph)
    b = _Builder(graph, target, threads)
    b.promised = _promises(b)
    groups = _groups(b)
    problem, number, constants = _problem(b, groups)
    plan = plan_memory(problem)
    steps, infos = _steps(b, groups, plan, constants, number)
    module, entry = Module(tuple(b.kernels.values())), EntryPlan(name, tuple(steps))
    roots = enumerate(b.root((o, 0)) for o in graph.outputs)
    output_align = tuple((k, b.promised[r]) for k, r in roots if r in b.promised)
    return Assembled(module, entry, problem, plan, tuple(constants), tuple(infos), output_align)


def _texts(module: Module, emitted: Emitted) -> Mapping[str, str]:
    return _Texts({"loops": lambda: print_module(module), "llvm": lambda: emitted.llvm, "asm": lambda: emitted.asm})


def _check_static(graph: Graph) -> None:
    for n in graph.nodes():
        items = n.type.items if isinstance(n.type, TupleType) else (n.type,)
        for t in items:
            if any(isinstance(d, DimExpr) for d in t.shape):
                names = ", ".join(sorted(t.symbols))
                raise CompileError(f"{n.op.name} has the type {t}: code is generated for given sizes; specialise {names} first")


# --- groups ---------------------------------------------------------------------------------------------------------


def _groups(b: _Builder) -> list[_Group]:
    """One group for each node that needs code, in a topological order."""
    needed = _needed(b)
    outside = {b.root((o, 0)) for o in b.graph.outputs}
    groups: list[_Group] = []
    for node in b.graph.nodes():
        if node not in needed:
            continue
        body, operands, kind = _body(b, node)
        count = len(node.type.items) if isinstance(node.type, TupleType) else 1
        results = tuple((node, k) for k in range(count))
        if all(b.type(r).size == 0 for r in results):
            continue
        aligns = tuple(_align(b, v, outside) for v in (*operands, *results))
        groups.append(_Group(node, body, operands, results, _lower(b, body, kind, aligns)))
    return groups


def _needed(b: _Builder) -> set[Node]:
    """The nodes that get a kernel: neither structural, nor views, nor constants folded into their users' code."""
    inputs = set(b.graph.inputs)
    wanted: set[Node] = set()
    stack = [b.root((o, 0))[0] for o in b.graph.outputs]
    while stack:
        node = stack.pop()
        if node in wanted or node in inputs or is_constant(node):
            continue
        wanted.add(node)
        stack += [b.root((i, 0))[0] for i, c in zip(node.inputs, _filled_operands(b, node), strict=True) if c is None]
    return wanted


def _filled_operands(b: _Builder, node: Node) -> list[Node | None]:
    """For each operand of a node with a kernel what is put into its body instead, or None. A contraction reads memory."""
    found = [_filled(b, i) for i in node.inputs]
    given = node.attrs.get("body")
    if isinstance(given, Graph):
        number = {p: k for k, p in enumerate(given.inputs)}
        core = [n for n in given.nodes() if n.inputs and not n.op.has(Trait.STRUCTURAL) and isinstance(b.form(n), Contract)]
        read = [i for n in core for i in n.inputs]
        for i in read:
            while i not in number and isinstance(b.form(i), View):
                i = i.inputs[0]
            if i in number:
                found[number[i]] = None
    elif not node.op.has(Trait.STRUCTURAL) and isinstance(b.form(node), Contract):
        found[:] = [None] * len(found)
    return found


def _filled(b: _Builder, node: Node) -> Node | None:
    """The node to put into a user's body if the value is one constant everywhere: a scalar constant, or that broadcast."""
    if node in b.graph.inputs:
        return None
    if is_constant(node):
        return node if immediate(node) is not None else None
    if node.op.has(Trait.STRUCTURAL) or not node.inputs or not node.op.has(Trait.CHEAP):
        return None
    if isinstance(b.form(node), Map | View) and all(is_constant(i) and immediate(i) is not None for i in node.inputs):
        return node
    return None


def _promises(b: _Builder) -> dict[Value, int]:
    """The outputs that far exceed the cache, with STREAM_ALIGN: streaming stores need it, and any new array of numpy's has it.

    Outputs that take the memory of an input are not among them: it may be anyone's.
    """
    roots = [b.root((o, 0)) for o in b.graph.outputs]
    taken = {roots[k] for k, _ in b.graph.aliases}
    return {r: STREAM_ALIGN for r in roots if r[0].inputs and r not in taken and b.type(r).nbytes >= b.target.l3}


def _align(b: _Builder, value: Value, outside: set[Value]) -> int:
    """What an address is known to be a multiple of. Arguments may be anyone's arrays: an element's size, but for promises."""
    root = b.root(value)
    if root in b.promised:
        return b.promised[root]
    external = root[0] in b.graph.inputs or root in outside
    return b.type(value).dtype.itemsize if external else 64


def _body(b: _Builder, node: Node) -> tuple[Graph, tuple[Value, ...], str]:
    """A node as a body with inputs p0, p1, ...; constants that fill an operand are put into it."""
    given = node.attrs.get("body")
    inner: dict[Node, Node] = {}
    operands: dict[Value, Node] = {}
    stand_ins: list[Node] = []
    values: list[Value] = []
    for operand, filled in zip(node.inputs, _filled_operands(b, node), strict=True):
        if filled is not None:
            stand_ins.append(filled)
            continue
        value = (operand, 0)
        if value not in operands:
            operands[value] = input_node(f"p{len(operands)}", operand.tensor)
            values.append(value)
        stand_ins.append(operands[value])
    arguments = tuple(operands.values())
    if isinstance(given, Graph):
        replaced = dict(zip(given.inputs, stand_ins, strict=True))

        def rule(n: Node, inputs: tuple[Node, ...]) -> Node:
            return n.replace(inputs)

        for n in given.nodes():
            inner[n] = replaced[n] if n in replaced else rule(n, tuple(inner[i] for i in n.inputs))
        outputs = tuple(inner[o] for o in given.outputs)
        return Graph(arguments, outputs, name="body"), tuple(values), str(node.attrs["kind"])
    made = node.replace(tuple(stand_ins))
    return Graph(arguments, (made,), name="body"), tuple(values), ""


def _lower(b: _Builder, body: Graph, kind: str, aligns: tuple[int, ...]) -> Lowered:
    key = (body, kind, aligns)
    found = b.cache.get(key)
    if found is None:
        kind = kind or _kind(b, body.outputs[0])
        stem = f"{kind}_{body_name(body)}"
        name = b.fresh_name("".join(c if c.isalnum() or c == "_" else "_" for c in stem))
        try:
            if kind == "contraction":
                found = lower_contraction(body, b.target, name, aligns, b.threads)
            else:
                found = _LOWER[kind](body, b.target, name, aligns)
        except RecursionError:
            raise CompileError(
                f"a {kind} region of {len(body.nodes())} nodes ({body_name(body)}) nests movements too deeply to be inlined: "
                "fuse less"
            ) from None
        b.cache[key] = found
    return found


_LOWER: Final[dict[str, Callable[[Graph, Target, str, Sequence[int]], Lowered]]] = {
    "map": lower_map,
    "rows": lower_rows,
    "reduce": lower_reduce,
    "scan": lower_scan,
    "scatter": lower_scatter,
}


def _kind(b: _Builder, node: Node) -> str:
    """Which generator a single node goes to."""
    form = b.form(node)
    if isinstance(form, Decompose):
        raise CompileError(
            f"{node.op.name} {node.type} stands for other ops and has no code of its own: the decompose pass must run before "
            "code generation"
        )
    kinds: dict[type, str] = {Map: "map", Reduce: "reduce", Scan: "scan", Scatter: "scatter", Contract: "contraction"}
    kind = kinds.get(type(form))
    if kind is None or isinstance(form, Structural):
        raise CompileError(f"{node.op.name} {node.type} cannot be compiled: a pass must expand it before code generation")
    return kind


# --- memory ---------------------------------------------------------------------------------------------------------


def _problem(b: _Builder, groups: Sequence[_Group]) -> tuple[Problem, dict[Value, int], list[Literal]]:
    """The planning problem, each value's number, and the constants that need memory."""
    graph = b.graph
    number: dict[Value, int] = {}
    sizes: list[int] = []

    def add(value: Value, t: TensorType) -> int:
        number[value] = len(sizes)
        sizes.append(t.nbytes)
        return number[value]

    for n in graph.inputs:
        add((n, 0), n.tensor)
    literals: dict[Literal, int] = {}
    constants: list[Literal] = []

    def constant(value: Literal) -> int:
        if value not in literals:
            literals[value] = len(sizes)
            sizes.append(value.type.nbytes)
            constants.append(value)
        return literals[value]

    outer = [b.root(v) for g in groups for v in g.operands] + [b.root((o, 0)) for o in graph.outputs]
    for root in outer:
        if is_constant(root[0]) and root[0] not in graph.inputs:
            number[root] = constant(root[0].attrs["value"])
    for g in groups:
        for c in g.lowered.constants:
            constant(c)
    for g in groups:
        for r in g.results:
            add(r, b.type(r))
    for o in graph.outputs:
        if b.root((o, 0)) not in number:  # an empty value: no step writes it
            add(b.root((o, 0)), b.type(b.root((o, 0))))
    tasks: list[Task] = []
    for g in groups:
        for v in g.operands:
            root = b.root(v)
            if root not in number:
                add(root, b.type(root))
        reads = [number[b.root(v)] for v in g.operands] + [literals[c] for c in g.lowered.constants]
        writes = tuple(number[r] for r in g.results)
        tasks.append(Task(g.lowered.root.name, tuple(reads), writes, g.lowered.workspace, g.lowered.in_place))
    outputs = tuple(number[b.root((o, 0))] for o in graph.outputs)
    problem = Problem(tuple(sizes), len(graph.inputs), len(constants), outputs, tuple(tasks), graph.aliases)
    return problem, number, constants


def _steps(
    b: _Builder, groups: Sequence[_Group], plan: Plan, constants: Sequence[Literal], number: dict[Value, int]
) -> tuple[list[Step], list[KernelInfo]]:
    steps: list[Step] = []
    infos: list[KernelInfo] = []
    kinds = {number[r]: b.type(r) for g in groups for r in g.results}
    kinds |= {number[n, 0]: n.tensor for n in b.graph.inputs}
    kinds |= {len(b.graph.inputs) + k: c.type for k, c in enumerate(constants)}
    for s in plan.steps:
        if s.task < 0:
            steps.append(_copy(b, s, kinds[s.reads[0][0]]))
            nbytes = s.reads[0][1].nbytes
            note = "an output that is an input, a constant or another output"
            infos.append(KernelInfo(steps[-1].kernel, 0, 2 * nbytes, (_COPY,), note=note))
            continue
        g = groups[s.task]
        kernel, views = _bind(b, g, s)
        steps.append(Step(kernel.name, views))
        cost = node_cost(g.node)
        nodes = tuple(n.op.name for n in g.body.nodes() if n.inputs)
        infos.append(KernelInfo(kernel.name, cost.flops, cost.bytes, nodes, g.lowered.parallel, g.lowered.note))
    return steps, infos


def _bind(b: _Builder, g: _Group, s: PlannedStep) -> tuple[Kernel, tuple[tuple[int, int], ...]]:
    """The kernel of a step, its in-place buffers made one, and the place of each of its buffers."""
    low = g.lowered
    for k in low.kernels[:-1]:
        b.kernels.setdefault(k.name, k)
    n = len(g.operands)
    places = {("operand", k): at for k, (_, at) in enumerate(s.reads[:n])}
    places |= {("constant", k): at for k, (_, at) in enumerate(s.reads[n:])}
    places |= {("output", k): at for k, (_, at) in enumerate(s.writes)}
    if s.workspace is not None:
        for a in low.arguments:
            if a[0] == "workspace":
                places[a] = replace(s.workspace, offset=s.workspace.offset + a[1])
    position = {a: k for k, a in enumerate(low.arguments)}
    pairs = {position["operand", u]: position["output", v] for v, u in s.shared if ("operand", u) in position}
    kernel = low.root
    if pairs:
        key = (kernel.name, tuple(sorted(pairs.items())))
        if key not in b.shared:
            merged = share_buffers(kernel, pairs)
            b.shared[key] = replace(merged, name=b.fresh_name(f"{kernel.name}_in_place"))
        kernel = b.shared[key]
    b.kernels.setdefault(kernel.name, kernel)
    kept = [a for k, a in enumerate(low.arguments) if k not in pairs]
    return kernel, tuple((places[a].slot, places[a].offset) for a in kept)


def _copy(b: _Builder, s: PlannedStep, t: TensorType) -> Step:
    """A step that copies one value's bytes."""
    source, to = s.reads[0][1], s.writes[0][1]
    flat = input_node("p0", TensorType(t.dtype, (t.nbytes // t.dtype.itemsize,)))
    body = Graph((flat,), (flat,), name=_COPY)
    key: tuple[object, ...] = (body, _COPY)
    if key not in b.cache:
        b.cache[key] = lower_map(body, b.target, b.fresh_name(_COPY), (t.dtype.itemsize, t.dtype.itemsize))
    low = b.cache[key]
    b.kernels.setdefault(low.root.name, low.root)
    return Step(low.root.name, ((source.slot, source.offset), (to.slot, to.offset)))


__all__ = ["Assembled", "assemble", "generate"]
