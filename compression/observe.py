"""Calibration: runs a graph on typical inputs and keeps of chosen values how they are distributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..driver import build
from ..ir.errors import InputError
from ..ir.graph import Graph, Node
from .ranges import Histogram

Array = np.ndarray[Any, Any]
_GIVEN = 256 * 1024 * 1024  # bytes of values that one run of the graph gives at most; more take several runs


def values_of(
    graph: Graph, weights: Mapping[str, Array], nodes: Sequence[Node], batches: Sequence[tuple[Array, ...]]
) -> Iterator[tuple[Array, ...]]:
    """The numbers of nodes for each batch, from the graph compiled with them as outputs."""
    arguments = [i for i in graph.inputs if i.attrs["role"] == "data"]
    named = tuple(f"v{k}" for k in range(len(nodes)))
    watched = Graph(graph.inputs, tuple(nodes), named, f"{graph.name}_observed", (), graph.labels, weights)
    exe = build(watched, weights)
    for k, batch in enumerate(batches):
        if len(batch) < len(arguments):
            names = [i.attrs["name"] for i in arguments]
            raise InputError(f"calibration: batch {k} has {len(batch)} arrays; {graph.name} takes {len(names)}: {names}")
        found = exe(*batch[: len(arguments)])
        yield found if isinstance(found, tuple) else (found,)


def observe(
    graph: Graph, weights: Mapping[str, Array], nodes: Sequence[Node], names: Sequence[str], batches: Sequence[tuple[Array, ...]]
) -> list[Histogram]:
    """A histogram of each node over all batches. Raises InputError, with its name, for one that is not finite."""
    found = [Histogram(name) for name in names]
    for part in _parts(graph, nodes, batches):
        for values in values_of(graph, weights, [nodes[k] for k in part], batches):
            for k, array in zip(part, values, strict=True):
                found[k].add(array)
    return found


def _parts(graph: Graph, nodes: Sequence[Node], batches: Sequence[tuple[Array, ...]]) -> list[list[int]]:
    """Numbers of nodes, so many at a time that what one run gives stays within bounds."""
    largest = max(max((a.shape[0] for a in b if a.ndim), default=1) for b in batches)
    result: list[list[int]] = [[]]
    total = 0
    for k, n in enumerate(nodes):
        size = n.dtype.itemsize
        for d in n.shape:
            size *= d if isinstance(d, int) else largest
        if result[-1] and total + size > _GIVEN:
            result.append([])
            total = 0
        result[-1].append(k)
        total += size
    return [p for p in result if p]
