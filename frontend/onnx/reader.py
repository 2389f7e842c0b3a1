"""From a file, bytes or a ModelProto to a checked description. Hostile files end here, in an OnnxError.

Nothing is taken on trust: an array must bring as many bytes as its shape says, external data must lie inside the model's
folder, names must be defined once and before they are used, and nesting is bounded.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...ir.errors import OnnxError
from .description import Array, FunctionDef, GraphDef, ModelDef, NodeDef, Stored, ValueDef
from .types import BITS, PACKED, numpy_dtype

if TYPE_CHECKING:
    import onnx

MAX_OPSET: Final = 28
MAX_NESTING: Final = 24  # graphs within graphs
MAX_FILE: Final = 1 << 31  # protobuf's own limit
MAX_RANK: Final = 32
MAX_DENSE: Final = 1 << 26  # elements of a sparse array made dense


def require_onnx() -> Any:
    """The `onnx` package. Raises OnnxError with what to install where it is missing."""
    try:
        import onnx
    except ImportError as error:
        raise OnnxError("reading and writing ONNX files needs the onnx package: pip install 'tensorwright[onnx]'") from error
    return onnx


def read(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> ModelDef:
    """The description of a model. Raises OnnxError for anything damaged or contradictory, OSError for files."""
    onnx = require_onnx()
    folder: Path | None = None
    name = "<bytes>"
    if isinstance(source, onnx.ModelProto):
        proto, name = source, "<ModelProto>"
    else:
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
        else:
            path = Path(source)
            folder, name = path.resolve().parent, path.name
            if path.stat().st_size >= MAX_FILE:
                raise OnnxError(f"{path}: a protobuf file has less than 2 GiB; larger models keep their weights in other files")
            data = path.read_bytes()
        proto = onnx.ModelProto()
        try:
            proto.ParseFromString(data)
        except Exception as error:  # google.protobuf raises DecodeError, or RuntimeError for some damage
            raise OnnxError(f"{name} is no ONNX model, or is cut off: {error}") from error
    return _Reader(onnx, folder, name).model(proto)


class _Reader:
    def __init__(self, onnx: Any, folder: Path | None, name: str) -> None:
        self.onnx = onnx
        self.folder = folder
        self.name = name

    def fail(self, message: str) -> OnnxError:
        return OnnxError(f"{self.name}: {message}")

    def model(self, proto: Any) -> ModelDef:
        if not proto.HasField("graph"):
            raise self.fail("the model has no graph: it is empty, cut off, or no ONNX model")
        opsets = self._opsets(proto.opset_import, "the model")
        functions: dict[tuple[str, str, str], FunctionDef] = {}
        for f in proto.functions:
            found = self._function(f, opsets)
            key = (found.domain, found.name, found.overload)
            if key in functions:
                raise self.fail(f"the function {found.domain}.{found.name} is defined twice")
            functions[key] = found
        graph = self._graph(proto.graph, 0)
        return ModelDef(graph, opsets, functions, int(proto.ir_version), self.name, str(proto.producer_name))

    def _opsets(self, imports: Iterable[Any], what: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for o in imports:
            domain = "" if o.domain == "ai.onnx" else str(o.domain)
            found[domain] = max(found.get(domain, 0), int(o.version))
            if not 1 <= found[domain] < 1 << 31:
                raise self.fail(f"{what} asks for opset {o.version} of {o.domain or 'ai.onnx'}")
        if found.get("", 1) > MAX_OPSET:
            raise self.fail(f"{what} asks for opset {found['']} of ai.onnx; opsets 1 to {MAX_OPSET} are known")
        return found

    def _function(self, proto: Any, opsets: Mapping[str, int]) -> FunctionDef:
        defaults: dict[str, Any] = dict.fromkeys(map(str, proto.attribute))
        for a in proto.attribute_proto:
            defaults[str(a.name)] = self._attribute(a, f"function {proto.name}", 0)
        own = self._opsets(proto.opset_import, f"function {proto.name}") or dict(opsets)
        nodes = tuple(self._node(n, k, 0) for k, n in enumerate(proto.node))
        domain = "" if proto.domain == "ai.onnx" else str(proto.domain)
        inputs, outputs = tuple(map(str, proto.input)), tuple(map(str, proto.output))
        nodes = self._ordered(nodes, set(inputs), f"function {proto.name}")
        return FunctionDef(str(proto.name), domain, str(proto.overload), inputs, outputs, defaults, nodes, own)

    def _graph(self, proto: Any, depth: int) -> GraphDef:
        if depth > MAX_NESTING:
            raise self.fail(f"graphs are nested deeper than {MAX_NESTING} levels")
        initializers: dict[str, Stored] = {}
        for t in proto.initializer:
            initializers[str(t.name)] = self.stored(t, f"initializer {t.name!r}")
        for s in proto.sparse_initializer:
            initializers[str(s.values.name)] = self._sparse(s, f"sparse initializer {s.values.name!r}")
        inputs = tuple(self._value(v) for v in proto.input)
        names = [v.name for v in inputs]
        if len(set(names)) != len(names) or "" in names:
            raise self.fail(f"graph {proto.name!r}: inputs need distinct, non-empty names: {names[:8]}")
        nodes = tuple(self._node(n, k, depth) for k, n in enumerate(proto.node))
        known = {*names, *initializers}
        # names of an enclosing graph may be used in a body: only the importer can tell that they exist
        nodes = self._ordered(nodes, known, f"graph {proto.name!r}")
        return GraphDef(str(proto.name), nodes, inputs, tuple(self._value(v) for v in proto.output), initializers)

    def _ordered(self, nodes: tuple[NodeDef, ...], known: set[str], where: str) -> tuple[NodeDef, ...]:
        """The nodes in topological order (that of the file where it is one). Raises OnnxError for cycles and redefinitions."""
        maker: dict[str, int] = {}
        for k, n in enumerate(nodes):
            for o in n.outputs:
                if not o:
                    continue
                if o in maker or o in known:
                    raise self.fail(f"{where}: {show(n)} defines {o!r}, which is defined already")
                maker[o] = k
        needs = [{maker[i] for i in _used(n) if i in maker} for n in nodes]
        if all(m < k for k, each in enumerate(needs) for m in each):
            return nodes
        users: dict[int, list[int]] = {}
        for k, each in enumerate(needs):
            for m in each:
                users.setdefault(m, []).append(k)
        left = [len(each) for each in needs]
        ready = deque(k for k, count in enumerate(left) if not count)
        order: list[int] = []
        while ready:
            k = ready.popleft()
            order.append(k)
            for u in users.get(k, ()):
                left[u] -= 1
                if not left[u]:
                    ready.append(u)
        if len(order) != len(nodes):
            stuck = next(n for n, count in zip(nodes, left, strict=True) if count)
            raise self.fail(f"{where}: {show(stuck)} depends on its own output: the graph has a cycle")
        return tuple(nodes[k] for k in order)

    def _node(self, proto: Any, number: int, depth: int) -> NodeDef:
        domain = "" if proto.domain == "ai.onnx" else str(proto.domain)
        name = str(proto.name) or f"{proto.op_type}_{number}"
        where = f"node {name!r} ({proto.op_type})"
        if not proto.op_type:
            raise self.fail(f"node {name!r} has no op")
        attributes: dict[str, Any] = {}
        references: dict[str, str] = {}
        for a in proto.attribute:
            key = str(a.name)
            if key in attributes or key in references:
                raise self.fail(f"{where}: the attribute {key!r} is given twice")
            if a.ref_attr_name:
                references[key] = str(a.ref_attr_name)
            else:
                attributes[key] = self._attribute(a, where, depth)
        inputs, outputs = tuple(map(str, proto.input)), tuple(map(str, proto.output))
        return NodeDef(str(proto.op_type), domain, name, inputs, outputs, attributes, str(proto.overload), references)

    def _attribute(self, a: Any, where: str, depth: int) -> Any:
        kinds = self.onnx.AttributeProto
        text = f"{where}: attribute {a.name!r}"
        match a.type:
            case kinds.FLOAT:
                return float(a.f)
            case kinds.INT:
                return int(a.i)
            case kinds.STRING:
                return self._text(a.s, text)
            case kinds.FLOATS:
                return tuple(map(float, a.floats))
            case kinds.INTS:
                return tuple(map(int, a.ints))
            case kinds.STRINGS:
                return tuple(self._text(s, text) for s in a.strings)
            case kinds.TENSOR:
                return self.stored(a.t, text)
            case kinds.TENSORS:
                return tuple(self.stored(t, text) for t in a.tensors)
            case kinds.SPARSE_TENSOR:
                return self._sparse(a.sparse_tensor, text)
            case kinds.GRAPH:
                return self._graph(a.g, depth + 1)
            case kinds.GRAPHS:
                return tuple(self._graph(g, depth + 1) for g in a.graphs)
            case kinds.TYPE_PROTO:
                return self._type(str(a.name), a.tp)
        raise self.fail(f"{text} is of type {a.type}, which is not supported")

    def _text(self, value: bytes, where: str) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{where} is no UTF-8 text: {value[:40]!r}") from None

    def _value(self, proto: Any) -> ValueDef:
        return self._type(str(proto.name), proto.type)

    def _type(self, name: str, proto: Any) -> ValueDef:
        kind = proto.WhichOneof("value")
        if kind is None:  # a body's values need no types
            return ValueDef(name)
        if kind != "tensor_type":
            return ValueDef(name, kind.removesuffix("_type"))
        t = proto.tensor_type
        if not t.HasField("shape"):
            return ValueDef(name, "tensor", int(t.elem_type), None)
        dims: list[int | str | None] = []
        for d in t.shape.dim:
            which = d.WhichOneof("value")
            if which == "dim_value" and (d.dim_value < -1 or d.dim_value > 1 << 56):
                raise self.fail(f"value {name!r} has a dimension of size {d.dim_value}")
            if which == "dim_value" and d.dim_value == -1:  # not of the standard, but what Paddle writes for "any size"
                which = None
            dims.append(
                int(d.dim_value) if which == "dim_value" else (str(d.dim_param) or None) if which == "dim_param" else None
            )
        if len(dims) > MAX_RANK:
            raise self.fail(f"value {name!r} has {len(dims)} dimensions; {MAX_RANK} are the most")
        return ValueDef(name, "tensor", int(t.elem_type), tuple(dims))

    # -- arrays --------------------------------------------------------------------------------------------------------
    def stored(self, t: Any, where: str) -> Stored:
        """A TensorProto as a Stored array: shape, type and length checked, numbers not yet read."""
        dtype = numpy_dtype(int(t.data_type))
        if dtype is None:
            raise self.fail(f"{where} has element type {t.data_type}, which is not supported")
        shape = tuple(map(int, t.dims))
        if any(d < 0 for d in shape) or len(shape) > MAX_RANK:
            raise self.fail(f"{where} has the shape {shape}")
        count = math.prod(shape)
        if t.HasField("segment"):
            raise self.fail(f"{where} is given in segments, which is not supported")
        external = t.data_location == self.onnx.TensorProto.EXTERNAL
        if dtype.kind == "O":  # strings
            if len(t.string_data) != count:
                raise self.fail(f"{where} has {len(t.string_data)} strings, its shape {shape} wants {count}")
            return Stored(
                dtype, shape, lambda: np.array([s.decode("utf-8", "replace") for s in t.string_data], object).reshape(shape)
            )
        nbytes = (count * BITS[int(t.data_type)] + 7) // 8
        if external:
            path, offset = self._external(t, nbytes, where)
            return Stored(dtype, shape, lambda: _unpacked(_bytes_at(path, offset, nbytes, where), int(t.data_type), shape))
        if t.HasField("raw_data"):
            if len(t.raw_data) != nbytes:
                raise self.fail(f"{where} has {len(t.raw_data)} bytes; its type and shape {shape} want {nbytes}")
            return Stored(dtype, shape, lambda: _unpacked(t.raw_data, int(t.data_type), shape))
        found = self._typed_count(t)
        packed = PACKED.get(int(t.data_type), 1)
        if found != (-(-count // packed)):
            raise self.fail(f"{where} has {found} numbers; its shape {shape} wants {count}")
        return Stored(dtype, shape, lambda: self._typed(t, where))

    def _typed_count(self, t: Any) -> int:
        field = self.onnx.helper.tensor_dtype_to_field(t.data_type)
        count = len(getattr(t, field))
        return count // 2 if t.data_type in (14, 15) else count

    def _typed(self, t: Any, where: str) -> Array:
        try:
            return np.asarray(self.onnx.numpy_helper.to_array(t))
        except (ValueError, TypeError, OverflowError) as error:
            raise self.fail(f"{where} cannot be read: {error}") from error

    def _external(self, t: Any, nbytes: int, where: str) -> tuple[Path, int]:
        entries = {str(e.key): str(e.value) for e in t.external_data}
        location = entries.get("location", "")
        if self.folder is None:
            raise self.fail(f"{where} lies in another file ({location!r}): load the model from its path, not from bytes")
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or nbytes)
        except ValueError:
            raise self.fail(f"{where}: offset and length of its data are no numbers: {entries}") from None
        if not location or Path(location).is_absolute() or "\x00" in location:
            raise self.fail(f"{where} lies at {location!r}; external data is named relative to the model's folder")
        path = (self.folder / location).resolve()
        if not path.is_relative_to(self.folder):
            raise self.fail(f"{where} lies at {location!r}, outside the model's folder; that is not read")
        if not path.is_file():
            raise self.fail(f"{where} lies in {location!r}, and there is no such file beside the model")
        if offset < 0 or length != nbytes or offset + nbytes > path.stat().st_size:
            raise self.fail(
                f"{where}: {length} bytes at {offset} of {location!r}, which has {path.stat().st_size}; its shape wants {nbytes}"
            )
        return path, offset

    def _sparse(self, s: Any, where: str) -> Stored:
        shape = tuple(map(int, s.dims))
        count = math.prod(shape)
        if any(d < 0 for d in shape) or count > MAX_DENSE:
            raise self.fail(f"{where}: a sparse array of shape {shape} is too large to be made dense")
        values, indices = self.stored(s.values, where), self.stored(s.indices, f"{where}, indices")

        def load() -> Array:
            at, dense = indices.load().astype(np.int64), np.zeros(count, values.dtype)
            if at.ndim == 2 and at.shape[1] == len(shape):
                inside = np.all((at >= 0) & (at < np.array(shape)))
                at = np.ravel_multi_index(tuple(at.T), shape) if inside else np.array([-1])
            if at.ndim != 1 or np.any((at < 0) | (at >= max(count, 1))) or at.size != values.size:
                raise self.fail(f"{where}: its indices do not fit its shape {shape}")
            dense[at] = values.load().ravel()
            return dense.reshape(shape)

        return Stored(values.dtype, shape, load)


def show(node: NodeDef) -> str:
    """A node for an error message."""
    return f"node {node.name!r} ({node.qualified})"


def _used(node: NodeDef) -> list[str]:
    """The names that a node reads, those that its bodies read from around them included."""
    found = [i for i in node.inputs if i]
    stack = _bodies(node)
    while stack:
        g = stack.pop()
        own = {v.name for v in g.inputs} | set(g.initializers) | {o for n in g.nodes for o in n.outputs}
        for n in g.nodes:
            found += [i for i in n.inputs if i and i not in own]
            stack += _bodies(n)
        found += [v.name for v in g.outputs if v.name not in own]
    return found


def _bodies(node: NodeDef) -> list[GraphDef]:
    found: list[GraphDef] = []
    for v in node.attributes.values():
        items: Sequence[Any] = v if isinstance(v, tuple) else (v,)
        found += [g for g in items if isinstance(g, GraphDef)]
    return found


def _bytes_at(path: Path, offset: int, count: int, where: str) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(count)
    if len(data) != count:
        raise OnnxError(f"{where}: {path.name} ends before its data does")
    return data


def _unpacked(data: bytes, kind: int, shape: tuple[int, ...]) -> Array:
    """An array from the bytes that ONNX stores it in: little-endian, types below 8 bits packed from the low bits up."""
    dtype, bits = numpy_dtype(kind), BITS[kind]
    assert dtype is not None
    if bits >= 8:
        found = np.frombuffer(data, dtype).reshape(shape)
        return found if sys.byteorder == "little" else found.byteswap()
    count = math.prod(shape)
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    codes = (stream << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if dtype.name.startswith("int"):  # ml_dtypes keeps the sign in the whole byte
        codes = np.where(codes >= 1 << (bits - 1), codes | (0xFF << bits) & 0xFF, codes).astype(np.uint8)
    return codes.view(dtype).reshape(shape)
