"""Adam and what follows from it: AdamW, LAMB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core import cast
from ..elementwise import logical_and, maximum, rsqrt, sqrt, square, where
from ..reductions import sum
from ..tensor import Tensor
from .base import WIDE, PerParameter, Rate, Slots, bias_correction, coupled, decayed, scaled


@dataclass(frozen=True)
class Adam(PerParameter):
    """Adam (Kingma and Ba 2015), as `torch.optim.Adam`: weight decay is added to the gradient.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    With `amsgrad`, the largest v so far stands in the root (Reddi et al. 2018).
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def _check(self) -> None:
        self._betas()
        self._not_negative("eps", "weight_decay")

    @property
    def counts(self) -> bool:
        """For the corrections 1 - b^t."""
        return True

    def slots(self) -> dict[str, float]:
        """'m' and 'v'; 'v_max' with amsgrad."""
        return {"m": 0.0, "v": 0.0} | ({"v_max": 0.0} if self.amsgrad else {})

    def scalars(self, rate: Tensor, t: Tensor | None) -> Any:
        """lr, lr / (1 - b1^t), 1 / sqrt(1 - b2^t)."""
        assert t is not None
        return rate, rate / bias_correction(self.betas[0], t), rsqrt(bias_correction(self.betas[1], t))

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Decay into the gradient, then the step."""
        return self._adam(p, coupled(p, g, self.weight_decay), s, k)

    def _moments(self, g: Tensor, s: Slots) -> tuple[Tensor, Tensor]:
        b1, b2 = self.betas
        return b1 * s["m"] + (1.0 - b1) * g, b2 * s["v"] + (1.0 - b2) * square(g)

    def _adam(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        _, rate, spread = k
        m, v = self._moments(g, s)
        new = {"m": m, "v": v}
        if self.amsgrad:
            new["v_max"] = v = maximum(s["v_max"], v)
        return p - scaled(m, rate) / (scaled(sqrt(v), spread) + self.eps), new


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): p <- p - lr * weight_decay * p before the step."""

    weight_decay: float = 1e-2

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The weight shrinks, then moves."""
        return self._adam(decayed(p, k[0], self.weight_decay), g, s, k)


@dataclass(frozen=True)
class LAMB(Adam):
    """Adam's direction with decay, as long as the parameter itself (You et al. 2020, algorithm 2): for large batches.

    r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p
    p <- p - lr * |p| / |r| * r          (the ratio is 1 where a norm is 0)

    Norms are Euclidean, over a whole parameter.
    """

    eps: float = 1e-6
    weight_decay: float = 1e-2

    def scalars(self, rate: Tensor, t: Tensor | None) -> Any:
        """lr, 1 / (1 - b1^t), 1 / sqrt(1 - b2^t)."""
        assert t is not None
        return rate, 1.0 / bias_correction(self.betas[0], t), rsqrt(bias_correction(self.betas[1], t))

    def step(self, p: Tensor, g: Tensor, s: Slots, k: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the parameter's own length times the rate."""
        rate, lift, spread = k
        m, v = self._moments(g, s)
        new = {"m": m, "v": v}
        if self.amsgrad:
            new["v_max"] = v = maximum(s["v_max"], v)
        way = scaled(m, lift) / (scaled(sqrt(v), spread) + self.eps) + self.weight_decay * p
        long, far = _norm(p), _norm(way)
        ratio = where(logical_and(long > 0, far > 0), long / where(far > 0, far, 1.0), 1.0)
        return p - scaled(way, cast(rate, ratio.dtype) * ratio), new


def _norm(x: Tensor) -> Tensor:
    wide = x if x.dtype.bits >= WIDE.bits else cast(x, WIDE)
    return sqrt(sum(square(wide)))
