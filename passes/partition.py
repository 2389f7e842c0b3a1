"""Groups of nodes that never depend on each other in a circle.

Reachability between groups is kept as one integer of bits per group, so that asking is one `and`; merging two groups
touches every group that reaches them, unless one feeds nothing but the other (then nothing changes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Partition:
    """Nodes 0..n-1 in topological order, each a group of its own at first. `users[i]` are the nodes that read node i."""

    def __init__(self, users: Sequence[Iterable[int]]) -> None:
        n = len(users)
        self.users = [frozenset(u) for u in users]
        self.group = list(range(n))
        self.members: dict[int, set[int]] = {i: {i} for i in range(n)}
        self.mask = {i: 1 << i for i in range(n)}
        self.reach: dict[int, int] = {}
        for i in range(n - 1, -1, -1):
            bits = 0
            for u in self.users[i]:
                bits |= self.reach[u] | 1 << u
            self.reach[i] = bits

    def _feeds_only(self, a: int, b: int) -> bool:
        """Whether group a has users, and all of them are in group b: what reaches a then reaches b already."""
        outside = {self.group[u] for m in self.members[a] for u in self.users[m]} - {a}
        return outside == {b}

    def can_merge(self, a: int, b: int) -> bool:
        """Whether two groups may become one: no path between them runs through a third."""
        return a == b or not (self._path(a, b) or self._path(b, a))

    def _path(self, a: int, b: int) -> bool:
        """Whether b can be reached from a through a node of neither."""
        inside = self.mask[a] | self.mask[b]
        target = self.mask[b]
        if not self.reach[a] & target:
            return False
        for m in self.members[a]:
            for u in self.users[m]:
                if not inside >> u & 1 and self.reach[self.group[u]] & target:
                    return True
        return False

    def merge(self, a: int, b: int) -> int:
        """Makes one group of two (which may be merged) and returns its number."""
        if a == b:
            return a
        dominated = self._feeds_only(a, b) or self._feeds_only(b, a)
        self.members[a] |= self.members.pop(b)
        for m in self.members[a]:
            self.group[m] = a
        mask = self.mask[a] = self.mask[a] | self.mask.pop(b)
        reach = self.reach[a] = (self.reach[a] | self.reach.pop(b)) & ~mask
        if not dominated:
            everything = reach | mask
            for g, bits in self.reach.items():
                if bits & mask:
                    self.reach[g] = bits | everything
        return a
