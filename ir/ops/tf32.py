"""tf32: the f32 whose last 13 bits are zero, 8 bits of exponent and 10 of fraction. Tensor cores multiply them, in f32.

`contract_tf32` is a contraction whose operands are such numbers; `round_tf32` makes them. Of other operands a tensor core reads
no more than the first 19 bits, and what computes in f32 all of them: nothing makes such a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from ..dtypes import f32, u32
from ..errors import DTypeError
from ..expr import Expr, bitcast, const, select
from ..graph import Attrs, Node
from ..lowering import Contract, Lowering, Map
from ..op import REQUIRED, Array, NotDifferentiable, Op, Sample, Trait, lookup, make, register
from ..types import TensorType, Type
from . import common as c

_HALF: Final = 0x1000  # half a unit of the last bit that stays
_KEPT: Final = 0xFFFFE000
_INFINITE: Final = 0x7F800000


def _check(op: str, types: Sequence[TensorType]) -> None:
    for k, t in enumerate(types):
        if t.dtype is not f32:
            raise DTypeError(f"operand {k} of {op} has dtype {t.dtype}, expected f32")


# --- round_tf32 -----------------------------------------------------------------------------------------------------


def _infer_round(types: Sequence[TensorType], attrs: Attrs) -> Type:
    _check("round_tf32", types)
    return types[0]


def rounded(x: Array) -> Array:
    """f32 to the nearest tf32 number, ties away from zero, as `cvt.rna.tf32.f32` does; NaN stays."""
    bits = np.array(x, np.float32, order="C").view(np.uint32)
    finite = (bits & np.uint32(_INFINITE)) != np.uint32(_INFINITE)
    near = (bits + np.uint32(_HALF)) & np.uint32(_KEPT)
    return np.where(finite, near, bits).astype(np.uint32).view(np.float32)


def _reference_round(arrays: Sequence[Array], attrs: Attrs) -> Array:
    """In f32, also where everything else is evaluated in f64: what is rounded are bits of an f32."""
    with np.errstate(over="ignore"):
        return rounded(arrays[0].astype(np.float32)).astype(arrays[0].dtype)


def _round(x: Expr) -> Expr:
    bits = bitcast(x, u32)
    infinite = const(_INFINITE, u32)
    near = (bits + const(_HALF, u32)) & const(_KEPT, u32)
    return bitcast(select((bits & infinite) < infinite, near, bits), f32)


def _samples_round() -> list[Sample]:
    ties = np.array([1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, -1.0 - 2.0**-11, 3.4e38, 1e-40, -1e-45, np.inf, -np.inf, np.nan, -0.0])
    shapes = [Sample(c.uniform(s), gradient=False) for s in ((33,), (3, 17), (0,), ())]
    return [*shapes, Sample(c.fixed(ties.astype(np.float32)), gradient=False, label="ties")]


round_tf32 = register(
    Op(
        name="round_tf32",
        infer=_infer_round,
        reference=_reference_round,
        lower=lambda node: Map(lambda idx, load: _round(load(0, idx)), elementwise=True),
        grad=c.rule(lambda node, dy: [dy]),
        doc="The nearest number whose last 13 bits of an f32 are zero, ties away from zero. Its gradient is that of a cast.",
        arity=1,
        traits=c.CHEAP,
        transpose=c.elementwise_transpose,
        samples=_samples_round,
    )
)


# --- contract_tf32 --------------------------------------------------------------------------------------------------


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    _check("contract_tf32", types)
    return lookup("contract").infer(types, attrs)


def _lower(node: Node) -> Lowering:
    return Contract(node.attrs["spec"], tf32=True)


def _grad(node: Node, cotangents: tuple[Node | None, ...]) -> Sequence[Node | None]:
    plain = make("contract", *node.inputs, spec=node.attrs["spec"])
    rule = plain.op.grad
    assert not isinstance(rule, NotDifferentiable)
    return rule(plain, cotangents)


def _samples() -> list[Sample]:
    def of_tf32(s: Sample) -> Sample:
        def draw(rng: np.random.Generator) -> list[Array]:
            return [rounded(x) for x in s.make(rng)]

        return replace(s, make=draw, gradient=False)

    return [of_tf32(s) for s in lookup("contract").samples() if not s.label or s.label in ("strided", "panels")]


contract_tf32 = register(
    Op(
        name="contract_tf32",
        infer=_infer,
        reference=lookup("contract").reference,
        lower=_lower,
        grad=_grad,
        doc="contract of f32 that are tf32 numbers, which tensor cores multiply.",
        arity=2,
        traits=frozenset({Trait.CONTRACTION}),
        attrs={"spec": REQUIRED},
        samples=_samples,
    )
)
