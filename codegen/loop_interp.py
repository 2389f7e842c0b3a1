"""Runs loop IR in numpy, slowly and with every check: bounds, uninitialised reads, races between parallel iterations.

It is the definition of what a kernel does; math functions are expanded as in the emitters, so that results agree to the
bit. Iteration k of a parallel loop has tid k % threads. Two iterations race where one writes an element that another one
reads or writes; an access whose place depends on `tid` is a thread's own, and there only other threads are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ..ir.errors import VerifyError
from ..ir.expr import Expr, postorder, var
from .loop_ir import Alloc, Buffer, Call, For, If, Kernel, Let, Module, Prefetch, Stmt, Store
from .loop_text import statement_lines
from .loop_values import apply
from .vecmath import expand
from .vectorize import vectorize_loop

Array = np.ndarray[Any, Any]
TID = var("tid")
_NOBODY, _MANY = -1, -2


@dataclass
class _Storage:
    """An array, and who touched its elements in the current parallel loop."""

    data: Array
    ready: Array | None = None  # which elements were written (allocs)
    writer: Array | None = None
    reader: Array | None = None


@dataclass
class _View:
    storage: _Storage
    offset: int = 0
    own: bool = False  # its place depends on tid


@dataclass
class _Frame:
    kernel: Kernel
    views: dict[str, _View]
    values: dict[Expr, Array]
    own: set[Expr] = field(default_factory=lambda: {TID})  # variables that depend on tid


class _Machine:
    def __init__(self, module: Module, threads: int) -> None:
        self.kernels = {k.name: k for k in module.kernels}
        self.threads = threads
        self.iteration = self.tid = _NOBODY
        self.expanded: dict[Expr, Expr] = {}
        self.storages: list[_Storage] = []
        self.statement: Stmt | None = None
        self.steps = 0

    def fail(self, frame: _Frame, message: str) -> NoReturn:
        text = statement_lines(self.statement)[0] if self.statement is not None else ""
        raise VerifyError(f"kernel {frame.kernel.name}: {message}, in\n    {text}")

    # -- memory -------------------------------------------------------------------------------------------------------

    def _places(self, frame: _Frame, b: Buffer, index: Sequence[Array], lanes: int, mask: Array) -> tuple[_View, Array]:
        """Flat positions of an access's lanes; those that the mask leaves out are 0."""
        view = frame.views.get(b.name)
        if view is None:
            self.fail(frame, f"buffer {b.name} is not known here")
        wide = [np.broadcast_to(np.asarray(i, np.int64), (lanes,)).copy() for i in index]
        if lanes > 1 and wide and all(len(i) == 1 for i in index):
            wide[-1] += np.arange(lanes)
        flat = np.full(lanes, view.offset, np.int64)
        for dimension, (i, n, s) in enumerate(zip(wide, b.shape, b.strides, strict=True)):
            if ((i < 0) | (i >= n))[mask].any():
                bad = i[mask & ((i < 0) | (i >= n))][0]
                self.fail(frame, f"index {bad} of {b.name} is out of range in dimension {dimension} of size {n}")
            flat += i * s
        if ((flat < 0) | (flat >= len(view.storage.data)))[mask].any():
            self.fail(frame, f"{b.name} reaches beyond the array it is a view of")
        return view, np.where(mask, flat, 0)

    def _own(self, frame: _Frame, view: _View, index: Sequence[Expr]) -> bool:
        return view.own or any(e in frame.own for e in postorder(index) if e.op == "var")

    def _touch(self, frame: _Frame, b: Buffer, view: _View, at: Array, *, own: bool, write: bool) -> None:
        st = view.storage
        if self.iteration < 0 or st.writer is None or st.reader is None:
            return
        me = -10 - self.tid if own else self.iteration
        others = (st.writer[at] != _NOBODY) & (st.writer[at] != me)
        if write:
            others |= (st.reader[at] != _NOBODY) & (st.reader[at] != me)
        if others.any():
            self.fail(frame, f"race: iterations of the parallel loop share element {at[others][0]} of {b.name} and one writes it")
        if write:
            st.writer[at] = me
        else:
            st.reader[at] = np.where((st.reader[at] == _NOBODY) | (st.reader[at] == me), me, _MANY)

    def load(self, frame: _Frame, e: Expr, values: dict[Expr, Array]) -> Array:
        b, rank = e.attr
        mask = np.ones(e.lanes, np.bool_)
        if len(e.args) > rank:
            mask = np.broadcast_to(values[e.args[rank]], (e.lanes,))
        view, at = self._places(frame, b, [values[a] for a in e.args[:rank]], e.lanes, mask)
        st, out = view.storage, np.zeros(e.lanes, b.dtype.numpy)
        live = at[mask]
        if not len(live):
            return out
        if st.ready is not None and not st.ready[live].all():
            self.fail(frame, f"element {live[~st.ready[live]][0]} of {b.name} is read before it is written")
        self._touch(frame, b, view, live, own=self._own(frame, view, e.args[:rank]), write=False)
        out[mask] = st.data[live]
        return out

    def store(self, frame: _Frame, s: Store) -> None:
        value = self.value(frame, s.value)
        lanes = len(value)
        mask = np.ones(lanes, np.bool_) if s.mask is None else np.broadcast_to(self.value(frame, s.mask), (lanes,))
        view, at = self._places(frame, s.buffer, [self.value(frame, i) for i in s.index], lanes, mask)
        live = at[mask]
        if not len(live):
            return
        if s.buffer.scope == "global" and not s.buffer.writable:
            self.fail(frame, f"buffer {s.buffer.name} is read-only")
        self._touch(frame, s.buffer, view, live, own=self._own(frame, view, s.index), write=True)
        view.storage.data[live] = value[mask]
        if view.storage.ready is not None:
            view.storage.ready[live] = True

    # -- expressions and statements -----------------------------------------------------------------------------------

    def value(self, frame: _Frame, root: Expr) -> Array:
        root = expand(root, self.expanded)
        values: dict[Expr, Array] = {}
        for e in postorder([root]):
            if e.op == "var":
                if e not in frame.values:
                    self.fail(frame, f"variable {e.attr} is not bound here")
                values[e] = frame.values[e]
            elif e.op == "load":
                values[e] = self.load(frame, e, values)
            elif e.op == "lane_xor":
                self.fail(frame, "threads that exchange values run on the PTX interpreter, not here")
            elif e.op == "to_line":
                values[e] = np.array([3], np.int64)  # as good as any: results must not depend on it
            else:
                values[e] = apply(e, [values[a] for a in e.args])
        return values[root]

    def scalar(self, frame: _Frame, e: Expr) -> int:
        return int(self.value(frame, e)[0])

    def block(self, frame: _Frame, body: Sequence[Stmt]) -> None:
        bound: list[Expr] = []
        for s in body:
            self.statement = s
            match s:
                case Let():
                    frame.values[s.var] = self.value(frame, s.value)
                    if any(e in frame.own for e in postorder([s.value]) if e.op == "var"):
                        frame.own.add(s.var)
                    bound.append(s.var)
                case Store():
                    self.store(frame, s)
                case For():
                    self.loop(frame, s)
                case If():
                    self.block(frame, s.then if self.value(frame, s.condition)[0] else s.otherwise)
                case Alloc():
                    span = max(s.buffer.span, 1)
                    data = np.zeros(span, s.buffer.dtype.numpy)
                    frame.views[s.buffer.name] = _View(_Storage(data, np.zeros(span, np.bool_)))
                case Call():
                    self.call(frame, s)
                case Prefetch():
                    pass  # a hint
                case _:
                    self.fail(frame, f"{type(s).__name__} needs threads that wait for each other: run it on the PTX interpreter")
        for v in bound:
            frame.values.pop(v, None)

    def loop(self, frame: _Frame, s: For) -> None:
        if s.kind == "vector":
            self.block(frame, vectorize_loop(s, 16))
            return
        # Blocks and threads run one after the other: enough where no thread waits for another one (barriers, lane_xor).
        parallel = s.kind == "parallel"
        if parallel and self.iteration != _NOBODY:
            self.fail(frame, "a parallel loop stands inside another one")
        start, stop = self.scalar(frame, s.start), self.scalar(frame, s.stop)
        if parallel:
            for st in self.storages:
                st.writer = np.full(len(st.data), _NOBODY, np.int64)
                st.reader = np.full(len(st.data), _NOBODY, np.int64)
        for k, i in enumerate(range(start, stop, s.step)):
            if parallel:
                self.iteration, self.tid = k, k % self.threads
                frame.values[TID] = np.array([self.tid], np.int64)
            frame.values[s.var] = np.array([i], np.int64)
            self.block(frame, s.body)
        frame.values.pop(s.var, None)
        if parallel:
            self.iteration = self.tid = _NOBODY
            frame.values.pop(TID, None)
            for st in self.storages:
                st.writer = st.reader = None

    def call(self, frame: _Frame, s: Call) -> None:
        callee = self.kernels.get(s.kernel)
        if callee is None:
            self.fail(frame, f"there is no kernel {s.kernel}")
        if len(callee.buffers) != len(s.views) or len(callee.scalars) != len(s.scalars):
            self.fail(frame, f"{s.kernel} takes {len(callee.buffers)} buffers and {len(callee.scalars)} scalars")
        views: dict[str, _View] = {}
        for (b, offset), parameter in zip(s.views, callee.buffers, strict=True):
            base, first = frame.views[b.name], self.scalar(frame, offset)
            if first < 0 or first + parameter.span > b.span:
                self.fail(frame, f"the view of {b.name} from {first} on is smaller than {parameter.name} of {s.kernel}")
            if (first * b.dtype.itemsize) % parameter.align and b.align % parameter.align == 0:
                self.fail(
                    frame,
                    f"the view of {b.name} from {first} on breaks the alignment of {parameter.name} ({parameter.align} bytes)",
                )
            views[parameter.name] = _View(base.storage, base.offset + first, self._own(frame, base, [offset]))
        values = {v: self.value(frame, x) for v, x in zip(callee.scalars, s.scalars, strict=True)}
        self.block(_Frame(callee, views, values), callee.body)


def run(module: Module, kernel: str, arrays: Sequence[Array], *, threads: int = 2) -> None:
    """Runs one kernel on numpy arrays, in place (arrays passed twice share memory, as they do natively).

    Raises VerifyError at the first access out of range, uninitialised read, write to a read-only buffer or race.
    """
    machine = _Machine(module, threads)
    chosen = machine.kernels[kernel]
    if len(arrays) != len(chosen.buffers):
        raise VerifyError(f"kernel {kernel} takes {len(chosen.buffers)} buffers, got {len(arrays)}")
    views: dict[str, _View] = {}
    known: dict[int, _Storage] = {}
    for b, a in zip(chosen.buffers, arrays, strict=True):
        if a.dtype != b.dtype.numpy or not a.flags.c_contiguous or a.size < b.span:
            raise VerifyError(f"kernel {kernel}: {b.name} needs {b.span} contiguous {b.dtype}, got {a.dtype}{a.shape}")
        st = known.setdefault(a.ctypes.data, _Storage(a.reshape(-1)))
        views[b.name] = _View(st)
    machine.storages = list({id(s): s for s in known.values()}.values())
    machine.block(_Frame(chosen, views, {}), chosen.body)
