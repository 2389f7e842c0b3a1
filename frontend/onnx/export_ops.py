"""How ops of ours are written in ONNX, where it takes more than the op that the record names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.dims import Dim, DimExpr
from ...ir.dtypes import as_dtype, bool_, f8e8m0, i8, i16, i32, u8
from ...ir.graph import Graph, Node
from ...ir.types import TensorType, TupleType
from .export_registry import Write, operands, writes
from .types import type_number

if TYPE_CHECKING:
    from .exporter import Emitter


def _same(e: Emitter, node: Node) -> str:
    return e.name(node.inputs[0])


writes("stop_gradient", "recompute", "mark", "gradient")(_same)


@writes("constant")
def _constant(e: Emitter, node: Node) -> str:
    return e.array(node.attrs["value"].array)


@writes("get")
def _get(e: Emitter, node: Node) -> str:
    return e.parts[node.inputs[0]][node.attrs["index"]]


@writes("cast")
def _cast(e: Emitter, node: Node) -> str:
    """Casts to floats of 8 bits as they are in IEEE 754 and ml_dtypes: what is too large becomes infinite or NaN."""
    narrow: dict[str, Any] = {"saturate": 0} if node.dtype.is_float and node.dtype.bits == 8 else {}
    if node.dtype is f8e8m0 and e.opset >= 24:
        narrow["round_mode"] = "nearest"
    return e.emit("Cast", [e.name(node.inputs[0])], to=type_number(node.dtype), **narrow)


@writes("not")
def _not(e: Emitter, node: Node) -> str:
    return e.emit("Not" if node.dtype is bool_ else "BitwiseNot", [e.name(node.inputs[0])])


@writes("and", "or", "xor")
def _logical(e: Emitter, node: Node) -> str:
    name = node.op.name.capitalize()
    return e.emit(name if node.dtype is bool_ else f"Bitwise{name}", operands(e, node))


@writes("not_equal")
def _not_equal(e: Emitter, node: Node) -> str:
    return e.emit("Not", [e.emit("Equal", operands(e, node))])


@writes("floordiv", "mod")
def _floor_division(e: Emitter, node: Node) -> str:
    """Floors of quotients, and what they leave. ONNX divides integers towards zero, and its remainder has the divisor's sign:
    a - a mod b divides exactly. By zero it fails where ours gives 0."""
    quotient = node.op.name == "floordiv"
    a, b = operands(e, node)
    if node.dtype.is_float:
        floor = e.emit("Floor", [e.emit("Div", [a, b])])
        return floor if quotient else e.emit("Sub", [a, e.emit("Mul", [floor, b])])
    zero = None
    if not _never_zero(node.inputs[1]):
        nothing, one = (e.array(np.asarray(v, node.dtype.numpy)) for v in (0, 1))
        zero = e.emit("Equal", [b, nothing])
        b = e.emit("Where", [zero, one, b])
    result = e.emit("Mod", [a, b])
    if quotient:
        result = e.emit("Div", [e.emit("Sub", [a, result]), b])
    if zero is not None:
        result = e.emit("Where", [zero, nothing, result])
    return result


def _never_zero(node: Node) -> bool:
    while node.op.name == "broadcast_to":
        node = node.inputs[0]
    return node.op.name == "constant" and bool(np.all(node.attrs["value"].array))


@writes("neg")
def _neg(e: Emitter, node: Node) -> str:
    x = e.name(node.inputs[0])
    if node.dtype.kind == "uint":
        return e.emit("Sub", [e.array(np.zeros((), node.dtype.numpy)), x])
    return e.emit("Neg", [x])


@writes("rsqrt")
def _rsqrt(e: Emitter, node: Node) -> str:
    return e.emit("Reciprocal", [e.emit("Sqrt", [e.name(node.inputs[0])])])


@writes("expm1")
def _expm1(e: Emitter, node: Node) -> str:
    one = e.array(np.ones((), node.dtype.numpy))
    return e.emit("Sub", [e.emit("Exp", [e.name(node.inputs[0])]), one])


@writes("log1p")
def _log1p(e: Emitter, node: Node) -> str:
    one = e.array(np.ones((), node.dtype.numpy))
    return e.emit("Log", [e.emit("Add", [e.name(node.inputs[0]), one])])


# -- shapes -------------------------------------------------------------------------------------------------------------
@writes("reshape")
def _reshape(e: Emitter, node: Node) -> str:
    x = node.inputs[0]
    zero = any(d == 0 for d in node.shape if isinstance(d, int))
    return e.emit("Reshape", [e.name(x), e.shape(node.shape, allow_unknown=True)], allowzero=int(zero))


@writes("transpose")
def _transpose(e: Emitter, node: Node) -> str:
    if not node.shape:
        return _same(e, node)
    return e.emit("Transpose", [e.name(node.inputs[0])], perm=list(node.attrs["perm"]))


@writes("broadcast_to")
def _expand(e: Emitter, node: Node) -> str:
    return e.emit("Expand", [e.name(node.inputs[0]), e.shape(node.shape)])


@writes("concat")
def _concat(e: Emitter, node: Node) -> str:
    return e.emit("Concat", [e.name(i) for i in node.inputs], axis=node.attrs["axis"])


@writes("slice")
def _slice(e: Emitter, node: Node) -> str:
    starts, stops, steps, shape = (*(node.attrs[k] for k in ("starts", "stops", "steps")), node.inputs[0].shape)
    axes = [k for k, d in enumerate(shape) if (starts[k], stops[k], steps[k]) != (0, d, 1)]
    if not axes:
        return e.emit("Identity", [e.name(node.inputs[0])])
    parts = [e.shape([v[k] for k in axes]) for v in (starts, stops)]
    where, by = (e.array(np.array(v, np.int64)) for v in (axes, [steps[k] for k in axes]))
    return e.emit("Slice", [e.name(node.inputs[0]), *parts, where, by])


@writes("reverse")
def _reverse(e: Emitter, node: Node) -> str:
    axes = node.attrs["axes"]
    count = len(axes)
    if not count:
        return _same(e, node)
    starts, stops, steps = ([-1] * count, [np.iinfo(np.int64).min + 1] * count, [-1] * count)
    return e.emit("Slice", [e.name(node.inputs[0]), *(e.array(np.array(v, np.int64)) for v in (starts, stops, axes, steps))])


@writes("pad")
def _pad(e: Emitter, node: Node) -> str:
    x, low, high, gaps = node.inputs[0], node.attrs["low"], node.attrs["high"], node.attrs["interior"]
    value = e.array(np.asarray(node.attrs["value"]), node.dtype)
    source = e.name(x)
    shape: list[Dim] = list(x.shape)
    for axis, gap in enumerate(gaps):
        if gap:  # each element followed by `gap` others, then the last of these cut off
            source = e.emit("Unsqueeze", [source, e.array(np.array([axis + 1]))])
            widths = [0] * (2 * (len(shape) + 1))
            widths[len(shape) + 1 + axis + 1] = gap
            source = e.emit("Pad", [source, e.array(np.array(widths, np.int64)), value])
            longer = shape[axis] * (gap + 1)
            shape[axis] = longer
            source = e.emit("Reshape", [source, e.shape(shape, allow_unknown=True)])
            shape[axis] = longer - gap
            source = e.emit("Slice", [source, e.array(np.array([0])), e.shape([shape[axis]]), e.array(np.array([axis]))])
    return e.emit("Pad", [source, e.shape([*low, *high]), value])


@writes("iota")
def _iota(e: Emitter, node: Node) -> str:
    size = node.shape[node.attrs["axis"]]
    line = [1] * len(node.shape)
    if not isinstance(size, DimExpr):
        line[node.attrs["axis"]] = size
        numbers = e.array(np.arange(size).astype(node.dtype.numpy).reshape(line))
    else:
        zero, one = (e.array(np.asarray(v, np.int64)) for v in (0, 1))
        end = e.emit("Squeeze", [e.size(size), e.array(np.array([0]))])
        numbers = e.emit("Range", [zero, end, one])
        line[node.attrs["axis"]] = -1
        numbers = e.emit("Reshape", [numbers, e.array(np.array(line, np.int64))])
        numbers = e.emit("Cast", [numbers], to=type_number(node.dtype))
    if all(d == 1 for k, d in enumerate(node.shape) if k != node.attrs["axis"]):
        return numbers
    return e.emit("Expand", [numbers, e.shape(node.shape)])


# -- reading at positions -----------------------------------------------------------------------------------------------
@writes("gather")
def _gather(e: Emitter, node: Node) -> str:
    """Positions outside are clipped by ours; ONNX refuses them, so they are clipped there."""
    x, index = node.inputs
    size = x.shape[node.attrs["axis"]]
    source = e.name(index)
    known = index.attrs["value"].array if index.op.name == "constant" else None
    inside = known is not None and isinstance(size, int) and bool(np.all((known >= 0) & (known < size)))
    if not inside:
        source = e.emit("Cast", [source], to=7)
        low = e.emit("Max", [source, e.array(np.asarray(0, np.int64))])
        end = e.emit("Squeeze", [e.size(size - 1), e.array(np.array([0]))])
        source = e.emit("Min", [low, end])
    elif index.dtype.bits < 32:
        source = e.emit("Cast", [source], to=7)
    return e.emit("Gather", [e.name(x), source], axis=node.attrs["axis"])


@writes("one_hot")
def _one_hot(e: Emitter, node: Node) -> str:
    x, depth = node.inputs[0], node.attrs["depth"]
    at = e.emit("Unsqueeze", [e.emit("Cast", [e.name(x)], to=7), e.array(np.array([len(x.shape)]))])
    hot = e.emit("Equal", [at, e.array(np.arange(depth, dtype=np.int64))])
    return e.emit("Cast", [hot], to=type_number(node.dtype))


# -- reductions ---------------------------------------------------------------------------------------------------------
@writes("sum", "mean", "max", "min", "prod")
def _reduce(e: Emitter, node: Node) -> str:
    assert node.op.onnx is not None
    axes = e.array(np.array(node.attrs["axes"], np.int64))
    keep = int(node.attrs["keepdims"])
    return e.emit(node.op.onnx[0], [e.name(node.inputs[0]), axes], keepdims=keep, noop_with_empty_axes=1)


@writes("argmax", "argmin")
def _position(e: Emitter, node: Node) -> str:
    op = "ArgMax" if node.op.name == "argmax" else "ArgMin"
    return e.emit(op, [e.name(node.inputs[0])], axis=node.attrs["axis"], keepdims=int(node.attrs["keepdims"]))


# -- contractions and windows -------------------------------------------------------------------------------------------
@writes("matmul")
def _matmul(e: Emitter, node: Node) -> str:
    names = [e.name(i) for i in node.inputs]
    if node.inputs[0].dtype is i16:  # whose sums are i32
        names = [e.emit("Cast", [n], to=type_number(i32)) for n in names]
    return e.emit("MatMulInteger" if _bytes(node) else "MatMul", names)


def _bytes(node: Node) -> bool:
    return all(i.dtype in (i8, u8) for i in node.inputs)


def _pads(padding: Any) -> list[int]:
    return [int(p[0]) for p in padding] + [int(p[1]) for p in padding]


def _nchw(write: Write) -> Write:
    """The op in ONNX's data layout, between transposes where the node has the other."""

    def wrapped(e: Emitter, node: Node) -> str:
        if node.attrs.get("layout", "NCHW") != "NCHW" and node.op.to_layout is not None:
            return e.subgraph(node.op.to_layout(node, "NCHW"))
        return str(write(e, node))

    return wrapped


@writes("conv2d")
@_nchw
def _conv(e: Emitter, node: Node) -> str:
    a = node.attrs
    op = "ConvInteger" if _bytes(node) else "Conv"
    return e.emit(op, [e.name(i) for i in node.inputs], strides=list(a["stride"]), pads=_pads(a["padding"]),
                  dilations=list(a["dilation"]), group=a["groups"])  # fmt: skip


@writes("conv2d_input_grad")
@_nchw
def _conv_transpose(e: Emitter, node: Node) -> str:
    a, (dy, w) = node.attrs, node.inputs
    extra: list[int] = []
    for size, n, s, (p, q), d, k in zip(
        a["input_shape"][2:], dy.shape[2:], a["stride"], a["padding"], a["dilation"], w.shape[2:], strict=True
    ):
        more = size - ((n - 1) * s - p - q + (k - 1) * d + 1)
        extra.append(int(more))
    return e.emit("ConvTranspose", [e.name(dy), e.name(w)], strides=list(a["stride"]), pads=_pads(a["padding"]),
                  dilations=list(a["dilation"]), group=a["groups"], output_padding=extra)  # fmt: skip


@writes("max_pool2d")
@_nchw
def _max_pool(e: Emitter, node: Node) -> str:
    a = node.attrs
    return e.emit("MaxPool", [e.name(node.inputs[0])], kernel_shape=list(a["kernel"]), strides=list(a["stride"]),
                  pads=_pads(a["padding"]), dilations=list(a["dilation"]))  # fmt: skip


@writes("avg_pool2d")
@_nchw
def _avg_pool(e: Emitter, node: Node) -> str:
    a = node.attrs
    return e.emit("AveragePool", [e.name(node.inputs[0])], kernel_shape=list(a["kernel"]), strides=list(a["stride"]),
                  pads=_pads(a["padding"]), count_include_pad=int(a["count_include_pad"]))  # fmt: skip


# -- control flow -------------------------------------------------------------------------------------------------------
def _body(e: Emitter, graph: Graph, given: list[tuple[str, Node]], outer: dict[Node, str]) -> Emitter:
    """The body's nodes; `given` are its ONNX inputs, `outer` what it reads from around it."""
    inner = e.body(graph, outer)
    for name, node in given:
        inner.names[node] = name
    inner.walk(graph)
    return inner


def _results(inner: Emitter, graph: Graph) -> list[tuple[str, TensorType]]:
    """The outputs of a body under names of their own."""
    return [(inner.emit("Identity", [inner.name(o)]), o.tensor) for o in graph.outputs]


@writes("cond")
def _cond(e: Emitter, node: Node) -> list[str]:
    test, *given = node.inputs
    bodies = {}
    for key, attr in (("then", "then_branch"), ("orelse", "else_branch")):
        graph: Graph = node.attrs[key]
        inner = _body(e, graph, [], dict(zip(graph.inputs, map(e.name, given), strict=True)))
        results = _results(inner, graph)
        bodies[attr] = inner.graph_of(key, [], results)
    return e.emit_all("If", [e.name(test)], count=_count(node), **bodies)


def _count(node: Node) -> int:
    return len(node.type.items) if isinstance(node.type, TupleType) else 1


@writes("scan")
def _scan(e: Emitter, node: Node) -> list[str]:
    graph: Graph = node.attrs["body"]
    carries, sequences = node.attrs["carries"], node.attrs["sequences"]
    stacked = len(graph.outputs) - carries
    count = carries + sequences
    outer = dict(zip(graph.inputs[count:], (e.name(i) for i in node.inputs[count:]), strict=True))
    given = [(e.fresh("step"), i) for i in graph.inputs[:count]]
    if sequences:
        inner = _body(e, graph, given, outer)
        results = _results(inner, graph)
        body = inner.graph_of("step", [(n, i.tensor) for n, i in given], results)
        backwards = int(node.attrs["reverse"])
        names = [e.name(i) for i in node.inputs[:count]]
        directions: dict[str, Any] = {"scan_input_directions": [backwards] * sequences}
        if stacked:
            directions["scan_output_directions"] = [backwards] * stacked
        return e.emit_all("Scan", names, count=_count(node), body=body, num_scan_inputs=sequences, **directions)
    inner = _body(e, graph, given, outer)
    results = _results(inner, graph)
    number, going = e.fresh("number"), e.fresh("going")
    infos = [(number, _scalar(np.int64)), (going, _scalar(np.bool_)), *((n, i.tensor) for n, i in given)]
    on = inner.emit("Identity", [going])
    body = inner.graph_of("step", infos, [(on, _scalar(np.bool_)), *results])
    trips = e.emit("Squeeze", [e.size(node.attrs["length"]), e.array(np.array([0]))])
    return e.emit_all("Loop", [trips, "", *(e.name(i) for i in node.inputs[:carries])], count=_count(node), body=body)


def _scalar(dtype: Any) -> TensorType:
    return TensorType(as_dtype(dtype), ())


@writes("while_loop")
def _while(e: Emitter, node: Node) -> list[str]:
    test, graph, carries = node.attrs["test"], node.attrs["body"], node.attrs["carries"]
    outside = [e.name(i) for i in node.inputs[carries:]]
    first = dict(zip(test.inputs, (e.name(i) for i in node.inputs), strict=True))
    before = _body(e, test, [], first)
    e.adopt(before)
    start = before.name(test.outputs[0])
    given = [(e.fresh("carry"), i) for i in graph.inputs[:carries]]
    inner = _body(e, graph, given, dict(zip(graph.inputs[carries:], outside, strict=True)))
    results = _results(inner, graph)
    again = dict(zip(test.inputs, [*(n for n, _ in results), *outside], strict=True))
    after = _body(inner, test, [], again)
    inner.adopt(after)
    on = inner.emit("Identity", [after.name(test.outputs[0])])
    infos = [(e.fresh("number"), _scalar(np.int64)), (e.fresh("going"), _scalar(np.bool_)), *((n, i.tensor) for n, i in given)]
    body = inner.graph_of("step", infos, [(on, _scalar(np.bool_)), *results])
    return e.emit_all("Loop", ["", start, *(e.name(i) for i in node.inputs[:carries])], count=_count(node), body=body)
