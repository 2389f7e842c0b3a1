"""Connectionist temporal classification (Graves, Fernandez, Gomez and Schmidhuber 2006): the loss of an unaligned sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ..ir.dtypes import i32
from ..ir.errors import AttributeValueError, DTypeError, ShapeError
from .context import error
from .control import scan
from .core import TensorLike, as_tensor, broadcast_to, cast, show
from .elementwise import equal, exp, less, log, logical_and, logical_or, maximum, not_equal, stop_gradient, where
from .movement import concatenate, expand_dims, iota, pad, reshape, slice_axis, take_along_axis
from .reductions import mean, reduced, sum

if TYPE_CHECKING:
    from .tensor import Tensor

# Stands for log 0. Sums of it stay finite, so that no gradient is NaN, and exp of a difference to it is 0.
_NEVER: Final = -1e30


def _log_sum(terms: list[Tensor]) -> Tensor:
    """log(sum(exp(terms))): the greatest term is taken out, as a constant; derivatives are shares, from 0 to 1."""
    top = terms[0]
    for t in terms[1:]:
        top = maximum(top, t)
    top = stop_gradient(top)
    total = exp(terms[0] - top)
    for t in terms[1:]:
        total = total + exp(t - top)
    return log(total) + top


def _later(x: Tensor, by: int) -> Tensor:
    """x[:, s - by] at s; log 0 where there is none."""
    return pad(slice_axis(x, 1, 0, x.shape[1] - by), [(0, 0), (by, 0)], _NEVER)


def _lengths(value: TensorLike, count: Any, what: str) -> Tensor:
    t = as_tensor(value, what=what)
    if not t.dtype.is_integer:
        raise error(DTypeError, f"ctc: {what} holds integers, not {t.dtype}", given=t)
    if t.shape != (count,):
        raise error(ShapeError, f"ctc: {what} has one number per example, shape {show((count,))}", given=t)
    return cast(t, i32)


def ctc(
    log_probs: TensorLike,
    targets: TensorLike,
    input_lengths: TensorLike,
    target_lengths: TensorLike,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """-log P(targets | log_probs), over all alignments: repeats are merged, then blanks dropped.

    log_probs       (T, N, C), logarithms of probabilities (log_softmax over the last axis)
    targets         (N, S) class numbers other than `blank`, each row filled up with anything after its length
    input_lengths   (N,) how many of the T steps count, at most T; longer ones count as T
    target_lengths  (N,) how many of the S classes count, at most S
    reduction       'mean' divides each loss by its target length (1 at least) and averages over the batch; 'sum'; 'none': (N,)
    zero_infinity   0 instead of inf, where the input is too short for its target; in both cases its gradient is 0

    PyTorch's `ctc_loss`, but for targets joined to one row. The forward recursion runs in logarithms as one `scan` over
    time. A class number outside [0, C) is clipped into it.

    Raises ShapeError or DTypeError for operands that do not fit.
    """
    x, labels = as_tensor(log_probs, what="log_probs"), as_tensor(targets, what="targets")
    if x.ndim != 3 or not x.dtype.is_float:
        kind = ShapeError if x.ndim != 3 else DTypeError
        raise error(kind, "ctc: log_probs holds floats of shape (T, N, C): time, examples, classes", log_probs=x)
    steps, examples, classes = x.shape
    if labels.ndim != 2 or labels.shape[0] != examples or not labels.dtype.is_integer:
        kind = DTypeError if labels.ndim == 2 and labels.shape[0] == examples else ShapeError
        raise error(kind, f"ctc: targets holds class numbers of shape ({examples}, S)", log_probs=x, targets=labels)
    if isinstance(classes, int) and not 0 <= blank < classes:
        raise error(AttributeValueError, f"ctc: blank is a class number, 0 to {classes - 1}, not {blank!r}", log_probs=x)
    if steps == 0:
        raise error(ShapeError, "ctc: log_probs needs one step or more", log_probs=x)
    times = _lengths(input_lengths, examples, "input_lengths")
    sizes = _lengths(target_lengths, examples, "target_lengths")

    # The labels with a blank before, between and after: position s is odd for a label.
    labels = cast(labels, i32)
    width = labels.shape[1] * 2 + 1
    pairs = concatenate([broadcast_to(as_tensor(blank, i32), (*labels.shape, 1)), expand_dims(labels, 2)], 2)
    path = concatenate([reshape(pairs, (examples, width - 1)), broadcast_to(as_tensor(blank, i32), (examples, 1))], 1)
    place = iota((examples, width), 1, i32)
    # A label may follow the one before it at once, over the blank between, unless the two are equal.
    before = pad(slice_axis(path, 1, 0, width - 2), [(0, 0), (2, 0)], blank) if width != 1 else path
    skips = logical_and(not_equal(path, blank), not_equal(path, before))
    ends = expand_dims(sizes * 2, 1)
    scores = maximum(take_along_axis(x, broadcast_to(expand_dims(path, 0), (steps, examples, width)), 2), _NEVER)

    def step(carry: Tensor, at: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        score, t = at
        terms = [carry]
        if width != 1:
            terms += [_later(carry, 1), where(skips, _later(carry, 2), _NEVER)]
        new = maximum(_log_sum(terms) + score, _NEVER)
        return where(less(t, expand_dims(times, 1)), new, carry), None

    # Before the first step only the "place before the first blank" is possible: it leads to the first two places.
    first = slice_axis(scores, 0, 0, 1).reshape(examples, width)
    start = where(less(place, 2), first, _NEVER)
    last = start
    if steps != 1:
        rest = slice_axis(scores, 0, 1, steps)
        last, _ = scan(step, start, (rest, iota((steps - 1,), 0, i32) + 1))
    final = logical_or(equal(place, ends), equal(place, ends - 1))
    reached = where(final, last, _NEVER)
    top = stop_gradient(reached.max(1, keepdims=True))
    loss = -(log(sum(where(final, exp(reached - top), 0.0), 1)) + reshape(top, (examples,)))
    silent = times < 1  # nothing was heard, which fits the empty target
    loss = where(logical_and(silent, equal(sizes, 0)), 0.0, loss)
    impossible = logical_or(loss > -0.5 * _NEVER, logical_and(silent, sizes > 0))
    loss = where(impossible, 0.0 if zero_infinity else float("inf"), loss)
    if reduction != "mean":
        return reduced(loss, reduction)
    return mean(loss / maximum(cast(sizes, loss.dtype), 1.0))
