"""The one form of every multiply-and-sum: C[c(axes)] = sum over the k axes of A[a(axes)] * B[b(axes)].

Each operand dimension is indexed by an affine function of the axes (`Affine`), so that matrix products (batched,
transposed), convolutions (any stride, dilation, groups, either data layout) and both gradients of a convolution are one
op, `contract`, and one code generator serves them all. Padding is a separate `pad` op before it.

A convolution in NHWC, for instance (n batch of images, y x output pixel, o output channel; h w c reduction):

    A[n, y*stride + h*dilation, x*stride + w*dilation, c]   B[o, c, h, w]   C[n, y, x, o]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from .dims import Dim, as_int
from .errors import ShapeError

KINDS: Final = ("batch", "m", "n", "k")


@dataclass(frozen=True, slots=True)
class Axis:
    """A loop of the contraction. kind: 'batch' (in A, B and C), 'm' (A and C), 'n' (B and C) or 'k' (A and B: summed).

    A batch or k axis of one operand alone is allowed to be absent from the other (it broadcasts).
    """

    name: str
    extent: Dim
    kind: str


@dataclass(frozen=True, slots=True)
class Affine:
    """constant + the sum of coefficient * axis, over axis names."""

    terms: tuple[tuple[str, int], ...]
    constant: int = 0

    def __str__(self) -> str:
        parts = [n if c == 1 else f"{c}*{n}" for n, c in self.terms]
        if self.constant or not parts:
            parts.append(str(self.constant))
        return "+".join(parts)


def affine(*terms: str | tuple[str, int], constant: int = 0) -> Affine:
    """affine('x', ('h', 2)) is x + 2h."""
    return Affine(tuple(t if isinstance(t, tuple) else (t, 1) for t in terms), constant)


@dataclass(frozen=True, slots=True)
class Contraction:
    """Axes, and an index map per dimension of A, B and C.

    `panel` > 0 says that B comes packed: its shape is (*batch extents, ceil(N / panel), K, panel), N and K the products
    of the n and k extents in axis order, zero beyond N; `b` then still gives the maps of the unpacked operand, and
    `b_shape` its shape. With `pairs` so many steps of the reduction stand side by side, (*batch, ceil(N / panel), K / 2, panel,
    2) or with 4 in place of 2: so a dot product of pairs of 16-bit floats, or of four bytes, reads them. The extent of the last
    k axis then is a multiple.

    `groups` > 1 says that the columns of the one n axis, whole panels of them, come in so many equal groups, of which something
    joins column by column: the gates of a recurrent cell. A panel then holds panel / groups columns of every group, one group
    after the other, so that a register tile has in it what is joined. Without panels it is a wish.
    """

    axes: tuple[Axis, ...]
    a: tuple[Affine, ...]
    b: tuple[Affine, ...]
    c: tuple[Affine, ...]
    panel: int = 0
    b_shape: tuple[Dim, ...] = ()
    pairs: int = 0
    groups: int = 0

    def of_kind(self, kind: str) -> tuple[Axis, ...]:
        return tuple(x for x in self.axes if x.kind == kind)

    def axis(self, name: str) -> Axis:
        return next(x for x in self.axes if x.name == name)

    def size(self, kind: str) -> Dim:
        """Product of the extents of one kind of axis."""
        total: Dim = 1
        for x in self.of_kind(kind):
            total = total * x.extent
        return total

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * int(np.prod([as_int(x.extent) for x in self.axes], dtype=object))

    def split_groups(self) -> tuple[Contraction, Axis | None]:
        """Of a packed B with groups the spec with axes (tile, group, column) in place of the n axis, in the order of the columns
        in panels, and the axis that counts the groups; of any other the spec itself, and None."""
        if self.groups < 2 or not self.panel:
            return self, None
        (axis,) = self.of_kind("n")
        units, width = as_int(axis.extent) // self.groups, self.panel // self.groups
        names = [f"{axis.name}.{part}" for part in ("tile", "group", "column")]
        steps = (width, units, 1)
        new = [Axis(n, e, "n") for n, e in zip(names, (units // width, self.groups, width), strict=True)]

        def put(index: Affine) -> Affine:
            terms: list[tuple[str, int]] = []
            for name, c in index.terms:
                terms += [(n, c * s) for n, s in zip(names, steps, strict=True)] if name == axis.name else [(name, c)]
            return Affine(tuple(terms), index.constant)

        axes = [y for x in self.axes for y in (new if x is axis else [x])]
        made = replace(self, axes=tuple(axes), b=tuple(map(put, self.b)), c=tuple(map(put, self.c)), groups=0)
        return made, new[1]

    def packed(self, panel: int, b_shape: tuple[Dim, ...], pairs: int = 0) -> Contraction:
        return replace(self, panel=panel, b_shape=b_shape, pairs=pairs)

    def packed_shape(self, panel: int) -> tuple[Dim, ...]:
        """Shape of B in panels. B must have every batch axis."""
        n, k = self.size("n"), self.size("k")
        steps: tuple[Dim, ...] = (k // self.pairs, panel, self.pairs) if self.pairs else (k, panel)
        return (*(x.extent for x in self.of_kind("batch")), (n + panel - 1) // panel, *steps)


def strided_view(array: np.ndarray[Any, Any], index: tuple[Affine, ...], axes: tuple[Axis, ...]) -> np.ndarray[Any, Any]:
    """A read-only view with one dimension per axis: view[axes] = array[index(axes)].

    Raises ShapeError if an index leaves the array.
    """
    array = np.ascontiguousarray(array)
    offset, strides = 0, dict.fromkeys((x.name for x in axes), 0)
    extents = {x.name: as_int(x.extent) for x in axes}
    shape = tuple(extents.values())
    if 0 in shape:
        return np.zeros(shape, array.dtype)
    for dimension, (a, size, stride) in enumerate(zip(index, array.shape, array.strides, strict=True)):
        low = a.constant + sum(min(0, c * (extents[n] - 1)) for n, c in a.terms)
        high = a.constant + sum(max(0, c * (extents[n] - 1)) for n, c in a.terms)
        if low < 0 or high >= size:
            raise ShapeError(f"contraction index {a} runs from {low} to {high}, outside dimension {dimension} of size {size}")
        offset += a.constant * stride
        for name, coefficient in a.terms:
            strides[name] += coefficient * stride
    raw = array.reshape(-1).view(np.uint8)
    view = np.ndarray(shape, array.dtype, buffer=raw, offset=offset, strides=tuple(strides.values()))
    view.flags.writeable = False
    return view
