"""An Executable whose programs run on a CUDA device (or the emulator): the same calls, checks, weights and state.

The device is opened by the first call that needs it, so that text can be read and programs compiled without one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

from ...ir.cuda_program import CudaProgram
from ...ir.errors import InputError
from ..buffers import Array, empty
from ..compiled import Compiled
from ..executable import Executable, _Specialisation
from .binding import CudaBinding, DeviceStore
from .device import Device


class CudaExecutable(Executable):
    """See `Executable`. `device` gives the Device; `build` makes `Compiled` whose programs are CudaPrograms.

    State that a training step updates stays on the device; `parameters` copies it back.
    """

    _binds_early = False

    def __init__(self, *args: Any, device: Callable[[], Device], shares: Executable | None = None, **options: Any) -> None:
        self._open = device
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

    def profile(self, *inputs: Any, repeats: int = 20) -> Any:
        """Raises InputError: times on a device are not measured yet, and the emulator's would say nothing."""
        raise InputError(
            f"{self.graph.name}: profile() measures CPU kernels; for a CUDA target read the estimates of the program's kernels"
        )

    def __repr__(self) -> str:
        return super().__repr__().rsplit(",", 1)[0] + ", CUDA>"


__all__ = ["Compiled", "CudaExecutable"]
