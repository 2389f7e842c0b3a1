"""Groups of nodes that never depend on each other in a circle.

Groups are kept in a topological order, so that a path from one to another is looked for between their ranks only, and a
merge reorders only what lies between (Pearce and Kelly, A dynamic topological sort algorithm, 2006). Regions are made of
neighbours, so that a whole graph costs about linear time and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Partition:
    """Nodes 0..n-1 in topological order, each a group of its own at first. `users[i]` are the nodes that read node i."""

    def __init__(self, users: Sequence[Iterable[int]]) -> None:
        n = len(users)
        self.users = [frozenset(u) for u in users]
        self._sources: list[list[int]] = [[] for _ in range(n)]
        for i, readers in enumerate(self.users):
            for u in readers:
                self._sources[u].append(i)
        self.group = list(range(n))
        self.members: dict[int, set[int]] = {i: {i} for i in range(n)}
        self._rank = self._places()  # of a group; users of a group have higher ones

    def _places(self) -> list[int]:
        """A topological order in which a node stands close to its users: the deepest operand first, the others right before the
        node. With the operands' own order, the steps of a long chain would come after all branches that join it."""
        n = len(self.users)
        depth = [0] * n
        for i, sources in enumerate(self._sources):
            depth[i] = 1 + max((depth[s] for s in sources), default=-1)
        places, count, seen = [0] * n, 0, [False] * n
        for end in sorted((i for i in range(n) if not self.users[i]), key=depth.__getitem__):
            stack = [(end, False)]
            while stack:
                i, done = stack.pop()
                if done:
                    places[i], count = count, count + 1
                elif not seen[i]:
                    seen[i] = True
                    stack.append((i, True))
                    stack += ((s, False) for s in sorted(self._sources[i], key=depth.__getitem__) if not seen[s])
        return places

    def can_merge(self, a: int, b: int) -> bool:
        """Whether two groups may become one: no path between them runs through a third."""
        if a == b:
            return True
        first, last = (a, b) if self._rank[a] < self._rank[b] else (b, a)
        return not self._path(first, last, direct=False)

    def reaches(self, a: int, b: int) -> bool:
        """Whether group b needs what group a computes, directly or not."""
        return a != b and self._path(a, b, direct=True)

    def _path(self, a: int, b: int, direct: bool) -> bool:
        """Whether b can be reached from a, by an edge between the two (if `direct`) or through a third group."""
        group, rank, limit = self.group, self._rank, self._rank[b]
        if rank[a] > limit:
            return False
        seen, stack = {a}, [a]
        while stack:
            g = stack.pop()
            for m in self.members[g]:
                for u in self.users[m]:
                    h = group[u]
                    if h == b:
                        if direct or g != a:
                            return True
                    elif h not in seen and rank[h] < limit:
                        seen.add(h)
                        stack.append(h)
        return False

    def _between(self, start: int, edges: Sequence[Iterable[int]], low: int, high: int) -> list[int]:
        """The groups of ranks between `low` and `high` that are reached from `start` along `edges`, by rank."""
        group, rank = self.group, self._rank
        seen, stack = {start}, [start]
        while stack:
            for m in self.members[stack.pop()]:
                for u in edges[m]:
                    h = group[u]
                    if low < rank[h] < high and h not in seen:
                        seen.add(h)
                        stack.append(h)
        return sorted(seen - {start}, key=rank.__getitem__)

    def merge(self, a: int, b: int) -> int:
        """Makes one group of two (which may be merged) and returns its number."""
        if a == b:
            return a
        rank = self._rank
        first, last = (a, b) if rank[a] < rank[b] else (b, a)
        before = self._between(last, self._sources, rank[first], rank[last])
        after = self._between(first, self.users, rank[first], rank[last])
        places = sorted([rank[a], rank[b], *(rank[g] for g in before), *(rank[g] for g in after)])
        for g, r in zip([*before, a, *after], places, strict=False):  # one rank is left over
            rank[g] = r
        gone = self.members.pop(b)
        self.members[a] |= gone
        for m in gone:
            self.group[m] = a
        return a
