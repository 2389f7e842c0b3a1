"""A group: what becomes one kernel. A fused region's body, or one node wrapped as if it were one.

`Body.value(node, index)` is the scalar expression of a node's element, everything between it and the operands inlined.
It knows the forms of `ir.lowering` and no op names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeVar

import numpy as np

from ..ir.dims import as_int
from ..ir.dtypes import DType, bf16, bool_, f16, f32
from ..ir.errors import CompileError
from ..ir.expr import Expr, ExprLike, binary, cast, const, lift, load, logical_not, maximum, minimum, postorder, rewrite, select
from ..ir.graph import Graph, Literal, Node
from ..ir.lowering import (
    Attention,
    Coded,
    Contract,
    Decompose,
    Load,
    Lowering,
    Map,
    Reduce,
    Scan,
    Scatter,
    Sort,
    Sparse,
    Structural,
    View,
)
from ..ir.target import Target
from .loop_ir import Buffer, Call, For, If, Kernel, Let, Prefetch, Stmt, Store, Warp, expressions, statements

Form = TypeVar("Form", bound=Lowering)
UNROLL_LIMIT: Final = 32  # reductions over no more elements than this may be inlined as one expression


@dataclass(frozen=True)
class Lowered:
    """A group's code. `root` is the kernel a program calls, the last one; `arguments` say what its buffers are.

    An argument is ('operand', k), ('output', k), ('constant', k) or ('workspace', byte offset); `workspace` is its size.
    `in_place` holds (output, operand) pairs that may share memory: each element is read before it is written. Their two
    buffers must then be made one (`share_buffers`).
    """

    kernels: tuple[Kernel, ...]
    arguments: tuple[tuple[str, int], ...]
    constants: tuple[Literal, ...] = ()
    workspace: int = 0
    in_place: frozenset[tuple[int, int]] = frozenset()
    parallel: bool = False
    note: str = ""

    @property
    def root(self) -> Kernel:
        return self.kernels[-1]


def lowered(
    body: Body,
    name: str,
    statements: Sequence[Stmt],
    *,
    doc: str,
    workspaces: Sequence[Buffer] = (),
    in_place: frozenset[tuple[int, int]] = frozenset(),
    parallel: bool = False,
    note: str = "",
) -> Lowered:
    """One kernel over a body's operands, outputs, constants and the arrays of its workspace."""
    arguments = [("operand", k) for k in range(len(body.buffers))]
    arguments += [("output", k) for k in range(len(body.outputs))]
    arguments += [("constant", k) for k in range(len(body.constants))]
    buffers = [*body.buffers, *body.outputs, *body.constants.values()]
    size = 0
    for w in workspaces:
        arguments.append(("workspace", size))
        buffers.append(w)
        size += -(-w.span * w.dtype.itemsize // 64) * 64
    used = {b.name for b in mentioned(statements)}
    kept = [k for k, b in enumerate(buffers) if b.name in used]
    kernel = Kernel(name, tuple(buffers[k] for k in kept), tuple(statements), doc=doc, noalias=True)
    constants = tuple(n.attrs["value"] for n in body.constants)
    return Lowered((kernel,), tuple(arguments[k] for k in kept), constants, size, in_place, parallel, note)


def mentioned(body: Sequence[Stmt]) -> set[Buffer]:
    """The buffers that statements read or write."""
    found: set[Buffer] = set()
    roots: list[Expr] = []
    for s in statements(tuple(body)):
        roots += expressions(s)
        if isinstance(s, Store):
            found.add(s.buffer)
        elif isinstance(s, Warp):
            found.update(b for b, _ in s.places)
    found.update(e.attr[0] for e in postorder(roots) if e.op == "load")
    return found


def share_buffers(kernel: Kernel, pairs: dict[int, int]) -> Kernel:
    """The kernel with some of its buffers standing for others too: `pairs` maps the position that goes to the one that stays."""
    stays = {kernel.buffers[a]: kernel.buffers[b] for a, b in pairs.items()}
    done: dict[Expr, Expr] = {}

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op == "load" and e.attr[0] in stays:
            return Expr("load", args, e.dtype, e.lanes, (stays[e.attr[0]], e.attr[1]))
        if e.op == "to_line" and e.attr in stays:
            return Expr("to_line", (), e.dtype, 1, stays[e.attr])
        return None

    def put(e: Expr) -> Expr:
        return rewrite(e, rule, done)

    def block(body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
        out: list[Stmt] = []
        for s in body:
            match s:
                case For():
                    out.append(For(s.var, put(s.start), put(s.stop), block(s.body), s.kind, s.step))
                case Store():
                    index = tuple(put(i) for i in s.index)
                    mask = None if s.mask is None else put(s.mask)
                    out.append(Store(stays.get(s.buffer, s.buffer), index, put(s.value), mask, s.nontemporal))
                case Let():
                    out.append(Let(s.var, put(s.value)))
                case Prefetch():
                    out.append(Prefetch(stays.get(s.buffer, s.buffer), tuple(put(i) for i in s.index), s.level))
                case If():
                    out.append(If(put(s.condition), block(s.then), block(s.otherwise)))
                case Call():
                    views = tuple((stays.get(b, b), put(at)) for b, at in s.views)
                    out.append(Call(s.kernel, views, tuple(put(x) for x in s.scalars)))
                case _:
                    out.append(s)
        return tuple(out)

    buffers = tuple(b for k, b in enumerate(kernel.buffers) if k not in pairs)
    return Kernel(kernel.name, buffers, block(kernel.body), kernel.scalars, kernel.doc, kernel.noinline, kernel.noalias)


def static_shape(node: Node) -> tuple[int, ...]:
    """The shape of a node as ints."""
    return tuple(as_int(d) for d in node.shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


def flat_index(index: Sequence[ExprLike], shape: Sequence[int]) -> Expr:
    """The position of an element in a row-major array."""
    total: Expr = const(0)
    for i, s in zip(index, row_major(shape), strict=True):
        total = binary("add", total, binary("mul", lift(i), s))
    return total


def unflatten(position: Expr, shape: Sequence[int]) -> tuple[Expr, ...]:
    """The index of the element at a position of a row-major array."""
    strides = row_major(shape)
    return tuple(
        const(0) if n == 1 else binary("floordiv", position, s) if k == 0 else binary("mod", binary("floordiv", position, s), n)
        for k, (n, s) in enumerate(zip(shape, strides, strict=True))
    )


def accumulator(dtype: DType) -> DType:
    """What sums and products of a dtype are kept in: 16-bit floats in f32."""
    return f32 if dtype in (f16, bf16) else dtype


def combine(kind: str, a: Expr, b: Expr) -> Expr:
    """One step of a reduction."""
    if kind == "sum":
        if a.dtype is bool_:
            return binary("or", a, b)
        return binary("add", a, b)
    if kind == "prod":
        return binary("and", a, b) if a.dtype is bool_ else binary("mul", a, b)
    if a.dtype is bool_:
        return binary("or" if kind == "max" else "and", a, b)
    return maximum(a, b) if kind == "max" else minimum(a, b)


def identity(kind: str, dtype: DType, lanes: int = 1) -> Expr:
    """The value that a reduction of `kind` starts from."""
    if kind in ("sum", "prod"):
        return const(0 if kind == "sum" else 1, dtype, lanes)
    low = kind in ("max", "argmax")
    if dtype is bool_:
        return const(not low, dtype, lanes)
    if dtype.is_float:
        return const(float("-inf") if low else float("inf"), dtype, lanes)
    if dtype.kind == "uint":
        return const(0 if low else (1 << dtype.bits) - 1, dtype, lanes)
    return const(-(1 << (dtype.bits - 1)) if low else (1 << (dtype.bits - 1)) - 1, dtype, lanes)


def better(kind: str, value: Expr, best: Expr) -> Expr:
    """Whether `value` replaces `best` in an argmax or argmin: it is strictly better, or the first NaN."""
    if value.dtype is bool_:
        a, b = (value, best) if kind == "argmax" else (best, value)
        return binary("and", a, logical_not(b))
    wins = binary("lt", best, value) if kind == "argmax" else binary("lt", value, best)
    if not value.dtype.is_float:
        return wins
    return binary("or", wins, binary("and", binary("ne", value, value), binary("eq", best, best)))


def is_constant(node: Node) -> bool:
    """Whether a node is an array known now."""
    return not node.inputs and isinstance(node.attrs.get("value"), Literal)


def immediate(node: Node) -> Expr | None:
    """The constant that every element of a constant node is, or None."""
    value = node.attrs.get("value")
    if not isinstance(value, Literal) or value.array.size == 0:
        return None
    first = value.array.reshape(-1)[0]
    if value.array.size > 1:
        raw = value.array.reshape(-1).view(np.uint8).reshape(value.array.size, -1)
        if (raw != raw[0]).any():
            return None
    dtype = value.type.dtype
    return const(float(first) if dtype.is_float else bool(first) if dtype is bool_ else int(first), dtype)


class Body:
    """The body of a group with its operands bound to flat buffers.

    `reduced` decides what the value of a Reduce at an index is; by default small ones are inlined.
    """

    refusal: ClassVar[type[CompileError]] = CompileError  # of a node that has no code here

    def __init__(self, graph: Graph, aligns: Sequence[int] = ()) -> None:
        self.graph = graph
        self.operand = {n: i for i, n in enumerate(graph.inputs)}
        aligns = aligns or [n.dtype.itemsize for n in (*graph.inputs, *graph.outputs)]
        self.aligns = tuple(aligns)
        after = len(graph.inputs)
        self.buffers = [
            Buffer(str(n.attrs["name"]), n.dtype, (size(n),), align=aligns[k], writable=False) for k, n in enumerate(graph.inputs)
        ]
        self.constants: dict[Node, Buffer] = {}
        self.outputs = [Buffer(f"y{k}", n.dtype, (size(n),), align=aligns[after + k]) for k, n in enumerate(graph.outputs)]
        self.reduced: Callable[[Node, Reduce, tuple[Expr, ...], Expr | None], Expr | None] | None = None
        self.bound: Callable[[Node, tuple[Expr, ...]], Expr | None] | None = None
        self.normal: Callable[[Expr], Expr] = lambda e: e
        self._lowering: dict[Node, Lowering] = {}
        self._immediate: dict[Node, Expr | None] = {}
        self._memo: dict[tuple[Node, tuple[Expr, ...], Expr | None], Expr] = {}

    def lowering(self, node: Node) -> Lowering:
        """The form of a node, checked to be one that code exists for."""
        found = self._lowering.get(node)
        if found is None:
            found = node.op.lower(node)
            if isinstance(found, Decompose) and not isinstance(found, Attention):
                raise CompileError(
                    f"{node.op.name} {node.type} stands for other ops and has no code of its own: the decompose pass must run "
                    "before code generation"
                )
            self._lowering[node] = found
        return found

    def sole(self, kind: type[Form]) -> tuple[Node, Form]:
        """The node of a group's first output, which is of that kind, and its form. Raises `refusal` for any other."""
        node = self.graph.outputs[0]
        form = self.lowering(node)
        if not isinstance(form, kind):
            raise self.refusal(f"{node.op.name} {node.type} is not a {kind.__name__.lower()}, which the group was made for")
        return node, form

    def forget(self) -> None:
        """Drops remembered values: needed when `reduced` or `bound` change their answers."""
        self._memo.clear()

    def value(self, node: Node, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
        """The element of `node` at `index`; zero where `mask` is false, and then the index may be wild."""
        at = tuple(self.normal(lift(i)) for i in index)
        if mask is not None:
            mask = self.normal(mask)
            if mask.is_const:
                if not mask.attr:
                    return const(0, node.dtype)
                mask = None
        stack: list[tuple[Node, bool]] = [(node, False)]
        while stack:  # elementwise chains are walked here, so that their length costs no recursion
            n, ready = stack.pop()
            key = (n, at, mask)
            if key in self._memo:
                continue
            if self.bound is not None and (known := self.bound(n, at)) is not None:
                self._memo[key] = known if mask is None else select(mask, known, const(0, n.dtype))
                continue
            form = None if n in self.operand or is_constant(n) else self.lowering(n)
            if not ready and isinstance(form, Map) and form.elementwise:
                stack.append((n, True))
                stack += [(i, False) for i in n.inputs]
                continue
            self._memo[key] = self._value(n, form, at, mask)
        return self._memo[node, at, mask]

    def _value(self, node: Node, form: Lowering | None, at: tuple[Expr, ...], mask: Expr | None) -> Expr:
        if node in self.operand:
            return self._load(self.buffers[self.operand[node]], node, at, mask)
        if is_constant(node):
            return self._constant(node, at, mask)

        outer = mask

        def operand(k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
            both = outer if mask is None else mask if outer is None else binary("and", outer, mask)
            return self.value(node.inputs[k], index, both)

        if isinstance(form, Map):
            result = form.value(at, operand)
        elif isinstance(form, View):
            source = node.inputs[0]
            position = self.normal(flat_index(at, static_shape(node)))
            return self.value(source, unflatten(position, static_shape(source)), mask)
        elif isinstance(form, Reduce):
            found = None if self.reduced is None else self.reduced(node, form, at, mask)
            result = self.inlined(node, form, at, operand) if found is None else found
        else:
            raise self.unsupported(node, form)
        if result.dtype is not node.dtype:
            raise CompileError(f"{node.op.name}: its lowering gives {result.dtype} where its type is {node.type}")
        return result if mask is None else select(mask, result, const(0, node.dtype))

    def reader(self, node: Node) -> Load:
        """What a node's lowering calls for the elements of its operands."""

        def operand(k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
            return self.value(node.inputs[k], index, mask)

        return operand

    def unsupported(self, node: Node, form: Lowering | None) -> CompileError:
        names = {
            Attention: "whole attention",
            Contract: "contraction",
            Scan: "scan",
            Scatter: "scatter",
            Sort: "sort",
            Sparse: "sparse product",
            Coded: "product with coded weights",
            Structural: "structural",
        }
        what = names.get(type(form), type(form).__name__)
        return CompileError(f"{node.op.name} {node.type} is a {what} and cannot stand inside this fused region; leave it outside")

    def _load(self, buffer: Buffer, node: Node, at: tuple[Expr, ...], mask: Expr | None) -> Expr:
        return load(buffer, (self.normal(flat_index(at, static_shape(node))),), node.dtype, mask)

    def _constant(self, node: Node, at: tuple[Expr, ...], mask: Expr | None) -> Expr:
        if node not in self._immediate:
            self._immediate[node] = immediate(node)
        if (scalar := self._immediate[node]) is not None:
            return scalar if mask is None else select(mask, scalar, const(0, node.dtype))
        buffer = self.constants.get(node)
        if buffer is None:
            buffer = Buffer(f"k{len(self.constants)}", node.dtype, (size(node),), align=64, writable=False)
            self.constants[node] = buffer
        return self._load(buffer, node, at, mask)

    def inlined(
        self, node: Node, form: Reduce, at: tuple[Expr, ...], operand: Callable[..., Expr], limit: int = UNROLL_LIMIT
    ) -> Expr:
        """A small reduction as one expression, combined in row-major order. Raises CompileError if it is not small."""
        extents = [as_int(n) for n in form.extents]
        total = int(np.prod(extents, dtype=np.int64))
        if total > limit:
            raise CompileError(
                f"{node.op.name} {node.type} reduces {total} elements for each result and cannot be inlined into this fused "
                f"region (the limit is {limit}); leave it outside"
            )
        if form.kind in ("argmax", "argmin"):
            best, where = None, const(0, node.dtype)
            for position in range(total):
                r = unflatten(const(position), extents)
                v = form.value(at, r, operand)
                if best is None:
                    best = v
                    continue
                wins = better(form.kind, v, best)
                best, where = select(wins, v, best), select(wins, const(position, node.dtype), where)
            return where
        total_value: Expr | None = None
        for position in range(total):
            v = cast(form.value(at, unflatten(const(position), extents), operand), accumulator(node.dtype))
            total_value = v if total_value is None else combine(form.kind, total_value, v)
        return identity(form.kind, node.dtype) if total_value is None else cast(total_value, node.dtype)


def size(node: Node) -> int:
    """Number of elements."""
    return int(np.prod(static_shape(node), dtype=np.int64))


_COST: Final = {
    "exp": 14, "log": 18, "log1p": 24, "expm1": 16, "sin": 24, "cos": 24, "tanh": 20, "erf": 18, "sigmoid": 18, "pow": 50,
    "div": 6, "sqrt": 8, "floordiv": 20, "mod": 20,
}  # fmt: skip


def cost(roots: Sequence[Expr]) -> int:
    """About how many instructions the expressions take, loads and index arithmetic aside."""
    total = 0
    for e in postorder(roots):
        if e.op in ("const", "var", "load", "broadcast", "ramp"):
            continue
        total += _COST.get(e.op, 1)
    return total


def body_name(graph: Graph) -> str:
    """A readable name: what the body does, at most four ops."""
    names = [n.op.name for n in graph.nodes() if n not in graph.inputs and n.inputs]
    if len(names) > 4:
        names = names[:2] + ["etc"] + names[-1:]
    return "_".join(names) or "fill"


def lanes_for(target: Target, dtypes: Sequence[DType]) -> int:
    """Lanes that fill one register with the widest float at work (or the widest element where there is none)."""
    floats = [max(d.bits, 32) for d in dtypes if d.is_float]
    bits = max(floats) if floats else max((d.bits for d in dtypes), default=32)
    return max(1, target.vector_bits // max(bits, 8))
