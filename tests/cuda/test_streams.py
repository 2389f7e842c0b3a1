"""Launches over several streams: who depends on whom, what waits, and that a missing event is caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.cuda_streams import STREAMS, Turn, dependences, schedule
from tensorwright.ir.errors import KernelFaultError
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.device import Extent
from tensorwright.runtime.cuda.emulator import Emulator

from .ptx_support import kernel

A = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)


def branches(x: Any) -> Any:
    """Two products in a row, twice, that nothing ties together before the end."""
    left, right = x @ x, x @ tw.transpose(x, (1, 0))
    return (left @ x) - (right @ right)


def program(fn: Any, *arrays: np.ndarray) -> CudaProgram:
    found = tw.compile(fn, *(tw.spec(*a.shape) for a in arrays), target="cuda-sm_80").compiled.run
    assert isinstance(found, CudaProgram)
    return found


def turns_of(made: CudaProgram, most: int = STREAMS) -> list[Turn]:
    return schedule(made, list(made.launches()), most)


def ordered(turns: list[Turn]) -> list[set[int]]:
    """For each turn what has ended when it begins, by the order of streams and the waits alone."""
    done: list[set[int]] = []
    for number, t in enumerate(turns):
        before = {n for n in range(number) if turns[n].stream == t.stream} | set(t.waits)
        done.append(before.union(*(done[n] for n in before)))
    return done


def test_independent_branches_get_streams_and_all_dependences_hold() -> None:
    made = program(branches, A)
    needs = dependences(made, list(made.launches()))
    for most in (1, 2, STREAMS):
        turns = turns_of(made, most)
        assert len({t.stream for t in turns}) == min(2, most)
        assert all(n <= done for n, done in zip(needs, ordered(turns), strict=True))
        assert sum(len(t.waits) for t in turns) == (1 if most > 1 else 0)
        assert all(turns[n].is_awaited for t in turns for n in t.waits)


def test_a_chain_stays_on_one_stream() -> None:
    turns = turns_of(program(lambda x: tw.softmax(x @ x, -1) @ x @ x, A))
    assert {t.stream for t in turns} == {0}
    assert not any(t.waits for t in turns)


def test_memory_that_is_used_again_and_state_that_is_overwritten_order_launches() -> None:
    step = program(lambda x: tw.sum(tw.exp(x @ x) @ x) + tw.sum(tw.tanh(x @ x @ x)), A)
    launches = list(step.launches())
    needs = dependences(step, launches)
    written = [[(p, k.nbytes) for p, k in zip(x.pointers, x.kernel.parameters, strict=True) if k.written] for x in launches]
    for later, mine in enumerate(written):
        for earlier in range(later):
            both = [(p, q) for p, n in mine for q, m in written[earlier] if p[0] == q[0] and p[1] < q[1] + m and q[1] < p[1] + n]
            assert not both or earlier in ordered_needs(needs)[later], "a write over a write"


def ordered_needs(needs: list[set[int]]) -> list[set[int]]:
    """Everything before, through others."""
    done: list[set[int]] = []
    for n in needs:
        done.append(n.union(*(done[k] for k in n)))
    return done


def test_branches_have_memory_of_their_own() -> None:
    """Results of one branch do not take the place of the other's, so that nothing but the end ties them together."""
    made = program(branches, A)
    needs = ordered_needs(dependences(made, list(made.launches())))
    assert sum(not needs[b] for b in range(len(needs))) == 2
    assert len(needs[-1]) == len(needs) - 1


def test_runs_on_streams_and_a_missing_event_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(branches, A)
    expected = (A @ A @ A) - (A @ A.T) @ (A @ A.T)
    device = Emulator(1 << 22)
    binding = CudaBinding(made, {}, DeviceStore(device))
    for _ in range(2):  # captured, and replayed
        np.testing.assert_allclose(binding.run([A]), expected, rtol=1e-4, atol=1e-4)  # f32 sums of 24 products, twice
    keep = Emulator.wait
    monkeypatch.setattr(Emulator, "wait", lambda self, stream, event: keep(self, stream, event) if stream else None)
    broken = CudaBinding(made, {}, DeviceStore(Emulator(1 << 22)))
    with pytest.raises(KernelFaultError, match=r"stream 0 \w+ memory that kernel \w+ on stream 1 writes, and no event"):
        broken.run([A])


DOUBLE = kernel(
    "ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %t, 4, %d0; ld.global.f32 %f0, [%d1]; add.f32 %f0, %f0, %f0; "
    "st.global.f32 [%d1], %f0;"
)


def test_events_order_what_came_before_them_only() -> None:
    device = Emulator(1 << 20)
    double = device.load(DOUBLE).function("k")
    a = device.allocate(128)
    device.upload(a, np.ones(32, np.float32))

    def go(stream: int) -> None:
        device.launch(double, (1,), (32,), [a], extents=[Extent(a, 128, True, "x")], stream=stream)

    device.wait(1, device.record(0))
    go(1)
    early = device.record(1)
    device.wait(2, early)
    go(2)
    device.wait(0, early)
    with pytest.raises(KernelFaultError, match="kernel k on stream 0 writes memory that kernel k on stream 2"):
        go(0)
    device.wait(0, device.record(2))
    go(0)
    device.synchronize()
    go(3)  # after it nothing is left to race with
