"""Activation functions. Each fuses into what comes before or after it.

They are written so that no branch not taken makes a NaN, and with `where` rather than `maximum` at a kink, so that the
gradient there is PyTorch's: that of one side, not the mean of both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir.dtypes import f32
from ..ir.errors import AttributeValueError, ShapeError
from .context import error
from .core import TensorLike, apply, as_tensor, cast
from .elementwise import abs, erf, expm1, sigmoid, tanh, where
from .movement import reshape

if TYPE_CHECKING:
    from .tensor import Tensor

_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE = math.sqrt(2 / math.pi)


def _float(x: TensorLike, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    return t if t.dtype.is_float else cast(t, f32)


def relu(x: TensorLike) -> Tensor:
    """max(x, 0); its gradient is 0 at 0."""
    t = as_tensor(x, what="relu")
    return where(t <= 0, 0, t)  # NaN <= 0 is false, so NaN stays


def relu6(x: TensorLike) -> Tensor:
    """min(max(x, 0), 6); its gradient is 0 at both ends."""
    t = relu(x)
    return where(t >= 6, 6, t)


def hardtanh(x: TensorLike, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """x limited to [min_val, max_val]; its gradient is 0 at both ends."""
    if min_val >= max_val:
        raise error(AttributeValueError, f"hardtanh: min_val {min_val} must be below max_val {max_val}")
    t = _float(x, "hardtanh")
    return where(t <= min_val, min_val, where(t >= max_val, max_val, t))


def leaky_relu(x: TensorLike, negative_slope: float = 0.01) -> Tensor:
    """x where positive, negative_slope * x elsewhere."""
    t = _float(x, "leaky_relu")
    return where(t > 0, t, t * negative_slope)


def prelu(x: TensorLike, weight: TensorLike) -> Tensor:
    """x where positive, weight * x elsewhere: one weight, or one per channel (axis 1) (He et al. 2015).

    Raises ShapeError for a weight of another size.
    """
    t, w = _float(x, "prelu"), as_tensor(weight, what="weight")
    channels = t.shape[1] if t.ndim > 1 else 1
    if w.ndim > 1 or (w.shape not in ((), (1,)) and w.shape != (channels,)):
        raise error(ShapeError, f"prelu: the weight holds one number, or one per channel: {channels}", x=t, weight=w)
    slope = reshape(w, (1, -1) + (1,) * (t.ndim - 2)) if w.shape not in ((), (1,)) else reshape(w, ())
    return where(t > 0, t, cast(slope, t.dtype) * t)


def elu(x: TensorLike, alpha: float = 1.0) -> Tensor:
    """x where positive, alpha * (exp(x) - 1) elsewhere."""
    t = _float(x, "elu")
    return where(t > 0, t, alpha * expm1(where(t > 0, 0.0, t)))


def celu(x: TensorLike, alpha: float = 1.0) -> Tensor:
    """x where positive, alpha * (exp(x / alpha) - 1) elsewhere: elu with a continuous slope (Barron 2017)."""
    if alpha == 0:
        raise error(AttributeValueError, "celu: alpha must not be 0")
    t = _float(x, "celu")
    return where(t > 0, t, alpha * expm1(where(t > 0, 0.0, t) * (1.0 / alpha)))


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
    """log(1 + exp(beta * x)) / beta, without overflow, and exact where PyTorch's switches to x."""
    if beta == 0:
        raise error(AttributeValueError, "softplus: beta must not be 0")
    t = _float(x, "softplus")
    return apply("softplus", t) if beta == 1.0 else apply("softplus", t * beta) * (1.0 / beta)


def softsign(x: TensorLike) -> Tensor:
    """x / (1 + |x|)."""
    t = _float(x, "softsign")
    return t / (abs(t) + 1.0)


def hard_sigmoid(x: TensorLike) -> Tensor:
    """min(max(x / 6 + 1/2, 0), 1); its gradient is 0 at both ends."""
    t = _float(x, "hard_sigmoid")
    return where(t <= -3.0, 0.0, where(t >= 3.0, 1.0, t * (1 / 6) + 0.5))


def hard_swish(x: TensorLike) -> Tensor:
    """x * hard_sigmoid(x) (Howard et al. 2019): 0 up to -3, x from 3."""
    t = _float(x, "hard_swish")
    return where(t <= -3.0, 0.0, where(t >= 3.0, t, t * (t * (1 / 6) + 0.5)))


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
