"""Launches over several streams: who depends on whom, what waits, and that a missing event is caught."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.cuda_streams import DOWNLOADS, STREAMS, UPLOADS, Transfer, Turn, beside, dependences, schedule
from tensorwright.ir.errors import KernelFaultError
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.device import Event, Extent
from tensorwright.runtime.cuda.emulator import Emulator

from .ptx_support import kernel

pytestmark = pytest.mark.unvalidated("the passes are those of other tests: this is about streams")
A = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)


def branches(x: Any) -> Any:
    """Two products in a row, twice, that nothing ties together before the end."""
    left, right = x @ x, x @ tw.transpose(x, (1, 0))
    return (left @ x) - (right @ right)


@cache
def program(fn: Any, inputs: int = 1) -> CudaProgram:
    found = tw.compile(fn, *(tw.spec(*A.shape) for _ in range(inputs)), target="cuda-sm_80").compiled.run
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
    made = program(branches)
    needs = dependences(made, list(made.launches()))
    for most in (1, 2, STREAMS):
        turns = turns_of(made, most)
        assert len({t.stream for t in turns}) == min(2, most)
        assert all(n <= done for n, done in zip(needs, ordered(turns), strict=True))
        assert sum(len(t.waits) for t in turns) == (1 if most > 1 else 0)
        assert all(turns[n].is_awaited for t in turns for n in t.waits)


def test_a_chain_stays_on_one_stream() -> None:
    turns = turns_of(program(lambda x: tw.softmax(x @ x, -1) @ x @ x))
    assert {t.stream for t in turns} == {0}
    assert not any(t.waits for t in turns)


def test_memory_that_is_used_again_and_state_that_is_overwritten_order_launches() -> None:
    step = program(lambda x: tw.sum(tw.exp(x @ x) @ x) + tw.sum(tw.tanh(x @ x @ x)))
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
    made = program(branches)
    needs = ordered_needs(dependences(made, list(made.launches())))
    assert sum(not needs[b] for b in range(len(needs))) == 2
    assert len(needs[-1]) == len(needs) - 1


def test_runs_on_streams_and_a_missing_event_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(branches)
    expected = (A @ A @ A) - (A @ A.T) @ (A @ A.T)
    device = Emulator(1 << 22)
    binding = CudaBinding(made, {}, DeviceStore(device))
    for _ in range(2):  # captured, and replayed
        np.testing.assert_allclose(binding.run([A]), expected, rtol=1e-4, atol=1e-4)  # f32 sums of 24 products, twice


def drop(monkeypatch: pytest.MonkeyPatch, stream: int, awaited: int) -> None:
    """Streams do not wait any more for what was recorded on another."""
    record, wait = Emulator.record, Emulator.wait
    of: dict[int, int] = {}

    def recorded(self: Emulator, where: int) -> Event:
        made = record(self, where)
        of[id(made)] = where
        return made

    def waiting(self: Emulator, where: int, event: Event) -> None:
        if (where, of[id(event)]) != (stream, awaited):
            wait(self, where, event)

    monkeypatch.setattr(Emulator, "record", recorded)
    monkeypatch.setattr(Emulator, "wait", waiting)


@pytest.mark.parametrize(
    ("waits", "awaited", "says"),
    [
        (1, 0, r"kernel \w+ on stream 1 reads memory that kernel \w+ on stream 0 writes"),
        (0, UPLOADS, rf"kernel \w+ on stream 0 reads memory that an upload on stream {UPLOADS} writes"),
        (1, UPLOADS, rf"kernel \w+ on stream 1 reads memory that an upload on stream {UPLOADS} writes"),
        (DOWNLOADS, 1, rf"a download on stream {DOWNLOADS} reads memory that kernel \w+ on stream 1 writes"),
    ],
)
def test_a_missing_event_is_caught(waits: int, awaited: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(monkeypatch, waits, awaited)
    broken = CudaBinding(program(branches), {}, DeviceStore(Emulator(1 << 22)))
    with pytest.raises(KernelFaultError, match=f"{says}, and no event orders"):
        broken.run([A])


# --- copies ----------------------------------------------------------------------------------------------------------


def staged(x: Any, y: Any) -> Any:
    """The first result is there long before the second, which alone needs y."""
    first = x @ x
    return tw.exp(first), (tw.softmax(first @ x, -1) @ x) @ y


def test_launches_wait_for_their_own_inputs_and_downloads_for_their_own_results() -> None:
    made = program(staged, 2)
    launches = list(made.launches())
    turns = schedule(made, beside(made, launches, {0, 1}, {2, 3}))
    done = ordered(turns)
    up = {t.work.slot: n for n, t in enumerate(turns) if isinstance(t.work, Transfer) and t.work.up}
    down = {t.work.slot: n for n, t in enumerate(turns) if isinstance(t.work, Transfer) and not t.work.up}
    assert list(up) == [0, 1], "x is asked for first"
    assert {turns[n].stream for n in up.values()} == {UPLOADS}
    assert {turns[n].stream for n in down.values()} == {DOWNLOADS}
    with_y = [n for n, t in enumerate(turns) if not isinstance(t.work, Transfer) and up[1] in done[n]]
    assert len(with_y) == 1 < len(launches), "one launch reads y, the others do not wait for it"
    assert len([n for n in done[down[2]] if n not in up.values()]) < len(launches) - 1, "the first result goes home early"
    assert with_y[0] in done[down[3]]
    needs = dependences(made, [t.work for t in turns])
    assert all(n <= d for n, d in zip(needs, done, strict=True))


def test_sides_have_graphs_of_their_own() -> None:
    """Arrays of the host and on the device, mixed in every way; a donated array of the host comes back."""
    exe: Any = tw.compile(staged, tw.spec(24, 24), tw.spec(24, 24), target="cuda-emulator")
    expected = exe(A, 2 * A)
    for _ in range(2):
        for x, y in ((exe.to_device(A), 2 * A), (A, exe.to_device(2 * A)), (exe.to_device(A), exe.to_device(2 * A))):
            for found in (exe(x, y), [v.numpy() for v in exe.on_device(x, y)]):
                np.testing.assert_array_equal(found, expected)


def test_a_call_whose_results_stay_does_not_wait_and_the_next_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    exe: Any = tw.compile(lambda x: x + 1.0, tw.spec(24, 24), target="cuda-emulator")
    joined: list[Event] = []
    join = Emulator.join

    def counted(self: Emulator, event: Event) -> None:
        joined.append(event)
        join(self, event)

    monkeypatch.setattr(Emulator, "join", counted)
    first = exe.on_device(A)
    assert not joined
    second = exe.on_device(3 * A)
    assert len(joined) == 1
    for found, x in ((first, A), (second, 3 * A)):
        np.testing.assert_array_equal(found.numpy(), x + np.float32(1))
    monkeypatch.setattr(CudaBinding, "_rest", lambda self: None)
    exe.on_device(A)
    with pytest.raises(KernelFaultError, match=r"race with the host: .* of 2,304 bytes was changed by the host before"):
        exe.device.synchronize()
    assert np.isnan(exe(A)).all(), "nobody waited for the download"


def test_the_host_waits_for_downloads_through_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    drop(monkeypatch, 0, DOWNLOADS)
    assert np.isnan(CudaBinding(program(branches), {}, DeviceStore(Emulator(1 << 22))).run([A])).all()


def test_branches_wait_for_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(flag: Any, x: Any, y: Any) -> Any:
        return tw.cond(flag, lambda: x * 2.0, lambda: x + y)

    specs = (tw.spec(dtype="bool"), tw.spec(24, 24), tw.spec(24, 24))
    exe: Any = tw.compile(model, *specs, target="cuda-emulator")
    for flag, expected in ((True, 2 * A), (False, A + 3 * A), (True, 2 * A)):
        np.testing.assert_allclose(exe(np.bool_(flag), A, 3 * A), expected, rtol=1e-6)  # a sum may be one rounding apart
    drop(monkeypatch, 0, UPLOADS)
    with pytest.raises(KernelFaultError, match=rf"on stream 0 reads memory that an upload on stream {UPLOADS} writes"):
        exe(np.bool_(True), A, A)


def test_a_kernel_that_fails_leaves_nothing_behind() -> None:
    """The next call finds staging memory and streams as after a wait."""
    exe: Any = tw.compile(lambda x: x + 1.0, tw.spec(24, 24), target="cuda-emulator")
    expected = exe(A)
    kernel_of = Emulator._note

    def failing(self: Emulator, stream: int, what: str, extents: Any) -> None:
        kernel_of(self, stream, what, extents)
        if what.startswith("kernel"):
            raise KernelFaultError("trap", "planted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emulator, "_note", failing)
        with pytest.raises(KernelFaultError, match="planted"):
            exe(A)
    np.testing.assert_array_equal(exe(A), expected)


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
