"""What an argument of a traced function will be: shape and dtype, without a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.dims import Dim, DimExpr, parse_dim
from ..ir.dtypes import DType, as_dtype, f32
from ..ir.errors import ShapeError
from ..ir.types import TensorType, tensor


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of an argument; `name`, if given, names the input of the graph."""

    shape: tuple[Dim, ...]
    dtype: DType = f32
    name: str | None = None

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)

    def __str__(self) -> str:
        return str(self.type)


def spec(*shape: Any, dtype: object = f32, name: str | None = None) -> Spec:
    """A Spec: `spec("N", 3, 224, 224)`. A string is a named size ('N') or an expression of such ('2*N').

    The shape may also be one tuple, or an array whose shape and dtype are taken. Raises ShapeError or DTypeError.
    """
    if len(shape) == 1 and isinstance(shape[0], (np.ndarray, np.generic)):
        return Spec(shape[0].shape, as_dtype(shape[0].dtype), name)
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    dims: list[Dim] = []
    for d in shape:
        if isinstance(d, str):
            dims.append(parse_dim(d))
        elif isinstance(d, (bool, float)) or not (isinstance(d, DimExpr) or hasattr(d, "__index__")):
            raise ShapeError(f"spec: a dimension is an int or a name such as 'N', not {d!r}; the dtype goes in dtype=")
        else:
            dims.append(d)
    t = tensor(dtype, dims)
    return Spec(t.shape, t.dtype, name)


def as_spec(value: Any) -> Spec | None:
    """The Spec of a Spec or of an example array; None for anything else."""
    if isinstance(value, Spec):
        return value
    return spec(value) if isinstance(value, (np.ndarray, np.generic)) else None
