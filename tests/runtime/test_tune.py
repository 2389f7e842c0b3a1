"""tune=: a measured choice is bounded, recorded, and used again."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import tuning
from tensorwright.codegen.assembly import contractions_of
from tensorwright.codegen.generate import generate
from tensorwright.ir.errors import InputError
from tensorwright.passes.contract import Context
from tensorwright.passes.manager import run_pipeline
from tensorwright.passes.pipeline import inference
from tensorwright.runtime import host
from tensorwright.runtime.binding import Binding

X = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
A = np.random.default_rng(1).standard_normal((96, 160)).astype(np.float32)
B = np.random.default_rng(2).standard_normal((160, 200)).astype(np.float32)


def net():
    tw.nn.init.seed(0)
    return tw.nn.Sequential(tw.nn.Linear(40, 32), tw.nn.ReLU(), tw.nn.Linear(32, 7))


@pytest.fixture
def measured(monkeypatch):
    """A clock by which the second plan of each contraction takes half as long; lists what was measured."""
    asked = []

    def measure(program, threads, inputs=None):
        asked.append(program)
        return 0.5 if program.name == "tune" and len(asked) > 1 else 1.0

    monkeypatch.setattr(tuning, "measure", measure)
    return asked


@pytest.mark.unvalidated("validation bypasses the cache")
def test_a_choice_is_recorded_and_used_again(measured, tmp_path):
    with tw.config(cache=str(tmp_path)):
        plain = tw.compile(net(), tw.spec(24, 40))
        tuned = tw.compile(net(), tw.spec(24, 40), tune=20)
        count = len(measured)
        assert count > 1 and tuned.compiled.tuned and not tuned.compiled.from_cache
        assert not plain.compiled.tuned
        again = tw.compile(net(), tw.spec(24, 40), tune=20)
        assert again.compiled.from_cache and again.compiled.tuned == tuned.compiled.tuned
        assert again(X).tobytes() == tuned(X).tobytes()
        assert again.text("loops") == tuned.text("loops")
        for entry in tmp_path.glob("??/*.twc"):  # the programs are gone, the choices are not
            if entry.stat().st_size > 4096:
                entry.unlink()
        third = tw.compile(net(), tw.spec(24, 40), tune=20)
        assert not third.compiled.from_cache and third.compiled.tuned == tuned.compiled.tuned
        assert len(measured) == count  # nothing was measured again
        assert tw.compile(net(), tw.spec(24, 40)).compiled.tuned == {}
    np.testing.assert_allclose(tuned(X), plain(X), rtol=1e-5, atol=1e-5)


def test_every_candidate_computes_the_same_contraction():
    ctx = Context(target=host.host())
    product = tw.trace(lambda a, b: tw.relu(a @ b), tw.spec(*A.shape), tw.spec(*B.shape))
    graph = run_pipeline(product, inference(host.host()), ctx)
    ((key, region),) = contractions_of(graph, host.host()).items()
    codes = set()
    for rank in range(tuning.CANDIDATES):
        program = generate(region, host.host(), choices={key: rank})
        codes.add(program.object_code)
        out = np.empty((96, 200), np.float32)
        Binding(program, {}, 1).once([A, B], [A.ctypes.data, B.ctypes.data], [out])
        np.testing.assert_allclose(out, np.maximum(A @ B, 0), rtol=1e-5, atol=1e-4)  # sums of 160 of either sign
    assert len(codes) > 1


def test_without_time_nothing_is_chosen(measured):
    assert tw.compile(net(), tw.spec(24, 40), tune=1e-9, cache=False).compiled.tuned == {}
    assert not measured


@pytest.mark.parametrize("wrong", [0, -1, True, "5", float("inf"), float("nan")])
def test_what_is_no_time(wrong):
    with pytest.raises(InputError, match="tune is a number of seconds"):
        tw.compile(net(), tw.spec(24, 40), tune=wrong)


def test_no_budget_of_memory_with_it():
    with pytest.raises(InputError, match="without a memory budget"):
        tw.compile(net(), tw.spec(24, 40), tune=1, memory_budget=10**9)
