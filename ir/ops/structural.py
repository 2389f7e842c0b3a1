"""The ops that the graph machinery itself handles: input, constant, get, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..dtypes import DType, f64
from ..errors import AttributeValueError, DTypeError, ShapeError, VerifyError
from ..graph import ROLES, Attrs, Graph, Literal, Node
from ..interp import execute
from ..lowering import Structural
from ..op import REQUIRED, Array, NotDifferentiable, Op, Trait, register
from ..types import TensorType, TupleType, Type, tensor

FUSED_KINDS: Final = ("map", "rows", "reduce", "window", "contraction", "sparse")
_STRUCTURAL = frozenset({Trait.STRUCTURAL})


def _no_operands(node: Node, cotangents: Sequence[Node | None]) -> tuple[()]:
    return ()


def _lower(node: Node) -> Structural:
    return Structural()


def _input_type(types: Sequence[Type], attrs: Attrs) -> TensorType:
    name, role, dtype, shape = attrs["name"], attrs["role"], attrs["dtype"], attrs["shape"]
    if not isinstance(name, str) or not name:
        raise AttributeValueError(f"input: the name is a non-empty string, not {name!r}")
    if role not in ROLES:
        raise AttributeValueError(f"input {name!r}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(dtype, DType):
        raise DTypeError(f"input {name!r}: dtype must be a DType, not {dtype!r}")
    if not isinstance(shape, tuple):
        raise ShapeError(f"input {name!r}: the shape is a tuple of dimensions, not {shape!r}")
    return tensor(dtype, shape)


def _input_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    raise VerifyError(f"input {attrs['name']!r} is used but is not among the inputs of the graph")


INPUT: Final = register(
    Op(
        name="input",
        infer=_input_type,
        reference=_input_value,
        lower=_lower,
        grad=_no_operands,
        doc="An argument of the graph, with a name that is unique in it and a role: data, parameter, state or prepared.",
        arity=0,
        traits=_STRUCTURAL,
        attrs={"name": REQUIRED, "role": "data", "dtype": REQUIRED, "shape": REQUIRED},
    )
)


def _constant_type(types: Sequence[Type], attrs: Attrs) -> TensorType:
    if not isinstance(attrs["value"], Literal):
        raise AttributeValueError(f"constant: the value is a Literal, not {type(attrs['value']).__name__}")
    return attrs["value"].type


CONSTANT: Final = register(
    Op(
        name="constant",
        infer=_constant_type,
        reference=lambda arrays, attrs: attrs["value"].array,
        lower=_lower,
        grad=_no_operands,
        doc="An array known when the graph is built. Scalars are 0-d constants, broadcast where they are used.",
        arity=0,
        traits=_STRUCTURAL,
        attrs={"value": REQUIRED},
    )
)


def _get_type(types: Sequence[Type], attrs: Attrs) -> TensorType:
    index = attrs["index"]
    if not isinstance(types[0], TupleType):
        raise ShapeError(f"get: its operand has one output ({types[0]}); use that node directly")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(types[0].items):
        raise AttributeValueError(f"get: index {index!r} of a node with {len(types[0].items)} outputs")
    return types[0].items[index]


GET: Final = register(
    Op(
        name="get",
        infer=_get_type,
        reference=lambda arrays, attrs: arrays[0][attrs["index"]],
        lower=_lower,
        grad=NotDifferentiable("the gradient pass hands the cotangent of a part to the node it is a part of"),
        doc="One output of a node that has several.",
        arity=1,
        traits=_STRUCTURAL,
        attrs={"index": REQUIRED},
    )
)


def _fused_type(types: Sequence[Type], attrs: Attrs) -> Type:
    body, kind = attrs["body"], attrs["kind"]
    if not isinstance(body, Graph):
        raise AttributeValueError(f"fused: the body is a Graph, not {type(body).__name__}")
    if kind not in FUSED_KINDS:
        raise AttributeValueError(f"fused: unknown kind {kind!r}; the kinds are {', '.join(FUSED_KINDS)}")
    if len(types) != len(body.inputs):
        raise ShapeError(f"fused: {len(types)} operands for a body with {len(body.inputs)} inputs")
    for k, (given, declared) in enumerate(zip(types, body.inputs, strict=True)):
        if given != declared.type:
            raise ShapeError(f"fused: operand {k} is {given}, the body takes {declared.type}")
    if not body.outputs:
        raise ShapeError("fused: the body has no outputs")
    results = tuple(o.tensor for o in body.outputs)
    return results[0] if len(results) == 1 else TupleType(results)


def _fused_value(arrays: Sequence[Array], attrs: Attrs) -> Array | tuple[Array, ...]:
    body: Graph = attrs["body"]
    wide = any(a.dtype == f64.numpy and i.dtype.is_float and i.dtype is not f64 for a, i in zip(arrays, body.inputs, strict=True))
    results: list[Any] = execute(body, arrays, f64 if wide else None)
    return results[0] if len(results) == 1 else tuple(results)


FUSED: Final = register(
    Op(
        name="fused",
        infer=_fused_type,
        reference=_fused_value,
        lower=_lower,
        grad=NotDifferentiable("fusion comes after differentiation: take gradients of the graph before it is fused"),
        doc="A region that becomes one kernel: the body's inputs p0, p1, ... stand for the operands.",
        traits=_STRUCTURAL,
        attrs={"body": REQUIRED, "kind": REQUIRED},
    )
)
