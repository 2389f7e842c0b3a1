"""The emulator as a Device: PTX runs in numpy, every access is checked. Slow, exact, and there on any machine.

Everything runs when it is asked for, but what a GPU does while the host goes on is shown as late as it may come: staging memory
gets a download's bytes when somebody waits for it (POISON until then), and that an upload's bytes have stayed as they were is
looked at when somebody waits for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ...ir.errors import DeviceError, KernelFaultError, LaunchError
from . import device as base
from .device import Argument, Array, Extent, Signature, check_buffer, pack_arguments
from .dlpack import CPU
from .memory import GLOBAL_BASE, POISON, UNWRITTEN, WRITTEN, GlobalMemory
from .ptx_interp import Loaded, LoadedModule, launch
from .state import Counters, Options

CAPACITY: Final = 1 << 30
_REMEMBERED: Final = 10_000  # launches and copies that later ones are compared with
_KEPT: Final = 64  # launches of a kernel whose counters are kept


class EmulatedFunction(base.Function):
    """A kernel in the emulator."""

    def __init__(self, loaded: Loaded) -> None:
        kernel = loaded.kernel
        self.loaded = loaded
        self.signature = Signature(kernel.name, tuple((p.type, p.size) for p in kernel.params))


class EmulatedModule(base.Module):
    """A module in the emulator."""

    def __init__(self, module: LoadedModule) -> None:
        self.module = module
        self._functions = {name: EmulatedFunction(k) for name, k in module.kernels.items()}

    def function(self, name: str) -> EmulatedFunction:
        found = self._functions.get(name)
        if found is None:
            raise LaunchError(f"the module has no kernel {name!r}; it has {sorted(self._functions)}")
        return found

    def unload(self) -> None:
        self.module.unload()


class EmulatedEvent(base.Event):
    """How far each stream had come, as far as the stream that it was recorded in knew; set when the record runs."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}


@dataclass(frozen=True)
class _Touched:
    """What a launch or copy touched: number `at` of its stream."""

    stream: int
    at: int
    what: str
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class _Copy:
    """A copy between staging memory and the device that nobody has waited for: number `at` of its stream, and its bytes."""

    stream: int
    at: int
    staged: Array
    data: Array
    up: bool


class EmulatedGraph(base.Graph):
    """Captured calls, run again one after the other."""

    def __init__(self, device: Emulator, calls: list[Callable[[], None]]) -> None:
        self._device, self._calls = device, calls

    def replay(self) -> None:
        for call in self._calls:
            self._device.perform(call)


class Emulator(base.Device):
    """A device of `capacity` bytes that interprets PTX. `options` say what is checked and counted (state.py); `counters` are
    those of the latest launches, by kernel."""

    def __init__(self, capacity: int = CAPACITY, options: Options | None = None, sm: int = 80) -> None:
        self.name = "PTX emulator (numpy)"
        self.dlpack = (CPU, 0)  # its memory is the host's
        self.sm = sm
        self.total = capacity
        self.options = options or Options()
        self.memory = GlobalMemory(capacity)
        self.counters: dict[str, list[Counters]] = {}
        self._recording: list[Callable[[], None]] | None = None
        self._known: dict[int, dict[int, int]] = {0: {0: 0}}  # what each stream knows to have ended, by stream
        self._touched: list[_Touched] = []  # what the host has not waited for
        self._pinned: list[weakref.ref[Array]] = []
        self._copies: list[_Copy] = []

    def allocate(self, nbytes: int, name: str = "") -> int:
        return self.memory.allocate(nbytes, name)

    def free(self, address: int) -> None:
        self.memory.free(address)

    def perform(self, call: Callable[[], None]) -> None:
        """Runs a call; where it fails, nothing that was asked for before is under way any more."""
        try:
            call()
        except DeviceError:
            self._known, self._touched, self._copies = {0: {0: 0}}, [], []
            raise

    def _do(self, call: Callable[[], None]) -> None:
        if self._recording is None:
            self.perform(call)
        else:
            self._recording.append(call)

    def staging(self, nbytes: int) -> Array:
        made = np.full(nbytes, POISON, np.uint8)
        self._pinned = [*(r for r in self._pinned if r() is not None), weakref.ref(made)]
        return made

    def _is_staged(self, array: Array) -> bool:
        low, high = np.lib.array_utils.byte_bounds(array)
        held = [p for r in self._pinned if (p := r()) is not None]
        return any(p.ctypes.data <= low and high <= p.ctypes.data + p.nbytes for p in held)

    def upload(self, address: int, array: Array, stream: int = 0) -> None:
        check_buffer(array, "a copy to the device")
        at = self.memory.range(address, array.nbytes)
        source = array.reshape(-1).view(np.uint8)
        later = self.options.check and self._is_staged(array)

        def go() -> None:
            self._note(stream, "an upload", [Extent(address, array.nbytes)])
            self.memory.data[at] = source
            self.memory.state[at] = WRITTEN
            if later:
                self._copies.append(_Copy(stream, self._stream(stream)[stream], source, source.copy(), True))

        self._do(go)

    def download(self, address: int, array: Array, stream: int | None = None) -> None:
        check_buffer(array, "a copy from the device")
        if stream is not None and not self._is_staged(array):
            raise DeviceError("a copy from the device that nobody waits for needs page-locked memory: an array of staging()")
        if stream is None and self._recording is not None:
            raise DeviceError("a copy from the device that is waited for cannot be captured")
        to = array.reshape(-1).view(np.uint8)

        def go() -> None:
            self._note(stream or 0, "a download", [Extent(address, array.nbytes, False)])
            data = self._read(address, array.nbytes)
            if stream is None:
                to[:] = data
                return
            to[:] = POISON
            self._copies.append(_Copy(stream, self._stream(stream).get(stream, 0), to, data, False))

        self._do(go)

    def _read(self, address: int, nbytes: int) -> Array:
        """A copy of bytes of the device. Raises DeviceError where nobody wrote them."""
        at = self.memory.range(address, nbytes)
        unwritten = np.flatnonzero(self.memory.state[at] != WRITTEN)
        if len(unwritten) and self.options.check:
            place = self.memory.describe(address - GLOBAL_BASE + int(unwritten[0]))
            raise DeviceError(
                f"{len(unwritten)} of {nbytes} bytes that are copied from the device were never written, the first {place}"
            )
        return self.memory.data[at].copy()

    def copy(self, to: int, source: int, nbytes: int) -> None:
        a, b = self.memory.range(to, nbytes), self.memory.range(source, nbytes)

        def go() -> None:
            self._note(0, "a copy", [Extent(source, nbytes, False), Extent(to, nbytes)])
            self.memory.data[a] = self.memory.data[b].copy()
            self.memory.state[a] = self.memory.state[b].copy()

        self._do(go)

    def forget(self, address: int, nbytes: int) -> None:
        at = self.memory.range(address, nbytes)

        def go() -> None:
            self.memory.state[at] = UNWRITTEN
            self.memory.data[at] = POISON

        self._do(go)

    def load(self, ptx: str) -> EmulatedModule:
        return EmulatedModule(LoadedModule(ptx, self.memory))

    def launch(
        self,
        function: base.Function,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Argument],
        *,
        shared: int = 0,
        extents: Sequence[Extent] | None = None,
        stream: int = 0,
    ) -> None:
        if not isinstance(function, EmulatedFunction):
            raise LaunchError(f"{function!r} was not loaded by the emulator")
        params = pack_arguments(function.signature, arguments)

        def go() -> None:
            self._note(stream, f"kernel {function.signature.name}", extents or ())
            done = launch(function.loaded, grid, block, params, dynamic_shared=shared, options=self.options, extents=extents)
            kept = self.counters.setdefault(function.signature.name, [])
            kept.append(done)
            del kept[:-_KEPT]

        self._do(go)

    def wait_for(self, stream: int) -> None:
        """Everything has run already."""

    def let_wait(self, stream: int) -> None:
        """Everything has run already."""

    def host_address(self, address: int) -> int:
        return int(self.memory.data.ctypes.data) + address - GLOBAL_BASE

    def synchronize(self) -> None:
        """Everything has run already; from now on nothing of it can race."""
        copies, self._copies = self._copies, []
        self._known, self._touched = {0: {0: 0}}, []
        self._arrive(copies)

    def join(self, event: base.Event) -> None:
        """As `synchronize`, for what the event comes after."""
        if not isinstance(event, EmulatedEvent):
            raise DeviceError(f"{event!r} was not recorded by the emulator")
        ended = event.known
        copies = [c for c in self._copies if ended.get(c.stream, 0) >= c.at]
        self._copies = [c for c in self._copies if ended.get(c.stream, 0) < c.at]
        self._touched = [t for t in self._touched if ended.get(t.stream, 0) < t.at]
        for stream, known in self._known.items():  # what is asked for from now on comes after it too
            known |= {s: max(known.get(s, 0), at) for s, at in ended.items() if s != stream}
        self._arrive(copies)

    def _arrive(self, copies: Sequence[_Copy]) -> None:
        """Ends copies. Raises KernelFaultError where the host has touched staging memory that they were at."""
        for c in copies:
            if (c.staged != (c.data if c.up else POISON)).any():
                did, way = ("changed", "to") if c.up else ("written", "from")
                raise KernelFaultError(
                    "race with the host",
                    f"staging memory of {c.staged.nbytes:,} bytes was {did} by the host before a copy {way} the device on stream "
                    f"{c.stream} had been waited for",
                )
            if not c.up:
                c.staged[:] = c.data

    # ------------------------------------------------------------------ the order of streams

    def record(self, stream: int) -> EmulatedEvent:
        made = EmulatedEvent()

        def go() -> None:
            made.known = dict(self._stream(stream))

        self._do(go)
        return made

    def wait(self, stream: int, event: base.Event) -> None:
        if not isinstance(event, EmulatedEvent):
            raise DeviceError(f"{event!r} was not recorded by the emulator")

        def go() -> None:
            mine = self._stream(stream)
            for other, at in event.known.items():
                mine[other] = max(mine.get(other, 0), at)

        self._do(go)

    def _stream(self, stream: int) -> dict[int, int]:
        return self._known.setdefault(stream, {stream: 0})

    def _note(self, stream: int, what: str, extents: Sequence[Extent]) -> None:
        """Notes what runs now on a stream. Raises KernelFaultError where it touches what another stream may be at."""
        if not self.options.check:
            return
        known = self._stream(stream)
        known[stream] += 1
        if len(self._known) > 1:
            for before in self._touched:
                if before.stream == stream or known.get(before.stream, 0) >= before.at:
                    continue
                for e in extents:
                    for f in before.extents:
                        if (e.written or f.written) and e.address < f.address + f.nbytes and f.address < e.address + e.nbytes:
                            self._race(stream, what, e, before, f)
        del self._touched[:-_REMEMBERED]
        self._touched.append(_Touched(stream, known[stream], what, tuple(extents)))

    def _race(self, stream: int, what: str, mine: Extent, before: _Touched, theirs: Extent) -> None:
        did, done = ("writes" if e.written else "reads" for e in (mine, theirs))
        where = self.memory.describe(max(mine.address, theirs.address) - GLOBAL_BASE)
        raise KernelFaultError(
            "race between launches",
            f"{what} on stream {stream} {did} memory that {before.what} on stream {before.stream} {done}, and no event orders "
            f"the two: {mine.name or 'an argument'} and {theirs.name or 'an argument'}, {where}",
        )

    def capture(self, work: Callable[[], None]) -> EmulatedGraph:
        if self._recording is not None:
            raise DeviceError("a capture is running already")
        calls: list[Callable[[], None]] = []
        self._recording = calls
        try:
            work()
        finally:
            self._recording = None
        return EmulatedGraph(self, calls)
