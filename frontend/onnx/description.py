"""A model file as plain data: what the reader checked, and what the importer walks. Nothing here knows protobuf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """An array of the file: its type is known at once, its numbers are read when asked for."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    load: Callable[[], Array] = field(repr=False)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1


@dataclass(frozen=True)
class ValueDef:
    """A declared value: `kind` is 'tensor', or what else it is; `shape` has ints, names, or None where it says nothing."""

    name: str
    kind: str = "tensor"
    dtype: int = 0  # TensorProto.DataType
    shape: tuple[int | str | None, ...] | None = None


@dataclass(frozen=True)
class NodeDef:
    """One node. `attributes` holds ints, floats, strings, Stored arrays, GraphDefs, or tuples of such."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    overload: str = ""
    references: Mapping[str, str] = field(default_factory=dict)  # attribute -> attribute of the function around it

    @property
    def qualified(self) -> str:
        """The op with its domain, where it has one."""
        return f"{self.domain}.{self.op}" if self.domain else self.op


@dataclass(frozen=True)
class GraphDef:
    """A graph or the body of a control-flow op; nodes in topological order."""

    name: str
    nodes: tuple[NodeDef, ...]
    inputs: tuple[ValueDef, ...]
    outputs: tuple[ValueDef, ...]
    initializers: Mapping[str, Stored]


@dataclass(frozen=True)
class FunctionDef:
    """A function of the model: a node that calls it stands for its nodes."""

    name: str
    domain: str
    overload: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # name -> default, None where there is none
    nodes: tuple[NodeDef, ...]
    opsets: Mapping[str, int]


@dataclass(frozen=True)
class ModelDef:
    """A whole file."""

    graph: GraphDef
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str, str], FunctionDef]
    ir_version: int
    source: str  # the file's name, or '<bytes>'
    producer: str = ""
