"""Matrix products."""

from __future__ import annotations

import re
from string import ascii_letters

from ....ir.dtypes import f32
from ... import elementwise as ew
from ...linalg import einsum, matmul
from ...movement import iota, squeeze, transpose, zeros_like
from ...reductions import sum as total
from ...tensor import Tensor
from ..call import Call
from ..registry import op


@op("MatMul")
def matmul_(n: Call) -> Tensor:
    a, b = n.tensor(0), n.tensor(1)
    if a.dtype is not b.dtype:
        n.fail(f"its inputs have dtypes {a.dtype} and {b.dtype}; they must be equal")
    return matmul(a, b)


@op("Gemm")
def gemm(n: Call) -> Tensor:
    a, b, c = n.tensor(0), n.tensor(1), n.optional(2)
    n.ignore("broadcast")  # opset 6: C is broadcast where its shape says so
    alpha, beta = n.number("alpha", 1.0), n.number("beta", 1.0)
    if a.ndim != 2 or b.ndim != 2:
        n.fail(f"takes matrices, not {a.ndim} and {b.ndim} dimensions")
    a = transpose(a) if n.flag("transA") else a
    b = transpose(b) if n.flag("transB") else b
    y = matmul(a, b)
    if y.dtype.is_integer:
        y = y if alpha == 1.0 else (y.astype(f32) * alpha).astype(y.dtype)
        c = c if c is None or beta == 1.0 else (c.astype(f32) * beta).astype(c.dtype)
    else:
        y = y if alpha == 1.0 else y * alpha
        c = c if c is None or beta == 1.0 else c * beta
    return y if c is None else y + c


@op("Einsum")
def einsum_(n: Call) -> Tensor:
    """Ellipses become letters of their own; a letter twice in one operand takes its diagonal."""
    operands = n.tensors()
    text = re.sub(r"\s", "", n.text("equation"))
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(operands) or not re.fullmatch(r"[A-Za-z.,]*", left + out):
        n.fail(f"equation {text!r} for {len(operands)} operands")
    free = [c for c in ascii_letters if c not in text]
    most = max(
        (t.ndim - len(term.replace("...", "")) for term, t in zip(terms, operands, strict=True) if "..." in term), default=0
    )
    if most > len(free) or most < 0:
        n.fail(f"equation {text!r} does not fit its operands")
    dots = "".join(free[:most])
    given: list[Tensor] = []
    names: list[str] = []
    for term, t in zip(terms, operands, strict=True):
        if "..." in term:
            count = t.ndim - len(term.replace("...", ""))
            term = term.replace("...", dots[len(dots) - count :])
        if len(term) != t.ndim:
            n.fail(f"equation {text!r}: {term!r} names {len(term)} dimensions of an operand that has {t.ndim}")
        for c in dict.fromkeys(term):
            while term.count(c) > 1:
                first, second = (k for k, x in enumerate(term) if x == c) if term.count(c) == 2 else _two(term, c)
                t, term = _diagonal(t, first, second), term[:second] + term[second + 1 :]
        # dimensions of size 1 that broadcast are dropped: they multiply nothing
        given.append(t)
        names.append(term)
    sizes: dict[str, object] = {}
    for term, t in zip(names, given, strict=True):
        for c, d in zip(term, t.shape, strict=True):
            if c not in sizes or sizes[c] == 1:
                sizes[c] = d
    for k, (term, t) in enumerate(zip(names, given, strict=True)):
        ones = tuple(a for a, c in enumerate(term) if t.shape[a] == 1 and sizes[c] != 1)
        if ones:
            given[k], names[k] = squeeze(t, ones), "".join(c for a, c in enumerate(term) if a not in ones)
    if not arrow:
        letters = "".join(t.replace("...", "") for t in terms)
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    out = out.replace("...", dots)
    return einsum(f"{','.join(names)}->{out}", *given)


def _two(term: str, c: str) -> tuple[int, int]:
    first = term.index(c)
    return first, term.index(c, first + 1)


def _diagonal(t: Tensor, first: int, second: int) -> Tensor:
    rows = iota(tuple(t.shape[first] if a == first else 1 for a in range(t.ndim)), first)
    columns = iota(tuple(t.shape[second] if a == second else 1 for a in range(t.ndim)), second)
    return total(ew.where(ew.equal(rows, columns), t, zeros_like(t)), second, dtype=t.dtype)
