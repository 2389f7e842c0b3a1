"""Contractions of dequantised bytes become contractions of bytes, and what follows them up to the next `quantize` their epilogue.

With x = (xq - zx) * sx, where sx and zx are numbers, and w = wq * sw, where sw runs along output channels:

    contract(x, w)               ->  cast(contract(xq, wq)) * M + D         M = sx * sw, D = -zx * sum_k wq * M; also of data w
    quantize(f(x), sy, zy)       ->  cast(round(f(x) / sy + zy))            where 1 / sy and zy go into the M and D of f's leaves
    move(dequantize(q))          ->  dequantize(move(q))                    padding with 0 becomes padding with zx
    max(dequantize(q))           ->  dequantize(max(q))
    scan(dequantize(q); f(x))    ->  scan(q; f(dequantize(x)))              where f multiplies x
    quantize(dequantize(q))      ->  q                                      of one scale and zero point
    contract over very long k    ->  the sum in f64 of contractions whose sums fit i32

f is made of sums, products by weights, relu and limits. Relu goes where saturation does the same. M and D depend on weights
alone: the prepare graph computes them. A rounding may go the other way than in the graph of floats, where a value is within
rounding errors of a half: what follows sees one step of the scale. Integer sums are exact. Where a graph has no contraction
that becomes one of bytes, it stays as it is, to the bit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.build import constant, full, input_node
from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import as_int
from ..ir.dtypes import DType, f32, f64, i8, i32, u8
from ..ir.graph import Graph, Node
from ..ir.graphs import closed, rebuild
from ..ir.lowering import Reduce
from ..ir.op import Trait, make
from ..ir.types import TensorType
from .bodies import has_control
from .bytes_by_four import thin_sums
from .contract import Context, Pass
from .contract_form import generic, merged_groups_apart, spec_of, swapped
from .facts import Facts, derived
from .fold_affine import Fixed, vector_of
from .labels import finish
from .loop_layers import loop_of
from .rewrite import use_counts

FEW: Final = 4  # channels in a group below which bytes have nothing to gain: four are multiplied at once
_MOST: Final = 2**31 - 1
_DEEP: Final = 24  # elementwise ops between a product and the quantisation of what is made of it


@dataclass(frozen=True)
class _Bytes:
    """A dequantised value: integers, and a scale and a zero point that are numbers or run along `axis`."""

    q: Node
    scale: Node
    zero: Node
    axis: int | None


@dataclass(frozen=True)
class _Product:
    """cast(acc) * m + d: a sum of products of bytes as numbers; m and d are thin, d None for 0."""

    acc: Node
    m: Node
    d: Node | None


@dataclass(frozen=True)
class Integers(Pass):
    """Integer arithmetic for graphs of quantize and dequantize nodes. `narrow`: whether groups of few channels, as those of
    depthwise convolutions, stay in bytes too; processors have vectors of floats for them, and their sums are as exact."""

    narrow: bool = False

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "contract_form"})
    budget: ClassVar[float] = 0.05  # a value on the edge of two steps of 255 may take the other, and so may what follows

    def apply(self, graph: Graph, ctx: Context) -> Graph:
        """`run` on bodies of loops, which get the bytes that their operands stand for, and then on the graph."""
        return super().apply(_carried_in(graph, ctx) if has_control(graph) else graph, ctx)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with products of bytes in place of products of what they stand for."""
        if not any(op.has(Trait.DEQUANTIZE) for op in graph.ops):
            return graph
        return _Integers(graph, ctx, self.narrow).run()


def _carried_in(graph: Graph, ctx: Context) -> Graph:
    """scan(move(dequantize(q)); f(x)) -> scan(move(q); f(dequantize(x))), where scale and zero point are known numbers and the
    body multiplies what it reads."""
    work = _Integers(graph, ctx)

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        new = node.replace(inputs)
        if new.inputs and (moved := work.moved(new)) is not None:
            return moved
        form = loop_of(new)
        if form is None:
            return new
        parts = [work.bytes_of(i) if k >= form.carries else None for k, i in enumerate(new.inputs)]
        parts = [p if p is not None and work.is_known(p) else None for p in parts]
        wanted = _multiplied(form.body, ctx.facts)
        taken = {i: p for i, p in zip(form.body.inputs, parts, strict=True) if p is not None and i in wanted}
        if not taken or not ctx.spend("carried_in", node):
            return new
        fresh = {i: input_node(f"bytes{k}", TensorType(p.q.dtype, i.shape)) for k, (i, p) in enumerate(taken.items())}
        inside = {i: make("dequantize", fresh[i], p.scale, p.zero, axis=None) for i, p in taken.items()}
        outputs = rebuild(form.body.outputs, inside)
        body = closed([fresh.get(i, i) for i in form.body.inputs], outputs, form.body.name, form.body.labels)
        held = (taken[i].q if i in taken else x for i, x in zip(form.body.inputs, new.inputs, strict=True))
        return new.replace(tuple(held), body=body)

    made = graph.map_nodes(rule)
    return graph if made is graph else finish(graph, made.outputs, made.labels)


def _multiplied(body: Graph, facts: Facts) -> set[Node]:
    """The inputs of a body that contractions read, through movements."""
    found: set[Node] = set()
    for n in reversed(body.nodes()):
        if n.inputs and (spec_of(n, facts) is not None or (n in found and n.op.has(Trait.MOVEMENT))):
            found |= set(n.inputs)
    return found & set(body.inputs)


class _Integers:
    def __init__(self, graph: Graph, ctx: Context, narrow: bool = False) -> None:
        self.graph, self.ctx, self.facts, self.narrow = graph, ctx, ctx.facts, narrow
        nodes = graph.nodes()
        self.fixed = Fixed(derived(nodes, ctx.weights(graph)), nodes)
        self.old_uses = use_counts(graph)
        self.uses: Counter[Node] = Counter()
        self.products: dict[Node, _Product] = {}
        self.found = False

    def run(self) -> Graph:
        """The graph in integers, or the graph itself if it has no product of bytes."""
        graph = self.graph.map_nodes(self._first)
        if not self.found:
            return self.graph
        graph = graph.map_nodes(self._plain)
        graph = finish(self.graph, graph.outputs, graph.labels)
        return merged_groups_apart(graph, self.ctx)

    def _first(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        new = node.replace(inputs)
        found = self._rewritten(new)
        self.uses[found] += self.old_uses[node]
        return found

    def _rewritten(self, node: Node) -> Node:
        if not node.inputs:
            return node
        for rule in (self._moved, self._product, self._quantized):
            found = rule(node)
            if found is not None:
                return found if self.ctx.spend(rule.__name__.strip("_"), node) else node
        return node

    # dequantised values

    def moved(self, node: Node) -> Node | None:
        """As the rule of that name."""
        return self._moved(node)

    def bytes_of(self, node: Node) -> _Bytes | None:
        """What a dequantised value stands for."""
        return self._bytes(node)

    def is_known(self, b: _Bytes) -> bool:
        """Whether scale and zero point are one number each, and known."""
        return b.axis is None and self.facts.value(b.scale) is not None and self.facts.value(b.zero) is not None

    def _bytes(self, node: Node) -> _Bytes | None:
        if not node.op.has(Trait.DEQUANTIZE) or node.inputs[0].dtype not in (i8, u8):
            return None
        q, scale, zero = node.inputs
        return _Bytes(q, scale, zero, node.attrs["axis"])

    def _moved(self, node: Node) -> Node | None:
        """move(dequantize(q)) -> dequantize(move(q)), where all that is moved has one scale and zero point; likewise max."""
        order = node.op.has(Trait.ORDER)
        if not order and not node.op.has(Trait.MOVEMENT):
            return None
        low = self.facts.lowering(node)
        if (order and not (isinstance(low, Reduce) and low.kind == "max")) or self.facts.replicates(node):
            return None
        data = [i for i in node.inputs if i.dtype is node.dtype]
        parts = [self._bytes(i) for i in data]
        first = parts[0] if parts else None
        if first is None or first.axis is not None or any(p is None for p in parts):
            return None
        if any((p.scale, p.zero, p.q.dtype) != (first.scale, first.zero, first.q.dtype) for p in parts if p is not None):
            return None
        scale, zero = self.facts.value(first.scale), self.facts.value(first.zero)
        if order and (scale is None or not scale > 0):
            return None
        attrs = dict(node.attrs)
        if "value" in attrs:
            if attrs["value"] != 0 or zero is None:
                return None
            attrs["value"] = float(zero)
        integers = {i: p.q for i, p in zip(data, parts, strict=True) if p is not None}
        moved = make(node.op, *(integers.get(i, i) for i in node.inputs), **attrs)
        return make(data[0].op, moved, first.scale, first.zero, axis=None)

    # products

    def _product(self, node: Node) -> Node | None:
        """contract(dequantize(xq), dequantize(wq)) -> cast(contract(xq, wq)) * M + D."""
        spec = spec_of(node, self.facts)
        if spec is None or spec.panel or node.dtype is not f32 or not all(isinstance(x.extent, int) for x in spec.axes):
            return None
        sides = [self._bytes(i) for i in node.inputs]
        a, b = sides
        if a is None or b is None:
            return None
        held = [s.q in self.fixed for s in (a, b)]
        if all(held):
            return None
        if not any(held):  # of two activations B is to be around 0
            held = [self.facts.value(s.zero) == 0 for s in (a, b)]
            held[0] = held[0] and not held[1]
        x, w = (b, a) if held[0] else (a, b)
        turned = swapped(spec) if held[0] else spec  # with the weights as B
        if x.axis is not None or (w.axis is None and w.scale.shape):
            return None
        if self.facts.value(w.zero) != 0:
            return None
        zero = self.facts.value(x.zero)
        scales = _along(w.scale, w.axis, turned)
        sums = None if zero == 0 else thin_sums(w.q, turned)
        if scales is None or (zero != 0 and sums is None):
            return None
        most = _largest(x.q.dtype, zero) * _largest(w.q.dtype, 0)
        few = not self.narrow and _few(turned)
        if few and most * as_int(turned.size("k")) >= 1 << 24:
            return None
        acc = self._sum(node, spec, a.q, b.q, most, few)
        if acc is None:
            return None
        fixed_scale = x.scale in self.fixed or self.facts.uniform(x.scale) is not None
        if not fixed_scale or (zero is None and x.zero not in self.fixed):
            return self._dynamic(node, acc, x, scales, sums)
        m = thin("mul", scales, x.scale)
        d = None
        if sums is not None:
            shift = thin("mul", _cast(sums, f32), _cast(x.zero, f32))
            d = make("neg", thin("mul", shift, m))
        product = _Product(acc, m, d)
        value = self._value(product, node, None, None)
        self.products[value], self.found = product, True
        return value

    def _sum(self, node: Node, spec: Contraction, a: Node, b: Node, most: int, few: bool) -> Node | None:
        """The sums of products of integers, exactly: in f32 or i32, or in f64 where they might not fit i32."""
        if few:
            return generic(node, _cast(a, f32), _cast(b, f32), spec)
        terms = as_int(spec.size("k"))
        if most * terms <= _MOST:
            return generic(node, a, b, spec)
        axis = max(spec.of_kind("k"), key=lambda x: as_int(x.extent))
        others = terms // as_int(axis.extent)
        step = _MOST // (most * others)
        if step < 1:
            return None
        total: Node | None = None
        for start in range(0, as_int(axis.extent), step):
            part = _from(spec, axis, start, min(step, as_int(axis.extent) - start))
            wide = _cast(generic(node, a, b, part), f64)
            total = wide if total is None else make("add", total, wide)
        return total

    def _dynamic(self, node: Node, acc: Node, x: _Bytes, scales: Node, sums: Node | None) -> Node:
        """The product where scale and zero point of x are known in a run only."""
        if sums is not None:
            shift = _spread(thin("mul", sums, _cast(x.zero, i32)), node)
            acc = make("sub", acc, _cast(shift, acc.dtype))
        value = make("mul", _cast(acc, f32), _spread(scales, node))
        value = make("mul", value, _spread(x.scale, node))
        self.found = True
        return value

    def _value(self, p: _Product, like: Node, r: Node | None, o: Node | None) -> Node:
        """(cast(acc) * m + d) * r + o in the shape of a node."""
        m = p.m if r is None else thin("mul", p.m, r)
        d = p.d if p.d is None or r is None else thin("mul", p.d, r)
        d = o if d is None else d if o is None else thin("add", d, o)
        y, factor = _cast(p.acc, f32), _spread(m, p.acc)
        return make("mul", y, factor) if d is None else make("multiply_add", y, factor, _spread(d, p.acc))

    # quantisation

    def _quantized(self, node: Node) -> Node | None:
        """quantize(f(x)) -> cast(round(f(x) / s + z)), with 1 / s and z in what scales and shifts f's leaves."""
        if not node.op.has(Trait.QUANTIZE) or node.attrs["axis"] is not None or node.dtype not in (i8, u8):
            return None
        x, scale, zero = node.inputs
        same = self._bytes(x)
        if same is not None and same.scale is scale and same.zero is zero and same.axis is None:
            return same.q
        s, z = self.facts.value(scale), self.facts.value(zero)
        if x.dtype is not f32 or s is None or z is None or not 2.0**-100 < s < 2.0**100:
            return None
        pooled = self._below_order(node)
        if pooled is not None:
            return pooled
        r, o = constant(1.0 / s, f32), None if z == 0 else constant(float(z), f32)
        found, whole = self._affine(x, r, o, _DEEP, least=-128 if node.dtype is i8 else 0)
        return _cast(make("round", found), node.dtype) if whole else None

    def _below_order(self, node: Node) -> Node | None:
        """quantize(clamp(max(y))) -> max(quantize(clamp(y))), if that comes of a product of bytes: a maximum of bytes then."""
        x, readers, limits = node.inputs[0], 1, list[tuple[float, bool]]()
        while self.uses[x] == readers and x.inputs and x.dtype is f32 and (bound := self._bounded(x)) is not None:
            x, limit, upper, readers = bound
            limits.append((limit, upper))
        low = self.facts.lowering(x) if x.op.has(Trait.ORDER) else None
        if not isinstance(low, Reduce) or low.kind != "max" or self.uses[x] != readers:
            return None
        y = x.inputs[0]
        for limit, upper in reversed(limits):
            y = make("minimum" if upper else "maximum", y, full(limit, y.tensor))
            self.uses[y] = 1
        found = self._quantized(node.replace((y, *node.inputs[1:])))
        return None if found is None else make(x.op, found, **x.attrs)

    def _affine(
        self, x: Node, r: Node, o: Node | None, depth: int, least: int | None = None, readers: int = 1
    ) -> tuple[Node, bool]:
        """x * r + o, for a thin r and o, and whether a product of bytes is among what x is made of. Results below `least` do not
        matter, if it is given; `readers` is how often x is used where nothing else uses it."""
        plain = make("mul", x, _spread(r, x))
        plain = plain if o is None else make("add", plain, _spread(o, x))
        found = self.products.get(x)
        if found is not None and self.uses[x] == readers:
            return self._value(found, x, r, o), True
        held = self._held(x)
        if held is not None:
            m, o = self._scaled(held, r, o)
            y = _cast(held.q, f32)
            return (make("mul", y, _spread(m, x)) if o is None else make("multiply_add", y, _spread(m, x), _spread(o, x))), True
        if depth == 0 or self.uses[x] != readers or x.dtype is not f32 or not x.inputs:
            return plain, found is not None
        form, positive = self.facts.form(x), (self.facts.value(r) or 0) > 0
        if form in ("add", "sub"):
            a, b = x.inputs
            shift_by = self._thin(b)
            if shift_by is not None:
                scaled = thin("mul", shift_by, r)
                scaled = make("neg", scaled) if form == "sub" else scaled
                return self._affine(a, r, scaled if o is None else thin("add", scaled, o), depth - 1, least)
            for q, rest in ((b, a), (a, b)) if form == "add" else ():
                held = self._held(q)
                if held is not None:
                    m, o = self._scaled(held, r, o)
                    y, _ = self._affine(rest, r, o, depth - 1)
                    return make("multiply_add", _cast(held.q, f32), _spread(m, x), y), True
            left, one = self._affine(a, r, o, depth - 1)
            right, two = self._affine(b, r, None, depth - 1)
            return (make(x.op, left, right), True) if one or two else (plain, False)
        if form == "mul" and (factor := self._thin(x.inputs[1])) is not None:
            y, whole = self._affine(x.inputs[0], thin("mul", factor, r), o, depth - 1)
            return (y, True) if whole else (plain, False)
        bound = self._bounded(x) if positive else None
        if bound is not None:
            inner, limit, upper, reads = bound
            level = limit * self.facts.value(r) + (0.0 if o is None else self.facts.value(o) or 0.0)
            constant_shift = o is None or self.facts.value(o) is not None
            if constant_shift:
                drop = least is not None and (level >= least + 255 if upper else level <= least)
                y, whole = self._affine(inner, r, o, depth - 1, least if not upper or drop else None, reads)
                if whole:
                    clamp = "minimum" if upper else "maximum"
                    return (y if drop else make(clamp, y, full(level, y.tensor))), True
        return plain, False

    def _held(self, x: Node) -> _Bytes | None:
        """x as bytes under a scale and a zero point that are numbers."""
        held = self._bytes(x)
        if held is None or held.axis is not None or held.scale not in self.fixed or held.zero not in self.fixed:
            return None
        return held

    def _scaled(self, held: _Bytes, r: Node, o: Node | None) -> tuple[Node, Node | None]:
        """The factor and the shift of bytes for held * r + o."""
        m = thin("mul", held.scale, r)
        if self.facts.value(held.zero) == 0:
            return m, o
        shift = thin("mul", _cast(held.zero, f32), m)
        return m, make("neg", shift) if o is None else thin("sub", o, shift)

    def _bounded(self, x: Node) -> tuple[Node, float, bool, int] | None:
        """(y, limit, whether from above, how often x reads y) where x = max(y, limit) or min(y, limit) for a number."""
        form = self.facts.form(x)
        if form in ("max", "min"):
            limit = self.facts.value(x.inputs[1])
            return None if limit is None else (x.inputs[0], float(limit), form == "min", 1)
        if form != "select":
            return None
        test, low, high = x.inputs  # relu as it is traced: where(y <= 0, 0, y)
        limit = self.facts.value(low)
        if limit is None or self.facts.form(test) not in ("le", "lt") or test.inputs != (high, low):
            return None
        return high, float(limit), False, 2

    def _thin(self, t: Node) -> Node | None:
        """t as a thin tensor, if it is a broadcast of weights or constants that is one."""
        if t.dtype is not f32:
            return None
        v = vector_of(t, self.fixed, self.facts)
        if v is None:
            return None
        if v.dimension is None:
            return v.node
        return make("reshape", v.node, shape=tuple(n if k == v.dimension else 1 for k, n in enumerate(t.shape)))

    # what is left in floats

    def _plain(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        """quantize and dequantize nodes that are left, as elementwise ops, which fuse with what is around them."""
        new = node.replace(inputs)
        if not new.inputs or not (new.op.has(Trait.QUANTIZE) or new.op.has(Trait.DEQUANTIZE)):
            return new
        x, scale, zero = new.inputs
        wide = new.dtype if new.op.has(Trait.DEQUANTIZE) else x.dtype
        if wide is not f32 or not (x.dtype.is_float or x.dtype.bits <= 16):
            return new
        axis = new.attrs["axis"]
        zeros = self.facts.value(zero) == 0
        if new.op.has(Trait.DEQUANTIZE):
            y = _cast(x, f32)
            y = y if zeros else make("sub", y, _over(_cast(zero, f32), y, axis))
            return make("mul", y, _over(scale, y, axis))
        s, z = self.facts.value(scale), self.facts.value(zero)
        if s is not None and z is not None and 2.0**-100 < s < 2.0**100:
            r = full(1.0 / s, x.tensor)
            y = make("mul", x, r) if zeros else make("multiply_add", x, r, full(float(z), x.tensor))
            return _cast(make("round", y), new.dtype)
        y = make("round", make("div", x, _over(scale, x, axis)))
        y = y if zeros else make("add", y, _over(_cast(zero, f32), y, axis))
        return _cast(y, new.dtype)


def _largest(dtype: DType, zero: object) -> int:
    """A bound of |q| and of |q - zero|."""
    if dtype is u8:
        return 255
    return 128 + (abs(int(zero)) if isinstance(zero, int) else 128)


def _few(spec: Contraction) -> bool:
    """Whether it has groups of so few channels that bytes gain nothing."""
    groups = {x.name for x in spec.of_kind("batch")}
    steps = {x.name: as_int(x.extent) for x in spec.of_kind("k")}
    for index in spec.a:
        names = {name for name, _ in index.terms}
        if names & groups:
            channels = 1
            for name in names & steps.keys():
                channels *= steps[name]
            if len(names & groups) == len(groups) and channels < FEW and _is_group(spec, groups):
                return True
    return False


def _is_group(spec: Contraction, groups: set[str]) -> bool:
    """Whether the batch axes share their dimension of B with the output channels, or stand alone in it, and no k axis is as long
    as channels of a product are: what is summed then are the taps of a kernel."""
    taps = 1
    for x in spec.of_kind("k"):
        taps *= as_int(x.extent)
    pixels = [m for m in spec.a if len(m.terms) > 1 and not {n for n, _ in m.terms} & groups]
    return bool(pixels) or taps < FEW


def _from(spec: Contraction, axis: Axis, start: int, extent: int) -> Contraction:
    """The part of a contraction whose axis runs over `extent` steps from `start`."""

    def moved(index: Affine) -> Affine:
        step = sum(c for name, c in index.terms if name == axis.name)
        return replace(index, constant=index.constant + step * start)

    axes = tuple(replace(x, extent=extent) if x is axis else x for x in spec.axes)
    return replace(spec, axes=axes, a=tuple(map(moved, spec.a)), b=tuple(map(moved, spec.b)))


def _along(scale: Node, axis: int | None, spec: Contraction) -> Node | None:
    """The scales of a dimension of B over the result: thin; None where they would vary along what is summed."""
    if axis is None:
        return scale
    index = spec.b[axis]
    terms = sorted(index.terms, key=lambda t: -t[1])
    extents = [as_int(spec.axis(name).extent) for name, _ in terms]
    size = 1
    for (_, c), extent in zip(reversed(terms), reversed(extents), strict=True):
        if c != size:
            return None
        size *= extent
    if index.constant or size != scale.shape[0]:
        return None
    place = {m.terms[0][0]: d for d, m in enumerate(spec.c)}
    if any(name not in place for name, _ in terms):
        return None
    where = [place[name] for name, _ in terms]
    if where != sorted(where):
        return None
    shape = [1] * len(spec.c)
    for d, extent in zip(where, extents, strict=True):
        shape[d] = extent
    return make("reshape", scale, shape=tuple(shape))


def thin(op: str, a: Node, b: Node) -> Node:
    """An elementwise op of two thin tensors: numbers, or of the rank of a result with size 1 where they do not vary."""
    rank = max(len(a.shape), len(b.shape))
    left, right = ((1,) * (rank - len(t.shape)) + t.shape for t in (a, b))
    shape = tuple(n if m == 1 else m for m, n in zip(left, right, strict=True))
    made = []
    for t, s in ((a, left), (b, right)):
        t = t if t.shape == s else make("reshape", t, shape=s)
        made.append(t if s == shape else make("broadcast_to", t, shape=shape))
    return make(op, *made)


def _spread(t: Node, like: Node) -> Node:
    return t if t.shape == like.shape else make("broadcast_to", t, shape=like.shape)


def _over(t: Node, x: Node, axis: int | None) -> Node:
    """A number or a vector along an axis, over x."""
    if axis is not None:
        t = make("reshape", t, shape=tuple(n if k == axis else 1 for k, n in enumerate(x.shape)))
    return _spread(t, x)


def _cast(x: Node, dtype: DType) -> Node:
    return x if x.dtype is dtype else make("cast", x, dtype=dtype)
