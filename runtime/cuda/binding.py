"""A CudaProgram on a device, bound to its weights: buffers, the launch plan, copies in and out.

Weights and state live in a `DeviceStore` that all programs of one model share; state stays there between calls. Arrays of the
host pass through page-locked staging memory, so that copies run beside launches. A program whose launches never depend on data
is captured once, with these copies, and replayed; another is launched step by step, reading a byte from the device where a
branch asks for it, each launch after the uploads that it reads. Copies from and to arrays on the device, whose addresses change
from call to call, come before and after.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from ...ir.cuda_program import CudaKernel, CudaProgram, Place
from ...ir.cuda_streams import DOWNLOADS, UPLOADS, Transfer, Work, beside, homes, schedule
from ...ir.errors import CompileError, KernelFaultError
from ..buffers import Array, empty
from .arrays import Borrowed, DeviceArray
from .device import Device, Event, Extent, Function, Graph

_GRAPHS: Final = 4  # of a program that are kept: one for each set of slots that the host gives and takes
_LOOP_LINE: Final = re.compile(r"\(([\w$]+)\.loops:(\d+)\)")  # what a `.loc` of a generated kernel becomes in a message


_Sides = tuple[tuple[int, ...], tuple[int, ...]]  # the slots that come from the host, and those that go to it


def _given(array: Any) -> Any:
    return array.value if isinstance(array, Borrowed) else array


class _Stored:
    """An array of the host and where it lies on the device; `users` are the bindings that read it."""

    def __init__(self, name: str, address: int, array: Array) -> None:
        self.name, self.address, self.array = name, address, array
        self.users = 0
        self.dirty = False  # changed on the device since it was last copied back


class DeviceStore:
    """The arrays of a model on a device: each is there once, however many programs use it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self._entries: dict[int, _Stored] = {}  # by the id of the host's array, which the entry keeps alive

    def acquire(self, name: str, array: Array) -> int:
        """The address of an array's contents, copied there if they are not yet."""
        entry = self._entries.get(id(array))
        if entry is None:
            address = self.device.allocate(max(array.nbytes, 1), name)
            entry = self._entries[id(array)] = _Stored(name, address, array)
            self.device.upload(address, np.ascontiguousarray(array))
            self.device.synchronize()
        entry.users += 1
        return entry.address

    def release(self, array: Array) -> None:
        """One user less; the last one's memory is given back."""
        entry = self._entries[id(array)]
        entry.users -= 1
        if not entry.users:
            if entry.dirty:
                self.device.download(entry.address, entry.array)
            self.device.free(entry.address)
            del self._entries[id(array)]

    def changed(self, array: Array) -> None:
        """Notes that a program has changed it on the device."""
        self._entries[id(array)].dirty = True

    def send(self, name: str) -> None:
        """Copies an array that the host has changed in place to the device again, if it is there."""
        for entry in self._entries.values():
            if entry.name == name:
                self.device.upload(entry.address, entry.array)
                entry.dirty = False
        self.device.synchronize()

    def fetch(self) -> None:
        """Copies what programs have changed back into the host's arrays."""
        with self.lock:
            for entry in self._entries.values():
                if entry.dirty:
                    self.device.download(entry.address, entry.array)
                    entry.dirty = False


class CudaBinding:
    """What runs one program. `fixed` maps names of inputs that are no arguments to arrays, which go to the store."""

    def __init__(self, program: CudaProgram, fixed: Mapping[str, Array], store: DeviceStore) -> None:
        self.program, self.store, self.device = program, store, store.device
        names = [a.name for a in program.inputs]
        self.arguments = tuple(k for k, n in enumerate(names) if n not in fixed)
        aliases = dict(program.aliases)
        self.fresh = tuple(k for k in range(len(program.outputs)) if k not in aliases)
        self.donated = tuple((k, i) for k, i in program.aliases if i in self.arguments)
        self._state = tuple(i for _, i in program.aliases if i not in self.arguments)
        self._fixed: dict[int, Array] = {}  # by slot
        self._module = None  # where there are no kernels: every output is empty, or an input
        self._functions: dict[str, Function] = {}
        if program.kernels:
            self._module = self.device.load(program.ptx)
            self._functions = {k.name: self._module.function(k.name) for k in program.kernels}
        self._slots = [0] * (program.arena + 1)
        own = [(k, program.inputs[k].type.nbytes, names[k]) for k in self.arguments]
        own += [(program.first_output + k, program.outputs[k].type.nbytes, program.outputs[k].name) for k in self.fresh]
        own += [(program.first_constant + k, c.nbytes, f"constant {k}") for k, c in enumerate(program.constants)]
        own.append((program.arena, program.arena_bytes, "arena"))
        self._owned: list[int] = []
        try:
            for slot, nbytes, name in own:
                self._slots[slot] = self.device.allocate(max(nbytes, 1), f"{program.name}.{name}")
                self._owned.append(self._slots[slot])
            for k, c in enumerate(program.constants):
                self.device.upload(self._slots[program.first_constant + k], np.ascontiguousarray(c))
            self.device.synchronize()
        except BaseException:
            self.close()
            raise
        self._home = homes(program)
        self._staging: dict[tuple[int, bool], Array] = {}  # by slot, and whether it goes to the device
        self._busy: Event | None = None  # the end of a run that nobody has waited for
        self._graphs: dict[_Sides, Graph] = {}
        self.bind(fixed)

    def close(self) -> None:
        """Gives the program's memory back, and the model's where nothing else uses it."""
        self._graphs, self._staging = {}, {}
        for array in self._fixed.values():
            self.store.release(array)
        self._fixed = {}
        for address in self._owned:
            self.device.free(address)
        self._owned = []
        if self._module is not None:
            self._module.unload()

    def bind(self, fixed: Mapping[str, Array]) -> None:
        """Puts the inputs that are no arguments in place."""
        with self.store.lock:
            before, self._fixed = self._fixed, {}
            for k, argument in enumerate(self.program.inputs):
                if k in self.arguments:
                    continue
                array, wanted = fixed[argument.name], argument.type
                if array.dtype != wanted.dtype.numpy or array.shape != wanted.static_shape:
                    raise CompileError(f"{argument.name}: bound to {array.dtype}{array.shape} where the program takes {wanted}")
                self._slots[k] = self.store.acquire(argument.name, array)
                self._fixed[k] = array
            for array in before.values():
                self.store.release(array)
            for output, source in self.program.aliases:
                self._slots[self.program.first_output + output] = self._slots[source]
            self._graphs = {}

    def settle(self, weights: Iterable[Array]) -> None:
        """Nothing to do: what `runtime.binding.Binding` does here is about the host's memory pages."""

    # ------------------------------------------------------------------ running

    def run(
        self, inputs: Sequence[Any], addresses: Sequence[int] = (), out: Sequence[Any] | None = None, *, keep: bool = False
    ) -> Any:
        """Runs on checked arrays and returns the output, or a tuple of them; donated arguments come back as themselves.

        Inputs are arrays, or Borrowed where they lie on the device. `out` holds an array (or a Borrowed) per output that is no
        alias; with `keep` and without `out`, results are DeviceArrays. `addresses` (on the host) are of no use here.
        """
        with self.store.lock:
            out = self._results(out, keep)
            given = dict(zip(self.arguments, inputs, strict=True))
            wanted = dict(zip((self.program.first_output + k for k in self.fresh), out, strict=True))
            wanted |= {i: given[i] for _, i in self.donated}
            up = tuple(slot for slot, array in given.items() if isinstance(array, np.ndarray) and array.nbytes)
            down = tuple(slot for slot, array in wanted.items() if isinstance(array, np.ndarray) and array.nbytes)
            self._bring(given, up, down)
            self._launch((up, down))
            for i in self._state:
                self.store.changed(self._fixed[i])
            self._give(wanted)
            self._busy = self.device.record(0)
            foreign = any(isinstance(a, Borrowed) and a.foreign for a in (*inputs, *out))
            if down or foreign:  # who lent memory may do with it what he likes as soon as the call returns
                self._rest()
            for slot in down:
                np.copyto(wanted[slot], self._staged(slot, False, wanted[slot]))
        results: dict[int, Any] = {k: _given(a) for k, a in zip(self.fresh, out, strict=True)}
        results |= {k: _given(given[i]) for k, i in self.donated}
        returned = [results[k] for k in sorted(results)]
        return returned[0] if len(returned) == 1 else tuple(returned)

    def _results(self, out: Sequence[Any] | None, keep: bool) -> Sequence[Any]:
        """The arrays that results go to."""
        if out is not None:
            return out
        types = [self.program.outputs[k].type for k in self.fresh]
        if keep:
            return [DeviceArray(self.device, t.static_shape, t.dtype) for t in types]
        return [empty(t.static_shape, t.dtype) for t in types]

    def _bring(self, given: Mapping[int, Any], up: Sequence[int], down: Sequence[int]) -> None:
        """Arrays of the host to staging memory, those on the device to their slots."""
        if up or down:
            self._rest()
        for slot in down:
            self._staged(slot, False)  # made before anything is captured
        for slot, array in given.items():
            if slot in up:
                np.copyto(self._staged(slot, True, array), array)
            elif isinstance(array, Borrowed):
                self._after(array)
                self.device.copy(self._slots[slot], array.address, array.nbytes)

    def _give(self, wanted: Mapping[int, Any]) -> None:
        """Copies slots to the arrays on the device that they are wanted in."""
        for slot, array in wanted.items():
            if isinstance(array, DeviceArray | Borrowed):
                self._after(array)
                self.device.copy(array.address, self._slots[slot], array.nbytes)

    def _after(self, array: Any) -> None:
        """What is asked for next comes after what its lender's stream has to do."""
        if isinstance(array, Borrowed) and array.stream is not None:
            self.device.wait_for(array.stream)

    def again(self, times: int) -> None:
        """Launches what the last call did, on what lies there, so often, and waits: for measuring, without copies."""
        with self.store.lock:
            for _ in range(times):
                self._launch(((), ()))
            self.device.synchronize()

    def _rest(self) -> None:
        """Waits for the last run: then staging memory is nobody's."""
        busy, self._busy = self._busy, None
        if busy is not None:
            self.device.join(busy)

    def _staged(self, slot: int, up: bool, like: Array | None = None) -> Array:
        """The staging memory of a slot, one for each direction; its bytes, or as the array that is copied."""
        found = self._staging.get((slot, up))
        if found is None:
            argument = (*self.program.inputs, *self.program.outputs)[slot]
            found = self._staging[slot, up] = self.device.staging(argument.type.nbytes)
        return found if like is None else found.view(like.dtype).reshape(like.shape)

    def _launch(self, sides: _Sides) -> None:
        try:
            self._launch_all(sides)
        except KernelFaultError as fault:
            raise KernelFaultError(fault.kind, self._shown(str(fault).removeprefix(f"{fault.kind}: "))) from fault

    def _shown(self, message: str) -> str:
        """The message, and the line of the loop IR that it names."""
        found = _LOOP_LINE.search(message)
        sources = {k.name: k.source.splitlines() for k in self.program.kernels}
        if found is None or not 0 < int(found[2]) <= len(sources.get(found[1], ())):
            return message
        return f"{message}\n  {found[1]}.loops:{found[2]}: {sources[found[1]][int(found[2]) - 1].strip()}"

    def _launch_all(self, sides: _Sides) -> None:
        program = self.program
        for slot, nbytes in [(program.arena, program.arena_bytes)] + [
            (program.first_output + k, program.outputs[k].type.nbytes) for k in self.fresh
        ]:
            if nbytes:
                self.device.forget(self._slots[slot], nbytes)
        if not program.is_static:
            self._walk(sides)
            return
        graph = self._graphs.get(sides)
        if graph is None:
            while len(self._graphs) >= _GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            graph = self._graphs[sides] = self.device.capture(lambda: self._start_all(sides))
        graph.replay()

    def _start_all(self, sides: _Sides) -> None:
        """All launches and copies, on the streams that `schedule` gives them. Streams begin after what stream 0 was asked for,
        and stream 0 goes on after the last of each."""
        device = self.device
        turns = schedule(self.program, beside(self.program, list(self.program.launches()), *sides))
        begun: set[int] = {0}
        before = device.record(0) if any(t.stream for t in turns) else None
        events: dict[int, Event] = {}
        for number, turn in enumerate(turns):
            if turn.stream not in begun and before is not None:
                begun.add(turn.stream)
                device.wait(turn.stream, before)
            for n in turn.waits:
                device.wait(turn.stream, events[n])
            self._start(turn.work, turn.stream)
            if turn.is_awaited:
                events[number] = device.record(turn.stream)
        for stream in sorted(begun - {0}):
            device.wait(0, device.record(stream))

    def _walk(self, sides: _Sides) -> None:
        """Launches that depend on data, on stream 0: uploads beside them, downloads after the last."""
        device, (up, down) = self.device, sides
        copies = [c for c in beside(self.program, (), up, down) if isinstance(c, Transfer)]
        begin = device.record(0) if copies else None
        arriving: dict[int, Event] = {}
        for c in copies:
            if c.up and begin is not None:
                device.wait(UPLOADS, begin)
                self._start(c, UPLOADS)
                arriving[c.slot] = device.record(UPLOADS)

        def arrive(slots: Iterable[int]) -> None:
            for slot in {self._home.get(s, s) for s in slots} & arriving.keys():
                device.wait(0, arriving.pop(slot))

        def read(place: Place) -> int:
            arrive([place[0]])
            return self._read(place)

        for launch in self.program.launches(read):
            arrive(slot for slot, _ in launch.pointers)
            self._start(launch)
        arrive(list(arriving))
        back = [c for c in copies if not c.up]
        if back:
            device.wait(DOWNLOADS, device.record(0))
            for c in back:
                self._start(c, DOWNLOADS)
            device.wait(0, device.record(DOWNLOADS))

    def _read(self, place: Place) -> int:
        byte = np.empty(1, np.uint8)
        self.device.download(self._address(place), byte)
        return int(byte[0])

    def _address(self, place: Place) -> int:
        return self._slots[place[0]] + place[1]

    def _start(self, launch: Work, stream: int = 0) -> None:
        if isinstance(launch, Transfer):
            staged = self._staged(launch.slot, launch.up)
            (self.device.upload if launch.up else self.device.download)(self._slots[launch.slot], staged, stream)
            return
        kernel: CudaKernel = launch.kernel
        addresses = [self._address(p) for p in launch.pointers]
        extents = [
            Extent(a, p.nbytes, p.written, p.name) for a, p in zip(addresses, kernel.parameters, strict=True)
        ]  # fmt: skip
        self.device.launch(
            *(self._functions[kernel.name], kernel.grid, kernel.block, [*addresses, *launch.scalars]),
            shared=kernel.dynamic_shared,
            extents=extents,
            stream=stream,
        )
