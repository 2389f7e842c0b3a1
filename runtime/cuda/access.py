"""Loads, stores, atomics, fences and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from . import float_math as fm
from .alu import packed, unpacked
from .counters import note_global, note_shared
from .decode import Decoder, Step, Value, opcode
from .memory import LOCAL_BASE, SHARED_BASE, WINDOW
from .ptx_parse import Address, Immediate, Instruction, Symbol
from .ptx_types import TYPES, UNSIGNED
from .state import Array, Batch

SPACES: Final = ("global", "shared", "local", "const", "param")
_HINTS: Final = (
    *("ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "volatile", "weak", "relaxed", "acquire", "release", "acq_rel", "uni"),
    *(
        "cta",
        "gpu",
        "sys",
        "cluster",
        "L1::evict_normal",
        "L1::evict_unchanged",
        "L1::evict_first",
        "L1::evict_last",
        "L1::no_allocate",
    ),
    *("L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "shared::cta"),
)


def space_of(i: Instruction, named: str = "") -> str:
    """The space an opcode names (`shared::cta` is shared), else that of the variable its address names, else generic."""
    for p in i.parts:
        p = "shared" if p == "shared::cta" else p
        if p in SPACES:
            return "global" if p == "const" else p
    return "global" if named == "const" else named or "generic"


def _memory(b: Batch, space: str) -> Array:
    return b.memory.data if space == "global" else b.shared.data if space == "shared" else b.local.data


def by_space(b: Batch, space: str, address: Array) -> list[tuple[str, Array, Array]]:
    """(space, indices into the active threads, addresses in the space) of an access; one entry unless it is generic."""
    if space != "generic":
        return [(space, np.arange(len(address)), address)]
    found = []
    shared = (address >= SHARED_BASE) & (address < SHARED_BASE + WINDOW)
    local = (address >= LOCAL_BASE) & (address < LOCAL_BASE + WINDOW)
    for name, mask, base in (("shared", shared, SHARED_BASE), ("local", local, LOCAL_BASE), ("global", ~shared & ~local, 0)):
        at = np.flatnonzero(mask)
        if len(at):
            found.append((name, at, address[at] - base))
    return found


def _count(b: Batch, space: str, address: Array, size: int, act: Array) -> None:
    if space == "shared":
        note_shared(b.counters, b, address, size, act)
    elif space == "global":
        note_global(b.counters, b, address, size, act)


def _vector(i: Instruction, parts: tuple[str, ...]) -> int:
    return next((int(p[1]) for p in parts if p in ("v2", "v4", "v8")), 1)


@opcode("ld", "ldu")
def _ld(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 2, 3)
    t = d.type_of(i)
    mods = d.modifiers(i, (*SPACES, *_HINTS, "v2", "v4", "v8"))
    n = _vector(i, i.parts)
    items = d.each(o[0])
    if len(items) != n:
        d.refuse(i, f"{len(items)} registers for {n} values")
    if "param" in mods:
        return _ld_param(d, i, n)
    writes = [d.result(i, r, t.size) for r in items]
    address, named = d.address(i, o[1])
    space = space_of(i, named)
    kind = "n" if "nc" in mods or i.parts[0] == "ldu" else "r"
    size, dtype = t.size * n, UNSIGNED[t.size]
    if size > 16:
        d.refuse(i)
    final = t.dtype if t.kind == "s" else dtype

    def load(b: Batch) -> None:
        at = address(b)
        if space != "generic":
            if b.count:
                _count(b, space, at, size, b.act)
            first = b.touch(space, at, size, kind) // t.size
            data = _memory(b, space).view(dtype)
            for k, w in enumerate(writes):
                w(b, data[first + k].view(final))
            return
        values = np.zeros((n, len(at)), dtype)
        for name, where, place in by_space(b, space, at):
            act = b.act[where]
            if b.count:
                _count(b, name, place, size, act)
            first = b.touch(name, place, size, kind, act) // t.size
            data = _memory(b, name).view(dtype)
            for k in range(n):
                values[k, where] = data[first + k]
        for k, w in enumerate(writes):
            w(b, values[k].view(final))

    return load


def _ld_param(d: Decoder, i: Instruction, n: int) -> Step:
    t = d.type_of(i)
    where = i.operands[1]
    if not isinstance(where, Address) or not isinstance(where.base, Symbol):
        d.refuse(i, "an address that is not a parameter's name")
    names = [p.name for p in d.kernel.params]
    if where.base.name not in names:
        d.refuse(i, f"{where.base.name} is no parameter of the kernel")
    k = names.index(where.base.name)
    p = d.kernel.params[k]
    at = where.offset + where.base.offset
    if at < 0 or at + n * t.size > p.size:
        d.refuse(i, f"{n * t.size} bytes at {at} of a parameter of {p.size}")
    start = d.kernel.param_offsets()[k] + at
    dtype = t.dtype if t.kind == "s" else UNSIGNED[t.size]
    writes = [d.write(i, o, t.size) for o in d.each(i.operands[0])]

    def load(b: Batch) -> None:
        for j, w in enumerate(writes):
            w(b, np.frombuffer(b.params, dtype, 1, start + j * t.size)[0])

    return load


@opcode("st")
def _st(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 2, 3)
    t = d.type_of(i)
    d.modifiers(i, (*SPACES, *_HINTS, "v2", "v4", "v8"))
    n = _vector(i, i.parts)
    items = d.each(o[1])
    if len(items) != n:
        d.refuse(i, f"{len(items)} registers for {n} values")
    bits = TYPES[f"b{t.bits}"]
    reads = []
    for r in items:
        if isinstance(r, Immediate):
            reads.append(d.read(i, Immediate(int(d.constant(i, r, t).view(bits.dtype))), bits))
        else:
            reads.append(d.wanted(i, r, bits, exact=False))
    address, named = d.address(i, o[0])
    space = space_of(i, named)
    size, dtype = t.size * n, UNSIGNED[t.size]
    if size > 16 or space == "param":
        d.refuse(i)

    def store(b: Batch) -> None:
        at = address(b)
        if space != "generic":
            if b.count:
                _count(b, space, at, size, b.act)
            first = b.touch(space, at, size, "w") // t.size
            data = _memory(b, space).view(dtype)
            for k, r in enumerate(reads):
                data[first + k] = r(b)
            return
        for name, where, place in by_space(b, space, at):
            act = b.act[where]
            if b.count:
                _count(b, name, place, size, act)
            first = b.touch(name, place, size, "w", act) // t.size
            data = _memory(b, name).view(dtype)
            for k, r in enumerate(reads):
                v = r(b)
                data[first + k] = v[where] if np.ndim(v) else v

    return store


@opcode("prefetch", "prefetchu", "applypriority", "discard", "griddepcontrol", "nanosleep", "pmevent")
def _hint(d: Decoder, i: Instruction) -> Step:
    return lambda b: None


@opcode("membar", "fence")
def _fence(d: Decoder, i: Instruction) -> Step:
    """Orders a thread's own accesses, which the emulator runs in order anyway; it orders nothing between threads."""
    if "proxy" in i.parts:
        d.refuse(i)
    return lambda b: None


# --- atomics ---------------------------------------------------------------------------------------------------------


def _wrap_inc(a: Value, c: Value) -> Value:
    return np.where(a >= c, a.dtype.type(0), a + a.dtype.type(1))


def _wrap_dec(a: Value, c: Value) -> Value:
    return np.where((a == 0) | (a > c), c, a - a.dtype.type(1))


_ATOMIC: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda a, c: c,
    "inc": _wrap_inc,
    "dec": _wrap_dec,
}


def _rounds(place: Array) -> list[Array]:
    """Groups of indices in which no place occurs twice: the k-th group holds every place's k-th occurrence."""
    order = np.argsort(place, kind="stable")
    s = place[order]
    first = np.r_[True, s[1:] != s[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(s)), 0))
    rank = np.empty(len(s), np.int64)
    rank[order] = np.arange(len(s)) - start
    top = int(rank.max(initial=0))
    if not top:
        return [np.arange(len(place))]
    by_rank = np.argsort(rank, kind="stable")
    return np.split(by_rank, np.searchsorted(rank[by_rank], np.arange(1, top + 1)))


@opcode("atom", "red")
def _atom(d: Decoder, i: Instruction) -> Step:
    """Atomic updates, one thread after the other in the order of their numbers (a GPU's order is not defined)."""
    returns = i.parts[0] == "atom"
    t = d.type_of(i)
    mods = d.modifiers(i, (*SPACES, *_HINTS, *_ATOMIC, "cas", "noftz"))
    o = d.operands(i, 2 + returns, 4)
    o = o if returns else (Symbol("_"), *o)
    w = d.result(i, o[0], t.size) if returns and o[0] is not None else None
    address, named = d.address(i, o[1])
    space = space_of(i, named)
    swap = "cas" in mods
    name = "cas" if swap else next((m for m in i.parts if m in _ATOMIC), "")
    if not name or len(o) != (4 if swap else 3) or (t.name in ("f16", "bf16", "f16x2", "bf16x2") and name != "add"):
        d.refuse(i)
    x = d.wanted(i, o[2], t)
    y = d.wanted(i, o[3], t) if swap else None
    f = _ATOMIC.get(name, np.add)
    if t.name in ("bf16", "f16x2", "bf16x2"):

        def f(a: Value, c: Value) -> Value:
            return packed(fm.odd_sum(unpacked(a, t.name), unpacked(c, t.name)), t.name)

    fast = isinstance(f, np.ufunc) and not returns

    def step(b: Batch) -> None:
        at = address(b)
        given = np.broadcast_to(x(b), at.shape)
        other = np.broadcast_to(y(b), at.shape) if y is not None else None
        old = np.zeros(len(at), t.dtype)
        for memory, where, place in by_space(b, space, at):
            act = b.act[where]
            first = b.touch(memory, place, t.size, "a", act) // t.size
            data = _memory(b, memory).view(t.dtype)
            if fast:
                f.at(data, first, given[where])  # type: ignore[attr-defined]  # `fast` says it is a ufunc
                continue
            for group in _rounds(first):
                k, at_lane = first[group], where[group]
                now = data[k]
                old[at_lane] = now
                if other is not None:
                    data[k] = np.where(now == given[at_lane], other[at_lane], now)
                else:
                    data[k] = f(now, given[at_lane])
        if w is not None:
            w(b, old)

    return step


# --- asynchronous copies ---------------------------------------------------------------------------------------------


@dataclass
class Copy:
    """One cp.async of some threads: places in shared memory, the bytes to write, each thread's group, who has not yet waited."""

    place: Array
    data: Array
    size: int
    threads: Array
    group: Array
    instruction: Instruction


@opcode("cp")
def _cp(d: Decoder, i: Instruction) -> Step:
    if i.parts[1] != "async" or "bulk" in i.parts or "mbarrier" in i.parts:
        d.refuse(i)
    if i.parts[2] == "commit_group":

        def commit(b: Batch) -> None:
            b.groups[b.act] += 1

        return commit
    if i.parts[2] == "wait_all":
        return lambda b: _wait(b, None)
    if i.parts[2] == "wait_group":
        o = d.operands(i, 1)[0]
        if not isinstance(o, Immediate):
            d.refuse(i)
        n = int(o.value)
        return lambda b: _wait(b, n)
    return _cp_async(d, i)


def _cp_async(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 3, 5)
    d.modifiers(i, ("async", "ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B"))
    if not isinstance(o[2], Immediate) or o[2].value not in (4, 8, 16) or len(o) == 5:
        d.refuse(i)
    size = int(o[2].value)
    to, _ = d.address(i, o[0])
    source, _ = d.address(i, o[1])
    given = d.wanted(i, o[3], TYPES["u32"]) if len(o) == 4 else None

    def copy(b: Batch) -> None:
        act = b.act
        data = np.zeros((len(act), size), np.uint8)
        count = np.broadcast_to(given(b), act.shape) if given is not None else np.full(len(act), size, np.uint32)
        at = source(b)
        for n in np.unique(count):
            lanes = np.flatnonzero(count == n)
            if int(n) > size:
                b.fault("bad cp.async", f"{int(n)} bytes to read for a copy of {size}", act[lanes])
            if not n:
                continue
            if int(n) & (int(n) - 1):
                b.fault("bad cp.async", f"the emulator copies 1, 2, 4, 8 or 16 bytes, not {int(n)}", act[lanes])
            if b.count:
                note_global(b.counters, b, at[lanes], int(n), act[lanes])
            place = b.touch("global", at[lanes], int(n), "r", act[lanes])
            data[lanes, : int(n)] = b.memory.data[place[:, None] + np.arange(int(n))]
        target = to(b)
        if b.count:
            note_shared(b.counters, b, target, size, act)
        b.touch("shared", target, size, "i")
        instruction = b.instruction
        assert instruction is not None
        b.copies.append(Copy(target, data, size, act, b.groups[act].copy(), instruction))

    return copy


def _wait(b: Batch, newest: int | None) -> None:
    """Completes the copies of the active threads in all groups but the `newest` (None: everything, committed or not)."""
    active = np.zeros(b.threads, np.bool_)
    active[b.act] = True
    keep = []
    here = b.instruction
    for c in b.copies:
        done = active[c.threads]
        if newest is not None:
            done &= c.group < b.groups[c.threads] - newest
        if done.any():
            b.instruction = c.instruction  # what is wrong with the write is the copy's fault
            place = b.touch("shared", c.place[done], c.size, "d", c.threads[done])
            b.shared.data[place[:, None] + np.arange(c.size)] = c.data[done]
            if done.all():
                continue
            left = ~done
            c = Copy(c.place[left], c.data[left], c.size, c.threads[left], c.group[left], c.instruction)
        keep.append(c)
    b.copies = keep
    b.instruction = here
