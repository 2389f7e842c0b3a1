"""The table of how ops of ours are written in ONNX, and the opset that a node takes at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ...ir.dtypes import DType
from ...ir.graph import Graph, Node
from ...ir.op import Trait
from ...ir.types import TupleType
from .types import SINCE, type_number

if TYPE_CHECKING:
    from .exporter import Emitter

Write = Callable[["Emitter", Node], Any]
OLDEST: Final = 21  # the opset from which everything else is written
_TABLE: Final[dict[str, Write]] = {}
_SINCE: Final[dict[str, int]] = {}


def writes(*names: str, since: int = OLDEST) -> Callable[[Write], Write]:
    """Registers how ops of ours are written, from an opset on."""

    def register(fn: Write) -> Write:
        _TABLE.update(dict.fromkeys(names, fn))
        _SINCE.update(dict.fromkeys(names, since))
        return fn

    return register


def writer(node: Node) -> Write | None:
    """How a node is written; None where ONNX has nothing for it."""
    found = _TABLE.get(node.op.name)
    if found is not None:
        return found
    if node.op.onnx is not None and node.op.has(Trait.ELEMENTWISE):
        return _plain
    return None


def _plain(e: Emitter, node: Node) -> str:
    """The one ONNX op of an elementwise record. Operands that are broadcast are given as they were before, where the others
    have the whole shape: ONNX broadcasts by the same rules."""
    assert node.op.onnx is not None
    return e.emit(node.op.onnx[0], operands(e, node))


def operands(e: Emitter, node: Node) -> list[str]:
    """The names of the operands of an elementwise op, without broadcasts that ONNX makes itself."""
    sources = [i.inputs[0] if i.op.name == "broadcast_to" else i for i in node.inputs]
    if len(sources) == 1 or all(s.shape != node.shape for s in sources):
        return [e.name(i) for i in node.inputs]
    return [e.name(s) for s in sources]


def least_opset(node: Node) -> int:
    """The opset that has the node's op and its type."""
    items = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    types = [SINCE.get(type_number(t.dtype), OLDEST) for t in items if _known(t.dtype)]
    return max(_SINCE.get(node.op.name, OLDEST), *types, OLDEST)


def least_of(graph: Graph) -> int:
    """The opset that has everything in the graph, and in the bodies in it."""
    found, stack = OLDEST, [graph]
    while stack:
        g = stack.pop()
        for n in g.nodes():
            found = max(found, least_opset(n))
            stack += [v for v in n.attrs.values() if isinstance(v, Graph)]
    return found


def _known(dtype: DType) -> bool:
    try:
        type_number(dtype)
    except KeyError:
        return False
    return True
