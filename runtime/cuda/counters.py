"""Counts of bank conflicts and memory sectors, as the hardware has them, from the addresses of each access."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .state import Batch, Counters

Array = np.ndarray[Any, Any]
BANKS = 32


def note_shared(c: Counters, b: Batch, address: Array, size: int, act: Array) -> None:
    """Shared memory has 32 banks of 4 bytes. A warp's access is served in phases of 128 bytes (8 lanes at 16 bytes each, 16 at
    8, else 32); in each, a bank gives one word per cycle, to any number of lanes."""
    lanes = 128 // size if size > 4 else 32
    phase = b.warp_of[act] * 32 + b.lane[act] // lanes
    words = max(1, size // 4)
    word = ((address[:, None] >> 2) + np.arange(words)).reshape(-1)
    key = np.unique((np.repeat(phase, words) << 24) | (word & 0xFFFFFF))
    bank = ((key >> 24) << 5) | (key & (BANKS - 1))
    per_bank, cycles = np.unique(bank, return_counts=True)
    phases, first = np.unique(per_bank >> 5, return_index=True)
    c.shared_phases += len(phases)
    c.shared_cycles += int(np.maximum.reduceat(cycles, first).sum()) if len(first) else 0


def note_global(c: Counters, b: Batch, address: Array, size: int, act: Array) -> None:
    """A warp's access is one request for as many sectors of 32 bytes as it touches."""
    warp = b.warp_of[act]
    sector = np.concatenate([address >> 5, (address + size - 1) >> 5])
    c.requests += len(np.unique(warp))
    base = sector.min() if len(sector) else 0
    c.sectors += len(np.unique((np.tile(warp, 2) << 40) | (sector - base)))
    c.bytes += len(act) * size
