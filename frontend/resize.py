"""Images and signals of another size: nearest, linear and cubic filters, with the coordinate rules of ONNX and PyTorch.

Each axis is resized for itself, by tables of the few elements that a result is made of and their weights (op `resample`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..ir.dims import as_int
from ..ir.errors import AttributeValueError, ShapeError
from .context import error
from .convolution import several
from .core import TensorLike, apply, as_tensor
from .movement import take
from .pooling import adaptive_avg_pool1d, adaptive_avg_pool2d

if TYPE_CHECKING:
    from .tensor import Tensor

MODES: Final = ("nearest", "linear", "cubic")
COORDINATES: Final = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn",
)  # fmt: skip
ROUNDINGS: Final = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
CUBIC: Final = -0.75

Array = np.ndarray[Any, Any]


def resize(
    x: TensorLike,
    size: int | Sequence[int] | None = None,
    scale: float | Sequence[float] | None = None,
    mode: str = "nearest",
    *,
    axes: Sequence[int] | None = None,
    coordinates: str = "half_pixel",
    rounding: str = "round_prefer_floor",
    cubic: float = CUBIC,
    antialias: bool = False,
    exclude_outside: bool | None = None,
) -> Tensor:
    """x with the axes `axes` (all from the third on, if not given) resized, as ONNX's Resize does.

    `size` are the new sizes; or `scale` the factors, then sizes are floor(size * scale). With both, `size` counts and the factors
    say where elements lie. mode: 'nearest', 'linear', 'cubic' (Keys 1981, its coefficient `cubic`). `coordinates` says which
    place of x element i of the result stands for, `rounding` which element 'nearest' takes there. With `antialias` the filter
    is stretched where an axis shrinks. Elements beyond the border are those at the border; with `exclude_outside` (the default
    where antialias is set) they do not count, and the other weights are scaled to a sum of 1. Integers only in mode 'nearest'.
    Raises AttributeValueError, ShapeError.
    """
    t = as_tensor(x, what="resize")
    words = (("mode", mode, MODES), ("coordinates", coordinates, COORDINATES), ("rounding", rounding, ROUNDINGS))
    for word, given, known in words:
        if given not in known:
            raise error(AttributeValueError, f"resize: {word} is one of {', '.join(known)}, not {given!r}", operand=t)
    chosen = list(range(2, t.ndim)) if axes is None else [a % t.ndim if -t.ndim <= a < t.ndim else -1 for a in axes]
    if -1 in chosen or len(set(chosen)) != len(chosen):
        raise error(AttributeValueError, f"resize: axes {tuple(axes or ())} are not different axes of an array of {t.ndim}", x=t)
    if not chosen:
        raise error(ShapeError, "resize: there is no axis to resize: x is [batch, channels, ...], or give axes", x=t)
    if not t.dtype.is_float and mode != "nearest":
        raise error(AttributeValueError, f"resize: mode {mode!r} is for floats, x is {t.dtype}; cast it", x=t)
    if size is None and scale is None:
        raise error(AttributeValueError, "resize takes the new size, or scale", x=t)
    for axis in chosen:
        if not isinstance(t.shape[axis], int):
            raise error(ShapeError, f"resize: axis {axis} is symbolic ({t.shape[axis]}); a known size is needed", x=t)
    olds = [as_int(t.shape[a]) for a in chosen]
    factors = None if scale is None else _factors(scale, len(chosen))
    if size is not None:
        news = several(size, len(chosen), "size", 0)
    else:
        assert factors is not None
        news = tuple(math.floor(n * f) for n, f in zip(olds, factors, strict=True))
    if any(n == 0 and m > 0 for n, m in zip(olds, news, strict=True)):
        raise error(ShapeError, f"resize: an axis of no elements cannot become one of {max(news)}", x=t)
    outside = antialias if exclude_outside is None else exclude_outside
    for k, axis in sorted(enumerate(chosen), key=lambda item: (news[item[0]] > olds[item[0]], -item[1])):  # shrink first
        n, m = olds[k], news[k]
        if n == m and (factors is None or factors[k] == 1):
            continue
        ratio = factors[k] if factors is not None else m / max(n, 1)
        index, weights = tables(n, m, ratio, mode, coordinates, rounding, cubic, antialias, outside)
        if t.dtype.is_float:
            t = apply("resample", t, as_tensor(index), as_tensor(weights.astype(t.dtype.numpy)), axis=axis)
        else:
            t = take(t, index[0], axis=axis)
    return t


def _factors(scale: float | Sequence[float], count: int) -> tuple[float, ...]:
    found = (float(scale),) * count if isinstance(scale, (int, float)) else tuple(map(float, scale))
    if len(found) != count or any(not 0 < f < math.inf for f in found):
        raise error(AttributeValueError, f"resize: scale is a positive number or {count} of them, not {scale!r}")
    return found


def tables(
    n: int, out: int, ratio: float, mode: str, coordinates: str, rounding: str, cubic: float, antialias: bool, exclude: bool
) -> tuple[Array, Array]:
    """Places and weights [taps, out] that make `out` elements of n; `ratio` is the number of new elements for an old one."""
    at = _coordinates(n, out, ratio, coordinates)
    if mode == "nearest":
        match rounding:
            case "round_prefer_floor":
                at = np.ceil(at - 0.5)
            case "round_prefer_ceil":
                at = np.floor(at + 0.5)
            case "floor":
                at = np.floor(at)
            case _:
                at = np.ceil(at)
        return np.clip(at, 0, max(0, n - 1)).astype(np.int32)[None], np.ones((1, out))
    narrow = min(ratio, 1.0) if antialias else 1.0  # how much of the filter's own coordinates an element is
    reach = (1 if mode == "linear" else 2) / narrow
    base = np.floor(at)
    steps = np.arange(math.floor(-reach) + 1, math.ceil(reach) + 1)
    places = base + steps[:, None]
    distance = np.abs(at - places) * narrow
    if mode == "linear":
        weights = np.maximum(1.0 - distance, 0.0)
    else:
        near = ((cubic + 2.0) * distance - (cubic + 3.0)) * distance**2 + 1.0
        far = ((cubic * distance - 5.0 * cubic) * distance + 8.0 * cubic) * distance - 4.0 * cubic
        weights = np.where(distance <= 1.0, near, np.where(distance < 2.0, far, 0.0))
    if exclude:
        weights = np.where((places >= 0) & (places < n), weights, 0.0)
    if exclude or narrow < 1.0:
        total = weights.sum(0, keepdims=True)
        weights = weights / np.where(total == 0.0, 1.0, total)
    return np.clip(places, 0, max(0, n - 1)).astype(np.int32), weights


def _coordinates(n: int, out: int, ratio: float, rule: str) -> Array:
    """The place in x, in elements, of each element of the result."""
    i = np.arange(out, dtype=np.float64)
    match rule:
        case "half_pixel":
            return (i + 0.5) / ratio - 0.5
        case "half_pixel_symmetric":
            return n / 2 * (1 - out / (ratio * n if n else 1)) + (i + 0.5) / ratio - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / ratio - 0.5 if out > 1 else i * 0.0
        case "align_corners":
            return i * ((n - 1) / (out - 1)) if out > 1 else i * 0.0
        case "asymmetric":
            return i / ratio
        case _:
            return (i + 0.5) / ratio


_PYTORCH: Final = {
    "nearest": "nearest", "nearest-exact": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear",
    "cubic": "cubic", "bicubic": "cubic",
}  # fmt: skip


def interpolate(
    x: TensorLike,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
    antialias: bool = False,
) -> Tensor:
    """x (N, C, *sizes) resized to `size`, or by `scale_factor`, as PyTorch's function of this name does.

    Modes: 'nearest' (the element at or before each place), 'nearest-exact', 'linear', 'bilinear', 'trilinear', 'bicubic', 'area'
    (means of the elements that fall to each, for signals and images). Raises AttributeValueError, ShapeError.
    """
    t = as_tensor(x, what="interpolate")
    if (size is None) == (scale_factor is None):
        raise error(AttributeValueError, "interpolate takes either size or scale_factor", x=t)
    if mode == "area":
        return _area(t, size, scale_factor)
    if mode not in _PYTORCH:
        raise error(AttributeValueError, f"interpolate: mode is one of {', '.join(_PYTORCH)}, area, not {mode!r}", x=t)
    kind = _PYTORCH[mode]
    if align_corners and kind == "nearest":
        raise error(AttributeValueError, f"interpolate: align_corners means nothing in mode {mode!r}", x=t)
    coordinates, rounding = "half_pixel", "round_prefer_ceil"
    if mode == "nearest":
        coordinates, rounding = "asymmetric", "floor"
    elif align_corners:
        coordinates = "align_corners"
    cubic = -0.5 if antialias else CUBIC  # as image libraries have it, one and the other
    return resize(t, size, scale_factor, kind, coordinates=coordinates, rounding=rounding, cubic=cubic, antialias=antialias)


def _area(t: Tensor, size: int | Sequence[int] | None, scale: float | Sequence[float] | None) -> Tensor:
    count = t.ndim - 2
    if count not in (1, 2):
        raise error(ShapeError, "interpolate: mode 'area' takes signals (N, C, L) or images (N, C, H, W)", x=t)
    if size is None:
        assert scale is not None
        size = tuple(math.floor(as_int(n) * f) for n, f in zip(t.shape[2:], _factors(scale, count), strict=True))
    sizes = several(size, count, "size")
    return adaptive_avg_pool1d(t, sizes[0]) if count == 1 else adaptive_avg_pool2d(t, sizes)


__all__ = ["interpolate", "resize", "tables"]
