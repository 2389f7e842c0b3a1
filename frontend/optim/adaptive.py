"""Steps scaled by past gradients without Adam's corrections, and by their sign: RMSprop, AdaGrad, Adadelta, Lion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..elementwise import sign, sqrt, square
from ..tensor import Tensor
from .base import PerParameter, Rate, Slots, coupled, decayed, scaled


@dataclass(frozen=True)
class RMSprop(PerParameter):
    """RMSprop (Tieleman and Hinton 2012), as `torch.optim.RMSprop`.

    v <- alpha v + (1 - alpha) g^2
    p <- p - lr * g / (sqrt(v) + eps)

    `centered` takes v - a^2 for v in the root, a being the average gradient (Graves 2013). With `momentum`,
    b <- momentum * b + g / (sqrt(v) + eps) is the step. Weight decay is added to the gradient.
    """

    lr: Rate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def _check(self) -> None:
        self._share("alpha", "momentum")
        self._not_negative("eps", "weight_decay")

    def slots(self) -> dict[str, float]:
        """'v'; 'average' if centered; 'momentum' with one."""
        own = {"v": 0.0}
        if self.centered:
            own["average"] = 0.0
        if self.momentum:
            own["momentum"] = 0.0
        return own

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient over its root mean square."""
        g = coupled(p, g, self.weight_decay)
        a = self.alpha
        new = {"v": a * s["v"] + (1.0 - a) * square(g)}
        spread = new["v"]
        if self.centered:
            new["average"] = a * s["average"] + (1.0 - a) * g
            spread = spread - square(new["average"])
        way = g / (sqrt(spread) + self.eps)
        if self.momentum:
            new["momentum"] = way = self.momentum * s["momentum"] + way
        return p - scaled(way, k), new


@dataclass(frozen=True)
class AdaGrad(PerParameter):
    """AdaGrad (Duchi et al. 2011), as `torch.optim.Adagrad`.

    v <- v + g^2
    p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(v) + eps)
    """

    lr: Rate = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def _check(self) -> None:
        self._not_negative("lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    @property
    def counts(self) -> bool:
        """With `lr_decay`."""
        return bool(self.lr_decay)

    def slots(self) -> dict[str, float]:
        """'v', the sum of squares."""
        return {"v": float(self.initial_accumulator_value)}

    def scalars(self, rate: Tensor, t: Tensor | None) -> Any:
        """The decayed rate."""
        return rate if t is None else rate / (1.0 + (t - 1.0) * self.lr_decay)

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient over the root of all squares so far."""
        g = coupled(p, g, self.weight_decay)
        v = s["v"] + square(g)
        return p - scaled(g, k) / (sqrt(v) + self.eps), {"v": v}


@dataclass(frozen=True)
class Adadelta(PerParameter):
    """Adadelta (Zeiler 2012), as `torch.optim.Adadelta`.

    v <- rho v + (1 - rho) g^2
    d = sqrt(u + eps) / sqrt(v + eps) * g
    u <- rho u + (1 - rho) d^2
    p <- p - lr * d
    """

    lr: Rate = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    def _check(self) -> None:
        self._demand(0 <= self.rho <= 1, "rho", "lies in [0, 1]")
        self._positive("eps")
        self._not_negative("weight_decay")

    def slots(self) -> dict[str, float]:
        """'v' of gradients and 'u' of steps."""
        return {"v": 0.0, "u": 0.0}

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient in the unit of the steps before."""
        g = coupled(p, g, self.weight_decay)
        v = self.rho * s["v"] + (1.0 - self.rho) * square(g)
        d = sqrt(s["u"] + self.eps) / sqrt(v + self.eps) * g
        u = self.rho * s["u"] + (1.0 - self.rho) * square(d)
        return p - scaled(d, k), {"v": v, "u": u}


@dataclass(frozen=True)
class Lion(PerParameter):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum, with decoupled weight decay.

    p <- p - lr * (sign(b1 m + (1 - b1) g) + weight_decay * p)
    m <- b2 m + (1 - b2) g
    """

    lr: Rate = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def _check(self) -> None:
        self._betas()
        self._not_negative("weight_decay")

    def slots(self) -> dict[str, float]:
        """'m', the momentum."""
        return {"m": 0.0}

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the rate's size in every element."""
        b1, b2 = self.betas
        way = sign(b1 * s["m"] + (1.0 - b1) * g)
        return decayed(p, k, self.weight_decay) - scaled(way, k), {"m": b2 * s["m"] + (1.0 - b2) * g}
