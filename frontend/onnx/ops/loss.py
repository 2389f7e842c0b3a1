"""Losses over class numbers."""

from __future__ import annotations

from typing import Any

from ....ir.dtypes import i64
from ... import elementwise as ew
from ... import reductions as red
from ...movement import expand_dims, squeeze, take, take_along_axis
from ...tensor import Tensor
from ..call import Call
from ..registry import op


def _loss(n: Call, log_p: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """-log_p[target] per element, weighted, and reduced as the node says."""
    ignored, reduction = n.attribute("ignore_index"), n.choice("reduction", "mean", "none", "sum")
    index = target.astype(i64)
    keep = None if ignored is None else ew.not_equal(index, int(ignored))
    safe = index if keep is None else ew.where(keep, index, 0)
    value = -squeeze(take_along_axis(log_p, expand_dims(safe, 1), 1), 1)
    w = None if weight is None else take(weight, safe, 0)
    if keep is not None:
        w = keep.astype(log_p.dtype) if w is None else ew.where(keep, w, 0.0)
    value = value if w is None else value * w
    if reduction == "none":
        return value
    total = red.sum(value)
    if reduction == "sum":
        return total
    return red.mean(value) if w is None else total / red.sum(w)


@op("NegativeLogLikelihoodLoss")
def nll_loss(n: Call) -> Tensor:
    return _loss(n, n.tensor(0), n.tensor(1), n.optional(2))


@op("SoftmaxCrossEntropyLoss")
def cross_entropy(n: Call) -> Any:
    log_p = red.log_softmax(n.tensor(0), 1)
    loss = _loss(n, log_p, n.tensor(1), n.optional(2))
    return (loss, log_p) if n.wants(1) else loss
