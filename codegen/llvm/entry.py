"""The entry point `NAME_run`, which runs the tree of a plan, and the module text around the kernels."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.errors import CompileError
from ...ir.places import Pointer, View
from ...ir.target import Target
from ..loop_ir import Kernel, Module
from ..plan import Block, Branch, EntryPlan, Loop, Node, Section, Step, While, walk
from .builder import FunctionText, ModuleText
from .kernel import emit_kernel

_ZEROS = "@tw.zeros = internal constant [64 x i8] zeroinitializer, align 64"

# The first violation wins; the context of a checked run has the slot after the four fields that the runtime fills in.
_REPORT = """define internal void @tw.report(ptr %ctx, i1 %wrong, i32 %code) #0 {
entry:
  br i1 %wrong, label %bad, label %done
bad:
  %slot = getelementptr i64, ptr %ctx, i64 4
  %code64 = zext i32 %code to i64
  %pair = cmpxchg ptr %slot, i64 0, i64 %code64 monotonic monotonic
  br label %done
done:
  ret void
}"""

_STAMP = """define internal void @tw.stamp(ptr %ctx, i64 %k) #0 {{
entry:
  %time = alloca [2 x i64]
  %ticks.at = getelementptr i64, ptr %ctx, i64 1
  %ticks = load ptr, ptr %ticks.at
  %none = icmp eq ptr %ticks, null
  br i1 %none, label %done, label %write
write:
  %clock.at = getelementptr i64, ptr %ctx, i64 3
  %clock = load ptr, ptr %clock.at
  %r = call i32 %clock(i32 {clock}, ptr %time)
  %s = load i64, ptr %time
  %ns.at = getelementptr i64, ptr %time, i64 1
  %ns = load i64, ptr %ns.at
  %scaled = mul i64 %s, 1000000000
  %now = add i64 %scaled, %ns
  %place = getelementptr i64, ptr %ticks, i64 %k
  store i64 %now, ptr %place
  br label %done
done:
  ret void
}}"""

_COMMON = 'nounwind "no-builtins"'


def module_text(module: Module, entry: EntryPlan, target: Target, layout: str, checked: bool) -> tuple[str, tuple[str, ...]]:
    """LLVM text of a whole program and the table of checked accesses (empty without `checked`)."""
    text = ModuleText(target, checked)
    kernels: dict[str, Kernel] = {}
    roots = {s.kernel for s in walk(entry.steps) if isinstance(s, Step)}
    for k in module.kernels:
        if k.name in kernels:
            raise CompileError(f"two kernels are called {k.name}")
        text.functions.append(emit_kernel(text, k, kernels, root=k.name in roots))
        kernels[k.name] = k
    run = _entry(text, kernels, entry)
    clock = 6 if "darwin" in target.triple else 1  # CLOCK_MONOTONIC
    parts = [
        f'target datalayout = "{layout}"\ntarget triple = "{target.triple}"',
        "\n".join([_ZEROS, *(f"{name} = internal constant {value}, align 64" for value, name in text.constants.items())]),
        *([_REPORT] if checked else []),
        _STAMP.format(clock=clock),
        *text.functions,
        run,
        *sorted(text.declarations.values()),
        f"attributes #0 = {{ noinline {_COMMON} }}\nattributes #1 = {{ alwaysinline {_COMMON} }}",
        "!0 = !{i32 1}",
    ]
    return "\n\n".join(parts) + "\n", tuple(text.checks)


def _entry(text: ModuleText, kernels: dict[str, Kernel], entry: EntryPlan) -> str:
    f = _Runner(text, f"define i32 @{entry.name}_run(ptr %buffers, ptr %dims, ptr %context) #0 {{", kernels, entry.name)
    if text.checked:
        f.context = "%checked"
        f.entry.append("  %checked = alloca [5 x i64], align 64")
        f.copy_context("%context", "%checked")
    for number, step in enumerate(entry.steps):
        f.place = f"step {number} of {entry.name}"
        f.line(f"call void @tw.stamp(ptr {f.context}, i64 {number})")
        f.node(step)
    f.line(f"call void @tw.stamp(ptr {f.context}, i64 {len(entry.steps)})")
    if text.checked:
        f.line(f"ret i32 {f.t(f'trunc i64 {f.violation()} to i32')}")
    else:
        f.line("ret i32 0")
    return f.text()


class _Runner(FunctionText):
    """A function that runs nodes of the plan: the entry point, or what the threads of a parallel node run.

    `counters` are those of the loops around, `pointers` the places that these keep, `slots` the buffers' addresses.
    """

    def __init__(self, module: ModuleText, header: str, kernels: dict[str, Kernel], name: str) -> None:
        super().__init__(module, header)
        self.kernels, self.name = kernels, name
        self.context, self.place = "%context", ""
        self.counters: tuple[str, ...] = ()
        self.pointers: dict[int, str] = {}
        self.pointed: dict[int, Pointer | None] = {}
        self.slots: dict[int, str] = {}
        self.known: dict[View, str] = {}  # addresses computed in a block that dominates this place
        self.outlined = [0]  # shared with what is outlined

    def copy_context(self, source: str, to: str, threads: str | None = None) -> None:
        """A context of its own; with `threads` that many, and without timestamps."""
        for k in range(4):
            given = threads if k == 0 else "0" if k == 1 else None
            x = given if threads is not None else None
            if x is None:
                x = self.t(f"load i64, ptr {self.t(f'getelementptr i64, ptr {source}, i64 {k}')}")
            self.line(f"store i64 {x}, ptr {self.t(f'getelementptr i64, ptr {to}, i64 {k}')}")
        if self.module.checked:
            self.line(f"store i64 0, ptr {self.t(f'getelementptr i64, ptr {to}, i64 4')}")

    def violation(self) -> str:
        """The number of the first check that fired, or 0 (in a checked program)."""
        return self.t(f"load i64, ptr {self.t(f'getelementptr i64, ptr {self.context}, i64 4')}")

    # -- addresses ----------------------------------------------------------------------------------------------------

    def slot(self, number: int) -> str:
        """The address in a slot, loaded once at the head of the function."""
        if number not in self.slots:
            name = f"%slot{number}"
            self.entry.append(f"  {name}.at = getelementptr ptr, ptr %buffers, i64 {number}")
            self.entry.append(f"  {name} = load ptr, ptr {name}.at")
            self.slots[number] = name
        return self.slots[number]

    def address(self, view: View) -> str:
        """The address of a view for the counters as they are."""
        found = self.known.get(view)
        if found is None:
            slot, offset, strides = view[0], view[1], view[2:]
            if slot < 0 and slot not in self.pointers:
                raise CompileError(f"{self.place}: no loop around it keeps pointer {slot}")
            if any(strides[len(self.counters) :]):
                raise CompileError(f"{self.place}: {view} has more strides than there are loops around it")
            found = self.slot(slot) if slot >= 0 else self.pointers[slot]
            total = str(offset)
            for counter, stride in zip(self.counters, strides, strict=False):
                if stride:
                    step = self.t(f"mul nsw i64 {counter}, {stride}")
                    total = step if total == "0" else self.t(f"add nsw i64 {total}, {step}")
            if total != "0":
                found = self.t(f"getelementptr i8, ptr {found}, i64 {total}")
            self.known[view] = found
        return found

    def aligned(self, view: View, align: int) -> bool:
        """Whether a view's offset and strides are multiples of `align`, in every pass."""
        views = [view]
        while views:
            v = views.pop()
            if any(x % max(align, 1) for x in v[1:]):
                return False
            pointer = self.pointed.get(v[0])
            if pointer is not None:
                views += [w for w in (*pointer.cycle, pointer.first, pointer.last) if w is not None]
        return True

    # -- nodes --------------------------------------------------------------------------------------------------------

    def nodes(self, nodes: tuple[Node, ...]) -> None:
        """Nodes in a block of their own: what they compute is not known outside."""
        known = dict(self.known)
        for n in nodes:
            self.node(n)
        self.known = known

    def node(self, node: Node) -> None:
        match node:
            case Step():
                self.step(node)
            case Block(inner):
                for n in inner:
                    self.node(n)
            case Loop():
                self.loop(node) if node.regions is None else self.passes(node)
            case Branch():
                self.branch(node)
            case While():
                self.repeat(node)
            case Section():
                self.section(node)

    def step(self, step: Step) -> None:
        kernel = self.kernels.get(step.kernel)
        if kernel is None:
            raise CompileError(f"{self.place} runs {step.kernel}, which is not in the module")
        if len(step.views) != len(kernel.buffers) or kernel.scalars:
            raise CompileError(
                f"{self.place} gives {step.kernel} {len(step.views)} buffers; it takes {len(kernel.buffers)} "
                f"(and {len(kernel.scalars)} scalars, of which a root kernel has none)"
            )
        args = []
        for view, b in zip(step.views, kernel.buffers, strict=True):
            if not self.aligned(view, b.align):
                raise CompileError(f"{self.place}: offset {view[1:]} of {b.name} breaks its alignment of {b.align} bytes")
            args.append(f"ptr {self.address(view)}")
        self.line(f"call void @{kernel.name}({', '.join([*args, f'ptr {self.context}'])})")

    def predicate(self, view: View) -> str:
        return self.t(f"icmp ne i8 {self.t(f'load i8, ptr {self.address(view)}')}, 0")

    def branch(self, node: Branch) -> None:
        then, other, join = self.fresh("then"), self.fresh("else"), self.fresh("join")
        self.line(f"br i1 {self.predicate(node.predicate)}, label %{then}, label %{other}")
        for label, nodes in ((then, node.then), (other, node.orelse)):
            self.label(label)
            self.nodes(nodes)
            self.line(f"br label %{join}")
        self.label(join)

    def repeat(self, node: While) -> None:
        head, body, done = self.fresh("while"), self.fresh("again"), self.fresh("done")
        self.line(f"br label %{head}")
        self.label(head)
        known = dict(self.known)
        self.nodes(node.test)
        more = self.predicate(node.predicate)
        if self.module.checked:  # what it reads out of range is 0, and the test might never fail
            more = self.t(f"and i1 {more}, {self.t(f'icmp eq i64 {self.violation()}, 0')}")
        self.line(f"br i1 {more}, label %{body}, label %{done}")
        self.label(body)
        self.nodes(node.nodes)
        self.line(f"br label %{head}")
        self.label(done)
        self.known = known

    def loop(self, node: Loop) -> None:
        if node.count < 1:
            raise CompileError(f"{self.place}: a loop of {node.count} passes")
        if node.count == 1:
            self.one_pass(node, "0")
            return
        head, done = self.fresh("pass"), self.fresh("done")
        before, n = self.block, f"%{head}.n"
        self.line(f"br label %{head}")
        self.label(head)
        phi = self.hole()
        self.one_pass(node, n)
        following = self.t(f"add nuw nsw i64 {n}, 1")
        again = self.t(f"icmp ult i64 {following}, {node.count}")
        self.fill(phi, [f"{n} = phi i64 [0, %{before}], [{following}, %{self.block}]"])
        self.line(f"br i1 {again}, label %{head}, label %{done}")
        self.label(done)

    def one_pass(self, node: Loop, n: str) -> None:
        """Pass `n` of a loop: its counter and pointers, then its nodes."""
        around, known = self.counters, dict(self.known)
        counter = n
        if node.reverse:
            counter = "0" if node.count == 1 else self.t(f"sub nuw nsw i64 {node.count - 1}, {n}")
        self.counters = (*around, counter)
        for p in node.pointers:
            self.pointers[p.slot], self.pointed[p.slot] = self.pointer(p, n, node.count), p
        for inner in node.nodes:
            self.node(inner)
        self.counters, self.known = around, known

    def pointer(self, p: Pointer, n: str, count: int) -> str:
        if count == 1:
            return self.address(p.at(0, 1))
        if len(p.cycle) > 2:
            raise CompileError(f"{self.place}: a pointer that goes round {len(p.cycle)} places")
        found = self.address(p.cycle[0])
        if len(p.cycle) == 2:
            even = self.t(f"icmp eq i64 {self.t(f'and i64 {n}, 1')}, 0")
            found = self.t(f"select i1 {even}, ptr {found}, ptr {self.address(p.cycle[1])}")
        for view, when in ((p.first, 0), (p.last, count - 1)):
            if view is not None:
                found = self.t(f"select i1 {self.t(f'icmp eq i64 {n}, {when}')}, ptr {self.address(view)}, ptr {found}")
        return found

    # -- threads ------------------------------------------------------------------------------------------------------

    def section(self, node: Section) -> None:
        """Threads take the nodes one by one from a counter."""
        f, fields = self.outline(len(node.nodes))
        counter = f.t(f"load ptr, ptr {fields(0)}")
        f.line("br label %next")
        f.label("next")
        k = f.t(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        labels = [f"part{i}" for i in range(len(node.nodes))]
        f.line(f"switch i64 {k}, label %done [ {' '.join(f'i64 {i}, label %{x}' for i, x in enumerate(labels))} ]")
        for label, inner in zip(labels, node.nodes, strict=True):
            f.label(label)
            f.nodes((inner,))
            f.line("br label %next")
        f.label("done")
        f.finish()

    def passes(self, node: Loop) -> None:
        """Each thread takes the passes of its own part, then what others have left of theirs (as parallel loops do)."""
        assert node.regions is not None
        if node.pointers:
            raise CompileError(f"{self.place}: a parallel loop has no pointers")
        regions = node.regions
        f, fields = self.outline(min(regions.count, node.count))
        counters, parts = f.t(f"load ptr, ptr {fields(0)}"), f.t(f"load i64, ptr {fields(2)}")
        tid = f.t(f"atomicrmw add ptr {fields(3)}, i64 1 monotonic")
        private = f.t(f"mul nsw i64 {tid}, {regions.stride}")
        f.pointers[regions.slot] = f.t(f"getelementptr i8, ptr {f.address(regions.view)}, i64 {private}")
        f.pointed[regions.slot] = Pointer(regions.slot, (regions.view, (regions.view[0], regions.stride)))
        f.line("br label %part")
        f.label("part")
        turns = f.hole()
        part = f.t(f"urem i64 {f.t(f'add i64 {tid}, %turn')}, {parts}")
        low = f.t(f"udiv i64 {f.t(f'mul i64 {part}, {node.count}')}, {parts}")
        after = f.t(f"add i64 {part}, 1")
        high = f.t(f"udiv i64 {f.t(f'mul i64 {after}, {node.count}')}, {parts}")
        size, counter = f.t(f"sub i64 {high}, {low}"), f.t(f"getelementptr [8 x i64], ptr {counters}, i64 {part}")
        f.line("br label %next")
        f.label("next")
        k = f.t(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        f.line(f"br i1 {f.t(f'icmp ult i64 {k}, {size}')}, label %pass, label %left")
        f.label("pass")
        f.one_pass(node, f.t(f"add nuw nsw i64 {low}, {k}"))
        f.line("br label %next")
        f.label("left")
        turn = f.t("add i64 %turn, 1")
        f.line(f"br i1 {f.t(f'icmp ult i64 {turn}, {parts}')}, label %part, label %done")
        f.fill(turns, [f"%turn = phi i64 [0, %head], [{turn}, %left]"])
        f.label("done")
        f.finish()

    def outline(self, most: int) -> tuple[_Outlined, Callable[[int], str]]:
        """A function for up to `most` threads, called here: fields 0 counters, 1 buffers, 2 threads, 3 next thread, 4 context."""
        name = f"{self.name}.threads{self.outlined[0]}"
        self.outlined[0] += 1
        limit = self.t(f"load i64, ptr {self.context}")
        for word, bound in (("smin", str(most)), ("smax", "1")):
            limit = self.call(f"llvm.{word}.i64", "i64", [("i64", limit), ("i64", bound)])
        counters, data = f"%{self.fresh('counters')}", f"%{self.fresh('shared')}"
        self.entry.append(f"  {counters} = alloca [{most} x [8 x i64]], align 64")
        self.module.declare("llvm.memset.p0.i64", "void", "ptr, i8, i64, i1 immarg")
        self.line(f"call void @llvm.memset.p0.i64(ptr align 64 {counters}, i8 0, i64 {64 * most}, i1 false)")
        pointers = list(self.pointers)
        given = [("ptr", counters), ("ptr", "%buffers"), ("i64", limit), ("i64", "0"), ("ptr", self.context)]
        given += [("i64", c) for c in self.counters] + [("ptr", self.pointers[p]) for p in pointers]
        struct = "{ " + ", ".join(t for t, _ in given) + " }"
        self.entry.append(f"  {data} = alloca {struct}, align 64")
        for k, (kind, x) in enumerate(given):
            self.line(f"store {kind} {x}, ptr {self.t(f'getelementptr {struct}, ptr {data}, i64 0, i32 {k}')}")
        f = _Outlined(self.module, f"define internal void @{name}(ptr %data) #0 {{", self.kernels, self.name)
        f.outlined, f.place, f.pointed = self.outlined, self.place, dict(self.pointed)
        f.entry += [f"  %buffers.at = getelementptr {struct}, ptr %data, i64 0, i32 1", "  %buffers = load ptr, ptr %buffers.at"]
        f.entry.append("  %own = alloca [5 x i64], align 64")
        f.line("br label %head")  # what is loaded once comes before
        f.label("head")

        def field(k: int) -> str:
            return f.t(f"getelementptr {struct}, ptr %data, i64 0, i32 {k}")

        f.parent, f.context = f.t(f"load ptr, ptr {field(4)}"), "%own"
        f.copy_context(f.parent, "%own", "1")
        f.counters = tuple(f.t(f"load i64, ptr {field(5 + k)}") for k in range(len(self.counters)))
        first = 5 + len(self.counters)
        f.pointers = {p: f.t(f"load ptr, ptr {field(first + k)}") for k, p in enumerate(pointers)}
        several = self.t(f"icmp sgt i64 {limit}, 1")
        many, one, join = self.fresh("fork"), self.fresh("alone"), self.fresh("join")
        self.line(f"br i1 {several}, label %{many}, label %{one}")
        self.label(many)
        function = self.t(f"load ptr, ptr {self.t(f'getelementptr i64, ptr {self.context}, i64 2')}")
        self.line(f"call void {function}(ptr @{name}, ptr {data}, i32 {self.t(f'trunc i64 {limit} to i32')}, i32 0)")
        self.line(f"br label %{join}")
        self.label(one)
        self.line(f"call void @{name}(ptr {data})")
        self.line(f"br label %{join}")
        self.label(join)
        return f, field


class _Outlined(_Runner):
    """What each thread of a parallel node runs, in a context of its own: one thread, no timestamps."""

    parent = ""

    def finish(self) -> None:
        if self.module.checked:
            code = self.violation()
            wrong = self.t(f"icmp ne i64 {code}, 0")
            self.line(f"call void @tw.report(ptr {self.parent}, i1 {wrong}, i32 {self.t(f'trunc i64 {code} to i32')})")
        self.line("ret void")
        self.module.functions.append(self.text())
