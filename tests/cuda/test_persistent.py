"""Loops of small launches as one kernel: the same results, the rule that chooses, and barriers that are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import driver, nn
from tensorwright.codegen.cuda import persistent
from tensorwright.frontend.nn.init import seed
from tensorwright.frontend.training import training_step
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.errors import CompileError, KernelFaultError
from tensorwright.runtime.cuda.tools import assemble

RNG = np.random.default_rng(5)


def program(exe: Any) -> CudaProgram:
    found = exe.compiled.run
    assert isinstance(found, CudaProgram)
    return found


def loops(made: CudaProgram) -> list[str]:
    return [k.name for k in made.kernels if k.name.startswith("loop_")]


def fibonacci(reverse: bool) -> Any:
    """Two carries that change places, a sum over neighbours (in shared memory), and a stack."""

    def step(carry: Any, x: Any) -> Any:
        a, b = carry
        c = tw.tanh(a + x) * tw.sum(b) / 40
        return (b, c), a - c

    return lambda a, b, xs: tw.scan(step, (a, b), xs, reverse=reverse)


@pytest.mark.unvalidated("its passes are those of other tests")
@pytest.mark.parametrize(("length", "reverse"), [(2, False), (3, True), (8, False), (9, True)])
def test_passes_whose_carries_change_places(length: int, reverse: bool) -> None:
    arrays = [RNG.standard_normal(s).astype(np.float32) for s in ((40,), (40,), (length, 40))]
    fn, specs = fibonacci(reverse), [tw.spec(*a.shape) for a in arrays]
    with tw.config(cuda_loops="one"):
        exe = tw.compile(fn, *specs, target="cuda-emulator")
    assert len(loops(program(exe))) == 1
    ((a, b), ys), ((c, d), zs) = exe(*arrays), tw.compile(fn, *specs)(*arrays)
    for found, expected in ((a, c), (b, d), (ys, zs)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # sums of 40 in another order


@pytest.mark.unvalidated("its passes are those of other tests")
@pytest.mark.parametrize("both", [True, False])
def test_a_loop_in_a_loop(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for both; or the inner one, launched each time elsewhere in memory."""
    if not both:

        def nested(launches: Any, target: Any) -> tuple[float, float]:
            return 1.0, 2.0 * any("loop_" in x.kernel.name for x in launches)

        monkeypatch.setattr(persistent, "estimate", nested)

    def outer(h: Any, xs: Any) -> Any:
        return tw.scan(lambda g, x: (tw.tanh(g * x + h), g), h, xs)

    def fn(h: Any, xs: Any) -> Any:
        return tw.scan(outer, h, xs)

    h, xs = RNG.standard_normal(5).astype(np.float32), RNG.standard_normal((3, 4, 5)).astype(np.float32)
    with tw.config(cache="off"):
        exe = tw.compile(fn, tw.spec(5), tw.spec(3, 4, 5), target="cuda-emulator")
    assert sum(x.kernel.name.startswith("loop_") for x in program(exe).launches()) == (1 if both else 3)
    for found, expected in zip(exe(h, xs), tw.compile(fn, tw.spec(5), tw.spec(3, 4, 5))(h, xs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


class Recurrent(nn.Module):
    def __init__(self, features: int, size: int) -> None:
        self.lstm, self.out = nn.LSTM(features, size), nn.Linear(size, 3)

    def __call__(self, x: Any) -> Any:
        return self.out(self.lstm(x)[0][:, -1])


def step(target: str | None, batch: int, length: int, features: int, size: int) -> Any:
    seed(0)
    types = tw.spec(batch, length, features), tw.spec(batch, dtype="i64")
    traced = training_step(Recurrent(features, size), tw.losses.cross_entropy, tw.optim.SGD(0.5), *types)
    return driver.build(traced.graph, traced.state, purpose="training", target=target)


@pytest.mark.unvalidated("its passes are those of other tests")
def test_lstm_trains_in_one_kernel_each_way() -> None:
    x, labels = RNG.standard_normal((4, 7, 6)).astype(np.float32), RNG.integers(0, 3, 4)
    host = step(None, *x.shape, 8)
    expected = [float(host(np.float32(0.5), x, labels)) for _ in range(3)]
    with tw.config(cuda_loops="one"):
        exe = step("cuda-emulator", *x.shape, 8)
        others = [step(f"cuda-sm_{sm}", *x.shape, 8) for sm in (75, 90)]
    assert len(loops(program(exe))) == 2, "forward, and its gradient"
    assert not any(n.name.startswith("loop_") and n.grid != (1, 1, 1) for n in program(exe).kernels)
    np.testing.assert_allclose([float(exe(np.float32(0.5), x, labels)) for _ in range(3)], expected, rtol=2e-6)
    for other, sm in zip([exe, *others], (80, 75, 90), strict=True):
        assert not assemble(program(other).ptx, sm).wrong


def test_the_estimate_chooses_and_a_flag_overrides() -> None:
    """A pass of few operations costs less than a launch; a pass that fills a device is better off there."""

    def made(size: int, way: str) -> CudaProgram:
        def fn(h: Any, xs: Any) -> Any:
            return tw.scan(lambda h, x: (tw.tanh(h @ h + x), None), h, xs)[0]

        with tw.config(cuda_loops=way):
            return program(tw.compile(fn, tw.spec(size, size), tw.spec(5, size, size), target="cuda-sm_80"))

    small, large = made(8, "auto"), made(256, "auto")
    assert len(loops(small)) == 1 and not loops(large)
    assert any("by estimate" in i.note for i in small.infos)
    assert not loops(made(8, "launches"))
    with pytest.raises(CompileError, match="the flag cuda_loops"):
        made(8, "both")


def test_a_missing_barrier_between_launches_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent._Maker, "ended", ())
    arrays = [RNG.standard_normal(s).astype(np.float32) for s in ((40,), (40,), (4, 40))]
    with tw.config(cuda_loops="one", cache="off"):
        exe = tw.compile(fibonacci(False), *(tw.spec(*a.shape) for a in arrays), target="cuda-emulator")
    with pytest.raises(KernelFaultError, match=r"race: kernel loop_\d+"):
        exe(*arrays)
