"""Ops that the ONNX standard itself defines by other ops: where we have no conversion of our own, that definition is used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...ir.errors import OnnxError
from .description import FunctionDef, GraphDef, NodeDef, Stored
from .types import type_number
from .values import Value


@dataclass(frozen=True)
class Standard:
    """What the standard says of a node's op: nothing (`schema` is None), or a schema with a definition."""

    node: NodeDef
    schema: Any

    @property
    def exists(self) -> bool:
        """Whether the standard defines the op by others."""
        return self.schema is not None

    def body(self, inputs: Sequence[Value | None], opset: int) -> FunctionDef | None:
        """The definition for these inputs; None where there is none for their types."""
        if self.schema is None:
            return None
        if self.schema.has_function:
            return _plain(self.node.domain, self.node.op, opset)
        return self._for_types(inputs, opset)

    def _for_types(self, inputs: Sequence[Value | None], opset: int) -> FunctionDef | None:
        import onnx

        simple = {k: v for k, v in self.node.attributes.items() if not isinstance(v, (Stored, GraphDef))}
        if len(simple) != len(self.node.attributes):
            return None
        node = onnx.helper.make_node(
            self.node.op, list(self.node.inputs), list(self.node.outputs), self.node.name, domain=self.node.domain, **simple
        )
        types = []
        for v in inputs:
            shape = [d if isinstance(d, int) else str(d) for d in v.shape] if v is not None else []
            types.append(onnx.helper.make_tensor_type_proto(type_number(v.dtype), shape) if v is not None else onnx.TypeProto())
        versions = self.schema.context_dependent_function_opset_versions
        version = max((v for v in versions if v <= opset), default=None)
        if version is None:
            return None
        raw = self.schema.get_context_dependent_function_with_opset_version(
            version, node.SerializeToString(), [t.SerializeToString() for t in types]
        )
        return _read(raw, opset, self.schema)


def standard_function(node: NodeDef, opset: int) -> Standard:
    """What the standard says of a node's op."""
    schema = _schema(node.domain, node.op, opset)
    defined = schema is not None and (schema.has_function or schema.has_context_dependent_function)
    return Standard(node, schema if defined else None)


@functools.cache
def _schema(domain: str, name: str, opset: int) -> Any:
    import onnx

    try:
        return onnx.defs.get_schema(name, opset, domain)
    except onnx.defs.SchemaError:
        return None


@functools.cache
def _plain(domain: str, name: str, opset: int) -> FunctionDef | None:
    schema = _schema(domain, name, opset)
    version = max((v for v in schema.function_opset_versions if v <= opset), default=None)
    if version is None:
        return None
    return _read(schema.get_function_with_opset_version(version), opset, schema)


def _read(raw: bytes, opset: int, schema: Any) -> FunctionDef | None:
    import onnx

    from .reader import MAX_OPSET, _Reader

    if not raw:
        return None
    proto = onnx.FunctionProto()
    proto.ParseFromString(raw)
    reader = _Reader(onnx, None, "<standard>")
    found = reader._function(proto, {"": min(opset, MAX_OPSET)})
    defaults = {k: reader._attribute(a.default_value, k, 0) for k, a in schema.attributes.items() if a.default_value.type}
    found = replace(found, attributes={**found.attributes, **defaults})
    if not found.nodes:
        raise OnnxError(f"the standard's definition of {proto.name} is empty")
    return found
