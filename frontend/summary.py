"""A table of a model's layers: output shapes, parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..ir.cost import node_cost
from ..ir.dims import Dim, DimExpr
from ..ir.errors import ShapeError
from ..ir.graph import Graph, Node
from . import tree
from .context import Trace
from .core import Value
from .parameter import Owner
from .tracing import collect_outputs, declare_parameters, finish, function_name, make_inputs


@dataclass(frozen=True)
class Row:
    """One module call. Counts include the modules inside; `flops` is None where a size is symbolic."""

    path: str
    kind: str
    output: str
    parameters: int
    flops: int | None
    depth: int


@dataclass(frozen=True)
class Summary:
    """Rows in the order of calls, and totals. A multiply-add counts as two FLOPs, any other arithmetic as one."""

    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    flops: int | None

    def __str__(self) -> str:
        head = ("layer", "output", "parameters", "FLOPs")
        lines = [head]
        for r in self.rows:
            name = "  " * r.depth + (r.path.rpartition(".")[2] or r.kind)
            lines.append((f"{name} ({r.kind})" if r.path else r.kind, r.output, f"{r.parameters:,}", _count(r.flops)))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in lines]
        rule = "-" * (sum(widths) + 6)
        total = f"{self.parameters:,} parameters ({self.trainable:,} trainable), {4 * self.parameters:,} bytes in f32"
        return "\n".join([text[0], rule, *text[1:], rule, f"{total}, {_count(self.flops)} FLOPs"])


def _count(n: int | None) -> str:
    return "symbolic" if n is None else f"{n:,}"


def graph_flops(nodes: Iterable[Node]) -> int | None:
    """The arithmetic of several ops; None where a size is symbolic."""
    try:
        return sum(node_cost(n).flops for n in nodes)
    except ShapeError:
        return None


class _Observer:
    def __init__(self, recording: Trace) -> None:
        self.recording = recording
        self.open: list[tuple[int, int]] = []  # (row, nodes labelled before)
        self.rows: list[tuple[str, Any, str, int, list[Node]] | None] = []

    def __call__(self, event: str, module: Owner, path: str, value: Any) -> None:
        if event == "enter":
            self.open.append((len(self.rows), len(self.recording.labels)))
            self.rows.append(None)
            return
        row, before = self.open.pop()
        nodes = list(self.recording.labels)[before:]
        self.rows[row] = (path, module, _shapes(value), len(self.open), nodes)


def _shapes(value: Any) -> str:
    leaves = [v for v in tree.flatten(value)[0] if isinstance(v, Value)]
    return ", ".join(str(v.type) for v in leaves) or "-"


def summarise(module: Owner, *specs: Any) -> Summary:
    """The Summary of a Module called with arguments like `specs`."""
    with Trace(function_name(module)) as recording:
        declare_parameters(recording, module)
        arguments, _ = make_inputs(recording, module, specs)
        observer = _Observer(recording)
        recording.observers.append(observer)
        outputs, _, names = collect_outputs(module(*arguments))
        graph = finish(recording, outputs, names)
    live = set(graph.nodes())
    rows: list[Row] = []
    for found in observer.rows:
        if found is None:
            continue
        path, m, shape, depth, nodes = found
        count = sum(_size(p.shape) for _, p in m.named_parameters())
        rows.append(Row(path, type(m).__name__, shape, count, graph_flops(n for n in nodes if n in live), depth))
    own = list(module.named_parameters())
    total = sum(_size(p.shape) for _, p in own)
    return Summary(tuple(rows), total, sum(_size(p.shape) for _, p in own if p.requires_grad), _graph_total(graph))


def _size(shape: tuple[Dim, ...]) -> int:
    total = 1
    for d in shape:
        total *= 0 if isinstance(d, DimExpr) else d
    return total


def _graph_total(graph: Graph) -> int | None:
    return graph_flops(graph.nodes())
