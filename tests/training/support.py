"""Small data and models for the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.training import Trainer


def data(count: int = 200) -> tuple[Any, Any]:
    """Points in 8 dimensions and which of 3 linear functions is largest there."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((count, 8), np.float32)
    y = (x @ rng.standard_normal((8, 3), np.float32)).argmax(1)
    return x, y


def net(dropout: float = 0.0) -> nn.Module:
    tw.seed(0)
    layers: list[Any] = [nn.Linear(8, 16), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def trainer(model: Any = None, **more: Any) -> Trainer:
    options = {"loss": tw.losses.cross_entropy, "optimizer": tw.optim.Adam(1e-2), "metrics": ["accuracy"], **more}
    return Trainer(net() if model is None else model, **options)


def weights(t: Trainer) -> Any:
    """All weights of the model, one after the other."""
    return np.concatenate([p.data.ravel() for p in t.model.parameters()])
