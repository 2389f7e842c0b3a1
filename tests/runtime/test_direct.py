"""The direct call path must be indistinguishable from the way through Python, but for time."""

from __future__ import annotations

import sys
import threading
import weakref

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.errors import InputError
from tensorwright.runtime.direct import MARK, supported

pytestmark = pytest.mark.skipif(not supported(), reason="this Python or numpy has no direct call path")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def warmed(fn=lambda x: x + 1, *specs):
    """An Executable that was called often enough to be called directly."""
    exe = tw.compile(fn, *(specs or (tw.spec(2, 3),)), threads=1)
    arguments = [np.zeros(t.static_shape, t.dtype.numpy) for _, t in exe.arguments]
    for _ in range(3):
        exe(*arguments)
    assert exe._direct is not None
    return exe


def test_results_and_reuse_of_outputs():
    exe = warmed()
    kept = [exe(X * k) for k in range(10)]  # more than the ring holds: each must stay as it was
    for k, y in enumerate(kept):
        assert np.array_equal(y, X * k + 1)
    views = [exe(X * k)[1:] for k in range(10)]  # a view keeps its array
    assert all(np.array_equal(v, (X * k + 1)[1:]) for k, v in enumerate(views))
    assert len({exe(X).ctypes.data for _ in range(20)}) <= 2  # dropped at once: used again


def test_out():
    exe = warmed(lambda x, y: x * 2 + y, tw.spec(2, 3), tw.spec(2, 3))
    out = np.empty((2, 3), np.float32)
    assert exe(X, X, out=out) is out and np.array_equal(out, 3 * X)
    before = sys.getrefcount(out)
    for _ in range(50):
        exe(X, X, out=out)
    assert sys.getrefcount(out) == before
    mine = X.copy()
    assert exe(mine, X, out=mine) is mine and np.array_equal(mine, 3 * X)  # overlaps an input
    wide = np.zeros((2, 6), np.float32)
    exe(X, X, out=wide[:, ::2])
    assert np.array_equal(wide[:, ::2], 3 * X) and not wide[:, 1::2].any()
    frozen = np.empty((2, 3), np.float32)
    frozen.flags.writeable = False
    for wrong in (frozen, np.empty((3, 2), np.float32), np.empty((2, 3)), [1.0], "no"):
        with pytest.raises(InputError, match="out="):
            exe(X, X, out=wrong)
    with pytest.raises(InputError, match="takes 2 inputs"):
        exe(X, X, out)
    with pytest.raises(InputError, match="takes 2 inputs"):
        exe(X)


class Sub(np.ndarray):
    pass


@pytest.mark.parametrize(
    "given",
    [
        X[:, ::-1][:, ::-1],
        np.asfortranarray(X),
        np.frombuffer(b"\0" + X.tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 3),  # not aligned
        X.view(Sub),
        np.broadcast_to(X[:1], (2, 3)),
    ],
    ids=["views", "fortran", "unaligned", "subclass", "broadcast"],
)
def test_unusual_arrays(given):
    assert np.array_equal(warmed()(given), np.asarray(given) + 1)


def test_read_only_arrays_and_scalars():
    frozen = X.copy()
    frozen.flags.writeable = False
    assert np.array_equal(warmed()(frozen), X + 1)
    exe = warmed(lambda x: x + 1, tw.spec())
    assert exe(2.0) == 3 and exe(np.float32(2)) == 3 and exe(np.array(2, np.float32)) == 3


@pytest.mark.parametrize("wrong", [X.T, X[:1], X.astype(np.float64), X.astype(">f4"), X[None], [1.0, 2.0], None, "x", MARK])
def test_what_does_not_fit_is_said(wrong):
    exe = warmed()
    for _ in range(3):
        with pytest.raises(InputError):
            exe(wrong)
    assert np.array_equal(exe(X), X + 1)


def test_threads_at_once():
    exe = warmed(lambda x: x @ x + x, tw.spec(48, 48))
    inputs = [np.full((48, 48), k, np.float32) for k in range(4)]
    wanted = [exe(x).copy() for x in inputs]
    wrong = []

    def work(k: int) -> None:
        for _ in range(300):
            if not np.array_equal(exe(inputs[k]), wanted[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert not wrong


def test_new_weights_and_other_sizes():
    net = tw.nn.Linear(3, 2)
    exe = warmed(net, tw.spec(2, 3))
    new = {k: np.ones_like(v) for k, v in exe.parameters.items()}
    exe.set_parameters(new)
    for _ in range(4):
        assert np.array_equal(exe(X), X.sum(1, keepdims=True) + np.ones(2, np.float32))
    exe = tw.compile(lambda x: x + 1, tw.spec("N", 3), threads=1)
    for n in (2, 2, 2, 4, 4, 4, 2, 4):
        assert np.array_equal(exe(np.ones((n, 3), np.float32)), np.full((n, 3), 2))


def test_nothing_is_kept_alive():
    exe = warmed()
    x = X.copy()
    count = sys.getrefcount(x)
    y = exe(x)
    assert sys.getrefcount(x) == count
    gone = weakref.ref(exe)
    del exe
    assert gone() is None and np.array_equal(y, X + 1)
