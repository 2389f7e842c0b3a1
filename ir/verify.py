"""The verifier: what every graph must satisfy, at three levels of effort. Its errors show the bad node in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .dims import DimExpr, as_int, symbols
from .dtypes import f32
from .errors import TensorwrightError, VerifyError
from .graph import ROLES, Graph, Literal, Node
from .lowering import Contract, Lowering, Map, Reduce, Sparse, Structural, View
from .op import REGISTRY, Trait, make
from .ops.structural import FUSED, INPUT
from .padding import padding_of
from .text import format_attribute, print_node, value_names
from .types import TupleType

LEVELS: Final = ("basic", "types", "full")
# In which of the factors an axis of each kind may occur; absent from one, it broadcasts it.
_USED_IN: Final = {"batch": ("AB", "A", "B", ""), "m": ("A", ""), "n": ("B", ""), "k": ("AB", "A", "B", "")}


def verify(graph: Graph, level: str = "full") -> None:
    """Raises VerifyError, with the lines around the bad node, if the graph breaks an invariant.

    'basic'   inputs and outputs are what they say: distinct names, no undeclared input, tensors as outputs, aliases of
              equal types, operands in the number that each op takes
    'types'   also: every recorded type is what the op infers now
    'full'    also: attributes complete and printable, contraction maps in range, labels on nodes of the graph, symbols
              that the inputs determine, and bodies of fused regions, recursively, by the rules of their kind
    """
    if level not in LEVELS:
        raise VerifyError(f"unknown level {level!r}; the levels are {', '.join(LEVELS)}")
    pending = [(graph, frozenset[str]())]
    while pending:
        check = _Check(*pending.pop())
        check.signature()
        for node in check.order:
            check.basic(node)
            if level != "basic":
                check.types(node)
        if level == "full":
            check.full()
            sizes = check.sizes | frozenset().union(*(i.tensor.symbols for i in check.graph.inputs))
            pending += [(v, sizes) for n in check.order for v in n.attrs.values() if isinstance(v, Graph)]


def neighbourhood(graph: Graph, node: Node, before: int = 3, after: int = 2) -> str:
    """The text of a node between some of its operands and users, marked with an arrow."""
    names = value_names(graph)
    order = {n: k for k, n in enumerate(names)}
    operands = sorted({i for i in node.inputs if i in order}, key=order.__getitem__)[-before:]
    users = [n for n in names if node in n.inputs][:after]
    lines: list[str] = []
    for n in (*operands, node, *users):
        try:
            text = print_node(n, names, graph.labels.get(n))
        except TensorwrightError:
            text = f"{names.get(n, '%?')} = {n.op.name}(...) {dict(n.attrs)!r}"
        mark = "--> " if n is node else "    "
        lines.append(mark + (text if len(text) < 400 else text[:400] + " ..."))
    return "\n".join(lines)


class _Check:
    """The checks of one graph (not of the bodies in it, where sizes of the graph around them are known)."""

    def __init__(self, graph: Graph, sizes: frozenset[str] = frozenset()) -> None:
        self.graph = graph
        self.sizes = sizes  # known from the graph around this one
        self.order = graph.nodes()
        self.declared = set(graph.inputs)
        self.lowered: dict[Node, Lowering] = {}

    def fail(self, message: str, node: Node | None = None) -> VerifyError:
        where = f"graph {self.graph.name!r}: "
        return VerifyError(where + message + ("" if node is None else "\n" + neighbourhood(self.graph, node)))

    def signature(self) -> None:
        graph = self.graph
        names: set[str] = set()
        for k, node in enumerate(graph.inputs):
            if node.op is not INPUT:
                raise self.fail(f"input {k} is a node of {node.op.name}, not an input", node)
            name = node.attrs["name"]
            if name in names:
                raise self.fail(f"two inputs are named {name!r}", node)
            names.add(name)
        if len(graph.output_names) != len(graph.outputs):
            raise self.fail(f"{len(graph.outputs)} outputs with {len(graph.output_names)} names")
        if len(set(graph.output_names)) != len(graph.output_names):
            twice = sorted(n for n in set(graph.output_names) if graph.output_names.count(n) > 1)
            raise self.fail(f"output names are used twice: {twice}")
        for name, node in zip(graph.output_names, graph.outputs, strict=True):
            if isinstance(node.type, TupleType):
                raise self.fail(f"output {name!r} is a tuple; return its parts, taken with get", node)
        outputs, inputs = set[int](), set[int]()
        for output, argument in graph.aliases:
            if not (0 <= output < len(graph.outputs) and 0 <= argument < len(graph.inputs)):
                raise self.fail(f"alias {(output, argument)} names an output or input that is not there")
            if output in outputs or argument in inputs:
                raise self.fail(f"alias {(output, argument)} repeats an output or input")
            outputs.add(output)
            inputs.add(argument)
            if graph.outputs[output].type != graph.inputs[argument].type:
                raise self.fail(
                    f"alias {(output, argument)}: output {graph.output_names[output]!r} is {graph.outputs[output].type}, "
                    f"input {graph.inputs[argument].attrs['name']!r} is {graph.inputs[argument].type}",
                    graph.outputs[output],
                )

    def basic(self, node: Node) -> None:
        if REGISTRY.get(node.op.name) is not node.op:
            raise self.fail(f"op {node.op.name!r} is not registered", node)
        if node.op is INPUT and node not in self.declared:
            raise self.fail(f"input {node.attrs['name']!r} is used but not declared", node)
        if node.op.arity is not None and len(node.inputs) != node.op.arity:
            raise self.fail(f"{node.op.name} takes {node.op.arity} operands, this node has {len(node.inputs)}", node)
        if not node.op.has(Trait.STRUCTURAL):
            for k, operand in enumerate(node.inputs):
                if isinstance(operand.type, TupleType):
                    raise self.fail(f"operand {k} of {node.op.name} is a tuple; take a part with get", node)

    def types(self, node: Node) -> None:
        structural = node.op.has(Trait.STRUCTURAL)
        given = [i.type if structural else i.tensor for i in node.inputs]
        try:
            inferred = node.op.infer(given, node.attrs)  # type: ignore[arg-type]
        except TensorwrightError as e:
            raise self.fail(str(e), node) from e
        if inferred != node.type:
            raise self.fail(f"{node.op.name} is recorded as {node.type}, its operands and attributes give {inferred}", node)

    def full(self) -> None:
        known = set(self.order)
        for labelled in self.graph.labels:
            if labelled not in known:
                raise self.fail(f"a label is on {labelled!r}, which is not in the graph")
        declared = frozenset[str]()
        determined = self.sizes
        for i in self.graph.inputs:
            declared |= i.tensor.symbols
            for d in i.shape:
                if isinstance(d, DimExpr) and len(symbols(d)) == 1:
                    determined |= symbols(d)
        if lost := declared - determined:
            raise self.fail(f"no input has a dimension of {sorted(lost)} alone: its size cannot be known from arguments")
        for node in self.order:
            self.attributes(node)
            items = node.type.items if isinstance(node.type, TupleType) else (node.type,)
            for t in items:
                if foreign := t.symbols - declared - self.sizes:
                    raise self.fail(f"the size {sorted(foreign)} comes from no input", node)
            if node.op.has(Trait.CONTRACTION):
                self.contract(node)
            if node.op is FUSED:
                self.fused(node)

    def contract(self, node: Node) -> None:
        """The lowering of a contraction is a well-formed `contract` of the same type (or its f32 sums of 16-bit floats)."""
        low = self.lower(node)
        if not isinstance(low, Contract):
            return
        spec = low.spec
        try:
            same = make("contract", *node.inputs[:2], spec=spec)
        except TensorwrightError as e:
            raise self.fail(f"the contraction that {node.op.name} lowers to: {e}", node) from e
        sums = node.dtype is f32 and same.dtype.is_float and same.dtype.bits == 16
        if same.shape != node.shape or (same.dtype is not node.dtype and not sums):
            raise self.fail(f"{node.op.name} lowers to a contraction of type {same.type}", node)
        for x in spec.axes:
            used = "".join(n for n, maps in (("A", spec.a), ("B", spec.b)) if any(x.name in dict(m.terms) for m in maps))
            if used not in _USED_IN[x.kind]:
                raise self.fail(f"axis {x.name!r} of kind {x.kind!r} cannot occur in {used}", node)

    def attributes(self, node: Node) -> None:
        if node.attrs.keys() != node.op.attrs.keys():
            raise self.fail(f"{node.op.name} has attributes {sorted(node.attrs)}, its record says {sorted(node.op.attrs)}", node)
        if node.op is INPUT and node.attrs["role"] not in ROLES:
            raise self.fail(f"unknown role {node.attrs['role']!r}", node)
        for key, value in node.attrs.items():
            if not isinstance(value, Graph | Literal):
                try:
                    format_attribute(value)
                except TensorwrightError as e:
                    raise self.fail(f"attribute {key!r}: {e}", node) from e

    def lower(self, node: Node) -> Lowering:
        if node not in self.lowered:
            self.lowered[node] = node.op.lower(node)
        return self.lowered[node]

    def fused(self, node: Node) -> None:
        body, kind = node.attrs["body"], node.attrs["kind"]
        inner = _Check(body)
        for k, i in enumerate(body.inputs):
            if i.op is not INPUT or i.attrs["name"] != f"p{k}" or i.attrs["role"] != "data":
                raise inner.fail(f"input {k} of a fused body is an input named p{k} of role data", i)
        if body.aliases:
            raise inner.fail("a fused body has no aliases")
        inner.kind(kind)

    # Kinds of fused regions: what may be in the body. The fusion pass and the code generator agree on these.

    def kind(self, kind: str) -> None:
        work = [n for n in self.order if not isinstance(self.lower(n), Structural)]
        for n in self.order:
            if n.inputs and isinstance(self.lower(n), Structural):
                raise self.fail(f"{n.op.name} cannot be inside a fused body", n)
        if not work:
            raise self.fail("a fused body computes something")
        special: dict[str, tuple[type, ...]] = {
            "map": (), "rows": (Reduce,), "reduce": (Reduce,), "window": (Reduce,), "contraction": (Contract,),
            "sparse": (Sparse,),
        }  # fmt: skip
        allowed = (Map, View, *special[kind])
        for n in work:
            if not isinstance(self.lower(n), allowed):
                names = ", ".join(c.__name__ for c in allowed)
                raise self.fail(f"a fused body of kind {kind!r} holds {names}; this is a {type(self.lower(n)).__name__}", n)
        reduces = [(n, low) for n in work if isinstance(low := self.lower(n), Reduce)]
        match kind:
            case "map":
                self.one_shape(self.graph.outputs)
            case "rows":
                self.rows(reduces)
            case "reduce":
                self.reductions(reduces)
            case "window":
                self.window(reduces)
            case "contraction":
                self.contraction(work)
            case "sparse":
                self.sparse([n for n in work if isinstance(self.lower(n), Sparse)])

    def one_shape(self, outputs: Sequence[Node]) -> None:
        for o in outputs:
            if o.shape != outputs[0].shape:
                raise self.fail(f"the outputs of this kind have one shape: {o.shape} beside {outputs[0].shape}", o)

    def rows(self, reduces: list[tuple[Node, Reduce]]) -> None:
        if not reduces:
            raise self.fail("a fused body of kind 'rows' has a reduction; without one it is a 'map'")
        full = reduces[0][0].inputs[0].shape
        axes = reduces[0][1].axes or ()
        for n, low in reduces:
            if not low.axes or low.axes != tuple(range(len(full) - len(low.axes), len(full))):
                raise self.fail(f"reductions of kind 'rows' run over the trailing axes, this one over {low.axes}", n)
            if n.inputs[0].shape != full or low.axes != axes:
                raise self.fail(f"reductions of kind 'rows' share shape {full} and axes {axes}", n)
        rows = full[: len(full) - len(axes)]
        shapes = (full, rows, rows + (1,) * len(axes))
        for o in self.graph.outputs:
            if o.shape not in shapes:
                raise self.fail(f"an output of kind 'rows' has one of the shapes {shapes}, not {o.shape}", o)

    def reductions(self, reduces: list[tuple[Node, Reduce]]) -> None:
        if not reduces:
            raise self.fail("a fused body of kind 'reduce' has a reduction; without one it is a 'map'")
        first, low0 = reduces[0]
        for n, low in reduces:
            if low.axes is None or low.axes != low0.axes or n.inputs[0].shape != first.inputs[0].shape:
                raise self.fail(f"reductions of one kernel share shape {first.inputs[0].shape} and axes {low0.axes}", n)
        reduced = set[Node]()
        for n in self.order:
            if any(i in reduced for i in n.inputs):
                if isinstance(self.lower(n), Reduce):
                    raise self.fail("a reduction of kind 'reduce' cannot depend on another", n)
                reduced.add(n)
            elif isinstance(self.lower(n), Reduce):
                reduced.add(n)
        for o in self.graph.outputs:
            if o not in reduced:
                raise self.fail("every output of kind 'reduce' is computed from reduced values", o)

    def window(self, reduces: list[tuple[Node, Reduce]]) -> None:
        if len(reduces) != 1 or reduces[0][1].axes is not None:
            raise self.fail("a fused body of kind 'window' has exactly one reduction, over windows and not whole axes")
        if len(self.graph.outputs) != 1:
            raise self.fail("a fused body of kind 'window' has one output")
        core = reduces[0][0]
        if any(i not in self.graph.inputs for i in core.inputs):
            raise self.fail("the operands of the reduction must be inputs of the body", core)
        if self.graph.outputs[0].shape != core.shape:
            raise self.fail(f"the output has shape {self.graph.outputs[0].shape}, the reduction {core.shape}", core)

    def sparse(self, products: list[Node]) -> None:
        if len(products) != 1 or len(self.graph.outputs) != 1:
            raise self.fail("a fused body of kind 'sparse' has exactly one product with a sparse matrix, and one output")
        (core,) = products
        if any(i not in self.graph.inputs for i in core.inputs):
            raise self.fail("the operands of the sparse product must be inputs of the body", core)
        if self.graph.outputs[0].shape != core.shape:
            raise self.fail(f"the output has shape {self.graph.outputs[0].shape}, the sparse product {core.shape}", core)

    def contraction(self, work: list[Node]) -> None:
        contracts = [n for n in work if isinstance(self.lower(n), Contract)]
        if len(contracts) != 1:
            raise self.fail(f"a fused body of kind 'contraction' has exactly one contraction, not {len(contracts)}")
        core = contracts[0]
        for k, operand in enumerate(core.inputs[:2]):
            if operand not in self.graph.inputs:
                raise self.fail(f"operand {k} of the contraction must be an input of the body", core)
        low = self.lower(core)
        groups = low.spec.groups if isinstance(low, Contract) and low.spec.panel else 0
        last = end = self.graph.outputs[0]
        if padding_of(last) is not None:
            last = end = last.inputs[0]
        while isinstance(self.lower(end), View) and end is not core:
            end = end.inputs[0]
        if groups and end.shape != core.shape:
            width = as_int(core.shape[-1]) // groups
            for o in self.graph.outputs:
                if o.shape != (*core.shape[:-1], width):
                    raise self.fail(f"what joins {groups} groups of columns has outputs of one group, not {o.shape}", o)
            return
        if len(self.graph.outputs) != 1:
            raise self.fail("a fused body of kind 'contraction' has one output", core)
        if end.shape != core.shape:
            raise self.fail(f"the output has shape {end.shape}, the contraction {core.shape}", end)
        trailing = set(self.graph.outputs) - {last}
        n = last
        while isinstance(self.lower(n), View) and n is not end:
            trailing.add(n)
            n = n.inputs[0]
        after = {core}
        for n in self.order:
            if n in trailing or not any(i in after for i in n.inputs):
                continue
            after.add(n)
            if n.shape != core.shape or isinstance(self.lower(n), View):
                raise self.fail(f"the epilogue keeps the contraction's shape {core.shape}; this node has {n.shape}", n)
