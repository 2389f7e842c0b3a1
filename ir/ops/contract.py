"""`contract`: the multiply-and-sum that matrix products and convolutions come down to (see ir/contraction.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from ..contraction import KINDS, Affine, Axis, Contraction, affine, strided_view
from ..dims import Dim, Shape, as_int
from ..dtypes import DType, bf16, f16, f32, i8, i16, i32, u8
from ..errors import AttributeValueError, DTypeError, GradientError, ShapeError
from ..graph import Attrs, Node
from ..lowering import Contract, Lowering
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c

BYTES: Final = (i8, u8)
_NARROW: Final = (np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16))
_RANGE: Final = {i8: (-128, 128), u8: (0, 256), i16: (-(1 << 15), 1 << 15)}
_BLOCK_BYTES: Final = 1 << 26  # of an operand copied into matrix form at a time
REASON: Final = "the order of a sum is free: rounding grows with its length"


# --- type -----------------------------------------------------------------------------------------------------------


def _check_operand(name: str, index: tuple[Affine, ...], shape: Shape, spec: Contraction) -> None:
    if len(index) != len(shape):
        raise ShapeError(f"operand {name} of contract has shape {c.show(shape)}, its index map has {len(index)} dimensions")
    extents = {x.name: x.extent for x in spec.axes}
    if any(n == 0 for n in extents.values()):
        return
    for d, (a, size) in enumerate(zip(index, shape, strict=True)):
        low: Dim = a.constant
        high: Dim = a.constant
        for axis, k in a.terms:
            if axis not in extents:
                raise AttributeValueError(
                    f"operand {name} of contract: dimension {d} has index {a}, but there is no axis {axis!r}"
                )
            if k < 0:
                low = low + k * (extents[axis] - 1)
            else:
                high = high + k * (extents[axis] - 1)
        room = size - 1 - high
        if (isinstance(low, int) and low < 0) or (isinstance(room, int) and room < 0):
            raise ShapeError(
                f"operand {name} of contract has shape {c.show(shape)}, but index {a} of dimension {d} runs from {low} to {high}"
            )


def _check_groups(spec: Contraction) -> None:
    """Raises AttributeValueError for groups that are not equal parts of the last dimension, of whole panels."""
    n = spec.of_kind("n")
    plain = len(n) == 1 and isinstance(n[0].extent, int) and spec.c[-1].terms == ((n[0].name, 1),)
    parts = plain and spec.groups > 1 and as_int(n[0].extent) % spec.groups == 0
    whole = parts and (not spec.panel or (spec.panel % spec.groups == 0 and as_int(n[0].extent) % spec.panel == 0))
    if not whole:
        raise AttributeValueError(
            f"contract: {spec.groups} groups are equal parts of one n axis, the last dimension of the result, and of whole panels"
        )


def sum_dtype(a: DType, b: DType) -> DType:
    """The dtype of sums of products: i32 of bytes, signed or not, each for itself, and of i16; of all others their own."""
    return i32 if (a in BYTES and b in BYTES) or (a is i16 and b is i16) else a


def check_factors(op: str, types: Sequence[TensorType], allowed: Callable[[DType], bool]) -> DType:
    """The dtype of sums of the operands' products. Raises DTypeError for operands of a dtype that is not `allowed`, or of two."""
    if sum_dtype(types[0].dtype, types[1].dtype) is types[0].dtype:
        c.check_dtype(op, types, 0, allowed)
        c.check_same(op, [TensorType(t.dtype, ()) for t in types])
    return sum_dtype(types[0].dtype, types[1].dtype)


def exactly(a: Array, b: Array, terms: int) -> tuple[Array, Array]:
    """Bytes and i16 as numbers in which sums of so many of their products are exact; other arrays as they are."""
    if a.dtype not in _NARROW or b.dtype not in _NARROW:
        return a, b
    few = a.dtype.itemsize == 1 and terms < 250  # 255 * 255 * 250 < 2^24
    wide = np.dtype(np.float32 if few else np.float64 if terms < 1 << 22 else np.int64)
    return a.astype(wide), b.astype(wide)


def wrapped(total: Array, a: Array, b: Array) -> Array:
    """Exact sums of products of bytes or i16 modulo 2^32, as i32; others as they are."""
    return total.astype(np.int64).astype(np.int32) if a.dtype in _NARROW and b.dtype in _NARROW else total


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    spec = attrs["spec"]
    if not isinstance(spec, Contraction):
        raise AttributeValueError(f"spec of contract is a Contraction, not {type(spec).__name__}")
    sums = check_factors("contract", types, c.is_arithmetic)
    names = [x.name for x in spec.axes]
    if len(set(names)) != len(names) or any(x.kind not in KINDS for x in spec.axes):
        raise AttributeValueError(f"axes of contract need distinct names and a kind of {', '.join(KINDS)}: {spec.axes}")
    if spec.pairs and (
        not spec.panel
        or spec.pairs * types[1].dtype.bits != 32
        or not spec.of_kind("k")
        or spec.of_kind("k")[-1].extent % spec.pairs
    ):
        raise AttributeValueError(
            "contract: pairs are two of 16 bits or four bytes, in panels, and the last k axis is a multiple of them"
        )
    if spec.groups:
        _check_groups(spec)
    if spec.panel:
        if types[1].shape != spec.packed_shape(spec.panel):
            expected = c.show(spec.packed_shape(spec.panel))
            raise ShapeError(f"operand 1 of contract has shape {c.show(types[1].shape)}, expected panels {expected}")
        _check_operand("1", spec.b, spec.b_shape, spec)
    else:
        _check_operand("1", spec.b, types[1].shape, spec)
    _check_operand("0", spec.a, types[0].shape, spec)
    shape: list[Dim] = []
    for a in spec.c:
        if len(a.terms) != 1 or a.terms[0][1] != 1 or a.constant:
            raise AttributeValueError(f"contract: a dimension of the result is one axis, not {a}")
        shape.append(spec.axis(a.terms[0][0]).extent)
    kept = [a.terms[0][0] for a in spec.c]
    if sorted(kept) != sorted(x.name for x in spec.axes if x.kind != "k"):
        raise AttributeValueError(
            f"contract: the result has axes {kept}, but each batch, m and n axis must be there exactly once"
        )
    return TensorType(sums, tuple(shape))


# --- value ----------------------------------------------------------------------------------------------------------


def unpack(panels: Array, spec: Contraction) -> Array:
    """B in the shape `spec.b_shape` from its panels (*batch, ceil(N / panel), K, panel), or those of pairs."""
    if spec.pairs:
        panels = np.swapaxes(panels, -2, -1)
        panels = panels.reshape(*panels.shape[:-3], -1, panels.shape[-1])
    batch, n, k = spec.of_kind("batch"), spec.of_kind("n"), spec.of_kind("k")
    matrix = np.swapaxes(panels, -3, -2)
    matrix = matrix.reshape(*matrix.shape[:-2], -1)[..., : as_int(spec.size("n"))]
    if spec.groups:
        matrix = matrix[..., np.argsort(_group_order(spec, spec.panel))]
    axes = (*batch, *k, *n)
    flat = matrix.reshape([as_int(x.extent) for x in axes])
    b = np.zeros(c.static(spec.b_shape), panels.dtype)
    _writable_view(b, spec.b, axes)[...] = flat
    return b


def pack(b: Array, spec: Contraction, panel: int, pairs: int = 0) -> Array:
    """B in panels: (*batch, ceil(N / panel), K, panel), or (*batch, ceil(N / panel), K / pairs, panel, pairs), zero beyond N."""
    batch, n, k = spec.of_kind("batch"), spec.of_kind("n"), spec.of_kind("k")
    lead = [as_int(x.extent) for x in batch]
    rows, columns = as_int(spec.size("k")), as_int(spec.size("n"))
    matrix = strided_view(b, spec.b, (*batch, *k, *n)).reshape(*lead, rows, columns)
    if spec.groups:
        matrix = matrix[..., _group_order(spec, panel)]
    count = -(-columns // panel)
    padded = np.zeros((*lead, rows, count * panel), b.dtype)
    padded[..., :columns] = matrix
    panels = np.swapaxes(padded.reshape(*lead, rows, count, panel), -3, -2)
    if pairs:
        panels = np.swapaxes(panels.reshape(*lead, count, rows // pairs, pairs, panel), -2, -1)
    return np.ascontiguousarray(panels)


def _group_order(spec: Contraction, panel: int) -> Array:
    """The columns in the order in which panels hold them: of each group panel / groups, then the next ones."""
    return np.arange(as_int(spec.size("n"))).reshape(spec.groups, -1, panel // spec.groups).swapaxes(0, 1).ravel()


def _writable_view(array: Array, index: tuple[Affine, ...], axes: tuple[Axis, ...]) -> Array:
    view = strided_view(array, index, axes)
    start = view.__array_interface__["data"][0] - array.__array_interface__["data"][0] if view.size else 0
    return np.ndarray(view.shape, array.dtype, buffer=array.reshape(-1).view(np.uint8), offset=start, strides=view.strides)


def value(a: Array, b: Array, spec: Contraction) -> Array:
    """The contraction as matrix products (batch, m, k) @ (batch, k, n), copied into that form block by block."""
    if spec.panel:
        b = unpack(b, spec)
    batch, m, n, k = (spec.of_kind(kind) for kind in KINDS)
    lead, rows, columns, depth = ([as_int(x.extent) for x in axes] for axes in (batch, m, n, k))
    factors = a, b
    a, b = exactly(a, b, int(np.prod(depth, dtype=object)))
    dtype = np.result_type(a, b)
    if 0 in (*lead, *rows, *columns) or 0 in depth:
        flat = np.zeros((*lead, *rows, *columns), dtype)
    else:
        left, right = strided_view(a, spec.a, (*batch, *m, *k)), strided_view(b, spec.b, (*batch, *k, *n))
        width = int(np.prod(depth, dtype=object))
        right = right.reshape(*lead, width, -1)
        cut = len(lead)  # blocks are cut along the first m axis
        step = rows[0] if rows else 1
        if rows:
            step = max(1, min(rows[0], _BLOCK_BYTES * rows[0] // max(1, left.size * left.itemsize)))
        parts = []
        for start in range(0, rows[0] if rows else 1, step):
            block = left[(slice(None),) * cut + (slice(start, start + step),)] if rows else left
            product = np.matmul(block.reshape(*lead, -1, width), right)
            parts.append(product.reshape(*lead, *block.shape[cut : cut + len(rows)], *columns))
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=cut)
    flat = wrapped(flat, *factors)
    order = [x.name for x in (*batch, *m, *n)]
    return np.ascontiguousarray(flat.transpose([order.index(x.terms[0][0]) for x in spec.c])).reshape(
        [as_int(spec.axis(x.terms[0][0]).extent) for x in spec.c]
    )


def _reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    with np.errstate(all="ignore"):
        return value(arrays[0], arrays[1], attrs["spec"])


# --- gradient -------------------------------------------------------------------------------------------------------

# The roles of an axis in the gradient of A (operands dC, B) and of B (operands A, dC).
_FOR_A: Final = {"batch": "batch", "m": "m", "k": "n", "n": "k"}
_FOR_B: Final = {"batch": "batch", "m": "k", "k": "m", "n": "n"}


def _plain(index: tuple[Affine, ...]) -> list[str] | None:
    names = [a.terms[0][0] for a in index if len(a.terms) == 1 and a.terms[0][1] == 1 and not a.constant]
    return names if len(names) == len(index) == len(set(names)) else None


def _grad(node: Node, dy: Node) -> Sequence[Node]:
    spec: Contraction = node.attrs["spec"]
    a, b = node.inputs
    if a.dtype.is_integer:
        raise GradientError("contract of integers has no gradient: they are no numbers that can be a little larger")
    if spec.panel or _plain(spec.a) is None or _plain(spec.b) is None:
        raise GradientError(
            "contract with a strided, offset or packed operand has no gradient rule: take the gradient before the pass that "
            "turns conv2d into contract"
        )

    def swapped(
        kinds: dict[str, str], output: tuple[Affine, ...], left: tuple[Affine, ...], right: tuple[Affine, ...]
    ) -> Contraction:
        names = _plain(output)
        assert names is not None
        axes = []
        for x in spec.axes:
            kind = kinds[x.kind]
            if x.name not in names:
                kind = "k"
            elif kind == "k":
                raise GradientError(f"contract: no gradient rule for axis {x.name!r}, which only one operand has")
            axes.append(replace(x, kind=kind))
        return Contraction(tuple(axes), left, right, output)

    da = make("contract", dy, b, spec=swapped(_FOR_A, spec.a, spec.c, spec.b))
    db = make("contract", a, dy, spec=swapped(_FOR_B, spec.b, spec.a, spec.c))
    return da, db


# --- record ---------------------------------------------------------------------------------------------------------


def _lower(node: Node) -> Lowering:
    return Contract(node.attrs["spec"])


def product_spec(m: int, n: int, k: int, a: str = "mk", b: str = "kn") -> Contraction:
    """C[m, n] = A B, with each operand's dimensions in the given order."""
    axes = (Axis("m", m, "m"), Axis("n", n, "n"), Axis("k", k, "k"))
    return Contraction(axes, tuple(map(affine, a)), tuple(map(affine, b)), (affine("m"), affine("n")))


def _samples() -> list[Sample]:
    def sample(spec: Contraction, a: tuple[int, ...], b: tuple[int, ...], **more: Any) -> Sample:
        return Sample(c.uniform(a, b), {"spec": spec}, budget=5e-6, reason=REASON, **more)

    conv = Contraction(
        (Axis("y", 5, "m"), Axis("x", 6, "m"), Axis("o", 17, "n"), Axis("h", 3, "k"), Axis("w", 3, "k"), Axis("c", 4, "k")),
        (affine(("y", 2), "h"), affine("x", ("w", 2)), affine("c")),
        (affine("o"), affine("c"), affine(("h", -1), constant=2), affine("w")),
        (affine("y"), affine("x"), affine("o")),
    )
    batched = Contraction(
        (Axis("g", 3, "batch"), Axis("m", 4, "m"), Axis("n", 9, "n"), Axis("k", 5, "k")),
        (affine("m"), affine("g"), affine("k")), (affine("g"), affine("n"), affine("k")), (affine("g"), affine("n"), affine("m")),
    )  # fmt: skip
    packed = product_spec(7, 20, 9).packed(16, (9, 20))

    def panels(rng: np.random.Generator) -> list[Array]:
        a, b = c.uniform((7, 9), (9, 20))(rng)
        return [a, pack(b, product_spec(7, 20, 9), 16)]

    def of_bytes(spec: Contraction, left: DType, right: DType, a: tuple[int, ...], b: tuple[int, ...]) -> Sample:
        draw = c.together(*(c.integers(s, low=_RANGE[d][0], high=_RANGE[d][1], dtype=d) for s, d in ((a, left), (b, right))))
        return Sample(draw, {"spec": spec}, gradient=False, label=f"{left} {right}")

    return [
        sample(product_spec(17, 33, 8), (17, 8), (8, 33)), sample(product_spec(4, 16, 31, b="nk"), (4, 31), (16, 31)),
        sample(product_spec(9, 7, 5, a="km"), (5, 9), (5, 7)), sample(product_spec(1, 1, 1), (1, 1), (1, 1)),
        sample(product_spec(3, 4, 0), (3, 0), (0, 4)), sample(product_spec(0, 4, 3), (0, 3), (3, 4)),
        sample(batched, (4, 3, 5), (3, 9, 5)),
        sample(conv, (11, 10, 4), (17, 4, 3, 3), gradient=False, label="strided"),
        Sample(panels, {"spec": packed}, budget=5e-6, reason=REASON, gradient=False, label="panels"),
        of_bytes(product_spec(9, 33, 8), u8, i8, (9, 8), (8, 33)), of_bytes(product_spec(5, 17, 7), i8, i8, (5, 7), (7, 17)),
        of_bytes(product_spec(5, 15, 12, b="nk"), u8, u8, (5, 12), (15, 12)), of_bytes(conv, i8, u8, (11, 10, 4), (17, 4, 3, 3)),
        of_bytes(product_spec(7, 16, 9), i16, i16, (7, 9), (9, 16)),
    ]  # fmt: skip


contract = register(
    Op(
        name="contract",
        infer=_infer,
        reference=_reference,
        lower=_lower,
        grad=c.rule(_grad),
        doc="C[c] = the sum over the k axes of A[a] * B[b], each dimension of A and B indexed by an affine function of the axes. "
        "Of i8 and u8, also one of each, and of i16, the sum is an i32, modulo 2^32.",
        arity=2,
        traits=frozenset({Trait.CONTRACTION, Trait.QUANTISABLE}),
        attrs={"spec": REQUIRED},
        samples=_samples,
    )
)


def _infer_f32(types: Sequence[TensorType], attrs: Attrs) -> Type:
    found = _infer(types, attrs)
    assert isinstance(found, TensorType)
    if found.dtype not in (bf16, f16):
        raise DTypeError(f"operand 0 of contract_f32 has dtype {found.dtype}, expected bf16 or f16; contract takes the others")
    return TensorType(f32, found.shape)


def _reference_f32(arrays: Sequence[Array], attrs: Attrs) -> Array:
    """Products of 16-bit floats are exact in f32, which the sums are kept in."""
    return _reference([a if a.dtype == np.float64 else a.astype(np.float32) for a in arrays], attrs)


def _grad_f32(node: Node, dy: Node) -> Sequence[Node]:
    a, b = node.inputs
    wide = make("contract", *(make("cast", x, dtype=f32) for x in (a, b)), spec=node.attrs["spec"])
    return [make("cast", g, dtype=a.dtype) for g in _grad(wide, dy)]


def _samples_f32() -> list[Sample]:
    def narrow(s: Sample, dtype: DType) -> Sample:
        def draw(rng: np.random.Generator) -> list[Array]:
            return [x.astype(dtype.numpy) for x in s.make(rng)]

        return Sample(draw, s.attrs, budget=s.budget, reason=s.reason, gradient=False, label=f"{s.label} {dtype}".strip())

    return [narrow(s, dtype) for dtype in (bf16, f16) for s in _samples() if not s.label or s.label == "strided"]


contract_f32 = register(
    Op(
        name="contract_f32",
        infer=_infer_f32,
        reference=_reference_f32,
        lower=_lower,
        grad=c.rule(_grad_f32),
        doc="contract of 16-bit floats whose products are added up, and given, in f32.",
        arity=2,
        traits=frozenset({Trait.CONTRACTION}),
        attrs={"spec": REQUIRED},
        samples=_samples_f32,
    )
)
