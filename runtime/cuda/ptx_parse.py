"""PTX text to modules, kernels and instructions: what LLVM's NVPTX back end and nvcc write (PTX ISA 6.3 to 9.0).

A kernel's body becomes one flat list of instructions with labels as indices into it. Names declared in an inner `{ }` are
renamed, so that every register has one name. What the text says but the interpreter does not know is refused there, by opcode
and line; here only the grammar is judged.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ...ir.errors import PtxError
from .ptx_types import TYPES


@dataclass(frozen=True)
class Register:
    """A register, special register (`%tid.x`) or predicate; `negated` for `!%p`."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number. `value` is an int, or a float that is exact in the `bits` the text gave it (32, 64; 0: a plain decimal)."""

    value: int | float
    bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable's address, a label or a function, with a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base None for an absolute address."""

    base: Register | Symbol | None
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Both:
    """`a|b`: a result and its predicate."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Address | Vector | Both


@dataclass(frozen=True)
class Instruction:
    """One instruction: `parts` is the opcode split at its dots. `line` counts from 1; `source` is `file:line` or empty."""

    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    line: int
    text: str
    guard: Register | None = None
    source: str = ""

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)

    @property
    def where(self) -> str:
        return f"PTX line {self.line}" + (f" ({self.source})" if self.source else "") + f": {self.text}"


@dataclass(frozen=True)
class Variable:
    """A variable in `space` (shared, global, const, local, param): bytes, alignment, initial contents (None: none).

    `addresses` are (byte offset, symbol, addend) of initialisers that are addresses.
    """

    name: str
    space: str
    size: int
    align: int
    data: bytes | None = None
    type: str = "b8"
    addresses: tuple[tuple[int, str, int], ...] = ()
    extern: bool = False


@dataclass
class Kernel:
    """An entry point. `labels` and `tables` (of `brx.idx`) map names to places in `code`; `registers` names to types."""

    name: str
    line: int
    params: tuple[Variable, ...] = ()
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    max_threads: int = 0
    required_threads: tuple[int, ...] = ()

    def param_offsets(self) -> list[int]:
        """Where each parameter lies in the argument buffer: each at a multiple of its own alignment."""
        offsets, at = [], 0
        for p in self.params:
            at = -(-at // p.align) * p.align
            offsets.append(at)
            at += p.size
        return offsets

    @property
    def param_bytes(self) -> int:
        return self.param_offsets()[-1] + self.params[-1].size if self.params else 0


@dataclass
class Module:
    """A PTX module: `target` such as sm_80, `version` such as 7.0."""

    version: str
    target: str
    kernels: dict[str, Kernel]
    variables: list[Variable]


@dataclass(frozen=True)
class _Token:
    kind: str  # word, number, string, mark, source
    text: str
    line: int


_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t\r\f]+)|(?P<newline>\n)|(?P<note>//[^\n]*)|(?P<comment>/\*.*?\*/)|(?P<string>"[^"\n]*")
    |(?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+\.\d+(?:[eE][-+]?\d+)?|\d+U?)
    |(?P<directive>\.[A-Za-z_]\w*)
    |(?P<word>[%$_A-Za-z][\w$]*(?:(?:\.|::)[\w$]+)*)
    |(?P<mark>[@!{}\[\](),;:|<>+\-=])""",
    re.X | re.S,
)
_LOC: Final = re.compile(r"\.loc[ \t]+(\d+)[ \t]+(\d+)[ \t]+\d+(?:[^\n]*?inlined_at[ \t]+(\d+)[ \t]+(\d+))?[^\n]*")
_FILE: Final = re.compile(r'\.file[ \t]+(\d+)[ \t]+"([^"\n]*)"[^\n]*')
_NOTE: Final = re.compile(r"//\s*(?:at|loop-ir):\s*(\S.*)")


def _tokens(text: str) -> Iterator[_Token]:
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in _FILE.finditer(text)}
    at, line = 0, 1
    while at < len(text):
        if text[at] == ".":
            loc = _LOC.match(text, at) or _FILE.match(text, at)
            if loc is not None:
                if loc.re is _LOC:
                    file, row = (loc[3], loc[4]) if loc[3] else (loc[1], loc[2])
                    known = row != "0"  # line 0: of no line, or of several
                    yield _Token("source", f"{files.get(file, 'file ' + file)}:{row}" if known else "", line)
                at = loc.end()
                continue
        m = _TOKEN.match(text, at)
        if m is None:
            raise PtxError(f"PTX line {line}: unexpected character {text[at]!r} in: {text[at : at + 40].splitlines()[0]}")
        kind = str(m.lastgroup)
        if kind == "note":
            note = _NOTE.match(m[0])
            if note is not None:
                yield _Token("source", note[1].strip(), line)
        elif kind in ("directive", "word", "number", "string", "mark"):
            yield _Token("word" if kind == "directive" else kind, m[0], line)
        line += m[0].count("\n")
        at = m.end()


def number(text: str) -> Immediate:
    """The value of a PTX literal."""
    head = text[:2].lower()
    if head == "0f" and len(text) == 10:
        return Immediate(struct.unpack(">f", bytes.fromhex(text[2:]))[0], 32)
    if head == "0d" and len(text) == 18:
        return Immediate(struct.unpack(">d", bytes.fromhex(text[2:]))[0], 64)
    if "." in text:
        return Immediate(float(text), 64)
    return Immediate(int(text.rstrip("U"), 0))


class _Parser:
    def __init__(self, text: str) -> None:
        self.texts: list[str] = []  # of the tokens; what follows is theirs, too
        self.token_lines: list[int] = []
        self.sources: list[str] = []
        source = ""
        for t in _tokens(text):
            if t.kind == "source":
                source = t.text
                continue
            self.texts.append(t.text)
            self.token_lines.append(t.line)
            self.sources.append(source)
            if t.text == ".entry":
                source = ""  # a kernel starts without a place
        self.texts.append("")
        self.token_lines.append(self.token_lines[-1] if self.token_lines else 1)
        self.at = 0
        self.lines = text.splitlines()

    # ------------------------------------------------------------------ tokens

    def peek(self) -> str:
        return self.texts[self.at]

    def line(self) -> int:
        return self.token_lines[self.at]

    def next(self) -> str:
        text = self.texts[self.at]
        if not text:
            raise PtxError("the PTX text ends in the middle of a statement")
        self.at += 1
        return text

    def accept(self, text: str) -> bool:
        if self.texts[self.at] == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if self.peek() != text:
            if not self.peek():
                raise PtxError(f"the PTX text ends in the middle of a statement, where {text!r} belongs")
            raise self.wrong(f"expected {text!r}, found {self.peek()!r}")
        self.at += 1

    def wrong(self, what: str) -> PtxError:
        line = self.line()
        shown = self.lines[line - 1].strip() if line <= len(self.lines) else ""
        return PtxError(f"PTX line {line}: {what}, in: {shown}")

    def integer(self) -> int:
        sign = -1 if self.accept("-") else 1
        text = self.next()
        if not text[0].isdigit():
            raise self.wrong(f"expected a number, found {text!r}")
        value = number(text).value
        if not isinstance(value, int):
            raise self.wrong(f"expected an integer, found {text!r}")
        return sign * value

    def skip_statement(self) -> None:
        while self.next() != ";":
            pass

    # ------------------------------------------------------------------ module

    def module(self) -> Module:
        made = Module("", "", {}, [])
        while self.peek():
            word = self.peek()
            if word == ".version":
                self.next()
                made.version = self.next()
            elif word == ".target":
                self.next()
                made.target = self.next()
                while self.accept(","):
                    self.next()
            elif word == ".address_size":
                self.next()
                if self.integer() != 64:
                    raise self.wrong("only 64-bit addresses are supported")
            elif word == ".section":
                while self.next() != "{":
                    pass
                self._skip_braces()
            elif word in (".visible", ".extern", ".weak", ".common"):
                self._linkage(made)
            elif word in (".entry", ".func"):
                self._function(made)
            elif word in (".global", ".const", ".shared"):
                made.variables += self._variables(extern=False)
            else:
                raise self.wrong(f"unknown statement {word!r}")
        if not made.target:
            raise PtxError("the PTX text has no .target: it is no PTX module")
        return made

    def _linkage(self, made: Module) -> None:
        extern = self.next() == ".extern"
        if self.peek() in (".entry", ".func"):
            self._function(made)
        else:
            made.variables += self._variables(extern)

    def _skip_braces(self) -> None:
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.next(), 0)

    def _function(self, made: Module) -> None:
        line = self.line()
        if self.next() == ".func":
            raise PtxError(f"PTX line {line}: device functions (.func) are not supported: inline them")
        kernel = Kernel(self.next(), line)
        if self.accept("("):
            params = []
            while not self.accept(")"):
                params.append(self._parameter())
                self.accept(",")
            kernel.params = tuple(params)
        while self.peek() not in ("{", ";"):
            directive = self.next()
            counted = directive in (".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".maxnctapersm")
            sizes = [self.integer()] if counted else []
            while sizes and self.accept(","):
                sizes.append(self.integer())
            if directive == ".maxntid":
                kernel.max_threads = 1
                for s in sizes:
                    kernel.max_threads *= s
            elif directive == ".reqntid":
                kernel.required_threads = tuple(sizes)
            elif not sizes and directive != ".noreturn":
                raise self.wrong(f"unknown directive {directive!r} of a kernel")
        if self.accept(";"):
            return
        self.expect("{")
        made.kernels[kernel.name] = _Body(self, kernel).read()

    def _parameter(self) -> Variable:
        self.expect(".param")
        align, kind = 0, ""
        while self.peek().startswith("."):
            word = self.next()
            if word == ".align":
                given = self.integer()
                align = align or given
            elif word == ".ptr":  # what follows says what the pointer points to: no layout
                if self.peek() in (".global", ".const", ".local", ".shared"):
                    self.next()
                if self.accept(".align"):
                    self.integer()
            elif word[1:] in TYPES:
                kind = word[1:]
            else:
                raise self.wrong(f"unknown word {word!r} in a parameter")
        name = self.next()
        count = 1
        if self.accept("["):
            count = self.integer()
            self.expect("]")
        size = TYPES[kind].size
        return Variable(name, "param", size * count, align or size, type=kind)

    def _variables(self, extern: bool) -> list[Variable]:
        """`.shared .align 4 .b8 name[16] = {...}, other;` from its space on."""
        space = self.next()[1:]
        align, kind = 0, ""
        while self.peek().startswith("."):
            word = self.next()
            if word == ".align":
                align = self.integer()
            elif word[1:] in TYPES:
                kind = word[1:]
            elif word == ".attribute":
                self.expect("(")
                while self.next() != ")":
                    pass
            else:
                raise self.wrong(f"unknown word {word!r} in a variable")
        if not kind:
            raise self.wrong("a variable without a type")
        found = []
        while True:
            name, count = self.next(), 1
            while self.accept("["):
                count *= 0 if self.peek() == "]" else self.integer()
                self.expect("]")
            size = TYPES[kind].size
            data, places = self._initial(size, kind, count) if self.accept("=") else (None, ())
            if data is not None and not count:
                count = len(data) // size
            if data is None and space in ("global", "const") and not extern:
                data = bytes(size * count)  # PTX: variables of these spaces start as zero
            found.append(Variable(name, space, size * count, align or size, data, kind, places, extern))
            if self.accept(";"):
                return found
            self.expect(",")

    def _initial(self, size: int, kind: str, count: int) -> tuple[bytes, tuple[tuple[int, str, int], ...]]:
        data = bytearray()
        places: list[tuple[int, str, int]] = []
        depth = 0
        while True:
            token = self.peek()
            if token == "{":
                self.next()
                depth += 1
            elif token == "}":
                self.next()
                depth -= 1
            elif token == ",":
                if not depth:
                    break
                self.next()
            elif token == ";":
                break
            elif token[0] in "$_%" or token[0].isalpha():
                name = self.next()
                if self.accept("("):  # generic(name)
                    name = self.next()
                    self.expect(")")
                extra = self.integer() if self.accept("+") else 0
                places.append((len(data), name, extra))
                data += bytes(size)
            else:
                sign = -1 if self.accept("-") else 1
                value = sign * number(self.next()).value
                if kind[0] == "f":
                    data += struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
                else:
                    data += (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            if not depth and self.peek() in (";", ","):
                break
        return bytes(data).ljust(size * count, b"\0"), tuple(places)


class _Body:
    """The statements of one kernel."""

    def __init__(self, parser: _Parser, kernel: Kernel) -> None:
        self.p = parser
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.count = 0

    def read(self) -> Kernel:
        p, kernel = self.p, self.kernel
        while True:
            word = p.peek()
            if word == "{":
                p.next()
                self.scopes.append({})
                self.count += 1
            elif word == "}":
                p.next()
                self.scopes.pop()
                if not self.scopes:
                    break
            elif word == ".reg":
                self._registers()
            elif word in (".shared", ".local", ".param", ".global", ".const"):
                kernel.variables += p._variables(extern=False)
            elif word == ".pragma":
                p.skip_statement()
            elif word.startswith("."):
                raise p.wrong(f"unknown directive {word!r}")
            elif word == ";":
                p.next()
            else:
                self._labelled()
        for i in kernel.code:
            for o in i.operands if i.parts[0] == "bra" else ():
                if not isinstance(o, Symbol) or o.name not in kernel.labels:
                    raise PtxError(f"{i.where}: there is no such label")
        return kernel

    def _registers(self) -> None:
        p = self.p
        p.next()
        kind = p.next()[1:]
        if kind not in TYPES:
            raise p.wrong(f"registers of unknown type .{kind}")
        while True:
            name = p.next()
            if p.accept("<"):
                for k in range(p.integer()):
                    self._declare(f"{name}{k}", kind)
                p.expect(">")
            else:
                self._declare(name, kind)
            if p.accept(";"):
                return
            p.expect(",")

    def _declare(self, name: str, kind: str) -> None:
        unique = name if len(self.scopes) == 1 else f"{name}@{self.count}"
        self.scopes[-1][name] = unique
        self.kernel.registers[unique] = kind

    def _resolve(self, name: str) -> str | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _labelled(self) -> None:
        p, kernel = self.p, self.kernel
        line = p.line()
        start = p.at
        word = p.next()
        if word != "@" and p.accept(":"):
            if word in kernel.labels or word in kernel.tables:
                raise PtxError(f"PTX line {line}: the label {word} stands twice in {kernel.name}")
            if p.accept(".branchtargets"):
                targets = [p.next()]
                while p.accept(","):
                    targets.append(p.next())
                p.expect(";")
                kernel.tables[word] = tuple(targets)
            else:
                kernel.labels[word] = len(kernel.code)
            return
        guard = None
        if word == "@":
            negated = p.accept("!")
            name = self._resolve(p.next())
            if name is None:
                raise p.wrong("a guard that is no predicate register")
            guard = Register(name, negated)
            word = p.next()
        if word == "call":
            raise PtxError(f"PTX line {line}: the opcode 'call' is not supported: {p.lines[line - 1].strip()}")
        operands = []
        if not p.accept(";"):
            operands.append(self._operand())
            while p.accept(","):
                operands.append(self._operand())
            p.expect(";")
        text = " ".join(p.texts[start : p.at - 1])
        text = re.sub(r" (?=[,\]}|])|(?<=[@!\[{\-|]) ", "", text).replace(" + ", "+")
        parts = tuple(word.split("."))
        kernel.code.append(Instruction(parts, tuple(operands), line, text, guard, p.sources[start]))

    def _operand(self) -> Operand:
        p = self.p
        if p.accept("{"):
            items = [self._operand()]
            while p.accept(","):
                items.append(self._operand())
            p.expect("}")
            return Vector(tuple(items))
        if p.accept("["):
            base = self._plain()
            offset = 0
            if p.accept("+") or p.peek() == "-":
                offset = p.integer()
            p.expect("]")
            if isinstance(base, Immediate):
                return Address(None, int(base.value) + offset)
            if not isinstance(base, Register | Symbol):
                raise p.wrong("an address that starts neither with a register nor with a name")
            return Address(base, offset)
        first = self._plain()
        if p.accept("|"):
            return Both(first, self._plain())
        if isinstance(first, Symbol) and p.accept("+"):
            return Symbol(first.name, p.integer())
        return first

    def _plain(self) -> Operand:
        p = self.p
        if p.accept("!"):
            inner = self._plain()
            if not isinstance(inner, Register):
                raise p.wrong("`!` stands before what is no predicate")
            return Register(inner.name, not inner.negated)
        sign = -1 if p.accept("-") else 1
        word = p.next()
        if word[0].isdigit():
            got = number(word)
            return Immediate(sign * got.value, got.bits)
        name = self._resolve(word)
        if name is not None:
            return Register(name)
        if word[0] == "%" or word in ("WARP_SZ", "_"):
            return Register(word)
        return Symbol(word)


def parse_ptx(text: str | bytes) -> Module:
    """The module that PTX text describes. Raises PtxError (line, and the text there) for what is not PTX or not supported."""
    if isinstance(text, bytes):
        try:
            text = text.rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError as error:
            raise PtxError(f"this is not PTX text: {error}") from error
    return _Parser(text).module()
