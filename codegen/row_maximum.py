"""What follows from the maximum of a row in the passes after it: a softmax's exponents are not positive, and NaN needs no care.

Let m be the maximum of v over a row. An exp of v - m then has no upper limit to look at. And where every result of the region
contains a sum over the row of something that is NaN wherever v is (a softmax's exp(v - m)), m itself may be any number in a
row with a NaN: the results are NaN either way. A maximum that may forget a NaN is one instruction, one that must not is three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ..ir.dtypes import f32, f64
from ..ir.expr import Expr, binary, postorder, rewrite, var
from .accumulate import Accumulator
from .loop_ir import Buffer

Item = tuple[Buffer, Expr, Expr]  # what is stored: buffer, flat index, value
# The code of one pass: scalars of the row to compute before it, stores per column, reductions, stores per row after it.
Code = tuple[list[tuple[Expr, Expr]], list[Item], list[Accumulator], list[Item]]

# operations whose result is NaN if an operand is
_STRICT: Final = frozenset(
    {"add", "sub", "mul", "div", "fma", "max", "min", "neg", "abs", "sqrt", "exp", "log", "log1p", "expm1"}
)


def use_maximum(plans: Sequence[Code], results: Sequence[bool]) -> list[Code]:
    """The passes with exponents marked and maxima relaxed where that follows. `results[k]`: whether pass k stores any output."""
    done = list(plans)
    for k, (_, _, accs, _) in enumerate(plans):
        for j, a in enumerate(accs):
            if a.kind != "max" or a.dtype not in (f32, f64) or a.held is not a.dtype:
                continue
            exponent = binary("sub", a.value, var(a.name, a.dtype))
            done[k + 1 :] = [_marked(code, exponent) for code in done[k + 1 :]]
            if _always_lost(done, k, a, results):
                lets, stores, group, ends = done[k]
                done[k] = (lets, stores, [*group[:j], replace(group[j], forgets=True), *group[j + 1 :]], ends)
    return done


def _marked(code: Code, exponent: Expr) -> Code:
    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op != "exp":
            return None
        scaled = args[0].op == "mul" and args[0].args[0] is exponent and args[0].args[1].is_const and args[0].args[1].attr > 0
        if args[0] is exponent or scaled:
            return Expr("exp", args, e.dtype, e.lanes, "nonpositive")
        return None

    memo: dict[Expr, Expr] = {}
    lets, stores, accs, ends = code
    return (
        [(v, rewrite(e, rule, memo)) for v, e in lets],
        [(b, i, rewrite(v, rule, memo)) for b, i, v in stores],
        [replace(a, value=rewrite(a.value, rule, memo)) for a in accs],
        [(b, i, rewrite(v, rule, memo)) for b, i, v in ends],
    )


def _always_lost(plans: Sequence[Code], at: int, a: Accumulator, results: Sequence[bool]) -> bool:
    """Whether a NaN in the values of `a`, a reduction of pass `at`, makes every result of the region NaN without its help."""
    if any(results[: at + 1]):
        return False
    tainted: set[Expr] = set()  # scalars of the row that are NaN if one of the values is
    for k, (lets, stores, accs, ends) in enumerate(plans[at + 1 :], at + 1):
        for v, e in lets:
            if _strict([e], tainted)[0]:
                tainted.add(v)
        if results[k] and not (tainted and all(_strict([v for _, _, v in (*stores, *ends)], tainted))):
            return False
        sums = [b for b in accs if b.kind == "sum"]
        for b, yes in zip(sums, _strict([b.value for b in sums], {a.value, *tainted}), strict=True):
            if yes:
                tainted.add(var(b.name, b.dtype))
    return True


def _strict(roots: Sequence[Expr], sources: set[Expr]) -> list[bool]:
    """Whether each is NaN wherever one of the sources is."""
    known: dict[Expr, bool] = {}
    for e in postorder(roots):
        known[e] = e in sources or (e.op in _STRICT and any(known[x] for x in e.args))
    return [known[e] for e in roots]
