"""Which kind each layer takes: the cheapest mixture that the metric allows.

Each unit (a layer, or several that run as one) has candidates with what they cost, in time or bytes, and what harm they do alone.
The search starts from the cheapest of each and takes back what harms most for what it saves, as far as the metric demands, then
tries what it took back once more, one at a time. That is the greedy form of the search by sensitivity of HAWQ (Dong et al. 2019,
"HAWQ: Hessian aware quantization of neural networks") and of AdaQuant's integer program (Hubara et al. 2020, "Improving post
training neural quantization"), with measured times for the counts of bits, and the metric itself for the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .search_kinds import FLOATS, Kind

Mixture = dict[str, Kind]
WORTH: Final = 0.97  # the share of the floats' time that another kind takes at most, or it stays with floats
_FINE: Final = 1e-3  # what a distance of the results counts beside the metric, which may not see it


@dataclass(frozen=True)
class Candidate:
    """A kind for a unit.

    cost      milliseconds or bytes, as the objective says
    ms, bytes  of the unit
    drop      what the metric loses where this unit alone is so;  distance: how far its results are from the original's
    """

    kind: Kind
    cost: float
    ms: float
    bytes: int
    drop: float
    distance: float

    @property
    def harm(self) -> float:
        """What orders candidates: the drop, and the distance where the metric sees nothing."""
        return max(self.drop, 0.0) + _FINE * self.distance


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """From the cheapest to the floats, each doing less harm than the one before it."""
    floats = next(c for c in candidates if c.kind == FLOATS)
    found: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.cost, c.harm)):
        if c.kind != FLOATS and c.cost < floats.cost and (not found or c.harm < found[-1].harm):
            found.append(c)
    return [*found, floats]


def steps(fronts: Mapping[str, Sequence[Candidate]]) -> list[tuple[str, Candidate]]:
    """In which order units go back along their fronts: what harms most for what it saves comes first."""
    at = dict.fromkeys(fronts, 0)
    found: list[tuple[str, Candidate]] = []

    def rate(name: str) -> tuple[float, int]:
        """The largest harm per cost of what follows: a unit may have to go back by several steps at once."""
        f, k = fronts[name], at[name]
        return max(((f[k].harm - c.harm) / max(c.cost - f[k].cost, 1e-12), j) for j, c in enumerate(f[k + 1 :], k + 1))

    open_ = [n for n in fronts if len(fronts[n]) > 1]
    while open_:
        name = max(open_, key=lambda n: rate(n)[0])
        at[name] = rate(name)[1]
        found.append((name, fronts[name][at[name]]))
        open_ = [n for n in open_ if at[n] + 1 < len(fronts[n])]
    return found


@dataclass
class Search:
    """The candidates of each unit, and the mixtures that the metric was asked about.

    holds  whether the metric allows a mixture
    """

    candidates: Mapping[str, Sequence[Candidate]]
    holds: Callable[[Mapping[str, Candidate]], bool]

    def __post_init__(self) -> None:
        self.fronts = {n: front(c) for n, c in self.candidates.items()}
        self.way = steps(self.fronts)

    def after(self, count: int) -> dict[str, Candidate]:
        """The mixture after so many steps back from the cheapest."""
        mixture = {n: f[0] for n, f in self.fronts.items()}
        return mixture | dict(self.way[:count])

    def cheapest(self) -> tuple[dict[str, Candidate], int]:
        """The cheapest mixture that holds, found by halving, and how many steps back it is."""
        low, high = 0, len(self.way)  # all floats hold
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(self.after(middle)) else (middle + 1, high)
        return self.after(low), low

    def improved(self, mixture: Mapping[str, Candidate], tries: int) -> dict[str, Candidate]:
        """The mixture with what saves most of what was taken back, where the metric allows it after all."""
        found = dict(mixture)
        more = [(n, c) for n, f in self.fronts.items() for c in f if c.cost < found[n].cost]
        more.sort(key=lambda m: m[1].cost - found[m[0]].cost)
        for name, c in more[:tries]:
            if c.cost < found[name].cost and self.holds(found | {name: c}):
                found[name] = c
        return found
