"""For the op tests: every sample of every record, a reverse walk over `grad`, and lowerings evaluated in numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tensorwright.ir import expr as ex
from tensorwright.ir.contraction import Contraction, strided_view
from tensorwright.ir.dtypes import DType, bool_, f32, f64
from tensorwright.ir.graph import Graph, Node, postorder
from tensorwright.ir.interp import run
from tensorwright.ir.lowering import (
    Coded,
    Contract,
    Decompose,
    Lowering,
    Map,
    Reduce,
    Scan,
    Scatter,
    Sort,
    Sparse,
    Structural,
    View,
    Window,
)
from tensorwright.ir.op import REGISTRY, Trait, make
from tensorwright.ir.ops.common import full
from tensorwright.ir.ops.compare import cast_array
from tensorwright.ir.ops.erf import erf

Array = np.ndarray[Any, Any]

OPS = [op for op in REGISTRY.values() if not op.has(Trait.STRUCTURAL)]
SAMPLES = [(op, k, s) for op in OPS for k, s in enumerate(op.samples())]
IDS = [f"{op.name}-{k}{'-' + s.label if s.label else ''}" for op, k, s in SAMPLES]


def errors(found: Array, expected: Array) -> float:
    """max|found - expected| / max|expected| over the finite elements of both; Inf where NaN or Inf do not agree."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    scale = np.abs(expected[finite]).max()
    worst = np.abs(found[finite] - expected[finite]).max()
    return float(worst / scale) if scale else float(worst)


def walk(output: Node, wrt: Sequence[Node], seed: Node) -> list[Node | None]:
    """Cotangents of `wrt`, by the records' rules in reverse order."""
    found: dict[Node, Node] = {output: seed}
    for node in reversed(list(postorder([output]))):
        if node not in found or node in wrt or not node.inputs:
            continue
        assert callable(node.op.grad), f"{node.op.name}: {node.op.grad}"
        contributions = node.op.grad(node, (found[node],))
        assert len(contributions) == len(node.inputs)
        for x, g in zip(node.inputs, contributions, strict=True):
            if g is not None:
                assert g.type == x.type, f"{node.op.name}: cotangent {g.type} for an operand {x.type}"
                found[x] = g if x not in found else make("add", found[x], g)
    return [found.get(x) for x in wrt]


def gradients(graph: Graph, weights: Node) -> tuple[Graph, list[Node]]:
    """The graph of d(sum(weights * output)) by each float input, and those inputs."""
    wrt = [x for x in graph.inputs if x.dtype.is_float]
    found = walk(graph.outputs[0], wrt, weights)
    outputs = [full(0.0, x) if g is None else g for x, g in zip(wrt, found, strict=True)]
    return Graph((*graph.inputs, weights), tuple(outputs)), wrt


def central_differences(graph: Graph, arrays: list[Array], weights: Array, k: int, at: list[tuple[int, ...]]) -> Array:
    """d(sum(weights * output)) by the elements `at` of input k, in f64."""
    step, result = 1e-5, []
    for position in at:
        ends = []
        for sign in (1, -1):
            moved = [a.copy() for a in arrays]
            moved[k][position] += sign * step
            ends.append(float(np.sum(weights * reference(graph, moved, wide=True))))
        result.append((ends[0] - ends[1]) / (2 * step))
    return np.array(result)


def reference(graph: Graph, arrays: list[Array], wide: bool = False) -> Array:
    """The one op of a sample graph, by its record's reference; `wide`: float dtypes in attributes become f64."""
    node = graph.outputs[0]
    attrs = {k: f64 if wide and isinstance(v, DType) and v.is_float else v for k, v in node.attrs.items()}
    return np.asarray(node.op.reference(arrays, attrs))


def widened(arrays: Sequence[Array]) -> list[Array]:
    return [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]


# --- lowerings in numpy -----------------------------------------------------------------------------------------------


def _integer_division(a: Array, b: Array) -> Array:
    return np.floor_divide(a, b)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "floordiv": _integer_division, "mod": np.mod,
    "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift, "pow": np.power, "lt": np.less, "le": np.less_equal, "eq": np.equal,
    "ne": np.not_equal, "neg": np.negative, "abs": np.abs, "not": np.logical_not, "sqrt": np.sqrt, "floor": np.floor,
    "ceil": np.ceil, "round": np.rint, "trunc": np.trunc, "exp": np.exp, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "erf": erf, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "select": np.where,
}  # fmt: skip


def _fma(a: Array, b: Array, c: Array) -> Array:
    """One rounding: the product of two f32 is exact in f64, that of two f64 in long double for these samples."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def evaluate(root: ex.Expr, variables: dict[ex.Expr, Array], operands: Sequence[Array]) -> Array:
    """An expression over grids of index values; a load outside its operand fails the test."""
    known: dict[ex.Expr, Array] = {}
    for e in ex.postorder([root]):
        args = [known[a] for a in e.args]
        if e.op == "const":
            value = np.array(e.attr, e.dtype.numpy)
        elif e.op == "var":
            value = variables[e]
        elif e.op == "load":
            value = _load(operands[e.attr[0]], args[: e.attr[1]], args[e.attr[1] :])
        elif e.op == "cast":
            value = cast_array(np.asarray(args[0]), e.dtype)
        elif e.op == "bitcast":
            value = np.asarray(args[0]).view(e.dtype.numpy)
        elif e.op == "fma":
            with np.errstate(all="ignore"):
                value = _fma(*args)
        else:
            assert all(a.dtype is e.args[-1].dtype for a in e.args[e.op == "select" :]), f"{e.op} of mixed dtypes"
            with np.errstate(all="ignore"):
                value = np.asarray(_FUNCTIONS[e.op](*args))
        assert value.dtype == e.dtype.numpy, f"{e.op} gave {value.dtype}, the expression says {e.dtype}"
        known[e] = value
    return known[root]


def _load(operand: Array, index: list[Array], mask: list[Array]) -> Array:
    assert len(index) == operand.ndim
    grids = np.broadcast_arrays(*index, *mask) if index or mask else []
    inside = grids[-1] if mask else np.ones(grids[0].shape if grids else (), bool)
    positions = []
    for i, n in zip(grids[: len(index)], operand.shape, strict=True):
        assert np.all((i >= 0) & (i < n) | ~inside), f"an index outside 0..{n - 1}"
        positions.append(np.where(inside, i, 0))
    if not inside.any():
        return np.zeros(inside.shape, operand.dtype)
    value = operand[tuple(positions)] if positions else np.broadcast_to(operand, inside.shape)
    return np.where(inside, value, np.zeros((), operand.dtype))


def _grid(names: str, shape: Sequence[int], before: int, after: int) -> tuple[tuple[ex.Expr, ...], dict[ex.Expr, Array]]:
    variables = tuple(ex.var(f"{names}{d}") for d in range(len(shape)))
    rank, values = before + len(shape) + after, {}
    for d, (v, n) in enumerate(zip(variables, shape, strict=True)):
        values[v] = np.arange(n, dtype=np.int64).reshape([-1 if j == before + d else 1 for j in range(rank)])
    return variables, values


def lowered(node: Node, operands: Sequence[Array]) -> Array:
    """The value of a node computed from what its record's `lower` says, in the operands' dtypes."""
    form: Lowering = node.op.lower(node)
    shape = node.tensor.static_shape
    dtype = node.dtype.numpy

    def load(k: int, index: Sequence[ex.ExprLike], mask: ex.Expr | None = None) -> ex.Expr:
        assert mask is None or mask.dtype is bool_
        return ex.load(k, index, node.inputs[k].dtype, mask)

    match form:
        case Map():
            idx, values = _grid("i", shape, 0, 0)
            value = form.value(idx, load)
            assert value.dtype is node.dtype
            if form.elementwise:
                loads = [e for e in ex.postorder([value]) if e.op == "load"]
                assert all(e.args == idx for e in loads), "elementwise, but an operand is read elsewhere"
            return (
                np.array(np.broadcast_to(evaluate(value, values, operands), shape)) if 0 not in shape else np.zeros(shape, dtype)
            )
        case Reduce():
            return _reduced(form, node, operands, load)
        case Scan():
            x = np.flip(operands[0], form.axis) if form.reverse else operands[0]
            y = np.zeros_like(x)
            for i in range(x.shape[form.axis]):
                stop = i if form.exclusive else i + 1
                part = x.take(range(stop), axis=form.axis)
                with np.errstate(all="ignore"):
                    np.moveaxis(y, form.axis, 0)[i] = getattr(part, form.kind)(axis=form.axis, dtype=x.dtype)
            return np.flip(y, form.axis) if form.reverse else y
        case Sort():
            return _sorted(form, operands[0])
        case Scatter():
            return _scattered(form, node, operands, load)
        case Sparse():
            return _sparse(form, operands, shape)
        case Coded():
            return _coded(form, operands, shape)
        case View():
            return operands[0].reshape(shape)
        case Contract():
            # 16-bit floats: their products are exact in f32, where they are added up
            wide = [x.astype(np.float32) if node.inputs[0].dtype.bits == 16 and node.dtype is f32 else x for x in operands]
            return contracted(form.spec, *wide)
        case Decompose():
            built = form.build(node)
            assert isinstance(built, Node) and built.type == node.type and built is not node
            return run(Graph(node.inputs, (built,)), list(operands))[0]
        case Structural():
            raise AssertionError("no samples expected")


def contracted(spec: Contraction, a: Array, b: Array) -> Array:
    """The definition, as one einsum over all axes; of bytes and i16 in i32."""
    if all(x.dtype in (np.int8, np.uint8, np.int16) for x in (a, b)):
        a, b = a.astype(np.int32), b.astype(np.int32)
    if spec.panel:
        b = unpacked(spec, b)
    names = [x.name for x in spec.axes]
    kept = [names.index(x.terms[0][0]) for x in spec.c]
    every = list(range(len(names)))
    return np.einsum(strided_view(a, spec.a, spec.axes), every, strided_view(b, spec.b, spec.axes), every, kept)


def unpacked(spec: Contraction, panels: Array) -> Array:
    """Panels of a matrix whose rows are the k axes and whose columns are the n axes, element by element."""
    columns, rows = int(spec.size("n")), int(spec.size("k"))  # type: ignore[call-overload]
    b = np.zeros((rows, columns), panels.dtype)
    for k in range(rows):
        for n in range(columns):
            b[k, n] = panels[n // spec.panel, k, n % spec.panel]
    return b


def _reduced(form: Reduce, node: Node, operands: Sequence[Array], load: Any) -> Array:
    shape, extents = node.tensor.static_shape, tuple(int(n) for n in form.extents)  # type: ignore[call-overload]
    idx, values = _grid("i", shape, 0, len(extents))
    r, more = _grid("r", extents, len(shape), 0)
    value = form.value(idx, r, load)
    if form.axes is not None:
        assert extents == tuple(operands[0].shape[a] for a in form.axes)
        (only,) = [e for e in ex.postorder([value]) if e.op == "load"]
        assert [only.args[a] for a in form.axes] == list(r)
    everything = (*shape, *extents)
    grid = np.broadcast_to(evaluate(value, values | more, operands), everything) if 0 not in everything else None
    if grid is None:
        grid = np.zeros(everything, value.dtype.numpy)
    flat = grid.reshape(*shape, math.prod(extents))
    if form.kind in ("argmax", "argmin"):
        return getattr(np, form.kind)(flat, axis=-1).astype(node.dtype.numpy)
    if not flat.size:
        return np.full(shape, {"sum": 0, "prod": 1}.get(form.kind, 0), flat.dtype)
    with np.errstate(all="ignore"):
        return getattr(np, form.kind)(flat, axis=-1, **({} if form.kind in ("max", "min") else {"dtype": flat.dtype}))


def _sparse(form: Sparse, operands: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """By a dense matrix with the entries where they are, each held inside what there is."""
    x, values, offsets, starts = operands
    if form.window is not None:
        x = _windows(form.window, x, shape[:-1])
    dense = np.zeros((x.shape[-1], shape[-1]), x.dtype)
    ends = np.clip(starts, 0, len(values))
    for b, (first, end) in enumerate(itertools.pairwise(ends)):
        for e in range(first, end):
            at = min(max(int(offsets[e]), 0), x.shape[-1] - 1)
            dense[at, b * form.block : (b + 1) * form.block] += values[e]
    return x @ dense


def _windows(window: Window, x: Array, pixels: tuple[int, ...]) -> Array:
    """What a window reads for each pixel of the result, element by element."""
    (_, h, w, c), (_, columns) = x.shape, window.kernel
    (top, _), (left, _) = window.padding
    found = np.zeros((*pixels, c * window.taps), x.dtype)
    for image, row, column, step in np.ndindex(*found.shape):
        channel, tap = divmod(step, window.taps)
        i = row * window.stride[0] + tap // columns - top
        j = column * window.stride[1] + tap % columns - left
        if 0 <= i < h and 0 <= j < w:
            found[image, row, column, step] = x[image, i, j, channel]
    return found


def _coded(form: Coded, operands: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """By the matrix of floats, made one weight at a time."""
    x, panels, scales, *tables = operands
    width, dense = panels.shape[2], np.zeros((x.shape[-1], shape[-1]), np.float32)
    for k, n in np.ndindex(*dense.shape):
        p, j = divmod(n, width)
        if form.bits >= 8:
            q = np.float32(panels[p, k, j])
        else:
            q = (int(panels[p, k // 8, j]) >> (4 * (k % 8))) & 15
            q = tables[0][q] if tables else q - 16 * (q > 7)
        dense[k, n] = np.float32(q) * np.float32(scales[p, k // form.block, j])
    return x @ dense


def _sorted(form: Sort, x: Array) -> Array:
    """Row by row with Python's sort, which is stable: NaN after every number, or before where the largest comes first."""
    rows = np.moveaxis(x, form.axis, -1)
    out = np.zeros((*rows.shape[:-1], int(form.count)), np.int64)  # type: ignore[call-overload]
    for at in np.ndindex(rows.shape[:-1]):
        keys = [(math.isnan(float(v)), 0.0 if math.isnan(float(v)) else float(v)) for v in rows[at]]
        order = sorted(range(len(keys)), key=lambda i: keys[i], reverse=form.descending)
        out[at] = order[: out.shape[-1]]
    return np.moveaxis(out, -1, form.axis)


_PUT: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "set": lambda a, b: b,
    "max": np.maximum,
    "min": np.minimum,
}


def _scattered(form: Scatter, node: Node, operands: Sequence[Array], load: Any) -> Array:
    out = operands[0].copy()
    extents = tuple(int(n) for n in form.extents)  # type: ignore[call-overload]
    if 0 in extents:
        return out
    u, values = _grid("u", extents, 0, 0)
    where = np.stack([np.broadcast_to(evaluate(e, values, operands), extents) for e in form.index(u, load)])
    updates = np.broadcast_to(evaluate(form.value(u, load), values, operands), extents)
    for position in np.ndindex(extents):
        at = tuple(int(i) for i in where[(slice(None), *position)])
        if all(0 <= i < n for i, n in zip(at, out.shape, strict=True)):
            with np.errstate(all="ignore"):
                out[at] = _PUT[form.kind](out[at], updates[position])
    # Below the serial dimensions no two updates meet.
    for outer in np.ndindex(extents[: form.serial_dims]):
        inner = where[(slice(None), *outer)].reshape(len(out.shape), -1).T
        assert len({tuple(row) for row in inner.tolist()}) == len(inner)
    return out
