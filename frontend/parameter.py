"""Parameters and buffers: arrays that belong to a model. In a trace they are Tensors, inputs of the graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from ..ir.dims import Shape
from ..ir.dtypes import DType, as_dtype
from ..ir.errors import DTypeError, ShapeError
from ..ir.graph import Node
from ..ir.types import TensorType
from .context import current
from .core import Value
from .tensor import Tensor

Array = np.ndarray[Any, Any]
_OWN: Final = 2  # how often an array is counted that its parameter alone holds: that, and the call that counts


class Parameter(Tensor):
    """An array that training changes. Inside a trace it is a Tensor whose value is an input of the graph.

    `data` is the array; assigning to it checks shape and dtype. With `requires_grad=False` optimisers leave it alone.
    Where it has a `mask` (set by `tw.prune`), training steps keep at zero what the mask leaves out.
    """

    __slots__ = ("_data", "_mask", "requires_grad")
    _data: Array
    _mask: Array | None
    requires_grad: bool
    is_buffer = False

    def __init__(self, data: Any, *, dtype: object = None, requires_grad: bool = True) -> None:
        array = np.asarray(data, dtype=None if dtype is None else as_dtype(dtype).numpy)
        if dtype is None and array.dtype == np.float64:
            array = array.astype(np.float32)  # the default float
        as_dtype(array.dtype)
        self._data = np.array(array, order="C", copy=True)
        self.requires_grad = requires_grad
        self._mask = None

    @property
    def mask(self) -> Array | None:
        """Which elements may differ from zero, an array of bool; None where all may. Assigning one puts zeros at once."""
        return self._mask

    @mask.setter
    def mask(self, value: Any) -> None:
        if value is None:
            self._mask = None
            return
        mask = np.array(value, order="C", copy=True)
        if mask.shape != self._data.shape or mask.dtype != np.bool_:
            raise ShapeError(
                f"the mask of a parameter {self.type} is an array of bool of that shape, not {mask.dtype}{mask.shape}"
            )
        self._mask = mask
        self._data[~mask] = 0

    @property
    def node(self) -> Node:
        return current("reading a parameter").read(self)

    @property
    def type(self) -> TensorType:
        return TensorType(as_dtype(self._data.dtype), self._data.shape)

    @property
    def shape(self) -> Shape:
        return self._data.shape

    @property
    def dtype(self) -> DType:
        return as_dtype(self._data.dtype)

    @property
    def data(self) -> Array:
        """The array itself, not a copy."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        array = np.asarray(value)
        if array.shape != self._data.shape:
            raise ShapeError(f"the parameter has shape {self._data.shape}, the new value {array.shape}")
        if not np.can_cast(array.dtype, self._data.dtype, "same_kind"):
            raise DTypeError(f"the parameter has dtype {self._data.dtype}, the new value {array.dtype}; convert it first")
        self._data = np.array(array, dtype=self._data.dtype, order="C", copy=True)

    def movable(self) -> bool:
        """Whether nobody but this parameter holds its array, so that nobody notices when the values move to another one."""
        return sys.getrefcount(self._data) <= _OWN

    def move(self, array: Array) -> None:
        """Takes an array that holds the same values, as it is."""
        if array.shape != self._data.shape or array.dtype != self._data.dtype or not array.flags.c_contiguous:
            raise ShapeError(f"the parameter is {self.type}, the array it should move to is {array.dtype}{array.shape}")
        self._data = array

    def resize(self, value: Any) -> None:
        """Gives it an array of another shape, in its dtype: what is traced from now on has it. It loses its mask."""
        self._data, self._mask = np.array(value, dtype=self._data.dtype, order="C", copy=True), None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.type})"


class Buffer(Parameter):
    """State of a model that no optimiser changes, such as running statistics. `update` records its next value."""

    __slots__ = ()
    is_buffer = True

    def __init__(self, data: Any, *, dtype: object = None) -> None:
        super().__init__(data, dtype=dtype, requires_grad=False)

    def update(self, value: Value) -> None:
        """From here on in the trace the buffer has this value, and the training step returns it.

        Raises TraceError in a trace that returns no state, ShapeError or DTypeError for another type.
        """
        if value.shape != self.shape:
            raise ShapeError(f"a buffer of shape {self.shape} cannot be updated with shape {value.shape}")
        if value.dtype is not self.dtype:
            raise DTypeError(f"a buffer of dtype {self.dtype} cannot be updated with dtype {value.dtype}; use .astype")
        current("a buffer's update").update(self, value.node)


class Owner:
    """What holds parameters: the part of `Module` that tracing knows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def named_parts(self, prefix: str = "") -> tuple[list[tuple[str, Any]], list[tuple[str, Parameter]]]:
        raise NotImplementedError

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        raise NotImplementedError

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        raise NotImplementedError

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Buffer]]:
        raise NotImplementedError

    def written_call(self) -> Callable[..., Any]:
        """The bound method whose signature names the arguments."""
        raise NotImplementedError
