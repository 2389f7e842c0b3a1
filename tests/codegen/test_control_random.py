"""Random loops and branches, nested: native, bounds-checked, by the loop interpreter and by the interpreter they are equal.

Bodies turn, drop, repeat and pass on their carries in every way; results may be operands, constants, or each other.
"""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.codegen import control_loop, sections
from tensorwright.ir.build import constant, get, input_node
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType, tensor

from .programs import agree, compiled, error, interpreted

BUDGET = 1e-5
Rng = np.random.Generator


def values(rng: Rng, given: list[Node], shape: tuple[int, ...], count: int, depth: int) -> list[Node]:
    """The given nodes of a shape with `count` more, computed from them and each other; magnitudes stay around 1."""
    n = shape[-1]
    pool = [v for v in given if v.shape == shape]
    pool = pool or [constant(rng.uniform(-1, 1, shape).astype(np.float32))]
    for _ in range(count):
        a, b = (pool[int(rng.integers(len(pool)))] for _ in range(2))
        kind = int(rng.integers(9 if depth else 6))
        if kind == 0:
            pool.append(make("tanh", make("add", a, b)))
        elif kind == 1:
            pool.append(make("mul", a, make("sin", b)))
        elif kind == 2:
            w = constant((rng.uniform(-1, 1, (n, n)) / n).astype(np.float32))
            pool.append(make("matmul", a, w))
        elif kind == 3:
            pool.append(constant(rng.uniform(-1, 1, shape).astype(np.float32)))
        elif kind == 4:
            halves = [(a, 0, n // 2), (b, n // 2, n)]
            cut = [make("slice", v, starts=(0, s), stops=(shape[0], e), steps=(1, 1)) for v, s, e in halves]
            pool.append(make("concat", *cut, axis=1))
        elif kind == 5:
            total = make("sum", make("mul", a, b), axes=(1,), keepdims=True)
            pool.append(make("tanh", make("broadcast_to", total, shape=shape)))
        elif kind == 6:
            pool += loop(rng, pool, shape, depth - 1)
        elif kind == 7:
            pool += branch(rng, pool, shape, depth - 1)
        else:
            pool += repeat(rng, pool, shape, depth - 1)
    return pool


def pick(rng: Rng, pool: list[Node], count: int) -> list[Node]:
    return [pool[int(rng.integers(len(pool)))] for _ in range(count)]


def loop(rng: Rng, pool: list[Node], shape: tuple[int, ...], depth: int) -> list[Node]:
    carries, sequences, fixed = int(rng.integers(0, 4)), int(rng.integers(0, 3)), int(rng.integers(0, 3))
    length = int(rng.choice([0, 1, 2, 3, 5]))
    inner = [input_node(f"p{k}", TensorType(pool[0].dtype, shape)) for k in range(carries + sequences + fixed)]
    inside = values(rng, inner, shape, int(rng.integers(1, 5)), depth)
    new = pick(rng, inside, carries)
    ys = pick(rng, [*inside, *new], int(rng.integers(0 if carries else 1, 4)))
    operands = pick(rng, pool, carries)
    for v in pick(rng, pool, sequences):
        wide = make("broadcast_to", make("reshape", v, shape=(1, *shape)), shape=(length, *shape))
        ramp = constant(np.linspace(-1, 1, length * int(np.prod(shape))).reshape(length, *shape).astype(np.float32))
        operands.append(make("mul", wide, ramp) if rng.integers(2) else wide)
    operands += pick(rng, pool, fixed)
    body, reverse = Graph(tuple(inner), (*new, *ys), name="body"), bool(rng.integers(2))
    node = make("scan", *operands, body=body, length=length, carries=carries, sequences=sequences, reverse=reverse)
    found: list[Node] = []
    for k in range(carries + len(ys)):
        if rng.integers(4):  # some results nobody wants
            part = get(node, k)
            found.append(part if k < carries else make("sum", part, axes=(0,), keepdims=False))
    return found


def branch(rng: Rng, pool: list[Node], shape: tuple[int, ...], depth: int) -> list[Node]:
    operands = pick(rng, pool, int(rng.integers(1, 4)))
    inner = [input_node(f"p{k}", v.tensor) for k, v in enumerate(operands)]
    count = int(rng.integers(1, 4))
    sides = [
        Graph(tuple(inner), tuple(pick(rng, values(rng, list(inner), shape, int(rng.integers(1, 4)), depth), count)), name="side")
        for _ in range(2)
    ]
    flag = make("less", make("sum", pool[-1], axes=(0, 1), keepdims=False), constant(np.float32(rng.uniform(-1, 1))))
    node = make("cond", flag, *operands, then=sides[0], orelse=sides[1])
    return [get(node, k) for k in range(count)]


def repeat(rng: Rng, pool: list[Node], shape: tuple[int, ...], depth: int) -> list[Node]:
    """A while loop that counts down; its other carries are any."""
    carries, fixed = int(rng.integers(0, 3)), int(rng.integers(0, 2))
    types = [tensor("f32", ()), *[TensorType(pool[0].dtype, shape)] * (carries + fixed)]
    inner = [input_node(f"p{k}", t) for k, t in enumerate(types)]
    new = pick(rng, values(rng, list(inner[1:]), shape, int(rng.integers(1, 4)), depth), carries)
    body = Graph(tuple(inner), (make("sub", inner[0], constant(np.float32(1))), *new), name="body")
    test = Graph(tuple(inner), (make("less", constant(np.float32(0)), inner[0]),), name="test")
    first = constant(np.float32(rng.integers(0, 4)))
    node = make("while_loop", first, *pick(rng, pool, carries + fixed), test=test, body=body, carries=1 + carries)
    return [get(node, k) for k in range(1, 1 + carries)]


def program(seed: int, depth: int = 2) -> Graph:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 4)), int(rng.choice([2, 5, 8, 16, 17, 33])))
    x = [input_node(f"x{k}", tensor("f32", shape)) for k in range(3)]
    pool = values(rng, list(x), shape, 3, 0)
    start = list(pool)
    for _ in range(2):
        pool += loop(rng, start if seed % 3 else pool, shape, depth)  # most of them do not depend on each other
    pool = values(rng, pool, shape, 3, depth)
    outputs = pick(rng, pool, 3) + pool[-2:]
    aliases: tuple[tuple[int, int], ...] = ((0, 0), (1, 1)) if rng.integers(2) else ()
    return Graph(tuple(x), tuple(outputs), aliases=aliases)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 2:
        for module in (control_loop, sections):  # threads from the start
            monkeypatch.setattr(module, "PARALLEL_NS", 300.0)
    g = program(seed)
    rng = np.random.default_rng(seed)
    arrays = [rng.uniform(-1, 1, i.tensor.static_shape).astype(np.float32) for i in g.inputs]
    native = agree(g, arrays, budget=BUDGET)(arrays)
    others = [compiled(g, checked=True)(arrays)] if seed % 4 else [interpreted(g, arrays)]
    for other in others:
        for x, y in zip(native, other, strict=True):
            assert error(x, y) <= BUDGET
