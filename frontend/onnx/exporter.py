"""From a Graph to an ONNX file: every node becomes the ONNX op its record names, or the few that export_ops.py lists.

Names of inputs and outputs are kept, and those of nodes where a label has one. Sizes that are symbolic are computed in the
model, from the shapes of its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...ir.dims import Dim, DimExpr, Quotient, Symbol
from ...ir.dtypes import as_dtype
from ...ir.errors import OnnxError
from ...ir.graph import Graph, Literal, Node, postorder
from ...ir.graphs import inline
from ...ir.types import TensorType, TupleType
from . import export_numbers, export_ops  # noqa: F401 (they fill the table)
from .description import Array
from .export_lift import alive, lifted, read_in
from .export_registry import OLDEST, least_of, least_opset, writer
from .reader import require_onnx
from .types import type_number

if TYPE_CHECKING:
    import onnx

NEWEST: Final = 28
MAX_INLINE: Final = 1 << 30  # bytes of weights in the file itself; more go to a file beside it


def save(
    graph: Graph,
    path: str | os.PathLike[str] | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    opset: int | None = None,
    check: bool = True,
) -> onnx.ModelProto:
    """Writes a Graph as an ONNX model; returns the ModelProto. Without a path nothing is written.

    parameters  values of weights by input name (default: those that came with the graph); weights without a value stay inputs
    opset       of ai.onnx, 21 to 28 (default: the least that has all ops and types of the graph; ONNX Runtime reads up to 26)
    check       run onnx.checker with shape inference on what was made

    Weights beyond 1 GiB go to a file beside the model, named after it. Raises OnnxError that lists every node for which ONNX
    has no op, OSError.
    """
    onnx = require_onnx()
    if opset is not None and not OLDEST <= opset <= NEWEST:
        raise OnnxError(f"export writes opsets {OLDEST} to {NEWEST}, not {opset}")
    given = dict(graph.weights if parameters is None else parameters)
    names = {str(i.attrs["name"]) for i in graph.inputs}
    unknown = sorted(given.keys() - names)
    if unknown:
        raise OnnxError(f"{graph.name}: parameters {unknown[:5]} are no inputs of the graph")
    plain = flattened(graph)
    version = least_of(plain) if opset is None else opset
    emitter = Emitter(onnx, {k: np.asarray(v) for k, v in given.items()}, version)
    proto = emitter.main(plain)
    imports = [onnx.helper.make_opsetid("", version)]
    model = onnx.helper.make_model(proto, opset_imports=imports, producer_name="tensorwright")
    model.ir_version = onnx.helper.find_min_ir_version_for(imports)
    large = emitter.bytes > MAX_INLINE
    if check and not large:
        onnx.checker.check_model(model, full_check=True)
    if path is not None:
        where = {"save_as_external_data": True, "location": Path(path).name + ".data"} if large else {}
        onnx.save_model(model, os.fspath(path), **where)
        if check and large:
            onnx.checker.check_model(os.fspath(path), full_check=True)
    return model


def flattened(graph: Graph) -> Graph:
    """The graph with fused regions put back as their bodies; labels of the values they give stay."""
    bodies: dict[Node, tuple[Node, ...]] = {}

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.op.name == "get" and inputs[0] in bodies:
            return bodies[inputs[0]][node.attrs["index"]]
        if node.op.name != "fused":
            return node.replace(inputs)
        outputs = flattened(Graph((), inline(node.attrs["body"], inputs))).outputs
        if len(outputs) == 1 and not isinstance(node.type, TupleType):
            return outputs[0]
        stands = node.replace(inputs)
        bodies[stands] = outputs
        return stands

    return graph.map_nodes(rule)


class Emitter:
    """Collects the nodes and arrays of one ONNX graph. `name(node)` is the ONNX name of a node's value."""

    def __init__(self, onnx: Any, weights: Mapping[str, Array], opset: int, parent: Emitter | None = None) -> None:
        self.onnx = onnx
        self.weights = weights
        self.opset = opset
        self.parent = parent
        self.nodes: list[Any] = []
        self.arrays: list[Any] = []
        self.bytes = 0
        self.names: dict[Node, str] = {}
        self.parts: dict[Node, list[str]] = {}  # of nodes with several outputs
        self.taken: set[str] = set() if parent is None else parent.taken
        self.sizes: dict[str, str] = {}  # text of a dimension -> the name of an i64[1] that holds it
        self.symbols: dict[str, tuple[str, int]] = {} if parent is None else parent.symbols
        self._constants: dict[str, str] = {}
        self._labels: Mapping[Node, Any] = {}

    # -- names ---------------------------------------------------------------------------------------------------------
    def fresh(self, base: str) -> str:
        """A name that nothing else has."""
        name, k = base, 1
        while not name or name in self.taken:
            k += 1
            name = f"{base or 'value'}_{k}"
        self.taken.add(name)
        return name

    def name(self, node: Node) -> str:
        """The ONNX name of a value of the graph."""
        return self.names[node]

    # -- what export_ops uses ------------------------------------------------------------------------------------------
    def emit(self, op: str, inputs: Sequence[str], *, hint: str = "", count: int = 1, **attrs: Any) -> str:
        """Adds a node; the name of its first output."""
        return self.emit_all(op, inputs, hint=hint, count=count, **attrs)[0]

    def emit_all(self, op: str, inputs: Sequence[str], *, hint: str = "", count: int = 1, **attrs: Any) -> list[str]:
        """Adds a node with several outputs; their names."""
        outputs = [self.fresh(hint or op.lower()) for _ in range(count)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), outputs, name=f"{op}_{outputs[0]}", **attrs))
        return outputs

    def array(self, value: Any, dtype: Any = None, hint: str = "c") -> str:
        """The name of a constant array, one for each content."""
        literal = Literal(value, dtype)
        found = self._constants.get(literal.digest)
        if found is None:
            found = self._constants[literal.digest] = self.fresh(hint)
            self._store(found, literal.array)
        return found

    def _store(self, name: str, array: Array) -> None:
        self.arrays.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        self.bytes += array.nbytes

    def number(self, dtype: Any) -> int:
        """ONNX's number of a numpy dtype."""
        return type_number(as_dtype(dtype))

    def shape(self, dims: Sequence[Dim], allow_unknown: bool = False) -> str:
        """The name of an i64 vector of sizes; with `allow_unknown`, one symbolic size is written as -1."""
        symbolic = [k for k, d in enumerate(dims) if isinstance(d, DimExpr)]
        if not symbolic:
            return self.array(np.array([int(d) for d in dims], np.int64).reshape(len(dims)), hint="shape")  # type: ignore[arg-type]
        if allow_unknown and len(symbolic) == 1 and 0 not in dims:
            return self.array(np.array([-1 if isinstance(d, DimExpr) else d for d in dims], np.int64), hint="shape")
        return self.emit("Concat", [self.size(d) for d in dims], hint="shape", axis=0)

    def size(self, d: Dim) -> str:
        """The name of an i64[1] that holds a size."""
        if not isinstance(d, DimExpr):
            return self.array(np.array([d], np.int64), hint="size")
        found = self.sizes.get(str(d))
        if found is None:
            total: str | None = None
            for monomial, coefficient in d.terms:
                part = self.array(np.array([coefficient], np.int64), hint="size")
                for k, atom in enumerate(monomial):
                    factor = self._atom(atom)
                    part = factor if k == 0 and coefficient == 1 else self.emit("Mul", [part, factor], hint="size")
                total = part if total is None else self.emit("Add", [total, part], hint="size")
            assert total is not None
            found = self.sizes[str(d)] = total
        return found

    def _atom(self, atom: Symbol | Quotient) -> str:
        if isinstance(atom, Quotient):
            a, b = self.size(atom.numerator), self.size(atom.denominator)
            return self.emit("Div" if atom.op == "//" else "Mod", [a, b], hint="size")
        if atom.name not in self.symbols:
            raise OnnxError(f"the size {atom.name} is not a dimension of an input by itself: ONNX cannot compute it")
        key = f"symbol {atom.name}"
        if key not in self.sizes:
            name, axis = self.symbols[atom.name]
            self.sizes[key] = self.emit("Shape", [name], hint=atom.name, start=axis, end=axis + 1)
        return self.sizes[key]

    # -- graphs --------------------------------------------------------------------------------------------------------
    def main(self, graph: Graph) -> Any:
        """The GraphProto of a whole graph."""
        self._labels = graph.labels
        self.taken |= {str(i.attrs["name"]) for i in graph.inputs} | set(graph.output_names)
        inputs: list[Any] = []
        for i in graph.inputs:
            name = str(i.attrs["name"])
            self.names[i] = name
            if name in self.weights:
                value = self.weights[name]
                if value.shape != i.shape or value.dtype != i.dtype.numpy:
                    raise OnnxError(f"{graph.name}: the weight {name!r} is {i.type}, its value {value.dtype}{list(value.shape)}")
                self._store(name, value)
                continue
            inputs.append(self._info(name, i.tensor))
            for axis, d in enumerate(i.shape):
                if isinstance(d, DimExpr) and len(d.terms) == 1 and d.terms[0][1] == 1 and len(d.terms[0][0]) == 1:
                    atom = d.terms[0][0][0]
                    if isinstance(atom, Symbol):
                        self.symbols.setdefault(atom.name, (name, axis))
        self.walk(graph)
        outputs = self._outputs(graph)
        self._prune(graph.output_names)
        return self.onnx.helper.make_graph(self.nodes, graph.name, inputs, outputs, self.arrays)

    def _prune(self, wanted: Sequence[str]) -> None:
        """Leaves out what nothing reads: parts of patterns that were written as one op."""
        self.nodes = alive(self.nodes, set(wanted))
        read = read_in(self.nodes) | set(wanted)
        self.arrays = [a for a in self.arrays if a.name in read or a.name in self.weights]

    def body(self, graph: Graph, outer: Mapping[Node, str]) -> Emitter:
        """An Emitter for a body, some of whose inputs are known outside by a name."""
        inner = self.inside()
        inner._labels = graph.labels
        inner.names |= outer
        return inner

    def inside(self) -> Emitter:
        """An Emitter for a body that reads nothing from around it but what it is given."""
        return Emitter(self.onnx, {}, self.opset, self)

    def adopt(self, other: Emitter) -> None:
        """Takes over what another Emitter wrote, as part of this graph."""
        self.nodes += other.nodes
        self.arrays += other.arrays

    def subgraph(self, node: Node) -> str:
        """Writes a node and what it depends on and is not written yet."""
        self.walk(Graph((), (node,)))
        return self.names[node]

    def walk(self, graph: Graph) -> None:
        """Writes the nodes that the outputs need. Raises OnnxError that lists those for which ONNX has no op."""
        order = [n for n in postorder(graph.outputs) if n not in self.names]
        missing = [n for n in order if writer(n) is None]
        late = max((least_opset(n) for n in order), default=OLDEST)
        if not missing and late > self.opset:
            names = sorted({f"{n.op.name} {n.type}" for n in order if least_opset(n) > self.opset})
            raise OnnxError(f"{graph.name}: {', '.join(names[:8])}: ONNX has this from opset {late} on, not in {self.opset}")
        if missing:
            listed = "\n  ".join(f"{n.op.name} {n.type}" + _where(graph, n) for n in missing[:40])
            raise OnnxError(f"{graph.name}: {len(missing)} nodes have no ONNX op:\n  {listed}")
        reserved = dict(zip(graph.outputs, graph.output_names, strict=True)) if graph.inputs and self.parent is None else {}
        # an op of a model that was read is several nodes with one label: the last of them is its result
        last = {label.name: n for n in order if (label := self._labels.get(n)) is not None}
        for n in order:
            write = writer(n)
            assert write is not None
            before = len(self.nodes)
            result: Any = lifted(self, n) or write(self, n)
            if isinstance(n.type, TupleType):
                self.parts[n] = result
                continue
            self.names[n] = result
            wanted = reserved.get(n) or self._label(n, last)
            if wanted and len(self.nodes) > before and result in self.nodes[-1].output:
                self._rename(n, result, wanted, n in reserved)

    def _label(self, node: Node, last: Mapping[str | None, Node]) -> str:
        label = self._labels.get(node)
        name = label.name if label is not None and last.get(label.name) is node else None
        return name if name and name not in self.taken else ""

    def _rename(self, node: Node, old: str, new: str, is_output: bool) -> None:
        """Gives the value of the node just written another name: an output's, or its label's."""
        if is_output and any(new in x.output for x in self.nodes):
            return
        outputs = self.nodes[-1].output
        outputs[list(outputs).index(old)] = new
        self.taken.add(new)
        self.names[node] = new
        for key, name in self.sizes.items():
            if name == old:
                self.sizes[key] = new

    def _outputs(self, graph: Graph) -> list[Any]:
        made = {o for x in self.nodes for o in x.output}
        outputs: list[Any] = []
        for node, name in zip(graph.outputs, graph.output_names, strict=True):
            if self.names[node] != name or name not in made:
                source = self.names[node]
                self.nodes.append(self.onnx.helper.make_node("Identity", [source], [name], name=f"Identity_{name}"))
            outputs.append(self._info(name, node.tensor))
        return outputs

    def _info(self, name: str, type: TensorType) -> Any:
        dims = [d if isinstance(d, int) else str(d) for d in type.shape]
        return self.onnx.helper.make_tensor_value_info(name, type_number(type.dtype), dims)

    def graph_of(self, name: str, inputs: Sequence[tuple[str, TensorType]], outputs: Sequence[tuple[str, TensorType]]) -> Any:
        """The GraphProto of what was emitted here, as a body."""
        self._prune([n for n, _ in outputs])
        infos = [[self._info(n, t) for n, t in some] for some in (inputs, outputs)]
        return self.onnx.helper.make_graph(self.nodes, name, infos[0], infos[1], self.arrays)


def _where(graph: Graph, node: Node) -> str:
    place = graph.location(node)
    return "" if place is None else f" at {place}"
