"""Matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.dims import Dim, product
from ..ir.dtypes import bool_, i8, u8
from ..ir.errors import AttributeValueError, DTypeError, ShapeError
from .context import error
from .core import TensorLike, Value, apply, as_tensor, cast, promote, show
from .elementwise import add, multiply
from .movement import expand_dims, reshape, squeeze, transpose
from .reductions import sum

if TYPE_CHECKING:
    from .tensor import Tensor


def matmul(a: TensorLike, b: TensorLike) -> Tensor:
    """The matrix product a @ b over the last two dimensions; the others broadcast. Vectors are taken as in numpy.

    Of i8 and u8, also one of each, the sums are i32, modulo 2^32.

    Raises ShapeError when the inner dimensions differ, with the transposition that would fit if there is one.
    """
    x, y = as_tensor(a, what="left operand of matmul"), as_tensor(b, what="right operand of matmul")
    octets = x.dtype in (i8, u8) and y.dtype in (i8, u8)
    common = x.dtype if octets else promote(x, y)
    if common is bool_:
        raise error(DTypeError, "matmul of bools; use .astype() first", left=x, right=y)
    if x.ndim == 0 or y.ndim == 0:
        raise error(ShapeError, "matmul takes operands of one dimension or more; use * for scalars", left=x, right=y)
    inner = x.shape[-1], y.shape[-2] if y.ndim > 1 else y.shape[0]
    if inner[0] != inner[1]:
        raise error(ShapeError, f"matmul: {_misfit(x, y, *inner)}", left=x, right=y)
    x, y = cast(x, common), y if octets else cast(y, common)
    row, column = x.ndim == 1, y.ndim == 1
    x = expand_dims(x, 0) if row else x
    y = expand_dims(y, 1) if column else y
    result = apply("matmul", x, y)
    return squeeze(result, tuple([-2] * row + [-1] * column)) if row or column else result


dot = matmul


def _misfit(x: Value, y: Value, left: Dim, right: Dim) -> str:
    text = f"the last dimension of the left operand is {left}, the one of the right that it meets is {right}; they must be equal"
    if y.ndim > 1 and y.shape[-1] == left:
        return f"{text}. The right operand transposed would fit: a @ b.T has shape {show((*x.shape[:-1], y.shape[-2]))}"
    if x.ndim > 1 and x.shape[-2] == right:
        return f"{text}. The left operand transposed would fit: a.T @ b"
    rows = show((left, *y.shape[-1:])) if y.ndim > 1 else show((left,))
    return f"{text}. A right operand of shape {rows} would fit"


def linear(x: TensorLike, weight: TensorLike, bias: TensorLike | None = None) -> Tensor:
    """x @ weight.T + bias, with weight (out, in) and bias (out,). Leading dimensions of x are kept."""
    t, w = as_tensor(x, what="linear"), as_tensor(weight, what="weight")
    if w.ndim != 2 or t.ndim < 1 or t.shape[-1] != w.shape[1]:
        message = (
            f"linear: x must end in {w.shape[-1] if w.ndim else '?'} features for a weight of shape {show(w.shape)} (out, in)"
        )
        fits = ""
        if w.ndim == 2 and t.ndim > 1 and product(t.shape[1:]) == w.shape[1]:
            fits = f"; x.reshape(x.shape[0], -1), of shape {show((t.shape[0], w.shape[1]))}, would fit"
        elif w.ndim == 2:
            fits = f"; a shape such as {show((*t.shape[:-1], w.shape[1]))} would fit"
        raise error(ShapeError, message + fits, x=t, weight=w)
    result = matmul(t, transpose(w))
    return result if bias is None else add(result, bias)


def outer(a: TensorLike, b: TensorLike) -> Tensor:
    """result[i, j] = a[i] * b[j], of flattened operands."""
    x, y = as_tensor(a, what="outer"), as_tensor(b, what="outer")
    return multiply(reshape(x, (-1, 1)), reshape(y, (1, -1)))


def einsum(subscripts: str, *operands: TensorLike) -> Tensor:
    """Sums of products named by letters, as in numpy: 'bij,bjk->bik'. Explicit letters only, no '...' and no repeated letter
    within an operand. Operands are combined from left to right, each pair as one batched matrix product.
    """
    text = subscripts.replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = "".join(terms)
        out = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    bad = [s for s in [*terms, out] if not (s.isalpha() or s == "") or len(set(s)) != len(s)]
    if bad or len(terms) != len(operands) or set(out) - set("".join(terms)):
        message = f"einsum: {subscripts!r} for {len(operands)} operands; expected one term each, as in 'bij,bjk->bik'"
        raise error(AttributeValueError, message)
    tensors = [as_tensor(x, what="einsum") for x in operands]
    sizes: dict[str, Dim] = {}
    for term, t in zip(terms, tensors, strict=True):
        if t.ndim != len(term):
            raise error(ShapeError, f"einsum: {term!r} names {len(term)} dimensions of an operand that has {t.ndim}", operand=t)
        for c, d in zip(term, t.shape, strict=True):
            if sizes.setdefault(c, d) != d:
                raise error(ShapeError, f"einsum: {c!r} is {sizes[c]} in one operand and {d} in another", operand=t)
    name, value = terms[0], tensors[0]
    for i in range(1, len(terms)):
        keep = set(out).union(*terms[i + 1 :])
        name, value = _contract_pair(name, value, terms[i], tensors[i], keep)
    dropped = tuple(i for i, c in enumerate(name) if c not in out)
    if dropped:
        value = sum(value, dropped)
        name = "".join(c for c in name if c in out)
    return transpose(value, [name.index(c) for c in out])


def _contract_pair(an: str, a: Tensor, bn: str, b: Tensor, keep: set[str]) -> tuple[str, Tensor]:
    for which in (0, 1):
        name, other, value = (an, bn, a) if which == 0 else (bn, an, b)
        alone = [c for c in name if c not in other and c not in keep]
        if alone:
            value = sum(value, tuple(name.index(c) for c in alone))
            name = "".join(c for c in name if c not in alone)
        if which == 0:
            an, a = name, value
        else:
            bn, b = name, value
    batch = [c for c in an if c in bn and c in keep]
    inner = [c for c in an if c in bn and c not in keep]
    rows = [c for c in an if c not in bn]
    columns = [c for c in bn if c not in an]
    left = transpose(a, [an.index(c) for c in (*batch, *rows, *inner)])
    right = transpose(b, [bn.index(c) for c in (*batch, *inner, *columns)])
    nb = len(batch)
    shape = (*left.shape[: nb + len(rows)], *right.shape[nb + len(inner) :])
    left = reshape(left, (*left.shape[:nb], product(left.shape[nb : nb + len(rows)]), product(left.shape[nb + len(rows) :])))
    right = reshape(
        right, (*right.shape[:nb], product(right.shape[nb : nb + len(inner)]), product(right.shape[nb + len(inner) :]))
    )
    return "".join((*batch, *rows, *columns)), reshape(matmul(left, right), shape)
