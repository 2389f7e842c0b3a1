"""The shape of a launch, and kernels of several launches taken apart."""

from __future__ import annotations

from dataclasses import replace

from ...ir.errors import CompileError
from ..groups import mentioned
from ..loop_ir import For, Kernel, Stmt, statements

Grid = tuple[int, int, int]


def shape_of(kernel: Kernel) -> tuple[Grid, int]:
    """The grid (x, y, z) of a kernel that is one launch, and the threads of a block.

    Raises CompileError where block and thread loops are not nested as a launch's are.
    """
    blocks: list[int] = []
    threads = 0
    outer = [s for s in kernel.body if isinstance(s, For)]
    if len(kernel.body) != 1 or not outer or outer[0].kind != "block":
        raise CompileError(f"kernel {kernel.name}: a launch is one loop over blocks, and nothing beside it")
    for s in statements(kernel.body):
        if isinstance(s, For) and s.kind in ("block", "thread"):
            if not s.stop.is_const:
                raise CompileError(f"kernel {kernel.name}: {s.kind} loop {s.var.attr} has no constant end")
            if s.kind == "block":
                blocks.append(int(s.stop.attr))
            elif threads:
                raise CompileError(f"kernel {kernel.name}: two loops over threads in one launch")
            else:
                threads = int(s.stop.attr)
    if len(blocks) > 3 or not threads:
        raise CompileError(f"kernel {kernel.name}: a launch has one to three loops over blocks and one over threads")
    x, y, z = (*reversed(blocks), 1, 1)[:3]
    if x >= 1 << 31 or y > 65535 or z > 65535:
        raise CompileError(f"kernel {kernel.name}: a grid of {x} x {y} x {z} blocks exceeds what a device takes")
    return (x, y, z), threads


def launches_of(kernel: Kernel) -> list[tuple[Kernel, tuple[int, ...]]]:
    """The launches that a kernel's top-level statements are, each with the numbers of the kernel's buffers it takes."""
    made: list[tuple[Kernel, tuple[int, ...]]] = []
    for k, s in enumerate(kernel.body):
        name = kernel.name if len(kernel.body) == 1 else f"{kernel.name}_{k}"
        made.append(_one(kernel, name, s))
    return made


def _one(kernel: Kernel, name: str, s: Stmt) -> tuple[Kernel, tuple[int, ...]]:
    used = {b.name for b in mentioned([s])}
    places = tuple(k for k, b in enumerate(kernel.buffers) if b.name in used)
    return replace(kernel, name=name, buffers=tuple(kernel.buffers[k] for k in places), body=(s,)), places


__all__ = ["Grid", "launches_of", "shape_of"]
