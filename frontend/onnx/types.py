"""ONNX's element types (TensorProto.DataType) and ours."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

from ...ir.dtypes import DType, as_dtype
from ...ir.errors import OnnxError

# number -> (its name, bits, numpy's dtype; None where numpy and ml_dtypes have none)
_TYPES: Final[dict[int, tuple[str, int, Any]]] = {
    1: ("float", 32, np.float32),
    2: ("uint8", 8, np.uint8),
    3: ("int8", 8, np.int8),
    4: ("uint16", 16, np.uint16),
    5: ("int16", 16, np.int16),
    6: ("int32", 32, np.int32),
    7: ("int64", 64, np.int64),
    8: ("string", 0, object),
    9: ("bool", 8, np.bool_),
    10: ("float16", 16, np.float16),
    11: ("double", 64, np.float64),
    12: ("uint32", 32, np.uint32),
    13: ("uint64", 64, np.uint64),
    14: ("complex64", 64, np.complex64),
    15: ("complex128", 128, np.complex128),
    16: ("bfloat16", 16, ml_dtypes.bfloat16),
    17: ("float8e4m3fn", 8, ml_dtypes.float8_e4m3fn),
    18: ("float8e4m3fnuz", 8, ml_dtypes.float8_e4m3fnuz),
    19: ("float8e5m2", 8, ml_dtypes.float8_e5m2),
    20: ("float8e5m2fnuz", 8, ml_dtypes.float8_e5m2fnuz),
    21: ("uint4", 4, ml_dtypes.uint4),
    22: ("int4", 4, ml_dtypes.int4),
    23: ("float4e2m1", 4, ml_dtypes.float4_e2m1fn),
    24: ("float8e8m0", 8, ml_dtypes.float8_e8m0fnu),
    25: ("uint2", 2, ml_dtypes.uint2),
    26: ("int2", 2, ml_dtypes.int2),
    27: ("float6e2m3", 6, ml_dtypes.float6_e2m3fn),
    28: ("float6e3m2", 6, ml_dtypes.float6_e3m2fn),
}
BITS: Final = {number: bits for number, (_, bits, _) in _TYPES.items()}
PACKED: Final = {21: 2, 22: 2, 23: 2, 25: 4, 26: 4}  # numbers in one entry of int32_data
SINCE: Final = {23: 23, 24: 24, 25: 25, 26: 25, 27: 28, 28: 28}  # the opsets that brought types later than 21
_NUMBERS: Final = {np.dtype(t): number for number, (_, _, t) in _TYPES.items()}


def numpy_dtype(number: int) -> np.dtype[Any] | None:
    """The numpy dtype of an ONNX element type (object: strings); None for an unknown number."""
    found = _TYPES.get(number)
    return None if found is None else np.dtype(found[2])


def dtype_of(number: int, where: str) -> DType:
    """Our DType of an ONNX element type. Raises OnnxError, saying where, for one that is not supported."""
    name, _, found = _TYPES.get(number, (str(number), 0, None))
    try:
        return as_dtype(found)
    except TypeError:
        raise OnnxError(f"{where} has element type {name}, which is not supported") from None


def type_number(dtype: DType) -> int:
    """ONNX's number of a DType."""
    return _NUMBERS[dtype.numpy]
