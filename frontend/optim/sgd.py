"""Gradient descent, plain and with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...ir.errors import AttributeValueError
from ..elementwise import where
from ..tensor import Tensor
from .base import PerParameter, Rate, Slots, coupled, scaled


@dataclass(frozen=True)
class GradientDescent(PerParameter):
    """p <- p - lr * (g + weight_decay * p). No state."""

    lr: Rate = 1e-3
    weight_decay: float = 0.0

    def _check(self) -> None:
        self._not_negative("weight_decay")

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One step down the gradient."""
        return p - scaled(coupled(p, g, self.weight_decay), k), {}


@dataclass(frozen=True)
class SGD(PerParameter):
    """Gradient descent with momentum (heavy ball: Polyak 1964; Nesterov: Sutskever et al. 2013), as `torch.optim.SGD`.

    d = g + weight_decay * p
    v <- momentum * v + (1 - dampening) * d        (the first v is d itself)
    p <- p - lr * v                                with nesterov: p <- p - lr * (d + momentum * v)
    """

    lr: Rate = 1e-3
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    dampening: float = 0.0

    def _check(self) -> None:
        self._not_negative("weight_decay")
        self._share("momentum", "dampening")
        if self.nesterov and (self.momentum == 0 or self.dampening):
            raise AttributeValueError("SGD: nesterov needs a momentum, and no dampening")

    @property
    def counts(self) -> bool:
        """Only to tell the first step, which is not dampened."""
        return bool(self.momentum and self.dampening)

    def slots(self) -> dict[str, float]:
        """'momentum', v, if there is one."""
        return {"momentum": 0.0} if self.momentum else {}

    def scalars(self, rate: Tensor, t: Tensor | None) -> Any:
        """The rate, and the share of a gradient that enters v."""
        return rate, None if t is None else where(t == 1, 1.0, 1.0 - self.dampening)

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One step along v."""
        rate, share = k
        d = coupled(p, g, self.weight_decay)
        if not self.momentum:
            return p - scaled(d, rate), {}
        v = self.momentum * s["momentum"] + (d if share is None else scaled(d, share))
        way = d + self.momentum * v if self.nesterov else v
        return p - scaled(way, rate), {"momentum": v}
