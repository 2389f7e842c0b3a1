"""Random draws: counter-based (Philox 4x32-10), so a result depends on the key and the draw, not on threads or order.

Inside a training step the key is state: the step uses it and returns the next one. Elsewhere pass a key, a u64 scalar.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.dtypes import as_dtype, f32, u64
from ..ir.errors import AttributeValueError, ShapeError
from .context import current, error
from .core import TensorLike, apply, as_tensor, cast, wrap
from .elementwise import less, where
from .movement import ShapeLike, as_shape

if TYPE_CHECKING:
    from .tensor import Tensor


def as_key(key: TensorLike | None) -> Tensor:
    """The u64 scalar key to draw with: the one given, else the training step's. Raises TraceError where there is none."""
    if key is None:
        return wrap(current("a random draw").random_key())
    t = as_tensor(key, what="key")
    if t.shape != ():
        raise error(ShapeError, "a random key is a scalar (u64)", key=t)
    return cast(t, u64)


def uniform(
    shape: ShapeLike, low: float = 0.0, high: float = 1.0, *, key: TensorLike | None = None, dtype: object = f32
) -> Tensor:
    """Numbers evenly distributed over [low, high). Each call in a trace is a draw of its own, also from one key."""
    stream = current("a random draw").fresh_stream()
    x = apply("random_uniform", as_key(key), shape=as_shape(shape, "uniform"), stream=stream)
    x = x if (low, high) == (0.0, 1.0) else x * (high - low) + low
    return cast(x, as_dtype(dtype))


def normal(
    shape: ShapeLike, mean: float = 0.0, std: float = 1.0, *, key: TensorLike | None = None, dtype: object = f32
) -> Tensor:
    """Normally distributed numbers."""
    stream = current("a random draw").fresh_stream()
    x = apply("random_normal", as_key(key), shape=as_shape(shape, "normal"), stream=stream)
    x = x if (mean, std) == (0.0, 1.0) else x * std + mean
    return cast(x, as_dtype(dtype))


def bernoulli(p: float, shape: ShapeLike, *, key: TensorLike | None = None) -> Tensor:
    """Bools that are true with probability p."""
    if not 0.0 <= p <= 1.0:
        raise error(AttributeValueError, f"a probability lies in [0, 1], not {p!r}")
    return less(uniform(shape, key=key), p)


def dropout(x: TensorLike, p: float = 0.5, *, key: TensorLike | None = None) -> Tensor:
    """Each element zero with probability p, else divided by 1 - p (Srivastava et al. 2014)."""
    t = as_tensor(x, what="dropout")
    return _dropped(t, p, t.shape, key, "dropout")


def channel_dropout(x: TensorLike, p: float = 0.5, *, key: TensorLike | None = None) -> Tensor:
    """Whole channels of (N, C, ...) zero with probability p, the others divided by 1 - p (Tompson et al. 2015)."""
    t = as_tensor(x, what="channel_dropout")
    if t.ndim < 3:
        raise error(ShapeError, "channel_dropout takes (N, C, L) or (N, C, H, W): an axis after the channels", x=t)
    return _dropped(t, p, (*t.shape[:2], *(1,) * (t.ndim - 2)), key, "channel_dropout")


def _dropped(t: Tensor, p: float, shape: ShapeLike, key: TensorLike | None, what: str) -> Tensor:
    if not 0.0 <= p <= 1.0:
        raise error(AttributeValueError, f"{what}: the probability p lies in [0, 1], not {p!r}")
    if p == 0.0:
        return t
    if p == 1.0:
        return where(False, t, 0.0)
    return where(bernoulli(1.0 - p, shape, key=key), t * (1.0 / (1.0 - p)), 0.0)
