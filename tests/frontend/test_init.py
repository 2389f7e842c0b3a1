"""Initial values: the same bits everywhere, the right distributions, what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorwright as tw
from tensorwright import nn
from tensorwright.frontend.nn import init
from tensorwright.frontend.nn.quantiles import normal_cdf, normal_quantile
from tensorwright.ir.errors import AttributeValueError, ShapeError

SHAPE = (37, 21, 3)
DRAWS: dict[str, Callable[[], Any]] = {
    "uniform": lambda: init.uniform(SHAPE, -0.3, 0.7, seed=5),
    "normal": lambda: init.normal((70001,), 0.1, 2.0, seed=5),  # more than one chunk
    "truncated_normal": lambda: init.truncated_normal(SHAPE, 0.5, 2.0, -1.5, 3.0, seed=5),
    "truncated_normal far": lambda: init.truncated_normal((99,), low=4.0, high=5.0, seed=5),
    "xavier_uniform": lambda: init.xavier_uniform(SHAPE, seed=5),
    "xavier_normal": lambda: init.xavier_normal(SHAPE, 0.5, seed=5),
    "kaiming_uniform": lambda: init.kaiming_uniform(SHAPE, 0.1, "fan_out", seed=5),
    "kaiming_normal": lambda: init.kaiming_normal(SHAPE, nonlinearity="relu", seed=5),
    "lecun_uniform": lambda: init.lecun_uniform(SHAPE, seed=5),
    "lecun_normal": lambda: init.lecun_normal(SHAPE, seed=5),
    "orthogonal": lambda: init.orthogonal((23, 47), 1.5, seed=5),
    "orthogonal tall": lambda: init.orthogonal((64, 3, 3, 3), seed=5),
    "a model": lambda: np.concatenate(
        [p.data.reshape(-1) for p in nn.Sequential(nn.Linear(7, 5, seed=1), nn.Conv2d(3, 4, 3, seed=2)).parameters()]
    ),
}
# Stored when this was written. Another value means that models of the same seed start elsewhere than they did.
HASHES = {
    "uniform": "00fe82ed4863b03f",
    "normal": "ba468ca0d0e7b02b",
    "truncated_normal": "72853d00f31e590f",
    "truncated_normal far": "7d745abca721b872",
    "xavier_uniform": "64bbc7ac4b4c61db",
    "xavier_normal": "40cf55779a0c0a78",
    "kaiming_uniform": "ec7a9f504dbf812d",
    "kaiming_normal": "7b2ed0db3b4bc527",
    "lecun_uniform": "42d29562fa18eea5",
    "lecun_normal": "7d039a54123bb83e",
    "orthogonal": "4d5400cc95b277e5",
    "orthogonal tall": "ea4a2e6d8a075a19",
    "a model": "7cd3c3260ea4df0e",
}


def digests() -> dict[str, str]:
    return {name: hashlib.sha256(np.ascontiguousarray(draw()).tobytes()).hexdigest()[:16] for name, draw in DRAWS.items()}


def test_the_bits_are_those_of_every_machine() -> None:
    assert digests() == HASHES


def test_the_bits_do_not_depend_on_vector_instructions() -> None:
    """numpy without its AVX code, in a process of its own: another machine, as far as this one can be one."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_init; print(test_init.digests() == test_init.HASHES)"
    lacking = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR AVX2 FMA3 AVX F16C X86_V3 X86_V4"
    found = np._core._multiarray_umath.__cpu_dispatch__  # type: ignore[attr-defined]
    off = " ".join(f for f in lacking.split() if f in found)
    env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": off}
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", script, str(here)], env=env, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "True", run.stderr
    assert off or not found  # something was switched off, or there was nothing to switch off


def test_quantiles_against_scipy() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(100_000), 10.0 ** -np.arange(1, 300), 1 - 10.0 ** -np.arange(1, 15.0), [0.075, 0.925]])
    want = scipy.special.ndtri(p)
    assert np.abs(normal_quantile(p) - want).max() < 1e-14 * np.abs(want).max()
    assert (np.abs(normal_quantile(p) - want) <= 4e-15 * np.abs(want) + 1e-16).all()
    for z in (-37.0, -20.0, -5.0, -1.0, 0.0, 0.3, 2.0, 8.0):
        assert normal_cdf(z) == pytest.approx(scipy.special.ndtr(z), rel=1e-12)
    assert normal_cdf(-50.0) == 0 and normal_cdf(50.0) == 1


def test_distributions() -> None:
    n = (100_000,)
    checks = {
        "uniform": (init.uniform(n, -1, 3, seed=1), scipy.stats.uniform(-1, 4).cdf),
        "normal": (init.normal(n, 2.0, 0.5, seed=1), scipy.stats.norm(2, 0.5).cdf),
        "truncated": (init.truncated_normal(n, 1.0, 2.0, -1.0, 0.5, seed=1), scipy.stats.truncnorm(-1, 0.5, 1, 2).cdf),
        "truncated right": (init.truncated_normal(n, 1.0, 2.0, 1.0, 4.0, seed=1), scipy.stats.truncnorm(1, 4, 1, 2).cdf),
    }
    for name, (draws, cdf) in checks.items():
        assert draws.dtype == np.float32
        assert scipy.stats.kstest(draws.astype(np.float64), cdf).pvalue > 1e-3, name
    assert checks["uniform"][0].min() >= -1 and checks["uniform"][0].max() < 3
    far = init.truncated_normal(n, low=30.0, high=31.0, seed=1)
    assert far.min() >= 30 and far.max() <= 31 and far.std() > 0.01
    # Rounding never reaches the upper end of a uniform draw, also where the range has few floats.
    assert (init.uniform((4096,), 1.0, float(np.nextafter(np.float32(1), np.float32(2))), seed=1) == 1).all()


def test_orthogonal_rows_and_columns() -> None:
    for shape in ((40, 40), (10, 60), (60, 10), (1, 5), (6, 2, 2, 2)):
        q = init.orthogonal(shape, 2.0, seed=3).reshape(shape[0], -1).astype(np.float64) / 2
        small = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
        np.testing.assert_allclose(small, np.eye(len(small)), atol=2e-6)
    # It is the Q of LAPACK's QR with a positive diagonal of R, to rounding.
    draws = init.normal_quantile(init._unit_f64(900, 3)).reshape(30, 30)
    q, r = np.linalg.qr(draws.T)
    np.testing.assert_allclose(init.orthogonal((30, 30), seed=3), (q * np.sign(np.diag(r))).T, atol=1e-6)


def test_plain_values_and_seeds() -> None:
    assert (init.constant((2, 3), 1.5) == 1.5).all() and init.constant((2, 3), 1.5).dtype == np.float32
    assert (init.eye((2, 3)) == np.eye(2, 3)).all() and (init.zeros((3,)) == 0).all() and (init.ones((3,)) == 1).all()
    np.testing.assert_array_equal(init.normal((3,), seed=4), init.normal((3,), seed=np.random.Generator(np.random.Philox(4))))
    assert (init.normal((3,), seed=4) != init.normal((3,), seed=5)).all()
    assert init.normal((0, 3), seed=1).shape == (0, 3) and init.uniform((), seed=1).shape == ()
    tw.seed(9)
    first = init.uniform((4,))
    second = init.uniform((4,))
    tw.seed(9)
    np.testing.assert_array_equal(init.uniform((4,)), first)
    assert (first != second).any()


def test_what_is_refused() -> None:
    for bad in (-1, 1.5, True, "7"):
        with pytest.raises(AttributeValueError, match="non-negative int"):
            init.generator(bad)  # type: ignore[arg-type]
    with pytest.raises(AttributeValueError, match="Philox or PCG64"):
        init.normal((2,), seed=np.random.Generator(np.random.MT19937(1)))
    with pytest.raises(AttributeValueError, match="below high"):
        init.truncated_normal((2,), low=1.0, high=1.0)
    with pytest.raises(AttributeValueError, match="above high"):
        init.uniform((2,), 1.0, 0.0)
    with pytest.raises(ShapeError):
        init.orthogonal((3,))
    with pytest.raises(ShapeError):
        init.eye((3,))
    with pytest.raises(ShapeError, match="negative"):
        init.normal((2, -1))
