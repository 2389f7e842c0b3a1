"""From a problem to a plan: outputs, order, places."""

from __future__ import annotations

from .order import best_order
from .outputs import assign_outputs, dependencies
from .places import place_all
from .types import Plan, Problem


def plan_memory(problem: Problem, *, beside: bool = False) -> Plan:
    """Places and order. Raises CompileError if the tasks depend on each other in a circle.

    With `beside`, tasks that do not depend on each other may run at the same time: memory is used again only by those that come
    after all its users, as long as the arena grows by little (SPARE and FEW in places.py).
    """
    state = dependencies(problem)
    assign_outputs(state)
    return place_all(state, best_order(state), beside)
