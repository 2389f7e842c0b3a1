"""Small ONNX models for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

Info = tuple[str, Any, Sequence[int | str | None] | None]


def value(name: str, dtype: Any, shape: Sequence[int | str | None] | None) -> ValueInfoProto:
    number = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, number, shape)


def graph(
    nodes: Sequence[NodeProto], inputs: Sequence[Info], outputs: Sequence[Info], weights: Mapping[str, Any] | None = None
) -> GraphProto:
    made = [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()]
    return helper.make_graph(nodes, "g", [value(*i) for i in inputs], [value(*o) for o in outputs], made)


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[Info],
    outputs: Sequence[Info],
    weights: Mapping[str, Any] | None = None,
    opset: int = 20,
    **more: Any,
) -> ModelProto:
    """A model of one graph; `inputs` and `outputs` are (name, numpy dtype, shape)."""
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in more.pop("domains", {}).items())]
    return helper.make_model(graph(nodes, inputs, outputs, weights), opset_imports=opsets, ir_version=10, **more)


node = helper.make_node
F, I = np.float32, np.int64
