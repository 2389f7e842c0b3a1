"""Counter-based random numbers: Philox 4x32-10.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Element i of a
draw is one block: counter (i mod 2^32, i / 2^32, stream, 0), key the two halves of a 64-bit key. A draw depends on
(key, stream, i) alone: on no order of execution, and on no number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..dtypes import DType, f32, f64, u32, u64
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, cast, const, unary
from ..graph import Attrs, Node
from ..lowering import Load, Map
from ..op import REQUIRED, Array, Op, Sample, Trait, register
from ..types import TensorType, Type
from . import common as c

_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key each round
_UNIT: Final = 2.0**-24


def philox(counter: Sequence[Array], key: tuple[int, int]) -> list[Array]:
    """The four u32 words of each block; `counter` holds four arrays of u32."""
    x = [np.asarray(w, np.uint64) for w in counter]
    low = np.uint64(0xFFFFFFFF)
    k = list(key)
    for _ in range(_ROUNDS):
        first, second = x[0] * np.uint64(_MULTIPLIERS[0]), x[2] * np.uint64(_MULTIPLIERS[1])
        x = [
            (second >> np.uint64(32)) ^ x[1] ^ np.uint64(k[0]),
            second & low,
            (first >> np.uint64(32)) ^ x[3] ^ np.uint64(k[1]),
            first & low,
        ]
        k = [(word + step) & 0xFFFFFFFF for word, step in zip(k, _WEYL, strict=True)]
    return [w.astype(np.uint32) for w in x]


def _philox_expr(counter: list[Expr], key: list[Expr]) -> list[Expr]:
    x, k = counter, key
    for round_ in range(_ROUNDS):
        if round_:
            k = [word + const(step, u32) for word, step in zip(k, _WEYL, strict=True)]
        products = [cast(word, u64) * const(m, u64) for word, m in zip((x[0], x[2]), _MULTIPLIERS, strict=True)]
        first, second = ((cast(p >> const(32, u64), u32), cast(p, u32)) for p in products)
        x = [second[0] ^ x[1] ^ k[0], second[1], first[0] ^ x[3] ^ k[1], first[1]]
    return x


def _words(arrays: Sequence[Array], attrs: Attrs) -> list[Array]:
    shape = c.static(attrs["shape"])
    index = np.arange(int(np.prod(shape, dtype=object)), dtype=np.uint64).reshape(shape)
    key = int(arrays[0])
    zero = np.zeros(shape, np.uint64)
    counter = [index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), zero + np.uint64(attrs["stream"]), zero]
    return philox(counter, (key & 0xFFFFFFFF, key >> 32))


def _words_expr(node: Node, idx: tuple[Expr, ...], load: Load) -> list[Expr]:
    index: Expr = const(0)
    for i, n in zip(idx, c.static(node.shape), strict=True):
        index = index * n + i
    wide, key = cast(index, u64), load(0, ())
    half = const(32, u64)
    counter = [cast(wide, u32), cast(wide >> half, u32), const(node.attrs["stream"], u32), const(0, u32)]
    return _philox_expr(counter, [cast(key, u32), cast(key >> half, u32)])


def _infer(name: str) -> c.Infer:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        if types[0].dtype is not u64:
            raise DTypeError(f"operand 0 of {name} (the key) has dtype {types[0].dtype}, expected u64")
        if types[0].shape != ():
            raise ShapeError(f"operand 0 of {name} (the key) has shape {c.show(types[0].shape)}, expected a scalar")
        stream = attrs["stream"]
        if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < 2**32:
            raise AttributeValueError(f"stream of {name} is an int in [0, 2**32), not {stream!r}")
        dtype = c.check_dtype_attr(name, attrs["dtype"])
        if dtype not in c.DRAWN:
            raise DTypeError(f"dtype of {name} is f32 or f64, not {dtype}; cast the result")
        return TensorType(dtype, c.check_shape(name, attrs["shape"]))

    return infer


def _uniform(words: list[Array], dtype: Any) -> Array:
    return np.asarray((words[0] >> np.uint32(8)).astype(dtype) * dtype.type(_UNIT))


def _uniform_expr(words: list[Expr], node: Node) -> Expr:
    return _top_bits(words[0], node) * const(_UNIT, node.dtype)


def _top_bits(word: Expr, node: Node) -> Expr:
    return cast(word >> const(8, u32), node.dtype)


def _normal(words: list[Array], dtype: Any) -> Array:
    u = ((words[0] >> np.uint32(8)).astype(dtype) + dtype.type(1)) * dtype.type(_UNIT)
    v = (words[1] >> np.uint32(8)).astype(dtype) * dtype.type(_UNIT)
    return np.asarray(np.sqrt(dtype.type(-2) * np.log(u)) * np.cos(dtype.type(2 * math.pi) * v))


def _normal_expr(words: list[Expr], node: Node) -> Expr:
    """Box-Muller; u in (0, 1], so that its logarithm is finite."""
    unit = const(_UNIT, node.dtype)
    u = (_top_bits(words[0], node) + const(1.0, node.dtype)) * unit
    v = _top_bits(words[1], node) * unit
    radius = unary("sqrt", const(-2.0, node.dtype) * unary("log", u))
    return radius * unary("cos", const(2 * math.pi, node.dtype) * v)


def _random(
    name: str, doc: str, value: Callable[[list[Array], Any], Array], expr: Callable[[list[Expr], Node], Expr], budget: float
) -> Op:
    def reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
        return value(_words(arrays, attrs), attrs["dtype"].numpy)

    def lower(node: Node) -> Map:
        return Map(lambda idx, load: expr(_words_expr(node, idx, load), node))

    def samples() -> list[Sample]:
        key = np.array(0x9E3779B97F4A7C15, np.uint64)
        reason = "log and cos of f32 arguments" if budget > 2e-6 else ""

        def sample(shape: tuple[int, ...], stream: int = 0, key: Any = key, dtype: DType = f32) -> Sample:
            attrs = {"shape": shape, "stream": stream, "dtype": dtype}
            return Sample(c.fixed(key), attrs, budget=budget, reason=reason, gradient=False, label=dtype.name)

        return [
            sample((33,)), sample((), 1), sample((7, 9), 2**32 - 1), sample((2, 3, 8), 5, np.array(0, np.uint64)), sample((0, 3)),
            sample((16,), 3, np.array(2**64 - 1, np.uint64)), sample((17,), dtype=f64),
        ]  # fmt: skip

    return register(
        Op(
            name=name,
            infer=_infer(name),
            reference=reference,
            lower=lower,
            grad=c.no_flow,
            doc=doc,
            arity=1,
            traits=frozenset({Trait.RANDOM}),
            attrs={"shape": REQUIRED, "stream": 0, "dtype": f32},
            samples=samples,
        )
    )


random_uniform = _random(
    "random_uniform", "Uniform in [0, 1), multiples of 2^-24, from a u64 key and a stream number.", _uniform, _uniform_expr, 2e-6
)
random_normal = _random(
    "random_normal", "Standard normal (Box-Muller), from a u64 key and a stream number.", _normal, _normal_expr, 5e-6
)
