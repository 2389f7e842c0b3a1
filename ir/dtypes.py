"""Element types: numpy's and those of ml_dtypes, under the short names that the text form prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from .errors import DTypeError


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One element type. `name` is the printed form; `kind` is one of 'float', 'int', 'uint', 'bool'.

    There is one object for each; equal means the same object.
    """

    name: str
    kind: str
    bits: int

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy (or ml_dtypes) dtype that stores it."""
        return _NUMPY[self.name]

    @property
    def itemsize(self) -> int:
        """Bytes of one stored element (sub-byte types are stored one to a byte)."""
        return self.numpy.itemsize

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return (as_dtype, (self.name,))


f64: Final = DType("f64", "float", 64)
f32: Final = DType("f32", "float", 32)
f16: Final = DType("f16", "float", 16)
bf16: Final = DType("bf16", "float", 16)
f8e4m3fn: Final = DType("f8e4m3fn", "float", 8)
f8e5m2: Final = DType("f8e5m2", "float", 8)
f8e4m3fnuz: Final = DType("f8e4m3fnuz", "float", 8)
f8e5m2fnuz: Final = DType("f8e5m2fnuz", "float", 8)
f8e8m0: Final = DType("f8e8m0", "float", 8)
f6e2m3: Final = DType("f6e2m3", "float", 6)
f6e3m2: Final = DType("f6e3m2", "float", 6)
f4e2m1: Final = DType("f4e2m1", "float", 4)
i64: Final = DType("i64", "int", 64)
i32: Final = DType("i32", "int", 32)
i16: Final = DType("i16", "int", 16)
i8: Final = DType("i8", "int", 8)
i4: Final = DType("i4", "int", 4)
i2: Final = DType("i2", "int", 2)
u64: Final = DType("u64", "uint", 64)
u32: Final = DType("u32", "uint", 32)
u16: Final = DType("u16", "uint", 16)
u8: Final = DType("u8", "uint", 8)
u4: Final = DType("u4", "uint", 4)
u2: Final = DType("u2", "uint", 2)
bool_: Final = DType("bool", "bool", 8)

ALL: Final[tuple[DType, ...]] = (
    f64, f32, f16, bf16, f8e4m3fn, f8e5m2, f8e4m3fnuz, f8e5m2fnuz, f8e8m0, f6e2m3, f6e3m2, f4e2m1,
    i64, i32, i16, i8, i4, i2, u64, u32, u16, u8, u4, u2, bool_,
)  # fmt: skip

_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "f8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "f8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "f8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "f6e2m3": np.dtype(ml_dtypes.float6_e2m3fn),
    "f6e3m2": np.dtype(ml_dtypes.float6_e3m2fn),
    "f4e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "i4": np.dtype(ml_dtypes.int4),
    "i2": np.dtype(ml_dtypes.int2),
    "u64": np.dtype(np.uint64),
    "u32": np.dtype(np.uint32),
    "u16": np.dtype(np.uint16),
    "u8": np.dtype(np.uint8),
    "u4": np.dtype(ml_dtypes.uint4),
    "u2": np.dtype(ml_dtypes.uint2),
    "bool": np.dtype(np.bool_),
}
_BY_NAME: Final = {d.name: d for d in ALL}
_BY_NUMPY: Final = {v: _BY_NAME[k] for k, v in _NUMPY.items()}
_PYTHON: Final[dict[type, DType]] = {float: f32, int: i64, bool: bool_}


def as_dtype(value: object) -> DType:
    """The DType for a DType, a short name ('f32'), a numpy dtype or its name, or Python's float, int, bool.

    Raises DTypeError when there is none (strings, objects, complex numbers).
    """
    if isinstance(value, DType):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    if isinstance(value, type) and value in _PYTHON:
        return _PYTHON[value]
    try:
        # np.dtype(None) is float64
        found = None if value is None else _BY_NUMPY.get(np.dtype(value).newbyteorder("="))  # type: ignore[call-overload]
    except (TypeError, ValueError, SyntaxError):
        found = None
    if found is None:
        names = ", ".join(d.name for d in ALL)
        raise DTypeError(f"unsupported dtype {value!r}; expected one of {names}, or the numpy dtype of one")
    return found
