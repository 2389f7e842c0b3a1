"""The graph IR: pure, immutable, hash-consed nodes, and graphs of them.

`Node(op, inputs, attrs, type)` is made once per distinct content: the same expression is the same object, so common
subexpressions need no pass, dead code is what no output reaches, and "did it change?" is `is`. Names and source
locations are labels of a Graph, never part of a node's identity.

A node with several outputs has a TupleType; `get` nodes take its parts. Inputs are nodes too: op `input` with the
attributes `name` and `role`. Attribute values are hashable: int, float, bool, str, None, DType, a dimension, a tuple of
such, a `Literal` (an array by content), a `Contraction`, or a Graph (the body of a fused region or a loop).
"""

from __future__ import annotations

import functools
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .dims import Dim
from .dtypes import DType, as_dtype
from .errors import VerifyError
from .types import TensorType, TupleType, Type

if TYPE_CHECKING:
    from .op import Op

ROLES: Final = ("data", "parameter", "state", "prepared")
Attr = Any
Attrs = Mapping[str, Attr]


class Literal:
    """A constant array known by its content (dtype, shape and bytes), so that equal arrays are one constant."""

    __slots__ = ("array", "digest")
    array: np.ndarray[Any, Any]
    digest: str

    def __init__(self, array: Any, dtype: object | None = None) -> None:
        wanted = as_dtype(np.asarray(array).dtype if dtype is None else dtype).numpy  # in native byte order
        value = np.array(array, dtype=wanted, order="C", copy=True)
        value.flags.writeable = False
        self.array = value
        head = f"{as_dtype(value.dtype).name}{value.shape}".encode()
        self.digest = hashlib.sha256(head + value.tobytes()).hexdigest()

    @property
    def type(self) -> TensorType:
        return TensorType(as_dtype(self.array.dtype), self.array.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Literal({self.type}, {self.digest[:12]})"


@dataclass(frozen=True, slots=True)
class Location:
    """A line of the user's source (or a node of an imported model)."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f": {self.text}" if self.text else "")


@dataclass(frozen=True, slots=True)
class Label:
    """What a graph remembers of a node besides its content."""

    name: str | None = None
    location: Location | None = None


def _key(value: Attr) -> Attr:
    # True == 1 == 1.0 and -0.0 == 0.0 must not merge nodes.
    kind = value.__class__
    if kind is int or kind is str:
        return value
    if kind is tuple:
        return tuple([x if x.__class__ is int else _key(x) for x in value])
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, bool):
        return ("bool", value)
    return tuple(map(_key, value)) if isinstance(value, tuple) else value


_interned: weakref.WeakValueDictionary[tuple[object, ...], Node] = weakref.WeakValueDictionary()
_known: Final[Callable[[tuple[object, ...]], Callable[[], Node | None] | None]] = vars(_interned)["data"].get
_lock = threading.Lock()


class Node:
    """One operation on the values of `inputs`. Make nodes with `ir.op.make`, which infers and checks the type."""

    __slots__ = ("__weakref__", "attrs", "inputs", "op", "type")
    op: Op
    inputs: tuple[Node, ...]
    attrs: Attrs
    type: Type

    def __new__(cls, op: Op, inputs: tuple[Node, ...], attrs: Attrs, type: Type) -> Node:
        items = sorted(attrs.items())
        key = (op.name, inputs, tuple([(k, _key(v)) for k, v in items]), type)
        reference = _known(key)  # looked up without the lock: a dead reference is one not found
        if reference is not None and (found := reference()) is not None:
            return found
        with _lock:
            found = _interned.get(key)
            if found is None:
                found = object.__new__(cls)
                _set_op(found, op)
                _set_inputs(found, inputs)
                _set_attrs(found, MappingProxyType(dict(items)))
                _set_type(found, type)
                _interned[key] = found
            return found

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Node is immutable; use replace()")

    @property
    def tensor(self) -> TensorType:
        """The type of a single-output node. Raises VerifyError for a node with several outputs."""
        found = self.type
        if isinstance(found, TupleType):
            raise VerifyError(f"{self.op.name} has {len(found.items)} outputs; take one with a get node")
        return found

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    def replace(self, inputs: tuple[Node, ...] | None = None, **attrs: Attr) -> Node:
        """This node with other inputs or attributes, its type inferred anew; the node itself if nothing changes."""
        from .op import make  # the record registry needs Node: a cycle in types only

        new = self.inputs if inputs is None else inputs
        if new == self.inputs and not attrs:
            return self
        return make(self.op, *new, **{**self.attrs, **attrs})

    def __repr__(self) -> str:
        return f"<{self.op.name} {self.type}>"


_set_op, _set_inputs, _set_attrs, _set_type = (Node.__dict__[name].__set__ for name in ("op", "inputs", "attrs", "type"))


def postorder(roots: Iterable[Node]) -> Iterator[Node]:
    """Every node the roots depend on, once, inputs before users, in an order fixed by the structure. Iterative."""
    seen: set[Node] = set()
    stack: list[Node | None] = list(roots)
    stack.reverse()
    waiting: list[Node] = []  # whose inputs are being visited: a None on the stack closes the last of them
    while stack:
        node = stack.pop()
        if node is None:
            yield waiting.pop()
        elif node not in seen:
            seen.add(node)
            if not node.inputs:
                yield node
                continue
            waiting.append(node)
            stack.append(None)
            stack += node.inputs[::-1]


@dataclass(frozen=True, eq=False)
class Graph:
    """A function from its inputs to its outputs.

    `inputs` are `input` nodes with distinct names (all are arguments, used or not); `output_names` names the outputs.
    `aliases` holds (output index, input index) pairs: the caller donates that input's buffer for that output, as a
    training step does with its state; the types must be equal. `labels` is for readers and errors only. `weights` are values
    of parameters that came with the graph, by input name: beside it, as labels are, and never part of what it is.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    output_names: tuple[str, ...] = ()
    name: str = "main"
    aliases: tuple[tuple[int, int], ...] = ()
    labels: Mapping[Node, Label] = field(default_factory=dict, repr=False)
    weights: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.output_names:
            names = ("y",) if len(self.outputs) == 1 else tuple(f"y{i}" for i in range(len(self.outputs)))
            object.__setattr__(self, "output_names", names)

    def _identity(self) -> tuple[object, ...]:
        return (self.inputs, self.outputs, self.output_names, self.name, self.aliases)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def nodes(self) -> list[Node]:
        """All nodes in a fixed topological order: the inputs first, then what the outputs need."""
        return list(self._order)

    @functools.cached_property
    def _order(self) -> tuple[Node, ...]:
        return tuple(postorder((*self.inputs, *self.outputs)))

    @functools.cached_property
    def ops(self) -> frozenset[Op]:
        """The records of its nodes."""
        return frozenset(n.op for n in self._order)

    def users(self) -> dict[Node, list[Node]]:
        """For each node, the nodes that take it as an input (outputs of the graph are not counted)."""
        table: dict[Node, list[Node]] = {n: [] for n in self._order}
        for n in table:
            for i in dict.fromkeys(n.inputs):
                table[i].append(n)
        return table

    def location(self, node: Node) -> Location | None:
        label = self.labels.get(node)
        return None if label is None else label.location

    def with_outputs(self, outputs: Sequence[Node], labels: Mapping[Node, Label] | None = None) -> Graph:
        """The same signature with other output nodes; the graph itself if they are the same."""
        new = tuple(outputs)
        if new == self.outputs:
            return self
        kept = self.labels if labels is None else labels
        return Graph(self.inputs, new, self.output_names, self.name, self.aliases, kept, self.weights)

    def map_nodes(self, rule: Callable[[Node, tuple[Node, ...]], Node]) -> Graph:
        """Rebuilds the graph bottom-up: `rule(node, new_inputs)` gives the node that stands in for `node`.

        Labels follow their nodes. Inputs of the graph are kept as they are.
        """
        done: dict[Node, Node] = {}
        labels = dict(self.labels)
        arguments = set(self.inputs)
        for node in postorder(self.outputs):
            if node in arguments:
                done[node] = node
                continue
            new = rule(node, tuple(done[i] for i in node.inputs))
            done[node] = new
            if new is not node and node in self.labels:
                labels.setdefault(new, self.labels[node])
        return self.with_outputs([done[o] for o in self.outputs], labels)

    def __str__(self) -> str:
        from .text import print_graph

        return print_graph(self)

    @staticmethod
    def parse(text: str, constants: Mapping[str, np.ndarray[Any, Any]] | None = None) -> Graph:
        """The graph that `str` printed; `constants` supplies large arrays by digest. Raises ParseError."""
        from .text import parse_graph

        return parse_graph(text, constants)

    def fingerprint(self) -> str:
        """A hash of what the graph computes: text without labels, constants by content."""
        from .text import print_graph

        return hashlib.sha256(print_graph(self, labels=False).encode()).hexdigest()
