"""Activation functions, as compositions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir.dtypes import f32
from ..ir.errors import AttributeValueError
from .context import error
from .core import TensorLike, as_tensor, cast
from .elementwise import abs, erf, exp, expm1, log1p, maximum, minimum, sigmoid, tanh, where

if TYPE_CHECKING:
    from .tensor import Tensor

_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE = math.sqrt(2 / math.pi)


def _float(x: TensorLike, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    return t if t.dtype.is_float else cast(t, f32)


def relu(x: TensorLike) -> Tensor:
    """max(x, 0); its gradient is 0 at 0."""
    # Not `maximum`, whose gradient is shared out at a tie. NaN <= 0 is false, so NaN stays.
    t = as_tensor(x, what="relu")
    return where(t <= 0, 0, t)


def relu6(x: TensorLike) -> Tensor:
    """min(max(x, 0), 6); its gradient is 0 at both ends."""
    t = relu(x)
    return where(t >= 6, 6, t)


def leaky_relu(x: TensorLike, negative_slope: float = 0.01) -> Tensor:
    """x where positive, negative_slope * x elsewhere."""
    t = _float(x, "leaky_relu")
    return where(t > 0, t, t * negative_slope)


def elu(x: TensorLike, alpha: float = 1.0) -> Tensor:
    """x where positive, alpha * (exp(x) - 1) elsewhere."""
    t = _float(x, "elu")
    return where(t > 0, t, alpha * expm1(where(t > 0, 0.0, t)))


def selu(x: TensorLike) -> Tensor:
    """Scaled elu with the constants of Klambauer et al. 2017."""
    return 1.0507009873554805 * elu(x, 1.6732632423543772)


def gelu(x: TensorLike, approximate: str = "none") -> Tensor:
    """x * P(N(0, 1) <= x): by erf, or with approximate='tanh' by Hendrycks and Gimpel's formula."""
    t = _float(x, "gelu")
    if approximate == "none":
        return t * 0.5 * (erf(t * _SQRT_HALF) + 1.0)
    if approximate != "tanh":
        raise error(AttributeValueError, f"gelu: approximate is 'none' or 'tanh', not {approximate!r}")
    return t * 0.5 * (tanh(_TANH_SCALE * (t + 0.044715 * t * t * t)) + 1.0)


def silu(x: TensorLike) -> Tensor:
    """x * sigmoid(x)."""
    t = _float(x, "silu")
    return t * sigmoid(t)


swish = silu


def softplus(x: TensorLike, beta: float = 1.0) -> Tensor:
    """log(1 + exp(beta * x)) / beta, without overflow."""
    t = _float(x, "softplus")
    t = t if beta == 1.0 else t * beta
    result = maximum(t, 0.0) + log1p(exp(-abs(t)))
    return result if beta == 1.0 else result * (1.0 / beta)


def softsign(x: TensorLike) -> Tensor:
    """x / (1 + |x|)."""
    t = _float(x, "softsign")
    return t / (abs(t) + 1.0)


def hard_sigmoid(x: TensorLike) -> Tensor:
    """min(max(x / 6 + 1/2, 0), 1)."""
    return minimum(maximum(_float(x, "hard_sigmoid") * (1 / 6) + 0.5, 0.0), 1.0)


def hard_swish(x: TensorLike) -> Tensor:
    """x * hard_sigmoid(x)."""
    t = _float(x, "hard_swish")
    return t * hard_sigmoid(t)


def mish(x: TensorLike) -> Tensor:
    """x * tanh(softplus(x))."""
    t = _float(x, "mish")
    return t * tanh(softplus(t))


def log_sigmoid(x: TensorLike) -> Tensor:
    """log(sigmoid(x)), without overflow."""
    return -softplus(-_float(x, "log_sigmoid"))


def glu(x: TensorLike, axis: int = -1) -> Tensor:
    """The first half along an axis times the sigmoid of the second."""
    a, b = as_tensor(x, what="glu").split(2, axis)
    return a * sigmoid(b)
