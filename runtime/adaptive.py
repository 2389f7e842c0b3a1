"""One thread or all of them: chosen per program, by what calls take here and now.

A parallel region ends when its last thread has come to the barrier. On a machine with a busy neighbour a thread that has
lost its core arrives a time slice later (16 ms seen where the work was 50 microseconds), and a small program may lose more
to waking threads than it gains. Results do not depend on the thread count, so the faster of the two may simply be used.

The estimate for each way is the smaller of its last two calls, so that one hiccup decides nothing. The way that is not in
use is tried again for two calls once the other has run 20 times as long as that is expected to lose: at most 5% is spent on
finding out, and less and less while trying one thread keeps being slower. Where both take about the same, a try loses
nothing and is made often: what a neighbour does to two threads is over as soon as it stops.

Most disturbances are short, and one thread costs half the speed for as long as it is kept. So after a disturbance all threads
are tried again soon, after twice what a try may lose, and after twice as long each time that one follows upon the other: that
is, when the good calls on all threads between them took less than twice what one of its calls lost. The first calls of a
program prove nothing against all threads, since they make the pages of its outputs: if one thread seems faster then, all are
tried again at once.
"""

from __future__ import annotations

import math
from typing import Final

_PATIENCE: Final = 40.0  # in what one call of the other way loses; a try makes two
_HASTE: Final = 4.0  # the patience after a disturbance that does not follow upon another
_PEACE: Final = 2.0  # good calls on all threads that part two disturbances, in what one call lost by the second
_LEAST_LOSS: Final = 0.1  # of a call: a difference below it is noise
_MOST_PATIENCE: Final = 1000.0


class ThreadChoice:
    """`index` is the way of the next call: 1 for all threads, 0 for one. Racing callers may lose an observation; no harm."""

    __slots__ = ("_calls", "_estimates", "_last", "_patience", "_peace", "_since", "_trying", "_waiting", "index")

    def __init__(self) -> None:
        self.index = 1
        self._last = [math.inf, math.inf]
        self._estimates = [math.inf, math.inf]
        self._calls = 0  # in this way, since the last change
        self._since = 0.0  # seconds in this way, since the other was tried
        self._patience = _PATIENCE  # on all threads, before one is tried
        self._waiting = 0.0  # on one thread, before all are tried
        self._peace = 0.0  # seconds of good calls on all threads, since one was kept
        self._trying = True

    def record(self, seconds: float) -> None:
        """What a call took in the way that `index` named, and with it the choice for the next call."""
        now, other = self.index, 1 - self.index
        estimate = min(self._last[now], seconds)
        self._last[now] = seconds
        self._calls += 1
        if now == 1 and seconds < self._estimates[0] < math.inf:
            self._peace += seconds
        self._since += estimate if estimate < math.inf else 0.0
        if self._calls < 2:
            return
        self._estimates[now] = estimate
        if self._estimates[other] == math.inf:
            self._change(other, trying=True)
        elif estimate > self._estimates[other]:
            if self._trying and other == 1:
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
            else:
                self._patience = _PATIENCE
                if other == 0:
                    apart = self._peace >= _PEACE * (estimate - self._estimates[0])
                    self._waiting = _HASTE if apart else min(max(2 * self._waiting, 2 * _HASTE), _PATIENCE)
                    self._peace = 0.0
            self._change(other, trying=False)
        elif self._trying:
            self._trying = False  # what was tried is better, and stays
            self._patience = _PATIENCE
        else:
            loss = max(self._estimates[other] - estimate, _LEAST_LOSS * estimate)
            if self._since > (self._patience if now == 1 else self._waiting) * loss:
                self._change(other, trying=True)

    def _change(self, to: int, *, trying: bool) -> None:
        self.index = to
        self._trying = trying
        self._calls = 0
        self._since = 0.0
        self._last[to] = math.inf
