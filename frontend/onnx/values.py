"""What a name of an ONNX graph stands for while it is imported: a known array, sizes, a Tensor, or nothing yet.

Shape arithmetic of ONNX models runs on tensors. A value that holds sizes is kept as a numpy array of dimension expressions
(dtype object), on which numpy's own functions compute; it becomes a Tensor only where an op reads its numbers at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...ir.dims import Dim, DimExpr
from ...ir.dtypes import DType, as_dtype, i64
from ...ir.errors import OnnxError
from .description import Array

if TYPE_CHECKING:
    from ..tensor import Tensor


class Value:
    """One value. `known` is its array (of dtype object where sizes are symbolic), or None where a run decides.

    `stored` reads a large array only when it is asked for; `make` is how it becomes a Tensor the first time.
    """

    __slots__ = ("_known", "_load", "_make", "_tensor", "dtype", "key", "shape", "weight")

    def __init__(
        self,
        dtype: DType,
        shape: tuple[Dim, ...],
        *,
        known: Array | None = None,
        load: Callable[[], Array] | None = None,
        tensor: Tensor | None = None,
        make: Callable[[Value], Tensor] | None = None,
        key: str = "",
        weight: bool = False,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.key = key  # names the value across imports of the same model
        self.weight = weight  # an array that is data of the model: it becomes a parameter
        self._known = known
        self._load = load
        self._tensor = tensor
        self._make = make

    @property
    def known(self) -> Array | None:
        """The array, where the import knows it."""
        if self._known is None and self._load is not None:
            self._known = self._load()
        return self._known

    @property
    def is_known(self) -> bool:
        return self._known is not None or self._load is not None

    @property
    def is_sizes(self) -> bool:
        """Whether it holds a symbolic size."""
        return self._known is not None and self._known.dtype == object

    @property
    def tensor(self) -> Tensor:
        """The value as a Tensor of the graph."""
        if self._tensor is None:
            assert self._make is not None
            self._tensor = self._make(self)
        return self._tensor

    @property
    def made(self) -> Tensor | None:
        """The Tensor, if it is one already."""
        return self._tensor

    @property
    def size(self) -> Dim:
        total: Dim = 1
        for d in self.shape:
            total = total * d
        return total

    def __repr__(self) -> str:
        return f"Value({self.dtype.name}{list(self.shape)}{' known' if self.is_known else ''})"


class Sequence(Value):
    """A list of values whose length the import knows. Only the ops of ops/sequence.py take one."""

    __slots__ = ("items",)

    def __init__(self, dtype: DType, items: tuple[Value, ...]) -> None:
        super().__init__(dtype, ())
        self.items = items

    @property
    def tensor(self) -> Tensor:
        raise OnnxError("a sequence stands where a tensor is expected")

    def __repr__(self) -> str:
        return f"Sequence({self.dtype.name}, {len(self.items)})"


def normal(array: Array, dtype: DType = i64) -> tuple[Array, DType]:
    """An array of sizes as plain integers where all of them are; its dtype."""
    if array.dtype != object:
        return array, as_dtype(array.dtype)
    if any(isinstance(d, DimExpr) for d in array.ravel()):
        return array, dtype
    return array.astype(dtype.numpy), dtype
