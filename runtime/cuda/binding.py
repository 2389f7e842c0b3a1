"""A CudaProgram on a device, bound to its weights: buffers, the launch plan, copies in and out.

Weights and state live in a `DeviceStore` that all programs of one model share; state stays there between calls. A program
whose launches never depend on data is captured once and replayed; another is launched step by step, reading a byte from the
device where a branch asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...ir.cuda_program import CudaKernel, CudaProgram, Launch, Place
from ...ir.errors import CompileError
from ..buffers import Array, empty
from .device import Device, Extent, Function, Graph


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
        self._module = self.device.load(program.ptx)
        self._functions: dict[str, Function] = {k.name: self._module.function(k.name) for k in program.kernels}
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
        self._graph: Graph | None = None
        self.bind(fixed)

    def close(self) -> None:
        """Gives the program's memory back, and the model's where nothing else uses it."""
        for array in self._fixed.values():
            self.store.release(array)
        self._fixed = {}
        for address in self._owned:
            self.device.free(address)
        self._owned = []
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
            self._graph = None

    def settle(self, weights: Iterable[Array]) -> None:
        """Nothing to do: what `runtime.binding.Binding` does here is about the host's memory pages."""

    # ------------------------------------------------------------------ running

    def run(self, inputs: Sequence[Array], addresses: Sequence[int] = (), out: Sequence[Array] | None = None) -> Any:
        """Runs on checked arrays and returns the output, or a tuple of them; donated arguments come back as themselves.

        `out` holds an array per output that is no alias. `addresses` (on the host) are of no use here.
        """
        program, device, first = self.program, self.device, self.program.first_output
        with self.store.lock:
            for slot, array in zip(self.arguments, inputs, strict=True):
                device.upload(self._slots[slot], array)
            self._launch()
            for i in self._state:
                self.store.changed(self._fixed[i])
            if out is None:
                out = [empty(program.outputs[k].type.static_shape, program.outputs[k].type.dtype) for k in self.fresh]
            for k, array in zip(self.fresh, out, strict=True):
                device.download(self._slots[first + k], array)
            by_slot = dict(zip(self.arguments, inputs, strict=True))
            for _, i in self.donated:
                device.download(self._slots[i], by_slot[i])
            device.synchronize()
        results: dict[int, Array] = dict(zip(self.fresh, out, strict=True))
        results |= {k: by_slot[i] for k, i in self.donated}
        returned = [results[k] for k in sorted(results)]
        return returned[0] if len(returned) == 1 else tuple(returned)

    def _launch(self) -> None:
        program = self.program
        for slot, nbytes in [(program.arena, program.arena_bytes)] + [
            (program.first_output + k, program.outputs[k].type.nbytes) for k in self.fresh
        ]:
            if nbytes:
                self.device.forget(self._slots[slot], nbytes)
        if not program.is_static:
            for launch in program.launches(self._read):
                self._start(launch)
            return
        if self._graph is None:
            self._graph = self.device.capture(self._start_all)
        self._graph.replay()

    def _start_all(self) -> None:
        for launch in self.program.launches():
            self._start(launch)

    def _read(self, place: Place) -> int:
        byte = np.empty(1, np.uint8)
        self.device.download(self._address(place), byte)
        return int(byte[0])

    def _address(self, place: Place) -> int:
        return self._slots[place[0]] + place[1]

    def _start(self, launch: Launch) -> None:
        kernel: CudaKernel = launch.kernel
        addresses = [self._address(p) for p in launch.pointers]
        extents = [
            Extent(a, p.nbytes, p.written, p.name) for a, p in zip(addresses, kernel.parameters, strict=True)
        ]  # fmt: skip
        self.device.launch(
            *(self._functions[kernel.name], kernel.grid, kernel.block, [*addresses, *launch.scalars]),
            shared=kernel.dynamic_shared,
            extents=extents,
        )
