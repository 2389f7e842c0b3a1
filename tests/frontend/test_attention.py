"""Attention in blocks: values against numpy in f64, gradients against central differences, and what it leaves out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.frontend import attention as module
from tensorwright.ir.errors import AttributeValueError, ShapeError
from tensorwright.ir.graph import Graph
from tensorwright.ir.types import TensorType

from ..codegen.helpers import host_rows
from .checking import check, near, record
from .support import Array, run

RNG = np.random.default_rng(3)


def floats(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def attend(q: Array, k: Array, v: Array, mask: Array | None = None, causal: bool = False, scale: float | None = None) -> Array:
    """The definition, in f64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    t, s = scores.shape[-2:]
    if causal:
        scores = np.where(np.arange(t)[:, None] >= np.arange(s), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    with np.errstate(invalid="ignore"):  # -inf - -inf, of a row in which nothing is allowed
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(weights / weights.sum(-1, keepdims=True) @ v)


def positive(*shape: int) -> Array:
    """Values whose weighted sum does not cancel, for comparisons relative to it."""
    return floats(*shape) + np.float32(4)


def bools(*shape: int) -> Array:
    """A mask that allows something in each row."""
    mask = RNG.random(shape) < 0.7
    mask[..., 0] = True
    return mask


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16 queries and 384 scores, so that small problems have several, and a shorter last one."""
    for name, value in (("BLOCK", 384), ("WHOLE", 384), ("TALL", 16), ("SHORT", 16)):
        monkeypatch.setattr(module, name, value)
    yield


Q, K, V = (2, 3, 36, 8), (2, 3, 36, 8), (2, 3, 36, 8)
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "self": (Q, K, V),
    "width of values": (Q, K, (2, 3, 36, 5)),
    "more keys": ((2, 3, 37, 8), (2, 3, 70, 8), (2, 3, 70, 8)),
    "fewer keys": ((2, 3, 70, 8), (2, 3, 37, 8), (2, 3, 37, 8)),
    "two blocks": ((2, 3, 20, 8), K, V),
    "one slice": ((50, 8), (45, 8), (45, 8)),
    "one query": ((2, 3, 1, 8), K, V),
    "one key": (Q, (2, 3, 1, 8), (2, 3, 1, 8)),
    "keys for all": (Q, (36, 8), (36, 8)),
    "keys by head": (Q, (3, 36, 8), (3, 36, 8)),
    "keys by batch": (Q, (2, 1, 36, 8), (2, 1, 36, 8)),
    "queries for all": ((36, 8), K, V),
    "mixed": ((2, 1, 36, 8), (3, 36, 8), (2, 1, 1, 36, 8)),
    "no slice": ((0, 3, 36, 8), (0, 3, 36, 8), (0, 3, 36, 8)),
    "no query": ((2, 3, 0, 8), K, V),
    "no width": (Q, K, (2, 3, 36, 0)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, causal: bool, small_blocks: None) -> None:
    q, k, v = (floats(*s) for s in SHAPES[name])
    exe = tw.compile(lambda *a: tw.scaled_dot_product_attention(*a, is_causal=causal), *(tw.spec(*s) for s in SHAPES[name]))
    near([exe(q, k, v)], [attend(q, k, v, causal=causal)], 2e-6)


MASKS: dict[str, tuple[int, ...]] = {
    "keys": (36,),
    "all slices": (36, 36),
    "padding": (2, 1, 1, 36),
    "rows": (36, 1),
    "heads": (3, 36, 36),
    "batch": (2, 1, 36, 36),
    "every score": (2, 3, 36, 36),
    "one": (1, 1, 1, 1),
    "one more dimension": (4, 1, 1, 36, 36),
}


@pytest.mark.parametrize(("kind", "causal"), [(bools, False), (floats, True)])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, kind: Callable[..., Array], causal: bool, small_blocks: None) -> None:
    q, k, v, mask = floats(*Q), floats(*K), floats(*V), kind(*MASKS[name])

    def f(*a: Any) -> Any:
        return tw.scaled_dot_product_attention(*a, is_causal=causal)

    # f64 in the interpreter: what it is, in blocks; and the code that is made of it
    wide = [x if x.dtype == bool else x.astype(np.float64) for x in (q, k, v, mask)]
    near([run(f, *wide)], [attend(q, k, v, mask, causal)], 1e-13)
    exe = tw.compile(f, *(tw.spec(*x.shape, dtype=str(x.dtype)) for x in (q, k, v, mask)))
    near([exe(q, k, v, mask)], [attend(q, k, v, mask, causal)], 2e-6)


@pytest.mark.unvalidated("the interpreter would run 1100 x 1100 scores a slice after every pass")
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_natural_size(causal: bool) -> None:
    """Sizes that make several blocks, a last one that is shorter, and keys for each group of queries."""
    q, k, v = floats(2, 1100, 4), floats(2, 1100, 4), floats(2, 1100, 4)
    specs = [tw.spec(2, 1100, 4)] * 3
    exe = tw.compile(lambda *a: tw.scaled_dot_product_attention(*a, is_causal=causal), *specs)
    near([exe(q, k, v)], [attend(q, k, v, causal=causal)], 4e-6)


@pytest.mark.parametrize("mask", [None, (100, 90), (2, 1, 90)])
def test_loops_over_blocks_of_causal_groups(
    mask: tuple[int, ...] | None, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 64 and 36 queries, each in blocks of 16 that know their position, and a last one of 4."""
    monkeypatch.setattr(module, "SHORT", 64)
    arrays = [floats(2, 100, 4), floats(2, 90, 4), floats(2, 90, 3), *([] if mask is None else [floats(*mask)])]
    exe = tw.compile(lambda *a: tw.scaled_dot_product_attention(*a, is_causal=True), *(tw.spec(*x.shape) for x in arrays))
    near([exe(*arrays)], [attend(*arrays, causal=True)], 2e-6)


def test_scale() -> None:
    q, k, v = floats(*Q), floats(*K), floats(*V)
    near([run(lambda *a: tw.scaled_dot_product_attention(*a, scale=0.7), q, k, v)], [attend(q, k, v, scale=0.7)], 2e-6)


def test_rows_in_which_nothing_is_allowed(small_blocks: None) -> None:
    q, k, v, mask = floats(*Q), floats(*K), floats(*V), bools(2, 1, 36, 36)
    mask[0, 0, 7] = mask[1, 0, 30] = False
    exe = tw.compile(tw.scaled_dot_product_attention, tw.spec(*Q), tw.spec(*K), tw.spec(*V), tw.spec(2, 1, 36, 36, dtype="bool"))
    y, expected = exe(q, k, v, mask), attend(q, k, v, mask)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert np.isnan(y).sum() == 2 * 3 * 8
    near([np.nan_to_num(y)], [np.nan_to_num(expected)], 2e-6)


def test_no_keys() -> None:
    """A sum over nothing is 0."""
    assert not run(tw.scaled_dot_product_attention, floats(2, 5, 4), floats(2, 0, 4), floats(2, 0, 3)).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, (10,), (8, 10, 10), (2, 1, 1, 10), (2, 8, 10, 10)])
def test_grouped_queries(mask: tuple[int, ...] | None, causal: bool) -> None:
    """Eight heads of queries, two of keys and values."""
    q, k, v = floats(2, 8, 10, 4), floats(2, 2, 10, 4), floats(2, 2, 10, 3)
    masks = [] if mask is None else [bools(*mask)]
    y = run(lambda *a: tw.scaled_dot_product_attention(*a, is_causal=causal, enable_gqa=True), q, k, v, *masks)
    near([y], [attend(q, np.repeat(k, 4, 1), np.repeat(v, 4, 1), *masks, causal=causal)], 2e-6)


# -- gradients ------------------------------------------------------------------------------------------------------------

SLOPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    "plain": ((2, 2, 20, 4), (2, 2, 24, 4), (2, 2, 24, 3), None),
    "keys for all": ((2, 2, 20, 4), (24, 4), (2, 1, 24, 3), None),
    "one bias": ((2, 2, 20, 4), (2, 2, 24, 4), (2, 2, 24, 3), (20, 24)),
    "bias by head": ((2, 2, 20, 4), (2, 2, 24, 4), (2, 2, 24, 3), (2, 20, 24)),
    "bias of keys": ((2, 2, 20, 4), (2, 2, 24, 4), (2, 2, 24, 3), (2, 1, 1, 24)),
    "own bias": ((2, 2, 20, 4), (2, 2, 24, 4), (2, 2, 24, 3), (2, 2, 20, 24)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SLOPES)
def test_gradients(name: str, causal: bool, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By query, key, value and an added mask; blocks of 16 queries, one of 4 left over."""
    monkeypatch.setattr(module, "BLOCK", 100)
    monkeypatch.setattr(module, "WHOLE", 100)
    arrays = [make(*s) for make, s in zip((floats, floats, positive, floats), SLOPES[name], strict=True) if s is not None]
    check(lambda *a: tw.scaled_dot_product_attention(*a, is_causal=causal), *arrays)


def test_gradient_through_loops_of_causal_groups(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", 64)
    arrays = [floats(2, 70, 4), floats(2, 70, 4), positive(2, 70, 3), floats(70, 70)]
    check(lambda *a: tw.scaled_dot_product_attention(*a, is_causal=True), *arrays)


def test_gradient_under_a_mask(small_blocks: None) -> None:
    mask = bools(2, 1, 36, 36)
    arrays = [floats(2, 2, 36, 4), floats(2, 2, 36, 4), positive(2, 2, 36, 3)]
    check(lambda q, k, v: tw.scaled_dot_product_attention(q, k, v, mask), *arrays)


def test_gradient_of_grouped_queries() -> None:
    arrays = [floats(4, 12, 4), floats(2, 12, 4), positive(2, 12, 3)]
    check(lambda *a: tw.scaled_dot_product_attention(*a, enable_gqa=True, is_causal=True), *arrays)


def test_second_derivative() -> None:
    """Along the query: d/dq of |d(sum of squares)/dq|^2 against central differences of the gradient."""
    q, k, v = floats(2, 6, 3), floats(2, 5, 3), positive(2, 5, 2)

    def slope(q: Any) -> Any:
        return tw.grad(lambda q: (tw.scaled_dot_product_attention(q, k, v) ** 2).sum())(q)

    check(lambda q: (slope(q) ** 2).sum(), q)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_drops_the_same_backward(causal: bool, small_blocks: None) -> None:
    """Central differences at one key: the gradient, which computes the weights again, must drop what the value dropped."""
    arrays = [floats(2, 20, 4), floats(2, 20, 4), positive(2, 20, 3)]
    check(lambda *a: tw.scaled_dot_product_attention(*a, None, 0.3, causal), *arrays, training=True)


def test_dropout_draws_for_every_weight(small_blocks: None) -> None:
    """With equal scores and the identity for values the result is the weights: 1 / S / 0.75 or 0, elsewhere in each slice."""
    size, eye = 64, np.eye(64, dtype=np.float32)
    q = np.zeros((2, 3, size, 4), np.float32)
    r = record(lambda q, v: tw.scaled_dot_product_attention(q, q, v, None, 0.25), (q, eye), training=True)
    weights = tw.ir.interp.run(r.values, r.arrays)[0] * (size * 0.75)
    assert set(np.round(weights, 5).ravel()) == {0.0, 1.0}
    kept = weights.reshape(6, -1).mean(1)
    assert np.all(np.abs(kept - 0.75) < 4 * np.sqrt(0.75 * 0.25 / size**2))  # four standard deviations
    assert len({w.tobytes() for w in weights.reshape(6 * size // 16, -1)}) == 6 * size // 16  # no block as another


# -- sizes that are not known -----------------------------------------------------------------------------------------------


def test_symbolic_sizes() -> None:
    """A batch of unknown size runs in blocks; lengths of unknown size are computed at once. Both give the right values."""
    f = tw.compile(lambda q, k, v: tw.scaled_dot_product_attention(q, k, v, is_causal=True), *[tw.spec("N", 2, 12, 4)] * 3)
    g = tw.compile(tw.scaled_dot_product_attention, tw.spec(2, "T", 4), *[tw.spec(2, "S", 4)] * 2)
    for n in (1, 3):
        a = [floats(n, 2, 12, 4) for _ in range(3)]
        near([f(*a)], [attend(*a, causal=True)], 2e-6)
        b = [floats(2, 5 + n, 4), floats(2, 7 * n, 4), floats(2, 7 * n, 4)]
        near([g(*b)], [attend(*b)], 2e-6)


def test_symbolic_width_needs_a_scale() -> None:
    specs = [tw.spec(2, 12, "D")] * 3
    with pytest.raises(ShapeError, match="pass scale="):
        tw.compile(tw.scaled_dot_product_attention, *specs)
    a = [floats(2, 12, 6) for _ in range(3)]
    near([tw.compile(lambda *a: tw.scaled_dot_product_attention(*a, scale=0.5), *specs)(*a)], [attend(*a, scale=0.5)], 2e-6)


# -- code ---------------------------------------------------------------------------------------------------------------------


def backward(causal: bool) -> Callable[..., Any]:
    def f(q: Any, k: Any, v: Any, dy: Any) -> Any:
        return (tw.scaled_dot_product_attention(q, k, v, is_causal=causal) * dy).sum()

    return tw.value_and_grad(f, argnums=(0, 1, 2))


@pytest.mark.unvalidated("passes do not depend on threads, and on the target in the width of panels alone")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("target", host_rows())
def test_targets_and_threads(target: str, causal: bool, small_blocks: None) -> None:
    """Right on every instruction set that can be forced here, with the same bits on one and on two threads."""
    a = [floats(2, 4, 48, 16) for _ in range(4)]
    found = []
    for threads in (1, 2):
        with tw.config(target=target, threads=threads):
            total, slopes = tw.compile(backward(causal), *[tw.spec(2, 4, 48, 16)] * 4)(*a)
            found.append([total, *slopes])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)
    y = attend(*a[:3], causal=causal)
    # a sum of 6,144 products that cancel: against their absolute values
    assert abs(found[0][0] - (y * a[3]).sum()) < 1e-6 * np.abs(y * a[3]).sum()
    weights = attend(a[0], a[1], np.eye(48), causal=causal)
    near([found[0][3]], [np.swapaxes(weights, -1, -2) @ a[3]], 4e-6)


# -- memory -------------------------------------------------------------------------------------------------------------------


def tensors(graph: Graph) -> Iterator[tuple[str, TensorType]]:
    """The type of every node of a graph and of the bodies in it."""
    for n in graph.nodes():
        for t in n.type.items if hasattr(n.type, "items") else (n.type,):
            yield n.op.name, t
        for value in n.attrs.values():
            if isinstance(value, Graph):
                yield from tensors(value)


@pytest.mark.unvalidated("the interpreter would run 1024 x 1024 scores a slice after every pass")
@pytest.mark.parametrize("causal", [False, True])
def test_no_score_matrix_in_memory(causal: bool) -> None:
    """Forward and backward at T = S = 1024: no tensor has all scores of even one slice, and memory is far below that of all."""
    heads, size, width = 96, 1024, 32
    exe = tw.compile(backward(causal), *[tw.spec(heads, size, width)] * 4)
    scores = heads * size * size * 4
    arguments = 4 * heads * size * width * 4
    gradients = 3 * heads * size * width * 4
    graph = Graph.parse(exe.text("fuse"))
    assert not [(op, t) for op, t in tensors(graph) if size * size in (t.nbytes // 4, t.nbytes // 4 // heads)]
    assert exe.peak_bytes - arguments - gradients < scores / 8


# -- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "more", "message"),
    [
        (((3, 4), (5, 3), (5, 2)), {}, "must agree in D and S"),
        (((3, 4), (5, 4), (6, 2)), {}, "must agree in D and S"),
        (((4,), (5, 4), (5, 2)), {}, "must agree in D and S"),
        (((2, 3, 4), (3, 5, 4), (5, 2)), {}, "2 and 3 meet"),
        (((2, 3, 4), (2, 5, 4), (2, 5, 2), (3, 4)), {}, "does not broadcast"),
        (((2, 3, 4), (2, 5, 4), (2, 5, 2), (2, 5)), {}, "does not broadcast"),
        (((2, 3, 4), (2, 5, 4), (2, 5, 2), (3, 3, 5)), {}, "2 and 3 meet"),
        (((3, 6, 4), (2, 5, 4), (2, 5, 2)), {"enable_gqa": True}, "number of heads"),
        (((4, 6, 4), (2, 5, 4), (4, 5, 2)), {"enable_gqa": True}, "number of heads"),
        (((6, 4), (5, 4), (5, 2)), {"enable_gqa": True}, "number of heads"),
        (((4, 6, 4), (2, 5, 4), (2, 5, 2), (2, 6, 5)), {"enable_gqa": True}, "4 heads"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        run(lambda *a: tw.scaled_dot_product_attention(*a, **more), *(floats(*s) for s in shapes))


def test_dropout_is_a_probability() -> None:
    with pytest.raises(AttributeValueError, match="probability"):
        record(lambda q: tw.scaled_dot_product_attention(q, q, q, None, 1.5), (floats(2, 6, 4),), training=True)


# -- torch --------------------------------------------------------------------------------------------------------------------


@pytest.mark.unvalidated("the passes are validated on the same forms above")
@pytest.mark.parametrize(
    ("q", "k", "mask", "more"),
    [
        ((2, 3, 40, 8), (2, 3, 30, 8), None, {}),
        ((2, 3, 40, 8), (2, 3, 30, 8), None, {"is_causal": True}),
        ((2, 3, 30, 8), (2, 3, 40, 8), None, {"is_causal": True}),
        ((2, 3, 40, 8), (2, 3, 30, 8), bools(2, 1, 1, 30), {"scale": 0.3}),
        ((2, 3, 40, 8), (2, 3, 30, 8), floats(3, 40, 30), {}),
        ((2, 4, 40, 8), (2, 2, 30, 8), bools(4, 40, 30), {"enable_gqa": True}),
        ((2, 4, 40, 8), (2, 2, 40, 8), None, {"enable_gqa": True, "is_causal": True}),
    ],
)
def test_torch(q: tuple[int, ...], k: tuple[int, ...], mask: Array | None, more: dict[str, Any], small_blocks: None) -> None:
    """Values and gradients are PyTorch's; their numpy counterparts stand above."""
    torch = pytest.importorskip("torch", reason="the bench extra")
    peer = torch.nn.functional.scaled_dot_product_attention
    arrays = [floats(*q), floats(*k), floats(*k)]
    dy = floats(*q)
    tensors = [torch.from_numpy(x).requires_grad_() for x in arrays]
    y = peer(*tensors, None if mask is None else torch.from_numpy(mask), **more)
    expected = [y.detach().numpy(), *(g.numpy() for g in torch.autograd.grad(y, tensors, torch.from_numpy(dy)))]

    def f(q: Any, k: Any, v: Any) -> Any:
        def weighed(q: Any, k: Any, v: Any) -> Any:
            y = tw.scaled_dot_product_attention(q, k, v, mask, **more)
            return (y * dy).sum(), y

        return tw.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (_, value), slopes = tw.compile(f, *(tw.spec(*x.shape) for x in arrays))(*arrays)
    near([value, *slopes], expected, 4e-6)
