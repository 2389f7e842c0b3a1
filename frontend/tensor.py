"""Tensor: a value of the graph being traced, with the operators and methods of a numpy array."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from ..ir.dims import Dim, Shape, product
from ..ir.dtypes import DType
from ..ir.errors import ShapeError, TraceError
from ..ir.graph import Node
from . import elementwise, linalg, movement, reductions
from .context import error
from .core import TensorLike, Value, register_tensor_class
from .indexing import getitem

Axes = int | tuple[int, ...] | list[int] | None

_UFUNCS: dict[str, Callable[..., Tensor]] = {}


class Tensor(Value):
    """A symbolic array: shape and dtype are known while tracing, values are not.

    Operators and methods record operations; Python control flow on values cannot be recorded, and `if`, `float()` and
    numpy conversion raise TraceError.
    """

    __slots__ = ("_node",)
    _node: Node

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def node(self) -> Node:
        return self._node

    @property
    def shape(self) -> Shape:
        """A tuple of ints, and of dimension expressions where the size is symbolic."""
        return self._node.tensor.shape

    @property
    def dtype(self) -> DType:
        return self._node.tensor.dtype

    @property
    def size(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def T(self) -> Tensor:
        """All axes reversed."""
        return movement.transpose(self)

    @property
    def mT(self) -> Tensor:
        """The last two axes exchanged."""
        return movement.swapaxes(self, -1, -2)

    def __repr__(self) -> str:
        return f"Tensor({self.type})"

    # -- what a symbolic value cannot be ------------------------------------------------------------------------------
    def _no_value(self, what: str, instead: str) -> NoReturn:
        message = f"{what} needs the value of a Tensor, and while tracing there is none; {instead}"
        raise error(TraceError, message, tensor=self)

    def __bool__(self) -> bool:  # noqa: PLE0304
        self._no_value("a truth test (if, while, and, or, not)", "choose between values with tw.where(condition, a, b)")

    def __float__(self) -> float:
        self._no_value("float()", "keep it a Tensor, or return it from the traced function and convert the result")

    def __int__(self) -> int:
        self._no_value("int()", "keep it a Tensor (x.astype('i64')); only ints and x.shape can be sizes and Python indices")

    def __index__(self) -> int:  # noqa: PLE0305
        self._no_value("use as a Python index or size", "take elements with tw.take(x, index); sizes are ints or x.shape")

    def __complex__(self) -> complex:
        self._no_value("complex()", "complex numbers are not supported")

    def item(self) -> NoReturn:
        """Raises TraceError: there is no value while tracing."""
        self._no_value(".item()", "keep it a Tensor, or return it from the traced function")

    def numpy(self) -> NoReturn:
        """Raises TraceError: there is no value while tracing."""
        self._no_value(".numpy()", "use tw functions on it, or return it from the traced function")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._no_value("conversion to a numpy array", "use the tw function of the same name instead of numpy's")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Tensor:
        found = _UFUNCS.get(ufunc.__name__)
        if found is None or method != "__call__" or kwargs:
            self._no_value(
                f"numpy.{ufunc.__name__}{'' if method == '__call__' else '.' + method}", "use functions of tw on Tensors"
            )
        return found(*inputs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        self._no_value(f"numpy.{func.__name__}", f"use tw.{func.__name__} if there is one, or a Tensor method")

    # -- container ----------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a Tensor without dimensions has no len()")
        if not isinstance(self.shape[0], int):
            raise error(ShapeError, f"len() of a symbolic dimension ({self.shape[0]}); use x.shape[0]", tensor=self)
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        if not self.shape:
            raise TypeError("iteration over a Tensor without dimensions")
        if not isinstance(self.shape[0], int):
            raise error(ShapeError, f"iteration over a symbolic dimension ({self.shape[0]})", tensor=self)
        return (self[i] for i in range(self.shape[0]))

    def __contains__(self, value: object) -> bool:
        self._no_value("'in'", "use tw.any(x == value)")

    def __getitem__(self, key: Any) -> Tensor:
        return getitem(self, key)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        message = "Tensors cannot be changed in place; build a new one with tw.where, tw.concatenate or tw.scatter_add"
        raise error(TraceError, message, tensor=self)

    # -- operators ----------------------------------------------------------------------------------------------------
    def __neg__(self) -> Tensor:
        return elementwise.negative(self)

    def __pos__(self) -> Tensor:
        return self

    def __abs__(self) -> Tensor:
        return elementwise.abs(self)

    def __invert__(self) -> Tensor:
        return elementwise.invert(self)

    def __round__(self, ndigits: int | None = None) -> Tensor:
        if ndigits:
            self._no_value(f"round(x, {ndigits})", "use tw.round(x * 10**n) / 10**n")
        return elementwise.round(self)

    def __add__(self, other: TensorLike) -> Tensor:
        return elementwise.add(self, other)

    def __radd__(self, other: TensorLike) -> Tensor:
        return elementwise.add(other, self)

    def __sub__(self, other: TensorLike) -> Tensor:
        return elementwise.subtract(self, other)

    def __rsub__(self, other: TensorLike) -> Tensor:
        return elementwise.subtract(other, self)

    def __mul__(self, other: TensorLike) -> Tensor:
        return elementwise.multiply(self, other)

    def __rmul__(self, other: TensorLike) -> Tensor:
        return elementwise.multiply(other, self)

    def __truediv__(self, other: TensorLike) -> Tensor:
        return elementwise.true_divide(self, other)

    def __rtruediv__(self, other: TensorLike) -> Tensor:
        return elementwise.true_divide(other, self)

    def __floordiv__(self, other: TensorLike) -> Tensor:
        return elementwise.floor_divide(self, other)

    def __rfloordiv__(self, other: TensorLike) -> Tensor:
        return elementwise.floor_divide(other, self)

    def __mod__(self, other: TensorLike) -> Tensor:
        return elementwise.remainder(self, other)

    def __rmod__(self, other: TensorLike) -> Tensor:
        return elementwise.remainder(other, self)

    def __pow__(self, other: TensorLike) -> Tensor:
        return elementwise.power(self, other)

    def __rpow__(self, other: TensorLike) -> Tensor:
        return elementwise.power(other, self)

    def __matmul__(self, other: TensorLike) -> Tensor:
        return linalg.matmul(self, other)

    def __rmatmul__(self, other: TensorLike) -> Tensor:
        return linalg.matmul(other, self)

    def __lshift__(self, other: TensorLike) -> Tensor:
        return elementwise.left_shift(self, other)

    def __rlshift__(self, other: TensorLike) -> Tensor:
        return elementwise.left_shift(other, self)

    def __rshift__(self, other: TensorLike) -> Tensor:
        return elementwise.right_shift(self, other)

    def __rrshift__(self, other: TensorLike) -> Tensor:
        return elementwise.right_shift(other, self)

    def __and__(self, other: TensorLike) -> Tensor:
        return elementwise.bitwise_and(self, other)

    def __rand__(self, other: TensorLike) -> Tensor:
        return elementwise.bitwise_and(other, self)

    def __or__(self, other: TensorLike) -> Tensor:
        return elementwise.bitwise_or(self, other)

    def __ror__(self, other: TensorLike) -> Tensor:
        return elementwise.bitwise_or(other, self)

    def __xor__(self, other: TensorLike) -> Tensor:
        return elementwise.bitwise_xor(self, other)

    def __rxor__(self, other: TensorLike) -> Tensor:
        return elementwise.bitwise_xor(other, self)

    def __lt__(self, other: TensorLike) -> Tensor:
        return elementwise.less(self, other)

    def __le__(self, other: TensorLike) -> Tensor:
        return elementwise.less_equal(self, other)

    def __gt__(self, other: TensorLike) -> Tensor:
        return elementwise.greater(self, other)

    def __ge__(self, other: TensorLike) -> Tensor:
        return elementwise.greater_equal(self, other)

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return elementwise.equal(self, other)  # type: ignore[arg-type]

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return elementwise.not_equal(self, other)  # type: ignore[arg-type]

    __hash__ = object.__hash__  # by identity, as == gives a Tensor

    # -- methods ------------------------------------------------------------------------------------------------------
    def astype(self, dtype: object) -> Tensor:
        """Converted to a dtype; see `tw.astype`."""
        return elementwise.astype(self, dtype)

    def reshape(self, *shape: Any) -> Tensor:
        """The elements under another shape, given as ints or one tuple; one may be -1."""
        return movement.reshape(self, shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        """Dimensions start_dim to end_dim merged into one."""
        return movement.flatten(self, start_dim, end_dim)

    def ravel(self) -> Tensor:
        """All elements in one dimension."""
        return movement.ravel(self)

    def transpose(self, *axes: Any) -> Tensor:
        """The axes in another order, given as ints or one tuple; reversed without."""
        order: Sequence[int] = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        return movement.transpose(self, order or None)

    def swapaxes(self, axis1: int, axis2: int) -> Tensor:
        """Two axes exchanged."""
        return movement.swapaxes(self, axis1, axis2)

    def squeeze(self, axis: int | tuple[int, ...] | None = None) -> Tensor:
        """Without dimensions of size 1."""
        return movement.squeeze(self, axis)

    def expand_dims(self, axis: int | tuple[int, ...]) -> Tensor:
        """New dimensions of size 1."""
        return movement.expand_dims(self, axis)

    def broadcast_to(self, shape: Any) -> Tensor:
        """Repeated to a shape."""
        return movement.broadcast_to(self, shape)

    def split(self, indices_or_sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
        """Equal sections, or the pieces between positions."""
        return movement.split(self, indices_or_sections, axis)

    def take(self, indices: TensorLike, axis: int | None = None) -> Tensor:
        """Elements at integer indices along an axis."""
        return movement.take(self, indices, axis)

    def repeat(self, repeats: int, axis: int | None = None) -> Tensor:
        """Each element repeated."""
        return movement.repeat(self, repeats, axis)

    def sum(self, axis: Axes = None, *, dtype: object = None, keepdims: bool = False) -> Tensor:
        """The sum over axes."""
        return reductions.sum(self, axis, dtype=dtype, keepdims=keepdims)

    def mean(self, axis: Axes = None, *, dtype: object = None, keepdims: bool = False) -> Tensor:
        """The average over axes."""
        return reductions.mean(self, axis, dtype=dtype, keepdims=keepdims)

    def var(self, axis: Axes = None, *, ddof: int = 0, keepdims: bool = False) -> Tensor:
        """The variance over axes."""
        return reductions.var(self, axis, ddof=ddof, keepdims=keepdims)

    def std(self, axis: Axes = None, *, ddof: int = 0, keepdims: bool = False) -> Tensor:
        """The standard deviation over axes."""
        return reductions.std(self, axis, ddof=ddof, keepdims=keepdims)

    def max(self, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
        """The largest over axes."""
        return reductions.max(self, axis, keepdims=keepdims)

    def min(self, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
        """The smallest over axes."""
        return reductions.min(self, axis, keepdims=keepdims)

    def prod(self, axis: Axes = None, *, dtype: object = None, keepdims: bool = False) -> Tensor:
        """The product over axes."""
        return reductions.prod(self, axis, dtype=dtype, keepdims=keepdims)

    def any(self, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
        """Whether one element or more is non-zero."""
        return reductions.any(self, axis, keepdims=keepdims)

    def all(self, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
        """Whether every element is non-zero."""
        return reductions.all(self, axis, keepdims=keepdims)

    def argmax(self, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
        """The position of the largest."""
        return reductions.argmax(self, axis, keepdims=keepdims)

    def argmin(self, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
        """The position of the smallest."""
        return reductions.argmin(self, axis, keepdims=keepdims)

    def cumsum(self, axis: int | None = None) -> Tensor:
        """Running sums."""
        return reductions.cumsum(self, axis)

    def clip(self, a_min: TensorLike | None = None, a_max: TensorLike | None = None) -> Tensor:
        """Limited to [a_min, a_max]."""
        return elementwise.clip(self, a_min, a_max)

    def round(self) -> Tensor:
        """The nearest integer, halves to even."""
        return elementwise.round(self)

    def dot(self, other: TensorLike) -> Tensor:
        """The matrix product."""
        return linalg.matmul(self, other)


register_tensor_class(Tensor)

# numpy calls these for `array + tensor` and for np.exp(tensor): they record the same operation.
_UFUNCS.update(
    {
        name: fn
        for name, fn in inspect.getmembers(elementwise, inspect.isfunction)
        if fn.__module__ == elementwise.__name__ and not name.startswith("_")
    }
)
_UFUNCS.update(
    {
        "divide": elementwise.true_divide,
        "absolute": elementwise.abs,
        "rint": elementwise.round,
        "matmul": linalg.matmul,
        "pow": elementwise.power,
    }
)
