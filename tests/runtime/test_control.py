"""Loops and branches as a user runs them: one native call, the same bits on any number of threads, costs known beforehand."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorwright as tw

STEPS, BATCH, WIDTH = 40, 4, 64


def cell(h, x, w):
    h = tw.tanh(h @ w + x)
    return h, h


def both_ways(h, xs, w, v):
    """A recurrence read forwards and one read backwards, which may run at the same time."""
    a, ys = tw.scan(lambda h, x: cell(h, x, w), h, xs)
    b, zs = tw.scan(lambda h, x: cell(h, x, v), h, xs, reverse=True)
    return ys, zs, a + b


def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, WIDTH), (STEPS, BATCH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)]
    scales = [1.0, 1.0, 0.1, 0.1]
    return [(s * rng.standard_normal(d)).astype(np.float32) for d, s in zip(shapes, scales, strict=True)]


def built(threads: int, **options):
    return tw.compile(both_ways, *(tw.spec(*a.shape) for a in arrays()), threads=threads, **options)


@pytest.fixture(scope="module")
def exe():
    return built(2)


def expected(given):
    h, xs, w, v = (a.astype(np.float64) for a in given)
    ys, zs = np.empty_like(xs), np.empty_like(xs)
    a = b = h
    for t in range(STEPS):
        a = ys[t] = np.tanh(a @ w + xs[t])
    for t in reversed(range(STEPS)):
        b = zs[t] = np.tanh(b @ v + xs[t])
    return ys, zs, a + b


def test_one_and_two_threads_give_the_same_bits(exe):
    given = arrays()
    one = built(1)(*given)
    for _ in range(5):  # the executable tries both thread counts
        for x, y, e in zip(one, exe(*given), expected(given), strict=True):
            assert x.tobytes() == y.tobytes()
            np.testing.assert_allclose(x, e, rtol=1e-4, atol=1e-5)


def test_a_profile_has_one_row_for_each_control_node(exe):
    given = arrays()
    profile, kernels = exe.profile(*given, repeats=3), exe.compiled.run.kernels
    assert [k.name for k in profile.kernels] == [k.name for k in kernels]
    (row,) = (k for k in profile.kernels if k.name == "section")
    assert row.parallel and row.note.count(f"{STEPS} passes of ") == 2 and "tanh" in row.nodes
    info = next(k for k in kernels if k.name == "section")
    assert info.flops >= 2 * STEPS * 2 * BATCH * WIDTH * WIDTH
    assert 0 < row.milliseconds <= profile.milliseconds
    assert "section" in str(profile)


def test_memory_is_known_before_the_first_run_and_is_not_exceeded(exe):
    """Both loops stack into the outputs, so that the arena needs no room for sequences."""
    assert exe.memory.arena < STEPS * BATCH * WIDTH * 4
    assert exe.memory.arena == exe.compiled.run.arena_bytes


def test_nothing_is_allocated_in_a_run(exe):
    given = arrays()
    for _ in range(20):
        exe(*given)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        exe(*given)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20


def test_several_python_threads_at_once(exe):
    given = arrays()
    want = [a.tobytes() for a in exe(*given)]
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: [a.tobytes() for a in exe(*given)], range(24)):
            assert got == want


def test_from_the_cache_and_from_a_file(exe, tmp_path):
    given = arrays()
    path = tmp_path / "net.tw"
    exe.save(path)
    again = tw.load(path, threads=2)
    for x, y in zip(exe(*given), again(*given), strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.unvalidated("thousands of steps: more than the interpreter is asked for")
@pytest.mark.parametrize("flag", [False, True])
def test_a_branch_runs_only_the_side_taken(flag: bool):
    """The other side would take a thousand times as long."""

    def choose(p, x):
        def long(x):
            return tw.scan(lambda h, _: (tw.sin(h), None), x, None, length=5_000)[0]

        return tw.cond(p, lambda x: x + 1, long, x)

    exe = tw.compile(choose, tw.spec(dtype="bool"), tw.spec(256), threads=1)
    x = np.linspace(0, 1, 256, dtype=np.float32)
    exe(np.array(flag), x)
    times = [exe.profile(np.array(v), x, repeats=3).milliseconds for v in (True, False)]
    assert times[0] < 0.2 * times[1]
    if flag:
        np.testing.assert_array_equal(exe(np.array(True), x), x + 1)


def test_a_while_loop_ends_where_numpy_does():
    def collatz(n):
        def step(state):
            n, k = state
            return tw.where(n % 2 == 0, n // 2, 3 * n + 1), k + 1

        return tw.while_loop(lambda s: s[0] != 1, step, (n, np.int32(0)))[1]

    exe = tw.compile(collatz, tw.spec(dtype="int32"))
    for n, steps in ((1, 0), (2, 1), (27, 111), (97, 118)):
        assert exe(np.array(n, np.int32)) == steps


@pytest.mark.unvalidated("a thousand steps: more than the interpreter is asked for")
def test_a_long_recurrence_costs_little_a_step():
    """1,000 steps of 32x32 at batch 1: the target is 2 microseconds a step; 20 leaves room for a busy machine."""

    def run(h, xs, w):
        return tw.scan(lambda h, x: cell(h, x, w), h, xs)[0]

    rng = np.random.default_rng(0)
    given = [(0.1 * rng.standard_normal(s)).astype(np.float32) for s in ((1, 32), (1000, 1, 32), (32, 32))]
    exe = tw.compile(run, *(tw.spec(*a.shape) for a in given), threads=1)
    assert exe.profile(*given, repeats=20).milliseconds < 20
    assert exe.memory.arena < 100_000, "the states of a thousand steps are not kept"
