"""multiply_add: a product and a sum with one rounding, which is one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dtypes import f32
from ..errors import DTypeError
from ..expr import fma
from ..fma import fma32
from ..graph import Attrs, Node
from ..op import Op, Sample, make, register
from ..types import TensorType, Type
from . import common as c


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    if types[0].dtype is not f32:
        raise DTypeError(f"multiply_add takes f32, not {types[0].dtype}")
    return c.check_same("multiply_add", types)


def _value(a: Any, b: Any, x: Any) -> Any:
    return fma32(a, b, x) if np.asarray(a).dtype == np.float32 else a * b + x  # of wider floats: the reals that it stands for


def _grad(node: Node, dy: Node) -> Sequence[Node]:
    a, b, _ = node.inputs
    return make("mul", dy, b), make("mul", dy, a), dy


def _samples() -> list[Sample]:
    made = [Sample(c.uniform(s, s, s)) for s in c.some_shapes("multiply_add")]
    ones = np.float32(1) + np.arange(1, 18, dtype=np.float32) * np.float32(2**-23)
    lost = c.fixed(ones, ones[::-1].copy(), -ones * ones[::-1])  # what the rounding of the product alone would lose
    special = np.array(c.SPECIAL, np.float32)
    edges = c.fixed(special, special[::-1].copy(), np.roll(special, 1))
    return [
        *made,
        Sample(lost, budget=0.0, reason="one rounding is exact", gradient=False, label="one rounding"),
        Sample(edges, gradient=False, label="special"),
    ]


multiply_add = register(
    Op(
        name="multiply_add",
        infer=_infer,
        reference=c.total(_value),
        lower=c.elementwise(fma),
        grad=c.rule(_grad),
        doc="a * b + c of f32, rounded once.",
        arity=3,
        traits=c.CHEAP,
        transpose=c.elementwise_transpose,
        samples=_samples,
    )
)
