"""Identities that keep nodes apart, and the request for a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import AttributeValueError, DTypeError, ShapeError, TensorwrightError
from ..graph import Attrs, Node
from ..lowering import Structural, View
from ..op import REQUIRED, Array, GradRule, NotDifferentiable, Op, Sample, Trait, make, register
from ..types import TensorType, TupleType, Type
from . import common as c


def _infer(name: str) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        ident = attrs.get("id", 0)
        if isinstance(ident, bool) or not isinstance(ident, int):
            raise AttributeValueError(f"id of {name} is an int, not {ident!r}")
        return types[0]

    return infer


def _identity(name: str, doc: str, grad: GradRule, attrs: dict[str, Any], traits: frozenset[Trait]) -> Op:
    given = {"id": 3} if attrs else {}
    flows = grad is not c.no_flow

    def samples() -> list[Sample]:
        made = [Sample(c.uniform(s), given, gradient=flows) for s in ((7,), (), (2, 3, 5), (0, 3))]
        return [*made, Sample(c.integers((9,)), given, gradient=False, label="i64")]

    return register(
        Op(
            name=name,
            infer=_infer(name),
            reference=lambda arrays, attrs: arrays[0].copy(),
            lower=lambda node: View(),
            grad=grad,
            doc=doc,
            arity=1,
            traits=traits,
            attrs=attrs,
            transpose=c.elementwise_transpose,
            samples=samples,
        )
    )


mark = _identity(
    "mark",
    "The operand under a fresh identity: what a gradient is taken with respect to, apart from equal values elsewhere.",
    c.rule(lambda node, dy: (dy,)),
    {"id": REQUIRED},
    frozenset({Trait.BARRIER, Trait.VIEW, Trait.CHEAP}),
)
stop_gradient = _identity(
    "stop_gradient", "The operand; no gradient flows through.", c.no_flow, {}, frozenset({Trait.BARRIER, Trait.VIEW, Trait.CHEAP})
)


def _infer_recompute(types: Sequence[TensorType], attrs: Attrs) -> Type:
    if not types:
        raise ShapeError("recompute takes the value to compute from and, after it, any values to wait for; got no operand")
    return _infer("recompute")(types[:1], attrs)


def _recompute_transpose(node: Node, perm: tuple[int, ...]) -> Node:
    return make(node.op, c.transposed(node.inputs[0], perm), *node.inputs[1:], **node.attrs)


recompute = register(
    Op(
        name="recompute",
        infer=_infer_recompute,
        reference=lambda arrays, attrs: arrays[0].copy(),
        lower=lambda node: View(),
        grad=c.rule(lambda node, dy: (dy, *(None for _ in node.inputs[1:]))),
        doc=(
            "The first operand; what is computed from it is kept apart from the same computation elsewhere, and done again "
            "once all the other operands are known."
        ),
        arity=None,
        traits=frozenset({Trait.BARRIER, Trait.VIEW}),
        attrs={"id": REQUIRED},
        transpose=_recompute_transpose,
        samples=lambda: [
            *(Sample(c.uniform(s), {"id": 3}) for s in ((7,), (), (2, 3, 5), (0, 3))),
            Sample(c.integers((9,)), {"id": 3}, gradient=False, label="i64"),
            Sample(c.uniform((4, 3), (5,)), {"id": 3}, label="after another value"),
        ],
    )
)


def _infer_gradient(types: Sequence[Type], attrs: Attrs) -> Type:
    if len(types) < 2:
        raise ShapeError(f"gradient takes a scalar and at least one value to differentiate by, got {len(types)} operands")
    tensors: list[TensorType] = []
    for k, t in enumerate(types):
        if isinstance(t, TupleType):
            raise ShapeError(f"operand {k} of gradient has {len(t.items)} outputs; take one with a get node")
        if not t.dtype.is_float:
            raise DTypeError(f"operand {k} of gradient has dtype {t.dtype}, expected a float")
        tensors.append(t)
    if tensors[0].shape != ():
        raise ShapeError(f"operand 0 of gradient has shape {c.show(tensors[0].shape)}, expected a scalar; sum it first")
    return TupleType(tuple(tensors[1:]))


def _gradient_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    raise TensorwrightError("a gradient node has no value of its own: run the gradient pass on the graph first")


gradient = register(
    Op(
        name="gradient",
        infer=_infer_gradient,
        reference=_gradient_value,
        lower=lambda node: Structural(),
        grad=NotDifferentiable("the gradient pass expands inner gradients before it differentiates what uses them"),
        doc="The gradients of a scalar y by x1, ..., xn (operands y, x1, ..., xn): one output for each x, of its type.",
        arity=None,
        traits=frozenset({Trait.STRUCTURAL}),
    )
)
