"""Reading an array between its elements: grid_sample and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as choices
from typing import TYPE_CHECKING, Final

from ..ir.dims import Dim, as_int, product
from ..ir.dtypes import i64
from ..ir.errors import AttributeValueError, ShapeError
from .context import error
from .core import TensorLike, apply, as_tensor
from .elementwise import clip, equal, floor, greater, greater_equal, less, logical_and, round, where
from .movement import expand_dims, iota, moveaxis, reshape, transpose

if TYPE_CHECKING:
    from .tensor import Tensor

MODES: Final = ("linear", "nearest", "cubic")
PADDINGS: Final = ("zeros", "border", "reflection")
CUBIC: Final = -0.75  # the free coefficient of Keys' kernel, as image libraries have it


def grid_sample(
    x: TensorLike, grid: TensorLike, mode: str = "linear", padding_mode: str = "zeros", align_corners: bool = False
) -> Tensor:
    """x [N, C, *sizes] read at the points of grid [N, *out, d], d = len(sizes): [N, C, *out].

    A point's coordinates run from -1 to 1 over x, the last axis first; with align_corners they mean the centres of the outermost
    elements, otherwise their outer edges. Outside of x there are zeros, the border's values, or x reflected. Modes: 'linear',
    'nearest' (half to even), 'cubic' (Keys 1981, a = -0.75). As in ONNX, a border clamps and reflection mirrors the point itself,
    for cubic too. Raises ShapeError, AttributeValueError.
    """
    t, g = as_tensor(x, what="grid_sample"), as_tensor(grid, what="grid_sample")
    count = t.ndim - 2
    if count < 1 or g.ndim != t.ndim or g.shape[-1] != count:
        raise error(ShapeError, "grid_sample takes x [N, C, *sizes] and a grid [N, *out, len(sizes)]", x=t, grid=g)
    for word, given, known in (("mode", mode, MODES), ("padding_mode", padding_mode, PADDINGS)):
        if given not in known:
            raise error(AttributeValueError, f"grid_sample: {word} is one of {', '.join(known)}, not {given!r}", operand=t)
    places, limits = [], []
    for axis, size in enumerate(t.shape[2:]):
        if not isinstance(size, int):
            raise error(ShapeError, f"grid_sample: axis {axis + 2} is symbolic ({size}); a known size is needed", operand=t)
        at = g[..., count - 1 - axis]
        at = (at + 1.0) * (0.5 * (size - 1)) if align_corners else ((at + 1.0) * float(size) - 1.0) * 0.5
        low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
        at = round(at) if mode == "nearest" else at
        if padding_mode == "border":
            at = clip(at, 0.0, size - 1.0)
        elif padding_mode == "reflection":
            at = _reflected(at, low, high)
        places.append(at)
        limits.append((low, high))
    return moveaxis(sample(t, places, mode, padding_mode, limits), -1, 1)


def sample(x: Tensor, places: Sequence[Tensor], mode: str, padding: str, limits: Sequence[tuple[float, float]]) -> Tensor:
    """x [N, C, *sizes] at coordinates (in elements, one Tensor [N, *out] per axis): [N, *out, C].

    `limits` are the borders at which 'reflection' mirrors the elements that linear and cubic weights reach beyond x.
    """
    sizes = [as_int(s) for s in x.shape[2:]]
    taps: list[list[tuple[Tensor, Tensor | None]]] = []  # per axis: (element, weight), None for weight 1
    for at, size, (low, high) in zip(places, sizes, limits, strict=True):
        base = floor(at)
        first = {"nearest": 0, "linear": 0, "cubic": -1}[mode]
        weights = {"nearest": _one, "linear": _linear, "cubic": _cubic}[mode](at - base)
        axis: list[tuple[Tensor, Tensor | None]] = []
        for k, weight in enumerate(weights, first):
            element = base + float(k) if k else base
            inside = logical_and(greater_equal(element, 0.0), less(element, float(size)))
            if padding == "reflection":
                element = _reflected(element, low, high)
            elif padding == "zeros":
                kept = inside.astype(at.dtype)
                weight = kept if weight is None else where(inside, weight, 0.0)
            axis.append((clip(element, 0.0, float(size) - 1.0).astype(i64), weight))
        taps.append(axis)
    batch: Dim = x.shape[0]
    rank = places[0].ndim
    row = iota((batch, *(1,) * (rank - 1)), 0)
    flat = reshape(transpose(x, (0, *range(2, x.ndim), 1)), (batch * product(sizes), x.shape[1]))
    result: Tensor | None = None
    for chosen in choices(*taps):
        position, weight = row, None
        for (element, w), size in zip(chosen, sizes, strict=True):
            position = position * size + element
            weight = w if weight is None else weight if w is None else weight * w
        value = apply("gather", flat, position, axis=0)
        value = value if weight is None else value * expand_dims(weight, -1).astype(value.dtype)
        result = value if result is None else result + value
    assert result is not None
    return result


def _one(t: Tensor) -> list[Tensor | None]:
    return [None]


def _linear(t: Tensor) -> list[Tensor | None]:
    return [1.0 - t, t]


def _cubic(t: Tensor) -> list[Tensor | None]:
    """Of the elements at distances 1 + t, t, 1 - t and 2 - t."""

    def near(d: Tensor) -> Tensor:
        return ((CUBIC + 2.0) * d - (CUBIC + 3.0)) * d * d + 1.0

    def far(d: Tensor) -> Tensor:
        return ((CUBIC * d - 5.0 * CUBIC) * d + 8.0 * CUBIC) * d - 4.0 * CUBIC

    return [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]


def _reflected(at: Tensor, low: float, high: float) -> Tensor:
    """Mirrored at both borders until it lies between them."""
    span = high - low
    if span <= 0:
        return at * 0.0 + low
    beyond = where(less(at, low), low - at, at - high)
    outside = greater(beyond, 0.0)
    turns = floor(beyond * (1.0 / span))
    rest = beyond - turns * span
    even = equal(turns - 2.0 * floor(turns * 0.5), 0.0)
    from_low = where(even, low + rest, high - rest)
    from_high = where(even, high - rest, low + rest)
    return where(outside, where(less(at, low), from_low, from_high), at)


__all__ = ["grid_sample", "sample"]
