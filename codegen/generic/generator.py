"""A graph with symbolic sizes to one object file: nodes to kernels, values to slots, loops and branches around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...ir import places
from ...ir.build import input_node
from ...ir.dims import Dim, product
from ...ir.errors import CompileError, ShapeError
from ...ir.graph import Graph, Literal, Node
from ...ir.lowering import Branch, Contract, Loop, Map, Reduce, Scan, Scatter, Sort, View, While
from ...ir.op import Trait
from ...ir.program import Argument, KernelInfo
from ...ir.target import Target
from ...ir.types import TensorType, TupleType
from .. import plan
from ..assembly import Builder, Value, body_of, needed_of
from ..groups import body_name, is_constant
from ..llvm import emit
from ..loop_ir import Kernel, Module
from ..loop_text import print_module
from ..loop_verify import verify as verify_loops
from ..plan import EntryPlan, Step
from .body import GenericBody, UnsupportedError
from .contraction import Tile
from .elementwise import groups_by_shape, map_statements
from .loops import SIZES, kernel
from .program import GenericProgram, Place
from .reductions import reduce_statements
from .steps import slice_kernel, stack_kernel, start_kernel, step_kernel, test_kernel
from .updates import scan_statements, scatter_statements, sort_statements

Argument_ = tuple[str, int]
_ALIGN: Final = 64
# slots before their numbers are known: how many constants and places there are, only the whole program says
_CONSTANT, _PLACE, _TABLE = 1 << 20, 1 << 40, 1 << 60


@dataclass
class _Call:
    """A kernel of a group, and what its buffers are: ('operand' | 'output' | 'constant' | 'workspace' | 'sizes', number)."""

    kernel: Kernel
    arguments: tuple[Argument_, ...]
    parallel: bool


@dataclass
class _Group:
    node: Node
    body: Graph
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    calls: list[_Call] = field(default_factory=list)
    constants: list[Literal] = field(default_factory=list)
    workspaces: list[tuple[Dim, int]] = field(default_factory=list)  # elements, bytes of each


def generate_generic(graph: Graph, target: Target, *, name: str = "main", verify: bool = False) -> GenericProgram:
    """The program of a graph for all sizes of its symbolic dimensions; its nodes are fused regions and lowered ops.

    Raises CompileError that lists every node which such programs do not carry.
    """
    return _Generator(graph, target, name, verify).run()


def refusal(name: str, failed: Sequence[str]) -> CompileError:
    """The error that lists what a program for every size does not carry."""
    more = f"\n  and {len(failed) - 20} more" if len(failed) > 20 else ""
    return CompileError(
        f"{name}: a program for every size (dynamic='generic') does not carry {len(failed)} of its nodes; "
        "compile it with dynamic='specialise', which makes a program for each size:\n" + "\n".join(failed[:20]) + more
    )


def check_forms(graph: Graph) -> None:
    """Raises CompileError that lists the nodes whose records need their sizes as numbers."""
    failed: list[str] = []
    for node in graph.nodes():
        if node.inputs and not node.op.has(Trait.STRUCTURAL):
            try:
                node.op.lower(node)
            except ShapeError as error:
                failed.append(f"  {node.op.name} {node.type}{_where(graph, node)}: {error}")
    if failed:
        raise refusal(graph.name, failed)


def _where(graph: Graph, node: Node) -> str:
    label = graph.labels.get(node)
    return "" if label is None or label.location is None else f" ({label.location})"


class _Generator:
    def __init__(self, graph: Graph, target: Target, name: str, verify: bool) -> None:
        self.graph, self.target, self.name, self.verify = graph, target, name, verify
        self.b = Builder(graph, target, 1)
        self.symbols = tuple(sorted(frozenset().union(*(i.tensor.symbols for i in graph.inputs))))
        self.cache: dict[tuple[object, ...], tuple[list[_Call], list[Literal], list[tuple[Dim, int]]]] = {}
        self.kernels: dict[str, Kernel] = {}
        self.constants: dict[Literal, int] = {}
        self.places: list[Place] = []
        self.checks: dict[Dim, str] = {}
        self.failed: list[str] = []

    def run(self) -> GenericProgram:
        graph = self.graph
        if graph.aliases:
            raise CompileError(f"{graph.name} updates inputs in place; dynamic='generic' is for inference")
        n_in, n_out = len(graph.inputs), len(graph.outputs)
        made = self._emit(self.b, range(n_in), range(n_in, n_in + n_out), None)
        if self.failed:
            raise refusal(graph.name, self.failed)
        after = n_in + n_out + len(self.constants)

        def slot(k: int) -> int:
            if k >= _TABLE:
                return after
            if k >= _PLACE:
                return after + 2 + k - _PLACE
            return n_in + n_out + k - _CONSTANT if k >= _CONSTANT else k

        steps = tuple(_renumbered(node, slot) for node, _, _ in made)
        module = Module(tuple(self.kernels.values()))
        if self.verify:
            verify_loops(module)
        emitted = emit(module, EntryPlan(self.name, steps), self.target)
        return GenericProgram(
            name=self.name,
            target=self.target,
            symbols=self.symbols,
            inputs=tuple(Argument(str(n.attrs["name"]), n.tensor, str(n.attrs["role"])) for n in graph.inputs),
            outputs=tuple(Argument(o, n.tensor) for o, n in zip(graph.output_names, graph.outputs, strict=True)),
            constants=tuple(c.array for c in self.constants),
            places=tuple(self.places),
            checks=tuple(self.checks.items()),
            kernels=tuple(info for _, info, _ in made),
            work=tuple(work for _, _, work in made),
            object_code=emitted.object_code,
            texts={"loops": print_module(module), "llvm": emitted.llvm, "asm": emitted.asm},
        )

    # -- values to slots ----------------------------------------------------------------------------------------------

    def _place(self, size: Dim, itemsize: int, first: int, last: int) -> int:
        self.places.append(Place(size, itemsize, first, last))
        return _PLACE + len(self.places) - 1

    def _constant(self, value: Literal) -> int:
        return _CONSTANT + self.constants.setdefault(value, len(self.constants))

    def _emit(
        self, b: Builder, inputs: Sequence[int], outputs: Sequence[int], within: int | None
    ) -> list[tuple[plan.Node, KernelInfo, tuple[Dim, Dim]]]:
        """The steps of a graph whose inputs and outputs have slots, each with its cost. `within` is the number of the step of
        the program that it is the body of: what it makes lives for that one."""
        graph = b.graph
        self._check(graph)
        groups = self._groups(b)
        roots = [b.root((o, 0)) for o in graph.outputs]
        written = {r for g in groups for r in g.results}
        slots: dict[Value, int] = {(n, 0): s for n, s in zip(graph.inputs, inputs, strict=True)}
        copies: list[tuple[int, Value]] = []
        for s, r in zip(outputs, roots, strict=True):
            if r in written and r not in slots:
                slots[r] = s
            else:
                copies.append((s, r))
        lives = _lifetimes(b, groups, copies)

        def slot_of(v: Value) -> int:
            r = b.root(v)
            if r not in slots:
                if is_constant(r[0]):
                    return self._constant(r[0].attrs["value"])
                t = b.type(r)
                first, last = lives.get(r, (0, len(groups))) if within is None else (within, within)
                slots[r] = self._place(product(t.shape), t.dtype.itemsize, first, last)
            return slots[r]

        made: list[tuple[plan.Node, KernelInfo, tuple[Dim, Dim]]] = []
        for number, g in enumerate(groups):
            here = number if within is None else within
            names = tuple(n.op.name for n in g.body.nodes() if n.inputs)
            if b.is_control(g.node):
                node = self._control(b, g, [slot_of(v) for v in g.operands], [slot_of(v) for v in g.results], here)
                made.append((node, KernelInfo(g.node.op.name, 0, 0, (g.node.op.name,), True), (0, 0)))
                continue
            scratch = [self._place(size, itemsize, here, here) for size, itemsize in g.workspaces]
            for call in g.calls:
                views: list[places.View] = []
                for what, k in call.arguments:
                    match what:
                        case "operand":
                            views.append((slot_of(g.operands[k]), 0))
                        case "output":
                            views.append((slot_of(g.results[k]), 0))
                        case "constant":
                            views.append((self._constant(g.constants[k]), 0))
                        case "workspace":
                            views.append((scratch[k], 0))
                        case _:
                            views.append((_TABLE, 0))
                info = KernelInfo(call.kernel.name, 0, 0, names, call.parallel)
                made.append((Step(call.kernel.name, tuple(views)), info, _work(b, g)))
        for s, r in copies:
            t = b.type(r)
            step = self._copied(t, slot_of(r), s)
            made.append((step, KernelInfo(step.kernel, 0, 0, ("copy",), True), (0, product(t.shape) * (2 * t.dtype.itemsize))))
        return made

    def _check(self, graph: Graph) -> None:
        """Notes dimensions that must not become negative."""
        for n in graph.nodes():
            for t in n.type.items if isinstance(n.type, TupleType) else (n.type,):
                for d in t.shape:
                    if not isinstance(d, int):
                        self.checks.setdefault(d, f"{n.op.name} {t} impossible")

    # -- loops and branches -------------------------------------------------------------------------------------------

    def _body(self, b: Builder, graph: Graph, inputs: Sequence[int], outputs: Sequence[int], here: int) -> list[plan.Node]:
        return [node for node, _, _ in self._emit(replace(b, graph=graph), inputs, outputs, here)]

    def _value(self, t: TensorType, here: int) -> int:
        return self._place(product(t.shape), t.dtype.itemsize, here, here)

    def _control(self, b: Builder, g: _Group, operands: list[int], results: list[int], here: int) -> plan.Node:
        form = b.form(g.node)
        match form:
            case Branch():
                arms = [tuple(self._body(b, arm, operands[1:], results, here)) for arm in (form.then, form.orelse)]
                return plan.Branch((operands[0], 0), arms[0], arms[1])
            case While():
                types = [o.tensor for o in form.body.outputs]
                first = [self._copied(t, s, r) for t, s, r in zip(types, operands, results, strict=False)]
                carried = [*results, *operands[form.carries :]]
                again = self._place(1, 1, here, here)
                test = self._body(b, form.test, carried, [again], here)
                new = [self._value(t, here) for t in types]
                inside = self._body(b, form.body, carried, new, here)
                inside += [self._copied(t, s, r) for t, s, r in zip(types, new, results, strict=True)]
                return plan.Block((*first, plan.While(tuple(test), (again, 0), tuple(inside))))
            case Loop():
                return self._loop(b, form, operands, results, here)
        raise UnsupportedError(f"{g.node.op.name} is no loop or branch")

    def _loop(self, b: Builder, form: Loop, operands: list[int], results: list[int], here: int) -> plan.Node:
        """Carries stay where the results are; elements of sequences are copied out, stacked values in."""
        body, c, s = form.body, form.carries, form.sequences
        types = [o.tensor for o in body.outputs]
        counter, again = self._place(1, 8, here, here), self._place(1, 1, here, here)
        first: list[plan.Node] = [self._copied(t, o, r) for t, o, r in zip(types[:c], operands, results, strict=False)]
        first.append(self._small(start_kernel(self.symbols), counter))
        test = self._small(test_kernel(form.length, self.symbols), counter, again)
        inside: list[plan.Node] = []
        elements: list[int] = []
        for p, source in zip(body.inputs[c : c + s], operands[c : c + s], strict=True):
            elements.append(self._value(p.tensor, here))
            made = slice_kernel(p.tensor, form.length, form.reverse, self.target, self.symbols)
            inside.append(self._small(made, source, counter, elements[-1]))
        new = [self._value(t, here) for t in types]
        inside += self._body(b, body, [*results[:c], *elements, *operands[c + s :]], new, here)
        inside += [self._copied(t, n, r) for t, n, r in zip(types[:c], new, results, strict=False)]
        for t, n, r in zip(types[c:], new[c:], results[c:], strict=True):
            inside.append(self._small(stack_kernel(t, form.length, form.reverse, self.target, self.symbols), n, counter, r))
        inside.append(self._small(step_kernel(self.symbols), counter))
        return plan.Block((*first, plan.While((test,), (again, 0), tuple(inside))))

    def _small(self, made: Kernel, *slots: int) -> Step:
        """A call of a kernel around a loop's body; kernels that do the same are one."""
        key = (made.doc, tuple((x.name, x.dtype) for x in made.buffers))
        if key not in self.cache:
            named = replace(made, name=self._name(made.name))
            self.kernels[named.name] = named
            self.cache[key] = ([_Call(named, (), True)], [], [])
        named = self.cache[key][0][0].kernel
        given = [(s, 0) for s in slots]
        return Step(named.name, tuple([*given, (_TABLE, 0)][: len(named.buffers)]))

    def _copied(self, t: TensorType, source: int, to: int) -> Step:
        flat = input_node("p0", t)
        graph = Graph((flat,), (flat,), name="copy")
        key = (graph, "copy")
        if key not in self.cache:
            self.cache[key] = self._lower(graph, "map", (t.dtype.itemsize, t.dtype.itemsize))
        call = self.cache[key][0][0]
        return Step(call.kernel.name, tuple([(source, 0), (to, 0), (_TABLE, 0)][: len(call.arguments)]))

    # -- nodes to kernels ---------------------------------------------------------------------------------------------

    def _groups(self, b: Builder) -> list[_Group]:
        needed, _ = needed_of(b)
        groups: list[_Group] = []
        outside = {b.root((o, 0)) for o in b.graph.outputs}
        for node in b.graph.nodes():
            items = node.type.items if isinstance(node.type, TupleType) else (node.type,)
            if node not in needed or all(t.size == 0 for t in items):
                continue
            try:
                groups.append(self._group(b, node, outside))
            except (CompileError, ShapeError) as error:
                self.failed.append(f"  {node.op.name} {node.type}{_where(b.graph, node)}: {error}")
        return groups

    def _group(self, b: Builder, node: Node, outside: set[Value]) -> _Group:
        count = len(node.type.items) if isinstance(node.type, TupleType) else 1
        results = tuple((node, k) for k in range(count))
        if b.is_control(node):
            return _Group(node, Graph((), ()), tuple((i, 0) for i in node.inputs), results)
        body, operands, kind = body_of(b, node)
        external = [b.root(v)[0] in b.inputs or b.root(v) in outside for v in (*operands, *results)]
        aligns = tuple(b.type(v).dtype.itemsize if e else _ALIGN for v, e in zip((*operands, *results), external, strict=True))
        g = _Group(node, body, operands, results)
        key = (body, kind, aligns)
        if key not in self.cache:
            self.cache[key] = self._lower(body, kind, aligns)
        g.calls, g.constants, g.workspaces = self.cache[key]
        return g

    def _name(self, stem: str) -> str:
        return self.b.fresh_name("".join(c if c.isalnum() or c == "_" else "_" for c in stem))

    def _lower(
        self, graph: Graph, kind: str, aligns: tuple[int, ...]
    ) -> tuple[list[_Call], list[Literal], list[tuple[Dim, int]]]:
        numbers = itertools.count()
        body = GenericBody(graph, aligns)
        forms = [body.lowering(n) for n in graph.nodes() if n not in body.operand and n.inputs]
        last = body.lowering(graph.outputs[0]) if graph.outputs[0] not in body.operand else None
        calls: list[_Call] = []
        stem = f"{kind or type(last).__name__.lower()}_{body_name(graph)}"
        if any(isinstance(f, Contract) for f in forms):
            tile = Tile(body, self.target, numbers)
            if tile.packing is not None:
                p = tile.packing
                a, out = self._buffer_pair(p.statements)
                made = kernel(self._name(f"pack_{stem}"), p.space, [a, out], p.statements, self.symbols, "B in panels")
                number = (
                    next(k for k, n in enumerate(graph.inputs) if body.buffers[k] is body.source(tile.b))
                    if (body.source(tile.b) in body.buffers)
                    else -1
                )
                if number < 0:
                    raise UnsupportedError("a contraction whose constant B is indexed in a way that has no panels")
                args: list[Argument_] = [("operand", number), ("workspace", 0), ("sizes", 0)]
                self.kernels[made.name] = made
                calls.append(_Call(made, tuple(args[: len(made.buffers)]), p.parallel))
                assert tile.panels is not None
                body.workspaces.append((tile.panels, p.size))
            stmts, parallel = tile.statements()
        elif any(isinstance(f, Scan) for f in forms):
            stmts, parallel = scan_statements(body, self.target, numbers)
        elif any(isinstance(f, Scatter) for f in forms):
            stmts, parallel = scatter_statements(body, self.target, numbers)
        elif any(isinstance(f, Sort) for f in forms):
            stmts, parallel = sort_statements(body, numbers)
        elif kind != "map" and any(isinstance(f, Reduce) for f in forms):
            stmts, parallel = reduce_statements(body, self.target, numbers)
        elif all(isinstance(f, (Map, View, Reduce)) for f in forms):
            stmts, parallel = self._maps(body, numbers)
        else:
            odd = next(f for f in forms if not isinstance(f, (Map, View, Reduce)))
            raise UnsupportedError(f"a {type(odd).__name__.lower()} of unknown size has no kernel")
        buffers = [*body.buffers, *body.outputs, *body.constants.values(), *(w for w, _ in body.workspaces)]
        tags: list[Argument_] = [("operand", k) for k in range(len(body.buffers))]
        tags += [("output", k) for k in range(len(body.outputs))]
        tags += [("constant", k) for k in range(len(body.constants))]
        tags += [("workspace", k) for k in range(len(body.workspaces))]
        made = kernel(self._name(stem), body.space, buffers, stmts, self.symbols, f"{kind or 'node'}: {body_name(graph)}")
        by_name = {x.name: t for x, t in zip(buffers, tags, strict=True)}
        by_name[SIZES.name] = ("sizes", 0)
        self.kernels[made.name] = made
        calls.append(_Call(made, tuple(by_name[x.name] for x in made.buffers), parallel))
        spaces = [(size, w.dtype.itemsize) for w, size in body.workspaces]
        return calls, [n.attrs["value"] for n in body.constants], spaces

    def _buffer_pair(self, stmts: Sequence[Any]) -> tuple[Any, Any]:
        from ...ir.expr import postorder
        from ..loop_ir import Store, expressions, statements

        read = next(
            e.attr[0]
            for s in statements(tuple(stmts))
            for e in postorder(expressions(s))
            if e.op == "load" and e.attr[0].name == "p0"
        )
        written = next(s.buffer for s in statements(tuple(stmts)) if isinstance(s, Store) and s.buffer.name == "y0")
        return read, written

    def _maps(self, body: GenericBody, numbers: Iterator[int]) -> tuple[list[Any], bool]:
        stmts: list[Any] = []
        parallel = False
        for outputs in groups_by_shape(body.graph.outputs):
            part, several = map_statements(body, outputs, self.target, numbers)
            stmts += part
            parallel = parallel or several
        return stmts, parallel


def _renumbered(node: plan.Node, slot: Any) -> plan.Node:
    """The tree with slots as `slot` numbers them."""

    def view(v: places.View) -> places.View:
        return (slot(v[0]), *v[1:])

    def all_of(nodes: Sequence[plan.Node]) -> tuple[plan.Node, ...]:
        return tuple(_renumbered(n, slot) for n in nodes)

    match node:
        case Step(name, views):
            return Step(name, tuple(map(view, views)))
        case plan.Block(nodes):
            return plan.Block(all_of(nodes))
        case plan.Branch(predicate, then, orelse):
            return plan.Branch(view(predicate), all_of(then), all_of(orelse))
        case plan.While(test, predicate, nodes):
            return plan.While(all_of(test), view(predicate), all_of(nodes))
    raise AssertionError(f"a {type(node).__name__} in a program for every size")


def _lifetimes(b: Builder, groups: Sequence[_Group], copies: Sequence[tuple[int, Value]]) -> dict[Value, tuple[int, int]]:
    """The first and last step at which each result is needed."""
    lives: dict[Value, tuple[int, int]] = {}
    for number, g in enumerate(groups):
        for r in g.results:
            lives[r] = (number, number)
        for v in g.operands:
            r = b.root(v)
            if r in lives:
                lives[r] = (lives[r][0], number)
    for _, r in copies:
        if r in lives:
            lives[r] = (lives[r][0], len(groups))
    return lives


def _work(b: Builder, g: _Group) -> tuple[Dim, Dim]:
    """Operations (of contractions) and bytes of a group."""
    flops: Dim = 0
    for n in g.body.nodes():
        form = None if n in g.body.inputs or n.op.has(Trait.STRUCTURAL) or not n.inputs else b.form(n)
        if isinstance(form, Contract):
            part: Dim = 2
            for x in form.spec.axes:
                part = part * x.extent
            flops = flops + part
    moved: Dim = 0
    for v in (*g.operands, *g.results):
        t = b.type(v)
        moved = moved + product(t.shape) * t.dtype.itemsize
    return flops, moved


__all__ = ["check_forms", "generate_generic"]
