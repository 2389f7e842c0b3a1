"""A compiled model that can be called: checks what it is given, finds or makes the program for its sizes, and runs it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.errors import CompileError, InputError, TensorwrightError
from ..ir.graph import Graph
from ..ir.graphs import bind_sizes
from ..ir.memory import MemoryReport, Rematerialisation
from ..ir.program import Program
from ..ir.types import TensorType
from .binding import Binding
from .buffers import Array, address_of, aligned_copy, as_array, describe, empties, empty
from .compiled import Compiled, PassRecord
from .direct import MARK
from .direct import direct as load_direct
from .mapped import mapping_of, release
from .native import loaded, release_compiler
from .pages import make_present
from .prepared import PreparedStore
from .profile import Peak, Profile, measure

_LARGE: Final = 1024 * 1024  # bytes of a weight from which on it is not copied without need
_MUCH: Final = 32 * 1024 * 1024  # bytes of prepared weights for which memory that loading code took is given back first
_SPECIALISATIONS: Final = 64  # programs kept for different sizes of one model; the oldest goes first

Build = Callable[[Mapping[str, int]], Compiled]


class _Specialisation:
    """The program for one set of sizes, and what it needs to be bound to weights."""

    def __init__(self, compiled: Compiled, sizes: Mapping[str, int]) -> None:
        self.compiled = compiled
        self.sizes = dict(sizes)
        self.binding: Binding | None = None
        self.direct: Callable[..., Any] | None = None


class Executable:
    """A model compiled to native code. Call it with numpy arrays, or anything with `__dlpack__`, in the order of its inputs.

    Arrays must have the dtype they were compiled for; nothing is converted silently. Arrays that are not contiguous are
    copied; read-only and empty ones are fine. Results are arrays that are used again for a later call once nobody holds
    them, or a view of them; `out=` writes into the caller's instead, by way of memory of ours where an array overlaps an
    input, is not contiguous, or is larger than the cache and not aligned to 16 bytes (new arrays are). Any number of Python
    threads may call at once; calls of a model with state of its own (a training step) wait for each other.

    Weights are bound when it is made, and large ones are not copied: change weights with `set_parameters`, not by writing into
    the arrays. Weights that are read-only maps of a file leave memory once others have been prepared from them.
    """

    _binds_early = True  # whether a program is bound to its weights as soon as it is compiled

    def __init__(
        self,
        graph: Graph,
        build: Build,
        parameters: Mapping[str, Array] | None = None,
        *,
        threads: int = 1,
        peak: Peak | None = None,
        save: Callable[[Executable, str | Path], None] | None = None,
        flatten: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
        unflatten: Callable[[Sequence[Any]], Any] | None = None,
        not_runnable: str = "",
        shares: Executable | None = None,
        call_path: Callable[[], tuple[bytes, str]] | None = None,
        keep_bytes: int = 0,
        kept: PreparedStore | None = None,
    ) -> None:
        """`build` compiles the graph for given sizes. Inputs named in `parameters` are bound; the others are arguments.

        `flatten` takes a call's arguments to arrays in the order of the inputs, `unflatten` a tuple of all outputs to what
        the call returns; None where both are plain. With `not_runnable` (why), there is text to read and nothing to call. With
        `shares`, weights and state are those of another Executable, by name: what one updates, the other sees.
        `keep_bytes` is how much memory of programs for other sizes than the latest is kept (0: that of any number), where
        they are quickly made again.
        `call_path` gives object code and name of the direct call path's function
        (runtime/direct.py). `kept` is where the weights it is made with may lie already prepared.
        """
        self.graph = graph
        self.threads = threads
        self._build = build
        self._peak = peak
        self._save = save
        self._flatten = flatten
        self._unflatten = unflatten
        self._not_runnable = not_runnable
        names = [str(i.attrs["name"]) for i in graph.inputs]
        self._types: dict[str, TensorType] = dict(zip(names, (i.tensor for i in graph.inputs), strict=True))
        given = dict(parameters or {})
        unknown = sorted(given.keys() - self._types.keys())
        if unknown:
            raise CompileError(f"{graph.name}: parameters {unknown[:5]} are no inputs of the graph; it has {names[:20]}")
        self.arguments = tuple((n, self._types[n]) for n in names if n not in given)
        self._state_names = frozenset(names[i] for _, i in graph.aliases if names[i] in given)
        aliased = {o for o, i in graph.aliases if names[i] in given}
        self.output_names = tuple(n for k, n in enumerate(graph.output_names) if k not in aliased)
        self._output_types = tuple(o.tensor for k, o in enumerate(graph.outputs) if k not in aliased)
        self._donates = any(names[i] not in given for _, i in graph.aliases)
        self._state_lock = threading.Lock() if self._state_names else None
        self._lock = threading.RLock()
        self._parameters: dict[str, Array] = {}
        self._owned_names: set[str] = set()
        if shares is not None:
            different = sorted(n for n in given if n not in shares._parameters or shares._types[n] != self._types[n])
            if different or given.keys() != shares._parameters.keys():
                raise CompileError(f"{graph.name}: its state is not that of {shares.graph.name}: {different[:5]}")
            self._state_lock, self._lock = shares._state_lock, shares._lock
            self._parameters, self._owned_names = shares._parameters, shares._owned_names
        self._prepared: dict[str, dict[str, Array]] = {}
        self._specialisations: dict[tuple[tuple[int, ...], ...], _Specialisation] = {}
        self._latest: _Specialisation | None = None
        self._fast: Callable[[Sequence[Any]], Any] | None = None
        self._direct: Callable[..., Any] | None = None
        self._look_for_direct = False
        self._call_path = call_path
        self._keep_bytes = keep_bytes
        self._kept = kept
        if shares is None:
            self._take(given)
        self.symbols: tuple[str, ...] = tuple(sorted(frozenset().union(*(t.symbols for t in self._types.values()))))
        if not self.symbols:
            self._latest = self._specialise(tuple(t.static_shape for _, t in self.arguments), {})

    # ------------------------------------------------------------------ calls

    def __call__(self, *inputs: Any, out: Any = None) -> Any:
        """The outputs for these inputs: one array, or a tuple (or what the traced function returned).

        `out` is an array (a sequence of arrays for several outputs) of the output's exact dtype and shape to write to.
        Raises InputError for what does not fit, naming the input, what was expected and what was given.
        """
        direct = self._direct
        if direct is not None:
            result = direct(*inputs) if out is None else direct(*inputs, out, MARK)
            if result is not None:
                return result
        fast = self._fast
        if fast is not None and out is None and len(inputs) == len(self.arguments):
            result = fast(inputs)
            if result is not None:
                if self._look_for_direct:
                    self._find_direct()
                return result
        return self._careful(inputs, out)

    def _find_direct(self) -> None:
        """Finds the shortest way for the calls to come, once a second one came for these sizes."""
        with self._lock:
            latest, path, self._look_for_direct = self._latest, self._call_path, False
            if latest is not None and latest.binding is not None and path is not None and self._fast == latest.binding.call:
                latest.direct = self._direct = latest.binding.direct(lambda: load_direct(path))

    def _careful(self, inputs: Sequence[Any], out: Any) -> Any:
        arrays, specialisation = self._accept(inputs)
        binding = self._bound(specialisation)
        donated = {slot for _, slot in binding.donated}
        ready: list[Array] = []
        for (name, _), slot, array in zip(self.arguments, binding.arguments, arrays, strict=True):
            if slot in donated:
                self._check_donated(name, array, arrays)
            ready.append(array if array.flags.c_contiguous and array.flags.aligned else aligned_copy(array))
        addresses = [address_of(a) for a in ready]
        if out is None:
            result = binding.run(ready, addresses)
            self._promote(specialisation)
        else:
            result = self._into(binding, ready, addresses, out)
        if self._unflatten is not None:
            return self._unflatten(result if isinstance(result, tuple) else (result,))
        return result

    def _promote(self, specialisation: _Specialisation) -> None:
        """Lets later calls try this specialisation first, without the checks that it makes itself."""
        self._latest = specialisation
        binding = specialisation.binding
        if binding is None or self._flatten is not None or self._unflatten is not None or self._donates:
            self._fast = self._direct = None
        else:
            self._fast, self._direct = binding.call, specialisation.direct
            self._look_for_direct = specialisation.direct is None

    def _accept(self, inputs: Sequence[Any]) -> tuple[list[Array], _Specialisation]:
        """The inputs as arrays of the right dtypes, and the specialisation for their shapes."""
        if self._flatten is not None:
            inputs = self._flatten(inputs)
        if len(inputs) != len(self.arguments):
            wanted = ", ".join(f"{n}: {t}" for n, t in self.arguments)
            raise InputError(f"{self.graph.name} takes {len(self.arguments)} inputs ({wanted}), got {len(inputs)}")
        arrays = [
            self._taken(x, t, functools.partial(self._where, k, n))
            for k, (x, (n, t)) in enumerate(zip(inputs, self.arguments, strict=True))
        ]
        shapes = tuple(a.shape for a in arrays)
        found = self._specialisations.get(shapes)
        if found is None:
            found = self._specialise(shapes, self._sizes(arrays))
        return arrays, found

    def _taken(self, value: Any, expected: TensorType, where: Callable[[], str]) -> Any:
        """A caller's argument as what a binding takes."""
        return as_array(value, expected, where)

    def _where(self, k: int, name: str) -> str:
        return f"{self.graph.name}: input {k} ({name!r})"

    def _sizes(self, arrays: Sequence[Array]) -> dict[str, int]:
        """The sizes of the symbolic dimensions. Raises InputError where a shape does not fit."""
        for k, (array, (name, expected)) in enumerate(zip(arrays, self.arguments, strict=True)):
            if array.ndim != expected.rank:
                raise InputError(
                    f"{self._where(k, name)}: expected {expected} (rank {expected.rank}), got {describe(array)} "
                    f"(rank {array.ndim}); add or drop an axis with x[None] or x.reshape(...)"
                )
            if not expected.symbols and array.shape != expected.shape:
                raise InputError(f"{self._where(k, name)}: expected {expected}, got {describe(array)}")
        shapes = {n: t.shape for n, t in self._types.items()}
        shapes |= {name: array.shape for array, (name, _) in zip(arrays, self.arguments, strict=True)}
        return bind_sizes(self.graph, shapes)

    def _check_donated(self, name: str, array: Array, arrays: Sequence[Array]) -> None:
        if not (array.flags.writeable and array.flags.c_contiguous and array.flags.aligned):
            raise InputError(
                f"{self.graph.name}: input {name!r} is donated (its memory takes an output), so it must be writeable and "
                f"C-contiguous; pass x.copy()"
            )
        if sum(np.may_share_memory(array, other) for other in arrays) > 1:
            raise InputError(f"{self.graph.name}: input {name!r} is donated, but shares memory with another input; pass x.copy()")

    def _into(self, binding: Binding, ready: Sequence[Array], addresses: Sequence[int], out: Any) -> Any:
        program = binding.program
        wanted = [program.outputs[k] for k in binding.fresh]
        if not isinstance(out, (np.ndarray, list, tuple)):
            raise InputError(
                f"{self.graph.name}: out= takes an array, or a list or tuple of arrays in the order of the outputs "
                f"({', '.join(a.name for a in wanted)}); got {describe(out)}"
            )
        given = [out] if isinstance(out, np.ndarray) else list(out)
        if len(given) != len(wanted):
            raise InputError(f"{self.graph.name}: out= has {len(given)} arrays, the model has {len(wanted)} outputs")
        for array, argument in zip(given, wanted, strict=True):
            fits = isinstance(array, np.ndarray) and array.dtype == argument.type.dtype.numpy
            if not fits or array.shape != argument.type.static_shape:
                raise InputError(f"{self.graph.name}: out= for {argument.name!r} must be {argument.type}, got {describe(array)}")
            if not array.flags.writeable:
                raise InputError(f"{self.graph.name}: out= for {argument.name!r} is read-only")
        for i, (array, argument) in enumerate(zip(given, wanted, strict=True)):
            for other, name in zip(given[:i], wanted, strict=False):
                if np.shares_memory(array, other):
                    raise InputError(
                        f"{self.graph.name}: out= for {argument.name!r} shares memory with out= for {name.name!r}: "
                        "one would overwrite the other"
                    )
        # native code takes its arrays to be distinct and contiguous; where they are not, it writes elsewhere first
        overlap = any(np.may_share_memory(a, x) for a in given for x in ready if isinstance(x, np.ndarray))
        needs = dict(program.output_align)
        astray = any(address_of(a) % needs.get(k, 1) for k, a in zip(binding.fresh, given, strict=True))
        if overlap or astray or not all(a.flags.c_contiguous and a.flags.aligned for a in given):
            made = [empty(a.shape, w.type.dtype) for a, w in zip(given, wanted, strict=True)]
            result = binding.run(ready, addresses, made)
            for array, value in zip(given, made, strict=True):
                np.copyto(array, value)
            by_identity = {id(m): a for m, a in zip(made, given, strict=True)}
            if isinstance(result, tuple):
                return tuple(by_identity.get(id(r), r) for r in result)
            return by_identity.get(id(result), result)
        return binding.run(ready, addresses, given)

    # ------------------------------------------------------------------ programs and weights

    def _specialise(self, shapes: tuple[tuple[int, ...], ...], sizes: Mapping[str, int]) -> _Specialisation:
        with self._lock:
            found = self._specialisations.get(shapes)
            if found is None:
                found = _Specialisation(self._build(sizes), sizes)
                if self._binds_early and not self._not_runnable:
                    self._bound(found)
                while len(self._specialisations) >= _SPECIALISATIONS or self._too_much():
                    self._specialisations.pop(next(iter(self._specialisations)))
                self._specialisations[shapes] = found
            return found

    def _too_much(self) -> bool:
        kept = sum(s.compiled.run.arena_bytes for s in self._specialisations.values()) if self._keep_bytes else 0
        return kept > self._keep_bytes

    def _bound(self, specialisation: _Specialisation) -> Binding:
        if specialisation.binding is None:
            if self._not_runnable:
                raise InputError(self._not_runnable)
            with self._lock:
                if specialisation.binding is None:
                    run = specialisation.compiled.run
                    code = loaded(run.object_code, run.entry)  # before weights are prepared: loading code takes memory too
                    fixed = self._fixed(specialisation)
                    made = Binding(run, fixed, self.threads, self._state_lock)
                    made.settle(_prepared_of(specialisation.compiled, fixed))
                    specialisation.binding = made
                    del code
        return specialisation.binding

    def _fixed(self, specialisation: _Specialisation) -> dict[str, Array]:
        """What the run program's inputs that are no arguments are bound to: weights, state, prepared weights."""
        compiled = specialisation.compiled
        prepared = self._prepare(compiled)
        arguments = {n for n, _ in self.arguments}
        fixed: dict[str, Array] = {}
        for argument in compiled.run.inputs:
            if argument.name in prepared:
                fixed[argument.name] = prepared[argument.name]
            elif argument.name not in arguments:
                if argument.name not in self._parameters:
                    raise CompileError(f"{self.graph.name}: nothing gives the program's input {argument.name!r} a value")
                fixed[argument.name] = self._owned(argument.name)
        return fixed

    def _owned(self, name: str) -> Array:
        """The parameter as a run reads it: state and small ones in memory of ours, the rest where it is."""
        array = self._parameters[name]
        if name not in self._owned_names:
            there = array.nbytes >= _LARGE and array.flags.c_contiguous and array.flags.aligned
            if name in self._state_names or not there:
                array = self._parameters[name] = aligned_copy(array)
            self._owned_names.add(name)
        return array

    def _prepare(self, compiled: Compiled) -> dict[str, Array]:
        if compiled.prepare is None:
            return {}
        key = compiled.prepare_key
        found = self._prepared.get(key) if key else None
        if found is None:
            found = self._prepare_now(compiled.prepare)
            if key:
                self._prepared[key] = found
        return found

    def _prepare_now(self, program: Program) -> dict[str, Array]:
        values = [self._parameters[a.name] for a in program.inputs]
        values = [v if v.flags.c_contiguous and v.flags.aligned else aligned_copy(v) for v in values]
        mapped = {id(m): m for v in values if v.nbytes >= _LARGE and (m := mapping_of(v)) is not None}

        def give_back() -> None:
            for mapping in mapped.values():
                release(mapping)

        # while one weight is read, the pages of those before it are given back
        between = give_back if mapped else None
        entry = None if self._kept is None else self._kept.entry(program, values, between)
        outputs = None if entry is None else entry.get()
        if outputs is None:
            binding = Binding(program, {}, self.threads)
            if sum(a.type.nbytes for a in program.outputs) >= _MUCH:
                release_compiler()
            outputs = empties([a.type for a in program.outputs])
            make_present(outputs, binding.threads)
            addresses = [address_of(v) for v in values]
            if between is not None:
                binding.once(values, addresses, outputs, between)
            else:
                binding.run(values, addresses, outputs)
            if entry is not None:
                entry.put(outputs)
        return dict(zip((a.name for a in program.outputs), outputs, strict=True))

    def _take(self, given: Mapping[str, Any]) -> None:
        """Checks weights and puts them in the place of the old ones."""
        new: dict[str, Array] = {}
        for name, value in given.items():
            expected = self._types[name]
            array = as_array(value, expected, lambda name=name: f"{self.graph.name}: parameter {name!r}")  # type: ignore[misc]
            if array.shape != expected.static_shape:
                raise InputError(f"{self.graph.name}: parameter {name!r}: expected {expected}, got {describe(array)}")
            new[name] = array
        for name, array in new.items():
            if name in self._state_names and name in self._owned_names:
                with self._state_lock or threading.Lock():
                    np.copyto(self._parameters[name], array)
            else:
                self._parameters[name] = array
                self._owned_names.discard(name)
        for name in new.keys() & self._state_names:
            self._owned(name)

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """Binds other weights (all, or some by name) and prepares them; running calls finish on the old ones.

        State that the program updates is overwritten in place. Raises InputError for an unknown name, dtype or shape.
        """
        unknown = sorted(values.keys() - self._parameters.keys())
        if unknown:
            raise InputError(f"{self.graph.name}: unknown parameters {unknown[:5]}; it has {sorted(self._parameters)[:20]}")
        with self._lock:
            self._take(values)
            self._kept = None  # weights that change while a process runs are not those that it will start with
            self._prepared.clear()
            for specialisation in self._specialisations.values():
                if specialisation.binding is not None:
                    fixed = self._fixed(specialisation)
                    specialisation.binding.bind(fixed)
                    specialisation.binding.settle(_prepared_of(specialisation.compiled, fixed))
                specialisation.direct = None
            self._direct, self._look_for_direct = None, self._fast is not None

    @property
    def parameters(self) -> dict[str, Array]:
        """The weights and state by name: copies of what the program updates, read-only views of the rest.

        `set_parameters` changes them.
        """
        with self._state_lock or threading.Lock():
            return {n: a.copy() if n in self._state_names else _read_only(a) for n, a in self._parameters.items()}

    # ------------------------------------------------------------------ what there is to read

    def specialise(self, **sizes: int) -> Compiled:
        """Compiles for given sizes of the symbolic dimensions, if not done yet: `exe.specialise(N=8)`.

        Raises InputError if a size is missing, unknown, or no integer of at least 1.
        """
        if set(sizes) != set(self.symbols):
            raise InputError(f"{self.graph.name} has the symbolic sizes {list(self.symbols)}, got {sorted(sizes)}")
        for name, size in sizes.items():
            if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
                raise InputError(f"{self.graph.name}: size {name}: expected an integer of at least 1, got {size!r}")
        shapes = tuple(t.with_sizes(sizes).static_shape for _, t in self.arguments)
        found = self._specialise(shapes, sizes)
        self._latest = found
        self._fast = self._direct = None
        return found.compiled

    @property
    def compiled(self) -> Compiled:
        """The specialisation used last. Raises InputError for a model with symbolic sizes that has not met any yet."""
        if self._latest is None:
            raise InputError(
                f"{self.graph.name} is compiled per size and has not met one: call it, or exe.specialise({self.symbols[0]}=...)"
            )
        return self._latest.compiled

    @property
    def stages(self) -> tuple[str, ...]:
        """The names that `text` takes, in the order of the pipeline."""
        return tuple(self.compiled.texts)

    def text(self, stage: str) -> str:
        """The program as it stood after a stage: 'graph', a pass by name, 'loops', 'llvm' or 'asm'."""
        texts = self.compiled.texts
        if stage not in texts:
            raise InputError(f"no stage {stage!r}; there are {', '.join(texts)}")
        text = texts[stage]
        return text if isinstance(text, str) else text()

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """What each pass did; empty for a program taken from the cache."""
        return self.compiled.passes

    @property
    def memory(self) -> MemoryReport:
        """Bytes that one call needs, by purpose; known before the first run. `print(exe.memory)` shows it as a table."""
        run = self.compiled.run
        arguments = {n for n, _ in self.arguments}
        aliased = {o for o, _ in run.aliases}
        bound = [a for a in run.inputs if a.name not in arguments]
        return MemoryReport(
            state=sum(a.type.nbytes for a in bound if a.role != "prepared"),
            prepared=sum(a.type.nbytes for a in bound if a.role == "prepared"),
            inputs=sum(a.type.nbytes for a in run.inputs if a.name in arguments),
            outputs=sum(a.type.nbytes for k, a in enumerate(run.outputs) if k not in aliased),
            constants=sum(c.nbytes for c in run.constants),
            arena=run.arena_bytes,
            at_peak=run.use,
        )

    @property
    def peak_bytes(self) -> int:
        """Bytes that one call needs in all, its inputs and outputs included; known before the first run."""
        return self.memory.total

    @property
    def remat(self) -> Rematerialisation | None:
        """What is computed again to stay within `memory_budget`; None where no budget was given."""
        return self.compiled.remat

    def profile(self, *inputs: Any, repeats: int = 20, estimate: bool = False) -> Profile:
        """Runs `repeats` times and returns the median time of each kernel. State of the model is put back afterwards.

        `estimate=True` is for CUDA targets: InputError here, where times are measured.
        """
        if estimate:
            raise InputError(f"{self.graph.name}: estimate=True is for CUDA targets; for a processor, profile(...) measures")
        arrays, specialisation = self._accept(inputs)
        binding = self._bound(specialisation)
        self._latest = specialisation
        ready = [aligned_copy(a) for a in arrays]
        state = {n: self._parameters[n].copy() for n in self._state_names}
        lock = self._state_lock or threading.Lock()
        with lock:
            try:
                return measure(binding, ready, repeats, self._peak)
            finally:
                for name, value in state.items():
                    np.copyto(self._parameters[name], value)

    def save(self, path: str | Path) -> None:
        """Writes the model to a `.tw` file: its graph and weights, no machine code. Raises ArtifactError, OSError."""
        if self._save is None:
            raise TensorwrightError(f"{self.graph.name} was made without its source graph and cannot be saved")
        self._save(self, path)

    def __repr__(self) -> str:
        takes = ", ".join(f"{n}: {t}" for n, t in self.arguments)
        gives = ", ".join(f"{n}: {t}" for n, t in zip(self.output_names, self._output_types, strict=True))
        return f"<Executable {self.graph.name}({takes}) -> {gives}, {self.threads} threads>"


def _prepared_of(compiled: Compiled, fixed: Mapping[str, Array]) -> list[Array]:
    return [] if compiled.prepare is None else [fixed[o.name] for o in compiled.prepare.outputs if o.name in fixed]


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
