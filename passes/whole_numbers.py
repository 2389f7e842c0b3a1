"""Which floats hold integers: sums of their products are exact, and rules that only keep sums over the reals must leave them."""

from __future__ import annotations

from typing import Final

from ..ir.graph import Node
from ..ir.op import Trait
from .facts import Facts

_DEEP: Final = 32  # nodes that are looked at, from a contraction's operand back to a cast


def whole(node: Node, facts: Facts) -> bool:
    """Whether a float holds integers for certain: casts of such, moved, added and multiplied, as operands of quantised products
    are (u8 less its zero point, padded)."""
    stack, seen = [node], {node}
    while stack:
        n = stack.pop()
        value = facts.value(n)
        if value is not None:
            if not float(value).is_integer():
                return False
        elif facts.elementwise(n) and len(n.inputs) == 1 and n.inputs[0].dtype.is_integer:
            continue  # a cast
        elif n.inputs and len(seen) < _DEEP and (facts.form(n) in ("add", "sub", "mul") or n.op.has(Trait.MOVEMENT)):
            stack += [i for i in n.inputs if i not in seen]
            seen.update(n.inputs)
        else:
            return False
    return True
