"""The text form of a graph: reading it back. Hand-written, one pass, and safe on hostile text.

Nothing is evaluated. Work and memory are linear in the length of the text: tokens, ranks, digits and nesting are capped,
and an array exists only where the text holds its elements or the caller supplied it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import numpy as np

from .contraction import KINDS, Affine, Axis, Contraction
from .dims import Dim, DimExpr, floordiv, is_modest, mod, symbol
from .dtypes import ALL, DType
from .errors import ParseError, TensorwrightError
from .graph import ROLES, Graph, Literal, Node
from .op import make
from .textliteral import decode, from_bytes, parse_elements
from .types import TensorType, TupleType, Type, tensor

MAX_NESTING: Final = 16  # bodies inside bodies
MAX_TUPLES: Final = 40  # tuples and parentheses inside one another
MAX_TOKENS: Final = 20_000_000
MAX_MESSAGE: Final = 2000
MAX_RANK: Final = 32
MAX_SIZE: Final = 1 << 62  # of a dimension, and elements of a type

_DTYPES: Final = {d.name: d for d in ALL}
_KEYWORDS: Final[dict[str, Any]] = {"true": True, "false": False, "none": None, "inf": float("inf"), "nan": float("nan")}

_STRING = r'"(?:[^"\\\n]++|\\.)*+"'
_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
_SKIP = re.compile(r"\s*(?:#[^\n]*\s*)*")
_TOKEN = re.compile(
    rf"(?P<value>%(?:{_NAME}|[0-9]+|{_STRING}))"
    r"|(?P<digest>@sha256:[0-9a-f]{64})"
    rf"|(?P<at>@(?:{_NAME}|{_STRING}))"
    r"|(?P<hex>0x[0-9a-f]*)"
    r"|(?P<float>[0-9]+(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))"
    r"|(?P<int>[0-9]+)"
    rf"|(?P<string>{_STRING})"
    rf"|(?P<name>{_NAME})"
    r"|(?P<mark>->|//|[-+*%(){}\[\]:;,=])"
)
_TRAILER = re.compile(r"^constants\s*\{", re.MULTILINE)


def parse_graph(text: str, constants: Mapping[str, Any] | None = None) -> Graph:
    """The graph that `print_graph` printed: equal to it, made of the same node objects.

    `constants` maps digests (64 hexadecimal digits) to arrays, for constants that the text only names. Raises ParseError
    with line and column for anything that does not follow the grammar, and for types that are not what the ops give.
    """
    known: dict[str, Any] = dict(constants or {})
    trailer = _TRAILER.search(text)
    end = len(text) if trailer is None else trailer.start()
    if trailer is not None:
        known |= _Parser(text, trailer.start(), len(text), {}).trailer()
    parser = _Parser(text, 0, end, known)
    graph = parser.graph(0)
    if parser.kind != "end":
        parser.fail("expected the end of the text")
    return graph


class _Parser:
    """One token of lookahead: `kind`, `text` and `at` (its offset)."""

    def __init__(self, source: str, start: int, end: int, constants: Mapping[str, Any]) -> None:
        self.source, self.end, self.next = source, end, start
        self.constants = constants
        self.literals: dict[str, Literal] = {}
        self.tokens = 0
        self.advance()

    # Tokens

    def advance(self) -> str:
        """The current token's text, after moving to the next token."""
        previous = getattr(self, "text", "")
        skipped = _SKIP.match(self.source, self.next, self.end)
        self.at = self.end if skipped is None else skipped.end()
        self.tokens += 1
        if self.tokens > MAX_TOKENS:
            self.fail(f"more than {MAX_TOKENS} tokens")
        if self.at >= self.end:
            self.kind, self.text, self.next = "end", "", self.end
            return previous
        match = _TOKEN.match(self.source, self.at, self.end)
        if match is None:
            self.kind, self.text = "?", self.source[self.at]
            self.fail("unexpected character")
        self.kind, self.text, self.next = str(match.lastgroup), match.group(), match.end()
        return previous

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        """Raises ParseError with line, column and, for a complaint about the current token, that token."""
        where = self.at if at is None else at
        line = self.source.count("\n", 0, where) + 1
        column = where - (self.source.rfind("\n", 0, where) + 1) + 1
        found = "" if at is not None else f", found {self.text[:40]!r}" if self.text else ", found the end of the text"
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]} ..."
        raise ParseError(f"line {line}, column {column}: {message}{found}")

    def expect(self, mark: str) -> None:
        if self.text != mark or self.kind not in ("mark", "name"):
            self.fail(f"expected {mark!r}")
        self.advance()

    def take(self, kind: str, what: str) -> str:
        if self.kind != kind:
            self.fail(f"expected {what}")
        return self.advance()

    def accept(self, mark: str) -> bool:
        if self.text == mark and self.kind == "mark":
            self.advance()
            return True
        return False

    def string(self, text: str, at: int) -> str:
        try:
            return str(json.loads(text))
        except ValueError:
            self.fail(f"malformed string {text[:40]}", at)

    def label(self, text: str, at: int) -> str:
        return self.string(text, at) if text.startswith('"') else text

    def name(self, what: str) -> str:
        """A plain or quoted name."""
        at = self.at
        if self.kind not in ("name", "string"):
            self.fail(f"expected {what}")
        return self.label(self.advance(), at)

    def integer(self, what: str, limit: int = MAX_SIZE) -> int:
        negative, at = self.accept("-"), self.at
        text = self.take("int", what)
        if len(text) > 20 or int(text) > limit:
            self.fail(f"{what} {text[:24]} is too large", at)
        return -int(text) if negative else int(text)

    # Graphs

    def graph(self, depth: int) -> Graph:
        self.expect("graph")
        return self.signature(depth)

    def signature(self, depth: int) -> Graph:
        """A graph from its name on."""
        if depth > MAX_NESTING:
            self.fail(f"bodies nested deeper than {MAX_NESTING} levels")
        start = self.at
        name = self.label(self.take("at", "a graph name such as @main")[1:], start + 1)
        values: dict[int | str, Node] = {}
        inputs = self.inputs(values)
        self.expect("->")
        names, types = self.outputs()
        aliases = self.aliases() if self.text == "aliases" and self.kind == "name" else ()
        self.expect("{")
        while self.kind == "value":
            self.node(values, depth)
        at = self.at
        self.expect("return")
        results: list[Node] = []
        while self.kind == "value":
            results.append(self.operand(values))
            if not self.accept(","):
                break
        self.expect("}")
        if len(results) != len(names):
            self.fail(f"graph @{name} declares {len(names)} outputs and returns {len(results)}", at)
        for label, declared, node in zip(names, types, results, strict=True):
            if node.type != declared:
                self.fail(f"output {label!r} is declared {declared}, the value returned is {node.type}", at)
        for output, argument in aliases:
            if output >= len(results) or argument >= len(inputs):
                self.fail(f"alias {output}: {argument} names an output or input that is not there", start)
            if results[output].type != inputs[argument].type:
                self.fail(f"alias {output}: {argument}: {results[output].type} cannot share {inputs[argument].type}", start)
        return Graph(tuple(inputs), tuple(results), tuple(names), name, aliases)

    def inputs(self, values: dict[int | str, Node]) -> list[Node]:
        found: list[Node] = []
        self.expect("(")
        while self.kind == "value":
            at = self.at
            key = self.key()
            if isinstance(key, int):
                self.fail("an input has a name, not a number; quote it", at)
            if key in values:
                self.fail(f"two inputs are named {key!r}", at)
            self.expect(":")
            type_ = self.tensor_type()
            role = self.take("name", f"a role ({', '.join(ROLES)})")
            values[key] = self.made(at, "input", (), {"name": key, "role": role, "dtype": type_.dtype, "shape": type_.shape})
            found.append(values[key])
            if not self.accept(","):
                break
        self.expect(")")
        return found

    def outputs(self) -> tuple[list[str], list[Type]]:
        names: dict[str, Type] = {}
        self.expect("(")
        while self.kind in ("name", "string"):
            at = self.at
            name = self.name("an output name")
            if name in names:
                self.fail(f"two outputs are named {name!r}", at)
            self.expect(":")
            names[name] = self.tensor_type()
            if not self.accept(","):
                break
        self.expect(")")
        return list(names), list(names.values())

    def aliases(self) -> tuple[tuple[int, int], ...]:
        self.expect("aliases")
        self.expect("(")
        pairs: list[tuple[int, int]] = []
        while self.kind == "int":
            at = self.at
            output = self.integer("an output number")
            self.expect(":")
            argument = self.integer("an input number")
            if any(output == o or argument == i for o, i in pairs) or argument < 0:
                self.fail(f"alias {output}: {argument} repeats an output or input", at)
            pairs.append((output, argument))
            if not self.accept(","):
                break
        self.expect(")")
        return tuple(pairs)

    def key(self) -> int | str:
        """The name of a value: a number, or a plain or quoted name."""
        at = self.at
        text = self.take("value", "a value such as %0")[1:]
        if text[0].isdigit():
            if len(text) > 12:
                self.fail(f"value number {text[:24]} is too large", at)
            return int(text)
        return self.label(text, at + 1)

    def operand(self, values: dict[int | str, Node]) -> Node:
        at = self.at
        key = self.key()
        if key not in values:
            self.fail(f"value %{key} is not defined above", at)
        return values[key]

    def node(self, values: dict[int | str, Node], depth: int) -> None:
        at = self.at
        key = self.key()
        if key in values:
            self.fail(f"value %{key} is defined twice", at)
        self.expect("=")
        op = self.take("name", "an op name")
        self.expect("(")
        inputs: list[Node] = []
        while self.kind == "value":
            inputs.append(self.operand(values))
            if not self.accept(","):
                break
        self.expect(")")
        attrs: dict[str, Any] = {}
        if self.accept("{"):
            while self.kind == "name":
                where = self.at
                label = self.advance()
                if label in attrs:
                    self.fail(f"attribute {label!r} is given twice", where)
                self.expect("=")
                attrs[label] = self.attribute(depth, 0)
                if not self.accept(","):
                    break
            self.expect("}")
        self.expect(":")
        where = self.at
        declared = self.any_type()
        made = self.made(at, op, tuple(inputs), attrs)
        if made.type != declared:
            self.fail(f"{op} gives {made.type} here, the text declares {declared}", where)
        values[key] = made

    def made(self, at: int, op: str, inputs: tuple[Node, ...], attrs: dict[str, Any]) -> Node:
        try:
            return make(op, *inputs, **attrs)
        except ParseError:
            raise
        except TensorwrightError as e:
            self.fail(str(e), at)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            # Records check domains, not the Python type of every attribute; that is for text to get wrong.
            self.fail(f"{op}: an attribute has a value of the wrong kind ({type(e).__name__}: {e})", at)

    # Types

    def any_type(self) -> Type:
        if not self.accept("("):
            return self.tensor_type()
        items: list[TensorType] = []
        while self.kind == "name":
            items.append(self.tensor_type())
            if not self.accept(","):
                break
        self.expect(")")
        return TupleType(tuple(items))

    def tensor_type(self) -> TensorType:
        at = self.at
        name = self.take("name", "a type such as f32[2, 3]")
        if name not in _DTYPES:
            self.fail(f"unknown dtype {name!r}; the dtypes are {', '.join(_DTYPES)}", at)
        return self.shaped(_DTYPES[name], at)

    def shaped(self, dtype: DType, at: int) -> TensorType:
        self.expect("[")
        dims: list[Dim] = []
        while self.text != "]":
            dims.append(self.dimension())
            if len(dims) > MAX_RANK:
                self.fail(f"more than {MAX_RANK} dimensions", at)
            if not self.accept(","):
                break
        self.expect("]")
        size = 1
        for d in dims:
            size *= max(d, 1) if isinstance(d, int) else 1
        if size > MAX_SIZE:
            self.fail(f"a type of {size} elements", at)
        try:
            return tensor(dtype, dims)
        except TensorwrightError as e:
            self.fail(str(e), at)

    def dimension(self) -> Dim:
        at = self.at
        value = self.attribute(MAX_NESTING, 0)
        if isinstance(value, bool) or not isinstance(value, int | DimExpr):
            self.fail("expected a dimension", at)
        return value

    # Attribute values: sums of products of atoms. Arithmetic is for dimensions.

    def attribute(self, depth: int, nested: int) -> Any:
        value = self.term(depth, nested)
        while self.kind == "mark" and self.text in ("+", "-"):
            at = self.at
            mark = self.advance()
            value = self.combined(mark, value, self.term(depth, nested), at)
        return value

    def term(self, depth: int, nested: int) -> Any:
        value = self.atom(depth, nested)
        while self.kind == "mark" and self.text in ("*", "//", "%"):
            at = self.at
            mark = self.advance()
            value = self.combined(mark, value, self.atom(depth, nested), at)
        return value

    def combined(self, mark: str, a: Any, b: Any, at: int) -> Dim:
        for operand in (a, b):
            if isinstance(operand, bool) or not isinstance(operand, int | DimExpr):
                self.fail(f"{mark!r} is for dimensions", at)
        result: Dim
        try:
            match mark:
                case "+":
                    result = a + b
                case "-":
                    result = a - b
                case "*":
                    result = a * b
                case _:
                    result = (floordiv if mark == "//" else mod)(a, b)
        except ParseError:
            raise
        except TensorwrightError as e:
            self.fail(str(e), at)
        if not is_modest(result):
            self.fail("the dimension is too large", at)
        return result

    def atom(self, depth: int, nested: int) -> Any:
        negative = False
        while self.accept("-"):
            negative = not negative
        at = self.at
        value = self.unsigned(depth, nested)
        if not negative:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | DimExpr):
            self.fail("'-' is for numbers", at)
        return -value

    def unsigned(self, depth: int, nested: int) -> Any:
        at = self.at
        match self.kind:
            case "int":
                text = self.advance()
                if len(text) > 20:
                    self.fail(f"integer {text[:24]}... is too large", at)
                return int(text)
            case "float":
                return float(self.advance())
            case "string":
                return self.string(self.advance(), at)
            case "name":
                return self.named(self.advance(), at, depth)
        if self.text == "(" and self.kind == "mark":
            return self.tuple(depth, nested + 1)
        self.fail("expected a value")

    def tuple(self, depth: int, nested: int) -> Any:
        """A tuple, or one value in parentheses."""
        if nested > MAX_TUPLES:
            self.fail(f"parentheses nested deeper than {MAX_TUPLES} levels")
        self.expect("(")
        items: list[Any] = []
        comma = True
        while self.text != ")" and comma:
            items.append(self.attribute(depth, nested))
            comma = self.accept(",")
        self.expect(")")
        return tuple(items) if comma else items[0] if len(items) == 1 else tuple(items)

    def named(self, name: str, at: int, depth: int) -> Any:
        if name == "graph" and self.kind == "at":
            return self.signature(depth + 1)
        if name == "contraction" and self.text == "(":
            return self.contraction()
        if name in _KEYWORDS:
            return _KEYWORDS[name]
        if name in _DTYPES:
            return self.literal(_DTYPES[name], at) if self.text == "[" else _DTYPES[name]
        try:
            return symbol(name)
        except TensorwrightError as e:
            self.fail(str(e), at)

    def literal(self, dtype: DType, at: int) -> Literal:
        type_ = self.shaped(dtype, at)
        if type_.symbols:
            self.fail("the shape of a constant is made of numbers", at)
        self.expect("(")
        where = self.at
        found: Literal
        try:
            if self.kind == "digest":
                found = self.by_digest(self.advance().removeprefix("@sha256:"), where)
            elif self.kind == "hex":
                found = from_bytes(bytes.fromhex(self.advance()[2:]), type_)
            else:
                elements: list[str] = []
                while self.text != ")":
                    sign = "-" if self.accept("-") else ""
                    if self.kind not in ("int", "float", "name"):
                        self.fail("expected an element")
                    elements.append(sign + self.advance())
                    if not self.accept(","):
                        break
                found = parse_elements(elements, type_)
        except ParseError as e:
            if str(e).startswith("line "):
                raise
            self.fail(str(e), where)
        except ValueError as e:
            self.fail(f"malformed bytes: {e}", where)
        self.expect(")")
        if found.type != type_:
            self.fail(f"the constant is {found.type}, the text declares {type_}", at)
        return found

    def by_digest(self, digest: str, at: int) -> Literal:
        found = self.literals.get(digest)
        if found is None:
            if digest not in self.constants:
                self.fail(f"constant @sha256:{digest[:12]}... is neither in the text nor among the constants given", at)
            given = self.constants[digest]
            try:
                found = given if isinstance(given, Literal) else Literal(np.asarray(given))
            except TensorwrightError as e:
                self.fail(str(e), at)
            if found.digest != digest:
                self.fail(f"the array given for @sha256:{digest[:12]}... has other contents: {found!r}", at)
            self.literals[digest] = found
        return found

    def contraction(self) -> Contraction:
        at = self.at
        self.expect("(")
        axes: list[Axis] = []
        while self.kind in ("name", "string"):
            at = self.at
            name = self.name("an axis")
            self.expect("=")
            extent = self.dimension()
            self.expect(":")
            kind = self.take("name", f"one of {', '.join(KINDS)}")
            if kind not in KINDS or any(x.name == name for x in axes) or len(axes) >= MAX_RANK:
                self.fail(f"axis {name!r} of kind {kind!r}: kinds are {', '.join(KINDS)}, names distinct", at)
            axes.append(Axis(name, extent, kind))
            if not self.accept(","):
                break
        self.expect(";")
        names = {x.name for x in axes}
        maps: list[tuple[Affine, ...]] = []
        for operand in "ABC":
            self.expect(operand)
            self.expect("[")
            found: list[Affine] = []
            while self.text != "]":
                found.append(self.affine(names))
                if not self.accept(","):
                    break
            self.expect("]")
            if operand != "C":
                self.expect(",")
            maps.append(tuple(found))
        panel = pairs = groups = 0
        b_shape: Any = ()
        while self.accept(";"):
            key = self.take("name", "panel, pairs, groups or b_shape")
            self.expect("=")
            if key == "panel":
                panel = self.integer("a panel width", 1 << 20)
            elif key == "pairs":
                pairs = self.integer("0, 2 or 4", 4)
            elif key == "groups":
                groups = self.integer("a number of groups", 1 << 20)
            elif key == "b_shape":
                b_shape = self.attribute(MAX_NESTING, 0)
            else:
                self.fail(f"a contraction has no {key!r}", at)
        self.expect(")")
        if panel < 0 or groups < 0 or not isinstance(b_shape, tuple) or not all(isinstance(d, int | DimExpr) for d in b_shape):
            self.fail("panel is a positive integer, b_shape a tuple of dimensions", at)
        return Contraction(tuple(axes), maps[0], maps[1], maps[2], panel, b_shape, pairs, groups)

    def affine(self, names: set[str]) -> Affine:
        terms: list[tuple[str, int]] = []
        constant, sign = 0, 1
        while True:
            if self.accept("-"):
                sign = -sign
            at, factor, is_term = self.at, 1, True
            if self.kind == "int":
                factor = self.integer("a coefficient")
                is_term = self.accept("*")
            if not is_term:
                constant += sign * factor
            else:
                name = self.name("an axis")
                if name not in names:
                    self.fail(f"there is no axis {name!r}", at)
                terms.append((name, sign * factor))
            if self.kind != "mark" or self.text not in ("+", "-"):
                return Affine(tuple(terms), constant)
            sign = 1 if self.advance() == "+" else -1

    # The trailer: arrays by digest

    def trailer(self) -> dict[str, Literal]:
        self.expect("constants")
        self.expect("{")
        found: dict[str, Literal] = {}
        while self.kind == "digest":
            at = self.at
            digest = self.advance().removeprefix("@sha256:")
            self.expect("=")
            type_ = self.tensor_type()
            if type_.symbols:
                self.fail("the shape of a constant is made of numbers", at)
            data = self.take("string", "the data in base64")
            try:
                literal = decode(data[1:-1], type_)
            except ParseError as e:
                self.fail(str(e), at)
            if literal.digest != digest or digest in found:
                self.fail(f"the data of @sha256:{digest[:12]}... does not have this digest, or is given twice", at)
            found[digest] = literal
        self.expect("}")
        if self.kind != "end":
            self.fail("expected the end of the text")
        return found
