"""Planted faults: each is caught by the interpreter, with a message that names the thread, the instruction and its line.

The same kernels without the fault run clean (`test_the_kernels_run_without_their_fault`), and with the checks off the faults
that do not break the emulator itself go unnoticed: results alone do not show them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tensorwright.ir.errors import KernelFaultError
from tensorwright.runtime.cuda.state import Options

from .ptx_support import HEAD, Out, kernel, run

OUT = "ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %t, 4, %d0;\n"
SHARED = ".shared .align 16 .b8 s[512]; .shared .align 16 .b8 other[512];\nmov.u64 %d2, s; mad.wide.u32 %d3, %t, 4, %d2;\n"
MORE = ".param .u64 p0, .param .u64 p1"


@dataclass(frozen=True)
class Fault:
    """A kernel with a mistake: `bad` stands where `good` would. `thread` is the one the message names first."""

    name: str
    kind: str
    body: str
    bad: str
    good: str
    thread: str = "block (0,0,0) thread"
    says: str = ""
    args: Any = (lambda: [Out(128, np.uint32)],)
    grid: tuple[int, ...] = (1,)
    block: tuple[int, ...] = (64,)
    params: str = ".param .u64 p0"
    head: str = ""
    extents: bool = False

    def ptx(self, part: str) -> str:
        return kernel(self.body.replace("@@", part), self.params, self.head)


def ints(n: int) -> np.ndarray[Any, Any]:
    return np.arange(n, dtype=np.uint32)


READ: Any = (lambda: [Out(128, np.uint32), ints(64)],)
IN = "ld.param.u64 %d4, [p1]; mad.wide.u32 %d5, %t, 4, %d4;\n"

FAULTS = [
    Fault(
        "write past the end of a buffer",
        "out of bounds",
        OUT + "@@ [%d1], %t;",
        "add.s64 %d1, %d1, 260; st.global.u32",
        "st.global.u32",
        "block (0,0,0) thread (63,0,0)",
        "1 bytes|0 bytes past its end|bytes past",
    ),
    Fault(
        "read before the start of a buffer",
        "out of bounds",
        OUT + IN + "ld.global.u32 %r0, [%d5@@]; st.global.u32 [%d1], %r0;",
        "-4",
        "+0",
        "block (0,0,0) thread (0,0,0)",
        "argument 1",
        args=READ,
        params=MORE,
    ),
    Fault("null pointer", "out of bounds", OUT + "mov.u64 %d6, 8; st.global.u32 [@@], %t;", "%d6", "%d1", says="null pointer"),
    Fault(
        "one lane of a vector store outside",
        "out of bounds",
        OUT + "mad.wide.u32 %d1, %t, 8, %d0; st.global.v2.u32 [%d1@@], {%t, %t};",
        "+8",
        "+0",
        "thread (63,0,0)",
    ),
    Fault(
        "write through a read-only pointer",
        "out of bounds",
        OUT + IN + "ld.global.u32 %r0, [%d5]; st.global.u32 [@@], %r0;",
        "%d5",
        "%d1",
        says="a write to",
        args=READ,
        params=MORE,
        extents=True,
    ),
    Fault(
        "write into another argument's memory",
        "out of bounds",
        OUT + IN + "st.global.u32 [%d1@@], %t;",
        "+131072",
        "+0",
        args=READ,
        params=MORE,
    ),
    Fault(
        "shared memory beyond a variable",
        "out of bounds",
        OUT + SHARED + "st.shared.u32 [%d3@@], %t; st.global.u32 [%d1], %t;",
        "+260",
        "+0",
        "thread (63,0,0)",
        "of s",
    ),
    Fault(
        "shared memory beyond the block's",
        "out of bounds",
        OUT + SHARED + "st.shared.u32 [%d3@@], %t; st.global.u32 [%d1], %t;",
        "+60000",
        "+0",
    ),
    Fault(
        "local memory beyond a variable",
        "out of bounds",
        OUT + ".local .align 4 .b8 l[16]; mov.u64 %d7, l; st.local.u32 [%d7@@], %t; st.global.u32 [%d1], %t;",
        "+16",
        "+12",
        says="of l",
    ),
    Fault("misaligned global store", "misaligned", OUT + "st.global.u32 [%d1@@], %t;", "+2", "+0", says="remainder 2"),
    Fault(
        "misaligned vector load",
        "misaligned",
        OUT + IN + "and.b32 %r9, %t, 15; mad.wide.u32 %d5, %r9, 16, %d4; ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%d5@@]; "
        "st.global.u32 [%d1], %r0;",
        "+4",
        "+0",
        says="remainder 4",
        args=READ,
        params=MORE,
    ),
    Fault(
        "misaligned shared access",
        "misaligned",
        OUT + SHARED + "st.shared.u64 [%d2@@], %d0; st.global.u32 [%d1], %t;",
        "+4",
        "+0",
        block=(1,),
    ),
    Fault(
        "read of unwritten global memory",
        "uninitialised read",
        OUT + "@@ ld.global.u32 %r0, [%d1]; st.global.u32 [%d1], %r0;",
        "",
        "st.global.u32 [%d1], %t;",
        "thread (0,0,0) and 63 more",
    ),
    Fault(
        "read of unwritten shared memory",
        "uninitialised read",
        OUT + SHARED + "@@ st.shared.u32 [%d3], %t; bar.sync 0; ld.shared.u32 %r0, [%d3]; st.global.u32 [%d1], %r0;",
        "setp.lt.u32 %p0, %t, 40; @%p0",
        "",
        "thread (40,0,0) and 23 more",
    ),
    Fault(
        "half of a word unwritten",
        "uninitialised read",
        OUT + "st.local.@@ [l], 0; .local .align 4 .b8 l[4]; ld.local.u32 %r0, [l]; st.global.u32 [%d1], %r0;",
        "u16",
        "u32",
    ),
    Fault(
        "register nobody wrote",
        "uninitialised register",
        OUT + "add.u32 %r0, @@, 1; st.global.u32 [%d1], %r0;",
        "%r5",
        "%t",
        says="%r5",
    ),
    Fault(
        "register written by some threads only",
        "uninitialised register",
        OUT + "setp.lt.u32 %p0, %t, 10; @@ mov.u32 %r5, 1; add.u32 %r0, %r5, 1; st.global.u32 [%d1], %r0;",
        "@%p0",
        "",
        "thread (10,0,0) and 53 more",
    ),
    Fault(
        "no barrier between write and read",
        "race",
        OUT
        + SHARED
        + "st.shared.u32 [%d3], %t; @@ xor.b32 %r1, %t, 33; mad.wide.u32 %d6, %r1, 4, %d2; ld.shared.u32 %r0, [%d6]; "
        "st.global.u32 [%d1], %r0;",
        "",
        "bar.sync 0;",
        "thread (0,0,0)",
        r"thread \(33,0,0\) writes",
    ),
    Fault(
        "a warp barrier where a block's is needed",
        "race",
        OUT
        + SHARED
        + "st.shared.u32 [%d3], %t; @@ xor.b32 %r1, %t, 33; mad.wide.u32 %d6, %r1, 4, %d2; ld.shared.u32 %r0, [%d6]; "
        "st.global.u32 [%d1], %r0;",
        "bar.warp.sync -1;",
        "bar.sync 0;",
    ),
    Fault(
        "no barrier between read and write",
        "race",
        OUT
        + SHARED
        + "st.shared.u32 [%d3], %t; bar.sync 0; xor.b32 %r1, %t, 33; mad.wide.u32 %d6, %r1, 4, %d2; ld.shared.u32 %r0, [%d6]; @@"
        "st.shared.u32 [%d3], %r0; st.global.u32 [%d1], %r0;",
        "",
        "bar.sync 0;",
        says="reads",
    ),
    Fault(
        "two threads write one word",
        "race",
        OUT + SHARED + "shr.u32 %r1, %t, @@; mad.wide.u32 %d6, %r1, 4, %d2; st.shared.u32 [%d6], %t; st.global.u32 [%d1], %t;",
        "1",
        "0",
        says="writes",
    ),
    Fault(
        "two blocks write one word",
        "race",
        OUT + "mad.lo.u32 %r0, %b, @@, %t; mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %t;",
        "32",
        "64",
        "block (0,0,0) thread (32,0,0)",
        r"block \(1,0,0\) thread \(0,0,0\) writes",
        grid=(2,),
    ),
    Fault(
        "a block reads what another writes",
        "race",
        OUT + IN + "mad.lo.u32 %r0, %b, 64, %t; mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %t; mad.wide.u32 %d6, %t, "
        "4, @@; ld.global.u32 %r1, [%d6];",
        "%d0",
        "%d4",
        "block (1,0,0) thread (0,0,0)",
        r"block \(0,0,0\) thread \(0,0,0\) writes",
        args=READ,
        params=MORE,
        grid=(2,),
    ),
    Fault(
        "an atomic and a plain write",
        "race",
        OUT + SHARED + "setp.eq.u32 %p0, %t, 0; @%p0 st.shared.u32 [%d2], 0; bar.sync 0; red.shared.add.u32 [%d2], 1; "
        "@@ @%p0 st.shared.u32 [%d2], 0; st.global.u32 [%d1], %t;",
        "",
        "bar.sync 0;",
    ),
    Fault(
        "barrier under a divergent branch",
        "barrier divergence",
        OUT + "setp.lt.u32 %p0, %t, 32; @@ bra $skip; bar.sync 0; $skip: st.global.u32 [%d1], %t;",
        "@%p0",
        "@!%p0 bra $skip; @%p0",
        "thread (32,0,0) and 31 more",
        "have ended, the first block",
    ),
    Fault(
        "two barriers at once",
        "barrier divergence",
        OUT + "setp.lt.u32 %p0, %t, @@; @%p0 bra $a; bar.sync 0; bra $b; $a: bar.sync 0; $b: st.global.u32 [%d1], %t;",
        "32",
        "64",
        says="others of their block wait at",
    ),
    Fault(
        "threads that have ended before a barrier",
        "barrier divergence",
        OUT + "st.global.u32 [%d1], %t; setp.eq.u32 %p0, %t, @@; @%p0 ret; bar.sync 0;",
        "5",
        "500",
        says=r"1 of their block's 64 threads have ended, the first block \(0,0,0\) thread \(5,0,0\)",
    ),
    Fault(
        "a shuffle that lanes skip",
        "divergent warp",
        OUT + "setp.lt.u32 %p0, %t, @@; @%p0 bra $skip; shfl.sync.bfly.b32 %r0, %t, 1, 31, -1; st.global.u32 [%d1], %r0; "
        "$w: bra $end; $skip: bar.warp.sync -1; $end:",
        "8",
        "0",
        "thread (8,0,0)|thread (0,0,0)",
        "lanes",
    ),
    Fault(
        "a shuffle from a lane not in the mask",
        "shuffle from an inactive lane",
        OUT + "shfl.sync.idx.b32 %r0, %t, @@, 31, 0x0000ffff; st.global.u32 [%d1], %r0;",
        "20",
        "3",
        says="lane 0 reads lane 20",
        block=(16,),
    ),
    Fault(
        "a lane outside its own mask",
        "lane outside its mask",
        OUT + "vote.sync.ballot.b32 %r0, 1, @@; st.global.u32 [%d1], %r0;",
        "0x0000ffff",
        "-1",
        "thread (16,0,0) and 31 more",
    ),
    Fault(
        "an endless loop",
        "instruction budget",
        OUT + "mov.u32 %r0, 0; $l: add.u32 %r0, %r0, @@; setp.lt.u32 %p0, %r0, 10; @%p0 bra $l; st.global.u32 [%d1], %r0;",
        "0",
        "1",
    ),
    Fault("a trap", "trap", OUT + "setp.eq.u32 %p0, %t, @@; @%p0 trap; st.global.u32 [%d1], %t;", "9", "900", "thread (9,0,0)"),
    Fault(
        "a copy that is read before its wait",
        "cp.async not waited for",
        OUT + IN + SHARED + "cp.async.ca.shared.global [%d3], [%d5], 4; cp.async.commit_group; @@ ld.shared.u32 %r0, [%d3]; "
        "st.global.u32 [%d1], %r0;",
        "cp.async.wait_group 1;",
        "cp.async.wait_group 0;",
        args=READ,
        params=MORE,
    ),
    Fault(
        "a copy that another thread reads without a barrier",
        "race",
        OUT
        + IN
        + SHARED
        + "cp.async.ca.shared.global [%d3], [%d5], 4; cp.async.wait_all; @@ xor.b32 %r1, %t, 40; mad.wide.u32 %d6, %r1, 4, %d2;"
        "ld.shared.u32 %r0, [%d6]; st.global.u32 [%d1], %r0;",
        "",
        "bar.sync 0;",
        args=READ,
        params=MORE,
    ),
    Fault(
        "a copy onto what is still read",
        "race",
        OUT
        + IN
        + SHARED
        + "st.shared.u32 [%d3], %t; bar.sync 0; xor.b32 %r1, %t, 40; mad.wide.u32 %d6, %r1, 4, %d2; ld.shared.u32 %r0, [%d6]; @@"
        "cp.async.ca.shared.global [%d3], [%d5], 4; cp.async.wait_all; st.global.u32 [%d1], %r0;",
        "",
        "bar.sync 0;",
        args=READ,
        params=MORE,
    ),
    Fault(
        "a read-only load of data the launch writes",
        "read-only load of written data",
        OUT + IN + "st.global.u32 [%d1], %t; ld.global.nc.u32 %r0, [@@];",
        "%d1",
        "%d5",
        args=READ,
        params=MORE,
    ),
    Fault(
        "a write to constant memory",
        "write to constant memory",
        OUT + "mov.u64 %d6, c; st.global.u32 [@@], %t;",
        "%d6",
        "%d1",
        head=".const .align 4 .u32 c[2] = {1, 2};",
        block=(1,),
    ),
    Fault(
        "a jump out of its table",
        "jump out of its table",
        OUT + "and.b32 %r0, %t, @@; $t: .branchtargets $a, $b; brx.idx %r0, $t; $a: st.global.u32 [%d1], 1; ret; $b: "
        "st.global.u32 [%d1], 2;",
        "3",
        "1",
        "thread (2,0,0)",
    ),
    Fault(
        "ldmatrix in half a warp",
        "divergent warp",
        OUT + ".shared .align 16 .b8 m[512]; mov.u64 %d6, m; and.b32 %r9, %t, 31; mad.wide.u32 %d6, %r9, 16, %d6; "
        "st.shared.v4.u32 [%d6], {%t, %t, %t, %t}; bar.sync 0;"
        "setp.ge.u32 %p0, %t, @@; @%p0 bra $e; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%d6]; $e: "
        "st.global.u32 [%d1], %t;",
        "16",
        "64",
        block=(32,),
    ),
]


def launch(f: Fault, part: str, check: bool = True) -> None:
    options = Options(check=check, budget=2000)
    run(f.ptx(part), "k", f.grid, f.block, f.args[0](), options=options, extents=f.extents, partly=True)


@pytest.mark.parametrize("f", FAULTS, ids=[f.name for f in FAULTS])
def test_a_planted_fault_is_caught(f: Fault) -> None:
    launch(f, f.good)
    with pytest.raises(KernelFaultError) as caught:
        launch(f, f.bad)
    message = str(caught.value)
    assert caught.value.kind == f.kind, message
    assert message.startswith(f"{f.kind}: kernel k: "), message
    assert any(t in message for t in f.thread.split("|")), message
    assert re.search(r"block \(\d+,\d+,\d+\) thread \(\d+,\d+,\d+\)", message), message
    line = re.search(r"PTX line (\d+): (.*)", message)
    assert line, message
    opcode = line[2].removeprefix("@%p0 ").split()[0]
    assert opcode in f.ptx(f.bad).splitlines()[int(line[1]) - 1], message
    assert re.search(f.says, message), message


def test_there_are_at_least_25_different_faults() -> None:
    assert len(FAULTS) >= 25
    assert len({f.kind for f in FAULTS}) >= 14


@pytest.mark.parametrize(
    "name", ["no barrier between write and read", "a copy onto what is still read", "two blocks write one word"]
)
def test_results_alone_do_not_show_a_race(name: str) -> None:
    """With the checks off the kernel runs through: lock-step hides what a GPU would not."""
    launch(next(f for f in FAULTS if f.name == name), next(f for f in FAULTS if f.name == name).bad, check=False)


RIGHT = {
    "a thread reads its own word twice and then writes it": "st.global.u32 [%d1], %t; ld.global.u32 %r0, [%d1]; "
    "ld.global.u32 %r1, [%d1];"
    "st.global.u32 [%d1], %r1;",
    "all threads read one word, and after a barrier one writes it": SHARED
    + "setp.eq.u32 %p0, %t, 0; @%p0 st.shared.u32 [%d2], 7; bar.sync 0; ld.shared.u32 %r0, [%d2]; bar.sync 0; "
    "@%p0 st.shared.u32 [%d2], 8;"
    "st.global.u32 [%d1], %r0;",
    "lanes exchange words behind a barrier of their warp": SHARED
    + "st.shared.u32 [%d3], %t; bar.warp.sync -1; xor.b32 %r1, %t, 9; mad.wide.u32 %d6, %r1, 4, %d2; ld.shared.u32 %r0, [%d6];"
    "st.global.u32 [%d1], %r0;",
    "atomics of many threads on one word": SHARED
    + "setp.eq.u32 %p0, %t, 5; @%p0 st.shared.u32 [%d2], 0; bar.sync 0; atom.shared.add.u32 %r0, [%d2], 1; "
    "st.global.u32 [%d1], %r0;",
    "a barrier in a loop that all threads run equally often": SHARED
    + "mov.u32 %r2, 0; $l: st.shared.u32 [%d3], %r2; bar.sync 0; xor.b32 %r1, %t, 40; mad.wide.u32 %d6, %r1, 4, %d2; "
    "ld.shared.u32 %r0, [%d6];"
    "bar.sync 0; add.u32 %r2, %r2, 1; setp.lt.u32 %p0, %r2, 3; @%p0 bra $l; st.global.u32 [%d1], %r0;",
    "a copied register that is unknown in lanes that do not use it": "setp.lt.u32 %p0, %t, 10; @%p0 mov.u32 %r5, 1; "
    "mov.u32 %r6, %r5;"
    "selp.b32 %r0, %r6, 3, %p0; st.global.u32 [%d1], %r0;",
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_reported(name: str) -> None:
    run(kernel(OUT + RIGHT[name]), "k", (1,), (64,), [Out(64, np.uint32)])


def test_the_source_line_is_named_where_the_ptx_tells_it() -> None:
    body = OUT + ".loc 1 42 7\nadd.s64 %d1, %d1, 4096;\n.loc 1 43 7\nst.global.u32 [%d1], %t;\n// loop-ir: loops line 9\nret;"
    text = kernel(body, head='.file 1 "gemm.loops"')
    with pytest.raises(KernelFaultError, match=r"PTX line \d+ \(gemm.loops:43\): st.global.u32 \[%d1\], %t"):
        run(text, "k", (1,), (32,), [Out(32, np.uint32)])
    noted = kernel(OUT + "// loop-ir: loops line 9\nst.global.u32 [%d1+4096], %t;")
    with pytest.raises(KernelFaultError, match=r"PTX line \d+ \(loops line 9\)"):
        run(noted, "k", (1,), (32,), [Out(32, np.uint32)])


def test_memory_that_was_freed_is_named() -> None:
    from tensorwright.runtime.cuda.emulator import Emulator

    device = Emulator(1 << 20)
    address = device.allocate(128, "weights")
    device.free(address)
    function = device.load(kernel(OUT + "st.global.u32 [%d1], %t;")).function("k")
    with pytest.raises(KernelFaultError, match=r"byte 0 of weights \[128 bytes\] \(freed\)"):
        device.launch(function, (1,), (1,), [address])
    assert HEAD in kernel("")
