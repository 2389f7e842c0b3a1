"""Weights of matrix products in blocks along their inputs: integers of 8 or 4 bits with a scale for each block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ir.build import full
from ..ir.dtypes import bf16, i8
from ..ir.errors import InputError
from ..ir.graph import Node
from ..ir.op import make
from .source import Array

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
        integers = _apart(add(f"{name}.weight_q", packed), axis, q.shape[axis])
    node = make("dequantize_blocks", integers, s, axis=axis, block=group, bits=bits)
    return node, packed.nbytes + scale.nbytes


def _apart(p: Node, axis: int, count: int) -> Node:
    """Four bits from bytes along an axis, as i8 of which the lowest four bits count."""
    shape = list(p.tensor.static_shape)
    thin = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    halves = (make("and", p, full(15, p.tensor)), make("shift_right", p, full(4, p.tensor)))
    both = make("concat", *(make("reshape", h, shape=thin) for h in halves), axis=axis + 1)
    shape[axis] *= 2
    x = make("cast", make("reshape", both, shape=tuple(shape)), dtype=i8)
    if shape[axis] == count:
        return x
    stops = tuple(count if k == axis else n for k, n in enumerate(shape))
    return make("slice", x, starts=(0, 0), stops=stops, steps=(1, 1))
