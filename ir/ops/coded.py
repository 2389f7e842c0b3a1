"""Weights in few bits with a scale for every so many steps of a reduction, and products with them.

    dequantize_blocks    w[..., k, ...] = q[..., k, ...] * scale[..., k // block, ...]        along one axis; of q its lowest bits
    dequantize_codebook  w[..., k, ...] = table[q[..., k, ...]] * scale[..., k // block, ...]
    coded_matmul         y[..., n] = sum over k of x[..., k] * q[k, n] * scale[k // block, n]
    codebook_matmul      y[..., n] = sum over k of x[..., k] * table[q[k, n]] * scale[k // block, n]

The products read weights from panels of W columns, as a processor wants them: i8, bf16 and f16 as [P, K, W]; of four bits as i32
[P, ceil(K / 8), W], whose four bits t (from the lowest; in two's complement where they are no places in a table of sixteen) are
step 8 k + t; scales as [P, ceil(K / block), W]. Columns from n on are padding, and so are the bits of steps from K on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..dtypes import DType, bf16, f16, f32, i8, i32, i64, u8
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, binary, cast, const
from ..graph import Attrs, Node
from ..lowering import Coded, Load, Map
from ..op import REQUIRED, Array, NotDifferentiable, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .contract import REASON

STEPS = 8  # of the reduction, whose four bits are one i32


def _check_scale(op: str, t: TensorType, k: int, allowed: tuple[DType, ...]) -> None:
    if t.dtype not in allowed:
        raise DTypeError(f"operand {k} of {op} is a scale of {' or '.join(map(str, allowed))}, not {t.dtype}")


def _block(op: str, attrs: Attrs) -> int:
    block = attrs["block"]
    if type(block) is not int or block < 1:
        raise AttributeValueError(f"block of {op} is how many steps share a scale, an integer of at least 1, not {block!r}")
    return block


def _check_per_block(op: str, q: TensorType, scale: TensorType, operand: int, axis: int, block: int) -> None:
    """Raises ShapeError unless there is a scale for each block of that axis."""
    wanted = tuple(-(-n // block) if k == axis else n for k, n in enumerate(c.static(q.shape)))
    if scale.shape != wanted:
        raise ShapeError(
            f"operand {operand} of {op} has shape {c.show(scale.shape)}, expected {c.show(wanted)}: one for each {block} "
            f"of axis {axis} of {c.show(q.shape)}"
        )


def _each_its_scale(scale: Array, block: int, axis: int, size: int) -> Array:
    """The scale of each of `size` numbers of an axis, in f32."""
    return np.asarray(np.repeat(scale.astype(np.float32), block, axis).take(range(size), axis))


def _infer_blocks(types: Sequence[TensorType], attrs: Attrs) -> Type:
    q, scale = types
    axis, block = c.check_axis("dequantize_blocks", attrs["axis"], q.rank), _block("dequantize_blocks", attrs)
    if q.dtype is not i8:
        raise DTypeError(f"operand 0 of dequantize_blocks has dtype {q.dtype}, expected i8 (also for weights of four bits)")
    _check_scale("dequantize_blocks", scale, 1, (f32, bf16, f16))
    if attrs["bits"] not in (4, 8):
        raise AttributeValueError(f"bits of dequantize_blocks is 4 or 8, not {attrs['bits']!r}")
    _check_per_block("dequantize_blocks", q, scale, 1, axis, block)
    return TensorType(f32, q.shape)


def _blocks_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    q, scale = arrays
    axis = attrs["axis"]
    wide = _each_its_scale(scale, attrs["block"], axis, q.shape[axis])
    if attrs["bits"] == 4:
        q = (q & 15 ^ 8) - 8
    with np.errstate(all="ignore"):
        return np.asarray(q.astype(np.float32) * wide)


def _lower_blocks(node: Node) -> Map:
    axis, block, bits = node.attrs["axis"], node.attrs["block"], node.attrs["bits"]

    def number(q: Expr) -> Expr:
        return cast(q if bits == 8 else ((q & const(15, i8)) ^ const(8, i8)) - const(8, i8), f32)

    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        at = tuple(binary("floordiv", i, block) if k == axis else i for k, i in enumerate(idx))
        return number(load(0, idx)) * cast(load(1, at), f32)

    return Map(value)


def _transpose_blocks(node: Node, perm: tuple[int, ...]) -> Node:
    moved = [c.transposed(n, perm) for n in node.inputs]
    return make(node.op, *moved, **{**node.attrs, "axis": perm.index(node.attrs["axis"])})


def _blocks_samples() -> list[Sample]:
    def sample(shape: tuple[int, ...], axis: int, block: int, label: str = "") -> Sample:
        scales = tuple(-(-n // block) if k == axis else n for k, n in enumerate(shape))
        draw = c.together(c.integers(shape, low=-128, high=128, dtype=i8), c.uniform(scales, low=0.01, high=0.3))
        return Sample(draw, {"axis": axis, "block": block}, gradient=False, label=label)

    narrow = c.together(c.integers((5, 12), low=-128, high=128, dtype=i8), c.uniform((5, 3), low=0.01, high=0.3, dtype=bf16))
    return [
        sample((3, 32), 1, 8),
        sample((17, 5), 0, 4, "a last block of one"),
        sample((2, 7, 3), 1, 16, "one block"),
        sample((4, 6), 1, 1, "a scale each"),
        Sample(narrow, {"axis": 1, "block": 4, "bits": 4}, gradient=False, label="four bits, bf16"),
    ]


_NONE = NotDifferentiable("integers have no gradient; train the float weights and quantise them after that")

dequantize_blocks = register(
    Op(
        name="dequantize_blocks",
        doc="i8, or their lowest four bits, times a scale (f32 or bf16) for each `block` elements along `axis`, in f32.",
        arity=2,
        infer=_infer_blocks,
        reference=_blocks_reference,
        lower=_lower_blocks,
        grad=_NONE,
        traits=frozenset({Trait.CHEAP, Trait.BLOCKS}),
        attrs={"axis": REQUIRED, "block": REQUIRED, "bits": 8},
        transpose=_transpose_blocks,
        samples=_blocks_samples,
    )
)


# --- coded_matmul -----------------------------------------------------------------------------------------------------


_HELD: Final = {4: (i32,), 8: (i8,), 16: (bf16, f16)}


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, panels, scales = types
    block, n, bits = _block("coded_matmul", attrs), attrs["n"], attrs["bits"]
    if bits not in _HELD:
        raise AttributeValueError(f"bits of coded_matmul is 4, 8 or 16, not {bits!r}")
    if x.dtype is not f32 or x.rank < 1:
        raise DTypeError(f"operand 0 of coded_matmul is f32 [..., K], not {x}")
    wanted = _HELD[bits]
    if panels.dtype not in wanted:
        said = " or ".join(map(str, wanted))
        raise DTypeError(f"operand 1 of coded_matmul has dtype {panels.dtype}, expected {said} for weights of {bits} bits")
    _check_scale("coded_matmul", scales, 2, (f32, bf16))
    if panels.rank != 3 or scales.rank != 3:
        raise ShapeError(f"coded_matmul takes panels [P, K, W] and scales [P, K / block, W], not {panels} and {scales}")
    (k,), (count, steps, width) = c.static(x.shape[-1:]), c.static(panels.shape)
    if steps != (-(-k // STEPS) if bits == 4 else k):
        raise ShapeError(f"operand 1 of coded_matmul has shape {c.show(panels.shape)}, which is not {k} steps of {bits} bits")
    if scales.shape != (count, -(-k // block), width):
        shape = (count, -(-k // block), width)
        raise ShapeError(f"operand 2 of coded_matmul has shape {c.show(scales.shape)}, expected {c.show(shape)}")
    if type(n) is not int or not 0 <= count * width - n < max(width, 1):
        raise ShapeError(f"coded_matmul has {count} panels of {width} columns, which are not those of {n!r}")
    if bits == 4 and block % STEPS and block < k:
        raise AttributeValueError(f"block of coded_matmul of four bits is a multiple of {STEPS}, not {block}")
    return TensorType(f32, (*x.shape[:-1], n))


def decoded(panels: Array, scales: Array, k: int, attrs: Attrs, table: Array | None = None) -> Array:
    """The weights [K, n] in f32."""
    q = panels
    if panels.dtype == np.int32:
        bits = (panels.view(np.uint32)[:, :, None, :] >> (4 * np.arange(STEPS, dtype=np.uint32))[:, None]) & np.uint32(15)
        q = bits.astype(np.int32).reshape(panels.shape[0], -1, panels.shape[2])[:, :k]
        q = q - 16 * (q > 7) if table is None else table[q]
    wide = np.repeat(scales.astype(np.float32), attrs["block"], 1)[:, :k]
    with np.errstate(all="ignore"):
        w = q.astype(np.float32) * wide
    return w.transpose(1, 0, 2).reshape(k, -1)[:, : attrs["n"]]


def _reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, panels, scales = arrays
    with np.errstate(all="ignore"):
        return np.asarray(x @ decoded(panels, scales, x.shape[-1], attrs))


def _draw(
    lead: tuple[int, ...], k: int, n: int, bits: int, block: int, width: int, scale: Any = f32, held: Any = bf16
) -> Callable[[np.random.Generator], list[Array]]:
    def draw(rng: np.random.Generator) -> list[Array]:
        count = -(-n // width)
        x = rng.uniform(-2, 2, (*lead, k)).astype(np.float32)
        if bits == 8:
            q: Array = rng.integers(-128, 128, (count, k, width)).astype(np.int8)
        elif bits == 4:
            q = rng.integers(-(2**31), 2**31, (count, -(-k // STEPS), width)).astype(np.int32)
        else:
            q = rng.uniform(-100, 100, (count, k, width)).astype(held.numpy)
        s = rng.uniform(0.001, 0.01, (count, -(-k // block), width)).astype(scale.numpy)
        return [x, q, s]

    return draw


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        ((1,), 40, 64, 8, 40, 64),
        ((1,), 40, 64, 4, 32, 64),
        ((3,), 17, 70, 8, 8, 64),
        ((2, 4), 33, 5, 4, 16, 64),
        ((16,), 20, 90, 4, 64, 64, bf16),
        ((17,), 20, 40, 8, 32, 16, bf16),
        ((), 9, 16, 4, 8, 16),
        ((5,), 3, 7, 8, 3, 32),
        ((0,), 9, 16, 8, 9, 16),
        ((3,), 19, 70, 16, 19, 64),
        ((1,), 40, 33, 16, 40, 16, f32, f16),
    ]
    return [
        Sample(_draw(*case), {"n": case[2], "bits": case[3], "block": case[4]}, budget=5e-6, reason=REASON, gradient=False)
        for case in cases
    ]


coded_matmul = register(
    Op(
        name="coded_matmul",
        doc="x [..., K] times weights of `bits` bits in panels of columns, with a scale for each `block` steps: [..., n].",
        arity=3,
        infer=_infer,
        reference=_reference,
        lower=lambda node: Coded(node.attrs["bits"], node.attrs["block"]),
        grad=_NONE,
        traits=frozenset({Trait.CONTRACTION}),
        attrs={"n": REQUIRED, "bits": REQUIRED, "block": REQUIRED},
        samples=_samples,
    )
)


# --- codebooks --------------------------------------------------------------------------------------------------------

ENTRIES: Final = 16  # of a table that lives in registers


def _infer_codebook(types: Sequence[TensorType], attrs: Attrs) -> Type:
    q, table, scale = types
    axis, block = c.check_axis("dequantize_codebook", attrs["axis"], q.rank), _block("dequantize_codebook", attrs)
    if q.dtype is not u8:
        raise DTypeError(f"operand 0 of dequantize_codebook has dtype {q.dtype}, expected u8: places in the table")
    if table.dtype not in (f32, bf16) or table.shape not in ((ENTRIES,), (256,)):
        raise ShapeError(f"operand 1 of dequantize_codebook is a table of 16 or 256 f32 or bf16, not {table}")
    _check_scale("dequantize_codebook", scale, 2, (f32, bf16))
    _check_per_block("dequantize_codebook", q, scale, 2, axis, block)
    return TensorType(f32, q.shape)


def _codebook_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    q, table, scale = arrays
    axis = attrs["axis"]
    wide = _each_its_scale(scale, attrs["block"], axis, q.shape[axis])
    with np.errstate(all="ignore"):
        return np.asarray(table[q & (len(table) - 1)].astype(np.float32) * wide)


def _lower_codebook(node: Node) -> Map:
    axis, block = node.attrs["axis"], node.attrs["block"]
    (entries,) = c.static(node.inputs[1].shape)

    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        at = tuple(binary("floordiv", i, block) if k == axis else i for k, i in enumerate(idx))
        place = cast(load(0, idx) & const(entries - 1, u8), i64)
        return cast(load(1, (place,)), f32) * cast(load(2, at), f32)

    return Map(value)


def _codebook_samples() -> list[Sample]:
    def sample(shape: tuple[int, ...], axis: int, block: int, entries: int, scale: DType, label: str) -> Sample:
        scales = tuple(-(-n // block) if k == axis else n for k, n in enumerate(shape))
        draw = c.together(
            c.integers(shape, low=0, high=256, dtype=u8),
            c.uniform((entries,)),
            c.uniform(scales, low=0.01, high=0.3, dtype=scale),
        )
        return Sample(draw, {"axis": axis, "block": block}, gradient=False, label=label)

    return [
        sample((3, 32), 1, 8, 16, bf16, "sixteen entries"),
        sample((17, 5), 0, 17, 256, f32, "256 entries"),
        sample((17, 5), 0, 4, 16, f32, "a last block of one"),
        sample((2, 7, 3), 1, 16, 256, bf16, "one block"),
        sample((4, 6), 1, 1, 16, f32, "a scale each"),
    ]


dequantize_codebook = register(
    Op(
        name="dequantize_codebook",
        doc="Entries of a table (16 or 256) times a scale for each `block` elements along `axis`, f32 or bf16, in f32.",
        arity=3,
        infer=_infer_codebook,
        reference=_codebook_reference,
        lower=_lower_codebook,
        grad=_NONE,
        traits=frozenset({Trait.BLOCKS}),
        attrs={"axis": REQUIRED, "block": REQUIRED},
        samples=_codebook_samples,
    )
)


def _infer_table(types: Sequence[TensorType], attrs: Attrs) -> Type:
    if types[3] != TensorType(f32, (ENTRIES,)):
        raise ShapeError(f"operand 3 of codebook_matmul is a table f32[16], not {types[3]}")
    return _infer(types[:3], {**attrs, "bits": 4})


def _table_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, panels, scales, table = arrays
    with np.errstate(all="ignore"):
        return np.asarray(x @ decoded(panels, scales, x.shape[-1], attrs, table))


def _table_samples() -> list[Sample]:
    def draw(lead: tuple[int, ...], k: int, n: int, block: int) -> Callable[[np.random.Generator], list[Array]]:
        whole = _draw(lead, k, n, 4, block, 64, bf16)
        return lambda rng: [*whole(rng), rng.uniform(-8, 8, ENTRIES).astype(np.float32)]

    cases = [((1,), 40, 64, 32), ((3,), 17, 70, 24), ((2, 4), 33, 5, 16), ((), 9, 16, 8), ((0,), 9, 16, 8)]
    return [Sample(draw(*case), {"n": case[2], "block": case[3]}, budget=5e-6, reason=REASON, gradient=False) for case in cases]


codebook_matmul = register(
    Op(
        name="codebook_matmul",
        doc="x [..., K] times entries of a table of sixteen, by weights of four bits in panels of columns, and scales: [..., n].",
        arity=4,
        infer=_infer_table,
        reference=_table_reference,
        lower=lambda node: Coded(4, node.attrs["block"]),
        grad=_NONE,
        traits=frozenset({Trait.CONTRACTION}),
        attrs={"n": REQUIRED, "block": REQUIRED},
        samples=_table_samples,
    )
)
