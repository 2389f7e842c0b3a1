"""Operators, methods, promotion and broadcasting of Tensor against numpy."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.dtypes import as_dtype
from tensorwright.ir.errors import DTypeError, ShapeError, TraceError

from .support import run

RNG = np.random.default_rng(0)
A = RNG.uniform(0.5, 3.0, (2, 3)).astype(np.float32)
B = RNG.uniform(0.5, 3.0, (3,)).astype(np.float32)
I = np.array([[3, -7, 0], [2, 9, -1]])
BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow]
COMPARE = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


def same(got: Any, want: Any, tolerance: float = 1e-6) -> None:
    """Same shape and dtype; values to a few f32 roundings."""
    want = np.asarray(want)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", [*BINARY, *COMPARE], ids=lambda o: o.__name__)
def test_operators_broadcast_as_numpy(op: Callable[..., Any]) -> None:
    same(run(op, A, B), op(A, B))
    same(run(lambda x: op(x, 2), A), op(A, 2))
    same(run(lambda x: op(2.5, x), A), op(np.float32(2.5), A))
    same(run(lambda x: op(B, x), A), op(B, A))  # the ndarray on the left must not swallow the Tensor


@pytest.mark.parametrize("op", [operator.add, operator.mul, operator.floordiv, operator.mod, *COMPARE], ids=lambda o: o.__name__)
def test_integer_operators(op: Callable[..., Any]) -> None:
    same(run(op, I, np.array([2, 3, -4])), op(I, np.array([2, 3, -4])))


@pytest.mark.parametrize("op", [operator.and_, operator.or_, operator.xor], ids=lambda o: o.__name__)
def test_bitwise_operators_on_bools_and_integers(op: Callable[..., Any]) -> None:
    same(run(op, A > 1, B > 1), op(A > 1, B > 1))
    same(run(op, I, np.int64(6)), op(I, 6))
    same(run(lambda x: op(3, x), I), op(3, I))


def test_unary_operators() -> None:
    same(run(lambda x: -x, A), -A)
    same(run(abs, I), abs(I))
    same(run(operator.invert, A > 1), ~(A > 1))
    same(run(operator.invert, I), ~I)
    same(run(operator.pos, A), A)


DTYPES = ["bool", "u8", "i8", "i32", "i64", "f16", "f32", "f64"]


@pytest.mark.parametrize("left", DTYPES)
@pytest.mark.parametrize("right", DTYPES)
def test_arrays_promote_as_in_numpy(left: str, right: str) -> None:
    a, b = np.ones(2, as_dtype(left).numpy), np.ones(2, as_dtype(right).numpy)
    chosen = tw.trace(tw.where, tw.spec(2, dtype="bool"), a, b).outputs[0]
    assert chosen.dtype.numpy == (a + b).dtype
    assert run(operator.add, a, b).dtype == (a + b).dtype


@pytest.mark.parametrize(
    ("dtype", "scalar", "want"),
    [
        ("f32", 2, "f32"),
        ("f64", 2.5, "f64"),
        ("i32", 2, "i32"),
        ("i8", 3, "i8"),
        ("u8", True, "u8"),
        ("i64", 2.5, "f32"),
        ("bool", 2, "i64"),
        ("bool", 2.5, "f32"),
        ("f32", np.float64(2.5), "f32"),
        ("f32", np.float32(2), "f32"),
    ],
)
def test_python_numbers_are_weak(dtype: str, scalar: Any, want: str) -> None:
    g = tw.trace(lambda x: x * scalar, tw.spec(2, dtype=dtype))
    assert g.outputs[0].dtype.name == want


def test_true_division_of_integers_is_f32() -> None:
    assert tw.trace(lambda x: x / 2, tw.spec(3, dtype="i64")).outputs[0].dtype.name == "f32"


def test_a_python_integer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DTypeError, match="300 does not fit u8"):
        tw.trace(lambda x: x + 300, tw.spec(2, dtype="u8"))


def test_a_dtype_without_common_type_is_refused_with_what_to_do() -> None:
    with pytest.raises(DTypeError, match="astype"):
        tw.trace(lambda x, y: x + y, tw.spec(2, dtype="f8e4m3fn"), tw.spec(2, dtype="f8e5m2"))


X = RNG.standard_normal((3, 4, 5)).astype(np.float32)
INDICES = [
    np.s_[0],
    np.s_[-1],
    np.s_[1:],
    np.s_[:-1],
    np.s_[::2],
    np.s_[::-1],
    np.s_[2:0:-1],
    np.s_[..., 2],
    np.s_[:, None],
    np.s_[None, ..., None],
    np.s_[1, 2:4, ::-2],
    np.s_[-2:, ..., 0],
    np.s_[5:],
    np.s_[0:0],
    np.s_[:, 1:100:3],
    np.s_[:, ::-3],
    np.s_[...],
]


@pytest.mark.parametrize("key", INDICES, ids=str)
def test_basic_indexing(key: Any) -> None:
    same(run(lambda x: x[key], X), X[key])


@pytest.mark.parametrize(
    "make",
    [
        lambda x, i, j: x[i],
        lambda x, i, j: x[:, i],
        lambda x, i, j: x[i, j],
        lambda x, i, j: x[i, :, j],
        lambda x, i, j: x[..., i, j],
        lambda x, i, j: x[i, 1:3, 0],
        lambda x, i, j: x[1:, i],
        lambda x, i, j: x[0, i, j],
    ],
)
def test_integer_tensor_indexing_wraps_negatives_as_numpy(make: Callable[..., Any]) -> None:
    i, j = np.array([[0, -1], [2, 1]]), np.array([1, -2])
    same(run(make, X, i, j), make(X, i, j))


def test_an_index_out_of_range_and_masks_are_refused() -> None:
    with pytest.raises(ShapeError, match="index 3 is out of range for dimension 0 of size 3"):
        tw.trace(lambda x: x[3], tw.spec(3, 2))
    with pytest.raises(ShapeError, match="3 indices for a Tensor of 2"):
        tw.trace(lambda x: x[0, 0, 0], tw.spec(3, 2))
    with pytest.raises(TraceError, match="where"):
        tw.trace(lambda x: x[x > 0], tw.spec(3))
    with pytest.raises(TraceError, match="in place"):
        tw.trace(lambda x: x.__setitem__(0, 1.0), tw.spec(3))


METHODS: list[tuple[str, Callable[[Any], Any]]] = [
    ("reshape", lambda x: x.reshape(4, -1)),
    ("reshape tuple", lambda x: x.reshape((2, 2, 15))),
    ("T", lambda x: x.T),
    ("transpose", lambda x: x.transpose(1, 2, 0)),
    ("swapaxes", lambda x: x.swapaxes(0, 2)),
    ("flatten", lambda x: x.flatten()),
    ("sum", lambda x: x.sum()),
    ("sum axis", lambda x: x.sum(axis=(0, -1))),
    ("mean", lambda x: x.mean(axis=1, keepdims=True)),
    ("max", lambda x: x.max(axis=2)),
    ("min", lambda x: x.min()),
    ("prod", lambda x: x.prod(axis=0)),
    ("var", lambda x: x.var(axis=1)),
    ("std", lambda x: x.std(axis=1, ddof=1)),
    ("argmax", lambda x: x.argmax(axis=1)),
    ("argmax flat", lambda x: x.argmax()),
    ("argmin", lambda x: x.argmin(axis=-1, keepdims=True)),
    ("cumsum", lambda x: x.cumsum(axis=1)),
    ("cumsum flat", lambda x: x.cumsum()),
    ("clip", lambda x: x.clip(-0.5, 0.5)),
    ("round", lambda x: x.round()),
    ("astype", lambda x: x.astype("int32")),
    ("repeat", lambda x: x.repeat(2, axis=1)),
    ("any", lambda x: (x > 1).any(axis=0)),
    ("all", lambda x: (x > -1).all()),
    ("take", lambda x: x.take(np.array([0, 2]), axis=1)),
]


@pytest.mark.parametrize("make", [m for _, m in METHODS], ids=[n for n, _ in METHODS])
def test_methods_are_numpys(make: Callable[[Any], Any]) -> None:
    same(run(make, X), make(X), 2e-5)


def test_sums_of_integers_and_bools_are_kept_in_64_bits() -> None:
    x = np.full((300,), 100, np.int8)
    same(run(lambda t: t.sum(), x), x.sum())
    same(run(lambda t: (t > 0).sum(), x), (x > 0).sum())


def test_shape_properties() -> None:
    seen: list[Any] = []
    tw.trace(lambda x: (seen.append((x.shape, x.ndim, x.size, len(x), str(x.dtype))), x)[1], tw.spec(2, 3))
    assert seen == [((2, 3), 2, 6, 2, "f32")]
    rows = run(lambda x: tw.stack([row * 2 for row in x]), A)
    same(rows, A * 2)


@pytest.mark.parametrize(
    ("use", "hint"),
    [
        (lambda x: 1 if x.sum() > 0 else 2, r"tw\.where"),
        (lambda x: float(x.sum()), "Tensor"),
        (lambda x: int(x[0]), "astype"),
        (np.asarray, "numpy"),
        (np.sum, r"tw\.sum"),
        (lambda x: [1, 2, 3][x[0]], "take"),
        (lambda x: x.item(), "return it"),
        (lambda x: 1.0 in x, "any"),
        (np.add.reduce, "tw"),
    ],
)
def test_what_needs_a_value_is_refused_with_what_to_do(use: Callable[[Any], Any], hint: str) -> None:
    with pytest.raises(TraceError, match=hint) as caught:
        tw.trace(use, tw.spec(3))
    assert "f32[3]" in str(caught.value) or "f32[]" in str(caught.value) or "bool[]" in str(caught.value)
    assert __file__ in str(caught.value)


def test_numpy_ufuncs_record() -> None:
    same(run(lambda x: np.exp(np.add(x, 1.0)) * np.float32(2), A), np.exp(A + 1) * 2, 1e-6)


def test_functions_outside_a_trace_say_to_compile() -> None:
    with pytest.raises(TraceError, match=r"tw\.compile"):
        tw.relu(A)
