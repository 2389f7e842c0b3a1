"""Resize and Upsample, in all modes: along each axis a weighted sum of elements at places that are known at import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ....ir.dims import Dim, as_int, product
from ....ir.dtypes import bool_, f32, f64, i64
from ... import elementwise as ew
from ...core import apply, as_tensor, normalize_axis
from ...linalg import matmul
from ...movement import moveaxis, repeat, reshape
from ...tensor import Tensor
from ..call import Call
from ..description import Array
from ..registry import op

_PERIODIC: Final = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "asymmetric")
_FEW: Final = 8  # elements that a result is made of, up to which they are read one by one; more of them are a matrix product


_NEAREST: Final[dict[str, Callable[[Array], Array]]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


@dataclass(frozen=True)
class Way:
    """How one axis is read: the attributes of a Resize. `low`, `high` are the axis's part of the region of interest."""

    mode: str
    coordinates: str
    nearest: str = "floor"
    cubic: float = -0.75  # Keys' a
    exclude_outside: bool = False
    antialias: bool = False
    low: float = 0.0
    high: float = 1.0

    def places(self, size: int, scale: float, out: int) -> Array:
        """Where, in elements, each result lies on an axis of `size` elements. [out] f64."""
        y, whole = np.arange(out, dtype=np.float64), scale * size
        if self.coordinates == "align_corners":
            return np.zeros(out) if whole == 1 else y * (size - 1) / (whole - 1)
        if self.coordinates == "asymmetric":
            return y / scale
        if self.coordinates == "tf_crop_and_resize":
            if whole == 1:
                return np.full(out, 0.5 * (self.low + self.high) * (size - 1))
            return self.low * (size - 1) + y * (self.high - self.low) * (size - 1) / (whole - 1)
        if self.coordinates == "pytorch_half_pixel" and whole == 1:
            return np.zeros(out)
        shift = 0.5 * size * (1 - out / whole) if self.coordinates == "half_pixel_symmetric" else 0.0
        return shift + (y + 0.5) / scale - 0.5

    def table(self, size: int, scale: float, out: int) -> tuple[Array, Array]:
        """The elements that each result is made of, and their weights: [taps, out] i64 and f64."""
        at = self.places(size, scale, out)
        if self.mode == "nearest":
            rounded = _NEAREST[self.nearest](at)
            return np.clip(rounded, 0, size - 1).astype(np.int64)[None], np.ones((1, out))
        shrunk = min(scale, 1.0) if self.antialias else 1.0
        reach, kernel = (1, _triangle) if self.mode == "linear" else (2, _keys(self.cubic))
        first = int(np.floor(-reach / shrunk)) + 1
        elements = np.floor(at) + np.arange(first, 2 - first)[:, None]
        weights = kernel(np.abs(elements - at) * shrunk)
        if self.exclude_outside:
            weights = np.where((elements < 0) | (elements >= size), 0.0, weights)
        if self.exclude_outside or self.antialias:
            total = weights.sum(0)
            weights = weights / np.where(total == 0, 1.0, total)
        used = (weights != 0).any(1)
        return np.clip(elements, 0, size - 1).astype(np.int64)[used], weights[used]


def _triangle(d: Array) -> Array:
    return np.maximum(0.0, 1.0 - d)


def _keys(a: float) -> Callable[[Array], Array]:
    """The cubic kernel of Keys, "Cubic convolution interpolation for digital image processing" (1981), equation 4."""

    def kernel(d: Array) -> Array:
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    return kernel


@op("Upsample", 7, 9)
def upsample(n: Call) -> Tensor:
    x = n.tensor(0)
    mode = n.choice("mode", "nearest", "linear", "bilinear")
    scales = n.float_list("scales") if n.opset < 9 else tuple(map(float, n.array(1).ravel()))
    if scales is None:
        n.fail("the attribute 'scales' is missing")
    return _resized(n, x, range(x.ndim), scales, None, {}, Way(mode.removeprefix("bi"), "asymmetric"))


@op("Resize", 10)
def resize_first(n: Call) -> Tensor:
    x = n.tensor(0)
    way = Way(n.choice("mode", "nearest", "linear"), "asymmetric")
    return _resized(n, x, range(x.ndim), tuple(map(float, n.array(1).ravel())), None, {}, way)


@op("Resize", 11, 13, 18, 19)
def resize(n: Call) -> Tensor:
    x = n.tensor(0)
    given = n.int_list("axes")
    axes = [normalize_axis(a, x.ndim, "Resize") for a in given] if given is not None else list(range(x.ndim))
    coordinates = n.choice("coordinate_transformation_mode", *_PERIODIC, "align_corners", "tf_crop_and_resize")
    mode = n.choice("mode", "nearest", "linear", "cubic")
    antialias = n.flag("antialias")
    if antialias and mode == "nearest":
        n.fail("antialias is for the modes linear and cubic")
    way = Way(
        mode,
        coordinates,
        n.choice("nearest_mode", "round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
        n.number("cubic_coeff_a", -0.75),
        n.flag("exclude_outside"),
        antialias,
    )
    outside, policy = n.number("extrapolation_value", 0.0), n.choice("keep_aspect_ratio_policy", "stretch", *_POLICIES)
    scales = n.array(2).astype(np.float64).ravel() if n.has(2) and n.value(2).size != 0 else None
    sizes = n.dims(3) if scales is None and n.has(3) else None
    roi: dict[int, tuple[float, float]] = {}
    if coordinates == "tf_crop_and_resize":
        bounds = n.array(1).astype(np.float64).ravel()
        if len(bounds) != 2 * len(axes):
            n.fail(f"roi has {len(bounds)} numbers, expected {2 * len(axes)}")
        roi = {a: (float(bounds[k]), float(bounds[k + len(axes)])) for k, a in enumerate(axes)}
    if scales is None and sizes is None:
        n.fail("one of the inputs scales and sizes must be given")
    for what, values in (("scales", scales), ("sizes", sizes)):
        if values is not None and len(values) != len(axes):
            n.fail(f"{what} has {len(values)} numbers, expected {len(axes)}")
    if sizes is not None and policy != "stretch":
        known = [n.fixed(x.shape[a]) for a in axes]
        ratios = [n.fixed(s) / k for s, k in zip(sizes, known, strict=True)]
        scale = min(ratios) if policy == "not_larger" else max(ratios)
        scales, sizes = np.full(len(axes), scale), tuple(int(scale * k + 0.5) for k in known)
    return _resized(n, x, axes, scales, sizes, roi, way, outside)


_POLICIES: Final = ("not_larger", "not_smaller")


def _resized(
    n: Call,
    x: Tensor,
    axes: Sequence[int],
    scales: Sequence[float] | Array | None,
    sizes: Sequence[Dim] | None,
    roi: dict[int, tuple[float, float]],
    way: Way,
    outside: float = 0.0,
) -> Tensor:
    """x with axes resized one after the other: every mode is a product over axes."""
    if scales is not None and len(scales) != len(axes):
        n.fail(f"scales has {len(scales)} numbers, expected {len(axes)}")
    dtype = x.dtype
    exact = way.mode == "nearest" and not roi
    if not exact:
        if dtype is bool_:
            n.unsupported(f"mode {way.mode!r} of bool")
        x = x.astype(f64 if dtype is f64 or (dtype.is_integer and dtype.bits > 16) else f32)
    for k, axis in enumerate(axes):
        here = Way(**{**way.__dict__, **dict(zip(("low", "high"), roi[axis], strict=True))}) if axis in roi else way
        scale = None if scales is None else float(scales[k])
        if scale is not None and not 0 < scale < float("inf"):
            n.fail(f"the scale {scale} of axis {axis} is not a positive number")
        x = _along(n, x, axis, scale, None if sizes is None else sizes[k], here, outside)
    if exact or x.dtype is dtype:
        return x
    return (ew.round(x) if dtype.is_integer else x).astype(dtype)


def _along(n: Call, x: Tensor, axis: int, scale: float | None, size: Dim | None, way: Way, outside: float) -> Tensor:
    """One axis of x; the scale is that of sizes where it is not given."""
    extent = x.shape[axis]
    whole = (way.low, way.high) == (0.0, 1.0)
    if whole and (scale in (None, 1.0)) and (size is None or size == extent):
        return x
    if not isinstance(extent, int) or not (size is None or isinstance(size, int)):
        factor = _factor(extent, scale, size)
        if factor and way.mode == "nearest" and way.coordinates in _PERIODIC and _repeats(way, 4, factor):
            return repeat(x, factor, axis)  # such coordinates repeat from element to element
    known = n.fixed(extent)
    out = n.fixed(size) if size is not None else int((scale or 1.0) * known)
    ratio = scale if scale is not None else out / known if known else 1.0
    if known == 0 or out == 0:
        if known == 0 and out:
            n.fail(f"axis {axis} is empty and cannot be resized to {out}")
        return apply("slice", x, starts=(0,) * x.ndim, stops=(*x.shape[:axis], 0, *x.shape[axis + 1 :]), steps=(1,) * x.ndim)
    if out % known == 0 and way.mode == "nearest" and whole and ratio == out // known and _repeats(way, known, out // known):
        return repeat(x, out // known, axis)
    elements, weights = way.table(known, ratio, out)
    result = _weighted(x, axis, elements, weights)
    if way.coordinates == "tf_crop_and_resize":
        at = way.places(known, ratio, out)
        beyond = (at < 0) | (at > known - 1)
        if beyond.any():
            result = ew.where(as_tensor(_on_axis(beyond, x.ndim, axis)), outside, result)
    return result


def _factor(extent: Dim, scale: float | None, size: Dim | None) -> int:
    """The whole number by which an axis grows, 0 where there is none to be seen."""
    if scale is not None:
        return int(scale) if scale == int(scale) else 0
    return next((k for k in range(2, 17) if extent * k == size), 0)


def _repeats(way: Way, size: int, factor: int) -> bool:
    """Whether each element simply comes `factor` times."""
    elements, _ = way.table(size, float(factor), size * factor)
    return bool((elements[0] == np.arange(size * factor) // factor).all())


def _on_axis(values: Array, rank: int, axis: int) -> Array:
    return values.reshape((1,) * axis + (-1,) + (1,) * (rank - 1 - axis))


def _weighted(x: Tensor, axis: int, elements: Array, weights: Array) -> Tensor:
    """Sums over taps of x at the elements [taps, out], times the weights."""
    taps, out = elements.shape
    if taps > _FEW:
        dense = np.zeros((as_int(x.shape[axis]), out), x.dtype.numpy)
        np.add.at(dense, (elements, np.arange(out)), weights.astype(x.dtype.numpy))
        last = moveaxis(x, axis, -1)
        rows = reshape(last, (product(last.shape[:-1]), last.shape[-1]))
        return moveaxis(reshape(matmul(rows, as_tensor(dense)), (*last.shape[:-1], out)), -1, axis)
    result: Tensor | None = None
    for places, weight in zip(elements, weights, strict=True):
        value = _read(x, axis, places)
        if not (weight == 1).all():
            value = value * as_tensor(_on_axis(weight, x.ndim, axis).astype(x.dtype.numpy))
        result = value if result is None else result + value
    assert result is not None
    return result


def _read(x: Tensor, axis: int, places: Array) -> Tensor:
    """x at places of an axis: as a slice where they are evenly spaced."""
    steps = np.unique(np.diff(places))
    if len(places) > 1 and len(steps) == 1 and steps[0] > 0:
        starts, stops, every = [0] * x.ndim, list(x.shape), [1] * x.ndim
        starts[axis], stops[axis], every[axis] = int(places[0]), int(places[-1]) + 1, int(steps[0])
        return apply("slice", x, starts=tuple(starts), stops=tuple(stops), steps=tuple(every))
    return apply("gather", x, as_tensor(places, i64), axis=axis)
