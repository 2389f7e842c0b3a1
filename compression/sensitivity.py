"""How much of each layer may go, from what the model loses when that layer alone is pruned (Li et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from ..ir.errors import InputError

LEVELS: Final = (0.25, 0.5, 0.75, 0.9, 0.97)
_ROUNDS: Final = 50


def ratios_by_sensitivity(sizes: Mapping[str, int], drop: Callable[[str, float], float], ratio: float) -> dict[str, float]:
    """Ratios by layer that cost each about the same, so that the share `ratio` of all weights goes.

    `sizes` are weights by layer; drop(layer, level) is what the metric loses where the share `level` of that layer alone goes.
    Between levels the loss is taken as linear. Raises InputError for a metric that is not finite, or a ratio beyond reach.
    """
    levels = np.array([0.0, *LEVELS])
    if ratio > LEVELS[-1]:
        raise InputError(f"by sensitivity at most {LEVELS[-1]:.0%} of the weights go, not {ratio:.1%}")
    costs: dict[str, np.ndarray] = {}
    for name in sizes:
        found = [drop(name, level) for level in LEVELS]
        if not np.isfinite(found).all():
            raise InputError(f"the metric is not finite where {name} is pruned")
        # what more zeros cost is no less than what fewer do: a metric's noise does not say otherwise
        costs[name] = np.maximum.accumulate([0.0, *found])
    total = sum(sizes.values())

    def at(cost: float) -> dict[str, float]:
        made: dict[str, float] = {}
        for name, c in costs.items():
            k = int(np.searchsorted(c, cost, side="right")) - 1
            share = 0.0 if k + 1 >= len(c) else (cost - c[k]) / (c[k + 1] - c[k]) * (levels[k + 1] - levels[k])
            made[name] = float(levels[k] + share)
        return made

    low, high = 0.0, max(float(c[-1]) for c in costs.values())
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        reached = sum(r * sizes[n] for n, r in at(middle).items()) / total
        low, high = (middle, high) if reached < ratio else (low, middle)
    ratios = at(high)
    scale = ratio / max(sum(r * sizes[n] for n, r in ratios.items()) / total, 1e-12)
    return {n: min(r * scale, LEVELS[-1]) for n, r in ratios.items() if r * scale > 0}
