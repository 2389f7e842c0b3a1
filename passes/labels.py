"""Labels (names and source locations) through a pass: a graph keeps only those of nodes that it still has; and files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..ir.graph import Graph, Label, Node, postorder


def finish(graph: Graph, outputs: Sequence[Node], labels: Mapping[Node, Label]) -> Graph:
    """The same signature with other outputs, labelled; the graph itself if the outputs are the same."""
    if tuple(outputs) == graph.outputs:
        return graph
    alive = postorder((*graph.inputs, *outputs))
    return graph.with_outputs(outputs, {n: labels[n] for n in alive if n in labels})


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
