"""Winograd's convolution where a model of its cost says that it is faster: fewer multiplications for more additions and traffic.

    contract(x, k; y[n, i, j, o] = sum over h, w, c of x[n, i + h, j + w, c] * k[o, c, h, w])       3x3 taps, stride 1
        ->  A'(contract(B' x B, G k G'; m[p, q, n, ty, tx, o] = sum over c of v[p, q, n, ty, tx, c] * u[p, q, c, o]))A

with output tiles of 4x4 (36 products in the place of 144) or 2x2 (16 in the place of 36); the transforms are in
`ir/ops/winograd.py`. The data gradient is the same convolution with the taps reversed, so it is found as well.

What depends on weights alone goes into the prepare graph in inference. Several images become a loop over blocks of them
without carries, so that what lies between the transforms stays in the cache. Where weights change and their transform is large,
output channels are done in turns instead. The gradient for the weights is another file's, `winograd_gradient.py`.

It errs more than the sum itself (`BUDGET`), and an infinity or a NaN in x spoils the whole of the tiles that it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.build import get, input_node
from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import as_int
from ..ir.dtypes import f32
from ..ir.graph import Graph, Node
from ..ir.op import Trait, make
from ..ir.target import Target
from ..ir.types import TensorType
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts, derived
from .rewrite import Miss, Outcome, Rule, apply_rules, rule_on
from .whole_numbers import whole
from .winograd_gradient import choose_gradient, gradient_of, rewrite_gradient
from .winograd_parts import (
    CACHED,
    CHANNELS,
    FAR,
    FLOPS_NS,
    ROWS,
    SMALL,
    STREAM,
    TAPS,
    TILES,
    TRANSFORM,
    divided,
    looped,
    padded,
    plain,
    products,
    source,
    tap,
    turns,
)

BUDGET: Final = 1e-5  # of a layer, max|error| / max|result|: twice what was measured on the layers of ResNet-18 and -50
LEAST: Final = 500_000  # operations of a layer that is worth it: in fewer, two more kernels cost what is gained
GRADIENT: Final = 40  # ... by which that is multiplied for the gradient of weights
GAIN: Final = 1.15  # by how much the model must say that it is faster: what it does not know may cost the difference


@dataclass(frozen=True)
class Convolution:
    """A contraction that is a 3x3 convolution: its sizes, how B lies, and whether its taps run backwards."""

    n: int
    height: int
    width: int
    c: int
    o: int
    order: tuple[int, int, int, int]  # the dimensions of B that are c, h, w, o
    reverse: bool

    @property
    def flops(self) -> int:
        return 2 * TAPS * TAPS * self.n * self.height * self.width * self.c * self.o


def convolution_of(spec: Contraction) -> Convolution | None:
    """The contraction as a 3x3 convolution of stride 1 in NHWC; None for any other."""
    if spec.panel or len(spec.a) != 4 or len(spec.b) != 4 or len(spec.c) != 4:
        return None
    names = [plain(x) for x in spec.c]
    if None in names or [spec.axis(x).kind for x in names if x] != ["m", "m", "m", "n"] or len(set(names)) != 4:
        return None
    n, y, x, o = names
    rest = {a.name for a in spec.axes} - set(names)
    c = plain(spec.a[3])
    if len(rest) != 3 or plain(spec.a[0]) != n or c not in rest or any(not isinstance(a.extent, int) for a in spec.axes):
        return None
    h, w = tap(spec.a[1], y), tap(spec.a[2], x)
    if {c, h, w} != rest or any(spec.axis(t).extent != TAPS for t in (h, w) if t):
        return None
    where: dict[str, tuple[int, Affine]] = {}
    for k, index in enumerate(spec.b):
        if len(index.terms) == 1:
            where[index.terms[0][0]] = (k, index)
    assert c and h and w and o and n and y and x
    if where.keys() != {c, h, w, o} or plain(where[c][1]) is None or plain(where[o][1]) is None:
        return None
    forward = [plain(where[t][1]) is not None for t in (h, w)]
    backward = [where[t][1] == Affine(((t, -1),), TAPS - 1) for t in (h, w)]
    if not all(forward) and not all(backward):
        return None
    sizes = [as_int(spec.axis(t).extent) for t in (n, y, x, c, o)]
    order = (where[c][0], where[h][0], where[w][0], where[o][0])
    return Convolution(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], order, not all(forward))


@dataclass(frozen=True)
class Choice:
    """A tile size, images in a block (0: all, without a loop), and how much faster the model expects it to be."""

    tile: int
    images: int
    gain: float


def choose(conv: Convolution, target: Target, fixed: bool) -> Choice | None:
    """The best way by the model; None where channels are too few. `fixed`: the weights are transformed beforehand."""
    if min(conv.c, conv.o) < CHANNELS or not target.fma:
        return None
    direct = conv.flops / FLOPS_NS
    options = [
        Choice(tile, images, direct / _time(conv, tile, images, target, fixed)) for tile in TILES for images in _blocks(conv.n)
    ]
    return max(options, key=lambda o: o.gain)


def _blocks(n: int) -> list[int]:
    return [0, *(g for g in range(1, n) if n % g == 0)]


def _time(conv: Convolution, tile: int, images: int, target: Target, fixed: bool) -> float:
    """Nanoseconds on one core."""
    points = (tile + 2) ** 2
    block = images or conv.n
    tiles = block * -(-conv.height // tile) * -(-conv.width // tile)
    blocks = conv.n // block
    products = 2 * points * tiles * conv.c * conv.o / FLOPS_NS * (1 + ROWS / tiles)
    weights = 4 * points * conv.c * conv.o
    between = 4 * points * tiles * (conv.c + conv.o)
    inside = between <= 1.25 * target.l2
    stream = weights / (SMALL if weights <= target.l2 / 2 else STREAM if weights <= target.l3 / 2 else FAR)
    if blocks > 1 and weights <= target.l2 / 2:
        stream = 0.0
    each = max(products, stream) + 0.2 * min(products, stream) + 2 * between / (CACHED if inside else FAR)
    outside = 4 * conv.height * conv.width * conv.n * (2 * conv.o if images else 0) / FAR  # what follows is a kernel of its own
    once = 0.0 if fixed else weights / TRANSFORM
    return blocks * each + outside + once


def rewrite(node: Node, conv: Convolution, choice: Choice, ctx: Context, fixed: bool) -> Node:
    """The node as Winograd's convolution. `fixed`: the weights are transformed beforehand."""
    m, a = choice.tile, choice.tile + 2
    x, low, high = source(node.inputs[0])
    rows, columns = -(-conv.height // m), -(-conv.width // m)
    for d, n in ((1, rows), (2, columns)):
        high[d] = n * m + TAPS - 1 - low[d] - as_int(x.shape[d])
    if min(high) < 0:  # more of x than is read
        stops = [as_int(n) + min(0, h) for n, h in zip(x.shape, high, strict=True)]
        x, high = make("slice", x, starts=(0,) * 4, stops=tuple(stops), steps=(1,) * 4), [max(0, h) for h in high]
    images = choice.images or conv.n
    parts = 1 if fixed or choice.images else turns(4 * a * a * conv.c * conv.o, conv.o)
    outputs = conv.o // parts
    pixels = (Axis("n", images, "m"), Axis("y", rows, "m"), Axis("x", columns, "m"))
    spec = products(m, (*pixels, Axis("o", outputs, "n"), Axis("c", conv.c, "k")), "nyxc", "co", "nyxo")
    panel = 0
    if ctx.preferred_panel is not None and ctx.target is not None:
        panel = ctx.preferred_panel(spec, ctx.target, f32)
        if panel <= 0 or outputs % panel:
            panel = 0
    if panel:
        spec = spec.packed(panel, (a, a, conv.c, outputs))

    def weights(k: Node) -> Node:
        if conv.order != (0, 1, 2, 3):
            k = make("transpose", k, perm=conv.order)
        return make("winograd_weight", k, tile=m, reverse=conv.reverse, panel=panel)

    def back(v: Node, u: Node) -> Node:
        return make("winograd_output", make("contract", v, u, spec=spec), tile=m, size=(conv.height, conv.width))

    def tiles(x: Node) -> Node:
        return make("winograd_input", padded(x, low, high), tile=m)

    k = node.inputs[1]
    if parts > 1:
        k = divided(k, conv.order[3], parts)
        v = tiles(x)
        p0, p1 = (input_node(f"p{i}", TensorType(f32, s)) for i, s in enumerate((k.shape[1:], v.shape)))
        made = get(looped(Graph((p0, p1), (back(p1, weights(p0)),), name="channels"), [k, v], parts, 1), 0)
        return make("reshape", make("transpose", made, perm=(1, 2, 3, 0, 4)), shape=node.shape)
    if not choice.images:
        return back(tiles(x), weights(k))
    u, shape = weights(k), (conv.n // images, images, *x.shape[1:])
    p0, p1 = (input_node(f"p{i}", TensorType(f32, s)) for i, s in enumerate((shape[1:], u.shape)))
    body = Graph((p0, p1), (back(tiles(p0), p1),), name="tiles")
    count = conv.n // images
    return make("reshape", get(looped(body, [make("reshape", x, shape=shape), u], count, 1), 0), shape=node.shape)


def _rule(fixed: frozenset[Node], ctx: Context, asked: Winograd) -> Rule:
    @rule_on("contract")
    def winograd(node: Node, facts: Facts) -> Outcome:
        """contract(x, k; a 3x3 convolution) -> A'(contract(B' x B, G k G'))A: the same sum over the reals."""
        spec = spec_of(node, facts)
        if spec is None or "spec" not in node.attrs or spec.panel:
            return Miss("not an unpacked contract node", node)
        if node.dtype is not f32 or any(i.dtype is not f32 for i in node.inputs):
            return Miss("not of f32", node)
        if ctx.target is None:
            return Miss("no target is given", node)
        if all(whole(i, facts) for i in node.inputs):
            return Miss("it sums integers, which is exact as it stands", node)
        conv = convolution_of(spec)
        if conv is None:
            return _gradient(node, spec, ctx.target)
        choice = choose(conv, ctx.target, node.inputs[1] in fixed)
        if choice is None or conv.flops < asked.least or choice.gain < asked.gain:
            return Miss("the direct sum is as fast", node)
        return rewrite(node, conv, choice, ctx, node.inputs[1] in fixed)

    def _gradient(node: Node, spec: Contraction, target: Target) -> Outcome:
        found = gradient_of(spec)
        if found is None:
            return Miss("no 3x3 convolution of stride 1 with channels last, nor the gradient of its weights", node)
        blocks = choose_gradient(found, target)
        if blocks is None or found.flops < GRADIENT * asked.least or blocks.gain < asked.gain:
            return Miss("the direct sum is as fast", node)
        return rewrite_gradient(node, found, blocks)

    return winograd


def _once(before: Node, after: Node, facts: Facts) -> bool:
    """The order: direct 3x3 convolutions and gradients of their weights."""
    spec = spec_of(before, facts)
    if spec is None or "spec" in after.attrs:
        return False
    return convolution_of(spec) is not None or gradient_of(spec) is not None


@dataclass(frozen=True)
class Winograd(Pass):
    """3x3 convolutions by Winograd's method where that is faster; nothing without a target.

    `least` is the number of operations from which a layer is looked at, `gain` how much faster the model must say that it is.
    Without `prepare`, weights change from run to run, and to transform them counts.
    """

    least: int = LEAST
    gain: float = GAIN
    prepare: bool = True
    kind: ClassVar[str] = "equivalent"
    budget: ClassVar[float] = BUDGET
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with its large 3x3 convolutions replaced."""
        if ctx.target is None or not any(spec_of(n, ctx.facts) for n in graph.nodes() if n.op.has(Trait.CONTRACTION)):
            return graph
        fixed = frozenset(derived(graph.nodes(), ctx.weights(graph) if self.prepare else ctx.invariants))
        return apply_rules(graph, [_rule(fixed, ctx, self)], ctx, _once)
