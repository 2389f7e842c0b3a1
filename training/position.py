"""Where a run stands within an epoch: the sums that the epoch's row is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Position:
    """Sums over batches. `totals` are those of the metrics in the graph, weighted by examples."""

    metrics: int
    loss: float = 0.0
    weight: float = 0.0  # what the loss is divided by: examples, or the sum of their weights
    examples: int = 0
    penalty: float = 0.0
    seconds: float = 0.0
    totals: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.totals = self.totals or [0.0] * self.metrics

    def row(self, names: Mapping[str, Any] | list[str], penalty: bool = False) -> dict[str, Any]:
        """Means over all batches so far: 'loss', the metrics, 'penalty' if asked for."""
        row: dict[str, Any] = {"loss": self.loss / self.weight if self.weight else 0.0}
        row |= {name: total / self.examples for name, total in zip(names, self.totals, strict=True)}
        return row | ({"penalty": self.penalty / self.examples} if penalty else {})

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))

    @staticmethod
    def of(state: Mapping[str, Any]) -> Position:
        """The position that `state_dict` described."""
        return Position(**dict(state))
