"""Text of LLVM functions: fresh names, basic blocks, declarations, and the table of checked accesses of a module."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ir.target import Target


@dataclass
class ModuleText:
    """What the functions of one module share."""

    target: Target
    checked: bool = False
    declarations: dict[str, str] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    constants: dict[str, str] = field(default_factory=dict)

    @property
    def is_x86(self) -> bool:
        return self.target.triple.startswith("x86_64")

    def constant(self, value: str) -> str:
        """The name of a global that holds a constant ('[16 x float] [...]')."""
        return self.constants.setdefault(value, f"@tw.constant.{len(self.constants)}")

    def declare(self, name: str, result: str, args: str, attributes: str = "") -> None:
        self.declarations.setdefault(name, f"declare {result} @{name}({args}){attributes}")


class FunctionText:
    """Builds the body of one function. Values are strings: a name such as `%v7`, or a literal."""

    def __init__(self, module: ModuleText, header: str) -> None:
        self.module = module
        self.header = header
        self.entry: list[str] = []
        self.lines: list[str] = []
        self.block = "entry"
        self.known_bits: dict[str, str] = {}  # a float register that holds a 16-bit number -> its i16 bits
        self._count = 0

    def fresh(self, stem: str = "v") -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def t(self, rhs: str) -> str:
        """Appends an instruction and gives its result's name."""
        self._count += 1
        name = f"%v{self._count}"
        self.lines.append(f"  {name} = {rhs}")
        return name

    def line(self, text: str) -> None:
        self.lines.append("  " + text)

    def label(self, name: str) -> None:
        self.block = name
        self.lines.append(f"{name}:")

    def hole(self) -> int:
        """A place to fill in later with `fill`."""
        self.lines.append("")
        return len(self.lines) - 1

    def fill(self, place: int, lines: list[str]) -> None:
        self.lines[place] = "\n".join("  " + x for x in lines)

    def call(self, name: str, result: str, args: list[tuple[str, str]], types: str | None = None) -> str:
        """Calls an intrinsic, declaring it; args are (type, value)."""
        self.module.declare(name, result, types if types is not None else ", ".join(t for t, _ in args))
        return self.t(f"call {result} @{name}({', '.join(f'{t} {v}' for t, v in args)})")

    def text(self) -> str:
        body = [self.header, "entry:", *self.entry, *(x for x in self.lines if x), "}"]
        return "\n".join(body)
