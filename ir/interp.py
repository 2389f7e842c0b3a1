"""The numpy interpreter: what a graph means. It calls each op's reference; nothing here knows an op by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .dtypes import DType, as_dtype, f32, f64, i8, u8
from .errors import DTypeError, InputError, StepLimitError, TensorwrightError, VerifyError
from .graph import Graph, Node, postorder
from .graphs import bind_sizes, ordered, substitute_sizes
from .op import Array, Trait
from .types import TensorType, TupleType

Value = Array | tuple[Array, ...]
Observer = Callable[[Node, Value], None]


def run(
    graph: Graph,
    arrays: Sequence[Any] | Mapping[str, Any],
    dtype: DType | None = None,
    *,
    observe: Observer | None = None,
    limit: int | None = None,
) -> list[Array]:
    """Computes the outputs of `graph` with numpy.

    `arrays` holds one array per input, in order or by name; shapes and dtypes must be the declared ones, and bind the
    symbolic dimensions. Results have exactly the declared dtypes, or, with `dtype=f64`, everything floating is computed
    and returned in f64 (inputs, constants and casts to other floats included): the oracle that error budgets refer to.
    `observe(node, value)` is called after each node, but not in bodies of loops. `limit` is the most runs of bodies, all
    loops together. Results are fresh arrays. Raises InputError for arguments that do not fit, VerifyError when an op's
    reference contradicts the declared type, StepLimitError beyond the limit.
    """
    if dtype is not None and dtype is not f64:
        raise DTypeError(f"the interpreter computes in the declared dtypes (dtype=None) or in f64, not in {dtype!r}")
    values = check_arguments(graph, arrays, allow_f64=dtype is f64)
    sizes = bind_sizes(graph, values)
    results = execute(graph, values, dtype, sizes, observe, None if limit is None else [limit])
    return [np.array(r, order="C", copy=True) for r in results]


def check_arguments(graph: Graph, arrays: Sequence[Any] | Mapping[str, Any], allow_f64: bool = False) -> list[Array]:
    """The arguments as numpy arrays in the order of the inputs, dtypes checked (not shapes). Raises InputError."""
    values: list[Array] = []
    for node, given in zip(graph.inputs, ordered(graph, arrays), strict=True):
        name, array = node.attrs["name"], np.asarray(given)
        try:
            found = as_dtype(array.dtype)
        except DTypeError:
            raise InputError(f"input {name!r} is {node.type}, got an array of {array.dtype}") from None
        if found is not node.dtype and not (allow_f64 and found is f64 and node.dtype.is_float):
            raise InputError(f"input {name!r} is {node.type}, got an array of {found}; convert it with astype first")
        values.append(array.astype(found.numpy, copy=False))
    return values


def execute(
    graph: Graph,
    values: Sequence[Array],
    dtype: DType | None = None,
    sizes: Mapping[str, int] | None = None,
    observe: Observer | None = None,
    steps: list[int] | None = None,
) -> list[Array]:
    """`run` without checks of the arguments and without copies. An array is freed after its last use. Iterative.

    `steps` holds how many runs of bodies are left, and is counted down.
    """
    table: dict[Node, Value] = {
        node: _finish(node, v, _expected(node.tensor, sizes), dtype, rounding=True)
        for node, v in zip(graph.inputs, values, strict=True)
    }
    arguments = set(graph.inputs)
    order = [n for n in postorder(graph.outputs) if n not in arguments]
    uses = Counter(i for n in order for i in n.inputs)
    uses.update(graph.outputs)
    for node in order:
        value = evaluate(node, [table[i] for i in node.inputs], dtype, sizes, steps)
        for i in node.inputs:
            uses[i] -= 1
            if not uses[i]:
                table.pop(i, None)
        table[node] = value
        if observe is not None:
            observe(node, value)
    results: list[Array] = []
    for o in graph.outputs:
        found = table[o]
        if isinstance(found, tuple):
            raise VerifyError(f"output {o!r} of graph {graph.name!r} is a tuple; outputs are tensors: take parts with get nodes")
        results.append(found)
    return results


def evaluate(
    node: Node,
    operands: Sequence[Value],
    dtype: DType | None = None,
    sizes: Mapping[str, int] | None = None,
    steps: list[int] | None = None,
) -> Value:
    """The value of one node from the values of its operands (what constant folding uses).

    Types narrower than 32-bit floats (f16, bf16, fp8) are computed in f32 and rounded once per op; int4 in int8.
    """
    attrs: Mapping[str, Any] = node.attrs
    if sizes:
        attrs = {k: substitute_sizes(v, sizes) for k, v in attrs.items()}
    structural = node.op.has(Trait.STRUCTURAL)
    body = attrs.get("body")
    if structural and isinstance(body, Graph) and node.op.control is None:
        results = execute(body, operands, dtype, sizes)  # type: ignore[arg-type]
        value: Value = results[0] if len(results) == 1 else tuple(results)
    elif node.op.control is not None:

        def run_body(graph: Graph, arrays: Sequence[Array]) -> list[Array]:
            if steps is not None:
                steps[0] -= 1
                if steps[0] < 0:
                    raise StepLimitError(f"{node!r} ran its body beyond the limit on steps that the interpreter was given")
            return execute(graph, arrays, dtype, sizes, None, steps)

        value = node.op.control(operands, attrs, run_body)  # type: ignore[arg-type]
    else:
        if dtype is f64:
            attrs = {k: f64 if isinstance(v, DType) and v.is_float else v for k, v in attrs.items()}
        arguments: list[Any] = list(operands) if structural else [_widened(a) for a in operands]  # type: ignore[arg-type]
        try:
            value = node.op.reference(arguments, attrs)
        except TensorwrightError:
            raise
        except Exception as e:
            e.add_note(f"in the reference of {node!r} on {', '.join(_describe(a) for a in arguments) or 'no operands'}")
            raise
    if isinstance(node.type, TupleType):
        if not isinstance(value, tuple) or len(value) != len(node.type.items):
            raise VerifyError(f"the reference of {node!r} did not return {len(node.type.items)} arrays")
        items = [_expected(t, sizes) for t in node.type.items]
        return tuple(_finish(node, v, t, dtype, _rounds(node)) for v, t in zip(value, items, strict=True))
    if isinstance(value, tuple):
        raise VerifyError(f"the reference of {node!r} returned a tuple for one output")
    return _finish(node, value, _expected(node.type, sizes), dtype, _rounds(node))


def _expected(type: TensorType, sizes: Mapping[str, int] | None) -> TensorType:
    return type.with_sizes(sizes) if sizes else type


def _describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__


def _narrow(d: DType) -> bool:
    return (d.is_float and d.bits < 32) or d.bits < 8


def _widened(array: Array) -> Array:
    d = as_dtype(array.dtype)
    if not _narrow(d):
        return array
    return array.astype((f32 if d.is_float else i8 if d.kind == "int" else u8).numpy)


def _rounds(node: Node) -> bool:
    types = [t for n in (*node.inputs, node) for t in (n.type.items if isinstance(n.type, TupleType) else (n.type,))]
    return any(_narrow(t.dtype) for t in types)


def _finish(node: Node, value: Any, expected: TensorType, dtype: DType | None, rounding: bool) -> Array:
    """The value as an array of the declared type. Only floats change dtype, and only where that was asked for."""
    array = np.asarray(value)
    if array.shape != expected.shape:
        raise VerifyError(f"{node!r}: its value has shape {array.shape}, its type says {expected}")
    wanted = f64 if dtype is f64 and expected.dtype.is_float else expected.dtype
    if array.dtype == wanted.numpy:
        return array
    found = as_dtype(array.dtype)
    if found.kind == wanted.kind and (rounding or wanted is not expected.dtype):
        with np.errstate(all="ignore"):
            return array.astype(wanted.numpy)
    raise VerifyError(f"{node!r}: its value is an array of {found}, its type says {expected}")
