"""How many 32-bit registers the values of a kernel's PTX need at once: what an assembler's allocation comes near to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .ptx_parse import Address, Both, Instruction, Kernel, Operand, Register, Vector, parse_ptx
from .ptx_types import TYPES

_NO_RESULT = ("st", "bra", "brx", "bar", "barrier", "ret", "exit", "trap", "red", "cp", "membar", "fence", "prefetch", "stmatrix")
_ENDS = ("ret", "exit", "trap")


def _registers(operands: Iterable[Operand]) -> Iterator[str]:
    for o in operands:
        match o:
            case Register(name):
                yield name
            case Vector(items):
                yield from _registers(items)
            case Both(first, second):
                yield from _registers((first, second))
            case Address(Register(name)):
                yield name


def _split(i: Instruction) -> tuple[set[str], set[str]]:
    """The registers that an instruction writes and those that it reads."""
    results = () if i.parts[0] in _NO_RESULT else i.operands[:1]
    reads = set(_registers(i.operands[len(results) :]))
    writes = {r for o in results for r in _registers((o,))}
    if i.guard is not None:
        reads |= {i.guard.name} | writes  # where the guard is false the old value stays
    return writes, reads


def live_registers(kernel: Kernel) -> int:
    """The most 32-bit registers that hold values which are still needed; predicates are not counted."""
    size = {name: 0 if t == "pred" else max(1, TYPES[t].size // 4) for name, t in kernel.registers.items()}
    uses = [_split(i) for i in kernel.code]
    starts = sorted(
        {0, *kernel.labels.values(), *(k + 1 for k, i in enumerate(kernel.code) if i.parts[0] in ("bra", "brx", *_ENDS))}
    )
    blocks = [(a, b) for a, b in zip(starts, [*starts[1:], len(kernel.code)], strict=True) if a < b]
    number = {a: k for k, (a, _) in enumerate(blocks)}
    following: list[list[int]] = []
    for k, (_, end) in enumerate(blocks):
        last, after = kernel.code[end - 1], []
        targets = [o.name for o in last.operands if hasattr(o, "name")] if last.parts[0] in ("bra", "brx") else []
        for name in targets:
            places = [name] if name in kernel.labels else kernel.tables.get(name, ())
            after += [number[kernel.labels[p]] for p in places if kernel.labels[p] in number]
        plain = last.parts[0] not in (*_ENDS, "bra", "brx") or last.guard is not None
        if plain and k + 1 < len(blocks):
            after.append(k + 1)
        following.append(after)
    live: list[set[str]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for k in range(len(blocks) - 1, -1, -1):
            held = set().union(*(live[n] for n in following[k]))
            for at in range(blocks[k][1] - 1, blocks[k][0] - 1, -1):
                held = (held - uses[at][0]) | uses[at][1]
            if held != live[k]:
                live[k], changed = held, True
    most = 0
    for k, (first, end) in enumerate(blocks):
        held = set().union(*(live[n] for n in following[k]))
        need = sum(size.get(r, 0) for r in held)
        for at in range(end - 1, first - 1, -1):
            writes, reads = uses[at]
            most = max(most, need + sum(size.get(r, 0) for r in writes - held))
            for r in writes & held - reads:
                need -= size.get(r, 0)
            for r in reads - held:
                need += size.get(r, 0)
            held = (held - writes) | reads
        most = max(most, need)
    return most


def live_values(ptx: str) -> dict[str, int]:
    """`live_registers` of each kernel of a module's text."""
    return {name: live_registers(k) for name, k in parse_ptx(ptx).kernels.items()}


__all__ = ["live_registers", "live_values"]
