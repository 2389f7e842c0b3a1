"""An exponential moving average of the weights, kept beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.dtypes import f32
from ...ir.errors import AttributeValueError
from ..core import Value, as_tensor, cast
from ..elementwise import minimum
from ..tensor import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EMA:
    """a <- decay * a + (1 - decay) * p after each step; a starts as the weights before the first one (Polyak averaging).

    With `warmup`, the decay of step t is min(decay, (1 + t) / (10 + t)), so that the beginning is forgotten sooner.
    """

    decay: float = 0.999
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise AttributeValueError(f"EMA: decay lies in [0, 1), not {self.decay!r}")

    def init(self, params: Mapping[str, Array]) -> dict[str, Any]:
        """The state before the first step: a copy of each weight, by path; with warm-up also the count of steps."""
        own: dict[str, Any] = {path: np.array(p) for path, p in params.items()}
        return {"weights": own} | ({"step": np.zeros((), np.int64)} if self.warmup else {})

    def update(self, params: Mapping[str, Value], state: Mapping[str, Any]) -> dict[str, Any]:
        """The new state, as Tensors, after the weights became `params`."""
        new: dict[str, Any] = {}
        keep: float | Tensor = self.decay
        if self.warmup:
            new["step"] = as_tensor(state["step"]) + 1
            t = cast(new["step"], f32)
            keep = minimum((t + 1.0) / (t + 10.0), self.decay)
        averages: dict[str, Tensor] = {}
        for path, p in params.items():
            old, value = as_tensor(state["weights"][path]), as_tensor(p)
            share = keep if isinstance(keep, float) else cast(keep, value.dtype)
            averages[path] = old * share + value * (1.0 - share)
        return {"weights": averages} | new


def as_ema(value: float | EMA | None) -> EMA | None:
    """An EMA from its decay. Raises AttributeValueError for a decay outside [0, 1)."""
    return value if value is None or isinstance(value, EMA) else EMA(value)
