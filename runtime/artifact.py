"""The `.tw` file: a model as text and weights, safe to load from strangers.

A checksummed container with the graph's text, its weights as safetensors, and a JSON header. No machine code and no
pickle: who loads it compiles it. Whatever is wrong with a file is an ArtifactError, found before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.errors import ArtifactError, TensorwrightError
from ..ir.graph import Graph
from ..ir.text import parse_graph, print_graph
from ..ir.types import TensorType
from ..ir.verify import verify
from .buffers import Array, describe
from .container import DamagedError, pack, unpack, write_atomically

MAGIC: Final = b"TWMODEL1"
FORMAT: Final = 1
_PARTS: Final = {"graph", "weights"}


@dataclass(frozen=True)
class Artifact:
    """What a file holds: the graph as it was traced, the weights by input name, and remarks (all text)."""

    graph: Graph
    parameters: dict[str, Array]
    remarks: dict[str, str]


def save(path: str | Path, graph: Graph, parameters: Mapping[str, Array], remarks: Mapping[str, str] | None = None) -> None:
    """Writes the file, atomically. Raises ArtifactError if a weight does not fit the graph, OSError from the disk."""
    from safetensors.numpy import save as save_tensors

    types = {str(i.attrs["name"]): i.tensor for i in graph.inputs}
    for name, array in parameters.items():
        _check(name, array, types)
    text = print_graph(graph, labels=False, constants=True)
    weights = save_tensors({n: _storable(a) for n, a in parameters.items()})
    meta = {"format": FORMAT, "parameters": list(parameters), "remarks": dict(remarks or {})}
    write_atomically(Path(path), pack(MAGIC, meta, {"graph": text.encode(), "weights": weights}))


def load(path: str | Path) -> Artifact:
    """Reads a file. Raises ArtifactError if it is damaged, of another format, or contradicts itself, OSError from the disk."""
    return loads(Path(path).read_bytes(), str(path))


def loads(data: bytes, name: str = "artifact") -> Artifact:
    """`load` on the bytes of a file; `name` is for messages."""
    try:
        meta, parts = unpack(MAGIC, data)
    except DamagedError as error:
        raise ArtifactError(f"{name} is not a sound .tw file: {error}; save the model again") from error
    try:
        if meta["format"] != FORMAT:
            raise ArtifactError(f"{name} has format {meta['format']!r}; this version of Tensorwright reads format {FORMAT}")
        names, remarks = meta["parameters"], meta["remarks"]
        if set(parts) != _PARTS or not _strings(names) or not isinstance(remarks, dict) or not _strings(list(remarks.values())):
            raise ArtifactError(f"{name}: its header does not describe a model")
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{name}: its header does not describe a model: {error!r}") from error
    try:
        graph = parse_graph(bytes(parts["graph"]).decode())
        verify(graph)
    except (TensorwrightError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{name}: its graph cannot be read: {error}") from error
    return Artifact(graph, _weights(name, graph, names, bytes(parts["weights"])), remarks)


def _weights(name: str, graph: Graph, names: list[str], data: bytes) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        stored = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{name}: its weights cannot be read: {error}") from error
    types = {str(i.attrs["name"]): i.tensor for i in graph.inputs}
    if sorted(stored) != sorted(names):
        raise ArtifactError(
            f"{name}: it lists {len(names)} weights but holds {len(stored)}: {sorted(set(names) ^ set(stored))[:5]}"
        )
    found: dict[str, Array] = {}
    for weight in names:
        array = stored[weight]
        expected = types.get(weight)
        # a dtype that safetensors' numpy does not know is stored as its bits; the graph says which it is
        if expected is not None and array.dtype == _bits(expected.dtype.numpy) and expected.dtype.numpy.isbuiltin != 1:
            array = array.view(expected.dtype.numpy)
        _check(weight, array, types, name)
        found[weight] = array
    return found


def _check(weight: str, array: Array, types: Mapping[str, TensorType], name: str = "save") -> None:
    expected = types.get(weight)
    if expected is None:
        raise ArtifactError(f"{name}: weight {weight!r} is no input of the graph")
    if expected.symbols or array.dtype != expected.dtype.numpy or array.shape != expected.shape:
        raise ArtifactError(f"{name}: weight {weight!r} is {describe(array)} where the graph says {expected}")


def _bits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def _storable(array: Array) -> Array:
    array = np.ascontiguousarray(array).reshape(array.shape)
    return array if array.dtype.isbuiltin == 1 else array.view(_bits(array.dtype))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)
