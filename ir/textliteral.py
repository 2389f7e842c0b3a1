"""Arrays in the text form: elements written out for small ones, raw bytes in base64 for the rest."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from .dtypes import DType, f32, f64
from .errors import ParseError
from .graph import Literal
from .types import TensorType

INLINE_LIMIT: Final = 16  # arrays with more elements are named by their digest


def format_literal(literal: Literal) -> str:
    """`f32[2](1.0, 2.0)`, or `f32[4096](@sha256:...)` for one with more than INLINE_LIMIT elements."""
    if literal.array.size > INLINE_LIMIT:
        return f"{literal.type}(@sha256:{literal.digest})"
    dtype = literal.type.dtype
    texts = [_element(v, dtype) for v in literal.array.reshape(-1)]
    # A NaN with a payload has no spelling as a number: then the bytes stand in hexadecimal.
    if literal.array.size and parse_elements(texts, literal.type).array.tobytes() != literal.array.tobytes():
        return f"{literal.type}(0x{literal.array.tobytes().hex()})"
    return f"{literal.type}({', '.join(texts)})"


def _element(value: Any, dtype: DType) -> str:
    if dtype.kind == "bool":
        return "true" if value else "false"
    if dtype.is_integer:
        return str(int(value))
    exact = float(value)
    if np.isnan(exact):
        return "-nan" if np.signbit(value) else "nan"
    if dtype is f32:
        short = str(value)  # the shortest that is this f32; reading it goes through f64, so check
        return short if np.float32(float(short)) == value and np.isfinite(value) else repr(exact)
    return repr(exact)


def parse_elements(texts: Sequence[str], type: TensorType) -> Literal:
    """A Literal from its elements as text. Raises ParseError for a wrong number of them, or one outside the dtype."""
    shape, dtype = type.static_shape, type.dtype
    if len(texts) != type.size:
        raise ParseError(f"{type} has {type.size} elements, {len(texts)} are given")
    values: list[Any] = []
    for t in texts:
        if dtype.kind == "bool":
            if t not in ("true", "false"):
                raise ParseError(f"an element of {type} is true or false, not {t}")
            values.append(t == "true")
        elif dtype.is_integer:
            try:
                number = int(t)
            except ValueError:
                raise ParseError(f"an element of {type} is an integer, not {t[:40]}") from None
            low = -(1 << (dtype.bits - 1)) if dtype.kind == "int" else 0
            if not low <= number < low + (1 << dtype.bits):
                raise ParseError(f"{t} is outside the range of {dtype}")
            values.append(number)
        else:
            try:
                values.append(float(t))
            except ValueError:
                raise ParseError(f"an element of {type} is a number, not {t[:40]}") from None
    wide = f64.numpy if dtype.is_float else dtype.numpy if dtype.bits >= 8 else np.dtype(np.int8)
    with np.errstate(all="ignore"):
        return Literal(np.array(values, dtype=wide).reshape(shape).astype(dtype.numpy))


def encode(literal: Literal) -> str:
    """The bytes of an array, little-endian and row-major, in base64."""
    array = literal.array
    little = array if array.dtype.itemsize == 1 else array.astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(little.tobytes()).decode()


def decode(text: str, type: TensorType) -> Literal:
    """The array that `encode` wrote. Raises ParseError when the bytes do not make one of `type`."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as e:
        raise ParseError(f"the data of {type} is not base64: {e}") from None
    return from_bytes(raw, type)


def from_bytes(raw: bytes, type: TensorType) -> Literal:
    """The array of `type` stored in `raw`, little-endian and row-major. Raises ParseError when they do not fit."""
    dtype = type.dtype
    if len(raw) != type.nbytes:
        raise ParseError(f"{type} takes {type.nbytes} bytes, {len(raw)} are given")
    bytes_ = np.frombuffer(raw, np.uint8)
    if dtype.kind == "bool" and bytes_.size and bytes_.max() > 1:
        raise ParseError(f"the data of {type} holds bytes other than 0 and 1")
    array = np.frombuffer(raw, dtype.numpy if dtype.itemsize == 1 else dtype.numpy.newbyteorder("<"))
    if dtype.bits < 8 and array.astype(np.int8).astype(dtype.numpy).tobytes() != raw:
        raise ParseError(f"the data of {type} holds bytes outside the range of {dtype}")
    return Literal(array.astype(dtype.numpy).reshape(type.static_shape))
