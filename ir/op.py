"""One record per op: everything the compiler knows about it stands in one place.

Passes and the code generator ask a record for its traits and lowering; they never compare op names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

import numpy as np

from .errors import AttributeValueError, ShapeError, TensorwrightError
from .graph import Attrs, Graph, Node
from .lowering import Lowering
from .types import TensorType, TupleType, Type

Array = np.ndarray[Any, Any]
MAX_BYTES: Final = 1 << 56  # of one array: what no machine addresses; and sums of byte offsets stay far from 2**63


class Trait(Enum):
    """Facts about an op that passes act on."""

    ELEMENTWISE = auto()  # all operands and the output have one shape; out[i] depends on operands at i only
    COMMUTATIVE = auto()  # op(a, b) == op(b, a), to the bit
    ASSOCIATIVE = auto()  # over the reals
    IDEMPOTENT = auto()  # op(op(x)) == op(x)
    REDUCTION = auto()
    MOVEMENT = auto()  # every output element is an operand's element or a constant
    VIEW = auto()  # same bytes in the same order
    CONTRACTION = auto()
    STRUCTURAL = auto()
    CHEAP = auto()  # recomputing costs no more than a load
    RANDOM = auto()
    BARRIER = auto()  # keeps what is before and after apart (recompute, stop_gradient for the gradient pass)
    QUANTISABLE = auto()
    QUANTIZE = auto()  # operands x, scale, zero point: the integers round(x / scale) + zero point, along the attribute `axis`
    DEQUANTIZE = auto()  # operands x, scale, zero point: the numbers (x - zero point) * scale that integers stand for
    BLOCKS = auto()  # operands q, scale: the numbers q * scale, a scale for each `block` elements along the attribute `axis`
    ORDER = auto()  # f(op(x)) == op(f(x)) for every increasing f: it picks elements by their order alone (max)
    CONTROL = auto()  # runs Graphs among its attributes: a loop or a branch; passes run on these too

    # members are single objects: the identity is a hash, and traits are asked for some hundred thousand times a compile
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Sample:
    """One test case of an op. `make(rng)` draws the operands as numpy arrays; the drivers derive everything else.

    `budget` is the greatest max|y - ref| / max|ref| of a compiled f32 result against the f64 reference, and says why in
    `reason` where it is not the default. `gradient` is False where no central difference exists at these inputs.
    """

    make: Callable[[np.random.Generator], Sequence[Array]]
    attrs: Attrs = field(default_factory=dict)
    budget: float = 2e-6
    reason: str = ""
    gradient: bool = True
    label: str = ""


@dataclass(frozen=True)
class NotDifferentiable:
    """In the place of a gradient rule: why there is none."""

    reason: str


# grad(node, cotangents) -> one cotangent per input (None: no gradient flows). `cotangents` has one entry per output,
# None for an output that nothing depends on. Built from IR nodes, so that gradients of gradients work.
GradRule = Callable[[Node, tuple[Node | None, ...]], Sequence[Node | None]]

# How a reference runs a body: (body, arrays) -> its outputs.
RunBody = Callable[[Graph, Sequence[Array]], list[Array]]


@dataclass(frozen=True, eq=False)
class Op:
    """The record of one op.

    infer      (input types, attrs) -> type; raises ShapeError, DTypeError or AttributeValueError that names the operand
    reference  (input arrays, attrs) -> array, or tuple of arrays: numpy, the definition. It computes in the dtype of its
               inputs (f64 inputs give an f64 result even where the graph says f32), and is total: no warnings
    grad       a GradRule, or why there is none
    lower      node -> Lowering
    attrs      attribute names with their defaults (`REQUIRED` where there is none)
    transpose  optional: (node, perm) -> an equivalent of transpose(node, perm) whose inputs are transposed instead, or
               None where it cannot be done; lets the layout pass move transposes through the op
    to_layout  optional: (node, 'NHWC' | 'NCHW') -> the same value computed in another data layout, with explicit
               transposes around it; the node itself if it has that layout already
    onnx       (ONNX op, since version) where one to one
    control    for an op with bodies: (input arrays, attrs, run) -> arrays, the reference with `run(body, arrays)` in the place
               of the interpreter, so that its mode (all in f64, say) reaches the bodies
    """

    name: str
    infer: Callable[[Sequence[TensorType], Attrs], Type]
    reference: Callable[[Sequence[Array], Attrs], Array | tuple[Array, ...]]
    lower: Callable[[Node], Lowering]
    grad: GradRule | NotDifferentiable
    doc: str
    arity: int | None = None
    traits: frozenset[Trait] = frozenset()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    transpose: Callable[[Node, tuple[int, ...]], Node | None] | None = None
    to_layout: Callable[[Node, str], Node] | None = None
    onnx: tuple[str, int] | None = None
    control: Callable[[Sequence[Array], Attrs, RunBody], tuple[Array, ...]] | None = None
    samples: Callable[[], Iterable[Sample]] = tuple

    def has(self, trait: Trait) -> bool:
        return trait in self.traits

    def __repr__(self) -> str:
        return f"Op({self.name})"


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()
REGISTRY: Final[dict[str, Op]] = {}


def register(op: Op) -> Op:
    """Adds a record. Raises TensorwrightError if the name is taken."""
    if op.name in REGISTRY:
        raise TensorwrightError(f"op {op.name!r} is registered twice")
    REGISTRY[op.name] = op
    return op


def lookup(name: str) -> Op:
    """The record called `name`. Raises AttributeValueError, with the nearest names, when there is none."""
    found = REGISTRY.get(name)
    if found is None:
        import difflib

        near = ", ".join(difflib.get_close_matches(name, REGISTRY)) or "see tensorwright.ir.op.REGISTRY"
        raise AttributeValueError(f"there is no op {name!r}; did you mean: {near}?")
    return found


def make(op: Op | str, *inputs: Node, **attrs: Any) -> Node:
    """The node that applies an op: fills in default attributes, checks their names, infers the type.

    Raises ShapeError, DTypeError or AttributeValueError from the record's `infer`.
    """
    record = op if isinstance(op, Op) else lookup(op)
    if record.arity is not None and len(inputs) != record.arity:
        raise AttributeValueError(f"{record.name} takes {record.arity} operands, got {len(inputs)}")
    full = {**record.attrs, **attrs}
    if len(full) != len(record.attrs):
        unknown = attrs.keys() - record.attrs.keys()
        raise AttributeValueError(f"{record.name} has no attribute {sorted(unknown)}; it has {sorted(record.attrs)}")
    for v in full.values():
        if v is REQUIRED:
            missing = [k for k, v in full.items() if v is REQUIRED]
            raise AttributeValueError(f"{record.name} needs the attribute {missing}")
    structural = Trait.STRUCTURAL in record.traits
    types = [i.type if structural else i.tensor for i in inputs]
    result = record.infer(types, full)  # type: ignore[arg-type]
    for item in result.items if isinstance(result, TupleType) else (result,):
        _check_addressable(record.name, item)
    return Node(record, inputs, full, result)


def _check_addressable(name: str, type: TensorType) -> None:
    nbytes = type.dtype.itemsize
    for d in type.shape:
        if not isinstance(d, int):
            return  # checked again when its size is known
        nbytes *= d
    if nbytes > MAX_BYTES:
        raise ShapeError(f"{name}: {type} would take {nbytes:,} bytes; an array has at most 2**56: check its shape")
