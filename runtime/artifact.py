"""The `.tw` file: a model as text and weights, safe to load from strangers.

A checksummed container with the graph's text, its weights as safetensors, and a JSON header. No machine code and no
pickle: who loads it compiles it. Whatever is wrong with a file is an ArtifactError, found before memory is taken for it.
"""

from __future__ import annotations

import json
import math
import mmap
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
from .mapped import map_file

MAGIC: Final = b"TWMODEL1"
FORMAT: Final = 1
_PARTS: Final = {"graph", "weights"}
# what safetensors writes for numpy's dtypes; others are stored as their bits
_DTYPES: Final = {
    **{f"{kind}{8 * n}": f"<{code}{n}" for kind, code in (("I", "i"), ("U", "u")) for n in (1, 2, 4, 8)},
    **{"F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8", "BOOL": "?"},
}


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
    """Opens a file. Raises ArtifactError if it is damaged, of another format, or contradicts itself, OSError from the disk.

    The weights are read-only views of the mapped file: it may be replaced (as `save` does), but must not be written to
    while they are in use.
    """
    return loads(map_file(Path(path)), str(path))


def loads(data: bytes | mmap.mmap, name: str = "artifact") -> Artifact:
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
    return Artifact(graph, _weights(name, graph, names, parts["weights"]), remarks)


def _stored(data: memoryview) -> dict[str, Array]:
    """The arrays of a safetensors file as views of it (its own library would copy them). Raises ValueError for what is none."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError(f"its header claims {length} of {len(data)} bytes")
    header, values = json.loads(bytes(data[8 : 8 + length])), data[8 + length :]
    found: dict[str, Array] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or not begin <= end <= len(values):
            raise ValueError(f"{name!r} does not lie inside the file")
        if end - begin != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name!r} has {end - begin} bytes, which are not {entry['dtype']}{shape}")
        found[name] = np.frombuffer(values[begin:end], dtype).reshape(shape)
    return found


def _weights(name: str, graph: Graph, names: list[str], data: memoryview) -> dict[str, Array]:
    try:
        stored = _stored(data)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
