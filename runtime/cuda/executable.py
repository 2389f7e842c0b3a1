"""An Executable whose programs run on a CUDA device (or the emulator): the same calls, checks, weights and state.

The device is opened by the first call that needs it, so that text can be read and programs compiled without one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...ir.cuda_program import CudaProgram
from ...ir.dtypes import as_dtype
from ...ir.errors import DTypeError, InputError
from ...ir.types import TensorType
from ..buffers import Array, as_array, describe, empty
from ..compiled import Compiled
from ..executable import Executable, _Specialisation
from .arrays import Borrowed, DeviceArray, borrow, check_type
from .binding import CudaBinding, DeviceStore
from .device import Device


class CudaExecutable(Executable):
    """See `Executable`. `device` gives the Device; `build` makes `Compiled` whose programs are CudaPrograms; `estimate` says what
    such a program should take, `export` writes it to a folder.

    State that a training step updates stays on the device; `parameters` copies it back.
    """

    _binds_early = False

    def __init__(
        self,
        *args: Any,
        device: Callable[[], Device],
        estimate: Callable[[CudaProgram, str], Any],
        export: Callable[[CudaExecutable, Path, Sequence[int]], None] | None = None,
        shares: Executable | None = None,
        **options: Any,
    ) -> None:
        self._open = device
        self._estimate = estimate
        self._export = export
        self._store: DeviceStore | None = None
        self._opening = threading.Lock()
        self._shares = shares
        super().__init__(*args, shares=shares, **options)

    @property
    def device(self) -> Device:
        """The device, opened now if it was not. Raises RuntimeUnavailableError that says what is missing."""
        return self._stored().device

    def _stored(self) -> DeviceStore:
        if isinstance(self._shares, CudaExecutable):
            return self._shares._stored()
        with self._opening:
            if self._store is None:
                self._store = DeviceStore(self._open())
            return self._store

    def _bound(self, specialisation: _Specialisation) -> Any:
        if specialisation.binding is None:
            with self._lock:
                if specialisation.binding is None:
                    program = cast(CudaProgram, specialisation.compiled.run)
                    made = CudaBinding(program, self._fixed(specialisation), self._stored())
                    specialisation.binding = cast(Any, made)
        return specialisation.binding

    def _taken(self, value: Any, expected: TensorType, where: Callable[[], str]) -> Any:
        found = borrow(value, lambda: self.device, where)
        if found is None:
            return as_array(value, expected, where)
        check_type(found, expected, where)
        return found

    def on_device(self, *inputs: Any) -> Any:
        """As a call, but results are DeviceArrays: they stay on the device, and may be given to the next call or, through
        `__cuda_array_interface__` or DLPack, to another library. `numpy()` copies one to the host."""
        return self._called(inputs, None, keep=True)

    def to_device(self, array: Any) -> DeviceArray:
        """A copy of a host's array on the device. Raises InputError for what is no array."""
        host = np.ascontiguousarray(array)
        try:
            made = DeviceArray(self.device, host.shape, as_dtype(host.dtype))
        except DTypeError as error:
            raise InputError(f"to_device takes an array of numbers, got {describe(host)}") from error
        made.device.upload(made.address, host)
        made.device.synchronize()
        return made

    def _careful(self, inputs: Sequence[Any], out: Any) -> Any:
        return self._called(inputs, out, keep=False)

    def _called(self, inputs: Sequence[Any], out: Any, *, keep: bool) -> Any:
        arrays: Sequence[Any]
        arrays, specialisation = self._accept(inputs)
        binding: Any = self._bound(specialisation)
        donated = {slot for _, slot in binding.donated}
        ready: list[Any] = []
        for (name, _), slot, array in zip(self.arguments, binding.arguments, arrays, strict=True):
            if isinstance(array, Borrowed):
                if slot in donated and not array.writable:
                    raise InputError(f"{self.graph.name}: input {name!r} is donated, and read-only: pass a copy")
                ready.append(array)
                continue
            if slot in donated:
                self._check_donated(name, array, [a for a in arrays if not isinstance(a, Borrowed)])
            ready.append(array)
        given = None if out is None else self._device_out(binding, out)
        if out is not None and given is None:
            result = self._into(binding, ready, (), out)
        else:
            result = binding.run(ready, (), given, keep=keep)
            self._promote(specialisation)
        if self._unflatten is not None:
            return self._unflatten(result if isinstance(result, tuple) else (result,))
        return result

    def _device_out(self, binding: Any, out: Any) -> list[Borrowed] | None:
        """The arrays of out= on the device; None where they are of the host. Raises InputError where they do not fit."""
        given = list(out) if isinstance(out, list | tuple) else [out]
        wanted = [binding.program.outputs[k] for k in binding.fresh]
        found = [borrow(a, lambda: self.device, lambda: f"{self.graph.name}: out=") for a in given]
        if all(f is None for f in found):
            return None
        if len(found) != len(wanted):
            raise InputError(f"{self.graph.name}: out= has {len(found)} arrays, the model has {len(wanted)} outputs")
        done: list[Borrowed] = []
        for f, a in zip(found, wanted, strict=True):
            if f is None or f.kind is not a.type.dtype or f.shape != a.type.static_shape or not f.writable:
                what = "an array of the host" if f is None else f"{f.described}{'' if f.writable else ', read-only'}"
                raise InputError(f"{self.graph.name}: out= for {a.name!r} must be {a.type}, writable, on the device, got {what}")
            done.append(f)
        return done

    def _promote(self, specialisation: _Specialisation) -> None:
        self._latest = specialisation

    def _prepare_now(self, program: Any) -> dict[str, Array]:
        """Prepared weights are computed on the device and come back: the store then holds them under their own names."""
        made = CudaBinding(cast(CudaProgram, program), {}, self._stored())
        try:
            outputs = [empty(a.type.static_shape, a.type.dtype) for a in program.outputs]
            made.run([self._parameters[a.name] for a in program.inputs], (), outputs)
        finally:
            made.close()
        return dict(zip((a.name for a in program.outputs), outputs, strict=True))

    def _fetch(self) -> None:
        store = self._shares._store if isinstance(self._shares, CudaExecutable) else self._store
        if store is not None:
            store.fetch()

    @property
    def parameters(self) -> dict[str, Array]:
        """The weights and state by name: state is copied back from the device first."""
        self._fetch()
        return super().parameters

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """As `Executable.set_parameters`; state on the device is overwritten too."""
        self._fetch()
        super().set_parameters(values)
        if self._store is not None or self._shares is not None:
            store = self._stored()
            with store.lock:
                for name in values.keys() & self._state_names:
                    store.send(name)

    def profile(self, *inputs: Any, repeats: int = 20, estimate: bool = False) -> Any:
        """With `estimate=True`, what each kernel should take (cuda_estimate.py), for the sizes met last; no inputs, no device.

        Raises InputError without: times on a device are not measured, and the emulator's would say nothing.
        """
        if not estimate:
            raise InputError(
                f"{self.graph.name}: profile() measures CPU kernels; for a CUDA target there is profile(estimate=True)"
            )
        if inputs:
            raise InputError(f"{self.graph.name}: an estimate takes no inputs; it is for the sizes met last: exe.specialise(...)")
        return self._estimate(cast(CudaProgram, self.compiled.run), self.graph.name)

    def export(self, folder: str | Path, *, sms: Sequence[int] = (75, 80, 90)) -> None:
        """Writes a folder of PTX for these SMs, launch plans and weights, for the sizes met so far; `tw.load` takes it.

        A folder that was exported before is replaced, at one stroke. Raises InputError for a folder that holds something else, an
        SM that has no row, or a model that has met no sizes yet; CompileError, OSError.
        """
        if self._export is None:
            raise InputError(f"{self.graph.name} was loaded from a folder: copy that")
        self._export(self, Path(folder), tuple(sms))

    @property
    def met(self) -> tuple[tuple[dict[str, int], Compiled], ...]:
        """The sizes that were compiled for, and their programs."""
        return tuple((dict(s.sizes), s.compiled) for s in self._specialisations.values())

    def __repr__(self) -> str:
        return super().__repr__().rsplit(",", 1)[0] + ", CUDA>"


__all__ = ["Compiled", "CudaExecutable"]
