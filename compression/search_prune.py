"""Which channels a model can lose: the families whose loss the metric bears, and the model without them.

Zeros in all weights that a channel touches are the same as the channel gone, so the probe answers without a compilation. Families
go that cost the metric least for the work that they save (after AMC's search of a share for each layer: He et al. 2018, "AMC:
AutoML for model compression"; here by measured harm, without a learner).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from ..ir.errors import InputError
from .channels import Family, families_of, follow, unit_scores
from .masks import best, scores_of
from .options import Options
from .search_kinds import Builder
from .search_metric import Judge, Probe
from .shrinking import shrink_graph
from .source import Array, Source

SHARES: Final = (0.125, 0.25, 0.5)  # of a family's channels that are tried


def pruned_source(
    builder: Builder, probe: Probe, few: Judge, floor: float, cost: Mapping[str, float]
) -> tuple[Source, dict[str, float]] | None:
    """The model without the channels that the metric does not miss, and the share of each family that is gone; None where the
    metric, which is to stay at `floor`, misses all of them. `cost` is what each layer costs, by name."""
    graph, values = builder.source.graph, builder.source.values
    kept = {builder.owned(x) for x in builder.layers if builder.keep(x.name)}
    families = [f for f in families_of(graph, follow(graph)) if not f.heads and not kept & {n for n, _ in f.members}]
    base, _ = probe({}, few)
    least = base - (probe({})[0] - floor)
    found: list[tuple[float, str, float]] = []
    zeros: dict[tuple[str, float], dict[str, Array]] = {}
    for f in families:
        saved = _saved(f, builder, cost)
        for share in SHARES:
            masks = zeros[f.name, share] = _masks(f, values, share)
            score, distance = probe.with_weights(_times(values, [masks]), few)
            if score < least:
                break
            found.append(((max(base - score, 0.0) + 1e-3 * distance) / max(saved * share, 1e-12), f.name, share))
    chosen: dict[str, float] = {}
    for _, name, share in sorted(found):
        trial = {**chosen, name: max(share, chosen.get(name, 0.0))}
        if trial != chosen and probe.with_weights(_times(values, [zeros[k] for k in trial.items()]))[0] >= floor:
            chosen = trial
    if not chosen:
        return None
    options = Options(chosen, "magnitude", "layer", None, (), {}, 0)
    try:
        smaller, _ = shrink_graph(graph, values, "channels", options)
    except InputError:
        return None  # an op of it cannot go without channels
    return Source(smaller, dict(smaller.weights)), chosen


def _saved(family: Family, builder: Builder, cost: Mapping[str, float]) -> float:
    """What the layers cost whose weights have the family's channels, once for each side that has."""
    return sum(cost.get(x.name, 0.0) * sum(n == builder.owned(x) for n, _ in family.members) for x in builder.layers)


def _masks(family: Family, values: Mapping[str, Array], share: float) -> dict[str, Array]:
    """For each parameter of a family zeros where channels go, and ones."""
    scores = {n: scores_of(values[n], "magnitude") for n, _ in family.members if values[n].ndim >= 2}
    stays = best(unit_scores(family, scores), share)
    found: dict[str, Array] = {}
    for (name, d), place in family.places.items():
        along = np.where(place >= 0, stays[np.maximum(place, 0)], True)
        shape = [-1 if k == d else 1 for k in range(values[name].ndim)]
        found[name] = found.get(name, np.True_) & along.reshape(shape)
    return found


def _times(values: Mapping[str, Array], masks: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The weights with the zeros of all masks."""
    found: dict[str, Array] = {}
    for m in masks:
        for name, kept in m.items():
            found[name] = np.where(kept, found.get(name, values[name]), np.zeros((), values[name].dtype))
    return found
