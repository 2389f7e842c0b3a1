"""Reads the text of the loop IR back; see loop_text.py and docs/loop-ir.md. What it builds is the same, object for object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NoReturn

from ..ir.dtypes import ALL, DType, bool_, i64
from ..ir.errors import ParseError
from ..ir.expr import BINARY, COMPARE, OPS, REDUCE, UNARY, Expr, four_bits, lane_xor, lookup, var
from .loop_ir import (
    KINDS,
    SCOPES,
    WARP_OPS,
    Alloc,
    Barrier,
    Buffer,
    Call,
    For,
    If,
    Kernel,
    Let,
    Module,
    Prefetch,
    Stmt,
    Store,
    Warp,
    vector_variable,
)
from .loop_text import INFIX

_TOKEN: Final = re.compile(
    r"(?P<space>[ \t\r]+)|(?P<newline>\n)|(?P<comment>\#[^\n]*)|(?P<part>%\d+)"
    r"|(?P<number>\d+\.\d*(?:e[-+]?\d+)?|\d+e[-+]?\d+|\d+)|(?P<name>[A-Za-z_](?:\.(?!\.)|[A-Za-z0-9_])*)"
    r"|(?P<sign>\.\.|<<|>>|<=|==|!=|//|[-+*/%<&|^(){}\[\],:;=@])"
)
_DTYPES: Final[dict[str, DType]] = {d.name: d for d in ALL}
_BY_SIGN: Final = {sign: (op, rank) for op, (sign, rank) in INFIX.items()}
_TYPE: Final = re.compile(r"([a-z0-9]+?)(?:x(\d+))?$")


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, int, int]] = []  # kind, text, line, column
        self.comments: dict[int, str] = {}
        self.at = 0
        self.lines = text.split("\n")
        line, start, where = 1, 0, 0
        while where < len(text):
            m = _TOKEN.match(text, where)
            if m is None:
                raise ParseError(f"line {line}, column {where - start + 1}: unexpected character {text[where]!r}")
            kind = m.lastgroup or ""
            if kind == "newline":
                line, start = line + 1, m.end()
            elif kind == "comment":
                self.comments[line] = m.group()[1:].removeprefix(" ")
            elif kind != "space":
                self.tokens.append((kind, m.group(), line, where - start + 1))
            where = m.end()
        self.tokens.append(("end", "end of text", line, where - start + 1))
        self.buffers: dict[str, Buffer] = {}
        self.variables: dict[str, Expr] = {}
        self.parts: dict[str, Expr] = {}

    # -- tokens -------------------------------------------------------------------------------------------------------

    def fail(self, message: str) -> NoReturn:
        _, found, line, column = self.tokens[min(self.at, len(self.tokens) - 1)]
        shown = self.lines[line - 1] if line <= len(self.lines) else ""
        raise ParseError(f"line {line}, column {column}: {message}, found {found!r}\n  {shown}\n  {' ' * (column - 1)}^")

    @property
    def text(self) -> str:
        return self.tokens[self.at][1]

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def take(self, expected: str) -> None:
        if self.text != expected or self.kind == "end":
            self.fail(f"expected {expected!r}")
        self.at += 1

    def accept(self, token: str) -> bool:
        if self.kind != "end" and self.text == token:
            self.at += 1
            return True
        return False

    def name(self, what: str) -> str:
        if self.kind != "name":
            self.fail(f"expected {what}")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def integer(self) -> int:
        negative = self.accept("-")
        if self.kind != "number" or not self.text.isdigit():
            self.fail("expected an integer")
        self.at += 1
        value = int(self.tokens[self.at - 1][1])
        return -value if negative else value

    # -- kernels ------------------------------------------------------------------------------------------------------

    def module(self) -> Module:
        kernels: list[Kernel] = []
        while self.kind != "end":
            kernels.append(self.kernel())
        return Module(tuple(kernels))

    def kernel(self) -> Kernel:
        line = self.tokens[self.at][2] - 1
        doc: list[str] = []
        while line in self.comments:
            doc.insert(0, self.comments[line])
            line -= 1
        self.take("kernel")
        name = self.name("a kernel's name")
        self.buffers, self.variables = {}, {"tid": var("tid")}
        buffers: list[Buffer] = []
        scalars: list[Expr] = []
        self.take("(")
        while not self.accept(")"):
            if buffers or scalars:
                self.take(",")
            parameter = self.name("a parameter")
            self.take(":")
            if self.text == "i64" and self.tokens[self.at + 1][1] != "[":
                self.at += 1
                scalars.append(var(parameter))
                self.variables[parameter] = scalars[-1]
            else:
                buffers.append(self.buffer(parameter))
        flags = {"noinline": False, "noalias": False}
        while self.text in flags:
            flags[self.text] = True
            self.at += 1
        body = self.block()
        return Kernel(name, tuple(buffers), body, tuple(scalars), "\n".join(doc), **flags)

    def dtype(self) -> DType:
        if self.text not in _DTYPES:
            self.fail(f"expected a dtype ({', '.join(_DTYPES)})")
        self.at += 1
        return _DTYPES[self.tokens[self.at - 1][1]]

    def integers(self) -> tuple[int, ...]:
        self.take("[")
        out: list[int] = []
        while not self.accept("]"):
            if out:
                self.take(",")
            out.append(self.integer())
        return tuple(out)

    def buffer(self, name: str) -> Buffer:
        """The rest of a declaration, after `name:`."""
        dtype, shape = self.dtype(), self.integers()
        scope, align, writable = "global", 4, True
        strides: tuple[int, ...] = ()
        while self.kind == "name":
            word = self.text
            if word in SCOPES:
                scope = word
                self.at += 1
            elif self.accept("strides"):
                strides = self.integers()
                if len(strides) != len(shape):
                    self.fail(f"{name} has {len(shape)} dimensions and {len(strides)} strides; expected as many")
            elif self.accept("align"):
                align = self.integer()
            elif self.accept("readonly"):
                writable = False
            else:
                break
        b = Buffer(name, dtype, shape, scope, strides, align, writable)
        self.buffers[name] = b
        return b

    # -- statements ---------------------------------------------------------------------------------------------------

    def block(self) -> tuple[Stmt, ...]:
        self.take("{")
        outer_variables, outer_buffers = dict(self.variables), dict(self.buffers)
        out: list[Stmt] = []
        while not self.accept("}"):
            out.append(self.statement())
        self.variables, self.buffers = outer_variables, outer_buffers
        return tuple(out)

    def known_buffer(self) -> Buffer:
        name = self.name("a buffer")
        if name not in self.buffers:
            self.at -= 1
            self.fail(f"there is no buffer {name} here; known are {', '.join(self.buffers) or 'none'}")
        return self.buffers[name]

    def statement(self) -> Stmt:
        self.parts = {}
        while self.kind == "part":
            part = self.text
            self.at += 1
            self.take("=")
            self.parts[part] = self.expr()
        word = self.name("a statement")
        match word:
            case "for":
                return self.loop()
            case "store":
                b = self.known_buffer()
                index = self.index("]")
                self.take("=")
                value = self.expr()
                # an `if` on the next line is a statement of its own
                same = self.tokens[self.at][2] == self.tokens[self.at - 1][2]
                mask = self.expr() if same and self.accept("if") else None
                return Store(b, index, value, mask, self.accept("nontemporal"))
            case "let":
                name = self.name("a variable")
                self.take("=")
                value = self.expr()
                v = vector_variable(name, value.dtype, value.lanes)
                self.variables[name] = v
                return Let(v, value)
            case "if":
                condition = self.expr()
                then = self.block()
                return If(condition, then, self.block() if self.accept("else") else ())
            case "alloc":
                name = self.name("a buffer's name")
                self.take(":")
                return Alloc(self.buffer(name))
            case "call":
                return self.call()
            case "prefetch":
                b = self.known_buffer()
                return Prefetch(b, self.index("]"), self.integer())
            case "barrier":
                return Barrier()
            case "warp":
                return self.warp()
        self.at -= 1
        self.fail("expected a statement (for, store, let, if, alloc, call, prefetch, barrier, warp)")

    def warp(self) -> Warp:
        op = self.name("an operation of warps")
        if op not in WARP_OPS:
            self.at -= 1
            self.fail(f"expected an operation of warps ({', '.join(WARP_OPS)})")
        places = []
        for _ in WARP_OPS[op][0]:
            b = self.known_buffer()
            places.append((b, self.index("]")))
        values = []
        while self.accept(";"):
            values.append(self.expr())
        return Warp(op, tuple(places), tuple(values))

    def loop(self) -> For:
        v = var(self.name("a loop variable"))
        self.take("in")
        start = self.expr()
        self.take("..")
        stop = self.expr()
        step = self.integer() if self.accept("step") else 1
        kind = self.name("a loop kind")
        if kind not in KINDS:
            self.at -= 1
            self.fail(f"expected a loop kind ({', '.join(KINDS)})")
        outer = self.variables.get(v.attr)
        self.variables[v.attr] = v
        body = self.block()
        self.variables.pop(v.attr)
        if outer is not None:
            self.variables[v.attr] = outer
        return For(v, start, stop, body, kind, step)

    def call(self) -> Call:
        name = self.name("a kernel's name")
        self.take("(")
        views: list[tuple[Buffer, Expr]] = []
        scalars: list[Expr] = []
        while self.text not in (")", ";"):
            if views:
                self.take(",")
            b = self.known_buffer()
            self.take("@")
            views.append((b, self.expr()))
        while self.accept(";"):
            scalars.append(self.expr())
        self.take(")")
        return Call(name, tuple(views), tuple(scalars))

    # -- expressions --------------------------------------------------------------------------------------------------

    def index(self, end: str) -> tuple[Expr, ...]:
        """Expressions in brackets, up to `end` or a ';' (which is left)."""
        self.take("[")
        out: list[Expr] = []
        while self.text not in (end, ";"):
            if out:
                self.take(",")
            out.append(self.expr())
        if end == "]" and self.text == "]":
            self.at += 1
        return tuple(out)

    def expr(self, least: int = 1) -> Expr:
        left = self.atom()
        while self.kind == "sign" and self.text in _BY_SIGN and _BY_SIGN[self.text][1] >= least:
            op, rank = _BY_SIGN[self.text]
            self.at += 1
            left = self.operation(op, (left, self.expr(rank + 1)))
        return left

    def operation(self, op: str, args: tuple[Expr, ...]) -> Expr:
        first = args[0]
        if any(a.lanes != first.lanes for a in args):
            self.fail(f"{op} of operands with {', '.join(str(a.lanes) for a in args)} lanes; expected as many in each")
        if op not in ("select", "load") and any(a.dtype is not first.dtype for a in args):
            self.fail(f"{op} of operands of {', '.join(a.dtype.name for a in args)}; expected one dtype")
        return Expr(op, args, bool_ if op in COMPARE else first.dtype, first.lanes)

    def literal(self, negative: bool) -> Expr:
        token, kind = self.text, self.kind
        self.at += 1
        dtype, lanes = bool_ if token in ("true", "false") else i64, 1
        if self.text == ":" and self.kind == "sign":
            self.at += 1
            m = _TYPE.match(self.text)
            if m is None or m.group(1) not in _DTYPES:
                self.fail("expected a type such as f32 or f32x16")
            self.at += 1
            dtype, lanes = _DTYPES[m.group(1)], int(m.group(2) or 1)
            if lanes < 1:
                self.fail("expected at least one lane")
        sign = -1 if negative else 1
        if dtype is bool_:
            return Expr("const", (), dtype, lanes, token == "true")
        if dtype.is_float:
            return Expr("const", (), dtype, lanes, sign * float(token))
        if kind != "number" or not token.isdigit():
            self.at -= 1
            self.fail(f"expected an integer literal of {dtype}")
        return Expr("const", (), dtype, lanes, sign * int(token))

    def atom(self) -> Expr:
        if self.accept("("):
            e = self.expr()
            self.take(")")
            return e
        if self.accept("-"):
            if self.kind != "number" and self.text not in ("inf", "nan"):
                self.fail("expected a number after '-'")
            return self.literal(True)
        if self.kind == "part":
            if self.text not in self.parts:
                self.fail("expected a part that this statement defines")
            self.at += 1
            return self.parts[self.tokens[self.at - 1][1]]
        if self.kind == "number" or (self.text in ("true", "false", "inf", "nan") and self.text not in self.variables):
            return self.literal(False)
        name = self.name("an expression")
        if self.text == "[":
            self.at -= 1
            return self.load()
        if self.text == "(":
            return self.function(name)
        if name not in self.variables:
            self.at -= 1
            self.fail(f"there is no variable {name} here")
        return self.variables[name]

    def load(self) -> Expr:
        b = self.known_buffer()
        index = self.index("]") if self.tokens[self.at][1] == "[" else ()
        mask: tuple[Expr, ...] = ()
        if self.accept(";"):
            mask = (self.expr(),)
            self.take("]")
        lanes = self.integer() if self.accept(":") else 1
        return Expr("load", index + mask, b.dtype, lanes, (b, len(index)))

    def function(self, name: str) -> Expr:
        op, _, attr = name.partition(".")
        if op == "to_line":
            self.take("(")
            b = self.known_buffer()
            self.take(")")
            return Expr(op, (), i64, 1, b)
        if op not in OPS:
            self.at -= 1
            self.fail(f"there is no operation {op}")
        self.take("(")
        dtype = None
        if op in ("cast", "bitcast"):
            dtype = self.dtype()
            self.take(",")
        args = [self.expr()]
        lanes = 0
        while self.accept(","):
            if op in ("ramp", "broadcast"):
                lanes = self.integer()
            else:
                args.append(self.expr())
        self.take(")")
        a = args[0]
        count = 3 if op in ("fma", "select") else 2 if op in BINARY or op in COMPARE or op in ("shuffle", "lookup") else 1
        if len(args) != count or (op in ("ramp", "broadcast") and lanes < 1):
            self.fail(f"{op} takes {count} operands, got {len(args)}")
        if dtype is not None:
            return Expr(op, (a,), dtype, a.lanes)
        if lanes:
            return Expr(op, (a,), a.dtype, lanes)
        if op == "select":
            self.operation("select", tuple(args[1:]))
            return Expr(op, tuple(args), args[1].dtype, args[1].lanes, attr or None)
        if op in REDUCE:
            return Expr(op, (a,), a.dtype, 1, attr or None)
        if op in UNARY:
            return Expr(op, (a,), a.dtype, a.lanes, attr or None)
        if op == "four_bits":
            return four_bits(a)
        if op == "lookup":
            return lookup(*args)
        if op == "lane_xor":
            return lane_xor(a, int(attr) if attr.isdigit() else 0)
        if op == "shuffle":
            return Expr(op, tuple(args), a.dtype, a.lanes, attr)
        if op == "fma":
            return Expr(op, tuple(args), args[2].dtype, args[2].lanes, attr or None)
        return self.operation(op, tuple(args))


def parse_module(text: str) -> Module:
    """The module that `print_module` printed. Raises ParseError with line and column."""
    return _Parser(text).module()


def parse_kernel(text: str) -> Kernel:
    """One kernel. Raises ParseError if there is not exactly one."""
    kernels: Sequence[Kernel] = parse_module(text).kernels
    if len(kernels) != 1:
        raise ParseError(f"expected one kernel, found {len(kernels)}")
    return kernels[0]
