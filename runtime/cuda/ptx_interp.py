"""Runs PTX kernels: loads modules into an emulated memory and schedules the threads of a launch.

All threads of a batch of blocks run in lock-step, as groups at different places of the code; the group that is furthest behind
runs first, and groups that meet go on as one. Since Volta, lanes of a warp are independent threads: an instruction that needs
several lanes waits for them, and what never comes is a fault. Barriers of a block want every thread of it at one instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...ir.errors import LaunchError, PtxError
from . import access, alu, convert, matrix, warp  # noqa: F401  # these enter their opcodes into the table
from .decode import OPCODES, Decoder, Read, WarpStep
from .memory import GLOBAL_BASE, MAX_BLOCKS, MAX_TIME, WRITTEN, GlobalMemory, Shadow
from .ptx_parse import Immediate, Instruction, Kernel, Module, Symbol, Variable, parse_ptx
from .ptx_types import TYPES, WARP
from .state import Array, Batch, Counters, Extent, Options, layout

MAX_THREADS: Final = 1024
STATIC_SHARED: Final = 48 * 1024
DYNAMIC_SHARED: Final = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}  # KB a block may have where it asks for it


@dataclass(frozen=True)
class _Branch:
    target: int
    guarded: bool


@dataclass(frozen=True)
class _Jump:
    """brx.idx: to the table's entry."""

    index: Read
    targets: tuple[int, ...]


@dataclass(frozen=True)
class _Exit:
    pass


@dataclass(frozen=True)
class _Barrier:
    """A barrier of a block; `count` threads of it (None: all). `reduce` is (operation, predicate, result) of barrier.red."""

    number: Read
    count: Read | None
    arrive: bool = False
    reduce: tuple[str, Read, Any] | None = None


class Loaded:
    """A kernel ready to run: its steps, where its variables lie, and what it needs of a launch."""

    def __init__(self, kernel: Kernel, module: LoadedModule) -> None:
        self.kernel, self.module = kernel, module
        self._decoded: dict[int, list[tuple[Read | None, Any, Instruction]]] = {}
        self.statics = [*module.shared, *(v for v in kernel.variables if v.space == "shared")]
        self.locals = [v for v in kernel.variables if v.space == "local"]
        self.static_bytes = sum(v.size for v in self.statics if not v.extern)
        if self.static_bytes > STATIC_SHARED:
            raise LaunchError(
                f"kernel {kernel.name}: {self.static_bytes:,} bytes of static shared memory, beyond {STATIC_SHARED:,}"
            )
        self.local_layout = layout(self.locals, 0)
        self.leaders = sorted(set(kernel.labels.values()))
        self.grains = self._grains()
        self.steps(0)  # what cannot run is refused now

    def shared_layout(self, dynamic: int) -> tuple[dict[str, tuple[int, int]], int]:
        return layout(self.statics, dynamic)

    def _grains(self) -> tuple[int, int]:
        """The widths of the narrowest accesses to global and to shared memory: what races are watched by."""
        found = {"global": 16, "shared": 16}
        for i in self.kernel.code:
            name = i.parts[0]
            if name in ("ld", "ldu", "st", "atom", "red"):
                types = [TYPES[p] for p in i.parts[1:] if p in TYPES]
                n = next((int(p[1]) for p in i.parts if p in ("v2", "v4")), 1)
                space = access.space_of(i)
                for s in ("global", "shared") if space == "generic" else (space,):
                    if s in found and types:
                        found[s] = min(found[s], types[-1].size * n)
            elif name == "cp" and len(i.operands) > 2 and isinstance(i.operands[2], Immediate):
                found["shared"] = min(found["shared"], int(i.operands[2].value))
                found["global"] = min(found["global"], int(i.operands[2].value) if len(i.operands) == 3 else 1)
        return found["global"], found["shared"]

    def steps(self, dynamic: int) -> list[tuple[Read | None, Any, Instruction]]:
        """(guard, step, instruction) of each place in the code, for a launch with so much dynamic shared memory."""
        known = self._decoded.get(dynamic)
        if known is None:
            known = self._decoded[dynamic] = self._decode(dynamic)
        return known

    def _decode(self, dynamic: int) -> list[tuple[Read | None, Any, Instruction]]:
        symbols, spaces = dict(self.module.symbols), dict(self.module.spaces)
        for places, space in ((self.shared_layout(dynamic)[0], "shared"), (self.local_layout[0], "local")):
            for name, (at, _) in places.items():
                symbols[name], spaces[name] = at, space
        for v in self.kernel.variables:
            if v.space in ("global", "const"):
                raise PtxError(f"kernel {self.kernel.name}: a .{v.space} variable inside a kernel is not supported: {v.name}")
        symbols["%dynamic_smem_size"] = dynamic
        d = Decoder(self.kernel, symbols, spaces)
        code = [(d.guard(i), self._step(d, i), i) for i in self.kernel.code]
        end = Instruction(("ret",), (), self.kernel.line, "the end of the kernel")
        code.append((None, _Exit(), end))
        return code

    def _step(self, d: Decoder, i: Instruction) -> Any:
        name = i.parts[0]
        labels = self.kernel.labels
        if name == "bra":
            target = d.operands(i, 1)[0]
            assert isinstance(target, Symbol)
            return _Branch(labels[target.name], i.guard is not None)
        if name == "brx":
            o = d.operands(i, 2)
            if not isinstance(o[1], Symbol) or o[1].name not in self.kernel.tables:
                d.refuse(i)
            return _Jump(d.wanted(i, o[0], TYPES["u32"]), tuple(labels[t] for t in self.kernel.tables[o[1].name]))
        if name in ("ret", "exit"):
            return _Exit()
        if name in ("trap", "brkpt"):
            return lambda b: b.fault("trap", "the kernel ended itself", b.act)
        if name in ("bar", "barrier"):
            return self._barrier(d, i)
        make = OPCODES.get(name)
        if make is None:
            raise PtxError(f"kernel {self.kernel.name}: unknown opcode '{i.opcode}', at {i.where}")
        return make(d, i)

    def _barrier(self, d: Decoder, i: Instruction) -> Any:
        parts = [p for p in i.parts[1:] if p not in ("cta", "aligned")]
        u = TYPES["u32"]
        if parts[:1] == ["warp"]:
            return warp.bar_warp(d, i)
        if parts and parts[0] == "red":
            operation = parts[1]
            o = d.operands(i, 3, 4)
            count = d.wanted(i, o[2], u) if len(o) == 4 else None
            reduce = (operation, d.wanted(i, o[-1], TYPES["pred"]), d.result(i, o[0]))
            if operation not in ("popc", "and", "or"):
                d.refuse(i)
            return _Barrier(d.wanted(i, o[1], u), count, reduce=reduce)
        if parts not in (["sync"], ["arrive"]):
            d.refuse(i)
        o = d.operands(i, 1, 2)
        count = d.wanted(i, o[1], u) if len(o) == 2 else None
        if parts == ["arrive"] and count is None:
            d.refuse(i)
        return _Barrier(d.wanted(i, o[0], u), count, parts == ["arrive"])


class LoadedModule:
    """A module in an emulated memory: global and constant variables have their places and first values."""

    def __init__(self, text: str | bytes, memory: GlobalMemory) -> None:
        self.module: Module = parse_ptx(text)
        self.memory = memory
        self.symbols: dict[str, int] = {}
        self.spaces: dict[str, str] = {}
        self.shared = [v for v in self.module.variables if v.space == "shared"]
        placed: list[Variable] = []
        self.addresses: list[int] = []
        for v in self.module.variables:
            if v.space in ("global", "const"):
                address = memory.allocate(v.size, v.name, constant=v.space == "const", module=True)
                self.addresses.append(address)
                self.symbols[v.name], self.spaces[v.name] = address, "global"
                placed.append(v)
        for v in placed:
            at = self.symbols[v.name] - GLOBAL_BASE
            if v.data is None:
                continue
            memory.data[at : at + v.size] = np.frombuffer(v.data, np.uint8)[: v.size]
            memory.state[at : at + v.size] = WRITTEN
            for offset, name, extra in v.addresses:
                if name not in self.symbols:
                    raise PtxError(f"the variable {v.name} holds the address of {name}, which is no variable")
                memory.data[at + offset : at + offset + 8] = np.frombuffer(
                    (self.symbols[name] + extra).to_bytes(8, "little"), np.uint8
                )
        self.kernels = {name: Loaded(k, self) for name, k in self.module.kernels.items()}

    def unload(self) -> None:
        """Frees the module's variables."""
        for a in self.addresses:
            self.memory.free(a)
        self.addresses = []


def launch(
    loaded: Loaded,
    grid: Sequence[int],
    block: Sequence[int],
    params: bytes,
    *,
    dynamic_shared: int = 0,
    options: Options | None = None,
    extents: Sequence[Extent] | None = None,
) -> Counters:
    """Runs a kernel over a grid of blocks; `params` are the bytes of its parameters. With `extents`, global memory outside them
    is out of bounds for this launch.

    Raises LaunchError for a launch no GPU would take, KernelFaultError for what goes wrong in it.
    """
    options = options or Options()
    kernel = loaded.kernel
    grid3, block3 = _dimensions(kernel, grid, block)
    size = block3[0] * block3[1] * block3[2]
    if len(params) != kernel.param_bytes:
        raise LaunchError(f"kernel {kernel.name}: {len(params)} bytes of arguments; its parameters take {kernel.param_bytes}")
    sm = int("".join(c for c in loaded.module.module.target if c.isdigit()) or 0)
    most = next((kb for s, kb in sorted(DYNAMIC_SHARED.items(), reverse=True) if s <= sm), 48) * 1024
    if dynamic_shared < 0 or loaded.static_bytes + dynamic_shared > most:
        asked = f"{loaded.static_bytes:,} + {dynamic_shared:,} bytes of shared memory"
        raise LaunchError(f"kernel {kernel.name}: {asked}; a block of sm_{sm} has {most:,}")
    counters = Counters()
    memory = loaded.module.memory
    total = grid3[0] * grid3[1] * grid3[2]
    per = max(1, options.batch // size)
    shadow = Shadow(memory.top, loaded.grains[0]) if options.check else None
    code = loaded.steps(dynamic_shared)
    regions = loaded.shared_layout(dynamic_shared), loaded.local_layout
    with np.errstate(all="ignore"):
        for first in range(0, total, per):
            blocks = np.arange(first, min(total, first + per), dtype=np.int64)
            batch = Batch(
                *(kernel, memory, grid3, block3, blocks, options, counters, regions, loaded.grains, shadow),
                tuple(extents) if extents is not None else None, params, 1,
            )  # fmt: skip
            _Run(batch, code, loaded.leaders).run()
    return counters


def _dimensions(kernel: Kernel, grid: Sequence[int], block: Sequence[int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    for name, given, limits in (("grid", grid, (2**31 - 1, 65535, 65535)), ("block", block, (1024, 1024, 64))):
        if not 1 <= len(given) <= 3 or any(not 1 <= int(v) <= m for v, m in zip(given, limits, strict=False)):
            raise LaunchError(f"kernel {kernel.name}: a {name} of {tuple(given)}; the limits are {limits}, at least 1 each")
    g = tuple(int(v) for v in (*grid, 1, 1)[:3])
    b = tuple(int(v) for v in (*block, 1, 1)[:3])
    size = b[0] * b[1] * b[2]
    if size > min(MAX_THREADS, kernel.max_threads or MAX_THREADS):
        raise LaunchError(f"kernel {kernel.name}: a block of {size} threads; at most {kernel.max_threads or MAX_THREADS} fit")
    wanted = (*kernel.required_threads, 1, 1)[:3]
    if kernel.required_threads and b != wanted:
        raise LaunchError(f"kernel {kernel.name}: a block of {b}; it was compiled for {wanted} (.reqntid)")
    if g[0] * g[1] * g[2] > MAX_BLOCKS:
        raise LaunchError(f"kernel {kernel.name}: {g[0] * g[1] * g[2]:,} blocks; the emulator runs at most {MAX_BLOCKS:,}")
    return (g[0], g[1], g[2]), (b[0], b[1], b[2])


class _Run:
    """Schedules one batch."""

    def __init__(self, b: Batch, code: list[tuple[Read | None, Any, Instruction]], leaders: list[int]) -> None:
        self.b, self.code = b, code
        self.leaders = set(leaders)
        self.ready: dict[int, Array] = {0: b.all}
        self.waiting: dict[int, Array] = {}  # at barriers of their block
        self.parked: dict[int, Array] = {}  # at an instruction of the warp, for other lanes
        self.numbers: dict[int, Any] = {}  # each waiting thread's barrier number and count, by place
        self.arrived = np.zeros((b.n_blocks, 16), np.int64)

    def run(self) -> None:
        while True:
            while self.ready:
                pc = min(self.ready)
                self._group(pc, self.ready.pop(pc))
            if not self.waiting and not self.parked:
                return
            if not self._release():
                self._stuck()

    def _put(self, to: dict[int, Array], pc: int, act: Array) -> None:
        if len(act):
            old = to.get(pc)
            to[pc] = act if old is None else np.sort(np.concatenate([old, act]))

    def _group(self, pc: int, act: Array) -> None:
        """Runs a group until it branches, waits, ends, or meets another."""
        b, code, counters, leaders = self.b, self.code, self.b.counters, self.leaders
        stop = min(self.ready) if self.ready else len(code)
        b.select(act)
        budget = b.options.budget
        steps = counters.steps
        while True:
            guard, step, instruction = code[pc]
            b.instruction = instruction
            steps += 1
            counters.steps = steps
            if steps > budget:
                b.fault("instruction budget", f"{budget:,} instructions were issued and the kernel does not end", act)
            take: Any = True
            if guard is not None:
                take = guard(b)
                if take.ndim:
                    take = b.active(take)
                    if take.all():
                        take = True
                    elif not take.any():
                        take = False
                else:
                    take = bool(take)
            if b.count:
                self._count(instruction, act if take is True else act[:0] if take is False else act[take])
            counters.instructions += len(act)
            kind = type(step)
            if kind is _Branch:
                if take is not False:
                    self._put(self.ready, step.target, act if take is True else act[take])
                if take is not True:
                    self._put(self.ready, pc + 1, act if take is False else act[~take])
                return
            if kind is _Exit or kind is _Barrier or kind is _Jump or kind is WarpStep:
                if take is not False:
                    now = act if take is True else act[take]
                    if take is not True:
                        self._put(self.ready, pc + 1, act[~take])
                    b.select(now)
                    if kind is WarpStep:
                        if not self._warp(pc, step, now):
                            return
                        if take is not True or len(b.act) != len(now):
                            self._put(self.ready, pc + 1, b.act)
                            return
                    else:
                        self._control(pc, step, now)
                        return
            elif take is True:
                step(b)
            elif take is not False:
                b.select(act[take])
                step(b)
                b.select(act)
            pc += 1
            if pc >= stop or (pc in leaders and pc in self.ready):
                self._put(self.ready, pc, act)
                return

    def _count(self, i: Instruction, act: Array) -> None:
        if len(act):
            n = len(np.unique(self.b.warp_of[act]))
            self.b.counters.opcodes[i.opcode] = self.b.counters.opcodes.get(i.opcode, 0) + n

    def _control(self, pc: int, step: Any, act: Array) -> None:
        b = self.b
        if isinstance(step, _Exit):
            b.alive[act] = False
            b.living = np.flatnonzero(b.alive)
        elif isinstance(step, _Jump):
            at = np.broadcast_to(step.index(b), act.shape)
            beyond = at >= len(step.targets)
            if beyond.any():
                b.fault("jump out of its table", f"index {int(at.max())} of {len(step.targets)} targets", act[beyond])
            for k in np.unique(at):
                self._put(self.ready, step.targets[int(k)], act[at == k])
        else:
            number = np.broadcast_to(step.number(b), act.shape).astype(np.int64)
            if (number >= 16).any():
                b.fault("bad barrier", f"barrier {int(number.max())} of 16", act[number >= 16])
            given = step.count(b) if step.count is not None else np.int64(0)
            count = np.broadcast_to(given, act.shape).astype(np.int64)
            if step.arrive:
                np.add.at(self.arrived, (b.block_of[act], number), 1)
                self._put(self.ready, pc + 1, act)
                return
            table = self.numbers.setdefault(pc, np.zeros((2, b.threads), np.int64))
            table[0, act], table[1, act] = number, count
            self._put(self.waiting, pc, act)

    # ------------------------------------------------------------------ instructions of a warp

    def _warp(self, pc: int, step: WarpStep, act: Array) -> bool:
        """Runs it for the warps that are complete and parks the other lanes; the batch's active threads are those that ran.
        False where nobody ran."""
        b = self.b
        members = step.members(b) if step.members is not None else np.uint32(0xFFFFFFFF)
        whole = len(act) == b.threads and b.size % WARP == 0
        if whole and not members.ndim and members == 0xFFFFFFFF:
            step.run(b)
            return True
        waiting = self.parked.pop(pc, None)
        if waiting is not None:
            act = np.sort(np.concatenate([waiting, act]))
            b.select(act)
            members = step.members(b) if step.members is not None else members
        mask = np.broadcast_to(members, act.shape).astype(np.int64)
        outside = (mask >> b.lane[act]) & 1 == 0
        if outside.any():
            b.fault("lane outside its mask", f"lane {int(b.lane[act[outside][0]])} is not in its own member mask", act[outside])
        n = b.n_blocks * b.warps_per_block
        present = np.bincount(b.warp_of[act], weights=2.0 ** b.lane[act], minlength=n).astype(np.int64)[b.warp_of[act]]
        alive = np.bincount(b.warp_of[b.living], weights=2.0 ** b.lane[b.living], minlength=n).astype(np.int64)[b.warp_of[act]]
        if step.members is None and (alive != 0xFFFFFFFF).any():
            bad = act[alive != 0xFFFFFFFF]
            b.fault("divergent warp", "an instruction of the whole warp, some of whose lanes have ended or do not exist", bad)
        ready = (present & mask & alive) == (mask & alive)
        if not ready.all():
            self._put(self.parked, pc, act[~ready])
            act = act[ready]
            if not len(act):
                return False
        b.select(act)
        step.run(b)
        b.select(act)
        return True

    # ------------------------------------------------------------------ barriers

    def _release(self) -> bool:
        """Lets the blocks on whose barrier all have arrived go on. False where there are none."""
        b = self.b
        arrived = self.arrived.copy()
        for pc, act in self.waiting.items():
            np.add.at(arrived, (b.block_of[act], self.numbers[pc][0, act]), 1)
        freed = False
        everyone = np.bincount(b.block_of[b.living], minlength=b.n_blocks)
        self._judge_barriers(everyone)
        done: list[Array] = []
        for pc in list(self.waiting):
            act = self.waiting[pc]
            number, count = self.numbers[pc][0, act], self.numbers[pc][1, act]
            want = np.where(count > 0, count, b.size)
            go = arrived[b.block_of[act], number] >= want
            if not go.any():
                continue
            freed = True
            out = act[go]
            step = self.code[pc][1]
            if step.reduce is not None:
                self._reduce(step.reduce, out)
            self.arrived[b.block_of[out], number[go]] = 0
            done.append(out)
            left = act[~go]
            if len(left):
                self.waiting[pc] = left
            else:
                del self.waiting[pc]
            self._put(self.ready, pc + 1, out)
        if freed:
            if b.clock >= MAX_TIME:
                b.fault("too many barriers", f"the emulator follows at most {MAX_TIME:,} in one launch", done[0])
            b.advance(np.unique(b.block_of[np.concatenate(done)]))
        return freed

    def _judge_barriers(self, everyone: Array) -> None:
        """Faults where threads of one block wait for all of it at different barriers, or where some of it has ended."""
        b = self.b
        seen = np.full(b.n_blocks, -1)
        for pc, act in self.waiting.items():
            full = act[self.numbers[pc][1, act] == 0]
            if not len(full):
                continue
            b.instruction = self.code[pc][2]
            blocks = np.unique(b.block_of[full])
            other = blocks[(seen[blocks] >= 0) & (seen[blocks] != pc)]
            if len(other):
                there = self.code[int(seen[other[0]])][2]
                mine = full[b.block_of[full] == other[0]]
                b.fault("barrier divergence", f"they wait here while others of their block wait at {there.where}", mine)
            seen[blocks] = pc
            ended = blocks[everyone[blocks] < b.size]
            if len(ended):
                mine = full[b.block_of[full] == ended[0]]
                gone = b.size - int(everyone[ended[0]])
                first = np.flatnonzero((b.block_of == ended[0]) & ~b.alive)
                who = f"{gone} of their block's {b.size} threads have ended, the first {b.name(int(first[0]))}"
                b.fault("barrier divergence", f"they wait at a barrier; {who}", mine)

    def _reduce(self, how: tuple[str, Read, Any], act: Array) -> None:
        b = self.b
        operation, read, write = how
        b.select(act)
        p = np.broadcast_to(read(b), act.shape)
        blocks = b.block_of[act]
        yes, all_ = np.bincount(blocks, weights=p, minlength=b.n_blocks), np.bincount(blocks, minlength=b.n_blocks)
        if operation == "popc":
            write(b, yes[blocks].astype(np.uint32))
        else:
            write(b, (yes == all_)[blocks] if operation == "and" else (yes > 0)[blocks])

    def _stuck(self) -> None:
        """Nobody can go on: names who waits for whom."""
        b = self.b
        if self.parked:
            pc, act = min(self.parked.items())
            b.instruction = self.code[pc][2]
            b.select(act)
            step = self.code[pc][1]
            members = step.members(b) if step.members is not None else np.uint32(0xFFFFFFFF)
            mask = int(np.broadcast_to(members, act.shape)[0])
            warp_ = b.warp_of[act[0]]
            here = sum(1 << int(x) for x in b.lane[act[b.warp_of[act] == warp_]])
            missing = [k for k in range(WARP) if mask >> k & 1 and not here >> k & 1]
            b.fault("divergent warp", f"they wait for lanes {missing} of their warp, which are elsewhere", act)
        pc, act = min(self.waiting.items())
        b.instruction = self.code[pc][2]
        b.fault("barrier divergence", "they wait at a barrier that the others of their block never reach", act)
