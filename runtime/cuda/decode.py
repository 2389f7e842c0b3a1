"""From instructions to Python closures: reading operands, writing results, and the table of opcodes.

Each opcode's function takes a `Decoder` and an `Instruction` and returns a `Step`: a function of the Batch that runs the
instruction for the batch's active threads. What an opcode does not know is refused when a kernel is loaded, not when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np

from ...ir.errors import PtxError
from .ptx_parse import Address, Both, Immediate, Instruction, Kernel, Operand, Register, Symbol, Vector
from .ptx_types import TYPES, UNSIGNED, WARP, PtxType
from .state import Batch

Value = Any
Step = Callable[[Batch], None]
Read = Callable[[Batch], Value]
Write = Callable[[Batch, Value], None]
Opcode = Callable[["Decoder", Instruction], Step]


@dataclass(frozen=True)
class WarpStep:
    """An instruction that lanes of a warp execute together. `members` reads the mask of those that must take part, None where
    all 32 must."""

    run: Step
    members: Read | None

    def __call__(self, b: Batch) -> None:
        self.run(b)


OPCODES: Final[dict[str, Opcode]] = {}


def opcode(*names: str) -> Callable[[Opcode], Opcode]:
    """Enters a function into the table of opcodes."""

    def enter(f: Opcode) -> Opcode:
        for n in names:
            OPCODES[n] = f
        return f

    return enter


def _axis(name: str, of: str) -> Callable[[Batch], Value]:
    k = "xyz".index(name)

    def sized(b: Batch) -> Value:
        return np.uint32((b.block if of == "block" else b.grid)[k])

    def thread(b: Batch) -> Value:
        x, y, _ = b.block
        v = b.in_block
        return (v % x if k == 0 else v // x % y if k == 1 else v // (x * y)).astype(np.uint32)

    def block(b: Batch) -> Value:
        x, y, _ = b.grid
        v = b.blocks
        v = (v % x if k == 0 else v // x % y if k == 1 else v // (x * y)).astype(np.uint32)
        return v[0] if b.n_blocks == 1 else v[b.block_of]

    return {"ntid": sized, "nctaid": sized, "tid": thread, "ctaid": block}[{"block": "ntid", "grid": "nctaid"}.get(of, of)]


def _mask(compare: Callable[[Any, Any], Any]) -> Callable[[Batch], Value]:
    lanes = np.arange(WARP)
    table = np.array([sum(1 << int(j) for j in lanes if compare(j, i)) for i in lanes], np.uint32)
    return lambda b: table[b.lane]


_SPECIAL: Final[dict[str, Callable[[Batch], Value]]] = {
    **{f"%tid.{a}": _axis(a, "tid") for a in "xyz"},
    **{f"%ctaid.{a}": _axis(a, "ctaid") for a in "xyz"},
    **{f"%ntid.{a}": _axis(a, "block") for a in "xyz"},
    **{f"%nctaid.{a}": _axis(a, "grid") for a in "xyz"},
    "%laneid": lambda b: b.lane.astype(np.uint32),
    "%warpid": lambda b: (b.in_block // WARP).astype(np.uint32),
    "%nwarpid": lambda b: np.uint32(b.warps_per_block),
    "%smid": lambda b: np.uint32(0),
    "%nsmid": lambda b: np.uint32(1),
    "%clock": lambda b: np.uint32(b.counters.steps & 0xFFFFFFFF),
    "%clock64": lambda b: np.uint64(b.counters.steps),
    "%globaltimer": lambda b: np.uint64(b.counters.steps),
    "%lanemask_eq": _mask(lambda j, i: j == i),
    "%lanemask_lt": _mask(lambda j, i: j < i),
    "%lanemask_le": _mask(lambda j, i: j <= i),
    "%lanemask_gt": _mask(lambda j, i: j > i),
    "%lanemask_ge": _mask(lambda j, i: j >= i),
    "WARP_SZ": lambda b: np.uint32(WARP),
}


class Decoder:
    """Makes the steps of one kernel. `symbols` are its variables' addresses in their own spaces, `spaces` which those are."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int], spaces: dict[str, str]) -> None:
        self.kernel = kernel
        self.symbols = symbols
        self.spaces = spaces
        self.index = {name: k for k, name in enumerate(kernel.registers)}
        self.types = [TYPES[t] for t in kernel.registers.values()]

    # ------------------------------------------------------------------ refusing

    def refuse(self, i: Instruction, why: str = "") -> NoReturn:
        """Raises PtxError that names opcode and line."""
        because = f": {why}" if why else ""
        raise PtxError(f"kernel {self.kernel.name}: the opcode '{i.opcode}' is not supported{because}, at {i.where}")

    def type_of(self, i: Instruction, k: int = -1) -> PtxType:
        """The type among an opcode's parts."""
        found = [TYPES[p] for p in i.parts[1:] if p in TYPES]
        if not found or not -len(found) <= k < len(found):
            self.refuse(i, "a type is missing")
        return found[k]

    def modifiers(self, i: Instruction, allowed: Iterable[str]) -> set[str]:
        """The parts that are no types, all of which must be allowed."""
        rest = [p for p in i.parts[1:] if p not in TYPES]
        known = set(allowed)
        for p in rest:
            if p not in known:
                self.refuse(i, f"unknown modifier .{p}")
        return set(rest)

    def operands(self, i: Instruction, least: int, most: int | None = None) -> tuple[Operand, ...]:
        n = len(i.operands)
        if not least <= n <= (most or least):
            self.refuse(i, f"{n} operands")
        return i.operands

    # ------------------------------------------------------------------ reading

    def read(self, i: Instruction, o: Operand, t: PtxType, exact: bool = True) -> Read:
        """Reads an operand as type t. Values have t's dtype. A wider register gives its low part where `exact` is off."""
        if isinstance(o, Register):
            return self._read_register(i, o, t, exact)
        if isinstance(o, Immediate):
            v = self.constant(i, o, t)
            return lambda b: v
        if isinstance(o, Symbol):
            if o.name not in self.symbols:
                self.refuse(i, f"unknown name {o.name}")
            v = self.constant(i, Immediate(self.symbols[o.name] + o.offset), t)
            return lambda b: v
        self.refuse(i, f"an operand it does not take: {o}")

    def constant(self, i: Instruction, o: Immediate, t: PtxType) -> Value:
        """An immediate as a numpy scalar of type t."""
        if t.kind == "p":
            return np.bool_(o.value != 0)
        if isinstance(o.value, float):
            if t.dtype.kind == "f":
                return t.dtype.type(o.value)
            wide = np.float32(o.value) if o.bits == 32 else np.float64(o.value)
            if wide.itemsize != t.size:
                self.refuse(i, f"the literal {o.value} as .{t.name}")
            return wide.view(t.dtype)
        bits = UNSIGNED[t.size].type(o.value & ((1 << t.bits) - 1))
        if t.dtype.kind == "f" and t.name != "tf32" and o.value not in (0,):
            return t.dtype.type(o.value)
        return bits.view(t.dtype)

    def _read_register(self, i: Instruction, o: Register, t: PtxType, exact: bool) -> Read:
        name = o.name
        if name not in self.index:
            return self._read_special(i, name, t)
        k, held = self.index[name], self.types[self.index[name]]
        negated = o.negated
        if (held.kind == "p") != (t.kind == "p") or held.size < t.size or (exact and held.size != t.size):
            self.refuse(i, f"{name} is .{held.name}, and is read as .{t.name}")
        narrow = held.size != t.size
        unsigned, dtype = UNSIGNED[t.size], t.dtype

        def read(b: Batch) -> Value:
            v = b.regs[k]
            if v is None or (b.partial and k in b.partial):
                v = undefined(b, k, name)
            if b.ix is not None and v.ndim:
                v = v[b.ix]
            if narrow:
                v = v.astype(unsigned)
            if negated:
                return ~v
            return v if v.dtype == dtype else v.view(dtype)

        return read

    def _read_special(self, i: Instruction, name: str, t: PtxType) -> Read:
        if name == "%dynamic_smem_size":
            size = self.symbols["%dynamic_smem_size"]
            return lambda b: t.dtype.type(size)
        if name not in _SPECIAL:
            self.refuse(i, f"unknown register {name}")
        make = _SPECIAL[name]

        def read(b: Batch) -> Value:
            v = make(b)
            if b.ix is not None and v.ndim:
                v = v[b.ix]
            return v.astype(t.dtype)

        return read

    def guard(self, i: Instruction) -> Read | None:
        """Reads a guard's predicate."""
        return None if i.guard is None else self._read_register(i, i.guard, TYPES["pred"], True)

    # ------------------------------------------------------------------ writing

    def write(self, i: Instruction, o: Operand, size: int = 0) -> Write:
        """Writes a register. A narrower value is extended by its sign if it has one. `size`: the bytes of what is written."""
        if not isinstance(o, Register) or (o.name != "_" and o.name not in self.index):
            self.refuse(i, f"it cannot write to {o}")
        if o.name == "_":
            return lambda b, v: None
        k, held = self.index[o.name], self.types[self.index[o.name]]
        if size and (size > held.size or held.kind == "p"):
            self.refuse(i, f"{o.name} is .{held.name}, too small for {size} bytes")
        storage = held.storage
        signed = np.dtype(f"i{held.size}")

        def write(b: Batch, v: Value) -> None:
            d = v.dtype
            if d != storage:
                if d.itemsize == storage.itemsize and d.kind != "b":
                    v = v.view(storage)
                elif d.kind == "i":
                    v = v.astype(signed).view(storage)
                else:
                    v = v.astype(storage)
            if b.ix is None:
                b.regs[k] = v
                if b.partial:
                    b.partial.pop(k, None)
                return
            now = b.regs[k]
            if now is None:
                now = np.zeros(b.threads, storage)
                b.partial[k] = np.zeros(b.threads, np.bool_)
            elif not now.ndim:
                now = np.full(b.threads, now)
            now[b.ix] = v
            b.regs[k] = now
            known = b.partial.get(k)
            if known is not None:
                known[b.ix] = True
                if known[b.living].all():
                    del b.partial[k]

        return write

    def result(self, i: Instruction, o: Operand, size: int = 0) -> Write:
        """Like `write`, for values of the length of the active threads (what memory and warp operations make)."""
        write = self.write(i, o, size)

        def spread(b: Batch, v: Value) -> None:
            if b.ix is None and v.ndim and len(v) != b.threads:
                full = np.zeros(b.threads, v.dtype)
                full[b.act] = v
                v = full
            write(b, v)

        return spread

    def wanted(self, i: Instruction, o: Operand, t: PtxType, exact: bool = True) -> Read:
        """Like `read`, but of the length of the active threads (or a scalar)."""
        read = self.read(i, o, t, exact)
        return lambda b: b.active(read(b))

    def each(self, o: Operand) -> tuple[Operand, ...]:
        """The items of a vector operand, or the operand alone."""
        return o.items if isinstance(o, Vector) else (o,)

    def result_and_predicate(self, i: Instruction, o: Operand) -> tuple[Operand, Operand | None]:
        return (o.first, o.second) if isinstance(o, Both) else (o, None)

    # ------------------------------------------------------------------ addresses

    def address(self, i: Instruction, o: Operand) -> tuple[Callable[[Batch], Any], str]:
        """Reads an address as int64, one per active thread; and the space of the variable it names, if it names one."""
        if isinstance(o, Symbol | Register):
            o = Address(o)
        if not isinstance(o, Address):
            self.refuse(i, f"{o} is no address")
        base, offset = o.base, o.offset
        if isinstance(base, Register) and base.name in self.index:
            held = self.types[self.index[base.name]]
            if held.size not in (4, 8):
                self.refuse(i, f"{base.name} is .{held.name}, not an address")
            read = self.read(i, base, TYPES[f"u{held.bits}"])

            def address(b: Batch) -> Any:
                v = b.active(read(b)).astype(np.int64)
                if offset:
                    v = v + np.int64(offset)
                return v if v.ndim else np.full(len(b.act), v)

            return address, ""
        space = ""
        at = offset
        if isinstance(base, Symbol):
            if base.name not in self.symbols:
                self.refuse(i, f"unknown name {base.name}")
            space = self.spaces[base.name]
            at += self.symbols[base.name] + base.offset
        elif base is not None:
            self.refuse(i, f"{base} is no address")
        return lambda b: np.full(len(b.act), at, np.int64), space


def undefined(b: Batch, k: int, name: str) -> Value:
    """A register that not every thread has written is read: right if the active threads have."""
    v = b.regs[k]
    known = b.partial.get(k)
    if v is None or known is None:
        if v is not None:
            return v
        b.fault("uninitialised register", f"{name} is read and was never written", b.act)
    if not known[b.act].all():
        b.fault("uninitialised register", f"{name} is read and was never written by them", b.act[~known[b.act]])
    return v
