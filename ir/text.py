"""The text form of a graph: printing. It reads back to the same graph (textparse.py); the grammar is in docs/ir.md."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from .contraction import Affine, Contraction
from .dims import DimExpr
from .dtypes import DType
from .errors import VerifyError
from .graph import Graph, Label, Literal, Node
from .textliteral import INLINE_LIMIT, encode, format_literal
from .textparse import MAX_NESTING, parse_graph

__all__ = ["format_attribute", "parse_graph", "print_graph", "print_node", "value_names"]

_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_WIDTH: Final = 130


def print_graph(graph: Graph, labels: bool = True, constants: bool = False) -> str:
    """The graph as text, one node a line, in topological order.

    `labels` adds names and source locations as comments. Constants of more than 16 elements are named by their digest;
    with `constants`, a trailer holds their data, so that the text is complete in itself.
    """
    printer = _Printer(labels)
    printer.graph(graph)
    lines = printer.lines
    if constants and printer.constants:
        lines.append("constants {")
        lines += [f'  @sha256:{digest} = {value.type} "{encode(value)}"' for digest, value in printer.constants.items()]
        lines.append("}")
    return "\n".join(lines) + "\n"


def value_names(graph: Graph) -> dict[Node, str]:
    """The name each node of the graph has in its text: %x for inputs, %0, %1, ... for the others."""
    names: dict[Node, str] = {}
    declared, number = set(graph.inputs), 0
    for node in graph.nodes():
        if node in declared and "name" in node.attrs:
            names[node] = "%" + _name(node.attrs["name"])
        else:
            names[node] = f"%{number}"
            number += 1
    return names


def print_node(node: Node, names: dict[Node, str], label: Label | None = None) -> str:
    """The line of one node; bodies of graphs are left out."""
    attrs = ", ".join(f"{k} = {'{...}' if isinstance(v, Graph) else format_attribute(v)}" for k, v in node.attrs.items())
    return _line(node, names, f" {{{attrs}}}" if attrs else "") + _comment(label)


def format_attribute(value: Any) -> str:
    """One attribute value (not a Graph) as text. Raises VerifyError for something that is no attribute value."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case float():
            return repr(float(value))
        case str():
            return json.dumps(value)
        case tuple():
            return f"({', '.join(map(format_attribute, value))}{',' if len(value) == 1 else ''})"
        case DType():
            return value.name
        case DimExpr():
            return str(value)
        case Literal():
            return format_literal(value)
        case Contraction():
            return _contraction(value)
    if hasattr(value, "__index__") and not hasattr(value, "__len__"):
        return str(value.__index__())
    raise VerifyError(f"{value!r} ({type(value).__name__}) cannot be the value of an attribute")


class _Printer:
    """Collects the lines of a graph and of the bodies in it, and the constants that they name by digest."""

    def __init__(self, labels: bool) -> None:
        self.labels = labels
        self.lines: list[str] = []
        self.constants: dict[str, Literal] = {}

    def graph(self, graph: Graph, indent: str = "", prefix: str = "", depth: int = 0) -> None:
        """Appends a graph; `prefix` is what stands before its first line. Recursion only into bodies."""
        if depth > MAX_NESTING:
            raise VerifyError(f"graph {graph.name!r}: bodies are nested deeper than {MAX_NESTING} levels")
        names = value_names(graph)
        inputs = [f"{names[i]}: {i.type} {i.attrs['role']}" for i in graph.inputs]
        outputs = ", ".join(f"{_name(n)}: {o.type}" for n, o in zip(graph.output_names, graph.outputs, strict=True))
        tail = f" -> ({outputs})"
        if graph.aliases:
            tail += f" aliases({', '.join(f'{o}: {i}' for o, i in graph.aliases)})"
        head = f"{indent}{prefix}graph @{_name(graph.name)}("
        if len(head) + sum(len(i) + 2 for i in inputs) + len(tail) < _WIDTH:
            self.lines.append(f"{head}{', '.join(inputs)}){tail} {{")
        else:
            self.lines.append(head)
            for k, (node, text) in enumerate(zip(graph.inputs, inputs, strict=True)):
                comma = "," if k + 1 < len(inputs) else ""
                self.lines.append(f"{indent}    {text}{comma}{self.comment(graph, node)}")
            self.lines.append(f"{indent}){tail} {{")
        declared = set(graph.inputs)
        for node in names:
            if node not in declared:
                self.node(graph, node, names, indent + "  ", depth)
        self.lines.append(f"{indent}  return {', '.join(names[o] for o in graph.outputs)}".rstrip())
        self.lines.append(indent + "}")

    def node(self, graph: Graph, node: Node, names: dict[Node, str], indent: str, depth: int) -> None:
        plain: list[str] = []
        bodies: list[tuple[str, Graph]] = []
        for key, value in node.attrs.items():
            if isinstance(value, Graph):
                bodies.append((key, value))
                continue
            text = format_attribute(value)
            plain.append(f"{key} = {text}")
            if isinstance(value, Literal) and value.array.size > INLINE_LIMIT:
                self.constants[value.digest] = value
        comment = self.comment(graph, node)
        if not bodies:
            attrs = f" {{{', '.join(plain)}}}" if plain else ""
            self.lines.append(indent + _line(node, names, attrs) + comment)
            return
        start = f"{names[node]} = {node.op.name}({', '.join(names[i] for i in node.inputs)}) {{"
        start += "".join(f"{p}, " for p in plain)
        for k, (key, body) in enumerate(bodies):
            self.graph(body, indent, f"{start if k == 0 else ''}{key} = ", depth + 1)
            self.lines[-1] += "," if k + 1 < len(bodies) else f"}} : {node.type}{comment}"

    def comment(self, graph: Graph, node: Node) -> str:
        label = graph.labels.get(node) if self.labels else None
        if label is not None and label.name is not None and label.name == node.attrs.get("name"):
            label = Label(None, label.location)  # an input's name is there already
        return _comment(label)


def _line(node: Node, names: dict[Node, str], attrs: str) -> str:
    operands = ", ".join(names.get(i, "%?") for i in node.inputs)
    return f"{names.get(node, '%?')} = {node.op.name}({operands}){attrs} : {node.type}"


def _comment(label: Label | None) -> str:
    if label is None:
        return ""
    parts = [label.name or "", "" if label.location is None else str(label.location)]
    text = " ".join(" ".join(parts).split())
    return "  # " + "".join(c if c.isprintable() else "?" for c in text) if text else ""


def _name(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else json.dumps(name)


def _contraction(spec: Contraction) -> str:
    axes = ", ".join(f"{_name(x.name)}={x.extent}:{x.kind}" for x in spec.axes)
    maps = ", ".join(f"{n}[{', '.join(map(_affine, m))}]" for n, m in (("A", spec.a), ("B", spec.b), ("C", spec.c)))
    tail = f"; panel={spec.panel}" if spec.panel else ""
    tail += f"; pairs={spec.pairs}" if spec.pairs else ""
    tail += f"; groups={spec.groups}" if spec.groups else ""
    if spec.b_shape:
        tail += f"; b_shape={format_attribute(spec.b_shape)}"
    return f"contraction({axes}; {maps}{tail})"


def _affine(value: Affine) -> str:
    text = ""
    for name, coefficient in value.terms:
        size = "" if abs(coefficient) == 1 else f"{abs(coefficient)}*"
        sign = "-" if coefficient < 0 else "+"
        text += (f" {sign} " if text else "-" if coefficient < 0 else "") + size + _name(name)
    if not text:
        return str(value.constant)
    if value.constant:
        text += f" {'-' if value.constant < 0 else '+'} {abs(value.constant)}"
    return text
