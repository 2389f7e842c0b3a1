"""Results that are other values one after the other: where these are written into the result, nothing is left to copy."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..ir.graph import Graph, Node
from ..ir.lowering import Lowering, Map, View


def joined(body: Graph, form: Callable[[Node], Lowering]) -> tuple[int, ...]:
    """The byte at which each operand of a body begins in its result, if the result is all of them, once each, in whatever order;
    () if it is not. Joined along the first axis that is longer than 1, values are contiguous, and so under any shape."""
    if len(body.outputs) != 1 or len(body.inputs) < 2:
        return ()
    number = {p: k for k, p in enumerate(body.inputs)}
    found: dict[int, int] = {}
    at = 0
    stack = [body.outputs[0]]
    while stack:
        n = stack.pop()
        k = number.get(n)
        if k is not None:
            if k in found:
                return ()
            found[k] = at
            at += n.tensor.nbytes
            continue
        low = form(n) if n.inputs else None
        if isinstance(low, View) and len(n.inputs) == 1:
            stack.append(n.inputs[0])
        elif isinstance(low, Map) and low.joins is not None and math.prod(n.tensor.static_shape[: low.joins]) == 1:
            stack += reversed(n.inputs)
        else:
            return ()
    return tuple(found[k] for k in range(len(body.inputs))) if len(found) == len(body.inputs) else ()
