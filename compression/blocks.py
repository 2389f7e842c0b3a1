"""Weights of matrix products in blocks along their inputs: integers of 8 or 4 bits, or places in a codebook, and scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ir.build import full
from ..ir.dtypes import bf16, i8
from ..ir.errors import InputError
from ..ir.graph import Node
from ..ir.op import make
from .source import Array

_FINE = 1 << 16  # bins of the histogram that centroids are found on
_ROUNDS = 200
Add = Callable[[str, Array], Node]  # a parameter of a name for an array


def block_weights(w: Array, axis: int, bits: int, group: int) -> tuple[Array, Array]:
    """(i8 integers, bf16 scales [.., ceil(K / group), ..]) of a matrix in blocks of `group` along `axis`: symmetric. The scale is
    rounded first, so that the integers are the nearest for it; a block of zeros has scale 1.

    Raises InputError for NaN and infinities.
    """
    if not np.isfinite(w).all():
        raise InputError("weights hold NaN or infinite numbers")
    most = 2 ** (bits - 1) - 1
    rows = np.moveaxis(np.asarray(w, np.float32), axis, -1)
    n, k = rows.shape
    count = -(-k // group)
    blocks = np.zeros((n, count * group), np.float32)
    blocks[:, :k] = rows
    blocks = blocks.reshape(n, count, group)
    scale = (np.abs(blocks).max(axis=2, initial=0.0) / np.float32(most)).astype(bf16.numpy)
    scale = np.where(scale.astype(np.float32) > 2.0**-100, scale, bf16.numpy.type(1))
    whole = np.clip(np.rint(blocks / scale.astype(np.float32)[:, :, None]), -most, most).astype(np.int8)
    q = whole.reshape(n, -1)[:, :k]
    return np.ascontiguousarray(np.moveaxis(q, -1, axis)), np.ascontiguousarray(np.moveaxis(scale, -1, axis))


def two_to_a_byte(q: Array, axis: int) -> Array:
    """Integers of four bits as u8 with those of even places in the low bits; a last one alone has zeros above it."""
    rows = np.moveaxis(q.view(np.uint8) & np.uint8(15), axis, -1)
    if rows.shape[-1] % 2:
        rows = np.concatenate([rows, np.zeros((*rows.shape[:-1], 1), np.uint8)], -1)
    return np.ascontiguousarray(np.moveaxis(rows[..., ::2] | rows[..., 1::2] << 4, -1, axis))


def block_nodes(name: str, q: Array, scale: Array, axis: int, bits: int, group: int, add: Add) -> tuple[Node, int]:
    """The numbers that the blocks stand for, made of parameters, and the bytes of these."""
    s = add(f"{name}.weight_scale", scale)
    if bits == 8:
        packed, integers = q, add(f"{name}.weight_q", q)
    else:
        packed = two_to_a_byte(q, axis)
        integers = make("cast", _apart(add(f"{name}.weight_q", packed), axis, q.shape[axis]), dtype=i8)
    node = make("dequantize_blocks", integers, s, axis=axis, block=group, bits=bits)
    return node, packed.nbytes + scale.nbytes


def _apart(p: Node, axis: int, count: int) -> Node:
    """Four bits from bytes along an axis, as u8 of which the lowest four bits count."""
    shape = list(p.tensor.static_shape)
    thin = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    halves = (make("and", p, full(15, p.tensor)), make("shift_right", p, full(4, p.tensor)))
    both = make("concat", *(make("reshape", h, shape=thin) for h in halves), axis=axis + 1)
    shape[axis] *= 2
    x = make("reshape", both, shape=tuple(shape))
    if shape[axis] == count:
        return x
    stops = tuple(count if k == axis else n for k, n in enumerate(shape))
    return make("slice", x, starts=(0, 0), stops=stops, steps=(1, 1))


def codebook_weights(w: Array, axis: int, bits: int, group: int) -> tuple[Array, Array, Array]:
    """(u8 places, table of 2^bits entries, scales as those of `block_weights`): what each stands for is table[place] * scale.

    The scale is the block's largest magnitude; the entries are centroids of the weights over their scales, each weighed by its
    scale's square, so that the squared error of the weights is what k-means makes small (Lloyd 1982; in one dimension its
    clusters are intervals). One of 16 entries is 0, so that zeros stay zeros. A table of 16 is f32, one of 256 bf16.

    Raises InputError for NaN and infinities.
    """
    if not np.isfinite(w).all():
        raise InputError("weights hold NaN or infinite numbers")
    rows = np.moveaxis(np.asarray(w, np.float32), axis, -1)
    n, k = rows.shape
    count = -(-k // group)
    blocks = np.zeros((n, count * group), np.float32)
    blocks[:, :k] = rows
    blocks = blocks.reshape(n, count, group)
    scale = np.abs(blocks).max(axis=2, initial=0.0).astype(bf16.numpy)
    scale = np.where(scale.astype(np.float32) > 2.0**-100, scale, bf16.numpy.type(1))
    wide = scale.astype(np.float32)[:, :, None]
    parts = (blocks / wide).reshape(n, -1)[:, :k]
    share = np.broadcast_to(wide**2, blocks.shape).reshape(n, -1)[:, :k]
    table = _centroids(parts.ravel(), share.ravel(), 2**bits)
    if bits == 8:
        table = table.astype(bf16.numpy)
    entries = table.astype(np.float32)
    q = np.searchsorted((entries[1:] + entries[:-1]) / 2, parts).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(q, -1, axis)), table, np.ascontiguousarray(np.moveaxis(scale, -1, axis))


def _centroids(x: Array, share: Array, count: int) -> Array:
    """Ascending centroids of numbers from -1 to 1 with weights, one of them 0: k-means on a fine histogram."""
    edges = np.linspace(-1.0, 1.0, _FINE + 1)
    place = np.clip(((x + 1.0) * (_FINE / 2)).astype(np.int64), 0, _FINE - 1)
    mass = np.bincount(place, share, _FINE)
    moment = np.bincount(place, share * x, _FINE)
    first = np.cumsum(np.concatenate([[0.0], mass]))
    second = np.cumsum(np.concatenate([[0.0], moment]))
    total = first[-1] or 1.0
    # where they begin: as dense as the third root of how dense the numbers are, which is best for many (Panter and Dite 1951)
    dense = np.cumsum(np.concatenate([[0.0], np.cbrt(mass / total + 1e-9)]))
    found = np.interp((np.arange(count) + 0.5) / count * dense[-1], dense, edges)
    for _ in range(_ROUNDS):
        found[np.argmin(np.abs(found))] = 0.0
        cuts = np.concatenate([[0], np.searchsorted(edges, (found[1:] + found[:-1]) / 2), [_FINE]])
        inside = first[cuts[1:]] - first[cuts[:-1]]
        mean = (second[cuts[1:]] - second[cuts[:-1]]) / np.where(inside > 0, inside, 1.0)
        new = np.where(inside > 0, mean, found)
        if np.abs(new - found).max() < 1e-7:
            break
        found = np.sort(new)
    found[np.argmin(np.abs(found))] = 0.0
    return found.astype(np.float32)


def codebook_nodes(name: str, q: Array, table: Array, scale: Array, axis: int, group: int, add: Add) -> tuple[Node, int]:
    """The numbers that places in a table stand for, made of parameters, and the bytes of these."""
    s, t = add(f"{name}.weight_scale", scale), add(f"{name}.weight_table", table)
    packed = two_to_a_byte(q, axis) if len(table) == 16 else q
    codes = add(f"{name}.weight_q", packed)
    codes = _apart(codes, axis, q.shape[axis]) if len(table) == 16 else codes
    node = make("dequantize_codebook", codes, t, s, axis=axis, block=group)
    return node, packed.nbytes + scale.nbytes + table.nbytes
