"""A loop of launches as one kernel of one block, where its passes are too small to fill a device.

    for n in 0 .. count:  for each launch of a pass:  for its blocks, one after the other: { ... }  barrier

The block runs what a grid would have run, block by block, and a barrier stands where a launch ended. Memory that moves from pass
to pass is a base and a stride; where carries change places, passes are written out until they come round again, and the first and
last pass on their own where they differ. What is gained is the start of a kernel for each launch; what is lost is all
multiprocessors but one. `estimate` says which costs more, from the operations of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Final

from ...ir.errors import CompileError
from ...ir.expr import Expr, binary, const, postorder, rewrite, var
from ...ir.places import View
from ...ir.target import Target
from .. import plan as tree
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Kernel, Let, Stmt, Store, Warp, expressions, statements
from .grid import TX, launch
from .machine import STATIC_SHARED, WARP, sm_of
from .shape import shape_of

Parts = list[tuple[Kernel, tuple[int, ...]]]  # the launches of a kernel, and which of its buffers each takes

# The estimate, in nanoseconds; orders of magnitude, not measurements.
LAUNCH: Final = 3000.0  # from the end of one kernel of a graph to the first instruction of the next, and its ramp
PHASE: Final = 400.0  # a barrier, and the latency of what follows it
RATE: Final = 40.0  # operations a nanosecond of one block: 8 warps, each with a result every 9 cycles of 0.7 ns
UNKNOWN: Final = 16  # passes of a loop whose bounds are no constants
THREADS: Final = 256  # of the block, where no launch asks for a number
WAYS: Final = ("auto", "launches", "one")


@dataclass(frozen=True)
class _Launch:
    kernel: Kernel
    views: tuple[View, ...]
    grid: tuple[int, int, int]
    threads: int
    waits: bool  # has barriers
    lanes: bool  # has exchanges within warps


@dataclass(frozen=True)
class _Pass:
    """One pass written out: number `first` + `at` for each value of a loop variable, or just `first`."""

    first: int
    times: int = 1
    step: int = 0
    at: Expr | None = None


def operations(body: Sequence[Stmt]) -> float:
    """About how many operations a thread takes for statements."""
    total = 0.0
    for s in body:
        own = sum(1 for e in postorder(expressions(s)) if e.args)
        match s:
            case For():
                trips: float = UNKNOWN
                if s.stop.is_const:
                    start = int(s.start.attr) if s.start.is_const else 0
                    trips = max(0, -(-(int(s.stop.attr) - start) // s.step))
                total += own + trips * operations(s.body)
            case If():
                total += own + max(operations(s.then), operations(s.otherwise))
            case _:
                total += own + 1
    return total


def _work(x: _Launch) -> float:
    """The operations of all threads."""
    return operations(_thread_loop(x.kernel).body) * x.threads * x.grid[0] * x.grid[1] * x.grid[2]


def estimate(launches: Sequence[_Launch], target: Target) -> tuple[float, float]:
    """Nanoseconds of a pass as launches, and within one block."""
    sm = sm_of(target)
    apart = inside = 0.0
    for x in launches:
        work = _work(x)
        filled = min(sm.multiprocessors, x.grid[0] * x.grid[1] * x.grid[2])
        apart += LAUNCH + work / (RATE * filled)
        phases = x.grid[0] * x.grid[1] * x.grid[2] if x.waits else 1
        inside += PHASE * phases + work / RATE
    return apart, inside


def _thread_loop(kernel: Kernel) -> For:
    return next(s for s in statements(kernel.body) if isinstance(s, For) and s.kind == "thread")


def _launches(nodes: Sequence[tree.Node], parts: dict[str, Parts]) -> list[_Launch] | None:
    """What a pass launches, in order; None where it holds more than launches that one block can run."""
    found: list[_Launch] = []
    for node in nodes:
        if isinstance(node, tree.Block):
            inner = _launches(node.nodes, parts)
            if inner is None:
                return None
            found += inner
            continue
        if not isinstance(node, tree.Step):
            return None
        for kernel, places in parts[node.kernel]:
            grid, threads = shape_of(kernel)
            every = list(statements(kernel.body))
            if any(isinstance(s, Warp) for s in every) or any(len(b.shape) != 1 for b in kernel.buffers):
                return None
            lanes = any(e.op == "lane_xor" for s in every for e in postorder(expressions(s)))
            waits = any(isinstance(s, Barrier) for s in every)
            found.append(_Launch(kernel, tuple(node.views[p] for p in places), grid, threads, waits, lanes))
    return found


class _Maker:
    """Builds the kernel of one loop; `depth` loops are around it."""

    ended: tuple[Stmt, ...] = (Barrier(),)  # after a launch, so that the next one sees what it wrote

    def __init__(self, loop: tree.Loop, launches: Sequence[_Launch], depth: int, threads: int, name: str) -> None:
        self.loop, self.launches, self.depth, self.threads, self.name = loop, launches, depth, threads, name
        self.own = {p.slot: p for p in loop.pointers}
        self.arguments: dict[tuple[object, ...], Buffer] = {}
        self.views: list[View] = []
        self.shared: dict[tuple[int, str], Buffer] = {}

    # ------------------------------------------------------------------ memory

    def place(self, view: View, number: int) -> View:
        """A view in pass `number`, or in passes that agree with it, behind the loop's own pointers."""
        if view[0] not in self.own:
            return view
        base = self.own[view[0]].at(number, self.loop.count)
        strides = [0] * max(len(base), len(view))
        for v in (base, view):
            for k, s in enumerate(v[2:]):
                strides[k] += s
        return (base[0], base[1] + view[1], *strides[: max(len(base), len(view)) - 2])

    def counter(self, number: int) -> int:
        return self.loop.count - 1 - number if self.loop.reverse else number

    def argument(self, b: Buffer, view: View, which: _Pass) -> tuple[Buffer, Expr]:
        """The kernel's parameter for a launch's buffer, and how far into it the pass's elements begin."""
        v = self.place(view, which.first)
        outer = tuple(v[2 : 2 + self.depth])
        stride = v[2 + self.depth] if len(v) > 2 + self.depth else 0
        last = which.first + which.step * (which.times - 1)
        ends = [stride * self.counter(n) for n in (which.first, last)]
        size = b.dtype.itemsize
        if stride % size:
            raise CompileError(f"a loop moves {b.name} by {stride} bytes, which is no multiple of {size}")
        span = b.span + (max(ends) - min(ends)) // size
        where = (v[0], v[1] + min(ends), *outer)
        key = (where, b.dtype, span)
        found = self.arguments.get(key)
        if found is None:
            # the alignment is promised for every pass
            found = self.arguments[key] = Buffer(f"a{len(self.views)}", b.dtype, (span,), align=b.align)
            self.views.append(where)
        if which.at is None or not stride:
            return found, const(0)
        step = stride // size * (-1 if self.loop.reverse else 1)
        return found, binary("add", binary("mul", which.at, step), (ends[0] - min(ends)) // size)

    # ------------------------------------------------------------------ statements

    def rewritten(
        self, body: Sequence[Stmt], number: int, buffers: dict[Buffer, tuple[Buffer, Expr]], thread: Expr
    ) -> tuple[Stmt, ...]:
        """Statements of launch `number` on the kernel's own memory, by a thread of another number."""
        done: dict[Expr, Expr] = {}

        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e is TX:
                return thread
            if e.op == "load" and e.attr[0] in buffers:
                b, offset = buffers[e.attr[0]]
                return Expr("load", (binary("add", args[0], offset), *args[1:]), e.dtype, e.lanes, (b, e.attr[1]))
            if e.op == "load" and e.attr[0].scope == "shared":
                return Expr("load", args, e.dtype, e.lanes, (self.home(number, e.attr[0]), e.attr[1]))
            return None

        def put(e: Expr) -> Expr:
            return rewrite(e, rule, done)

        def block(body: Sequence[Stmt]) -> tuple[Stmt, ...]:
            out: list[Stmt] = []
            for s in body:
                match s:
                    case For():
                        out.append(For(s.var, put(s.start), put(s.stop), block(s.body), s.kind, s.step))
                    case Store():
                        index, b = tuple(put(i) for i in s.index), s.buffer
                        if b in buffers:
                            b, offset = buffers[b]
                            index = (binary("add", index[0], offset),)
                        elif b.scope == "shared":
                            b = self.home(number, b)
                        out.append(Store(b, index, put(s.value), None if s.mask is None else put(s.mask)))
                    case Let():
                        out.append(Let(s.var, put(s.value)))
                    case If():
                        out.append(If(put(s.condition), block(s.then), block(s.otherwise)))
                    case Alloc() if s.buffer.scope == "shared":
                        self.home(number, s.buffer)
                    case Alloc():
                        out.append(Alloc(s.buffer))
                    case Barrier():
                        out.append(s)
                    case _:
                        raise CompileError(f"{type(s).__name__} cannot stand in a kernel that runs a whole loop")
            return tuple(out)

        return block(body)

    def home(self, number: int, b: Buffer) -> Buffer:
        """The kernel's shared array for one of launch `number`, which is the same in all passes."""
        key = (number, b.name)
        if key not in self.shared:
            self.shared[key] = replace(b, name=f"{b.name}_{number}")
        return self.shared[key]

    def written_out(self, which: _Pass) -> list[Stmt]:
        """One pass."""
        done: list[Stmt] = []
        for number, x in enumerate(self.launches):
            buffers = {b: self.argument(b, v, which) for b, v in zip(x.kernel.buffers, x.views, strict=True)}
            loop = _thread_loop(x.kernel)
            if x.threads > self.threads:  # its threads in turns
                turn = var(f"turn{number}_{self.name}")
                thread = binary("add", binary("mul", turn, self.threads), TX)
                body = self.rewritten(loop.body, number, buffers, thread)
                if x.threads % self.threads:
                    body = (If(binary("lt", thread, const(x.threads)), body),)
                body = (For(turn, const(0), const(-(-x.threads // self.threads)), body),)
            else:
                body = self.rewritten(loop.body, number, buffers, TX)
                if x.threads < self.threads and x.lanes:  # whole warps take part, or not
                    body = (If(binary("lt", binary("floordiv", TX, WARP), const(x.threads // WARP)), body),)
                elif x.threads < self.threads:
                    body = (If(binary("lt", TX, const(x.threads)), body),)
            if x.waits:  # before the next block takes this one's shared memory
                body = (*body, *self.ended)
            for s in reversed([s for s in statements(x.kernel.body) if isinstance(s, For) and s.kind == "block"]):
                body = (For(s.var, s.start, s.stop, body),)
            done += body if x.waits else [*body, *self.ended]
        return done

    def passes(self) -> list[Stmt]:
        """All passes: those that differ on their own, the others in a loop over a round of the carries' places."""
        count = self.loop.count
        pointers = self.loop.pointers
        low = 1 if any(p.first is not None for p in pointers) else 0
        high = count - 1 if any(p.last is not None for p in pointers) else count
        round_ = lcm(*(len(p.cycle) for p in pointers)) if pointers else 1
        done: list[Stmt] = self.written_out(_Pass(0)) if low else []
        times = max(0, high - low) // round_
        if times > 1:
            at = var(f"pass_{self.name}")
            inner: list[Stmt] = []
            for k in range(round_):
                inner += self.written_out(_Pass(low + k, times, round_, at))
            done.append(For(at, const(0), const(times * round_), tuple(inner), "serial", round_))
            low += times * round_
        for n in range(low, high):
            done += self.written_out(_Pass(n))
        if high < count and high >= low:
            done += self.written_out(_Pass(count - 1))
        return done


def one_kernel(
    loop: tree.Loop, parts: dict[str, Parts], name: str, target: Target, depth: int, way: str = "auto"
) -> tuple[Kernel, tuple[View, ...], str] | None:
    """The kernel that runs a whole loop, its views, and a note; None where it stays a loop of launches.

    `way` is 'auto' for what the estimate favours, 'launches', or 'one' for one kernel wherever one block can run it.
    """
    if way == "launches" or loop.count < 2 or loop.regions is not None:
        return None
    launches = _launches(loop.nodes, parts)
    if not launches:
        return None
    asked = {x.threads for x in launches if x.waits}
    threads = min(asked) if asked else min(THREADS, max(x.threads for x in launches))
    if len(asked) > 1 or any(x.threads > threads and x.lanes for x in launches) or any(x.threads % WARP for x in launches):
        return None
    apart, inside = estimate(launches, target)
    if way == "auto" and inside >= apart:
        return None
    maker = _Maker(loop, launches, depth, threads, name)
    body = maker.passes()
    used = sum(-(-b.span * b.dtype.itemsize // 16) * 16 for b in maker.shared.values())
    if used > STATIC_SHARED:
        return None
    allocs: list[Stmt] = [Alloc(b) for b in maker.shared.values()]
    made = launch(1, threads, [*allocs, *body], (var(f"only_{name}"),))
    kernel = Kernel(name, tuple(maker.arguments.values()), (made,), doc=f"{loop.count} passes of {len(launches)} launches")
    return kernel, tuple(maker.views), f"one block for all passes: {inside:,.0f} against {apart:,.0f} ns a pass, by estimate"


__all__ = ["WAYS", "estimate", "one_kernel"]
