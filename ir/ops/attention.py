"""Attention as one op, for devices that have a kernel for it, and its gradient (Vaswani et al. 2017; Dao et al. 2022).

    s = scale * q k^T  (-inf where the mask or causality forbids, plus the mask where that is numbers)
    l = log sum exp s        p = exp(s - l)        y = p v            out = [y, l], l as the last column

With D = sum over a row of dy y, minus dl,

    ds = p (dy v^T - D)      dq = scale ds k       dk = scale ds^T q      dv = p^T dy      dmask = ds

(no ds where s is -inf), so that the way back needs the scores' row sums l alone, and computes the scores again (Dao et al. 2022,
algorithm 4). Everything decomposes into products and softmax, which hold all scores; processors get attention in blocks from
`frontend/attention.py`.

`attention_f32` is attention of 16-bit floats whose products are added up, and given, in f32; a kernel may round p to the
operands' dtype before it is multiplied by v, which errs by half a unit in the last place of p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..differentiate import vjp
from ..dims import Dim, Shape
from ..dtypes import DType, bf16, bool_, f16, f32, i32
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..graph import Attrs, Node
from ..lowering import Attention
from ..op import REQUIRED, Array, Op, Sample, make, register
from ..types import TensorType, Type
from . import common as c
from .matmul import batch_shape, swapped, unbroadcast

SIDES: Final = ("query", "keys")
_BUDGET: Final = 5e-6
_REASON: Final = "exp of differences of sums of products in f32"
_ROUNDED: Final = {bf16: 2.0**-7, f16: 2.0**-10}
_ROUNDED_REASON: Final = "half a unit of each p, beside results four times smaller than what p multiplies"


def _check(
    name: str, types: Sequence[TensorType], attrs: Attrs, masked: int, narrow: bool = False
) -> tuple[Shape, Dim, Dim, Dim, Dim]:
    """The dimensions before the last two, T, S, D and E; the mask is operand `masked`, if there is one. `narrow`: q, k and v are
    16-bit floats, and numbers of a mask f32."""
    if not masked <= len(types) <= masked + 1:
        raise ShapeError(f"{name} takes {masked} operands and perhaps a mask, got {len(types)}")
    if not isinstance(attrs["scale"], float) or not math.isfinite(attrs["scale"]):
        raise AttributeValueError(f"{name}: scale is a finite float, not {attrs['scale']!r}")
    if not isinstance(attrs["causal"], bool):
        raise AttributeValueError(f"{name}: causal is true or false, not {attrs['causal']!r}")
    for k, t in enumerate(types):
        if narrow:
            allowed = (bf16, f16) if k == 0 else (types[0].dtype,) if k < 3 else (f32,) if k < masked else (bool_, f32)
            if t.dtype not in allowed:
                wanted = " or ".join(d.name for d in allowed)
                raise DTypeError(f"operand {k} of {name} has dtype {t.dtype}, expected {wanted}")
        elif k < masked or t.dtype is not bool_:
            c.check_dtype(name, types, k, c.is_wide_float)
            if t.dtype is not types[0].dtype:
                raise DTypeError(f"operand {k} of {name} has dtype {t.dtype}, expected {types[0].dtype} as operand 0")
        if t.rank < 2:
            raise ShapeError(f"operand {k} of {name} has shape {c.show(t.shape)}, expected at least 2 dimensions")
    q, k_, v = (t.shape for t in types[:3])
    if q[-1] != k_[-1] or k_[-2] != v[-2]:
        shapes = ", ".join(c.show(s) for s in (q, k_, v))
        raise ShapeError(f"{name}: query (..., T, D), key (..., S, D) and value (..., S, E) must agree in D and S; got {shapes}")
    if k_[-2] == 0:
        raise ShapeError(f"{name}: there are no keys to attend to (S is 0)")
    lead: Shape = q[:-2]
    for k, t in [(1, types[1]), (2, types[2]), *enumerate(types[masked:], masked)]:
        found = batch_shape(lead, t.shape[:-2])
        if found is None:
            raise ShapeError(f"operand {k} of {name} has batch dimensions {c.show(t.shape[:-2])}, which do not broadcast")
        lead = found
    if len(types) > masked:
        rows, columns = types[masked].shape[-2:]
        if rows not in (1, q[-2]) or columns not in (1, k_[-2]):
            raise ShapeError(f"the mask of {name} is (..., T or 1, S or 1), not {c.show(types[masked].shape)}")
    return lead, q[-2], k_[-2], q[-1], v[-1]


# --- the definition -------------------------------------------------------------------------------------------------


def _scores_value(q: Array, k: Array, mask: Array | None, attrs: Attrs) -> Array:
    s = np.matmul(q, np.swapaxes(k, -1, -2)) * q.dtype.type(attrs["scale"])
    if attrs["causal"]:
        t, n = s.shape[-2:]
        s = np.where(np.arange(t)[:, None] >= np.arange(n), s, s.dtype.type(-np.inf))
    if mask is not None:
        s = np.where(mask, s, s.dtype.type(-np.inf)) if mask.dtype == np.bool_ else s + mask.astype(s.dtype)
    return np.asarray(s)


def _value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    q, k, v = arrays[:3]
    with np.errstate(all="ignore"):
        s = _scores_value(q, k, arrays[3] if len(arrays) > 3 else None, attrs)
        top = s.max(-1, keepdims=True)
        top = np.where(top == -np.inf, s.dtype.type(0), top)
        p = np.exp(s - top)
        total = p.sum(-1, keepdims=True)
        y = np.matmul(p, v) / total
        rows = np.broadcast_to(top + np.log(total), (*y.shape[:-1], 1))
        return np.concatenate([y, rows], -1)


def _grad_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    q, k, v, y, dy = arrays[:5]
    with np.errstate(all="ignore"):
        s = _scores_value(q, k, arrays[5] if len(arrays) > 5 else None, attrs)
        p = np.exp(s - y[..., -1:])
        delta = (dy[..., :-1] * y[..., :-1]).sum(-1, keepdims=True) - dy[..., -1:]
        ds = p * (np.matmul(dy[..., :-1], np.swapaxes(v, -1, -2)) - delta) * q.dtype.type(attrs["scale"])
        ds = np.where(s == -np.inf, s.dtype.type(0), ds)
        if attrs["side"] == "query":
            return np.asarray(np.matmul(ds, k))
        lead = ds.shape[:-2]
        dk, dv = np.matmul(np.swapaxes(ds, -1, -2), q), np.matmul(np.swapaxes(p, -1, -2), dy[..., :-1])
        return np.concatenate([np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (dk, dv)], -1)


# --- what it stands for -----------------------------------------------------------------------------------------------


def _scores(q: Node, k: Node, mask: Node | None, attrs: Attrs) -> Node:
    s = c.scaled(make("matmul", q, swapped(k)), attrs["scale"])
    if mask is not None:
        lead = batch_shape(s.shape[:-2], mask.shape[:-2])
        assert lead is not None
        s = c.broadcast(s, (*lead, *s.shape[-2:]))
    if attrs["causal"]:
        shape, rank = s.shape, len(s.shape)
        rows, columns = (make("iota", shape=shape, axis=a, dtype=i32) for a in (rank - 2, rank - 1))
        s = make("where", make("less_equal", columns, rows), s, c.full(-math.inf, s))
    if mask is not None:
        m = c.broadcast(mask, s.shape)
        s = make("where", m, s, c.full(-math.inf, s)) if mask.dtype is bool_ else make("add", s, m)
    return s


def _last(x: Node, low: Dim, high: Dim) -> Node:
    """x[..., low:high]."""
    rank = len(x.shape)
    starts, stops = (*(0,) * (rank - 1), low), (*x.shape[:-1], high)
    return make("slice", x, starts=starts, stops=stops, steps=(1,) * rank)


def _build(node: Node) -> Node:
    q, k, v, *rest = node.inputs
    s = _scores(q, k, rest[0] if rest else None, node.attrs)
    axis = (len(s.shape) - 1,)
    top = make("max", s, axes=axis, keepdims=True)
    top = make("where", make("equal", top, c.full(-math.inf, top)), c.full(0.0, top), top)
    p = make("exp", make("sub", s, c.broadcast(top, s.shape)))
    total = make("sum", p, axes=axis, keepdims=True)
    y = make("matmul", p, v)
    rows = make("add", top, make("log", total))
    lead = node.shape[:-1]
    y = make("div", y, c.broadcast(total, y.shape))
    return make("concat", y, c.broadcast(rows, (*lead, 1)), axis=len(node.shape) - 1)


def _build_grad(node: Node) -> Node:
    q, k, v, packed, cotangent, *rest = node.inputs
    e = v.shape[-1]
    s = _scores(q, k, rest[0] if rest else None, node.attrs)
    lead = packed.shape[:-2]
    s = c.broadcast(s, (*lead, *s.shape[-2:]))
    rank = len(s.shape)
    y, dy = (_last(x, 0, e) for x in (packed, cotangent))
    rows, drows = (_last(x, e, x.shape[-1]) for x in (packed, cotangent))
    p = make("exp", make("sub", s, c.broadcast(rows, s.shape)))
    delta = make("sub", make("sum", make("mul", dy, y), axes=(rank - 1,), keepdims=True), drows)
    ds = make("mul", p, make("sub", make("matmul", dy, swapped(v)), c.broadcast(delta, s.shape)))
    ds = c.scaled(ds, node.attrs["scale"])
    ds = make("where", make("equal", s, c.full(-math.inf, s)), c.full(0.0, s), ds)
    if node.attrs["side"] == "query":
        return make("matmul", ds, k)
    parts = make("matmul", swapped(ds), q), make("matmul", swapped(p), dy)
    return make("concat", *parts, axis=rank - 1)


# --- gradients ------------------------------------------------------------------------------------------------------


def _grad(node: Node, dy: Node) -> Sequence[Node | None]:
    q, k, v, *rest = node.inputs
    attrs = dict(node.attrs)
    dq, both = (make("attention_grad", q, k, v, node, dy, *rest, side=side, **attrs) for side in SIDES)
    d, e = k.shape[-1], v.shape[-1]
    dk, dv = _last(both, 0, d), _last(both, d, d + e)
    found = [unbroadcast(x, like.shape) for x, like in ((dq, q), (dk, k), (dv, v))]
    masks: list[Node | None] = [None for _ in rest]
    if rest and rest[0].dtype is not bool_:  # as large as the scores; nothing, where nobody asks for it
        masks[0] = vjp([_build(node)], rest, [dy])[0]
    return (*found, *masks)


def _grad_of_grad(node: Node, dy: Node) -> Sequence[Node | None]:
    return vjp([_build_grad(node)], node.inputs, [dy])


def _widened(node: Node) -> Node:
    """The op of f32 that one of 16-bit q, k and v stands for."""
    q, k, v, *rest = node.inputs
    name = "attention_grad" if "side" in node.attrs else "attention"
    return make(name, *(make("cast", x, dtype=f32) for x in (q, k, v)), *rest, **node.attrs)


def _grad_f32(node: Node, dy: Node) -> Sequence[Node | None]:
    q, k, v, *rest = node.inputs
    dq, both = (make("attention_grad_f32", q, k, v, node, dy, *rest, side=side, **node.attrs) for side in SIDES)
    d, e = k.shape[-1], v.shape[-1]
    parts = dq, _last(both, 0, d), _last(both, d, d + e)
    found = [make("cast", unbroadcast(x, like.shape), dtype=like.dtype) for x, like in zip(parts, (q, k, v), strict=True)]
    masks: list[Node | None] = [None for _ in rest]
    if rest and rest[0].dtype is not bool_:
        masks[0] = vjp([_build(_widened(node))], rest, [dy])[0]
    return (*found, *masks)


def _grad_of_grad_f32(node: Node, dy: Node) -> Sequence[Node | None]:
    return vjp([_build_grad(_widened(node))], node.inputs, [dy])


# --- records --------------------------------------------------------------------------------------------------------


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    lead, t, _, _, e = _check("attention", types, attrs, 3)
    return TensorType(types[0].dtype, (*lead, t, e + 1))


def _infer_grad(types: Sequence[TensorType], attrs: Attrs, name: str = "attention_grad", narrow: bool = False) -> Type:
    lead, t, s, d, e = _check(name, types, attrs, 5, narrow)
    for k in (3, 4):
        if types[k].shape != (*lead, t, e + 1):
            wanted = c.show((*lead, t, e + 1))
            raise ShapeError(f"operand {k} of {name} has shape {c.show(types[k].shape)}, expected {wanted}")
    if attrs["side"] not in SIDES:
        raise AttributeValueError(f"side of {name} is one of {', '.join(SIDES)}, not {attrs['side']!r}")
    return TensorType(types[3].dtype, (*lead, t, d) if attrs["side"] == "query" else (*lead, s, d + e))


def _infer_f32(types: Sequence[TensorType], attrs: Attrs) -> Type:
    lead, t, _, _, e = _check("attention_f32", types, attrs, 3, narrow=True)
    return TensorType(f32, (*lead, t, e + 1))


def _infer_grad_f32(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return _infer_grad(types, attrs, "attention_grad_f32", narrow=True)


def _wide(arrays: Sequence[Array]) -> list[Array]:
    return [a if a.dtype in (np.float64, np.bool_) else a.astype(np.float32) for a in arrays]


Shapes = tuple[tuple[int, ...], ...]
_SHAPES: Final[tuple[tuple[Shapes, bool, tuple[int, ...] | None, str], ...]] = (
    (((5, 4), (7, 4), (7, 3)), False, None, ""),
    (((2, 9, 8), (2, 9, 8), (2, 9, 8)), True, None, "causal"),
    (((2, 1, 6, 4), (3, 5, 4), (3, 5, 4)), False, (2, 1, 1, 5), "a mask of bools, batches broadcast"),
    (((2, 3, 4, 5), (2, 3, 9, 5), (2, 1, 9, 2)), True, (4, 9), "numbers to add, causal"),
    (((1, 3), (33, 3), (33, 1)), False, None, "one query"),
    (((35, 20), (33, 20), (33, 20)), True, None, "ragged tiles"),
    (((0, 4), (3, 4), (3, 2)), False, None, "no query"),
)


def _samples(grad: bool) -> list[Sample]:
    def drawn(shapes: Shapes, mask: tuple[int, ...] | None, as_numbers: bool, attrs: dict[str, Any]) -> c.Draw:
        def draw(rng: np.random.Generator) -> list[Array]:
            arrays: list[Array] = [np.asarray(rng.uniform(-1, 1, s)).astype(np.float32) for s in shapes]
            masks: list[Array] = []
            if mask is not None and as_numbers:
                masks = [rng.uniform(-1, 1, mask).astype(np.float32)]
            elif mask is not None:
                masks = [rng.random(mask) < 0.7]
                masks[0][..., 0] = True
            if grad:
                y = _value([*arrays, *masks], attrs)
                arrays += [y, np.asarray(rng.uniform(-1, 1, y.shape)).astype(np.float32)]
            return [*arrays, *masks]

        return draw

    made: list[Sample] = []
    for shapes, causal, mask, label in _SHAPES:
        for side in SIDES if grad else ("",):
            attrs: dict[str, Any] = {"scale": 0.4, "causal": causal}
            draw = drawn(shapes, mask, "numbers" in label, attrs)
            # with y as an operand of its own, central differences of the gradient are as those of any other expression
            full = attrs | {"side": side} if grad else attrs
            small = math.prod(shapes[0]) <= 300
            made.append(Sample(draw, full, budget=_BUDGET, reason=_REASON, gradient=small, label=f"{label} {side}".strip()))
    return made


def _samples_f32(grad: bool) -> list[Sample]:
    def narrow(s: Sample, dtype: DType) -> Sample:
        def draw(rng: np.random.Generator) -> list[Array]:
            arrays = [x.astype(dtype.numpy) if k < 3 else x for k, x in enumerate(s.make(rng))]
            if grad:
                arrays[3] = _value(_wide([*arrays[:3], *arrays[5:]]), s.attrs)
            return arrays

        budget = _ROUNDED[dtype] * (2 if grad else 1)  # of p, dy and ds
        return Sample(draw, s.attrs, budget=budget, reason=_ROUNDED_REASON, gradient=False, label=f"{s.label} {dtype}")

    some = _samples(grad)
    return [narrow(s, bf16) for s in some] + [narrow(s, f16) for s in some[::2]]


attention = register(
    Op(
        name="attention",
        infer=_infer,
        reference=_value,
        lower=lambda node: Attention(_build, node.attrs["scale"], node.attrs["causal"], ""),
        grad=c.rule(_grad),
        doc=(
            "softmax(scale * q k^T + mask) v of q (..., T, D), k (..., S, D), v (..., S, E) and perhaps a mask (..., T, S); the "
            "last column of the result (..., T, E + 1) is the logarithm of the sum of exp of the scores."
        ),
        arity=None,
        attrs={"scale": REQUIRED, "causal": False},
        samples=lambda: _samples(False),
    )
)
attention_f32 = register(
    Op(
        name="attention_f32",
        infer=_infer_f32,
        reference=lambda arrays, attrs: _value(_wide(arrays), attrs),
        lower=lambda node: Attention(lambda n: _build(_widened(n)), node.attrs["scale"], node.attrs["causal"], ""),
        grad=c.rule(_grad_f32),
        doc="attention of 16-bit floats, with sums and result in f32; numbers of a mask are f32, too.",
        arity=None,
        attrs={"scale": REQUIRED, "causal": False},
        samples=lambda: _samples_f32(False),
    )
)
attention_grad = register(
    Op(
        name="attention_grad",
        infer=_infer_grad,
        reference=_grad_value,
        lower=lambda node: Attention(_build_grad, node.attrs["scale"], node.attrs["causal"], node.attrs["side"]),
        grad=c.rule(_grad_of_grad),
        doc=(
            "Cotangents of attention's operands from q, k, v, its result, the cotangent of that, and perhaps the mask: of q "
            "(side 'query'), or those of k and v side by side ('keys')."
        ),
        arity=None,
        attrs={"scale": REQUIRED, "causal": False, "side": REQUIRED},
        samples=lambda: _samples(True),
    )
)
attention_grad_f32 = register(
    Op(
        name="attention_grad_f32",
        infer=_infer_grad_f32,
        reference=lambda arrays, attrs: _grad_value(_wide(arrays), attrs),
        lower=lambda node: Attention(
            lambda n: _build_grad(_widened(n)), node.attrs["scale"], node.attrs["causal"], node.attrs["side"]
        ),
        grad=c.rule(_grad_of_grad_f32),
        doc="attention_grad of 16-bit q, k and v; what else it takes, sums and result are f32.",
        arity=None,
        attrs={"scale": REQUIRED, "causal": False, "side": REQUIRED},
        samples=lambda: _samples_f32(True),
    )
)
