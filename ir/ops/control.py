"""Control flow as ops whose bodies are Graphs: a loop over a sequence, a branch, a loop until a test fails.

Bodies are closed: their inputs p0, p1, ... (role data) stand for operands of the node in order, so that what a body uses
from around it is an operand. Types and the order of operands stand in `ir/lowering.py` (Loop, Branch, While).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..dims import Dim, DimExpr
from ..dtypes import DType, as_dtype, bool_, f64
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..graph import Attrs, Graph, Literal, Node
from ..interp import execute
from ..lowering import Branch, Loop, While
from ..op import REQUIRED, Array, NotDifferentiable, Op, RunBody, Sample, Trait, make, register
from ..types import TensorType, TupleType, Type
from .scan_gradient import cond_gradient, scan_gradient

SAVES: Final = ("costly", "inputs")
_CONTROL: Final = frozenset({Trait.STRUCTURAL, Trait.CONTROL})


# Checks


def _count(name: str, attrs: Attrs, key: str) -> int:
    value = attrs[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise AttributeValueError(f"{name}: {key} is a number of operands, not {value!r}")
    return value


def _body(name: str, attrs: Attrs, key: str) -> Graph:
    value = attrs[key]
    if not isinstance(value, Graph):
        raise AttributeValueError(f"{name}: {key} is a Graph, not {type(value).__name__}")
    if value.aliases:
        raise AttributeValueError(f"{name}: {key} cannot donate buffers, it has aliases {value.aliases}")
    return value


def _tensors(name: str, types: Sequence[Type]) -> list[TensorType]:
    result: list[TensorType] = []
    for k, t in enumerate(types):
        if isinstance(t, TupleType):
            raise ShapeError(f"operand {k} of {name} has {len(t.items)} outputs; take one with a get node")
        result.append(t)
    return result


def _check_inputs(name: str, key: str, body: Graph, given: Sequence[TensorType], words: Sequence[str]) -> None:
    """`given`: what the body is called with, `words`: what each of them is."""
    if len(body.inputs) != len(given):
        raise ShapeError(f"{name}: {len(given)} values for the {len(body.inputs)} inputs of {key}")
    for k, (node, t, word) in enumerate(zip(body.inputs, given, words, strict=True)):
        if node.attrs.get("name") != f"p{k}" or node.attrs.get("role") != "data":
            raise AttributeValueError(f"{name}: input {k} of {key} is an input named p{k} of role data, not {dict(node.attrs)!r}")
        if node.type != t:
            raise ShapeError(f"{name}: {word} is {t}, input p{k} of {key} takes {node.type}")


def _outputs(name: str, key: str, body: Graph) -> tuple[TensorType, ...]:
    for k, o in enumerate(body.outputs):
        if isinstance(o.type, TupleType):
            raise ShapeError(f"{name}: output {k} of {key} is a tuple; take a part with a get node")
    return tuple(o.tensor for o in body.outputs)


def _wide(arrays: Sequence[Array], types: Sequence[TensorType]) -> DType | None:
    """f64 where arguments are wider than declared: the oracle's mode, as a reference called by itself must guess it."""
    found = any(a.dtype == f64.numpy and t.dtype.is_float and t.dtype is not f64 for a, t in zip(arrays, types, strict=True))
    return f64 if found else None


# scan


def _scan_type(types: Sequence[Type], attrs: Attrs) -> TupleType:
    body, carries, sequences = _body("scan", attrs, "body"), _count("scan", attrs, "carries"), _count("scan", attrs, "sequences")
    length: Dim = attrs["length"]
    if isinstance(length, bool) or not isinstance(length, int | DimExpr):
        raise AttributeValueError(f"scan: length is a dimension, not {length!r}")
    if isinstance(length, int) and length < 0:
        raise AttributeValueError(f"scan: length cannot be negative: {length}")
    if not isinstance(attrs["reverse"], bool):
        raise AttributeValueError(f"scan: reverse is true or false, not {attrs['reverse']!r}")
    if attrs["save"] not in SAVES:
        raise AttributeValueError(f"scan: save is one of {', '.join(SAVES)}, not {attrs['save']!r}")
    given = _tensors("scan", types)
    if len(given) < carries + sequences:
        raise ShapeError(f"scan: {carries} carries and {sequences} sequences, but {len(given)} operands")
    inner: list[TensorType] = []
    words: list[str] = []
    for k, t in enumerate(given):
        if carries <= k < carries + sequences:
            if not t.shape or t.shape[0] != length:
                raise ShapeError(f"scan: operand {k} is a sequence of {length} steps, but it is {t}")
            inner.append(TensorType(t.dtype, t.shape[1:]))
            words.append(f"a step of operand {k} (sequence {k - carries})")
        else:
            inner.append(t)
            words.append(f"operand {k} ({f'carry {k}' if k < carries else f'invariant {k - carries - sequences}'})")
    _check_inputs("scan", "body", body, inner, words)
    results = _outputs("scan", "body", body)
    if len(results) < carries:
        raise ShapeError(f"scan: the body gives {len(results)} values for {carries} carries")
    for k in range(carries):
        if results[k] != inner[k]:
            raise ShapeError(f"scan: carry {k} is {inner[k]} and the body makes it {results[k]}; a carry keeps its type")
    if not results:
        raise ShapeError("scan: neither carries nor stacked results")
    return TupleType((*results[:carries], *(TensorType(t.dtype, (length, *t.shape)) for t in results[carries:])))


def _scan_run(arrays: Sequence[Array], attrs: Attrs, run: RunBody) -> tuple[Array, ...]:
    body, length, carries, sequences = attrs["body"], attrs["length"], attrs["carries"], attrs["sequences"]
    state = list(arrays[:carries])
    xs, fixed = arrays[carries : carries + sequences], list(arrays[carries + sequences :])
    stacks: list[Array] = []
    for t in range(length - 1, -1, -1) if attrs["reverse"] else range(length):
        results = run(body, [*state, *(x[t] for x in xs), *fixed])
        state = results[:carries]
        if not stacks:
            stacks = [np.empty((length, *y.shape), y.dtype) for y in results[carries:]]
        for stack, y in zip(stacks, results[carries:], strict=True):
            stack[t] = y
    if not length:
        stacks = [np.empty((0, *o.tensor.static_shape), o.dtype.numpy) for o in body.outputs[carries:]]
    return (*state, *stacks)


def _scan_value(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    body: Graph = attrs["body"]
    mode = _wide(arrays, [i.tensor for i in body.inputs])
    return _scan_run(arrays, attrs, lambda graph, values: execute(graph, values, mode))


def _scan_lower(node: Node) -> Loop:
    a = node.attrs
    return Loop(a["body"], a["length"], a["carries"], a["sequences"], a["reverse"], a["save"] == "inputs")


# cond


def _cond_type(types: Sequence[Type], attrs: Attrs) -> TupleType:
    then, orelse = _body("cond", attrs, "then"), _body("cond", attrs, "orelse")
    given = _tensors("cond", types)
    if not given:
        raise ShapeError("cond: operand 0 is the predicate, a bool scalar; there is none")
    if given[0].shape != ():
        raise ShapeError(f"cond: the predicate (operand 0) is a scalar, not {given[0]}")
    if given[0].dtype is not bool_:
        raise DTypeError(f"cond: the predicate (operand 0) is bool, not {given[0]}; compare it with something")
    words = [f"operand {k}" for k in range(1, len(given))]
    _check_inputs("cond", "then", then, given[1:], words)
    _check_inputs("cond", "orelse", orelse, given[1:], words)
    a, b = _outputs("cond", "then", then), _outputs("cond", "orelse", orelse)
    if len(a) != len(b):
        raise ShapeError(f"cond: then gives {len(a)} values, orelse {len(b)}")
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            raise ShapeError(f"cond: output {k} is {x} in then and {y} in orelse; both give the same types")
    if not a:
        raise ShapeError("cond: the branches give nothing")
    return TupleType(a)


def _cond_run(arrays: Sequence[Array], attrs: Attrs, run: RunBody) -> tuple[Array, ...]:
    return tuple(run(attrs["then" if bool(arrays[0]) else "orelse"], arrays[1:]))


def _cond_value(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    mode = _wide(arrays[1:], [i.tensor for i in attrs["then"].inputs])
    return _cond_run(arrays, attrs, lambda graph, values: execute(graph, values, mode))


def _cond_lower(node: Node) -> Branch:
    return Branch(node.attrs["then"], node.attrs["orelse"])


# while_loop


def _while_type(types: Sequence[Type], attrs: Attrs) -> TupleType:
    name = "while_loop"
    test, body, carries = _body(name, attrs, "test"), _body(name, attrs, "body"), _count(name, attrs, "carries")
    given = _tensors(name, types)
    if not 0 < carries <= len(given):
        raise ShapeError(f"{name}: {carries} carries, but {len(given)} operands; there is at least one carry")
    words = [f"operand {k} ({f'carry {k}' if k < carries else f'invariant {k - carries}'})" for k in range(len(given))]
    _check_inputs(name, "test", test, given, words)
    _check_inputs(name, "body", body, given, words)
    asked = _outputs(name, "test", test)
    if len(asked) != 1 or asked[0] != TensorType(bool_, ()):
        raise ShapeError(f"{name}: the test gives one bool scalar, not {', '.join(map(str, asked)) or 'nothing'}")
    results = _outputs(name, "body", body)
    if len(results) != carries:
        raise ShapeError(f"{name}: the body gives {len(results)} values for {carries} carries")
    for k, (old, new) in enumerate(zip(given, results, strict=False)):
        if old != new:
            raise ShapeError(f"{name}: carry {k} is {old} and the body makes it {new}; a carry keeps its type")
    return TupleType(results)


def _while_run(arrays: Sequence[Array], attrs: Attrs, run: RunBody) -> tuple[Array, ...]:
    carries = attrs["carries"]
    state, fixed = list(arrays[:carries]), list(arrays[carries:])
    while bool(run(attrs["test"], [*state, *fixed])[0]):
        state = run(attrs["body"], [*state, *fixed])
    return tuple(state)


def _while_value(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    mode = _wide(arrays, [i.tensor for i in attrs["body"].inputs])
    return _while_run(arrays, attrs, lambda graph, values: execute(graph, values, mode))


def _while_lower(node: Node) -> While:
    return While(node.attrs["test"], node.attrs["body"], node.attrs["carries"])


# Samples


def _inputs(*shapes: tuple[int, ...], dtype: str = "f32") -> list[Node]:
    return [make("input", name=f"p{k}", role="data", dtype=as_dtype(dtype), shape=s) for k, s in enumerate(shapes)]


def _recurrence(batch: int, size: int) -> Graph:
    """h' = tanh(h @ w + x), stacking h'."""
    h, x, w = _inputs((batch, size), (batch, size), (size, size))
    new = make("tanh", make("add", make("matmul", h, w), x))
    return Graph((h, x, w), (new, new), name="body")


def _doubling() -> Graph:
    (x,) = _inputs((4,))
    return Graph((x,), (make("mul", x, x),), name="body")


def _scan_samples() -> list[Sample]:
    def draw(*shapes: tuple[int, ...]) -> Any:
        return lambda rng: [rng.uniform(-1, 1, s).astype(np.float32) for s in shapes]

    step = {"body": _recurrence(2, 5), "carries": 1, "sequences": 1}
    return [
        Sample(draw((2, 5), (3, 2, 5), (5, 5)), {**step, "length": 3}),
        Sample(draw((2, 5), (7, 2, 5), (5, 5)), {**step, "length": 7, "reverse": True}, label="reverse"),
        Sample(draw((2, 5), (0, 2, 5), (5, 5)), {**step, "length": 0}, label="empty"),
        Sample(draw((1, 17), (9, 1, 17), (17, 17)), {**step, "body": _recurrence(1, 17), "length": 9}, budget=1e-5,
               reason="rounding errors of nine steps of a recurrence add up", label="vector"),
        Sample(draw((6, 4)), {"body": _doubling(), "carries": 0, "sequences": 1, "length": 6}, label="map"),
        Sample(draw((4,)), {"body": _doubling(), "carries": 1, "sequences": 0, "length": 3}, label="no sequence"),
    ]  # fmt: skip


def _cond_samples() -> list[Sample]:
    x, y = _inputs((3, 5), (3, 5))
    attrs = {"then": Graph((x, y), (make("add", x, y), x)), "orelse": Graph((x, y), (make("mul", make("sin", x), y), y))}

    def draw(value: bool) -> Any:
        return lambda rng: [np.array(value), *(rng.normal(size=(3, 5)).astype(np.float32) for _ in range(2))]

    return [Sample(draw(True), attrs, label="then"), Sample(draw(False), attrs, label="orelse")]


def _while_samples() -> list[Sample]:
    x, step = _inputs((4,), (4,))
    most = make("max", x, axes=(0,), keepdims=False)
    limit = make("constant", value=Literal(np.float32(10.0)))
    test, body = Graph((x, step), (make("less", most, limit),)), Graph((x, step), (make("add", x, step),))
    attrs = {"test": test, "body": body, "carries": 1}

    def draw(low: float) -> Any:
        return lambda rng: [rng.uniform(low, low + 1, 4).astype(np.float32), rng.uniform(1, 2, 4).astype(np.float32)]

    return [
        Sample(draw(0.0), attrs, gradient=False, label="several runs"),
        Sample(draw(12.0), attrs, gradient=False, label="no run"),
    ]


SCAN: Final = register(
    Op(
        name="scan",
        infer=_scan_type,
        reference=_scan_value,
        lower=_scan_lower,
        grad=scan_gradient,
        doc="A loop over the leading axis of its sequences, with values carried from step to step and results stacked.",
        traits=_CONTROL,
        attrs={
            "body": REQUIRED, "length": REQUIRED, "carries": REQUIRED, "sequences": REQUIRED, "reverse": False, "save": "costly",
        },
        control=_scan_run,
        samples=_scan_samples,
    )
)  # fmt: skip

COND: Final = register(
    Op(
        name="cond",
        infer=_cond_type,
        reference=_cond_value,
        lower=_cond_lower,
        grad=cond_gradient,
        doc="One of two bodies, as operand 0 says; only that one runs.",
        traits=_CONTROL,
        attrs={"then": REQUIRED, "orelse": REQUIRED},
        control=_cond_run,
        samples=_cond_samples,
    )
)

WHILE: Final = register(
    Op(
        name="while_loop",
        infer=_while_type,
        reference=_while_value,
        lower=_while_lower,
        grad=NotDifferentiable("the number of its steps is not known beforehand, so what they computed cannot be kept; use scan"),
        doc="A body that runs again as long as a test of the carried values is true.",
        traits=_CONTROL,
        attrs={"test": REQUIRED, "body": REQUIRED, "carries": REQUIRED},
        control=_while_run,
        samples=_while_samples,
    )
)
