"""One program bound to its weights: the part of a call that runs every time.

A `Frame` is what one call needs for itself (pointer table, arena, output arrays), so that several threads can be in the
same program. Frames and output arrays are kept and used again: after the first call, none is allocated. An output
array is handed out again only when its reference count says that nobody holds it, or a view of it.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any, Final, NoReturn

import numpy as np

from ..ir.errors import CompileError, TensorwrightError
from ..ir.program import Program
from . import threads as threading_limits
from .adaptive import ThreadChoice
from .buffers import Array, address_of, aligned_copy, block, empty
from .direct import Direct, supported
from .native import loaded
from .pages import Settling

_DIRECT_BYTES: Final = 1024 * 1024  # of outputs or arena: a run that writes more does not notice the way it is called
_RING: Final = 4  # sets of outputs a frame keeps for use again
_RING_BYTES: Final = 64 * 1024 * 1024  # beyond this much memory it keeps two

_CLOCK: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)  # clock_gettime, as native code calls it

_addressof = ctypes.addressof
_exported: Any = ctypes.c_char.from_buffer  # raises for read-only, non-contiguous and empty arrays: the slow path's business
_ndarray = np.ndarray
_getrefcount = sys.getrefcount


class _Probe:
    __slots__ = ()


def _counts(arrays: tuple[Any, ...]) -> int:
    highest = 0
    for array in arrays:
        highest = max(highest, _getrefcount(array))
    return highest


_IDLE: Final = _counts((_Probe(),))  # how `_counts` sees an object that only the tuple holds, in this Python
_COUNTS_HOLD: Final = getattr(sys, "_is_gil_enabled", lambda: True)()  # without the lock a count is stale when it is read


class Frame:
    """What one running call owns. `outputs` is a ring of (arrays, addresses) that are used again once dropped."""

    __slots__ = ("address", "arena", "keep", "outputs", "pointers")

    def __init__(self, pointers: Any, arena: Any, keep: object) -> None:
        self.pointers = pointers
        self.address = ctypes.addressof(pointers)
        self.arena = arena
        self.keep = keep
        self.outputs: list[tuple[tuple[Array, ...], tuple[int, ...]]] = []


class Binding:
    """A Program, loaded, with the arrays of its non-argument inputs in place.

    `fixed` maps input names to C-contiguous arrays of the right type; the remaining inputs are arguments, in the program's
    order. Outputs aliased to an input share its memory; those whose input is fixed are not returned.
    """

    def __init__(self, program: Program, fixed: Mapping[str, Array], threads: int, lock: threading.Lock | None = None) -> None:
        self.program = program
        self._native = loaded(program.object_code, program.entry)
        self._constants = tuple(aligned_copy(c) for c in program.constants)
        self._lock = lock
        self._parallel = any(k.parallel for k in program.kernels)
        self.threads = threads if self._parallel else 1
        self._contexts = tuple(threading_limits.context(n) for n in (1, self.threads))
        self._context_addresses = tuple(map(ctypes.addressof, self._contexts))
        self._choice = ThreadChoice() if self.threads > 1 else None
        names = [a.name for a in program.inputs]
        self.arguments = tuple(i for i, name in enumerate(names) if name not in fixed)
        # the outputs a call returns and makes room for; a donated argument comes back as its output
        n = len(names)
        self.fresh = tuple(k for k in range(len(program.outputs)) if k not in dict(program.aliases))
        self._fresh_slots = tuple(n + k for k in self.fresh)
        self.donated = tuple((k, i) for k, i in program.aliases if i in self.arguments)
        self._donated_slots = tuple((n + k, i) for k, i in self.donated)
        self._one = len(self.fresh) == 1 and not self.donated
        self._slots = self.arguments
        self._simple = not self.donated and lock is None and _COUNTS_HOLD
        self._checks = tuple(
            (slot, program.inputs[slot].type.dtype.numpy, program.inputs[slot].type.static_shape) for slot in self.arguments
        )
        if self._choice is None:
            run, context = self._native.run, self._context_addresses[0]
            self._run: Callable[[int], int] = lambda frame: run(frame, None, context)
        else:
            self._run = self._adaptively
        self._plain = self._run
        self._settling: Settling | None = None
        self._output_bytes = sum(program.outputs[k].type.nbytes for k in self.fresh)
        self._ring = _RING if self._output_bytes * _RING <= _RING_BYTES else 2
        self._free: list[Frame] = []
        self.bind(fixed)

    def bind(self, fixed: Mapping[str, Array]) -> None:
        """Puts other arrays in the place of the fixed inputs; calls that are running finish on the old ones."""
        table: list[int] = [0] * (len(self.program.inputs) + len(self.program.outputs))
        held: list[Array] = []
        for i, argument in enumerate(self.program.inputs):
            if i in self.arguments:
                continue
            array = fixed[argument.name]
            wanted = argument.type
            if array.dtype != wanted.dtype.numpy or array.shape != wanted.static_shape or not array.flags.c_contiguous:
                raise CompileError(f"{argument.name}: bound to {array.dtype}{array.shape} where the program takes {wanted}")
            table[i] = address_of(array)
            held.append(array)
        for output, source in self.program.aliases:
            table[len(self.program.inputs) + output] = table[source]
        # in this order, and each in one step: a frame of the new list never points into the old arrays
        self._bound = (table, tuple(held))
        self._free = []

    def _frame(self) -> Frame:
        table, held = self._bound
        arena, address = block(self.program.arena_bytes, self.program.align)
        values = [*table, *map(address_of, self._constants), address, *(address + p for p in self.program.places)]
        # the frame keeps alive what its pointers point to
        return Frame((ctypes.c_void_p * len(values))(*values), arena, (held, self._constants, self._native))

    def _outputs(self, frame: Frame) -> tuple[tuple[Array, ...], tuple[int, ...]]:
        arrays = tuple(empty(self.program.outputs[k].type.static_shape, self.program.outputs[k].type.dtype) for k in self.fresh)
        made = (arrays, tuple(map(address_of, arrays)))
        if len(frame.outputs) >= self._ring:
            frame.outputs.pop(0)
        frame.outputs.append(made)
        return made

    def call(self, inputs: Sequence[Any]) -> Any:
        """Runs the program on arrays that fit exactly: the result, or None (and nothing done) if one needs a closer look.

        The way of most calls, kept short: what `run` does, for a program without state and donated arguments.
        """
        home = self._free
        try:
            frame = home.pop()
        except IndexError:
            frame = self._frame()
        pointers = frame.pointers
        for x, (slot, dtype, shape) in zip(inputs, self._checks):  # noqa: B905 (the caller has counted them)
            if type(x) is not _ndarray or x.dtype != dtype or x.shape != shape:
                home.append(frame)
                return None
            try:
                pointers[slot] = _addressof(_exported(x))
            except (TypeError, ValueError, BufferError):
                home.append(frame)
                return None
        if not self._simple:
            addresses = [pointers[slot] for slot in self._slots]
            home.append(frame)
            return self.run(inputs, addresses)
        for arrays, places in frame.outputs:  # noqa: B007 (used after the loop)
            if _counts(arrays) <= _IDLE:
                break
        else:
            arrays, places = self._outputs(frame)
        for slot, place in zip(self._fresh_slots, places):  # noqa: B905
            pointers[slot] = place
        if self._run(frame.address):
            self._failed()
        # held by the caller before the frame is free: the ring's tuple alone would look idle to another thread
        result = arrays[0] if self._one else (*arrays,)
        home.append(frame)
        return result

    def direct(self, path: Callable[[], Direct]) -> Callable[..., Any] | None:
        """A function that does what `call` does without Python's overhead; None where that would not pay or cannot be.

        It has a frame and outputs of its own. Large programs, and those that choose their threads anew, go through Python.
        """
        if not self._simple or self._choice is not None or not self._one or self._output_bytes > _DIRECT_BYTES:
            return None
        if not supported() or self.program.arena_bytes > _DIRECT_BYTES:
            return None
        frame = self._frame()
        arguments = [(self.program.inputs[slot].type, slot) for slot in self.arguments]
        wanted = self.program.outputs[self.fresh[0]].type
        align = dict(self.program.output_align).get(self.fresh[0], 1)
        outputs = [empty(wanted.static_shape, wanted.dtype) for _ in range(_RING)]
        return path().function(
            self._native.address,
            frame.address,
            self._context_addresses[0],
            arguments,
            (wanted, self._fresh_slots[0], align),
            outputs,
            (frame, self._contexts),
        )

    def run(self, inputs: Sequence[Array], addresses: Sequence[int], out: Sequence[Array] | None = None) -> Any:
        """Runs on checked inputs at `addresses`. `out`, if given, holds a checked array per output that is no alias.

        Returns the output, or a tuple of them; outputs that are donated arguments are those argument objects.
        """
        home = self._free
        try:
            frame = home.pop()
        except IndexError:
            frame = self._frame()
        pointers = frame.pointers
        for slot, address in zip(self._slots, addresses):  # noqa: B905 (a hot path; both have one entry per argument)
            pointers[slot] = address
        if out is not None:
            arrays: Sequence[Array] = out
            places: Sequence[int] = [address_of(a) for a in out]
        else:
            for arrays, places in frame.outputs:  # noqa: B007
                if _counts(arrays) <= _IDLE and _COUNTS_HOLD:
                    break
            else:
                arrays, places = self._outputs(frame)
        for slot, address in zip(self._fresh_slots, places):  # noqa: B905
            pointers[slot] = address
        for slot, source in self._donated_slots:
            pointers[slot] = pointers[source]
        if self._lock is None:
            status = self._run(frame.address)
        else:
            with self._lock:
                status = self._run(frame.address)
        if status:
            self._failed()
        if self._one:
            result: Any = arrays[0]
        elif not self._donated_slots:
            result = (*arrays,)
        else:
            position = {slot: k for k, slot in enumerate(self.arguments)}
            found: dict[int, Array] = dict(zip(self.fresh, arrays, strict=True))
            found.update({k: inputs[position[i]] for k, i in self.donated})
            result = tuple(found[k] for k in sorted(found))
            if len(result) == 1:
                result = result[0]
        home.append(frame)
        return result

    def _adaptively(self, frame: int) -> int:
        """Runs on one thread or on all, whichever has been faster of late."""
        choice: ThreadChoice = self._choice  # type: ignore[assignment]
        start = perf_counter()
        status = self._native.run(frame, None, self._context_addresses[choice.index])
        choice.record(perf_counter() - start)
        return status

    def settle(self, weights: Iterable[Array]) -> None:
        """Makes the pages of prepared weights, one block of them, huge ones in the course of the calls to come."""
        settling = Settling([*weights])
        if settling.done:
            return
        plain = self._plain

        def run(frame: int) -> int:
            start = perf_counter()
            status = plain(frame)
            settling.after(perf_counter() - start)
            if settling.done:
                self._run = plain
            return status

        self._run, self._settling = run, settling

    def settle_now(self) -> None:
        """Makes the pages huge that calls have not made so yet: what is measured then is how a program runs in the long run."""
        if self._settling is not None:
            self._settling.after(math.inf)
            self._run, self._settling = self._plain, None

    @property
    def threads_now(self) -> int:
        """How many threads the next call will use."""
        return self._contexts[1 if self._choice is None else self._choice.index].threads

    def timed(self, inputs: Sequence[Array], addresses: Sequence[int], ticks: Array) -> None:
        """One run per row of `ticks` (int64): nanoseconds before each kernel and after the last. Takes no lock."""
        frame = self._frame()
        _, places = self._outputs(frame)
        for slot, address in zip(self._slots, addresses, strict=True):
            frame.pointers[slot] = address
        for slot, address in zip(self._fresh_slots, places, strict=True):
            frame.pointers[slot] = address
        for slot, source in self._donated_slots:
            frame.pointers[slot] = frame.pointers[source]
        for row in ticks:
            context = threading_limits.Context(
                self.threads_now, address_of(row), self._contexts[1].fork, threading_limits.clock()
            )
            status = self._native.run(frame.address, None, ctypes.addressof(context))
            if status:
                self._failed()

    def once(
        self,
        inputs: Sequence[Array],
        addresses: Sequence[int],
        out: Sequence[Array],
        between: Callable[[], None] | None = None,
    ) -> None:
        """One run on all threads into `out`, with a call of `between` before each kernel and after the last."""
        home = self._free
        frame = home.pop() if home else self._frame()
        for slot, address in zip(self._slots, addresses, strict=True):
            frame.pointers[slot] = address
        for slot, array in zip(self._fresh_slots, out, strict=True):
            frame.pointers[slot] = address_of(array)
        if between is None:
            status = self._native.run(frame.address, None, self._context_addresses[1])
            home.append(frame)
            if status:
                self._failed()
            return
        raised: list[BaseException] = []

        def stamp(_clock: int, _time: int | None) -> int:
            try:
                between()
            except BaseException as error:  # a callback cannot raise through native code
                raised.append(error)
            return 0

        called = _CLOCK(stamp)
        ticks = np.zeros(len(self.program.kernels) + 1, np.int64)
        whole = self._contexts[1]
        context = threading_limits.Context(
            whole.threads, address_of(ticks), whole.fork, ctypes.cast(called, ctypes.c_void_p).value
        )
        if self._native.run(frame.address, None, ctypes.addressof(context)):
            self._failed()
        if raised:
            raise raised[0]

    def _failed(self) -> NoReturn:
        raise TensorwrightError(
            f"a bounds check of the checked program {self.program.name!r} failed: it would have read or written outside an array"
        )
