"""Reductions over axes, and the cumulative sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..dims import Dim, Shape, as_int
from ..dtypes import f64, i32, i64
from ..errors import AttributeValueError, ShapeError
from ..expr import Expr
from ..graph import Attrs, Node
from ..lowering import Decompose, Load, Lowering, Reduce, Scan, View
from ..op import REQUIRED, Array, GradRule, NotDifferentiable, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c

_SUM_REASON: Final = "the order of a sum is free: rounding grows with its length"


def _reduced(shape: Shape, axes: tuple[int, ...], keepdims: bool) -> Shape:
    return c.kept(shape, axes) if keepdims else tuple(n for d, n in enumerate(shape) if d not in axes)


def _keepdims(name: str, attrs: Attrs) -> bool:
    if not isinstance(attrs["keepdims"], bool):
        raise AttributeValueError(f"keepdims of {name} is a bool, not {attrs['keepdims']!r}")
    return attrs["keepdims"]


def _no_empty(name: str, t: TensorType, axes: tuple[int, ...]) -> None:
    for a in axes:
        if t.shape[a] == 0:
            raise ShapeError(f"{name} over dimension {a} of {c.show(t.shape)}, which is empty: it has no value")


def _infer(name: str, allowed: Callable[..., bool], empty: bool) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(name, types, 0, allowed)
        axes = c.check_axes(name, attrs["axes"], types[0].rank)
        if not empty:
            _no_empty(name, types[0], axes)
        return TensorType(types[0].dtype, _reduced(types[0].shape, axes, _keepdims(name, attrs)))

    return infer


def over_axes(kind: str, shape: Shape, axes: tuple[int, ...], keepdims: bool) -> Reduce:
    """The Reduce of operand 0 over whole axes."""

    def value(idx: tuple[Expr, ...], r: tuple[Expr, ...], load: Load) -> Expr:
        kept, reduced = iter(idx), iter(r)
        index: list[Expr] = []
        for d in range(len(shape)):
            if d in axes:
                index.append(next(reduced))
                if keepdims:
                    next(kept)
            else:
                index.append(next(kept))
        return load(0, index)

    return Reduce(kind, tuple(shape[a] for a in axes), value, axes, keepdims)


def _lower(kind: str) -> Callable[[Node], Lowering]:
    def lower(node: Node) -> Lowering:
        axes = node.attrs["axes"]
        return over_axes(kind, node.inputs[0].shape, axes, node.attrs["keepdims"]) if axes else View()

    return lower


def _transpose(node: Node, perm: tuple[int, ...]) -> Node | None:
    """Where the axes are dropped, the input's order of the reduced dimensions is free: it undoes a transpose if it can."""
    x, axes, keepdims = node.inputs[0], _axes_of(node), node.attrs["keepdims"]
    rank = len(x.shape)
    if keepdims:
        order = perm
    else:
        kept = [d for d in range(rank) if d not in axes]
        wanted = [kept[p] for p in perm]
        order = c.inverse(x.attrs["perm"]) if x.op.name == "transpose" else ()
        if len(order) != rank or [d for d in order if d not in axes] != wanted:
            following = iter(wanted)
            order = tuple(d if d in axes else next(following) for d in range(rank))
    moved = tuple(sorted(order.index(a) for a in axes))
    attrs = {"axis": moved[0]} if "axis" in node.attrs else {"axes": moved}
    return make(node.op, c.transposed(x, order), keepdims=keepdims, **attrs)


def _axes_of(node: Node) -> tuple[int, ...]:
    return (node.attrs["axis"],) if "axis" in node.attrs else node.attrs["axes"]


def _samples(name: str, draw: Callable[..., c.Draw], empty: bool, reason: str) -> list[Sample]:
    def sample(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool = False, **more: Any) -> Sample:
        dtype = more.pop("dtype", None)
        made = draw(shape) if dtype is None else draw(shape, dtype=dtype)
        return Sample(made, {"axes": axes, "keepdims": keepdims}, budget=4e-6 if reason else 2e-6, reason=reason, **more)

    sizes = c.some_shapes(name)
    made = [sample((n,), (0,)) for n in (sizes[0][0], 1, 33)]
    made += [
        sample((3, 17), (1,)), sample((3, 17), (0,), True), sample((9, 16), (0, 1)), sample((2, 3, 5), (1,), True),
        sample((2, 3, 5), (0, 2)), sample((2, 3, 4, 7), (2, 3)), sample((2, 3, 4, 7), (0, 2, 3)), sample((4, 31), (), True),
        sample((), ()), sample((0, 3), (1,)), sample((4, 9), (1,), True, dtype=f64, label="f64"),
        sample((5, 8), (1,), gradient=False, dtype=i32, label="i32"),
    ]  # fmt: skip
    if empty:
        made += [sample((0, 3), (0,)), sample((2, 0, 3), (1,), True)]
    return made


def _special(name: str) -> list[Sample]:
    rows = np.array(
        [[1, np.nan, 2, 3], [np.inf, 1, 2, -4], [-np.inf, 1, 2, np.nan], [-np.inf] * 4, [0.0, -0.0, 0, 0]], np.float32
    )
    return [Sample(c.fixed(rows), {"axes": (1,), "keepdims": False}, gradient=False, label="special")]


def _reduction(
    name: str,
    doc: str,
    kind: str,
    reference: Callable[[Array, tuple[int, ...], bool], Any],
    grad: GradRule,
    draw: Callable[..., c.Draw],
    *,
    empty: bool = True,
    reason: str = "",
    onnx: tuple[str, int] | None = None,
    lower: Callable[[Node], Lowering] | None = None,
    allowed: Callable[..., bool] = c.is_arithmetic,
) -> Op:
    def run(arrays: Sequence[Array], attrs: Attrs) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(reference(arrays[0], attrs["axes"], attrs["keepdims"]))

    def samples() -> list[Sample]:
        made = _samples(name, draw, empty, reason)
        if allowed is c.is_float:
            made = [s for s in made if s.label != "i32"]
        return made + _special(name)

    return register(
        Op(
            name=name,
            infer=_infer(name, allowed, empty),
            reference=run,
            lower=lower or _lower(kind),
            grad=grad,
            doc=doc,
            arity=1,
            traits=frozenset({Trait.REDUCTION}),
            attrs={"axes": REQUIRED, "keepdims": False},
            transpose=_transpose,
            onnx=onnx,
            samples=samples,
        )
    )


def _expand(node: Node, y: Node) -> Node:
    return c.expand(y, node.attrs["axes"], node.inputs[0].shape)


sum_ = _reduction(
    "sum", "The sum over axes, in the operand's dtype; integers wrap; 0 over nothing.", "sum",
    lambda x, axes, keep: np.sum(x, axis=axes, keepdims=keep, dtype=x.dtype),
    c.rule(lambda n, dy: (_expand(n, dy),)), c.uniform, reason=_SUM_REASON, onnx=("ReduceSum", 13),
)  # fmt: skip


def _mean_reference(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    count = int(np.prod([x.shape[a] for a in axes], dtype=object))
    return np.sum(x, axis=axes, keepdims=keep, dtype=x.dtype) / x.dtype.type(count)  # type: ignore[no-any-return]


def _build_mean(node: Node) -> Node:
    axes = node.attrs["axes"]
    total = make("sum", node.inputs[0], axes=axes, keepdims=node.attrs["keepdims"])
    return make("mul", total, c.reciprocal_count(node.inputs[0], axes, total))


def _mean_grad(node: Node, dy: Node) -> Sequence[Node]:
    return (_expand(node, make("mul", dy, c.reciprocal_count(node.inputs[0], node.attrs["axes"], dy))),)


mean = _reduction(
    "mean", "The arithmetic mean over axes; NaN over nothing.", "sum", _mean_reference, c.rule(_mean_grad), c.uniform,
    reason=_SUM_REASON, onnx=("ReduceMean", 13), lower=lambda node: Decompose(_build_mean), allowed=c.is_float,
)  # fmt: skip


def _extreme_grad(node: Node, dy: Node) -> Sequence[Node]:
    """Equal shares to all elements that attain the extreme."""
    x, axes = node.inputs[0], node.attrs["axes"]
    mask = make("cast", make("equal", x, _expand(node, node)), dtype=x.dtype)
    count = make("sum", mask, axes=axes, keepdims=node.attrs["keepdims"])
    return (make("mul", mask, _expand(node, make("div", dy, count))),)


max_ = _reduction(
    "max", "The largest over axes; NaN if any is NaN.", "max", lambda x, axes, keep: np.max(x, axis=axes, keepdims=keep),
    c.rule(_extreme_grad), c.distinct, empty=False, onnx=("ReduceMax", 13),
)  # fmt: skip
min_ = _reduction(
    "min", "The smallest over axes; NaN if any is NaN.", "min", lambda x, axes, keep: np.min(x, axis=axes, keepdims=keep),
    c.rule(_extreme_grad), c.distinct, empty=False, onnx=("ReduceMin", 13),
)  # fmt: skip


def _exclusive_product(x: Node, before: bool) -> Node:
    """Along the last axis of a matrix: the product of the elements before (or after) each, by shifts of 1, 1, 2, 4, ..."""
    rows, n = x.shape[0], as_int(x.shape[1])

    def shifted(y: Node, by: int) -> Node:
        low, high = ((0, by), (0, 0)) if before else ((0, 0), (0, by))
        padded = make("pad", y, low=low, high=high, interior=(0, 0), value=1.0)
        start = 0 if before else by
        return make("slice", padded, starts=(0, start), stops=(rows, start + n), steps=(1, 1))

    product, by = shifted(x, 1), 1
    while by < n:
        product = make("mul", product, shifted(product, by))
        by *= 2
    return product


def _prod_grad(node: Node, dy: Node) -> Sequence[Node]:
    """dy times the product of all other elements, without a division: right at zeros, and so are its own gradients."""
    x, axes = node.inputs[0], node.attrs["axes"]
    if not axes:
        return (dy,)
    perm = tuple(d for d in range(len(x.shape)) if d not in axes) + axes
    moved = c.transposed(x, perm)
    count: Dim = 1
    for a in axes:
        count = count * x.shape[a]
    rows: Dim = 1
    for d in perm[: len(perm) - len(axes)]:
        rows = rows * x.shape[d]
    flat = c.reshaped(moved, (rows, count))
    others = make("mul", _exclusive_product(flat, True), _exclusive_product(flat, False))
    back = c.transposed(c.reshaped(others, moved.shape), c.inverse(perm))
    return (make("mul", _expand(node, dy), back),)


def _positive(shape: tuple[int, ...], **more: Any) -> c.Draw:
    return c.uniform(shape, low=0.6, high=1.5, **more)


prod = _reduction(
    "prod", "The product over axes; integers wrap; 1 over nothing.", "prod",
    lambda x, axes, keep: np.prod(x, axis=axes, keepdims=keep, dtype=x.dtype),
    c.rule(_prod_grad), _positive,
    reason="the order of a product is free: rounding grows with its length", onnx=("ReduceProd", 13),
)  # fmt: skip


# --- positions ------------------------------------------------------------------------------------------------------


def _position(name: str, fn: Callable[..., Any], doc: str) -> Op:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(name, types, 0, c.is_arithmetic)
        axis = c.check_axis(name, attrs["axis"], types[0].rank)
        _no_empty(name, types[0], (axis,))
        return TensorType(i64, _reduced(types[0].shape, (axis,), _keepdims(name, attrs)))

    def reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
        return np.asarray(fn(arrays[0], axis=attrs["axis"], keepdims=attrs["keepdims"])).astype(np.int64)

    def lower(node: Node) -> Lowering:
        return over_axes(name, node.inputs[0].shape, (node.attrs["axis"],), node.attrs["keepdims"])

    def samples() -> list[Sample]:
        def sample(draw: c.Draw, axis: int, keepdims: bool = False, label: str = "") -> Sample:
            return Sample(draw, {"axis": axis, "keepdims": keepdims}, gradient=False, label=label)

        ties = np.array(
            [[1, 3, 3, 0], [np.nan, 1, np.nan, 2], [5, np.nan, 9, np.nan], [np.inf, np.inf, 0, 1], [-np.inf] * 4], np.float32
        )
        return [
            *(sample(c.distinct((n,)), 0) for n in (1, 7, 16, 33)),
            sample(c.distinct((3, 17)), 1), sample(c.distinct((3, 17)), 0, True), sample(c.distinct((2, 3, 9)), 1),
            sample(c.distinct((2, 3, 4, 5)), 3, True), sample(c.distinct((0, 3)), 1), sample(c.fixed(ties), 1, label="special"),
            sample(c.integers((4, 31)), 1, label="i64"), sample(c.integers((4, 9), dtype=i32), 0, label="i32"),
        ]  # fmt: skip

    return register(
        Op(
            name=name,
            infer=infer,
            reference=reference,
            lower=lower,
            grad=c.no_flow,
            doc=doc,
            arity=1,
            traits=frozenset({Trait.REDUCTION}),
            attrs={"axis": REQUIRED, "keepdims": False},
            transpose=_transpose,
            onnx=None,
            samples=samples,
        )
    )


argmax = _position(
    "argmax", np.argmax, "The position of the first largest element along an axis, as i64; the first NaN if there is one."
)
argmin = _position(
    "argmin", np.argmin, "The position of the first smallest element along an axis, as i64; the first NaN if there is one."
)


# --- cumulative sum and product -------------------------------------------------------------------------------------


def _infer_running(name: str) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        c.check_dtype(name, types, 0, c.is_arithmetic)
        c.check_axis(name, attrs["axis"], types[0].rank)
        for word in ("exclusive", "reverse"):
            if not isinstance(attrs[word], bool):
                raise AttributeValueError(f"{word} of {name} is a bool, not {attrs[word]!r}")
        return types[0]

    return infer


def _running_reference(of: Callable[..., Any], start: int) -> Callable[[Sequence[Array], Attrs], Array]:
    def reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
        x, axis = arrays[0], attrs["axis"]
        x = np.flip(x, axis) if attrs["reverse"] else x
        with np.errstate(all="ignore"):
            if attrs["exclusive"] and x.shape[axis]:  # shifted, not subtracted: Inf - Inf is NaN
                first, rest = np.split(x, [x.shape[axis] - 1], axis)
                x = np.concatenate([np.full_like(rest, start), first], axis)
            y = of(x, axis=axis, dtype=x.dtype)
        return np.ascontiguousarray(np.flip(y, axis) if attrs["reverse"] else y)

    return reference


def _running_transpose(node: Node, perm: tuple[int, ...]) -> Node:
    return make(node.op, c.transposed(node.inputs[0], perm), **{**node.attrs, "axis": perm.index(node.attrs["axis"])})


def _running_samples(gradient: bool) -> list[Sample]:
    def sample(draw: c.Draw, axis: int, exclusive: bool = False, reverse: bool = False, **more: Any) -> Sample:
        attrs = {"axis": axis, "exclusive": exclusive, "reverse": reverse}
        return Sample(draw, attrs, budget=4e-6, reason=_SUM_REASON, **{"gradient": gradient, **more})

    special = np.array([[1, np.inf, 2, -np.inf, 3], [np.nan, 1, 2, 3, 4]], np.float32)
    return [
        *(sample(c.uniform((n,)), 0) for n in (1, 7, 17, 33)),
        sample(c.uniform((3, 16)), 1, True),
        sample(c.uniform((3, 15)), 1, False, True),
        sample(c.uniform((9, 4)), 0, True, True),
        sample(c.uniform((2, 3, 8)), 1),
        sample(c.uniform((2, 3, 4, 5)), 2, True),
        sample(c.uniform((0, 3)), 0, True),
        sample(c.uniform((3, 0)), 0),
        sample(c.uniform((4, 5), dtype=f64), 1, label="f64"),
        sample(c.integers((4, 9)), 1, gradient=False, label="i64"),
        sample(c.fixed(special), 1, gradient=False, label="special"),
        sample(c.fixed(special), 1, True, True, gradient=False, label="special"),
    ]


cumsum = register(
    Op(
        name="cumsum",
        infer=_infer_running("cumsum"),
        reference=_running_reference(np.cumsum, 0),
        lower=lambda node: Scan("sum", node.attrs["axis"], node.attrs["exclusive"], node.attrs["reverse"]),
        grad=c.rule(
            lambda n, dy: (
                make("cumsum", dy, axis=n.attrs["axis"], exclusive=n.attrs["exclusive"], reverse=not n.attrs["reverse"]),
            )
        ),
        doc="Running sums along an axis; `exclusive` leaves out the element itself, `reverse` runs from the end.",
        arity=1,
        attrs={"axis": REQUIRED, "exclusive": False, "reverse": False},
        transpose=_running_transpose,
        onnx=("CumSum", 14),
        samples=lambda: _running_samples(gradient=True),
    )
)
cumprod = register(
    Op(
        name="cumprod",
        infer=_infer_running("cumprod"),
        reference=_running_reference(np.cumprod, 1),
        lower=lambda node: Scan("prod", node.attrs["axis"], node.attrs["exclusive"], node.attrs["reverse"]),
        grad=NotDifferentiable("its gradient is a recurrence; write the running product as a tw.scan, whose gradient is one too"),
        doc="Running products along an axis; `exclusive` leaves out the element itself, `reverse` runs from the end.",
        arity=1,
        attrs={"axis": REQUIRED, "exclusive": False, "reverse": False},
        transpose=_running_transpose,
        samples=lambda: _running_samples(gradient=False),
    )
)
