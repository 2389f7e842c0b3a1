"""Our own vector math: exp, log, log1p, expm1, sin, cos, tanh, erf, sigmoid and pow as primitive expressions.

The same expressions serve every lane count and every target row, so a result does not depend on either: a row without FMA
emulates that of f32 to the bit, and f64 does without. f16 and bf16 are computed in f32 and rounded.

BOUNDS holds upper bounds of the error in units of the last place, NaN, infinities, denormals and -0 included;
tests/codegen/test_vecmath.py holds them at every exponent. benchmarks/vecmath_sweep.py looks at every float; at every 61st
(70 million) it found exp 0.89, log 0.77, log1p 1.36, expm1 1.95, sin 1.57, cos 1.57, tanh 1.91, erf 2.19, sigmoid 2.30.
"""

from __future__ import annotations

from typing import Final

from ..ir.dtypes import DType, bf16, f16, f32, f64
from ..ir.errors import CompileError
from ..ir.expr import MATH, Expr, cast, rebuild
from . import vecmath_f32, vecmath_f64

BOUNDS: Final[dict[str, dict[str, float]]] = {
    "f32": {
        "exp": 1.0, "log": 1.0, "log1p": 1.5, "expm1": 2.2, "sin": 1.7, "cos": 1.7, "tanh": 2.1, "erf": 2.4, "sigmoid": 2.5,
        "pow": 0.6,
    },
    "f64": {
        "exp": 1.2, "log": 1.0, "log1p": 1.6, "expm1": 2.9, "sin": 2.8, "cos": 2.8, "tanh": 3.4, "erf": 3.6, "sigmoid": 2.7,
        "pow": 1.4,
    },
}  # fmt: skip


def expand(e: Expr, memo: dict[Expr, Expr] | None = None) -> Expr:
    """The expression with every math function written in primitive operations (and `scale`).

    Raises CompileError for a function of a dtype that has no expansion (f64, integers).
    """
    done = {} if memo is None else memo
    found = done.get(e)
    if found is not None:
        return found
    stack = [e]
    while stack:
        x = stack[-1]
        if x in done:
            stack.pop()
            continue
        waiting = [a for a in x.args if a not in done]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        args = tuple(done[a] for a in x.args)
        if x.op in MATH or x.op == "pow":
            done[x] = _expanded(x.op, x.dtype, args, x.attr)
        elif all(a is b for a, b in zip(args, x.args, strict=True)):
            done[x] = x
        else:
            done[x] = Expr(x.op, args, x.dtype, x.lanes, x.attr) if x.attr is not None else rebuild(x, args)
    return done[e]


def _expanded(op: str, dtype: DType, args: tuple[Expr, ...], known: str | None) -> Expr:
    """`known` of an exp is 'nonpositive' where its argument is a difference from a maximum: see `exp_below`."""
    if dtype in (f16, bf16):
        return cast(_expanded(op, f32, tuple(cast(a, f32) for a in args), known), dtype)
    if dtype is not f32 and dtype is not f64:
        raise CompileError(f"{op} of {dtype} has no compiled form; cast to f32 around it")
    home = vecmath_f64 if dtype is f64 else vecmath_f32
    name = "exp_below" if op == "exp" and known == "nonpositive" else "power" if op == "pow" else op
    expanded: Expr = getattr(home, name)(*args)
    return expanded
