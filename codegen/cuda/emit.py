"""Loop IR to LLVM text for NVPTX: what the CPU's emitter writes, with blocks, threads, shared memory, barriers and shuffles.

A launch is one top-level `block` nest of a kernel:

    for x in 0 .. GRID block { ... for t in 0 .. THREADS thread { body } }

Up to three `block` loops stand inside each other, the innermost is blockIdx.x; there is one `thread` loop, threadIdx.x. Both
have constant bounds. A `shared` buffer is allocated outside the thread loop, or in it: either way it is the block's.

Pointers are generic in the text; LLVM finds out which are global and which shared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from ...ir.dtypes import i64
from ...ir.errors import CompileError
from ...ir.expr import Expr
from ...ir.target import Target
from ..linear import Linear
from ..llvm.builder import ModuleText
from ..llvm.kernel import KernelText, register_widths, written_buffers
from ..llvm.types import element, stored
from ..loop_ir import Barrier, Buffer, For, Kernel, Let, Stmt, Warp, statements
from .machine import MOST_THREADS, STATIC_SHARED, check
from .matrix_units import UNITS
from .shape import shape_of

_SPECIAL: Final = "llvm.nvvm.read.ptx.sreg."
_BARRIER: Final = "llvm.nvvm.barrier.cta.sync.aligned.all"
_SMALL: Final = 1 << 31
_LATCH: Final = re.compile(r"label %(\S+), label %\1\.end")
REGISTERS: Final = 65536  # of a multiprocessor, of every row of machine.py
MOST_REGISTERS: Final = 255  # of a thread


class CudaModule(ModuleText):
    """The module of a CUDA program: an intrinsic that the SM lacks is refused where it is first declared.

    Debug locations give each instruction the line of its statement in the loop IR, which `.loc` names in the PTX.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.notes: list[str] = []
        self._scopes: dict[str, int] = {}
        self._locations: dict[tuple[int, int], str] = {}
        unit = 'distinct !DICompileUnit(language: DW_LANG_C, file: !2, producer: "tensorwright", isOptimized: true, '
        self.note(unit + "runtimeVersion: 0, emissionKind: DebugDirectivesOnly)")
        self.note('!DIFile(filename: "loop-ir", directory: "")')
        self.note('!{i32 2, !"Debug Info Version", i32 3}')
        self.note("!DISubroutineType(types: !{})")

    def note(self, text: str) -> int:
        """The number of a metadata node."""
        self.notes.append(text)
        return len(self.notes)

    def scope(self, kernel: str) -> int:
        """The number of a kernel's node."""
        if kernel not in self._scopes:
            # a file for each kernel: lines count from the kernel's first
            file = self.note(f'!DIFile(filename: "{kernel}.loops", directory: "")')
            about = f'distinct !DISubprogram(name: "{kernel}", scope: !{file}, file: !{file}, line: 1, type: !4, '
            self._scopes[kernel] = self.note(about + "scopeLine: 1, spFlags: DISPFlagDefinition, unit: !1)")
        return self._scopes[kernel]

    def location(self, kernel: str, line: int) -> str:
        """What an instruction of a line ends in."""
        key = self.scope(kernel), line
        if key not in self._locations:
            self._locations[key] = f", !dbg !{self.note(f'!DILocation(line: {line}, scope: !{key[0]})')}"
        return self._locations[key]

    def rolled(self) -> int:
        """The number of a node that says of a loop that it stays one."""
        word = self.note('!{!"llvm.loop.unroll.disable"}')
        return self.note(f"distinct !{{!{len(self.notes) + 1}, !{word}}}")

    def metadata(self) -> str:
        """The nodes, for the end of the module."""
        head = ["!llvm.dbg.cu = !{!1}", "!llvm.module.flags = !{!3}"]
        return "\n".join([*head, *(f"!{k} = {text}" for k, text in enumerate(self.notes, 1))])

    def declare(self, name: str, result: str, args: str, attributes: str = "") -> None:
        check(name, self.target)
        super().declare(name, result, args, attributes)


class CudaKernel(KernelText):
    """Emits one launch."""

    module: CudaModule

    def __init__(self, module: CudaModule, header: str, kernel: Kernel, widths: dict[str, int]) -> None:
        self.location = ""  # of the statement that is being emitted
        super().__init__(module, header, kernel, {}, widths)
        self.most: dict[Expr, int] = {}  # what a variable does not exceed
        self.block_dims = sum(1 for s in statements(kernel.body) if isinstance(s, For) and s.kind == "block")
        self.shared: list[str] = []
        self.shared_bytes = 0
        self.numbers: Mapping[int, int] = {}  # the loop IR's line of each statement, by its id

    # -- where in the loop IR -----------------------------------------------------------------------------------------

    def t(self, rhs: str) -> str:
        return super().t(rhs + self.location)

    def line(self, text: str) -> None:
        super().line(text + self.location)

    # -- structure ----------------------------------------------------------------------------------------------------

    def statement(self, s: Stmt) -> None:
        """Emits one statement; its instructions name its line."""
        before, number = self.location, self.numbers.get(id(s))
        if number is not None:
            self.location = self.module.location(self.kernel, number)
        self._statement(s)
        self.location = before

    def _statement(self, s: Stmt) -> None:
        if isinstance(s, Barrier):
            self.module.declare(_BARRIER, "void", "i32")
            self.line(f"call void @{_BARRIER}(i32 0)")
            return
        if isinstance(s, Warp):
            self.warp(s)
            return
        super().statement(s)
        if isinstance(s, Let) and s.var.dtype is i64:
            self._limit(s.var, self.bound(s.value))

    def _limit(self, v: Expr, most: int | None) -> None:
        if most is None:
            self.most.pop(v, None)
        else:
            self.most[v] = most

    def loop(self, s: For) -> None:
        if s.kind not in ("block", "thread"):
            super().loop(s)
            return
        start, stop = self.known(s.start), self.known(s.stop)
        if start != 0 or stop is None or s.step != 1:
            raise CompileError(f"kernel {self.kernel}: {s.kind} loop {s.var.attr} runs from 0 to a constant in steps of 1")
        if s.kind == "thread":
            name = f"{_SPECIAL}tid.x"
        else:
            self.block_dims -= 1
            name = f"{_SPECIAL}ctaid.{'xyz'[self.block_dims]}"
        raw = self.call(name, "i32", [])
        mark = self.mark()
        self.bind(s.var, self.t(f"zext i32 {raw} to i64"), known=0 if stop == 1 else None, natural=True)
        self.most[s.var] = stop - 1
        self.run(s.body)
        self.release(mark)

    def serial(self, s: For) -> None:
        stop = self.bound(s.stop)
        self._limit(s.var, None if stop is None else stop - 1)
        super().serial(s)
        if any(isinstance(x, Warp) and x.op in UNITS for x in s.body):
            self._as_it_is()

    def _as_it_is(self) -> None:
        """Forbids to unroll the loop that ends here: ptxas would, a whole reduction, and then lacks registers."""
        k = next((k for k in range(len(self.lines) - 1, -1, -1) if self.lines[k].startswith("  br i1 ")), None)
        if k is not None and _LATCH.search(self.lines[k]) and "!llvm.loop" not in self.lines[k]:
            self.lines[k] += f", !llvm.loop !{self.module.rolled()}"

    def allocate(self, b: Buffer) -> None:
        if b.scope != "shared":
            super().allocate(b)
            return
        if self.buffers.setdefault(b.name, b) != b:
            raise CompileError(f"kernel {self.kernel}: two buffers are called {b.name}; names are unique in a kernel")
        name = f"@{self.kernel}.{b.name}"
        if b.name not in self.pointers:
            size = max(b.span, 1)
            self.shared.append(
                f"{name} = internal addrspace(3) global [{size} x {stored(b.dtype)}] undef, align {max(b.align, 16)}"
            )
            self.shared_bytes = -(-self.shared_bytes // 16) * 16 + size * b.dtype.itemsize
            self.pointers[b.name] = f"addrspacecast (ptr addrspace(3) {name} to ptr)"
        if self.shared_bytes > STATIC_SHARED:
            raise CompileError(
                f"kernel {self.kernel} declares {self.shared_bytes} bytes of shared memory; a block may have {STATIC_SHARED}"
            )

    def warp(self, s: Warp) -> None:
        """One instruction: see `Warp`."""
        match s.op:
            case "commit_async":
                self._void("llvm.nvvm.cp.async.commit.group", [])
            case "wait_async":
                n = self.known(s.values[0])
                if n is None:
                    raise CompileError(f"kernel {self.kernel}: wait_async waits for a constant number of groups")
                self._void("llvm.nvvm.cp.async.wait.group", [("i32 immarg", str(n))])
            case "copy_async":
                to, source = (self._pointer(b, index, space) for (b, index), space in zip(s.places, (3, 1), strict=True))
                size = ("i32", self.t(f"trunc i64 {self.value(s.values[0])} to i32"))
                args = [("ptr addrspace(3)", to), ("ptr addrspace(1)", source)]
                if self.known(s.values[0]) == 16:
                    self._void("llvm.nvvm.cp.async.cg.shared.global.16", args)
                else:
                    self._void("llvm.nvvm.cp.async.cg.shared.global.16.s", [*args, size])
            case "load_matrix" | "load_matrix_trans":
                (registers, at), (b, index) = s.places
                name = f"llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4{'.trans' if s.op.endswith('trans') else ''}.b16.p3"
                found = self.call(name, "{i32, i32, i32, i32}", [("ptr addrspace(3)", self._pointer(b, index, 3))])
                self._spread(registers, at, "{i32, i32, i32, i32}", found, 4)
            case _ if s.op.startswith("load_bits_"):
                self._load_bits(s, int(s.op.removeprefix("load_bits_")))
            case "store_bits_16":
                (b, index), (registers, at) = s.places
                whole = "poison"
                for k, x in enumerate(self._slots(registers, at, 4)):
                    whole = self.t(f"insertelement <4 x i32> {whole}, i32 {x}, i32 {k}")
                self.line(f"store <4 x i32> {whole}, ptr {self.address(b, self._place(b, index))}, align 16")
            case "exp2_near" | "larger":
                (registers, at), (b, index) = s.places
                (x,) = self._slots(b, index, 1)
                if s.op == "larger":
                    x = self.call("llvm.maxnum.f32", "float", [("float", y) for y in (*self._slots(registers, at, 1), x)])
                else:
                    x = self.call("llvm.nvvm.ex2.approx.ftz.f", "float", [("float", x)])
                self._put(registers, at, x)
            case "pack_bf16" | "pack_f16":
                (registers, at), (b, index) = s.places
                self._put(registers, at, self._packed(s.op.removeprefix("pack_"), *self._slots(b, index, 2)))
            case _ if s.op in UNITS:
                (acc, at), left, right = s.places
                unit = UNITS[s.op]
                parts = [*self._slots(*left, unit.a), *self._slots(*right, unit.b)]
                if unit.halves:
                    args = [("<2 x half>", self.t(f"bitcast i32 {x} to <2 x half>")) for x in parts]
                else:
                    args = [("i32", x) for x in parts]
                word = element(acc.dtype)
                kind = f"{{{', '.join([word] * unit.sums)}}}"
                sums = [(word, x) for x in self._slots(acc, at, unit.sums)]
                self._spread(acc, at, kind, self.call(unit.intrinsic, kind, [*args, *sums]), unit.sums)
            case _:
                raise CompileError(f"kernel {self.kernel}: unknown warp operation {s.op}")

    def _load_bits(self, s: Warp, size: int) -> None:
        """Bytes of global memory to registers of 32 bits, or zeros."""
        (registers, at), (b, index) = s.places
        count = max(1, size // 4)
        kind = f"<{count} x i32>" if count > 1 else f"i{8 * size}"
        x = self.t(f"load {kind}, ptr {self.address(b, self._place(b, index))}, align {size}")
        if self.known(s.values[0]) is None:
            valid = self.t(f"icmp ne i64 {self.value(s.values[0])}, 0")
            x = self.t(f"select i1 {valid}, {kind} {x}, {kind} {'zeroinitializer' if count > 1 else '0'}")
        if size < 4:
            x = self.t(f"zext {kind} {x} to i32")
        if count > 1:
            self._spread(registers, at, kind, x, count, "extractelement", "i32 ")
        else:
            self._put(registers, at, x)

    def _packed(self, kind: str, low: str, high: str) -> str:
        """Two f32 rounded to 16 bits, side by side."""
        word, both = ("bfloat" if kind == "bf16" else "half"), "poison"
        if self.module.target.sm >= 80:
            name = f"llvm.nvvm.ff2{kind}x2.rn"  # its first operand goes to the upper half
            both = self.call(name, f"<2 x {word}>", [("float", high), ("float", low)])
        else:
            for k, x in enumerate((low, high)):
                narrow = self.t(f"fptrunc float {x} to {word}")
                both = self.t(f"insertelement <2 x {word}> {both}, {word} {narrow}, i32 {k}")
        return self.t(f"bitcast <2 x {word}> {both} to i32")

    def _put(self, b: Buffer, index: tuple[Expr, ...], value: str) -> None:
        """A value to one register."""
        self.widths.setdefault(b.name, 1)  # where nothing else reads or writes it
        self.registers[b.name][self._slot(b, index, 1)[0]] = value

    def _void(self, name: str, args: list[tuple[str, str]]) -> None:
        self.module.declare(name, "void", ", ".join(t for t, _ in args))
        given = ", ".join(f"{t.removesuffix(' immarg')} {x}" for t, x in args)
        self.line(f"call void @{name}({given})")

    def _pointer(self, b: Buffer, index: tuple[Expr, ...], space: int) -> str:
        scalar = self._place(b, index)
        return self.t(f"addrspacecast ptr {self.address(b, scalar)} to ptr addrspace({space})")

    def _place(self, b: Buffer, index: tuple[Expr, ...]) -> Linear:
        """The offset of one element."""
        total = Linear(0)
        for i, stride in zip(index, b.strides, strict=True):
            total = total + self.form(i).scaled(stride)
        return total

    def _slots(self, b: Buffer, index: tuple[Expr, ...], count: int) -> list[str]:
        """The values of neighbouring registers."""
        self.widths.setdefault(b.name, 1)  # where nothing else reads or writes it
        slot, _ = self._slot(b, index, 1)
        return self.registers[b.name][slot : slot + count]

    def _spread(
        self, b: Buffer, index: tuple[Expr, ...], kind: str, value: str, count: int, take: str = "extractvalue", of: str = ""
    ) -> None:
        """The parts of a value to neighbouring registers."""
        self.widths.setdefault(b.name, 1)  # where nothing else reads or writes it
        slot, _ = self._slot(b, index, 1)
        for k in range(count):
            self.registers[b.name][slot + k] = self.t(f"{take} {kind} {value}, {of}{k}")

    def fork(self, s: For) -> None:
        raise CompileError(f"kernel {self.kernel}: parallel loop {s.var.attr} has no meaning on a CUDA target")

    # -- values -------------------------------------------------------------------------------------------------------

    def bound(self, e: Expr) -> int | None:
        """What an i64 scalar that is not negative does not exceed, where that can be told."""
        if e.dtype is not i64 or e.lanes != 1:
            return None
        k = self.known(e)
        if k is not None:
            return k
        if e in self.most:
            return self.most[e]
        if e.op in ("add", "mul", "max", "min", "floordiv", "mod"):
            a, b = (self.bound(x) for x in e.args)
            if e.op == "mod" and b is not None and self.known(e.args[1]) is not None:
                return b - 1 if a is None else min(a, b - 1)
            if e.op == "min" and (a is None or b is None) and self.is_natural(e):
                return a if b is None else b
            if a is None or b is None or not all(self.is_natural(x) for x in e.args):
                return None
            match e.op:
                case "add":
                    return a + b
                case "mul":
                    return a * b
                case "max":
                    return max(a, b)
                case "min":
                    return min(a, b)
                case "floordiv":
                    c = self.known(e.args[1])
                    return a // c if c else a
        return None

    def _operation(self, e: Expr) -> str:
        if e.op == "lane_xor":
            return self._lane_xor(e, self.memo[e.args[0]])
        if e.op in ("floordiv", "mod") and e.lanes == 1 and e.dtype is i64 and self.known(e) is None:
            c, most = self.known(e.args[1]), self.bound(e.args[0])
            if c is not None and 0 < c < _SMALL and most is not None and most < _SMALL and self.is_natural(e.args[0]):
                # a division of 64 bits takes some seventy instructions, one of 32 by a constant three
                low = self.t(f"trunc i64 {self.memo[e.args[0]]} to i32")
                found = self.t(f"{'udiv' if e.op == 'floordiv' else 'urem'} i32 {low}, {c}")
                return self.t(f"zext i32 {found} to i64")
        return super()._operation(e)

    def _lane_xor(self, e: Expr, x: str) -> str:
        """The value that the lane at a distance of the warp has; all lanes of a warp must be here."""
        kind = element(e.dtype)
        if e.lanes != 1:
            raise CompileError(f"kernel {self.kernel}: lanes are exchanged one value at a time, not {e.lanes}")

        def exchange(word: str, x: str) -> str:
            name = f"llvm.nvvm.shfl.sync.bfly.{'f32' if word == 'float' else 'i32'}"
            return self.call(name, word, [("i32", "-1"), (word, x), ("i32", str(e.attr)), ("i32", "31")])

        if kind in ("float", "i32"):
            return exchange(kind, x)
        if kind in ("double", "i64"):
            bits = self.t(f"bitcast double {x} to i64") if kind == "double" else x
            low = exchange("i32", self.t(f"trunc i64 {bits} to i32"))
            high = exchange("i32", self.t(f"trunc i64 {self.t(f'lshr i64 {bits}, 32')} to i32"))
            top = self.t(f"shl i64 {self.t(f'zext i32 {high} to i64')}, 32")
            both = self.t(f"or i64 {top}, {self.t(f'zext i32 {low} to i64')}")
            return self.t(f"bitcast i64 {both} to double") if kind == "double" else both
        back = exchange("i32", self.t(f"zext {kind} {x} to i32"))
        return self.t(f"trunc i32 {back} to {kind}")

    def load(self, e: Expr) -> str:
        b, rank = e.attr
        if len(e.args) == rank or e.lanes > 1 or not isinstance(b, Buffer) or b.scope == "register":
            return super().load(e)
        # A masked load of one element: a branch around it, which becomes a predicate.
        mask, kind = self.memo[e.args[rank]], stored(b.dtype)
        if mask == "true":
            return super().load(Expr("load", e.args[:rank], e.dtype, 1, (b, rank)))
        some, join = self.fresh("read"), self.fresh("join")
        scalar = self._place(b, e.args[:rank])
        p, align = self.address(b, scalar), self.alignment(b, scalar)
        before = self.block
        self.line(f"br i1 {mask}, label %{some}, label %{join}")
        self.label(some)
        x = self.t(f"load {kind}, ptr {p}, align {align}")
        self.line(f"br label %{join}")
        self.label(join)
        zero = self.zero(b.dtype, 1) if kind not in ("i8", "i16") else "0"
        return self.from_memory(b.dtype, self.t(f"phi {kind} [{zero}, %{before}], [{x}, %{some}]"), 1)

    def finish(self) -> None:
        self.line("ret void")


def emit_launch(module: CudaModule, kernel: Kernel, numbers: Mapping[int, int]) -> tuple[str, int]:
    """The text of a kernel that is one launch, with its shared arrays, and how many bytes these take. `numbers` are the lines of
    its statements in its loop IR, by their ids."""
    _, threads = shape_of(kernel)
    if threads > MOST_THREADS:
        raise CompileError(f"kernel {kernel.name} has blocks of {threads} threads; the most is {MOST_THREADS}")
    written = written_buffers(kernel, {})
    params = []
    for b in kernel.buffers:
        attributes = [f"align {max(b.align, b.dtype.itemsize)}", "noundef"]
        if kernel.noalias:
            attributes.append("noalias")
        if b.name not in written:
            attributes.append("readonly")
        params.append(f"ptr {' '.join(attributes)} %p.{b.name}")
    bounds = f'"nvvm.reqntid"="{threads}"'
    if any(isinstance(s, Warp) and s.op in UNITS for s in statements(kernel.body)):
        # 16 warps on a multiprocessor, a block or two; of smaller blocks as many as there is room for: left to itself, ptxas
        # spills a little where one more would fit
        most = REGISTERS // max(threads, 512) if threads >= 256 else MOST_REGISTERS
        bounds += f' "nvvm.maxnreg"="{most}"'
    header = f"define ptx_kernel void @{kernel.name}({', '.join(params)}) nounwind {bounds} "
    header += f"!dbg !{module.scope(kernel.name)} {{"
    f = CudaKernel(module, header, kernel, register_widths(kernel))
    f.pointers = {b.name: f"%p.{b.name}" for b in kernel.buffers}
    f.numbers, f.location = numbers, module.location(kernel.name, 1)
    f.run(kernel.body)
    f.finish()
    return "\n".join([*f.shared, f.text()]), f.shared_bytes


def module_text(
    kernels: Sequence[Kernel], target: Target, layout: str, numbers: Mapping[str, Mapping[int, int]]
) -> tuple[str, dict[str, int]]:
    """LLVM text of a program's kernels, each one launch, and the shared bytes of each. `numbers` are the lines of each kernel's
    statements (`numbered_kernel`)."""
    module = CudaModule(target)
    shared: dict[str, int] = {}
    for k in kernels:
        text, shared[k.name] = emit_launch(module, k, numbers[k.name])
        module.functions.append(text)
    parts = [
        f'target datalayout = "{layout}"\ntarget triple = "{target.triple}"',
        "\n".join(f"{name} = internal constant {value}, align 16" for value, name in module.constants.items()),
        *module.functions,
        *sorted(module.declarations.values()),
        module.metadata(),
    ]
    return "\n\n".join(p for p in parts if p) + "\n", shared


__all__ = ["CudaModule", "emit_launch", "module_text"]
