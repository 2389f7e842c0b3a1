"""The entry point `NAME_run`, and the module text around the kernels."""

from __future__ import annotations

from ...ir.errors import CompileError
from ...ir.target import Target
from ..loop_ir import Kernel, Module
from ..plan import EntryPlan
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
    roots = {s.kernel for s in entry.steps}
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
    f = FunctionText(text, f"define i32 @{entry.name}_run(ptr %buffers, ptr %dims, ptr %context) #0 {{")
    context = "%context"
    if text.checked:
        context = "%checked"
        f.entry.append("  %checked = alloca [5 x i64], align 64")
        for k in range(4):
            x = f.t(f"load i64, ptr {f.t(f'getelementptr i64, ptr %context, i64 {k}')}")
            f.line(f"store i64 {x}, ptr {f.t(f'getelementptr i64, ptr %checked, i64 {k}')}")
        slot = f.t("getelementptr i64, ptr %checked, i64 4")
        f.line(f"store i64 0, ptr {slot}")
    slots: dict[int, str] = {}
    for number, step in enumerate(entry.steps):
        kernel = kernels.get(step.kernel)
        if kernel is None:
            raise CompileError(f"step {number} of {entry.name} runs {step.kernel}, which is not in the module")
        if len(step.views) != len(kernel.buffers) or kernel.scalars:
            raise CompileError(
                f"step {number} of {entry.name} gives {step.kernel} {len(step.views)} buffers; it takes {len(kernel.buffers)} "
                f"(and {len(kernel.scalars)} scalars, of which a root kernel has none)"
            )
        args = []
        for (slot_number, offset), b in zip(step.views, kernel.buffers, strict=True):
            if offset % max(b.align, 1):
                raise CompileError(
                    f"step {number} of {entry.name}: offset {offset} of {b.name} breaks its alignment of {b.align} bytes"
                )
            if slot_number not in slots:
                slots[slot_number] = f.t(f"load ptr, ptr {f.t(f'getelementptr ptr, ptr %buffers, i64 {slot_number}')}")
            p = slots[slot_number]
            args.append("ptr " + (p if offset == 0 else f.t(f"getelementptr i8, ptr {p}, i64 {offset}")))
        f.line(f"call void @tw.stamp(ptr {context}, i64 {number})")
        f.line(f"call void @{kernel.name}({', '.join([*args, f'ptr {context}'])})")
    f.line(f"call void @tw.stamp(ptr {context}, i64 {len(entry.steps)})")
    if text.checked:
        code = f.t(f"load i64, ptr {slot}")
        f.line(f"ret i32 {f.t(f'trunc i64 {code} to i32')}")
    else:
        f.line("ret i32 0")
    return f.text()
