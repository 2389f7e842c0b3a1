"""Comparisons, logic, `where` and `cast`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import dtypes as d
from ..dtypes import DType, as_dtype, bool_
from ..errors import DTypeError
from ..expr import Expr, cast, const, eq, logical_not, ne, select
from ..graph import Attrs, Node
from ..lowering import Map
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .binary import infer_pair, integer_samples
from .narrow import EXPONENT, is_narrow, mask, narrowed, widened


def _infer_compare(name: str, booleans: bool) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        if not (booleans and types[0].dtype is bool_):
            c.check_dtype(name, types, 0, c.is_arithmetic)
        return TensorType(bool_, c.check_same(name, types).shape)

    return infer


def _ties(*shapes: tuple[int, ...]) -> c.Draw:
    """Small whole floats: equal values are frequent."""
    return lambda rng: [rng.integers(-2, 3, s).astype(np.float32) for s in shapes]


def _compare(
    name: str,
    doc: str,
    reference: Callable[..., Any],
    lower: Callable[[Expr, Expr], Expr],
    onnx: tuple[str, int] | None,
    equality: bool,
) -> Op:
    def samples() -> list[Sample]:
        made = [Sample(_ties(s, s), gradient=False) for s in c.some_shapes(name)]
        a, b = np.meshgrid(np.array(c.SPECIAL, np.float32), np.array(c.SPECIAL, np.float32))
        made += [Sample(c.fixed(a.reshape(-1), b.reshape(-1)), gradient=False, label="special"), *integer_samples()]
        return [*made, Sample(c.booleans((33,), (33,)), gradient=False, label="bool")] if equality else made

    return register(
        Op(
            name=name,
            infer=_infer_compare(name, equality),
            reference=c.total(reference),
            lower=c.elementwise(lower),
            grad=c.no_flow,
            doc=doc,
            arity=2,
            traits=c.CHEAP | {Trait.COMMUTATIVE} if equality else c.CHEAP,
            transpose=c.elementwise_transpose,
            onnx=onnx,
            samples=samples,
        )
    )


def _equal(a: Expr, b: Expr) -> Expr:
    return logical_not(a ^ b) if a.dtype is bool_ else eq(a, b)


def _not_equal(a: Expr, b: Expr) -> Expr:
    return a ^ b if a.dtype is bool_ else ne(a, b)


less = _compare("less", "a < b; false with NaN.", np.less, lambda a, b: a < b, ("Less", 13), False)
less_equal = _compare("less_equal", "a <= b; false with NaN.", np.less_equal, lambda a, b: a <= b, ("LessOrEqual", 16), False)
equal = _compare("equal", "a == b; false with NaN.", np.equal, _equal, ("Equal", 13), True)
not_equal = _compare("not_equal", "a != b; true with NaN.", np.not_equal, _not_equal, None, True)


def _logic(name: str, reference: Callable[..., Any], lower: Callable[[Expr, Expr], Expr], extra: frozenset[Trait]) -> Op:
    def samples() -> list[Sample]:
        made = [Sample(c.booleans(s, s), gradient=False) for s in c.some_shapes(name)]
        return [*made, *integer_samples()]

    return register(
        Op(
            name=name,
            infer=infer_pair(name, c.is_logical),
            reference=c.total(reference),
            lower=c.elementwise(lower),
            grad=c.no_flow,
            doc=f"Logical {name} of booleans, bitwise {name} of integers.",
            arity=2,
            traits=c.CHEAP | {Trait.COMMUTATIVE, Trait.ASSOCIATIVE} | extra,
            transpose=c.elementwise_transpose,
            onnx=(name.capitalize(), 7),
            samples=samples,
        )
    )


and_ = _logic("and", np.bitwise_and, lambda a, b: a & b, frozenset())
or_ = _logic("or", np.bitwise_or, lambda a, b: a | b, frozenset())
xor = _logic("xor", np.bitwise_xor, lambda a, b: a ^ b, frozenset())


# --- where ----------------------------------------------------------------------------------------------------------


def _infer_where(types: Sequence[TensorType], attrs: Attrs) -> Type:
    if types[0].dtype is not bool_:
        raise DTypeError(f"operand 0 of where has dtype {types[0].dtype}, expected bool; compare it with something, or cast it")
    c.check_same("where", types, dtype=False)
    return c.check_same("where", types, first=1)


def _where_grad(node: Node, dy: Node) -> Sequence[Node | None]:
    condition, zero = node.inputs[0], c.full(0.0, dy)
    return None, make("where", condition, dy, zero), make("where", condition, zero, dy)


def _where_samples() -> list[Sample]:
    made = [Sample(c.together(c.booleans(s), c.uniform(s, s))) for s in c.some_shapes("where")]
    special = np.array(c.SPECIAL, np.float32)
    condition = np.arange(len(special)) % 2 == 0
    return [
        *made,
        Sample(c.fixed(condition, special, special[::-1].copy()), gradient=False, label="special"),
        Sample(c.together(c.booleans((17,)), c.integers((17,), (17,))), gradient=False, label="i64"),
        Sample(c.booleans((9,), (9,), (9,)), gradient=False, label="bool"),
    ]


where = register(
    Op(
        name="where",
        infer=_infer_where,
        reference=c.total(np.where),
        lower=c.elementwise(select),
        grad=c.rule(_where_grad),
        doc="Operand 1 where operand 0 (bool) is true, else operand 2. What is not chosen, NaN included, has no effect.",
        arity=3,
        traits=c.CHEAP,
        transpose=c.elementwise_transpose,
        onnx=("Where", 16),
        samples=_where_samples,
    )
)


# --- cast -----------------------------------------------------------------------------------------------------------


def _infer_cast(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return TensorType(c.check_dtype_attr("cast", attrs["dtype"]), types[0].shape)


def _bounds(dtype: DType) -> tuple[int, int]:
    top = 1 << (dtype.bits - (dtype.kind == "int"))
    return (-top if dtype.kind == "int" else 0), top - 1


def cast_array(x: Array, dtype: DType) -> Array:
    """x in another dtype: float to integer truncates and saturates, NaN gives 0; integer to narrower integer wraps; to
    bool is `!= 0`; to a narrower float rounds to nearest even."""
    source = as_dtype(x.dtype)
    if source is dtype:
        return x.copy()
    if dtype is bool_:
        return np.asarray(x != 0)
    with np.errstate(all="ignore"):
        if source.is_float and dtype.is_integer:
            low, high = _bounds(dtype)
            wide = np.trunc(x.astype(np.float64))
            inside = (wide >= float(low)) & (wide < float(high) + 1.0)
            whole = np.where(inside, wide, 0.0)
            whole = whole.astype(np.uint64) if dtype.bits == 64 and dtype.kind == "uint" else whole.astype(np.int64)
            whole = np.where(wide >= float(high) + 1.0, whole.dtype.type(high), whole)
            return np.where(wide < float(low), whole.dtype.type(low), whole).astype(dtype.numpy)
        if dtype.is_integer and dtype.bits < 8 and source.kind != "bool":
            low = _bounds(dtype)[0]
            return (((x.astype(np.int64) - low) & mask(dtype.bits)) + low).astype(dtype.numpy)
        if dtype.name == EXPONENT:  # ml_dtypes makes NaN of an f16 that is 0, and 2^-127 of an f32
            x = x.astype(np.float32)
        return x.astype(dtype.numpy)


def _cast_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    return cast_array(arrays[0], attrs["dtype"])


def _lower_cast(node: Node) -> Map:
    dtype = node.dtype

    def value(x: Expr) -> Expr:
        if dtype is bool_ and x.dtype is not bool_:
            return ne(x, const(0, x.dtype))
        x = widened(x) if is_narrow(x.dtype) else x
        return narrowed(x, dtype) if is_narrow(dtype) else cast(x, dtype)

    return c.elementwise(value)(node)


def _cast_grad(node: Node, dy: Node) -> Sequence[Node | None]:
    source = node.inputs[0].dtype
    return (make("cast", dy, dtype=source) if source.is_float else None,)


def _cast_samples() -> list[Sample]:
    def sample(draw: c.Draw, to: DType, label: str) -> Sample:
        return Sample(draw, {"dtype": to}, gradient=False, label=label)

    edges = np.array(
        [*c.SPECIAL, 127.5, -128.9, 255.0, 256.0, 2147483647.0, 2147483648.0, -2147483648.0, 9.3e18, -9.3e18], np.float32
    )
    made = [Sample(c.uniform(s, low=-99, high=99), {"dtype": d.f32}, label="same") for s in c.some_shapes("cast")[:2]]
    made += [sample(c.fixed(edges), to, f"special to {to}") for to in (d.i8, d.u8, d.i32, d.u32, d.i64, d.u64, d.bool_)]
    made += [
        sample(c.integers((17,), low=-400, high=400), to, f"i64 to {to}")
        for to in (d.i8, d.u8, d.i32, d.u32, d.f32, d.f64, d.bool_)
    ]
    made += [sample(c.booleans((9,)), to, f"bool to {to}") for to in (d.f32, d.i32, d.i64, d.u8)]
    made += [Sample(c.uniform((3, 7)), {"dtype": d.f64}), Sample(c.uniform((3, 7), dtype=d.f64), {"dtype": d.f32})]
    reason = "the result is rounded to a 16-bit float: the f64 reference is not"
    made += [
        Sample(c.uniform((33,)), {"dtype": d.f16}, budget=2e-3, reason=reason, gradient=False, label="f32 to f16"),
        Sample(c.uniform((33,)), {"dtype": d.bf16}, budget=1e-2, reason=reason, gradient=False, label="f32 to bf16"),
        sample(c.uniform((33,), dtype=d.f16), d.f32, "f16 to f32"),
        sample(c.uniform((33,), dtype=d.bf16), d.f32, "bf16 to f32"),
    ]
    return made


cast_ = register(
    Op(
        name="cast",
        infer=_infer_cast,
        reference=_cast_reference,
        lower=_lower_cast,
        grad=c.rule(_cast_grad),
        doc="The operand in another dtype: float to integer saturates and NaN gives 0, integer to narrower integer wraps.",
        arity=1,
        traits=c.CHEAP,
        attrs={"dtype": REQUIRED},
        transpose=c.elementwise_transpose,
        onnx=("Cast", 13),
        samples=_cast_samples,
    )
)
