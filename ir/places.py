"""Where a program's kernels find their data: a view names bytes of a slot, and a pointer of a loop moves from pass to pass."""

from __future__ import annotations

from dataclasses import dataclass

# (slot, byte offset, bytes per unit of each loop counter around, outermost first; zeros at the end left out). Slots are those
# of ir/program.py; a negative one is a pointer that a loop around keeps.
View = tuple[int, ...]


@dataclass(frozen=True)
class Pointer:
    """A place that changes from pass to pass of a loop. `slot` (negative) is its name in the views of the loop's body.

    In pass n of `count` it is `first` if n is 0, `last` if n is count - 1 (that one counts if both), else
    `cycle[n % len(cycle)]`. Those views are at the strides of the counters around and of this loop's own.
    """

    slot: int
    cycle: tuple[View, ...]
    first: View | None = None
    last: View | None = None

    def at(self, n: int, count: int) -> View:
        """The view of pass n."""
        if n == count - 1 and self.last is not None:
            return self.last
        return self.first if n == 0 and self.first is not None else self.cycle[n % len(self.cycle)]
