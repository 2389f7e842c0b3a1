"""Where every value of a program lives: inputs, outputs, constants, or a byte range of one arena known before the run.

`plan_memory` orders the steps, writes outputs where the caller wants them, reuses memory in place where a step allows
it, and packs the rest by lifetime. Donated inputs (an output aliased to an input) are overwritten only after their last
read: readers are ordered before the writer, and where that is impossible the result is kept in the arena and copied in
at the end. `check_plan` follows a plan byte by byte and knows nothing of how it was made.
"""

from .check import check_plan
from .planner import plan_memory
from .types import ALIGN, Inside, Place, Plan, PlanError, PlannedStep, Problem, Task, aligned, live_bytes, overlap

__all__ = [
    "ALIGN",
    "Inside",
    "Place",
    "Plan",
    "PlanError",
    "PlannedStep",
    "Problem",
    "Task",
    "aligned",
    "check_plan",
    "live_bytes",
    "overlap",
    "plan_memory",
]
