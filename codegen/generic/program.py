"""A graph with symbolic sizes to one object file, and that to a Program for given sizes without compiling anything.

Slots of the entry: inputs, outputs, constants (the last one is the table of sizes), the arena, then every value that lives in
the arena. Where these lie is planned anew for each set of sizes, by lifetimes that are known before: a few microseconds a value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...ir.build import input_node
from ...ir.dims import Dim, evaluate, parse_dim, product
from ...ir.dtypes import as_dtype
from ...ir.errors import CompileError, InputError, ShapeError
from ...ir.graph import Graph, Literal, Node
from ...ir.lowering import Contract, Map, Reduce, Scan, Scatter, Sort, View
from ...ir.memory import ArenaUse
from ...ir.op import Trait
from ...ir.program import Argument, KernelInfo, Program
from ...ir.target import Target
from ...ir.types import TensorType, TupleType
from ..assembly import Builder, Value, body_of, needed_of
from ..groups import body_name, is_constant
from ..llvm import emit
from ..loop_ir import Kernel, Module
from ..loop_text import print_module
from ..loop_verify import verify as verify_loops
from ..plan import EntryPlan, Step
from .body import GenericBody, UnsupportedError
from .contraction import Tile, generic_panel
from .elementwise import groups_by_shape, map_statements
from .loops import SIZES, kernel
from .reductions import reduce_statements
from .updates import scan_statements, scatter_statements, sort_statements

Argument_ = tuple[str, int]
_ALIGN = 64


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


@dataclass(frozen=True)
class _Place:
    """A value of the arena: its size in elements, bytes of each, and the steps from the first to the last that use it."""

    size: Dim
    itemsize: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class GenericProgram:
    """One program for every size of the named dimensions. `at` gives it for some."""

    name: str
    target: Target
    symbols: tuple[str, ...]
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    constants: tuple[np.ndarray[Any, Any], ...]
    places: tuple[_Place, ...]
    checks: tuple[tuple[Dim, str], ...]
    kernels: tuple[KernelInfo, ...]
    work: tuple[tuple[Dim, Dim], ...]
    object_code: bytes
    texts: Mapping[str, str]

    @property
    def base(self) -> Program:
        """What is the same for all sizes, without arguments: for a cache, beside `described`."""
        return Program(
            name=self.name,
            target=self.target,
            inputs=(),
            outputs=(),
            constants=self.constants,
            arena_bytes=0,
            kernels=self.kernels,
            object_code=self.object_code,
            texts=self.texts,
        )

    def described(self) -> dict[str, Any]:
        """What else there is, as plain values for a file; `restored` reads it back."""

        def argument(a: Argument) -> list[Any]:
            return [a.name, a.type.dtype.name, [str(d) for d in a.type.shape], a.role]

        return {
            "symbols": list(self.symbols),
            "inputs": [argument(a) for a in self.inputs],
            "outputs": [argument(a) for a in self.outputs],
            "places": [[str(p.size), p.itemsize, p.first, p.last] for p in self.places],
            "checks": [[str(d), what] for d, what in self.checks],
            "work": [[str(f), str(b)] for f, b in self.work],
        }

    @staticmethod
    def restored(base: Program, about: Mapping[str, Any]) -> GenericProgram:
        """The program of `base` and what `described` gave. Raises KeyError, TypeError, ValueError, ParseError for other values."""

        def argument(row: Sequence[Any]) -> Argument:
            name, dtype, shape, role = row
            return Argument(str(name), TensorType(as_dtype(dtype), tuple(map(parse_dim, shape))), str(role))

        return GenericProgram(
            name=base.name,
            target=base.target,
            symbols=tuple(map(str, about["symbols"])),
            inputs=tuple(map(argument, about["inputs"])),
            outputs=tuple(map(argument, about["outputs"])),
            constants=base.constants,
            places=tuple(_Place(parse_dim(s), int(i), int(f), int(last)) for s, i, f, last in about["places"]),
            checks=tuple((parse_dim(d), str(what)) for d, what in about["checks"]),
            kernels=base.kernels,
            work=tuple((parse_dim(f), parse_dim(b)) for f, b in about["work"]),
            object_code=base.object_code,
            texts=base.texts,
        )

    def at(self, sizes: Mapping[str, int]) -> Program:
        """The program for these sizes: places and shapes are put in, the code is the same. Raises InputError for sizes that the
        graph does not allow."""
        known: dict[Dim, int] = {}

        def value(d: Dim) -> int:
            if isinstance(d, int):
                return d
            found = known.get(d)
            if found is None:
                result = evaluate(d, sizes)
                assert isinstance(result, int)
                found = known[d] = result
            return found

        for d, what in self.checks:
            if value(d) < 0:
                given = ", ".join(f"{k} = {v}" for k, v in sorted(sizes.items()))
                raise InputError(f"{self.name}: {given} makes {what}: {d} is {value(d)}")
        offsets, total = _planned([(value(p.size) * p.itemsize, p.first, p.last) for p in self.places])

        def fixed(a: Argument) -> Argument:
            if all(isinstance(d, int) for d in a.type.shape):
                return a
            return Argument(a.name, TensorType(a.type.dtype, tuple(map(value, a.type.shape))), a.role)

        table = np.array([sizes[s] for s in self.symbols], np.int64)
        infos = tuple(
            KernelInfo(k.name, value(f), value(b), k.nodes, k.parallel) for k, (f, b) in zip(self.kernels, self.work, strict=True)
        )
        return Program(
            name=self.name,
            target=self.target,
            inputs=tuple(map(fixed, self.inputs)),
            outputs=tuple(map(fixed, self.outputs)),
            constants=(*self.constants, table),
            arena_bytes=total,
            kernels=infos,
            object_code=self.object_code,
            use=ArenaUse(intermediates=total),
            texts=self.texts,
            places=offsets,
        )


def _planned(values: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, ...], int]:
    """An offset for each (bytes, first step, last step), first fit in the order of the steps, and the bytes of all."""
    order = sorted(range(len(values)), key=lambda k: (values[k][1], -values[k][0]))
    offsets = [0] * len(values)
    live: list[tuple[int, int, int]] = []  # (offset, end, last step), by offset
    total = 0
    for k in order:
        nbytes, first, last = values[k]
        need = -(-max(nbytes, 1) // _ALIGN) * _ALIGN
        live = [x for x in live if x[2] >= first]
        at = 0
        slot = len(live)
        for j, (offset, end, _) in enumerate(live):
            if offset - at >= need:
                slot = j
                break
            at = end
        offsets[k] = at
        live.insert(slot, (at, at + need, last))
        total = max(total, at + need)
    return tuple(offsets), total


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

    def run(self) -> GenericProgram:
        b, graph = self.b, self.graph
        if graph.aliases:
            raise CompileError(f"{graph.name} updates inputs in place; dynamic='generic' is for inference")
        groups = self._groups()
        roots = [b.root((o, 0)) for o in graph.outputs]
        written = {r for g in groups for r in g.results}
        seen: set[Value] = set()
        copies: list[tuple[int, Value]] = []
        owner: dict[Value, int] = {}
        for k, r in enumerate(roots):
            if r in written and r not in seen:
                owner[r] = k
            else:
                copies.append((k, r))
            seen.add(r)
        constants: dict[Literal, int] = {}
        slots: dict[Value, int] = {(n, 0): k for k, n in enumerate(graph.inputs)}
        n_in, n_out = len(graph.inputs), len(graph.outputs)
        for g in groups:
            for c in g.constants:
                constants.setdefault(c, len(constants))
            for v in g.operands:
                r = b.root(v)
                if is_constant(r[0]) and r not in slots:
                    constants.setdefault(r[0].attrs["value"], len(constants))
        for _, r in copies:
            if is_constant(r[0]) and r not in slots:
                constants.setdefault(r[0].attrs["value"], len(constants))
        table = n_in + n_out + len(constants)
        after = table + 2  # the table of sizes, and the arena
        for r, k in owner.items():
            slots[r] = n_in + k
        places: list[_Place] = []
        lives = self._lifetimes(groups, copies)

        def slot_of(v: Value) -> int:
            r = b.root(v)
            if r in slots:
                return slots[r]
            if is_constant(r[0]):
                return n_in + n_out + constants[r[0].attrs["value"]]
            t = b.type(r)
            first, last = lives.get(r, (0, len(groups)))
            places.append(_Place(product(t.shape), t.dtype.itemsize, first, last))
            slots[r] = after + len(places) - 1
            return slots[r]

        steps: list[Step] = []
        infos: list[KernelInfo] = []
        work: list[tuple[Dim, Dim]] = []
        for number, g in enumerate(groups):
            scratch: list[int] = []
            for size, itemsize in g.workspaces:
                places.append(_Place(size, itemsize, number, number))
                scratch.append(after + len(places) - 1)
            for call in g.calls:
                views: list[tuple[int, int]] = []
                for what, k in call.arguments:
                    match what:
                        case "operand":
                            views.append((slot_of(g.operands[k]), 0))
                        case "output":
                            views.append((slot_of(g.results[k]), 0))
                        case "constant":
                            views.append((n_in + n_out + constants[g.constants[k]], 0))
                        case "workspace":
                            views.append((scratch[k], 0))
                        case _:
                            views.append((table, 0))
                steps.append(Step(call.kernel.name, tuple(views)))
                infos.append(
                    KernelInfo(call.kernel.name, 0, 0, tuple(n.op.name for n in g.body.nodes() if n.inputs), call.parallel)
                )
                work.append(self._work(g))
        for k, r in copies:
            call = self._copy(b.type(r))
            views = [(slot_of(r), 0), (n_in + k, 0), (table, 0)]
            steps.append(Step(call.kernel.name, tuple(views[: len(call.arguments)])))
            infos.append(KernelInfo(call.kernel.name, 0, 0, ("copy",), call.parallel))
            size = product(b.type(r).shape)
            work.append((0, size * (2 * b.type(r).dtype.itemsize)))
        module = Module(tuple(self.kernels.values()))
        if self.verify:
            verify_loops(module)
        emitted = emit(module, EntryPlan(self.name, tuple(steps)), self.target)
        return GenericProgram(
            name=self.name,
            target=self.target,
            symbols=self.symbols,
            inputs=tuple(Argument(str(n.attrs["name"]), n.tensor, str(n.attrs["role"])) for n in graph.inputs),
            outputs=tuple(Argument(o, n.tensor) for o, n in zip(graph.output_names, graph.outputs, strict=True)),
            constants=tuple(c.array for c in constants),
            places=tuple(places),
            checks=self._checks(),
            kernels=tuple(infos),
            work=tuple(work),
            object_code=emitted.object_code,
            texts={"loops": print_module(module), "llvm": emitted.llvm, "asm": emitted.asm},
        )

    def _checks(self) -> tuple[tuple[Dim, str], ...]:
        """Dimensions that must not become negative."""
        found: dict[Dim, str] = {}
        for n in self.graph.nodes():
            for t in n.type.items if isinstance(n.type, TupleType) else (n.type,):
                for d in t.shape:
                    if not isinstance(d, int):
                        found.setdefault(d, f"{n.op.name} {t} impossible")
        return tuple(found.items())

    def _work(self, g: _Group) -> tuple[Dim, Dim]:
        """Operations (of contractions) and bytes of a group."""
        flops: Dim = 0
        for n in g.body.nodes():
            form = None if n in g.body.inputs or n.op.has(Trait.STRUCTURAL) or not n.inputs else self.b.form(n)
            if isinstance(form, Contract):
                part: Dim = 2
                for x in form.spec.axes:
                    part = part * x.extent
                flops = flops + part
        moved: Dim = 0
        for v in (*g.operands, *g.results):
            t = self.b.type(v)
            moved = moved + product(t.shape) * t.dtype.itemsize
        return flops, moved

    def _lifetimes(self, groups: Sequence[_Group], copies: Sequence[tuple[int, Value]]) -> dict[Value, tuple[int, int]]:
        lives: dict[Value, tuple[int, int]] = {}
        for number, g in enumerate(groups):
            for r in g.results:
                lives[r] = (number, number)
            for v in g.operands:
                r = self.b.root(v)
                if r in lives:
                    lives[r] = (lives[r][0], number)
        for _, r in copies:
            if r in lives:
                lives[r] = (lives[r][0], len(groups))
        return lives

    # -- groups -------------------------------------------------------------------------------------------------------

    def _groups(self) -> list[_Group]:
        b = self.b
        needed, _ = needed_of(b)
        groups: list[_Group] = []
        failed: list[str] = []
        outside = {b.root((o, 0)) for o in b.graph.outputs}
        for node in b.graph.nodes():
            if node not in needed:
                continue
            if all(t.size == 0 for t in (node.type.items if isinstance(node.type, TupleType) else (node.type,))):
                continue
            try:
                groups.append(self._group(node, outside))
            except (CompileError, ShapeError) as error:
                failed.append(f"  {node.op.name} {node.type}{_where(b.graph, node)}: {error}")
        if failed:
            raise refusal(self.graph.name, failed)
        return groups

    def _group(self, node: Node, outside: set[Value]) -> _Group:
        b = self.b
        if b.is_control(node):
            raise UnsupportedError("loops and branches are made for given sizes")
        body, operands, kind = body_of(b, node)
        count = len(node.type.items) if isinstance(node.type, TupleType) else 1
        results = tuple((node, k) for k in range(count))
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

    def _copy(self, t: TensorType) -> _Call:
        flat = input_node("p0", t)
        graph = Graph((flat,), (flat,), name="copy")
        key = (graph, "copy")
        if key not in self.cache:
            self.cache[key] = self._lower(graph, "map", (t.dtype.itemsize, t.dtype.itemsize))
        return self.cache[key][0][0]


__all__ = ["GenericProgram", "check_forms", "generate_generic", "generic_panel"]
