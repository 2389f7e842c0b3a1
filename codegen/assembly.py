"""A graph's code before machine code: nodes to groups, groups to kernels, values to memory, places to the steps of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Final

from ..ir.build import fused, get, input_node
from ..ir.cost import moved, node_cost
from ..ir.dims import DimExpr
from ..ir.dtypes import DType
from ..ir.errors import CompileError
from ..ir.graph import Graph, Literal, Node
from ..ir.lowering import (
    Attention,
    Branch,
    Coded,
    Contract,
    Decompose,
    Loop,
    Lowering,
    Map,
    Reduce,
    Scan,
    Scatter,
    Sort,
    Sparse,
    Structural,
    View,
    While,
)
from ..ir.op import Trait
from ..ir.program import KernelInfo
from ..ir.target import Target
from ..ir.types import TensorType, TupleType
from .coded import lower_coded
from .contractions import lower_contraction
from .control import Assembly, Control
from .control_branch import lower_branch, lower_while
from .control_loop import lower_loop
from .groups import Lowered, body_name, immediate, is_constant, share_buffers
from .joins import joined
from .loop_ir import Kernel
from .maps import lower_map
from .memory_plan import Plan, PlannedStep, Problem, Task, plan_memory
from .plan import Node as PlanNode
from .plan import Step
from .reduces import lower_reduce
from .rows import lower_rows
from .scans import lower_scan
from .scatter import lower_scatter
from .sections import sections
from .sorts import lower_sort
from .sparse import lower_sparse
from .windows import lower_window

Value = tuple[Node, int]
Choices = Mapping[str, int]  # by what a contraction computes (`contractions_of`), the rank of its plan; 0 where nothing is said
Lower = Callable[[Graph, Target, str, Sequence[int]], Lowered]
_COPY: Final = "copy"
STREAM_ALIGN: Final = 16


@dataclass
class Group:
    """A node that becomes a kernel: its body, and the outer values that are its operands and results."""

    node: Node
    body: Graph
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    lowered: Lowered | Control

    @property
    def name(self) -> str:
        return self.lowered.name if isinstance(self.lowered, Control) else self.lowered.root.name


@dataclass
class Builder:
    graph: Graph
    target: Target
    threads: int
    forms: dict[Node, Lowering] = field(default_factory=dict)
    cache: dict[tuple[object, ...], Lowered] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    shared: dict[tuple[str, tuple[tuple[int, int], ...]], Kernel] = field(default_factory=dict)
    promised: dict[Value, int] = field(default_factory=dict)  # outputs that the runtime aligns: see `promises_of`
    given: dict[Value, int] = field(default_factory=dict)  # what addresses of a body's arguments and results are multiples of
    serial: bool = False  # whether one thread alone runs this body
    controls: dict[tuple[object, ...], Control] = field(default_factory=dict)
    bodies: dict[tuple[object, ...], Assembly] = field(default_factory=dict)
    pointers: list[int] = field(default_factory=list)
    choices: Choices = field(default_factory=dict)
    lowerings: Mapping[str, Lower] | None = None  # by kind of group, for targets that are no processor
    brief: bool = False  # whether short code is wanted more than fast code: it runs once
    outer_align: int = 0  # what addresses of arguments and results are multiples of; 0: an element's size
    inputs: frozenset[Node] = field(init=False, default=frozenset())  # those of the graph

    def __post_init__(self) -> None:
        self.inputs = frozenset(self.graph.inputs)

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

    def waits(self, value: Value) -> list[Value]:
        """What must have been computed before a value is read, though the reader does not read it: other operands of views."""
        found: list[Value] = []
        node = value[0]
        while not node.op.has(Trait.STRUCTURAL) or "index" in node.attrs:
            if "index" not in node.attrs and not isinstance(self.form(node), View):
                break
            found += [self.root((w, 0)) for w in node.inputs[1:]]
            node = node.inputs[0]
        return found

    def type(self, value: Value) -> TensorType:
        t = value[0].type
        return t.items[value[1]] if isinstance(t, TupleType) else t

    @property
    def writes_outputs(self) -> bool:
        """Whether parts of results may be written where the caller wants these: in the program of a processor, not in a body."""
        return not self.given and self.lowerings is None

    def is_control(self, node: Node) -> bool:
        return node.op.has(Trait.CONTROL)

    def fresh_name(self, stem: str) -> str:
        n = self.names.get(stem, 0)
        self.names[stem] = n + 1
        return f"{stem}_{n}"

    # -- what the lowering of control nodes calls: see control.Tools ----------------------------------------------------

    def assemble(self, graph: Graph, inputs: Sequence[int], outputs: Sequence[int], serial: bool) -> Assembly:
        key = (graph, tuple(inputs), tuple(outputs), serial)
        if key not in self.bodies:
            self.bodies[key] = _assembly(self, graph, inputs, outputs, serial)
        return self.bodies[key]

    def copy(self, dtype: DType, nbytes: int) -> str:
        return _copy_kernel(self, dtype, nbytes).name

    def roots(self, graph: Graph) -> list[Value]:
        return [self.root((o, 0)) for o in graph.outputs]

    def pointer(self) -> int:
        self.pointers.append(len(self.pointers))
        return -len(self.pointers)


def check_static(graph: Graph) -> None:
    for n in graph.nodes():
        items = n.type.items if isinstance(n.type, TupleType) else (n.type,)
        for t in items:
            if any(isinstance(d, DimExpr) for d in t.shape):
                names = ", ".join(sorted(t.symbols))
                raise CompileError(f"{n.op.name} has the type {t}: code is generated for given sizes; specialise {names} first")


def _assembly(b: Builder, graph: Graph, inputs: Sequence[int], outputs: Sequence[int], serial: bool) -> Assembly:
    """The code of a body. Kernels, constants by content and names are shared with the program around it."""
    check_static(graph)
    inner = replace(b, graph=graph, promised={}, given={}, serial=serial)
    for value, align in zip([*((i, 0) for i in graph.inputs), *inner.roots(graph)], [*inputs, *outputs], strict=True):
        inner.given[value] = gcd(align, inner.given.get(value, align))
    groups = groups_of(inner)
    problem, number, constants = problem_of(inner, groups)
    plan = plan_memory(problem)
    steps, infos = steps_of(inner, groups, plan, constants, number)
    return Assembly(graph, problem, plan, tuple(constants), tuple(steps), tuple(infos))


def contractions_of(graph: Graph, target: Target) -> dict[str, Graph]:
    """The distinct contractions with their epilogues, by a hash of what they compute, each as a graph of its own that is compiled
    to the same kernel. Those in bodies of loops and branches are among them."""
    found: dict[str, Graph] = {}
    pending = [graph]
    while pending:
        b = Builder(pending.pop(), target, 1)
        for node in needed_of(b)[0]:
            if b.is_control(node):
                pending += [g for g in node.attrs.values() if isinstance(g, Graph)]
                continue
            body, _, kind = body_of(b, node)
            if (kind or _kind(b, body.outputs[0])) == "contraction":
                alone = fused(body, body.inputs, kind) if kind else body.outputs[0]
                outputs = [get(alone, k) for k in range(len(alone.type.items))] if isinstance(alone.type, TupleType) else [alone]
                found.setdefault(body.fingerprint(), Graph(body.inputs, tuple(outputs)))
    return found


# --- groups ---------------------------------------------------------------------------------------------------------


def groups_of(b: Builder) -> list[Group]:
    """One group for each node that needs code, in a topological order."""
    needed, used = needed_of(b)
    outside = {b.root((o, 0)) for o in b.graph.outputs}
    for node in [r[0] for r in outside] if b.writes_outputs else []:
        if node in needed and not b.is_control(node):
            body, operands, _ = body_of(b, node)
            # they may be written into it, and it is anyone's array
            outside |= {b.root(v) for v in operands} if joined(body, b.form) else set()
    groups: list[Group] = []
    for node in b.graph.nodes():
        if node not in needed:
            continue
        if b.is_control(node):
            results = tuple((node, k) for k in sorted(used[node]))
            if any(b.type(r).size for r in results):
                operands = tuple((i, 0) for i in node.inputs)
                groups.append(Group(node, Graph((), ()), operands, results, _control(b, node, operands, results, outside)))
            continue
        body, operands, kind = body_of(b, node)
        count = len(node.type.items) if isinstance(node.type, TupleType) else 1
        results = tuple((node, k) for k in range(count))
        if all(b.type(r).size == 0 for r in results):
            continue
        aligns = tuple(_align(b, v, outside) for v in (*operands, *results))
        groups.append(Group(node, body, operands, results, _lower(b, body, kind, aligns)))
    return groups if b.serial else sections(b, groups, partial(_bind, b))


def _control(b: Builder, node: Node, operands: Sequence[Value], results: Sequence[Value], outside: set[Value]) -> Control:
    """The code of a loop or branch, whose `results` alone are wanted."""
    form, inputs = b.form(node), tuple(_align(b, v, outside) for v in operands)
    aligns = {k: _align(b, (n, k), outside) for n, k in results}
    key = (node, inputs, tuple(aligns.items()), b.serial)
    if key not in b.controls:
        match form:
            case Loop():
                made = lower_loop(form, node, tuple(aligns), inputs, aligns, b, b.serial)
            case Branch():
                made = lower_branch(form, node, tuple(aligns), inputs, aligns, b, b.serial)
            case While():
                made = lower_while(form, node, tuple(aligns), inputs, aligns, b, b.serial)
            case _:
                raise CompileError(f"{node.op.name} {node.type} is no control flow")
        b.controls[key] = made
    return b.controls[key]


def needed_of(b: Builder) -> tuple[set[Node], dict[Node, set[int]]]:
    """The nodes that get a kernel (neither structural, nor views, nor constants folded into their users' code), and which of
    their results something needs."""
    inputs = set(b.graph.inputs)
    wanted: dict[Node, set[int]] = {}
    stack = [b.root((o, 0)) for o in b.graph.outputs]
    while stack:
        node, k = stack.pop()
        if node in wanted:
            wanted[node].add(k)
        elif node not in inputs and not is_constant(node):
            wanted[node] = {k}
            stack += [b.root((i, 0)) for i, c in zip(node.inputs, _filled_operands(b, node), strict=True) if c is None]
    return set(wanted), wanted


def _filled_operands(b: Builder, node: Node) -> list[Node | None]:
    """For each operand of a node with a kernel what is put into its body instead, or None. A contraction reads memory."""
    if b.is_control(node):
        return [None] * len(node.inputs)
    found = [_filled(b, i) for i in node.inputs]
    given = node.attrs.get("body")
    if isinstance(given, Graph):
        number = {p: k for k, p in enumerate(given.inputs)}
        core = [
            n
            for n in given.nodes()
            if n.inputs and not n.op.has(Trait.STRUCTURAL) and isinstance(b.form(n), Contract | Sparse | Coded)
        ]
        read = [i for n in core for i in n.inputs]
        for i in read:
            while i not in number and isinstance(b.form(i), View):
                i = i.inputs[0]
            if i in number:
                found[number[i]] = None
    elif not node.op.has(Trait.STRUCTURAL) and isinstance(b.form(node), Attention | Contract | Sparse | Coded):
        found[:] = [None] * len(found)
    return found


def _filled(b: Builder, node: Node) -> Node | None:
    """The node to put into a user's body if the value is one constant everywhere: a scalar constant, or that broadcast."""
    if node in b.inputs:
        return None
    if is_constant(node):
        return node if immediate(node) is not None else None
    if node.op.has(Trait.STRUCTURAL) or not node.inputs or not node.op.has(Trait.CHEAP):
        return None
    if isinstance(b.form(node), Map | View) and all(is_constant(i) and immediate(i) is not None for i in node.inputs):
        return node
    return None


def promises_of(b: Builder) -> dict[Value, int]:
    """The outputs that far exceed the cache, with STREAM_ALIGN: streaming stores need it, and any new array of numpy's has it.

    Outputs that take the memory of an input are not among them: it may be anyone's.
    """
    roots = [b.root((o, 0)) for o in b.graph.outputs]
    taken = {roots[k] for k, _ in b.graph.aliases}
    return {r: STREAM_ALIGN for r in roots if r[0].inputs and r not in taken and b.type(r).nbytes >= b.target.l3}


def _align(b: Builder, value: Value, outside: set[Value]) -> int:
    """What an address is known to be a multiple of. Arguments may be anyone's arrays: an element's size, but for promises."""
    root = b.root(value)
    if root in b.promised:
        return b.promised[root]
    if root in b.given:
        return b.given[root]
    external = root[0] in b.inputs or root in outside
    return b.outer_align or b.type(value).dtype.itemsize if external else 64


def body_of(b: Builder, node: Node) -> tuple[Graph, tuple[Value, ...], str]:
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


def _lower(b: Builder, body: Graph, kind: str, aligns: tuple[int, ...]) -> Lowered:
    key = (body, kind, aligns)
    found = b.cache.get(key)
    if found is None:
        kind = kind or _kind(b, body.outputs[0])
        stem = f"{kind}_{body_name(body)}"
        name = b.fresh_name("".join(c if c.isalnum() or c == "_" else "_" for c in stem))
        try:
            if b.lowerings is not None:
                found = b.lowerings[kind](body, b.target, name, aligns)
            elif kind == "contraction":
                rank = b.choices.get(body.fingerprint(), 0) if b.choices else 0
                found = lower_contraction(body, b.target, name, aligns, b.threads, rank)
            elif b.brief and kind == "map":
                found = lower_map(body, b.target, name, aligns, brief=True)
            else:
                found = _LOWER[kind](body, b.target, name, aligns)
        except RecursionError:
            raise CompileError(
                f"a {kind} region of {len(body.nodes())} nodes ({body_name(body)}) nests movements too deeply to be inlined: "
                "fuse less"
            ) from None
        b.cache[key] = found
    return found


_LOWER: Final[dict[str, Lower]] = {
    "map": lower_map,
    "rows": lower_rows,
    "reduce": lower_reduce,
    "window": lower_window,
    "scan": lower_scan,
    "scatter": lower_scatter,
    "sort": lower_sort,
    "sparse": lower_sparse,
    "coded": lower_coded,
}


_KINDS: Final[dict[type, str]] = {
    Map: "map", Reduce: "reduce", Scan: "scan", Scatter: "scatter", Sort: "sort", Sparse: "sparse", Coded: "coded",
    Contract: "contraction", Attention: "attention",
}  # fmt: skip


def _kind(b: Builder, node: Node) -> str:
    """Which generator a single node goes to."""
    form = b.form(node)
    kind = "window" if isinstance(form, Reduce) and form.axes is None else _KINDS.get(type(form))
    if isinstance(form, Decompose) and kind not in (_LOWER if b.lowerings is None else b.lowerings):
        raise CompileError(
            f"{node.op.name} {node.type} stands for other ops and has no code of its own: the decompose pass must run before "
            "code generation"
        )
    if kind is None or isinstance(form, Structural):
        raise CompileError(f"{node.op.name} {node.type} cannot be compiled: a pass must expand it before code generation")
    return kind


# --- memory ---------------------------------------------------------------------------------------------------------


def problem_of(b: Builder, groups: Sequence[Group]) -> tuple[Problem, dict[Value, int], list[Literal]]:
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
        if is_constant(root[0]) and root[0] not in b.inputs:
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
        inside = g.lowered if isinstance(g.lowered, Control) else None
        after = tuple(number[w] for v in g.operands for w in b.waits(v) if w in number)
        joins = joined(g.body, b.form) if inside is None and b.writes_outputs else ()
        tasks.append(Task(g.name, tuple(reads), writes, g.lowered.workspace, g.lowered.in_place, after, inside, joins))
    outputs = tuple(number[b.root((o, 0))] for o in graph.outputs)
    problem = Problem(tuple(sizes), len(graph.inputs), len(constants), outputs, tuple(tasks), graph.aliases)
    return problem, number, constants


def steps_of(
    b: Builder, groups: Sequence[Group], plan: Plan, constants: Sequence[Literal], number: dict[Value, int]
) -> tuple[list[PlanNode], list[KernelInfo]]:
    steps: list[PlanNode] = []
    infos: list[KernelInfo] = []
    flops: dict[int, int] = {}  # of what was lowered once for all groups of one body
    kinds = {number[r]: b.type(r) for g in groups for r in g.results}
    kinds |= {number[n, 0]: n.tensor for n in b.graph.inputs}
    kinds |= {len(b.graph.inputs) + k: c.type for k, c in enumerate(constants)}
    for s in plan.steps:
        if s.joined:
            continue
        if s.task < 0:
            copied = _copy(b, s, kinds[s.reads[0][0]])
            steps.append(copied)
            nbytes = s.reads[0][1].nbytes
            note = "an output that is an input, a constant or another output"
            infos.append(KernelInfo(copied.kernel, 0, 2 * nbytes, (_COPY,), note=note))
            continue
        g = groups[s.task]
        if isinstance(g.lowered, Control):
            c = g.lowered
            steps.append(c.bind(s))
            infos.append(KernelInfo(c.name, c.flops, c.bytes, c.nodes, c.parallel, c.note, _weights(b, g)))
            continue
        low = g.lowered
        kernel, views = _bind(b, g, low, s)
        steps.append(Step(kernel.name, views))
        if id(low) not in flops:
            flops[id(low)] = node_cost(g.node).flops
        nodes = tuple(n.op.name for n in g.body.nodes() if n.inputs)
        infos.append(KernelInfo(kernel.name, flops[id(low)], moved(g.node), nodes, low.parallel, low.note, _weights(b, g)))
    return steps, infos


def _weights(b: Builder, g: Group) -> tuple[str, ...]:
    """The names of the graph's inputs that a group reads and that are no data."""
    read = dict.fromkeys(b.root(v)[0] for v in g.operands)
    return tuple(str(n.attrs["name"]) for n in read if n in b.inputs and n.attrs["role"] != "data")


def _bind(b: Builder, g: Group, low: Lowered, s: PlannedStep) -> tuple[Kernel, tuple[tuple[int, int], ...]]:
    """The kernel of a step, its in-place buffers made one, and the place of each of its buffers."""
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


def _copy(b: Builder, s: PlannedStep, t: TensorType) -> Step:
    """A step that copies one value's bytes."""
    source, to = s.reads[0][1], s.writes[0][1]
    kernel = _copy_kernel(b, t.dtype, t.nbytes)
    return Step(kernel.name, ((source.slot, source.offset), (to.slot, to.offset)))


def _copy_kernel(b: Builder, dtype: DType, nbytes: int) -> Kernel:
    flat = input_node("p0", TensorType(dtype, (nbytes // dtype.itemsize,)))
    body = Graph((flat,), (flat,), name=_COPY)
    key: tuple[object, ...] = (body, _COPY)
    if key not in b.cache:
        lower = lower_map if b.lowerings is None else b.lowerings["map"]
        b.cache[key] = lower(body, b.target, b.fresh_name(_COPY), (dtype.itemsize, dtype.itemsize))
    root = b.cache[key].root
    return b.kernels.setdefault(root.name, root)
