"""The normal form of a contraction: loops with a stride in each *stream*, whatever the axes were called.

A stream is an affine function of the axes: the offset into A, B and C, into each operand the epilogue reads, and, where
the epilogue uses a position itself, the index of that dimension of C. Axes of extent 1 go into the base offsets; two
loops of one kind merge where the outer stride is the inner stride times the inner extent in every stream (the pixels of
a 1x1 convolution become one loop, and so do columns and channels of an NHWC window).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ...ir.contraction import Affine, Contraction
from ...ir.dims import as_int
from ...ir.dtypes import DType
from ...ir.errors import CompileError
from ...ir.expr import Expr, ExprLike, cast, const, load, postorder, substitute, var
from ..simplify_index import Simplifier
from .types import Epilogue, Operand

A: Final = 0
B: Final = 1
C: Final = 2
ACC: Final = "acc"


@dataclass(frozen=True, slots=True)
class Loop:
    """An axis after merging: its extent and its stride in every stream."""

    extent: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Read:
    """A load of the epilogue. `stream` is its offset's stream, or -1: then `expr` holds the flat offset over dim vars."""

    operand: int
    dtype: DType
    stream: int
    marker: Expr  # what stands for it in Nest.value
    flat: Expr | None = None
    mask: Expr | None = None


@dataclass(frozen=True)
class Nest:
    """free loops (of C) and reduction loops; per stream its base offset and the extent it spans.

    `value` is the epilogue as an expression of var ACC, of the markers of `reads`, and of the variables of `dims`
    (name, stream). `panel` > 0: B is packed, its stride in the n loop counts columns, and `panel_k` is the product K.

    `group`: columns come in groups, whose loop is none of `free`: a tile has the columns of its lanes in all of them. With
    `joined` the epilogue takes the sums of all groups, vars ACC0, ACC1, ..., and C has one group's columns; `more` are the
    streams and values of further outputs.
    """

    free: tuple[Loop, ...]
    reduce: tuple[Loop, ...]
    base: tuple[int, ...]
    spans: tuple[int, ...]
    value: Expr
    reads: tuple[Read, ...]
    dims: tuple[tuple[Expr, int], ...]
    read_spans: tuple[int, ...]  # elements of each epilogue operand
    panel: int
    panel_k: int
    panel_pairs: int  # B is packed in panels of pairs, of so many: its strides count parts of a pair until `paired`; or 0
    group: Loop | None
    joined: bool
    more: tuple[tuple[int, Expr], ...]
    pairs: tuple[int, int] | None  # elements of A and B are pairs along a reduction loop: how far apart (see `paired`)
    dtype: DType  # the sum's, as the epilogue sees it
    out: DType
    ways: int = 1  # elements of A and of B in what is multiplied at once: 2 of bf16, 4 bytes
    factors: str = ""  # of bytes: which of them are signed (`fma_integers`)

    @property
    def steps(self) -> int:
        """Multiply-adds for each element of C."""
        total = 1
        for loop in self.reduce:
            total *= loop.extent
        return total

    @property
    def cells(self) -> int:
        """Elements of C."""
        total = 1
        for loop in (*self.free, *((self.group,) if self.group else ())):
            total *= loop.extent
        return total

    @property
    def in_place(self) -> frozenset[int]:
        """Operands of the epilogue of which each element is read where, and right before, C's is written."""
        if self.joined:
            return frozenset()
        loops = [*self.free, *((self.group,) if self.group else ())]
        elsewhere = {
            r.operand
            for r in self.reads
            if r.stream < 0 or r.dtype is not self.out or any(x.strides[r.stream] != x.strides[C] for x in loops)
            or self.base[r.stream] != self.base[C]
        }  # fmt: skip
        return frozenset({r.operand for r in self.reads} - elsewhere)


def merge(loops: Sequence[Loop], streams: Sequence[int] | None = None) -> tuple[Loop, ...]:
    """Loops merged where they nest in the given streams (all by default); order of the result: outer first."""
    items = [x for x in loops if x.extent != 1]
    changed = True
    while changed:
        changed = False
        for i, outer in enumerate(items):
            for j, inner in enumerate(items):
                over = range(len(inner.strides)) if streams is None else streams
                if i != j and all(outer.strides[s] == inner.strides[s] * inner.extent for s in over):
                    items[j] = Loop(outer.extent * inner.extent, inner.strides)
                    del items[i]
                    changed = True
                    break
            if changed:
                break
    return tuple(items)


def _offset(maps: Sequence[Affine], strides: Sequence[int]) -> tuple[dict[str, int], int]:
    """Coefficient of each axis, and the constant, of a flat offset."""
    terms: dict[str, int] = {}
    constant = 0
    for index, stride in zip(maps, strides, strict=True):
        constant += index.constant * stride
        for name, c in index.terms:
            terms[name] = terms.get(name, 0) + c * stride
    return terms, constant


class _Streams:
    """Collects affine functions of the axes."""

    def __init__(self, extents: dict[str, int]) -> None:
        self.extents = extents
        self.terms: list[dict[str, int]] = []
        self.base: list[int] = []

    def add(self, terms: dict[str, int], constant: int) -> int:
        self.terms.append(terms)
        self.base.append(constant)
        return len(self.base) - 1

    def span(self, stream: int) -> int:
        """One more than the largest value, 0 if there is none; raises CompileError if it gets below zero."""
        terms, low = self.terms[stream], self.base[stream]
        if any(self.extents[name] == 0 for name in terms):
            return 0
        high = low
        for name, c in terms.items():
            reach = c * (self.extents[name] - 1)
            low, high = low + min(0, reach), high + max(0, reach)
        if low < 0:
            raise CompileError(f"contraction reads {-low} elements before the start of an operand: check the index maps")
        return high + 1


def _epilogue(
    spec: Contraction, epilogue: Epilogue | None, streams: _Streams, dtype: DType, out: DType, groups: int
) -> tuple[list[Expr], tuple[Read, ...], tuple[tuple[Expr, int], ...], dict[int, int]]:
    """Evaluates the epilogue once, with variables for the index, and sorts its loads into streams and general ones."""
    acc = var(ACC, dtype)
    c_index = tuple(var(f"c{d}") for d in range(len(spec.c)))
    if epilogue is None:
        return [cast(acc, out)], (), (), {}
    operands = epilogue.operands

    def load_operand(k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
        return load(k, index, operands[k].dtype, mask)

    if epilogue.grouped is not None:
        accs = tuple(var(f"{ACC}{g}", dtype) for g in range(groups))
        found = epilogue.grouped(accs, c_index, load_operand)
        values = [cast(v, t) for v, t in zip(found, (out, *(x.dtype for x in epilogue.more)), strict=True)]
    else:
        assert epilogue.value is not None
        values = [cast(epilogue.value(acc, c_index, load_operand), out)]
    axis_vars = {var(f"axis.{name}"): name for name in streams.extents}
    to_axes = {name: v for v, name in axis_vars.items()}
    as_axes: dict[Expr, Expr] = {}
    ranges: dict[Expr, tuple[int, int]] = {}
    for d, m in enumerate(spec.c):
        total: Expr = const(m.constant)
        low = high = m.constant
        for name, c in m.terms:
            total = total + to_axes[name] * c
            reach = c * (streams.extents[name] - 1)
            low, high = low + min(0, reach), high + max(0, reach)
        as_axes[c_index[d]] = total
        ranges[c_index[d]] = (low, high)
    axis_ranges = {v: (0, streams.extents[n] - 1) for v, n in axis_vars.items()}
    by_axis, by_dim = Simplifier(axis_ranges), Simplifier(ranges)
    reads: list[Read] = []
    spans: dict[int, int] = {}
    markers: dict[Expr, Expr] = {}
    for e in postorder(values):
        if e.op != "load":
            continue
        k, ndim = e.attr
        at, mask = e.args[:ndim], e.args[ndim] if len(e.args) > ndim else None
        if len(at) != len(operands[k].strides):
            raise CompileError(f"epilogue reads operand {k} with {len(at)} indices; it has {len(operands[k].strides)} dimensions")
        flat: Expr = const(0)
        for x, s in zip(at, operands[k].strides, strict=True):
            flat = flat + x * s
        if any(x.op == "load" for x in postorder([flat])):
            raise CompileError("an epilogue of a contraction cannot index an operand by another (gather): fuse it elsewhere")
        linear = by_axis.linear(substitute(flat, as_axes))
        marker = var(f"read{len(reads)}", e.dtype)
        if mask is None and all(a in axis_vars for a, _ in linear.terms):
            stream = streams.add({axis_vars[a]: c for a, c in linear.terms}, linear.constant)
            reads.append(Read(k, e.dtype, stream, marker))
            spans[k] = max(spans.get(k, 0), streams.span(stream))
        else:
            simple = by_dim.simplify(flat)
            _, high = by_dim.bounds(by_dim.linear(simple))
            reads.append(Read(k, e.dtype, -1, marker, simple, None if mask is None else by_dim.simplify(mask)))
            spans[k] = max(spans.get(k, 0), high + 1)
        markers[e] = marker
    memo: dict[Expr, Expr] = {}
    values = [substitute(v, markers, memo) for v in values]
    used: dict[Expr, None] = {}
    roots = [*values, *(x for r in reads for x in (r.flat, r.mask) if x is not None)]
    used.update((e, None) for e in postorder(roots) if e in as_axes)
    dims = []
    for e in used:
        d = c_index.index(e)
        m = spec.c[d]
        dims.append((e, streams.add(dict(m.terms), m.constant)))
    return values, tuple(reads), tuple(dims), spans


def canonical(spec: Contraction, a: Operand, b: Operand, c: Operand, epilogue: Epilogue | None) -> Nest:
    """The normal form of a contraction of operands that lie in memory as given.

    Raises CompileError where an index map leaves an operand at its start, or where B is packed in a way that the
    columns of C do not follow.
    """
    spec, group = spec.split_groups()
    extents = {x.name: as_int(x.extent) for x in spec.axes}
    streams = _Streams(extents)
    panel_k = 1
    joined = epilogue is not None and epilogue.grouped is not None
    if joined:
        if group is None:
            raise CompileError("an epilogue joins groups of columns, which this contraction has not: pack B in panels of them")
        last = Affine(tuple(t for t in spec.c[-1].terms if t[0] != group.name), spec.c[-1].constant)
        spec = replace(spec, c=(*spec.c[:-1], last))
    for name, operand, maps in (("A", a, spec.a), ("C", c, spec.c)):
        if len(operand.strides) != len(maps):
            raise CompileError(f"operand {name} of the contraction has {len(operand.strides)} strides, its index map {len(maps)}")
    streams.add(*_offset(spec.a, a.strides))
    if spec.panel:
        terms, panel_k = _packed_terms(spec, extents)
        streams.add(terms, 0)
    else:
        if len(b.strides) != len(spec.b):
            raise CompileError(f"operand B of the contraction has {len(b.strides)} strides, its index map {len(spec.b)}")
        streams.add(*_offset(spec.b, b.strides))
    terms, first = _offset(spec.c, c.strides)
    streams.add(terms, first + c.start)
    total = c.dtype if epilogue is None else epilogue.total or a.dtype
    groups = extents[group.name] if group is not None else 1
    values, reads, dims, read_spans = _epilogue(spec, epilogue, streams, total, c.dtype, groups)
    more = tuple((streams.add(*_offset(spec.c, c.strides)), v) for v in values[1:])
    spans = [streams.span(s) for s in range(3)]
    spans[C] = max(spans[C], c.span)
    if spec.panel:
        shape = [as_int(x) for x in spec.packed_shape(spec.panel)]
        spans[B] = 1
        for size in shape:
            spans[B] *= size

    def loops(kinds: Callable[[str], bool]) -> tuple[Loop, ...]:
        chosen = [x for x in spec.axes if kinds(x.kind) and x is not group]
        return tuple(Loop(extents[x.name], tuple(t.get(x.name, 0) for t in streams.terms)) for x in chosen)

    free: tuple[Loop, ...] = ()
    for kind in ("batch", "m", "n"):
        free += loops(lambda k, kind=kind: k == kind)  # type: ignore[misc]
    grouped: dict[tuple[bool, bool], list[Loop]] = {}
    for x in free:
        grouped.setdefault((x.strides[A] != 0, x.strides[B] != 0), []).append(x)
    merged: tuple[Loop, ...] = ()
    for key in ((True, True), (True, False), (False, True), (False, False)):
        merged += merge(grouped.get(key, []))
    count = 0 if epilogue is None else len(epilogue.operands)
    return Nest(
        free=merged,
        reduce=merge(loops(lambda k: k == "k")),
        base=tuple(streams.base),
        spans=tuple(spans),
        value=values[0],
        reads=reads,
        dims=dims,
        read_spans=tuple(read_spans.get(k, 0) for k in range(count)),
        panel=spec.panel,
        panel_k=panel_k,
        panel_pairs=spec.pairs,
        group=None if group is None else Loop(groups, tuple(t.get(group.name, 0) for t in streams.terms)),
        joined=joined,
        more=more,
        pairs=None,
        dtype=total,
        out=c.dtype,
    )


def paired(nest: Nest, ways: int = 2, factors: str = "") -> Nest | None:
    """The form of a contraction of bf16 whose steps are pairs of steps, each pair one f32's worth of bits; or of
    bytes, four in the bits of an i32.

    One reduction loop of even extent becomes half as long (for bytes all this with `ways` 4 in place of 2). Where an operand's
    pairs lie side by side, and all its strides are even, it is read as it lies, as an array of half as many f32 (`pairs` is 0
    for it, all strides are halved); otherwise they are brought together when it is packed (`pairs` is the stride from one to
    the other). None if no extent is even. Of a B in panels of pairs the loop is the one whose pairs those are.
    """
    even = [x for x in nest.reduce if x.extent % ways == 0 and (not nest.panel_pairs or x.strides[B] == nest.panel)]
    if not even:
        return None

    def direct(loop: Loop, stream: int) -> bool:
        if stream == B and nest.panel:
            return nest.panel_pairs == ways
        strides = [x.strides[stream] for x in (*nest.free, *nest.reduce) if x is not loop]
        whole = all(s % ways == 0 for s in (*strides, nest.base[stream], nest.spans[stream]))
        return loop.strides[stream] == 1 and whole

    chosen = max(even, key=lambda x: (direct(x, A) + direct(x, B), x.extent))
    halves = [direct(chosen, s) for s in (A, B)]

    def changed(x: Loop) -> Loop:
        strides = list(x.strides)
        for s in (A, B):
            if x is chosen:
                strides[s] *= ways
            if halves[s]:
                strides[s] //= ways
        return Loop(x.extent // ways if x is chosen else x.extent, tuple(strides))

    return replace(
        nest,
        free=tuple(map(changed, nest.free)),
        reduce=tuple(map(changed, nest.reduce)),
        group=None if nest.group is None else changed(nest.group),
        base=tuple(b // ways if s < C and halves[s] else b for s, b in enumerate(nest.base)),
        spans=tuple(n // ways if s < C and halves[s] else n for s, n in enumerate(nest.spans)),
        panel_k=nest.panel_k // ways if nest.panel_pairs else nest.panel_k,
        pairs=(0 if halves[A] else chosen.strides[A], 0 if halves[B] else chosen.strides[B]),
        ways=ways,
        factors=factors,
    )


def _packed_terms(spec: Contraction, extents: dict[str, int]) -> tuple[dict[str, int], int]:
    """B in panels: offsets of batch and k axes; an n axis counts columns (the generator turns them into panels).

    In panels of pairs a step of the reduction is half a step on, so that a column counts for two (in those of four bytes, four).
    """
    terms: dict[str, int] = {}
    columns = 1
    for x in reversed(spec.of_kind("n")):
        terms[x.name] = columns * (spec.pairs or 1)
        columns *= extents[x.name]
    step = spec.panel
    for x in reversed(spec.of_kind("k")):
        terms[x.name] = step
        step *= extents[x.name]
    k_total = step // spec.panel
    step *= (columns + spec.panel - 1) // spec.panel
    for x in reversed(spec.of_kind("batch")):
        terms[x.name] = step
        step *= extents[x.name]
    return terms, k_total
