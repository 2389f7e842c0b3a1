"""LLVM's names for our element types, and literals.

A value of bool is `i1` in a register and `i8` (0 or 1) in memory. f16 and bf16 values live in registers as `float` that
the narrow type can hold exactly: arithmetic is done in f32 and rounded after each operation.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from ...ir.dtypes import ALL, DType, bf16, bool_, f16, f32, f64
from ...ir.errors import CompileError

_VALUE: Final = {
    "f64": "double",
    "f32": "float",
    "f16": "float",
    "bf16": "float",
    "i64": "i64",
    "i32": "i32",
    "i16": "i16",
    "i8": "i8",
    "u64": "i64",
    "u32": "i32",
    "u16": "i16",
    "u8": "i8",
    "bool": "i1",
}
# Stored and moved as bytes; the casts to and from them are arithmetic on their bits (ir/ops/narrow.py).
_BYTES: Final = frozenset(d.name for d in ALL if d.itemsize == 1) - _VALUE.keys()
_SUFFIX: Final = {"double": "f64", "float": "f32"}
NARROW: Final = (f16, bf16)


def element(dtype: DType) -> str:
    """The type of one lane in a register. Raises CompileError for a type that has no arithmetic."""
    found = "i8" if dtype.name in _BYTES else _VALUE.get(dtype.name)
    if found is None:
        raise CompileError(f"no code is generated for {dtype} values; cast them to one of {', '.join(_VALUE)} in the graph")
    return found


def stored(dtype: DType) -> str:
    """The type of one element in memory."""
    if dtype is bool_:
        return "i8"
    return "i16" if dtype in NARROW else element(dtype)


def vector(element_type: str, lanes: int) -> str:
    return element_type if lanes == 1 else f"<{lanes} x {element_type}>"


def suffix(element_type: str, lanes: int) -> str:
    """How an overloaded intrinsic names a type: v16f32, i64, ..."""
    name = _SUFFIX.get(element_type, element_type)
    return name if lanes == 1 else f"v{lanes}{name}"


def double_hex(value: float) -> str:
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def literal(value: float | int | bool, dtype: DType, lanes: int = 1) -> str:
    """A constant of a register type, rounded to the dtype."""
    if dtype.is_float:
        with np.errstate(over="ignore"):
            rounded = float(np.asarray(value, np.float64).astype(dtype.numpy))
        text = double_hex(rounded)
    elif dtype is bool_:
        text = "true" if value else "false"
    else:
        text = str(int(value))
    if lanes == 1:
        return text
    return f"splat ({element(dtype)} {text})"


def integer_type(dtype: DType) -> str:
    """The integer type as wide as a float register type."""
    return "i64" if dtype is f64 else "i32" if dtype in (f32, *NARROW) else element(dtype)
