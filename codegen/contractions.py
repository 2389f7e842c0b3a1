"""Contraction groups: one multiply-and-sum, with the maps that follow it as the generator's epilogue.

A padding may come last: the kernel then writes into the inside of the padded array, and the border before that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..ir.build import full
from ..ir.dims import as_int
from ..ir.errors import CompileError
from ..ir.expr import Expr, ExprLike, cast
from ..ir.graph import Graph, Node
from ..ir.lowering import Contract, Load, View
from ..ir.padding import padding_of
from ..ir.target import Target
from .borders import border
from .contraction import schedule
from .contraction.types import Epilogue, Operand, Part
from .groups import Body, Lowered, body_name, immediate, is_constant, row_major, static_shape
from .linear import linear
from .maps import lower_map


def _find(body: Body, graph: Graph) -> tuple[Node, Contract]:
    found = [
        (n, form) for n in graph.nodes() if n.inputs and n not in body.operand and isinstance(form := body.lowering(n), Contract)
    ]
    if len(found) != 1 or (len(graph.outputs) != 1 and not found[0][1].spec.groups):
        raise CompileError(
            f"a contraction region holds one contraction and one output; this one has {len(found)} and {len(graph.outputs)}: "
            f"{body_name(graph)}"
        )
    return found[0]


def lower_contraction(
    graph: Graph, target: Target, name: str, aligns: Sequence[int], threads: int, rank: int = 0, part: Part | None = None
) -> Lowered:
    """The kernels of a contraction and its epilogue, by the plan of a rank, or of a part of its rows. Raises
    CompileError for a region that is not of that form."""
    body = Body(graph, aligns)
    node, form = _find(body, graph)
    if as_int(form.spec.size("k")) == 0:  # nothing to add up: the epilogue of zeros, which is a map
        zeros = full(0.0, node.tensor)
        return lower_map(graph.map_nodes(lambda n, i: zeros if n is node else n.replace(i)), target, name, aligns)
    a, b = (_behind_views(body, n) for n in node.inputs)
    for n in (a, b):
        if n not in body.operand:
            raise CompileError(
                f"{node.op.name} {node.type}: its operands must come from outside the region, not from {n.op.name}"
            )
    result = graph.outputs[0]
    padding = padding_of(result)
    if padding is not None:
        result = result.inputs[0]
    while result is not node and isinstance(body.lowering(result), View):
        result = result.inputs[0]
    groups, results, shape = form.spec.groups, graph.outputs, static_shape(node)
    joined = groups > 1 and static_shape(result) != shape
    shape = (*shape[:-1], shape[-1] // groups) if joined else shape
    for r in results if joined else (result,):
        if static_shape(r) != shape:
            raise CompileError(f"{node.op.name} {node.type}: the region's result {r.type} has another shape than {shape}")
    extra = [n for n in graph.inputs if n is not a and n is not b]
    # An operand of the contraction that the epilogue reads again is passed a second time.
    extra += [n for n in dict.fromkeys((a, b)) if _read_by_epilogue(node, results if joined else (result,), n)]
    tables = [n for n in graph.nodes() if n not in body.operand and is_constant(n) and immediate(n) is None]
    extra += tables

    def operand(n: Node, shaped: Node | None = None) -> Operand:
        if n in tables:
            return Operand(n.dtype, row_major(static_shape(n)), 64)
        k = body.operand[n]
        return Operand(n.dtype, row_major(static_shape(shaped or n)), aligns[k] if aligns else n.dtype.itemsize)

    outputs = [
        Operand(r.dtype, row_major(shape), aligns[len(graph.inputs) + k] if aligns else r.dtype.itemsize)
        for k, r in enumerate(results if joined else (result,))
    ]
    c = outputs[0]
    if padding is not None:
        whole = static_shape(graph.outputs[0])
        start = sum(n * s for n, s in zip(padding.low, row_major(whole), strict=True))
        c = replace(c, strides=row_major(whole), start=start, span=math.prod(whole))
    if joined:
        epilogue: Epilogue | None = _joined(body, node, form, extra, [operand(n) for n in extra], outputs[1:])
    else:
        epilogue = None if result is node else _epilogue(body, node, result, extra, [operand(n) for n in extra])
    left, right = operand(a, node.inputs[0]), operand(b, node.inputs[1])
    scheduled = schedule(form.spec, left, right, c, epilogue, target, threads=threads, name=name, rank=rank, part=part)
    root = next(k for k in scheduled.kernels if k.name == scheduled.root)
    others = [k for k in scheduled.kernels if k is not root]
    if padding is not None:
        around = border(root.buffers[2], whole, padding, target.lanes(c.dtype.bits))
        root = replace(root, body=(*around, *root.body))
    kernels = (*others, root)
    arguments = [("operand", body.operand[a]), ("operand", body.operand[b]), ("output", 0)]
    if epilogue is not None:
        arguments += [("constant", tables.index(n)) if n in tables else ("operand", body.operand[n]) for n in extra]
        arguments += [("output", k) for k in range(1, len(outputs))]
    if scheduled.workspace:
        arguments.append(("workspace", 0))
    constants = tuple(n.attrs["value"] for n in tables)
    again = [extra[k] for k in scheduled.in_place if extra[k] not in (a, b) and extra[k] not in tables]
    in_place = frozenset((0, body.operand[n]) for n in again)
    return Lowered(kernels, tuple(arguments), constants, scheduled.workspace, in_place, scheduled.parallel, scheduled.note)


def _behind_views(body: Body, n: Node) -> Node:
    """The node whose bytes `n` is: an operand under another shape is the same memory with other strides."""
    while n not in body.operand and isinstance(body.lowering(n), View):
        n = n.inputs[0]
    return n


def _read_by_epilogue(node: Node, results: Sequence[Node], operand: Node) -> bool:
    stack, seen = list(results), set[Node]()
    while stack:
        n = stack.pop()
        if n is operand:
            return True
        if n is not node and n not in seen:
            seen.add(n)
            stack += n.inputs
    return False


def _epilogue(body: Body, node: Node, result: Node, extra: Sequence[Node], operands: Sequence[Operand]) -> Epilogue:
    number = {n: k for k, n in enumerate(extra)}

    def value(acc: Expr, index: tuple[Expr, ...], load: Load) -> Expr:
        def bound(n: Node, at: tuple[Expr, ...]) -> Expr | None:
            if n is node:
                if at != index:
                    raise CompileError(
                        f"{node.op.name} {node.type}: its epilogue reads the result at another index than it writes"
                    )
                return cast(acc, node.dtype)
            return load(number[n], list[ExprLike](at)) if n in number else None

        body.forget()
        body.bound = bound
        return body.value(result, index)

    return Epilogue(tuple(operands), value, node.dtype)


def _joined(
    body: Body, node: Node, form: Contract, extra: Sequence[Node], operands: Sequence[Operand], more: Sequence[Operand]
) -> Epilogue:
    """An epilogue whose results read the contraction's at their own index, moved on by whole groups of columns."""
    number = {n: k for k, n in enumerate(extra)}
    count = form.spec.groups
    width = static_shape(node)[-1] // count

    def value(accs: tuple[Expr, ...], index: tuple[Expr, ...], load: Load) -> Sequence[Expr]:
        own = linear(index[-1])

        def bound(n: Node, at: tuple[Expr, ...]) -> Expr | None:
            if n is not node:
                return load(number[n], list[ExprLike](at)) if n in number else None
            there = linear(at[-1])
            group, rest = divmod(there.constant - own.constant, width)
            if at[:-1] != index[:-1] or there.terms != own.terms or rest or not 0 <= group < count:
                raise CompileError(f"{node.op.name} {node.type}: its epilogue reads the result elsewhere than in its own column")
            return cast(accs[group], node.dtype)

        body.forget()
        body.bound = bound
        return [body.value(r, index) for r in body.graph.outputs]

    return Epilogue(tuple(operands), None, node.dtype, value, tuple(more))
