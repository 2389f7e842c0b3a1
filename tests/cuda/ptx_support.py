"""What the tests of the PTX interpreter share: running a kernel on arrays, and a kernel around single instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.state import Counters, Extent, Options

Array = np.ndarray[Any, Any]
HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"


class Out:
    """An argument that the kernel writes: unwritten memory of a shape."""

    def __init__(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> None:
        self.array: Array = np.empty(shape, dtype)


def run(
    ptx: str,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    *,
    options: Options | None = None,
    shared: int = 0,
    extents: bool = False,
    partly: bool = False,
) -> tuple[list[Array], Counters]:
    """Runs a kernel on arrays (copied there and back), `Out`s and numbers: all arrays afterwards, and the counters.

    `extents` limits the launch to its arguments. Outputs must be written whole unless `partly`.
    """
    device = Emulator(1 << 26, options)
    function = device.load(ptx).function(name)
    arrays: list[tuple[int, Array]] = []
    values: list[Any] = []
    spans = []
    for k, a in enumerate(args):
        if isinstance(a, Out | np.ndarray):
            array = a.array if isinstance(a, Out) else np.array(a)
            address = device.allocate(array.nbytes, f"argument {k}")
            if not isinstance(a, Out):
                device.upload(address, array)
            arrays.append((address, array))
            values.append(address)
            spans.append(Extent(address, array.nbytes, isinstance(a, Out), f"argument {k}"))
        else:
            values.append(a)
    device.launch(function, grid, block, values, shared=shared, extents=spans if extents else None)
    if partly:
        device.options.check = False
    for address, array in arrays:
        device.download(address, array)
    return [a for _, a in arrays], device.counters[name][-1]


def single(body: str, loads: Sequence[tuple[str, str, str]], store: tuple[str, str, str], registers: str = "") -> str:
    """A kernel of one block: thread t loads element t of each operand (register, load type, register type), runs `body`, and
    stores a register to the output. The registers %i0 .. %i9 are 64-bit, `registers` declares more."""
    sizes = {"8": 1, "16": 2, "32": 4, "64": 8}
    lines = []
    for register, _, kind in (*loads, store):
        if f".{kind} {register};" not in " ".join(lines):
            lines.append(f".reg .{kind} {register};")
    text = HEAD + ".visible .entry k(" + ", ".join(f".param .u64 p{k}" for k in range(len(loads) + 1)) + ")\n{\n"
    text += "\n".join(lines) + "\n.reg .b64 %i<10>;\n.reg .b32 %t;\n.reg .pred %p;\n" + registers + "\nmov.u32 %t, %tid.x;\n"
    for k, (register, how, _) in enumerate(loads):
        size = next(s for bits, s in sorted(sizes.items(), key=lambda x: -len(x[0])) if how.endswith(bits))
        text += f"ld.param.u64 %i{k}, [p{k}];\nmad.wide.u32 %i{k}, %t, {size}, %i{k};\nld.global.{how} {register}, [%i{k}];\n"
    register, how, _ = store
    k = len(loads)
    size = next(s for bits, s in sorted(sizes.items(), key=lambda x: -len(x[0])) if how.endswith(bits))
    text += (
        body + f"\nld.param.u64 %i{k}, [p{k}];\nmad.wide.u32 %i{k}, %t, {size}, %i{k};\nst.global.{how} [%i{k}], "
        f"{register};\nret;\n}}\n"
    )
    return text


def kernel(body: str, params: str = ".param .u64 p0", head: str = "") -> str:
    """A kernel k with the registers %r, %f, %d (64 bits), %h (16), %p, whose body is given; %t is the thread, %b the block."""
    return (
        f"{HEAD}{head}\n.visible .entry "
        f"k({params})\n{{\n.reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %d<40>; .reg .b16 %h<20>;\n"
        f".reg .pred %p<10>; .reg .b32 %t, %b;\nmov.u32 %t, %tid.x;\nmov.u32 %b, %ctaid.x;\n{body}\nret;\n}}\n"
    )
