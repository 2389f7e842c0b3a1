"""What `prune` is asked for: which layers, how much of each, and by which criterion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..frontend.patterns import select
from ..ir.errors import InputError
from .masks import checked_ratio

Array = np.ndarray[Any, Any]
Ratio = float | Mapping[str, float]


@dataclass(frozen=True)
class Options:
    """What of a model is pruned, by how much, and what decides."""

    ratio: Ratio | None
    criterion: str
    scope: str
    layers: tuple[str, ...] | None
    exclude: tuple[str, ...]
    gradients: Mapping[str, Array]
    seed: int

    def with_ratio(self, ratio: Ratio) -> Options:
        """These, with another ratio."""
        return replace(self, ratio=ratio)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The names that are to be pruned. Raises InputError for a pattern that fits none."""
        wanted = list(names) if self.layers is None else [n for p in self.layers for n in select(p, names, "prune")]
        dropped = {n for p in self.exclude for n in select(p, names, "prune")}
        found = [n for n in dict.fromkeys(wanted) if n not in dropped]
        if not found:
            raise InputError(f"there is nothing to prune: of the layers {', '.join(names) or '(none)'} all are left out")
        return found

    def ratios(self, names: Sequence[str], fixed: float | None = None) -> dict[str, float]:
        """The ratio of each layer that has one."""
        if fixed is not None:
            if self.ratio is not None and (isinstance(self.ratio, Mapping) or abs(self.ratio - fixed) > 1e-9):
                raise InputError(f"the pattern itself says that {fixed:.2%} go: leave ratio out")
            return dict.fromkeys(names, fixed)
        if self.ratio is None:
            raise InputError("ratio is missing: the share of weights that goes, between 0 and 1")
        if not isinstance(self.ratio, Mapping):
            return dict.fromkeys(names, checked_ratio(self.ratio))
        found: dict[str, float] = {}
        for p, r in self.ratio.items():
            for n in select(p, names, "prune"):
                found[n] = checked_ratio(r, f"the ratio of {p!r}")
        return found


def names_of(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """One name or several as a tuple; None stays None."""
    return None if given is None else (given,) if isinstance(given, str) else tuple(given)
