"""Element types and tensor types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tensorwright.ir.dims import symbol
from tensorwright.ir.dtypes import ALL, as_dtype, bf16, bool_, f32, f64, i4, i64
from tensorwright.ir.errors import DTypeError, ShapeError
from tensorwright.ir.types import TensorType, TupleType, tensor


def test_each_dtype_is_found_by_every_name_it_has():
    for d in ALL:
        assert as_dtype(d) is d and as_dtype(d.name) is d and as_dtype(d.numpy) is d
        assert np.zeros(3, d.numpy).nbytes == 3 * d.itemsize
    assert (as_dtype(float), as_dtype(int), as_dtype(bool)) == (f32, i64, bool_)
    assert as_dtype(np.float64) is f64 and as_dtype("float32") is f32 and as_dtype(ml_dtypes.bfloat16) is bf16
    assert as_dtype(np.dtype(">f4")) is f32
    assert i4.itemsize == 1


@pytest.mark.parametrize("value", [None, "complex64", complex, object, "U3", "no such", ",,", {"a": 1}, 3, [("a", int)]])
def test_an_unsupported_dtype_is_our_error(value):
    with pytest.raises(DTypeError, match="expected one of"):
        as_dtype(value)


def test_tensor_types():
    n = symbol("N")
    t = tensor("f32", (n, np.int64(3)))
    assert str(t) == "f32[N, 3]" and t.rank == 2 and t.size == 3 * n and t.symbols == {"N"}
    assert type(t.shape[1]) is int
    assert t.with_sizes({"N": 4}) == TensorType(f32, (4, 3))
    assert t.with_sizes({"N": 4}).nbytes == 48 and t.with_sizes({"N": 4}).static_shape == (4, 3)
    with pytest.raises(ShapeError, match="symbolic"):
        _ = t.static_shape
    assert str(TupleType((t, tensor("i64", ())))) == "(f32[N, 3], i64[])"


@pytest.mark.parametrize("shape", [(-1,), (True,), (2.0,), ("N",), (None,)])
def test_a_bad_dimension_is_refused(shape):
    with pytest.raises(ShapeError, match="dimension"):
        tensor("f32", shape)
