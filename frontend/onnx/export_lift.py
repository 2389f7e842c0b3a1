"""Patterns that are one op in ONNX: softmax, log_softmax, gelu, layer_norm, relu and limits as the frontend records them.

Each function gets the last node of what might be its pattern. What is no longer read is left out in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...ir.graph import Node

if TYPE_CHECKING:
    from .exporter import Emitter

Lift = Callable[["Emitter", Node], "str | None"]


def lifted(e: Emitter, node: Node) -> str | None:
    """The name of the value if the node ends a pattern, written as one op; None if it does not."""
    for fn in _LIFTS.get(node.op.name, ()):
        found = fn(e, node)
        if found is not None:
            return found
    return None


def _bare(node: Node) -> Node:
    """What is broadcast."""
    while node.op.name in ("broadcast_to", "stop_gradient"):
        node = node.inputs[0]
    return node


def _is(node: Node, op: str, *inputs: Node) -> bool:
    return node.op.name == op and all(a is b for a, b in zip(node.inputs, inputs, strict=False))


def _number(node: Node) -> float | None:
    node = _bare(node)
    if node.op.name != "constant" or node.shape:
        return None
    return float(node.attrs["value"].array)


def _close(node: Node, value: float) -> bool:
    found = _number(node)
    return found is not None and math.isclose(found, value, rel_tol=1e-3 if node.dtype.bits == 16 else 1e-6)


def _pair(node: Node, op: str, test: Callable[[Node], bool]) -> tuple[Node, Node] | None:
    """(the operand that passes the test, the other one) of an op of two operands in any order."""
    if node.op.name != op:
        return None
    a, b = node.inputs
    return (a, b) if test(a) else (b, a) if test(b) else None


def _centred(node: Node) -> tuple[Node, int] | None:
    """(x, axis) of x - max(x) along one axis."""
    if node.op.name != "sub":
        return None
    x, m = node.inputs[0], _bare(node.inputs[1])
    if not _is(m, "max", x) or len(m.attrs["axes"]) != 1 or not m.attrs["keepdims"]:
        return None
    return x, m.attrs["axes"][0]


def _softmax(e: Emitter, node: Node) -> str | None:
    top, below = node.inputs[0], _bare(node.inputs[1])
    if top.op.name != "exp" or not _is(below, "sum", top):
        return None
    found = _centred(top.inputs[0])
    if found is None or below.attrs["axes"] != (found[1],):
        return None
    return e.emit("Softmax", [e.name(found[0])], axis=found[1])


def _log_softmax(e: Emitter, node: Node) -> str | None:
    found, log = _centred(node.inputs[0]), _bare(node.inputs[1])
    if found is None or log.op.name != "log" or log.inputs[0].op.name != "sum":
        return None
    total = log.inputs[0]
    if not _is(total.inputs[0], "exp", node.inputs[0]) or total.attrs["axes"] != (found[1],):
        return None
    return e.emit("LogSoftmax", [e.name(found[0])], axis=found[1])


def _gelu(e: Emitter, node: Node) -> str | None:
    """(x / 2) * (1 + erf(x / sqrt 2)), or with tanh."""
    half = _pair(node, "mul", lambda n: _pair(n, "mul", lambda c: _close(c, 0.5)) is not None)
    if half is None:
        return None
    x = _pair(half[0], "mul", lambda c: _close(c, 0.5))[1]  # type: ignore[index]
    one = _pair(half[1], "add", lambda c: _close(c, 1.0))
    if one is None:
        return None
    inner = one[1]
    if inner.op.name == "erf":
        scaled = _pair(inner.inputs[0], "mul", lambda c: _close(c, math.sqrt(0.5)))
        return e.emit("Gelu", [e.name(x)]) if scaled is not None and scaled[1] is x else None
    if inner.op.name != "tanh":
        return None
    scaled = _pair(inner.inputs[0], "mul", lambda c: _close(c, math.sqrt(2 / math.pi)))
    cubed = None if scaled is None else _pair(scaled[1], "add", lambda c: c is x)
    return e.emit("Gelu", [e.name(x)], approximate="tanh") if cubed is not None and _cube(cubed[1], x) else None


def _cube(node: Node, x: Node) -> bool:
    """Whether a node is 0.044715 * x * x * x, in any order."""
    factors: list[Node] = []
    stack = [node]
    while stack and len(factors) < 5:
        n = stack.pop()
        if n.op.name == "mul" and n is not x:
            stack += n.inputs
        else:
            factors.append(n)
    return len(factors) == 4 and sum(f is x for f in factors) == 3 and any(_close(f, 0.044715) for f in factors)


def _standardised(node: Node) -> tuple[Node, int, float] | None:
    """(x, first axis, eps) of (x - mean) * rsqrt(mean((x - mean)^2) + eps) over the last axes."""
    found = _pair(node, "mul", lambda n: _bare(n).op.name == "rsqrt")
    if found is None:
        return None
    inverse, centred = _bare(found[0]), found[1]
    spread = _pair(inverse.inputs[0], "add", lambda c: _number(c) is not None)
    if spread is None or centred.op.name != "sub":
        return None
    x, m, v = centred.inputs[0], _bare(centred.inputs[1]), spread[1]
    if not _is(m, "mean", x) or v.op.name != "mean" or not _is(v.inputs[0], "mul", centred, centred):
        return None
    axes, rank = tuple(m.attrs["axes"]), len(x.shape)
    eps = _number(spread[0])
    if tuple(v.attrs["axes"]) != axes or not axes or axes != tuple(range(axes[0], rank)) or eps is None:
        return None
    return (x, axes[0], eps) if m.attrs["keepdims"] and v.attrs["keepdims"] else None


def _scaled(node: Node) -> tuple[Node, Node, int, float] | None:
    """(x, weight, first axis, eps) of a standardised x times a weight of the last axes."""
    if node.op.name != "mul":
        return None
    for a, b in (node.inputs, tuple(reversed(node.inputs))):
        found = _standardised(a)
        if found is not None and _bare(b).shape == found[0].shape[found[1] :]:
            return found[0], _bare(b), found[1], found[2]
    return None


def _layer_norm(e: Emitter, node: Node) -> str | None:
    if node.op.name == "add":
        for a, b in (node.inputs, tuple(reversed(node.inputs))):
            found = _scaled(a)
            if found is not None and _bare(b).shape == found[1].shape:
                x, w, axis, eps = found
                return _norm(e, [x, w, _bare(b)], axis, eps)
        return None
    found = _scaled(node)
    return None if found is None else _norm(e, [found[0], found[1]], found[2], found[3])


def _norm(e: Emitter, inputs: list[Node], axis: int, eps: float) -> str | None:
    if any(i not in e.names for i in inputs):  # what is broadcast may itself have been written as part of something else
        return None
    return e.emit("LayerNormalization", [e.name(i) for i in inputs], axis=axis, epsilon=float(np.float32(eps)))


def _limited(node: Node) -> tuple[Node, Node, bool] | None:
    """(x, number, whether it is the lower limit) of where(x <= c, c, x) or where(c <= x, c, x)."""
    if node.op.name != "where" or node.inputs[0].op.name != "less_equal" or not node.dtype.is_float:
        return None
    test, c, x = node.inputs
    if _number(c) is None:
        return None
    if _is(test, "less_equal", x, c):
        return x, _bare(c), True
    return (x, _bare(c), False) if _is(test, "less_equal", c, x) else None


def _limits(e: Emitter, node: Node) -> str | None:
    """relu and limits on one side or both."""
    found = _limited(node)
    if found is None:
        return None
    x, c, lower = found
    if lower and _number(c) == 0.0:
        return e.emit("Relu", [e.name(x)])
    inner = _limited(x)
    if inner is not None and inner[2] != lower:
        low, high = (c, inner[1]) if lower else (inner[1], c)
        if float(low.attrs["value"].array) <= float(high.attrs["value"].array):
            return e.emit("Clip", [e.name(inner[0]), e.name(low), e.name(high)])
    return e.emit("Max" if lower else "Min", [e.name(x), e.name(c)])


def _leaky_relu(e: Emitter, node: Node) -> str | None:
    """where(x > 0, x, x * slope)."""
    test, x, other = node.inputs
    if test.op.name != "less" or test.inputs[1] is not x or _number(test.inputs[0]) != 0.0:
        return None
    part = _pair(other, "mul", lambda c: _number(c) is not None)
    if part is None or part[1] is not x:
        return None
    slope = _number(part[0])
    assert slope is not None
    return e.emit("LeakyRelu", [e.name(x)], alpha=slope)


_LIFTS: Final[dict[str, tuple[Lift, ...]]] = {
    "div": (_softmax,),
    "sub": (_log_softmax,),
    "mul": (_gelu, _layer_norm),
    "add": (_layer_norm,),
    "where": (_limits, _leaky_relu),
}


def read_in(nodes: list[Any]) -> set[str]:
    """The names that nodes read, in bodies too."""
    found: set[str] = set()
    stack = list(nodes)
    while stack:
        n = stack.pop()
        found.update(n.input)
        for a in n.attribute:
            bodies = [a.g] if a.HasField("g") else list(a.graphs)
            for g in bodies:
                stack += g.node
                found.update(o.name for o in g.output)
    return found


def alive(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """The nodes that make wanted names, or what these read, in order."""
    kept: list[Any] = []
    needed = set(wanted)
    for n in reversed(nodes):
        if any(o in needed for o in n.output):
            kept.append(n)
            needed |= read_in([n])
    return kept[::-1]
