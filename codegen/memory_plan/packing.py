"""Byte ranges of one arena for items that are needed for a time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MANY: Final = 3000  # items from which packing must be nearly linear


@dataclass
class Item:
    """A byte range of the arena that is needed from step `first` to step `last`."""

    nbytes: int
    first: int
    last: int
    offset: int = -1


def pack(items: Sequence[Item]) -> int:
    """Gives every item an offset, the largest first, each in the smallest gap that fits; the total size."""
    if len(items) > MANY:
        return _sweep(items)
    total = 0
    placed: list[Item] = []
    for item in sorted(items, key=lambda i: (-i.nbytes, i.first, i.last)):
        if item.nbytes == 0:
            item.offset = 0
            continue
        busy = sorted((o.offset, o.offset + o.nbytes) for o in placed if o.first <= item.last and item.first <= o.last)
        best, at, gap = None, 0, 1 << 62
        for low, high in busy:
            if low - at >= item.nbytes and low - at < gap:
                best, gap = at, low - at
            at = max(at, high)
        item.offset = at if best is None else best
        placed.append(item)
        total = max(total, item.offset + item.nbytes)
    return total


def _sweep(items: Sequence[Item]) -> int:
    """As `pack` for very many items, in the order of the steps: the best gap that is free at that time."""
    total = 0
    free: list[tuple[int, int]] = []  # (offset, size), by offset
    live: list[tuple[int, int, int]] = []  # (last, offset, size), a heap
    for item in sorted(items, key=lambda i: (i.first, -i.nbytes)):
        while live and live[0][0] < item.first:
            _, offset, size = heapq.heappop(live)
            free = _released(free, offset, size)
        fitting = [(size, offset) for offset, size in free if size >= item.nbytes]
        if fitting:
            size, item.offset = min(fitting)
            free.remove((item.offset, size))
            if size > item.nbytes:
                free = _released(free, item.offset + item.nbytes, size - item.nbytes)
        else:
            item.offset = total
            total += item.nbytes
        heapq.heappush(live, (item.last, item.offset, item.nbytes))
    return total


def _released(free: list[tuple[int, int]], offset: int, size: int) -> list[tuple[int, int]]:
    """The free ranges with one more, neighbours joined."""
    if size == 0:
        return free
    merged: list[tuple[int, int]] = []
    for at, n in sorted([*free, (offset, size)]):
        if merged and merged[-1][0] + merged[-1][1] == at:
            merged[-1] = (merged[-1][0], merged[-1][1] + n)
        else:
            merged.append((at, n))
    return merged
