"""Functions that move elements: shapes, axes, joining, splitting, padding, gathering. numpy's names and keywords."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.dims import Dim, DimExpr, Shape, floordiv, mod, product
from ..ir.dtypes import as_dtype, bool_, f32, i32, i64
from ..ir.errors import AttributeValueError, DTypeError, ShapeError, TraceError
from ..ir.graph import Literal
from .context import error
from .core import (
    TensorLike,
    Value,
    apply,
    as_tensor,
    broadcast_shapes,
    cast,
    normalize_axes,
    normalize_axis,
    promote,
    show,
)
from .core import broadcast_to as _broadcast_to

if TYPE_CHECKING:
    from .tensor import Tensor

ShapeLike = int | DimExpr | Sequence[Dim]


def as_shape(shape: object, what: str) -> tuple[Dim, ...]:
    """A shape from an int, a dimension, or several; -1 passes. Raises ShapeError for anything else."""
    items = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    dims: list[Dim] = []
    for d in items:
        if isinstance(d, DimExpr):
            dims.append(d)
        elif isinstance(d, Value):
            raise error(TraceError, f"{what}: a shape cannot depend on the value of a Tensor; use ints or x.shape", shape=items)
        elif isinstance(d, (bool, float)) or not hasattr(d, "__index__"):
            raise error(ShapeError, f"{what}: a dimension is an integer or a symbolic dimension, not {d!r}", shape=items)
        else:
            dims.append(int(d))
    return tuple(dims)


# -- shape --------------------------------------------------------------------------------------------------------------
def reshape(x: TensorLike, shape: ShapeLike) -> Tensor:
    """The elements in row-major order under another shape; one dimension may be -1 and is worked out."""
    t = as_tensor(x, what="reshape")
    dims = list(as_shape(shape, "reshape"))
    unknown = [i for i, d in enumerate(dims) if d == -1]
    total = product(t.shape)
    if len(unknown) > 1:
        raise error(ShapeError, f"reshape: only one dimension of {show(dims)} may be -1", operand=t)
    if unknown:
        rest = product([d for d in dims if d != -1])
        if rest == 0 or (isinstance(left := mod(total, rest), int) and left != 0):
            raise error(ShapeError, f"reshape: {total} elements do not divide into {show(dims)}", operand=t)
        dims[unknown[0]] = floordiv(total, rest)
    if isinstance(total, int) and isinstance(product(dims), int) and product(dims) != total:
        hint = f"{show((*dims[:-1], -1))} would work out the last dimension" if dims else "a shape () holds one element"
        raise error(
            ShapeError, f"reshape: {show(dims)} holds {product(dims)} elements, the Tensor has {total}; {hint}", operand=t
        )
    return t if tuple(dims) == t.shape else apply("reshape", t, shape=tuple(dims))


def ravel(x: TensorLike) -> Tensor:
    """All elements in one dimension."""
    return reshape(x, (-1,))


def flatten(x: TensorLike, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Dimensions start_dim to end_dim (both included) merged into one."""
    t = as_tensor(x, what="flatten")
    if t.ndim == 0:
        return reshape(t, (1,))
    first, last = normalize_axis(start_dim, t.ndim, "flatten"), normalize_axis(end_dim, t.ndim, "flatten")
    if first > last:
        raise error(ShapeError, f"flatten: start_dim {start_dim} comes after end_dim {end_dim}", operand=t)
    return reshape(t, (*t.shape[:first], product(t.shape[first : last + 1]), *t.shape[last + 1 :]))


def expand_dims(x: TensorLike, axis: int | tuple[int, ...]) -> Tensor:
    """New dimensions of size 1 at the given positions of the result."""
    t = as_tensor(x, what="expand_dims")
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    rank = t.ndim + len(given)
    places = normalize_axes(tuple(given), rank, "expand_dims")
    old = iter(t.shape)
    return reshape(t, tuple(1 if i in places else next(old) for i in range(rank)))


def squeeze(x: TensorLike, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Without dimensions of size 1 (None: all of them). Raises ShapeError for an axis of another size."""
    t = as_tensor(x, what="squeeze")
    if axis is None:
        return reshape(t, tuple(d for d in t.shape if d != 1))
    places = normalize_axes(axis, t.ndim, "squeeze")
    wrong = [a for a in places if t.shape[a] != 1]
    if wrong:
        raise error(
            ShapeError, f"squeeze: dimension {wrong[0]} has size {t.shape[wrong[0]]}; only size 1 can be dropped", operand=t
        )
    return reshape(t, tuple(d for i, d in enumerate(t.shape) if i not in places))


def broadcast_to(x: TensorLike, shape: ShapeLike) -> Tensor:
    """x repeated to a shape, by numpy's rules."""
    return _broadcast_to(as_tensor(x, what="broadcast_to"), as_shape(shape, "broadcast_to"))


# -- axes ---------------------------------------------------------------------------------------------------------------
def transpose(x: TensorLike, axes: Sequence[int] | None = None) -> Tensor:
    """The axes in another order (None: reversed)."""
    t = as_tensor(x, what="transpose")
    perm = tuple(reversed(range(t.ndim))) if axes is None else tuple(normalize_axis(a, t.ndim, "transpose") for a in axes)
    if sorted(perm) != list(range(t.ndim)):
        raise error(ShapeError, f"transpose: {tuple(axes or ())} is not an order of the {t.ndim} axes of the operand", operand=t)
    return t if perm == tuple(range(t.ndim)) else apply("transpose", t, perm=perm)


permute_dims = transpose


def swapaxes(x: TensorLike, axis1: int, axis2: int) -> Tensor:
    """Two axes exchanged."""
    t = as_tensor(x, what="swapaxes")
    a, b = normalize_axis(axis1, t.ndim, "swapaxes"), normalize_axis(axis2, t.ndim, "swapaxes")
    perm = list(range(t.ndim))
    perm[a], perm[b] = b, a
    return transpose(t, perm)


def moveaxis(x: TensorLike, source: int | Sequence[int], destination: int | Sequence[int]) -> Tensor:
    """Axes moved to new positions, the others in order."""
    t = as_tensor(x, what="moveaxis")
    sources = [normalize_axis(a, t.ndim, "moveaxis") for a in (source if isinstance(source, (tuple, list)) else (source,))]
    targets = [
        normalize_axis(a, t.ndim, "moveaxis") for a in (destination if isinstance(destination, (tuple, list)) else (destination,))
    ]
    if len(sources) != len(targets) or len(set(sources)) != len(sources) or len(set(targets)) != len(targets):
        raise error(
            ShapeError, f"moveaxis: source {source} and destination {destination} must be as many different axes", operand=t
        )
    order = [a for a in range(t.ndim) if a not in sources]
    for place, a in sorted(zip(targets, sources, strict=True)):
        order.insert(place, a)
    return transpose(t, order)


def flip(x: TensorLike, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """The order of elements reversed along axes (None: all)."""
    t = as_tensor(x, what="flip")
    axes = normalize_axes(axis, t.ndim, "flip")
    return apply("reverse", t, axes=axes) if axes else t


# -- joining and splitting ----------------------------------------------------------------------------------------------
def concatenate(tensors: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """Tensors joined along an axis; the other dimensions must be equal."""
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise error(TraceError, "concatenate takes a list of one Tensor or more", given=tensors)
    given = [as_tensor(x, what="an operand of concatenate") for x in tensors]
    common = promote(*given)
    parts = [cast(t, common) for t in given]
    rank = parts[0].ndim
    named = {f"operand {i}": t for i, t in enumerate(parts)}
    if rank == 0 or any(t.ndim != rank for t in parts):
        raise error(
            ShapeError, "concatenate: operands need the same number of dimensions, one or more; tw.stack adds one", **named
        )
    a = normalize_axis(axis, rank, "concatenate")
    for i, t in enumerate(parts[1:], 1):
        wrong = [d for d in range(rank) if d != a and t.shape[d] != parts[0].shape[d]]
        if wrong:
            message = (
                f"concatenate along axis {a}: dimension {wrong[0]} of operand {i} is {t.shape[wrong[0]]}, of operand 0 it is "
            )
            raise error(ShapeError, f"{message}{parts[0].shape[wrong[0]]}; all but dimension {a} must be equal", **named)
    return parts[0] if len(parts) == 1 else apply("concat", *parts, axis=a)


def stack(tensors: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    given = [as_tensor(x, what="an operand of stack") for x in tensors]
    if len({t.shape for t in given}) > 1:
        raise error(ShapeError, "stack: all operands need the same shape", **{f"operand {i}": t for i, t in enumerate(given)})
    return concatenate([expand_dims(t, axis) for t in given], axis if axis >= 0 else axis + given[0].ndim + 1)


def split(x: TensorLike, indices_or_sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """Equal sections (an int), or the pieces between the given positions along an axis."""
    t = as_tensor(x, what="split")
    a = normalize_axis(axis, t.ndim, "split")
    size = t.shape[a]
    if isinstance(indices_or_sections, int):
        if indices_or_sections < 1 or (isinstance(left := mod(size, indices_or_sections), int) and left):
            raise error(
                ShapeError,
                f"split: dimension {a} of size {size} does not divide into {indices_or_sections} equal parts",
                operand=t,
            )
        step = floordiv(size, indices_or_sections)
        cuts: list[Dim] = [step * i for i in range(indices_or_sections)] + [size]
    else:
        cuts = [0, *indices_or_sections, size]
    return [slice_axis(t, a, low, high) for low, high in pairwise(cuts)]


def slice_axis(t: Tensor, axis: int, low: Dim, high: Dim, step: int = 1) -> Tensor:
    """Elements low, low + step, ... below high along one axis."""
    if low == 0 and high == t.shape[axis] and step == 1:
        return t
    starts: list[Dim] = [0] * t.ndim
    stops: list[Dim] = list(t.shape)
    steps = [1] * t.ndim
    starts[axis], stops[axis], steps[axis] = low, high, step
    return apply("slice", t, starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))


def roll(x: TensorLike, shift: int, axis: int) -> Tensor:
    """Elements shifted along an axis; what leaves at one end comes in at the other."""
    t = as_tensor(x, what="roll")
    a = normalize_axis(axis, t.ndim, "roll")
    size = t.shape[a]
    if size == 0 or (isinstance(size, int) and shift % size == 0):
        return t
    cut = size - shift % size if isinstance(size, int) else (size - shift if shift > 0 else -shift)
    return concatenate([slice_axis(t, a, cut, size), slice_axis(t, a, 0, cut)], a)


def tile(x: TensorLike, reps: int | Sequence[int]) -> Tensor:
    """The whole Tensor repeated along each axis."""
    t = as_tensor(x, what="tile")
    times = tuple(reps) if isinstance(reps, (tuple, list)) else (reps,)
    rank = t.ndim if t.ndim > len(times) else len(times)
    times = (1,) * (rank - len(times)) + times
    shape = (1,) * (rank - t.ndim) + t.shape
    wide = reshape(t, tuple(d for s in shape for d in (1, s)))
    wide = _broadcast_to(wide, tuple(d for r, s in zip(times, shape, strict=True) for d in (r, s)))
    return reshape(wide, tuple(r * s for r, s in zip(times, shape, strict=True)))


def repeat(x: TensorLike, repeats: int, axis: int | None = None) -> Tensor:
    """Each element repeated along an axis (None: of the flattened Tensor)."""
    t = as_tensor(x, what="repeat")
    if axis is None:
        t, axis = ravel(t), 0
    a = normalize_axis(axis, t.ndim, "repeat")
    wide = _broadcast_to(expand_dims(t, a + 1), (*t.shape[: a + 1], repeats, *t.shape[a + 1 :]))
    return reshape(wide, (*t.shape[:a], t.shape[a] * repeats, *t.shape[a + 1 :]))


def pad(x: TensorLike, pad_width: int | Sequence[Any], constant_values: float = 0.0) -> Tensor:
    """Constant values around the Tensor: an int for all sides, (before, after) for all axes, or one pair per axis."""
    t = as_tensor(x, what="pad")
    if isinstance(pad_width, int):
        pairs = [(pad_width, pad_width)] * t.ndim
    elif len(pad_width) == 2 and all(isinstance(p, int) for p in pad_width):
        pairs = [(pad_width[0], pad_width[1])] * t.ndim
    else:
        pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in pad_width]
    if len(pairs) != t.ndim or any(len(p) != 2 for p in pairs):
        raise error(ShapeError, f"pad: {pad_width!r} must be an int, a pair, or one pair for each of {t.ndim} axes", operand=t)
    if any(n < 0 for p in pairs for n in p):
        raise error(ShapeError, f"pad: widths cannot be negative: {pad_width!r}; take a slice to remove elements", operand=t)
    if all(p == (0, 0) for p in pairs):
        return t
    low, high = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    return apply("pad", t, low=low, high=high, interior=(0,) * t.ndim, value=float(constant_values))


# -- making -------------------------------------------------------------------------------------------------------------
def full(shape: ShapeLike, fill_value: TensorLike, dtype: object = None) -> Tensor:
    """A Tensor with the same value everywhere."""
    value = as_tensor(fill_value, None if dtype is None else as_dtype(dtype), "full")
    return _broadcast_to(value, as_shape(shape, "full"))


def zeros(shape: ShapeLike, dtype: object = f32) -> Tensor:
    """All zeros."""
    return full(shape, 0, dtype)


def ones(shape: ShapeLike, dtype: object = f32) -> Tensor:
    """All ones."""
    return full(shape, 1, dtype)


def full_like(x: TensorLike, fill_value: TensorLike, dtype: object = None) -> Tensor:
    """The same value everywhere, in the shape and dtype of x."""
    t = as_tensor(x, what="full_like")
    return full(t.shape, fill_value, dtype or t.dtype)


def zeros_like(x: TensorLike, dtype: object = None) -> Tensor:
    """Zeros in the shape and dtype of x."""
    return full_like(x, 0, dtype)


def ones_like(x: TensorLike, dtype: object = None) -> Tensor:
    """Ones in the shape and dtype of x."""
    return full_like(x, 1, dtype)


def iota(shape: ShapeLike, axis: int, dtype: object = i64) -> Tensor:
    """Each element's own index along an axis."""
    dims = as_shape(shape, "iota")
    return apply("iota", shape=dims, axis=normalize_axis(axis, len(dims), "iota"), dtype=as_dtype(dtype))


def arange(start: Dim | float, stop: Dim | float | None = None, step: int | float = 1, dtype: object = None) -> Tensor:
    """start, start + step, ... below stop; `arange(n)` counts from 0. n may be symbolic if the step is 1."""
    low, high = (0, start) if stop is None else (start, stop)
    chosen = as_dtype(dtype) if dtype is not None else f32 if any(isinstance(v, float) for v in (low, high, step)) else i64
    if isinstance(low, DimExpr) or isinstance(high, DimExpr):
        if step != 1 or not isinstance(low, int) or isinstance(high, float):
            raise error(ShapeError, f"arange({low}, {high}, {step}): with a symbolic end, start is an int and step is 1")
        numbers = apply("iota", shape=(high - low,), axis=0, dtype=chosen)
        return numbers + low if low else numbers
    if step == 0:
        raise error(AttributeValueError, "arange: the step cannot be 0")
    if low == 0 and step == 1 and isinstance(high, int):
        return apply("iota", shape=(high if high > 0 else 0,), axis=0, dtype=chosen)
    return apply("constant", value=Literal(np.arange(low, high, step), chosen))


def linspace(start: float, stop: float, num: int = 50, dtype: object = f32) -> Tensor:
    """`num` evenly spaced numbers from start to stop, both included."""
    return apply("constant", value=Literal(np.linspace(start, stop, num), as_dtype(dtype)))


def eye(n: int, m: int | None = None, dtype: object = f32) -> Tensor:
    """Ones on the diagonal of an n x m matrix, zeros elsewhere."""
    shape = (n, n if m is None else m)
    return cast(apply("equal", iota(shape, 0, i32), iota(shape, 1, i32)), as_dtype(dtype))


def _triangle(x: TensorLike, k: int, lower: bool) -> Tensor:
    t = as_tensor(x, what="tril" if lower else "triu")
    if t.ndim < 2:
        raise error(ShapeError, f"{'tril' if lower else 'triu'} takes matrices, two dimensions or more", operand=t)
    rows, columns = iota(t.shape, t.ndim - 2, i32), iota(t.shape, t.ndim - 1, i32)
    keep = columns - rows <= k if lower else columns - rows >= k
    return apply("where", keep, t, zeros_like(t))


def tril(x: TensorLike, k: int = 0) -> Tensor:
    """Zero above the k-th diagonal of the last two dimensions."""
    return _triangle(x, k, lower=True)


def triu(x: TensorLike, k: int = 0) -> Tensor:
    """Zero below the k-th diagonal of the last two dimensions."""
    return _triangle(x, k, lower=False)


# -- gathering ----------------------------------------------------------------------------------------------------------
def as_indices(indices: TensorLike, what: str) -> Tensor:
    """Integer indices. Raises DTypeError for bools and floats."""
    t = as_tensor(indices, what=what)
    if not t.dtype.is_integer:
        hint = (
            "a bool mask selects a number of elements known only at run time: use tw.where"
            if t.dtype is bool_
            else "use .astype('i64')"
        )
        raise error(DTypeError, f"{what}: indices are integers, not {t.dtype}; {hint}", indices=t)
    return t


def wrap_negative(indices: Tensor, size: Dim) -> Tensor:
    """Indices with those below 0 counted from the end."""
    if indices.dtype.kind == "uint":
        return indices
    return apply("where", indices < 0, indices + size, indices)


def take(x: TensorLike, indices: TensorLike, axis: int | None = None) -> Tensor:
    """x[..., indices, ...] along an axis (None: of the flattened Tensor). Negative indices count from the end; what is
    still out of range is clipped.
    """
    t = as_tensor(x, what="take")
    if axis is None:
        t, axis = ravel(t), 0
    a = normalize_axis(axis, t.ndim, "take")
    return apply("gather", t, wrap_negative(as_indices(indices, "take"), t.shape[a]), axis=a)


def take_along_axis(x: TensorLike, indices: TensorLike, axis: int) -> Tensor:
    """result[i, j, k] = x[i, indices[i, j, k], k] (for axis 1 of three); the other dimensions are equal or broadcast."""
    t, index = as_tensor(x, what="take_along_axis"), as_indices(indices, "take_along_axis")
    if t.ndim != index.ndim:
        raise error(ShapeError, "take_along_axis: x and indices need the same number of dimensions", x=t, indices=index)
    a = normalize_axis(axis, t.ndim, "take_along_axis")
    size = t.shape[a]
    thin = tuple(1 if d == a else s for d, s in enumerate(t.shape))
    shape = broadcast_shapes("take_along_axis", index, _broadcast_to(as_tensor(0), thin), names=("indices", "x without the axis"))
    full_shape = tuple(size if d == a else s for d, s in enumerate(shape))
    t = _broadcast_to(t, full_shape)
    index = _broadcast_to(cast(wrap_negative(index, size), i64), shape)
    flat = apply("maximum", apply("minimum", index, full(shape, size - 1, i64)), zeros_like(index))
    position: Tensor | None = None
    stride: Dim = 1
    for d in reversed(range(t.ndim)):
        part = flat if d == a else iota(shape, d)
        part = part if stride == 1 else part * stride
        position = part if position is None else position + part
        stride = stride * full_shape[d]
    assert position is not None
    return apply("gather", ravel(t), position, axis=0)


def one_hot(indices: TensorLike, num_classes: int, dtype: object = f32) -> Tensor:
    """A new last axis with 1 at each index and 0 elsewhere; all 0 for an index outside [0, num_classes)."""
    t = as_indices(indices, "one_hot")
    return apply("one_hot", t, depth=int(num_classes), dtype=as_dtype(dtype))


def scatter_add(x: TensorLike, indices: TensorLike, updates: TensorLike, axis: int = 0) -> Tensor:
    """x with updates[i] added at x[indices[i]] along an axis; repeated indices add up, those out of range are dropped."""
    t, index = as_tensor(x, what="scatter_add"), as_indices(indices, "scatter_add")
    a = normalize_axis(axis, t.ndim, "scatter_add")
    added = as_tensor(updates, t.dtype, "scatter_add")
    return apply("scatter_add", t, index, _broadcast_to(added, (*t.shape[:a], *index.shape, *t.shape[a + 1 :])), axis=a)


def scatter(x: TensorLike, indices: TensorLike, updates: TensorLike, axis: int = 0, *, kind: str = "set") -> Tensor:
    """x with updates[i] put at x[indices[i]] along an axis; indices out of range are dropped.

    `kind` is 'set' (of several updates of one element the last stays), 'mul', 'max' or 'min' (combined with what is there;
    these have no gradient). For sums there is scatter_add.
    """
    t, index = as_tensor(x, what="scatter"), as_indices(indices, "scatter")
    a = normalize_axis(axis, t.ndim, "scatter")
    put = _broadcast_to(as_tensor(updates, t.dtype, "scatter"), (*t.shape[:a], *index.shape, *t.shape[a + 1 :]))
    return apply("scatter", t, index, put, axis=a, kind=kind)


def meshgrid(*vectors: TensorLike, indexing: str = "xy") -> list[Tensor]:
    """Coordinate matrices from vectors; 'ij' keeps the order of axes, 'xy' exchanges the first two."""
    if indexing not in ("xy", "ij"):
        raise error(AttributeValueError, f"meshgrid: indexing is 'xy' or 'ij', not {indexing!r}")
    ts = [as_tensor(v, what="meshgrid") for v in vectors]
    order = list(range(len(ts)))
    if indexing == "xy" and len(ts) > 1:
        order[0], order[1] = 1, 0
    shape: list[Dim] = [1] * len(ts)
    for i, t in zip(order, ts, strict=True):
        shape[i] = product(t.shape)
    out: list[Tensor] = []
    for i, t in zip(order, ts, strict=True):
        one: Shape = tuple(shape[i] if d == i else 1 for d in range(len(ts)))
        out.append(_broadcast_to(reshape(t, one), tuple(shape)))
    return out
