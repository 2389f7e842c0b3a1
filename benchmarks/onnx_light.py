"""The nine light models of the onnx package with weights: theirs are constants (0.02 everywhere), ours are drawn.

The networks are run once, node by node, while the weights are drawn: a convolution or matrix product is scaled so that its
result has a standard deviation of 1, a batch norm gets the mean and variance that it meets. So activations neither vanish nor
explode, whatever the network (Mishkin & Matas, "All you need is a good init", 2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]

_PRODUCTS: Final = ("Conv", "Gemm", "MatMul")
_HANDED_ON: Final = ("Unsqueeze", "Reshape")
_DEVIATION: Final = 2.0  # of what the last product gives: a softmax of it is neither flat nor a single 1


def light(name: str, image: Array, seed: int = 0) -> onnx.ModelProto:
    """The light model of a name, its constants replaced by weights that suit this image."""
    model = onnx.load(str(Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{name}.onnx"))
    return with_weights(model, image, seed)


def with_weights(model: onnx.ModelProto, image: Array, seed: int = 0) -> onnx.ModelProto:
    """The model with drawn weights in the place of its ConstantOfShape nodes. Raises ValueError for a node that is no layer."""
    graph, rng = model.graph, np.random.default_rng(seed)
    values: dict[str, Array] = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    shapes = {n.output[0]: tuple(values[n.input[0]]) for n in graph.node if n.op_type == "ConstantOfShape"}
    layers = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    last = next(n for n in reversed(layers) if n.op_type in _PRODUCTS)
    argument = next(i.name for i in graph.input if i.name not in values)
    values[argument] = image
    made: dict[str, Array] = {}
    origin: dict[str, str] = {}  # what a handed-on weight is called where it was drawn
    for node in layers:
        for k, name in enumerate(node.input):
            if name in shapes and name not in made:
                made[name] = values[name] = _draw(*_reader(node, k, layers), shapes[name], rng)
        drawn = [origin.get(i, i) for i in node.input if origin.get(i, i) in made]
        if drawn and node.op_type in _HANDED_ON:
            origin[node.output[0]] = drawn[0]
        elif drawn and node.op_type in _PRODUCTS:
            scale = np.float32((_DEVIATION if node is last else 1.0) / _run(node, values, model.opset_import)[0].std())
            weight = node.input[1]
            values[weight] = values[weight] * scale
            made[origin.get(weight, weight)] *= scale
        elif drawn and node.op_type == "BatchNormalization":
            x = values[node.input[0]]
            axes = tuple(a for a in range(x.ndim) if a != 1)
            for name, of in ((node.input[3], x.mean(axes)), (node.input[4], x.var(axes) + 1e-3)):
                made[name] = values[name] = of.astype(np.float32)
        values |= dict(zip(node.output, _run(node, values, model.opset_import), strict=False))
    return _replaced(model, layers, made, argument)


def _reader(node: onnx.NodeProto, position: int, layers: list[onnx.NodeProto]) -> tuple[onnx.NodeProto, int]:
    """The node that computes with an input, and which input it is there: a Reshape only hands it on."""
    if node.op_type not in _HANDED_ON:
        return node, position
    reader = next(n for n in layers if node.output[0] in n.input)
    return reader, list(reader.input).index(node.output[0])


def _draw(node: onnx.NodeProto, position: int, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if node.op_type in _PRODUCTS and position == 1:
        return rng.standard_normal(shape, np.float32)
    if node.op_type in _PRODUCTS and position == 2:
        return rng.uniform(-0.1, 0.1, shape).astype(np.float32)
    if node.op_type == "Mul" or (node.op_type == "BatchNormalization" and position == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if node.op_type in ("BatchNormalization", "Add"):
        return rng.uniform(-0.2, 0.2, shape).astype(np.float32)
    raise ValueError(f"no weights are known for input {position} of {node.op_type}")


def _run(node: onnx.NodeProto, values: Mapping[str, Array], opsets: Any) -> list[Array]:
    """The outputs of one node, by ONNX Runtime."""
    import onnxruntime

    names = list(dict.fromkeys(i for i in node.input if i))
    inputs = [helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(values[i].dtype), values[i].shape) for i in names]
    outputs = [helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "node", inputs, outputs)
    model = helper.make_model(graph, opset_imports=list(opsets), ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(a) for a in session.run(None, {i: values[i] for i in names})]


def _replaced(model: onnx.ModelProto, layers: list[onnx.NodeProto], made: Mapping[str, Array], argument: str) -> onnx.ModelProto:
    old = model.graph
    kept = [i for i in old.initializer if any(i.name in n.input for n in layers)]
    weights = [numpy_helper.from_array(a, name) for name, a in made.items()]
    inputs = [i for i in old.input if i.name == argument]
    graph = helper.make_graph(layers, old.name, inputs, list(old.output), [*kept, *weights])
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=8)
