"""Prints the loop IR; `loop_parse.parse_module` reads it back. The grammar is in docs/loop-ir.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from ..ir.dtypes import bool_, i64
from ..ir.expr import COMPARE, Expr, postorder
from .loop_ir import Alloc, Barrier, Buffer, Call, For, If, Kernel, Let, Module, Prefetch, Stmt, Store, Warp, expressions

# operator -> (text, precedence); all are printed left-associative
INFIX: Final[dict[str, tuple[str, int]]] = {
    "or": ("|", 1), "xor": ("^", 2), "and": ("&", 3),
    "eq": ("==", 4), "ne": ("!=", 4), "lt": ("<", 4), "le": ("<=", 4),
    "shl": ("<<", 5), "shr": (">>", 5),
    "add": ("+", 6), "sub": ("-", 6),
    "mul": ("*", 7), "div": ("/", 7), "floordiv": ("//", 7), "mod": ("%", 7),
}  # fmt: skip
_ATOM: Final = 9
_DEPTH: Final = 12  # a deeper expression is cut into numbered parts


def constant_text(e: Expr) -> str:
    """A literal with its type; a plain integer is a scalar i64, true and false are scalar bools."""
    if e.dtype is bool_:
        text = "true" if e.attr else "false"
    elif e.dtype.is_float:
        text = "nan" if math.isnan(e.attr) else repr(e.attr)
    else:
        text = str(e.attr)
    if e.lanes == 1 and (e.dtype is i64 or e.dtype is bool_):
        return text
    return f"{text}:{e.dtype.name}" + (f"x{e.lanes}" if e.lanes > 1 else "")


class _Statement:
    """The texts of one statement's expressions; what is used more than once, or lies deep, becomes a part `%n`."""

    def __init__(self, roots: Iterable[Expr]) -> None:
        self.parts: list[str] = []
        self._text: dict[Expr, tuple[str, int]] = {}
        roots = list(roots)
        uses: dict[Expr, int] = {}
        order = list(postorder(roots))
        for e in order:
            for a in e.args:
                uses[a] = uses.get(a, 0) + 1
        depth: dict[Expr, int] = {}
        for e in order:
            text, rank = self._one(e)
            depth[e] = 1 + max((depth[a] for a in e.args), default=-1)
            shared = (
                uses.get(e, 0) > 1
                and (len(e.args) > 1 or e.op == "load")
                and not (e.dtype is i64 and e.lanes == 1 and depth[e] < 2)
            )
            if shared or depth[e] >= _DEPTH:
                self.parts.append(f"%{len(self.parts)} = {text}")
                text, rank, depth[e] = f"%{len(self.parts) - 1}", _ATOM, 0
            self._text[e] = text, rank

    def __call__(self, e: Expr) -> str:
        return self._text[e][0]

    def _operand(self, e: Expr, least: int) -> str:
        text, rank = self._text[e]
        return text if rank >= least else f"({text})"

    def _one(self, e: Expr) -> tuple[str, int]:
        lanes = f":{e.lanes}" if e.lanes > 1 else ""
        if e.op == "const":
            return constant_text(e), _ATOM
        if e.op == "var":
            return str(e.attr), _ATOM
        if e.op == "load":
            source, rank = e.attr
            name = source.name if isinstance(source, Buffer) else f"${source}"
            mask = "".join(f"; {self(m)}" for m in e.args[rank:])
            return f"{name}[{', '.join(map(self, e.args[:rank]))}{mask}]{lanes}", _ATOM
        if e.op in INFIX:
            sign, rank = INFIX[e.op]
            a, b = e.args
            least = rank + 1 if e.op in COMPARE else rank
            return f"{self._operand(a, least)} {sign} {self._operand(b, rank + 1)}", rank
        if e.op in ("cast", "bitcast"):
            return f"{e.op}({e.dtype.name}, {self(e.args[0])})", _ATOM
        if e.op == "to_line":
            return f"to_line({e.attr.name})", _ATOM
        if e.op in ("ramp", "broadcast"):
            return f"{e.op}({self(e.args[0])}, {e.lanes})", _ATOM
        name = e.op if e.attr is None else f"{e.op}.{e.attr}"
        return f"{name}({', '.join(map(self, e.args))})", _ATOM


def buffer_text(b: Buffer) -> str:
    """The declaration of a buffer."""
    text = f"{b.name}: {b.dtype.name}[{', '.join(map(str, b.shape))}]"
    if b.scope != "global":
        text += f" {b.scope}"
    if b.strides != Buffer("", b.dtype, b.shape).strides:
        text += f" strides [{', '.join(map(str, b.strides))}]"
    if b.align != 4:
        text += f" align {b.align}"
    return text if b.writable else text + " readonly"


class _Lines:
    """Lines of statements; `number` is the line of each statement, from 1 on, by its id."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.number: dict[int, int] = {}

    def block(self, body: Iterable[Stmt], indent: str) -> None:
        for s in body:
            self.statement(s, indent)

    def statement(self, s: Stmt, indent: str) -> None:
        inner = indent + "  "
        e = _Statement(expressions(s))
        lines = self.lines
        lines += [indent + part for part in e.parts]
        self.number[id(s)] = len(lines) + 1
        match s:
            case For():
                step = "" if s.step == 1 else f" step {s.step}"
                lines.append(f"{indent}for {s.var.attr} in {e(s.start)} .. {e(s.stop)}{step} {s.kind} {{")
                self.block(s.body, inner)
                lines.append(indent + "}")
            case Store():
                mask = "" if s.mask is None else f" if {e(s.mask)}"
                stream = " nontemporal" if s.nontemporal else ""
                lines.append(f"{indent}store {s.buffer.name}[{', '.join(map(e, s.index))}] = {e(s.value)}{mask}{stream}")
            case Let():
                lines.append(f"{indent}let {s.var.attr} = {e(s.value)}")
            case If():
                lines.append(f"{indent}if {e(s.condition)} {{")
                self.block(s.then, inner)
                if s.otherwise:
                    lines.append(indent + "} else {")
                    self.block(s.otherwise, inner)
                lines.append(indent + "}")
            case Alloc():
                lines.append(f"{indent}alloc {buffer_text(s.buffer)}")
            case Call():
                views = ", ".join(f"{b.name} @ {e(offset)}" for b, offset in s.views)
                scalars = "".join(f"; {e(x)}" for x in s.scalars)
                lines.append(f"{indent}call {s.kernel}({views}{scalars})")
            case Prefetch():
                lines.append(f"{indent}prefetch {s.buffer.name}[{', '.join(map(e, s.index))}] {s.level}")
            case Warp():
                places = "".join(f" {b.name}[{', '.join(map(e, index))}]" for b, index in s.places)
                values = "".join(f"; {e(v)}" for v in s.values)
                lines.append(f"{indent}warp {s.op}{places}{values}")
            case Barrier():
                lines.append(indent + "barrier")
            case _:
                raise TypeError(f"not a loop-IR statement: {s!r}")


def statement_lines(s: Stmt, indent: str = "") -> list[str]:
    """The lines of one statement, blocks included."""
    made = _Lines()
    made.statement(s, indent)
    return made.lines


def block_lines(body: tuple[Stmt, ...], indent: str = "") -> list[str]:
    made = _Lines()
    made.block(body, indent)
    return made.lines


def print_kernel(k: Kernel) -> str:
    """One kernel; its doc stands before it as comment lines."""
    return numbered_kernel(k)[0]


def numbered_kernel(k: Kernel) -> tuple[str, dict[int, int]]:
    """`print_kernel`, and the line of each statement in it, from 1 on, by the statement's id."""
    made = _Lines()
    made.lines += [f"# {line}".rstrip() for line in k.doc.splitlines()]
    params = ", ".join([*map(buffer_text, k.buffers), *(f"{v.attr}: i64" for v in k.scalars)])
    flags = (" noinline" if k.noinline else "") + (" noalias" if k.noalias else "")
    made.lines.append(f"kernel {k.name}({params}){flags} {{")
    made.block(k.body, "  ")
    return "\n".join([*made.lines, "}"]), made.number


def print_module(m: Module) -> str:
    """Every kernel, callees first."""
    return "\n\n".join(map(print_kernel, m.kernels)) + ("\n" if m.kernels else "")
