"""Statements: loops, branches, stores, calls and parallel regions of one kernel."""

from __future__ import annotations

from math import gcd

from ...ir.dtypes import bool_, i64
from ...ir.errors import CompileError
from ...ir.expr import Expr, postorder, var
from ..loop_ir import Alloc, Barrier, Buffer, Call, For, If, Kernel, Let, Prefetch, Stmt, Store, Warp, expressions, statements
from ..vectorize import vectorize_loop
from .builder import ModuleText
from .byte_stores import store_packed
from .memory import Values
from .types import element, literal, stored, suffix, vector

TID = var("tid")
MOST_THREADS = 256  # of one parallel region


def register_widths(kernel: Kernel) -> dict[str, int]:
    """Lanes of each register buffer's slots: those of its widest access."""
    widths: dict[str, int] = {}

    def see(b: object, lanes: int) -> None:
        if isinstance(b, Buffer) and b.scope == "register":
            widths[b.name] = max(widths.get(b.name, 1), lanes)

    seen: set[Expr] = set()
    for s in statements(kernel.body):
        if isinstance(s, Store):
            see(s.buffer, s.value.lanes)
        for e in postorder(expressions(s), seen):
            seen.add(e)
            if e.op == "load":
                see(e.attr[0], e.lanes)
    return widths


class KernelText(Values):
    """Emits the body of one kernel, or of a parallel region outlined from it."""

    def __init__(
        self, module: ModuleText, header: str, kernel: Kernel, callees: dict[str, Kernel], widths: dict[str, int]
    ) -> None:
        super().__init__(module, header, kernel.name)
        self.source = kernel
        self.callees = callees
        self.widths = widths
        self.parallel = False
        self.streamed = False  # a nontemporal store was written: a fence is due
        self.buffers: dict[str, Buffer] = {b.name: b for b in kernel.buffers}
        self.regions = 0  # parallel regions outlined so far

    def run(self, body: tuple[Stmt, ...]) -> None:
        """Emits a block; what it binds is forgotten at its end."""
        mark, known = self.mark(), set(self.registers)
        at = 0
        while at < len(body):
            done = store_packed(self, body, at)
            if not done:
                self.statement(body[at])
            self.end_statement()
            at += done or 1
        self.release(mark)
        for name in set(self.registers) - known:
            del self.registers[name]

    def statement(self, s: Stmt) -> None:
        match s:
            case For():
                self.loop(s)
            case Store():
                self.store(s)
            case Let():
                x = self.value(s.value)
                if s.value.lanes != s.var.lanes or s.value.dtype is not s.var.dtype:
                    raise CompileError(
                        f"kernel {self.kernel}: let {s.var.attr} binds {s.value.lanes} x {s.value.dtype} to another type"
                    )
                if s.var.dtype is i64 and s.var.lanes == 1:
                    self.bind(
                        s.var, x, known=self.known(s.value), divisor=self.divides(s.value), natural=self.is_natural(s.value)
                    )
                    if s.value.op == "to_line":
                        self.line_starts[s.var] = s.value.attr
                        self._log.append((self.line_starts, s.var))
                else:
                    self.bind(s.var, x)
            case If():
                self.branch(s)
            case Alloc():
                self.allocate(s.buffer)
            case Call():
                self.call_kernel(s)
            case Prefetch():
                self.prefetch(s)
            case Barrier():
                raise CompileError(f"kernel {self.kernel}: a barrier has no meaning on a CPU target")
            case _:
                raise CompileError(f"kernel {self.kernel}: unknown statement {type(s).__name__}")

    # -- memory -------------------------------------------------------------------------------------------------------

    def allocate(self, b: Buffer) -> None:
        if self.buffers.setdefault(b.name, b) != b:
            raise CompileError(f"kernel {self.kernel}: two buffers are called {b.name}; names are unique in a kernel")
        if b.scope == "register":
            width = self.widths.get(b.name, 1)
            self.registers[b.name] = ["poison"] * -(-b.span // width)
            return
        if b.scope != "local":
            raise CompileError(f"kernel {self.kernel}: cannot allocate {b.name} with scope {b.scope!r} on a CPU target")
        name = f"%m.{b.name}"
        if b.name not in self.pointers:  # one array for the whole function, also where the alloc stands in a loop
            self.entry.append(f"  {name} = alloca [{max(b.span, 1)} x {stored(b.dtype)}], align {max(b.align, 64)}")
            self.pointers[b.name] = name

    def store(self, s: Store) -> None:
        b, n = s.buffer, s.value.lanes
        if s.value.dtype is not b.dtype:
            raise CompileError(f"kernel {self.kernel}: {b.name} holds {b.dtype}, the stored value is {s.value.dtype}")
        x = self.value(s.value)
        mask = None
        if s.mask is not None:
            mask = self.value(s.mask)
            if s.mask.lanes != n:
                mask = self.splat(mask, "i1", n)
        if b.scope == "register":
            self.put(b, s.index, x, n, mask)
            return
        if self.module.checked:
            mask = self.check("store", b, s.index, n, mask)
        scalar, wide = self._split(b, s.index, n)
        p, kind = self.address(b, scalar), stored(b.dtype)
        align, v, flag = self.alignment(b, scalar), vector(kind, n), vector("i1", n)
        x = self.to_memory(b.dtype, x, n)
        if wide is not None:
            q = self.t(f"getelementptr {kind}, ptr {p}, {vector('i64', n)} {wide}")
            m = mask if mask is not None else literal(True, bool_, n)
            name = f"llvm.masked.scatter.{suffix(kind, n)}.v{n}p0"
            self.module.declare(name, "void", f"{v}, <{n} x ptr>, {flag}")
            self.line(f"call void @{name}({v} {x}, <{n} x ptr> align {b.dtype.itemsize} {q}, {flag} {m})")
        elif mask is None:
            # a vector that is aligned to 16 bytes only is streamed in pieces of 16
            stream = s.nontemporal and align >= min(n * b.dtype.itemsize, 16)
            self.streamed |= stream
            self.line(f"store {v} {x}, ptr {p}, align {align}{', !nontemporal !0' if stream else ''}")
        elif n == 1:
            then, join = self.fresh("then"), self.fresh("join")
            self.line(f"br i1 {mask}, label %{then}, label %{join}")
            self.label(then)
            self.line(f"store {kind} {x}, ptr {p}, align {align}")
            self.line(f"br label %{join}")
            self.label(join)
        elif s.mask is not None and b.dtype.bits < 32 and not self.module.checked and _first_alone(s.mask):
            # LLVM 22 makes of such a store, of lanes that were truncated, one of the lane before it was: four bytes
            self.line(f"store {kind} {self.t(f'extractelement {v} {x}, i64 0')}, ptr {p}, align {align}")
        else:
            name = f"llvm.masked.store.{suffix(kind, n)}.p0"
            self.module.declare(name, "void", f"{v}, ptr, {flag}")
            self.line(f"call void @{name}({v} {x}, ptr align {align} {p}, {flag} {mask})")

    def prefetch(self, s: Prefetch) -> None:
        scalar, _ = self._split(s.buffer, s.index, 1)
        self.module.declare("llvm.prefetch.p0", "void", "ptr, i32 immarg, i32 immarg, i32 immarg")
        # for reading; locality 3 is every level of cache, 2 all but the nearest
        self.line(f"call void @llvm.prefetch.p0(ptr {self.address(s.buffer, scalar)}, i32 0, i32 {4 - s.level}, i32 1)")

    # -- control ------------------------------------------------------------------------------------------------------

    def loop(self, s: For) -> None:
        if s.step < 1:
            raise CompileError(f"kernel {self.kernel}: loop {s.var.attr} has step {s.step}; it must be positive")
        if s.kind == "parallel":
            self.fork(s)
        elif s.kind == "unrolled":
            start, stop = self.known(s.start), self.known(s.stop)
            if start is None or stop is None:
                raise CompileError(
                    f"kernel {self.kernel}: the bounds of unrolled loop {s.var.attr} are not constant: {s.start} .. {s.stop}"
                )
            for i in range(start, stop, s.step):
                self._with_constant(s, i)
        elif s.kind == "vector":
            lanes = self.module.target.lanes(32)
            for t in vectorize_loop(s, lanes):
                self.statement(t)
                self.end_statement()
        elif s.kind == "serial":
            self.serial(s)
        else:
            raise CompileError(f"kernel {self.kernel}: a {s.kind} loop has no meaning on a CPU target")

    def _with_constant(self, s: For, i: int) -> None:
        mark = self.mark()
        self.bind(s.var, literal(i, i64), known=i, divisor=abs(i), natural=i >= 0)
        self.run(s.body)
        self.release(mark)

    def _stored_registers(self, body: tuple[Stmt, ...]) -> list[tuple[str, int]]:
        some = list(statements(body))
        names = dict.fromkeys(t.buffer.name for t in some if isinstance(t, Store) and t.buffer.scope == "register")
        names |= dict.fromkeys(t.places[0][0].name for t in some if isinstance(t, Warp) and t.places)
        return [(name, k) for name in names if name in self.registers for k in range(len(self.registers[name]))]

    def _slot_type(self, name: str) -> str:
        return vector(element(self.buffers[name].dtype), self.widths.get(name, 1))

    def serial(self, s: For) -> None:
        start, stop = self.known(s.start), self.known(s.stop)
        guarded = start is None or stop is None
        if start is not None and stop is not None:
            if start >= stop:
                return
            if start + s.step >= stop:
                self._with_constant(s, start)
                return
        first, last = self.value(s.start), self.value(s.stop)
        name = self.fresh("loop")
        body, done, i = name, f"{name}.end", f"%{name}.i"
        slots = self._stored_registers(s.body)
        before, old = self.block, [self.registers[b][k] for b, k in slots]
        if guarded:
            some = self.t(f"icmp slt i64 {first}, {last}")
            self.line(f"br i1 {some}, label %{body}, label %{done}")
        else:
            self.line(f"br label %{body}")
        self.end_statement()
        self.label(body)
        place = self.hole()
        for j, (b, k) in enumerate(slots):
            self.registers[b][k] = f"%{name}.r{j}"
        mark = self.mark()
        self.level += 1
        self.bind(s.var, i, divisor=gcd(self.divides(s.start), s.step), natural=self.is_natural(s.start))
        self.run(s.body)
        self.level -= 1
        self.release(mark)
        following = self.t(f"add nsw i64 {i}, {s.step}")
        again = self.t(f"icmp slt i64 {following}, {last}")
        latch, new = self.block, [self.registers[b][k] for b, k in slots]
        self.line(f"br i1 {again}, label %{body}, label %{done}")
        phis = [f"{i} = phi i64 [{first}, %{before}], [{following}, %{latch}]"]
        for j, (b, _k) in enumerate(slots):
            phis.append(f"%{name}.r{j} = phi {self._slot_type(b)} [{old[j]}, %{before}], [{new[j]}, %{latch}]")
        self.fill(place, phis)
        self.label(done)
        for j, (b, k) in enumerate(slots):
            x = new[j]
            if guarded and x != old[j]:
                x = self.t(f"phi {self._slot_type(b)} [{old[j]}, %{before}], [{x}, %{latch}]")
            self.registers[b][k] = x

    def branch(self, s: If) -> None:
        known = self.known(s.condition)
        if known is not None:
            self.run(s.then if known else s.otherwise)
            return
        condition = self.value(s.condition)
        self.end_statement()
        then, join = self.fresh("then"), self.fresh("join")
        other = self.fresh("else") if s.otherwise else join
        before = {b: list(v) for b, v in self.registers.items()}
        ends = []
        if not s.otherwise:
            ends.append((self.block, before))
        self.line(f"br i1 {condition}, label %{then}, label %{other}")
        for label, body in ((then, s.then), (other, s.otherwise)):
            if not body and label == join:
                continue
            self.label(label)
            self.registers = {b: list(v) for b, v in before.items()}
            self.level += 1
            self.run(body)
            self.level -= 1
            ends.append((self.block, self.registers))
            self.line(f"br label %{join}")
        self.label(join)
        merged = {b: list(v) for b, v in before.items()}
        (left, a), (right, c) = ends
        for b, slots in merged.items():
            for k in range(len(slots)):
                if a[b][k] == c[b][k]:
                    slots[k] = a[b][k]
                else:
                    slots[k] = self.t(f"phi {self._slot_type(b)} [{a[b][k]}, %{left}], [{c[b][k]}, %{right}]")
        self.registers = merged

    def call_kernel(self, s: Call) -> None:
        callee = self.callees.get(s.kernel)
        if callee is None:
            raise CompileError(f"kernel {self.kernel} calls {s.kernel}, which does not come before it in the module")
        if len(s.views) != len(callee.buffers) or len(s.scalars) != len(callee.scalars):
            raise CompileError(
                f"kernel {self.kernel} calls {s.kernel} with {len(s.views)} buffers and {len(s.scalars)} scalars; "
                f"it takes {len(callee.buffers)} and {len(callee.scalars)}"
            )
        args, bad = [], None
        for (b, offset), parameter in zip(s.views, callee.buffers, strict=True):
            if b.scope == "register" or b.dtype is not parameter.dtype:
                raise CompileError(
                    f"kernel {self.kernel}: {b.scope} buffer {b.name} of {b.dtype} cannot be {parameter.name} of {s.kernel}"
                )
            args.append(f"ptr {self.address(b, self.form(offset))}")
            if self.module.checked:
                out = self.t(f"icmp ugt i64 {self.value(offset)}, {b.span - parameter.span}")
                if b.span < parameter.span:
                    out = "true"
                bad = out if bad is None else self.t(f"or i1 {bad}, {out}")
        args += [f"i64 {self.value(x)}" for x in s.scalars]
        args.append(f"ptr {self.context}")
        call = f"call void @{callee.name}({', '.join(args)})"
        if bad is None:
            self.line(call)
            return
        self.report(bad, f"{self.kernel}: a view passed to {callee.name} is smaller than its parameter")
        then, join = self.fresh("then"), self.fresh("join")
        self.line(f"br i1 {bad}, label %{join}, label %{then}")
        self.label(then)
        self.line(call)
        self.line(f"br label %{join}")
        self.label(join)

    # -- parallel regions ---------------------------------------------------------------------------------------------

    def fork(self, s: For) -> None:
        """Outlines the body: each thread takes the iterations of its own part, then what others have left of theirs.

        With parts that do not move, a thread finds in its cache what it has worked on in the call before.
        """
        if self.parallel:
            raise CompileError(f"kernel {self.kernel}: parallel loop {s.var.attr} stands inside another one")
        first, last = self.value(s.start), self.value(s.stop)
        count = self.t(f"sub i64 {last}, {first}")
        if s.step != 1:
            count = self.t(f"sdiv i64 {self.t(f'add i64 {count}, {s.step - 1}')}, {s.step}")
        limit = self.t(f"load i64, ptr {self.context}")
        for word, bound in (("smin", count), ("smin", str(MOST_THREADS)), ("smax", "1")):
            limit = self.call(f"llvm.{word}.i64", "i64", [("i64", limit), ("i64", bound)])
        body_name = f"{self.kernel}.par{self.regions}"
        self.regions += 1
        variables, buffers = self._captures(s)
        counters = f"%{self.fresh('counters')}"  # one a part, each in a cache line of its own
        self.entry.append(f"  {counters} = alloca [{MOST_THREADS} x [8 x i64]], align 64")
        self.module.declare("llvm.memset.p0.i64", "void", "ptr, i8, i64, i1 immarg")
        size = self.t(f"mul i64 {limit}, 64")
        self.line(f"call void @llvm.memset.p0.i64(ptr align 64 {counters}, i8 0, i64 {size}, i1 false)")
        fields = [("ptr", counters), ("i64", "0"), ("ptr", self.context), ("i64", first), ("i64", count), ("i64", limit)]
        fields += [("ptr", self.pointers[b]) for b in buffers]
        fields += [(vector(element(v.dtype), v.lanes), self.memo[v]) for v in variables]
        struct = "{ " + ", ".join(t for t, _ in fields) + " }"
        data = f"%{self.fresh('shared')}"
        self.entry.append(f"  {data} = alloca {struct}, align 64")
        for k, (kind, x) in enumerate(fields):
            p = self.t(f"getelementptr {struct}, ptr {data}, i64 0, i32 {k}")
            self.line(f"store {kind} {x}, ptr {p}")
        self._outline(s, body_name, struct, variables, buffers)
        several = self.t(f"icmp sgt i64 {limit}, 1")
        many, one, join = self.fresh("fork"), self.fresh("alone"), self.fresh("join")
        self.line(f"br i1 {several}, label %{many}, label %{one}")
        self.label(many)
        function = self.t(f"load ptr, ptr {self.t(f'getelementptr i64, ptr {self.context}, i64 2')}")
        threads = self.t(f"trunc i64 {limit} to i32")
        self.line(f"call void {function}(ptr @{body_name}, ptr {data}, i32 {threads}, i32 0)")
        self.line(f"br label %{join}")
        self.label(one)
        self.line(f"call void @{body_name}(ptr {data})")
        self.line(f"br label %{join}")
        self.label(join)

    def _captures(self, s: For) -> tuple[list[Expr], list[str]]:
        """The bound variables and the buffers that a parallel body reads from outside."""
        variables: dict[Expr, None] = {}
        buffers: dict[str, None] = {}
        roots: list[Expr] = []
        for t in statements(s.body):
            roots += expressions(t)
            if isinstance(t, Store):
                buffers.setdefault(t.buffer.name)
            elif isinstance(t, Call):
                buffers.update(dict.fromkeys(b.name for b, _ in t.views))
        for e in postorder(roots):
            if e.op == "var" and e in self.memo and e is not s.var and e not in self.constants:
                variables.setdefault(e)
            elif e.op == "load" and isinstance(e.attr[0], Buffer):
                buffers.setdefault(e.attr[0].name)
        return list(variables), [b for b in buffers if b in self.pointers]

    def _outline(self, s: For, name: str, struct: str, variables: list[Expr], buffers: list[str]) -> None:
        f = KernelText(self.module, f"define internal void @{name}(ptr %data) #0 {{", self.source, self.callees, self.widths)
        f.parallel, f.buffers = True, dict(self.buffers)

        def field(k: int) -> str:
            return f.t(f"getelementptr {struct}, ptr %data, i64 0, i32 {k}")

        counters, f.context = f.t(f"load ptr, ptr {field(0)}"), f.t(f"load ptr, ptr {field(2)}")
        first, count, parts = (f.t(f"load i64, ptr {field(k)}") for k in (3, 4, 5))
        for k, b in enumerate(buffers, 6):
            f.pointers[b] = f.t(f"load ptr, ptr {field(k)}")
        for k, v in enumerate(variables, 6 + len(buffers)):
            x = f.t(f"load {vector(element(v.dtype), v.lanes)}, ptr {field(k)}")
            f.bind(v, x, divisor=self.divisor.get(v, 1), natural=v in self.natural)
        for v, k in self.constants.items():
            f.bind(v, literal(k, i64), known=k, divisor=abs(k), natural=k >= 0)
        tid = f.t(f"atomicrmw add ptr {field(1)}, i64 1 monotonic")
        f.bind(TID, tid, natural=True)
        f.line("br label %part")
        f.label("part")
        place = f.hole()
        part = f.t(f"urem i64 {f.t(f'add i64 {tid}, %turn')}, {parts}")
        low = f.t(f"udiv i64 {f.t(f'mul i64 {part}, {count}')}, {parts}")
        after = f.t(f"add i64 {part}, 1")
        high = f.t(f"udiv i64 {f.t(f'mul i64 {after}, {count}')}, {parts}")
        size, counter = f.t(f"sub i64 {high}, {low}"), f.t(f"getelementptr [8 x i64], ptr {counters}, i64 {part}")
        f.line("br label %next")
        f.label("next")
        n = f.t(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        f.line(f"br i1 {f.t(f'icmp slt i64 {n}, {size}')}, label %chunk, label %left")
        f.label("chunk")
        n = f.t(f"add nsw i64 {low}, {n}")
        step = n if s.step == 1 else f.t(f"mul nsw i64 {n}, {s.step}")
        i = f.t(f"add nsw i64 {first}, {step}")
        f.level = 1
        f.bind(s.var, i, divisor=gcd(self.divides(s.start), s.step), natural=self.is_natural(s.start))
        f.run(s.body)
        f.line("br label %next")
        f.label("left")
        turn = f.t("add i64 %turn, 1")
        f.line(f"br i1 {f.t(f'icmp ult i64 {turn}, {parts}')}, label %part, label %done")
        f.fill(place, [f"%turn = phi i64 [0, %entry], [{turn}, %left]"])
        f.label("done")
        f.finish()
        self.module.functions.append(f.text())

    def finish(self) -> None:
        if self.streamed:  # streaming stores are weakly ordered: visible before the join
            if self.module.is_x86:
                self.module.declare("llvm.x86.sse.sfence", "void", "")
                self.line("call void @llvm.x86.sse.sfence()")
            else:
                self.line("fence release")
        self.line("ret void")


def emit_kernel(module: ModuleText, kernel: Kernel, callees: dict[str, Kernel], *, root: bool) -> str:
    """The text of one kernel's function (regions outlined from it go to `module.functions` first)."""
    written = written_buffers(kernel, callees)
    params = []
    for b in kernel.buffers:
        attributes = [f"align {max(b.align, b.dtype.itemsize)}", "noundef"]
        if kernel.noalias:
            attributes.append("noalias")
        if b.name not in written:
            attributes.append("readonly")
        params.append(f"ptr {' '.join(attributes)} %p.{b.name}")
    params += [f"i64 noundef %s.{v.attr}" for v in kernel.scalars]
    params.append("ptr noundef %ctx")
    group = "#0" if root or kernel.noinline else "#1"
    f = KernelText(
        module, f"define internal void @{kernel.name}({', '.join(params)}) {group} {{", kernel, callees, register_widths(kernel)
    )
    f.pointers = {b.name: f"%p.{b.name}" for b in kernel.buffers}
    for v in kernel.scalars:
        f.bind(v, f"%s.{v.attr}")
    f.run(kernel.body)
    f.finish()
    return f.text()


def written_buffers(kernel: Kernel, callees: dict[str, Kernel]) -> set[str]:
    """Names of the buffers that a kernel or what it calls stores to."""
    names: set[str] = set()
    for s in statements(kernel.body):
        if isinstance(s, Store):
            names.add(s.buffer.name)
        elif isinstance(s, Call) and s.kernel in callees:
            callee = callees[s.kernel]
            inner = written_buffers(callee, callees)
            names |= {b.name for (b, _), p in zip(s.views, callee.buffers, strict=True) if p.name in inner}
    return names


def _first_alone(mask: Expr) -> bool:
    """Whether a mask is that of the first lane, whatever happens."""
    if mask.op != "lt" or mask.args[0].op != "ramp":
        return False
    start, stop = mask.args[0].args[0], mask.args[1]
    stop = stop.args[0] if stop.op == "broadcast" else stop
    return start.is_const and stop.is_const and stop.attr - start.attr == 1
