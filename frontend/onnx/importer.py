"""From a description to a Graph: every node is converted by the function that is registered for its op.

The import runs like a program whose values are partly known: shape arithmetic is computed on the way (with symbolic sizes as
expressions), everything else is recorded. Where an op needs numbers that only a run can give (a reshape to a shape that is
an argument, the number of elements that are not zero), its outputs are left pending and the import goes on; the caller gets
a graph that computes the numbers needed, and imports again with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ...ir.dims import Dim, DimExpr, symbol, symbols
from ...ir.dtypes import DType, as_dtype, bool_, i64
from ...ir.errors import OnnxError, ShapeError, TensorwrightError
from ...ir.graph import Graph, Label, Literal, Location, Node, postorder
from ...ir.interp import execute
from ...ir.types import TensorType
from ..context import Trace
from ..core import Value as FrontendValue
from ..core import apply, as_tensor, wrap
from ..movement import reshape, stack
from ..tensor import Tensor
from .call import SIZE, Call, NeedsValue, Pending, Unsupported, array_of
from .description import Array, FunctionDef, GraphDef, ModelDef, NodeDef, Stored, ValueDef
from .reader import show
from .registry import fold_of, lookup
from .standard import standard_function
from .types import dtype_of
from .values import Sequence as ValueList
from .values import Value, normal

MAX_DEPTH: Final = 64  # functions within functions, bodies within bodies
MAX_EXPANDED: Final = 30_000  # nodes that functions may stand for, beside four times those that the file has
MAX_FOLDED: Final = 4096  # elements of an array on which shape arithmetic is tried
MAX_EVALUATED: Final = 1 << 22  # elements of an array that is computed during import
PENDING: Final = Value(i64, ())


@dataclass
class Scope:
    """The names that a node sees: those of its graph, then those around it."""

    opsets: Mapping[str, int]
    prefix: str = ""
    parent: Scope | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)  # of the function being expanded
    names: dict[str, Value] = field(default_factory=dict)
    depth: int = 0
    calls: tuple[tuple[str, str, str], ...] = ()

    def find(self, name: str) -> Value | None:
        scope: Scope | None = self
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None


@dataclass(frozen=True)
class Imported:
    """A finished graph; or, with `needs`, one whose outputs are the numbers to be known first, and their keys in order."""

    graph: Graph
    needs: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()  # why sizes must be known, where shapes did not fit


class _Trace(Trace):
    """A recording whose labels are the nodes of the model."""

    here: Label = Label()

    def label(self, node: Node) -> None:
        self.labels.setdefault(node, self.here)


class Importer:
    """One import of a model.

    known   numbers by key, from earlier stages
    shapes  shapes of inputs that replace the declared ones
    sizes   numbers for named dimensions
    every   whether all values of the graph that are Tensors become outputs, not only the declared ones
    """

    def __init__(
        self,
        model: ModelDef,
        *,
        known: Mapping[str, Array] | None = None,
        shapes: Mapping[str, Sequence[int | str]] | None = None,
        sizes: Mapping[str, int] | None = None,
        every: bool = False,
    ) -> None:
        self.model = model
        self.every = every
        self.known = dict(known or {})
        self.shapes = dict(shapes or {})
        self.sizes = dict(sizes or {}) | {k.removeprefix(SIZE): int(v) for k, v in self.known.items() if k.startswith(SIZE)}
        self.weights: dict[str, Array] = {}
        self.needs: dict[str, Tensor] = {}
        self.problems: list[str] = []
        self.reasons: dict[str, str] = {}
        self.expanded = 0
        self._most = MAX_EXPANDED
        self._symbols: dict[str, str] = {}
        self._steady: dict[Node, bool] = {}
        self._weight_nodes: dict[Node, str] = {}
        self._trace = _Trace(_identifier(model.graph.name) or "main")

    # -- the whole -----------------------------------------------------------------------------------------------------
    def run(self) -> Imported:
        """The graph. Raises OnnxError, listing every node that is not supported."""
        graph = self.model.graph
        self._check_ops()
        self._check_functions()
        scope = Scope(self.model.opsets)
        with self._trace:
            arguments = self._arguments(scope)
            self._nodes(graph.nodes, scope)
            self._raise_problems()
            if self.needs:
                return self._stage(arguments)
            outputs = [self._output(v, scope) for v in graph.outputs]
        if not outputs:
            raise OnnxError(f"{self.model.source}: the graph has no outputs")
        names = [v.name for v in graph.outputs]
        if self.every:
            given = {o: scope.names[o] for n in graph.nodes for o in n.outputs if o and o not in names}
            inner = {o: v for o, v in given.items() if v.made is not None}
            names += inner
            outputs += [v.tensor.node for v in inner.values()]
        if len(set(names)) != len(names):
            raise OnnxError(f"{self.model.source}: two outputs have one name: {names[:8]}")
        return Imported(self._graph(arguments, outputs, names))

    def _graph(self, arguments: Sequence[Node], outputs: Sequence[Node], names: Sequence[str]) -> Graph:
        kept = set(postorder(outputs))
        weights = [n for n in self._weight_nodes if n in kept]
        labels = {n: label for n, label in self._trace.labels.items() if n in kept or n in arguments}
        values = {self._weight_nodes[n]: self.weights[self._weight_nodes[n]] for n in weights}
        return Graph((*arguments, *weights), tuple(outputs), tuple(names), self._trace.name, (), labels, values)

    def _stage(self, arguments: Sequence[Node]) -> Imported:
        keys, reasons = tuple(self.needs), tuple(dict.fromkeys(self.reasons.values()))
        return Imported(self._graph(arguments, [self.needs[k].node for k in keys], keys), keys, reasons)

    def _raise_problems(self) -> None:
        if self.problems:
            head = f"{self.model.source}: {len(self.problems)} nodes are not supported"
            raise OnnxError("\n  ".join([head, *self.problems]))

    def _check_ops(self) -> None:
        """Lists the ops that there is nothing for, before anything is converted."""
        counts: dict[str, list[str]] = {}
        for node, opsets in _all_nodes(self.model):
            if self._function(node) is not None:
                continue
            version = opsets.get(node.domain)
            if version is None:
                raise OnnxError(f"{self.model.source}: {show(node)} is of a domain that the model does not import")
            if lookup(node.domain, node.op, version) is None and not standard_function(node, version).exists:
                counts.setdefault(f"{node.qualified} (opset {version})", []).append(node.name)
        for what, names in counts.items():
            listed = ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            self.problems.append(f"{what}: {listed}")
        self._raise_problems()

    def _check_functions(self) -> None:
        """Raises OnnxError for functions that call themselves, or that stand for far more nodes than the file has."""
        functions, source = self.model.functions, self.model.source
        sizes: dict[tuple[str, str, str], int] = {}
        own = {key: list(_nodes_within(f.nodes)) for key, f in functions.items()}
        for start in functions:
            stack, open_ = [start], set[tuple[str, str, str]]()
            while stack:
                key = stack[-1]
                if key in sizes:
                    stack.pop()
                    continue
                called = [k for n in own[key] if (k := (n.domain, n.op, n.overload)) in functions]
                waiting = [k for k in dict.fromkeys(called) if k not in sizes]
                if key in open_:
                    if waiting:
                        raise OnnxError(f"{source}: the function {key[1]!r} calls itself")
                    sizes[key] = len(own[key]) + sum(sizes[k] for k in called)
                    stack.pop()
                    continue
                open_.add(key)
                if any(k in open_ for k in waiting):
                    raise OnnxError(f"{source}: the function {key[1]!r} calls itself")
                stack += waiting
        nodes = list(_nodes_within(self.model.graph.nodes))
        total = sum(sizes.get((n.domain, n.op, n.overload), 0) for n in nodes)
        self._most = MAX_EXPANDED + 4 * (len(nodes) + sum(map(len, own.values())))
        if total > self._most:
            raise OnnxError(f"{source}: its functions stand for {total} nodes; {self._most} are the most for a file of this size")

    # -- inputs and outputs --------------------------------------------------------------------------------------------
    def _arguments(self, scope: Scope) -> list[Node]:
        graph = self.model.graph
        for name, stored in graph.initializers.items():
            scope.names[name] = self._stored(stored, name)
        made: list[Node] = []
        for v in graph.inputs:
            if v.name in graph.initializers:
                continue
            if v.kind != "tensor":
                self.problems.append(f"input {v.name!r} is a {v.kind}; only tensors are supported")
                scope.names[v.name] = PENDING
                continue
            dtype = dtype_of(v.dtype, f"{self.model.source}: input {v.name!r}")
            try:
                node = self._trace.input(v.name, TensorType(dtype, self._shape(v)), "data")
            except ShapeError as error:
                raise OnnxError(f"{self.model.source}: input {v.name!r}: {error}") from error
            made.append(node)
            known = self.known.get(v.name)
            scope.names[v.name] = self._from_node(node, v.name) if known is None else self._known(known, v.name)
        return made

    def _shape(self, v: ValueDef) -> tuple[Dim, ...]:
        declared: Sequence[int | str | None] | None = self.shapes.get(v.name, v.shape)
        if declared is None:
            raise OnnxError(
                f"{self.model.source}: input {v.name!r} has no declared shape; give it: load(..., shapes={{{v.name!r}: (1, 3)}})"
            )
        return tuple(self._dim(v.name, axis, d) for axis, d in enumerate(declared))

    def _dim(self, name: str, axis: int, d: int | str | None) -> Dim:
        if isinstance(d, int):
            return d
        if d is not None and d in self.sizes:
            return self.sizes[d]
        # a name that is no word ('?') names nothing: axes that share it need not be equal
        asked = d if d is not None and re.search(r"\w", d) else f"{name}_{axis}"
        found = self._symbols.get(asked)
        if found is None:
            base = _identifier(asked) or "d"
            found, count = base, 1
            while found in self._symbols.values():
                count += 1
                found = f"{base}_{count}"
            self._symbols[asked] = found
        if found in self.sizes:
            return self.sizes[found]
        try:
            return symbol(found)
        except TensorwrightError:  # a word of the text form
            self._symbols[asked] = found = f"{found}_size"
            return symbol(found)

    def _output(self, v: ValueDef, scope: Scope) -> Node:
        found = scope.find(v.name)
        if found is None:
            raise OnnxError(f"{self.model.source}: nothing defines the output {v.name!r}")
        if isinstance(found, ValueList):
            raise OnnxError(f"{self.model.source}: output {v.name!r} is a sequence; only tensors are supported")
        if v.kind == "tensor" and v.dtype and dtype_of(v.dtype, f"output {v.name!r}") is not found.dtype:
            declared = dtype_of(v.dtype, f"output {v.name!r}")
            raise OnnxError(
                f"{self.model.source}: output {v.name!r} is declared as {declared}, and the nodes make it {found.dtype}"
            )
        return found.tensor.node

    # -- values --------------------------------------------------------------------------------------------------------
    def _stored(self, stored: Stored, key: str, weight: bool = True) -> Value:
        try:
            dtype = as_dtype(stored.dtype)
        except TypeError:
            raise OnnxError(f"{self.model.source}: {key!r} has element type {stored.dtype}, which is not supported") from None
        is_weight = weight and stored.size > 1 and (dtype.is_float or (dtype.is_integer and dtype.bits <= 8))
        return Value(dtype, stored.shape, load=stored.load, make=self._materialise, key=key, weight=is_weight)

    def _known(self, array: Array, key: str = "", dtype: DType = i64) -> Value:
        found, kind = normal(array, dtype)
        return Value(kind, found.shape, known=found, make=self._materialise, key=key)

    def stored_value(self, stored: Stored, key: str) -> Value:
        """An array of the file as a Value; `key` names the parameter that it becomes if it is data."""
        return self._stored(stored, key)

    def sizes_of(self, array: Array, dtype: DType = i64) -> Value:
        """An array of sizes as a Value of a dtype."""
        return self._known(array, dtype=dtype)

    def _from_node(self, node: Node, key: str = "") -> Value:
        t = node.tensor
        return Value(t.dtype, t.shape, tensor=wrap(node), key=key)

    def _materialise(self, v: Value) -> Tensor:
        known = v.known
        assert known is not None
        if known.dtype == object:
            parts = [as_tensor(d, v.dtype) for d in known.ravel()]
            return parts[0] if not known.shape else reshape(stack(parts), known.shape)
        if not v.weight:
            return apply("constant", value=Literal(known))
        node = self._trace.input(v.key, TensorType(v.dtype, known.shape), "parameter")
        name = str(node.attrs["name"])
        self.weights[name] = known
        self._weight_nodes[node] = name
        return wrap(node)

    def as_value(self, result: Any, key: str = "") -> Value:
        """What a function of an op returned, as a Value."""
        if isinstance(result, Value):
            return result
        if isinstance(result, FrontendValue):
            return self._from_node(result.node, key)
        if isinstance(result, Stored):
            return self._stored(result, key)
        if isinstance(result, (np.ndarray, np.generic)):
            return self._known(np.asarray(result), key)
        if isinstance(result, (int, DimExpr)) and not isinstance(result, bool):
            return self._known(array_of([result]).reshape(()), key)
        raise TypeError(f"the function of an op returned a {type(result).__name__}")

    # -- numbers known at import ---------------------------------------------------------------------------------------
    def constant(self, v: Value) -> Array | None:
        """The numbers of a value where they follow from the model alone, else None."""
        if v.is_known:
            known = v.known
            return None if known is None or known.dtype == object else known
        if v.key in self.known:
            return self.known[v.key]
        return None if v.made is None else self.evaluate(v.made)

    def evaluate(self, tensor: Tensor) -> Array | None:
        """The numbers of a Tensor that depends on constants and weights alone, else None."""
        node = tensor.node
        size = node.tensor.size
        if not isinstance(size, int) or size > MAX_EVALUATED or not self._is_steady(node):
            return None
        weights = [n for n in postorder([node]) if n in self._weight_nodes]
        values = [self.weights[self._weight_nodes[n]] for n in weights]
        return execute(Graph(tuple(weights), (node,)), values)[0]

    def _is_steady(self, node: Node) -> bool:
        stack = [node]
        while stack:
            n = stack[-1]
            if n in self._steady:
                stack.pop()
                continue
            if not n.inputs:
                size = n.tensor.size if n.op.name != "input" else 0
                ok = n in self._weight_nodes or n.op.name == "constant" or (n.op.name != "input" and isinstance(size, int))
                self._steady[n] = ok
                stack.pop()
                continue
            waiting = [i for i in n.inputs if i not in self._steady]
            if waiting:
                stack += waiting
                continue
            self._steady[n] = all(self._steady[i] for i in n.inputs)
            stack.pop()
        return self._steady[node]

    def need(self, key: str, tensor: Tensor) -> Array:
        """The numbers of a Tensor from an earlier stage. Raises NeedsValue where there was none."""
        found = self.known.get(key)
        if found is None:
            raise NeedsValue(key, tensor)
        return found

    # -- nodes ---------------------------------------------------------------------------------------------------------
    def _nodes(self, nodes: Sequence[NodeDef], scope: Scope) -> None:
        for number, node in enumerate(nodes):
            self._node(node, number, scope)

    def _node(self, node: NodeDef, number: int, scope: Scope) -> None:
        inputs: list[Value | None] = []
        for name in node.inputs:
            found = scope.find(name) if name else None
            if name and found is None:
                raise OnnxError(f"{self.model.source}: {show(node)} reads {name!r}, which nothing defines")
            inputs.append(found)
        if any(v is PENDING for v in inputs):
            scope.names |= dict.fromkeys(filter(None, node.outputs), PENDING)
            return
        if node.references:
            given = {k: scope.attributes[r] for k, r in node.references.items() if scope.attributes.get(r) is not None}
            node = NodeDef(
                node.op, node.domain, node.name, node.inputs, node.outputs, {**node.attributes, **given}, node.overload
            )
        before = self._trace.here
        self._trace.here = Label(node.outputs[0] if node.outputs else node.name, self._location(node, number, scope))
        try:
            results = self._convert(node, inputs, scope)
        except Unsupported as error:
            self.problems.append(str(error))
            results = None
        except NeedsValue as need:
            if scope.depth and not self._can_wait(scope):
                message = f"{show(node)} needs numbers known only at run time, inside of a loop or a branch"
                self.problems.append(message)
            self.needs[need.key] = need.tensor
            results = None
        except Pending:
            results = None
        finally:
            self._trace.here = before
        for k, name in enumerate(node.outputs):
            if not name:
                continue
            if results is None:
                scope.names[name] = PENDING
            elif k < len(results) and results[k] is not None:
                scope.names[name] = self._keyed(results[k], scope.prefix + name)
            else:
                raise OnnxError(f"{self.model.source}: {show(node)} names {len(node.outputs)} outputs and gives {len(results)}")

    def _can_wait(self, scope: Scope) -> bool:
        """Whether the node is not part of a body that is being recorded."""
        return not self._recording

    _recording = 0

    def _keyed(self, result: Any, key: str) -> Value:
        found = self.as_value(result, key)
        if found.key:
            return found
        found.key = key
        return found

    def _location(self, node: NodeDef, number: int, scope: Scope) -> Location:
        return Location(self.model.source, number, f"{scope.prefix}{node.name}: {node.qualified}")

    def _convert(self, node: NodeDef, inputs: list[Value | None], scope: Scope) -> Sequence[Any]:
        found = self._function(node)
        if found is not None:
            return self._expand(node, found, inputs, scope)
        version = scope.opsets.get(node.domain, self.model.opsets.get(node.domain, 0))
        call = Call(self, node, version, inputs, scope.prefix)
        call_scope, self._scope = getattr(self, "_scope", scope), scope
        try:
            folded = self._folded(call)
            if folded is not None:
                return (folded,)
            convert = lookup(node.domain, node.op, version)
            if convert is None:
                function = standard_function(node, version).body(inputs, version)
                if function is None:
                    call.unsupported("this op is not supported")
                return self._expand(node, function, inputs, scope)
            result = convert(call)
        except OnnxError:
            raise
        except ShapeError as error:
            self._fix_sizes(call, error)
            raise OnnxError(f"{self.model.source}: {call.where}: {error}") from error
        except (TensorwrightError, ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError) as error:
            raise OnnxError(f"{self.model.source}: {call.where}: {error}") from error
        finally:
            self._scope = call_scope
        unread = sorted(set(node.attributes) - call.read)
        if unread:
            call.unsupported(f"the attributes {unread} are not known")
        return result if isinstance(result, (tuple, list)) else (result,)

    def _fix_sizes(self, call: Call, error: ShapeError) -> None:
        """Shapes that do not fit as far as symbols go may fit once they are numbers: exporters write an example's sizes into
        models that they declare symbolic. Asks for the numbers of all symbols among the inputs' shapes."""
        names = sorted(frozenset().union(*(symbols(d) for v in call.inputs if v is not None for d in v.shape)))
        for name in names:
            self.reasons.setdefault(SIZE + name, f"{call.where}: {str(error).splitlines()[0]}")
            self.needs.setdefault(SIZE + name, as_tensor(symbol(name)))
        if names:
            raise NeedsValue(SIZE + names[0], self.needs[SIZE + names[0]])

    def _folded(self, call: Call) -> Value | None:
        rule = fold_of(call.node.domain, call.node.op)
        if rule is None or not call.inputs:
            return None
        arrays: list[Array | None] = []
        for v in call.inputs:
            if v is None:
                arrays.append(None)
                continue
            size = v.size
            if not v.is_known or v.weight or not isinstance(size, int) or size > MAX_FOLDED or v.dtype.is_float:
                return None
            arrays.append(v.known)
        with np.errstate(all="ignore"):
            found = rule(call, arrays)
        if found is None or isinstance(found, Value):
            return found
        first = next(v for v in call.inputs if v is not None)
        if found.dtype == object:
            return self._known(found, dtype=first.dtype if first.dtype is not bool_ else i64)
        return self._known(found)

    # -- functions and bodies ------------------------------------------------------------------------------------------
    def _function(self, node: NodeDef) -> FunctionDef | None:
        return self.model.functions.get((node.domain, node.op, node.overload))

    def _expand(self, node: NodeDef, function: FunctionDef, inputs: Sequence[Value | None], scope: Scope) -> list[Value | None]:
        key = (function.domain, function.name, function.overload)
        if key in scope.calls:
            raise OnnxError(f"{self.model.source}: {show(node)}: the function {function.name!r} calls itself")
        if scope.depth >= MAX_DEPTH:
            raise OnnxError(f"{self.model.source}: {show(node)}: functions are nested deeper than {MAX_DEPTH} levels")
        self.expanded += len(function.nodes)
        if self.expanded > self._most:
            raise OnnxError(f"{self.model.source}: {show(node)}: functions stand for more than {self._most} nodes")
        if len(inputs) > len(function.inputs):
            raise OnnxError(f"{self.model.source}: {show(node)}: {len(inputs)} inputs for {len(function.inputs)} of the function")
        attributes = {**function.attributes, **node.attributes}
        prefix = f"{scope.prefix}{node.name}/"
        inner = Scope(function.opsets, prefix, None, attributes, depth=scope.depth + 1, calls=(*scope.calls, key))
        for name, v in zip(function.inputs, inputs, strict=False):
            if v is not None:
                inner.names[name] = v
        missing = [n for n in function.inputs if n not in inner.names]
        nodes = [_without(n, missing) for n in function.nodes] if missing else function.nodes
        self._nodes(nodes, inner)
        found = [inner.find(o) for o in function.outputs]
        if any(f is PENDING for f in found):
            raise Pending
        return found

    def run_body(self, call: Call, body: GraphDef, inputs: Sequence[Value], tag: str) -> list[Value]:
        """The outputs of a body for these inputs; the names around it are visible."""
        around: Scope = self._scope
        if around.depth >= MAX_DEPTH:
            call.fail(f"bodies are nested deeper than {MAX_DEPTH} levels")
        if len(inputs) != len(body.inputs):
            call.fail(f"the body {body.name!r} takes {len(body.inputs)} inputs, got {len(inputs)}")
        prefix = f"{around.prefix}{call.node.name}.{tag}/"
        inner = Scope(around.opsets, prefix, around, around.attributes, depth=around.depth + 1, calls=around.calls)
        for name, stored in body.initializers.items():
            inner.names[name] = self._stored(stored, prefix + name)
        for v, given in zip(body.inputs, inputs, strict=True):
            inner.names[v.name] = given
        self._nodes(body.nodes, inner)
        self._scope = around
        found: list[Value] = []
        for v in body.outputs:
            value = inner.find(v.name)
            if value is None:
                call.fail(f"nothing defines the output {v.name!r} of the body {body.name!r}")
            if value is PENDING:
                raise Pending
            found.append(value)
        return found

    def mark(self) -> tuple[int, dict[str, Tensor]]:
        """What is known to be missing so far; `restore` forgets what came after, where an attempt is given up for another."""
        return len(self.problems), dict(self.needs)

    def restore(self, mark: tuple[int, dict[str, Tensor]]) -> None:
        count, needs = mark
        del self.problems[count:]
        self.needs.clear()
        self.needs.update(needs)

    def recorded(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as the function of a loop or branch: inside, no numbers of a run can be asked for."""

        def wrapped(*arguments: Any) -> Any:
            self._recording += 1
            try:
                return fn(*arguments)
            finally:
                self._recording -= 1

        return wrapped


def _without(node: NodeDef, missing: Sequence[str]) -> NodeDef:
    if not any(i in missing for i in node.inputs):
        return node
    inputs = tuple("" if i in missing else i for i in node.inputs)
    return NodeDef(node.op, node.domain, node.name, inputs, node.outputs, node.attributes, node.overload, node.references)


def _nodes_within(nodes: Sequence[NodeDef]) -> Iterator[NodeDef]:
    """Nodes, and those of the bodies in them."""
    stack = [nodes]
    while stack:
        for n in stack.pop():
            yield n
            for v in n.attributes.values():
                stack += [g.nodes for g in (v if isinstance(v, tuple) else (v,)) if isinstance(g, GraphDef)]


def _all_nodes(model: ModelDef) -> Iterator[tuple[NodeDef, Mapping[str, int]]]:
    """Every node of the model, of bodies and of functions, with the opsets that hold for it."""
    for nodes, opsets in ((model.graph.nodes, model.opsets), *((f.nodes, f.opsets) for f in model.functions.values())):
        for n in _nodes_within(nodes):
            yield n, opsets


def _identifier(text: str) -> str:
    """A name reduced to an ASCII identifier; empty where nothing is left."""
    found = re.sub(r"\W", "_", text, flags=re.ASCII).strip("_")
    return f"d{found}" if found[:1].isdigit() else found
