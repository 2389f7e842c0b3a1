"""The gradient for the weights of a 3x3 convolution by Winograd's method.

    contract(x, dy; g[c, h, w, o] = sum over n, i, j of x[n, i + h, j + w, c] * dy[n, i, j, o])      3x3 taps, stride 1
        ->  G'(contract(B' x B, A dy A'; s[p, q, c, o] = sum over n, ty, tx of v[p, q, n, ty, tx, c] * d[p, q, n, ty, tx, o]))G

A convolution is bilinear in image and weights, and its gradient for the weights is the same form with the roles changed: it takes
as few products, 36 (or 16) in the place of 144 (36) a tile, and the transposes of the transforms.

The sum over images becomes a loop over blocks that carries it, so that what is between the transforms stays near; where the sums
themselves are large, input channels are done in turns.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.build import full, get, input_node
from ..ir.contraction import Axis, Contraction
from ..ir.dims import as_int
from ..ir.dtypes import f32
from ..ir.graph import Graph, Node
from ..ir.op import make
from ..ir.target import Target
from ..ir.types import TensorType
from .winograd_parts import (
    CACHED,
    CHANNELS,
    FAR,
    FLOPS_NS,
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


@dataclass(frozen=True)
class WeightGradient:
    """A contraction that is the gradient for 3x3 weights: its sizes, which operand is the image, and C's order of dimensions.

    `height` and `width` are those of dy; `order[k]` is which of c, h, w, o dimension k of the result is.
    """

    n: int
    height: int
    width: int
    c: int
    o: int
    image: int
    order: tuple[int, int, int, int]

    @property
    def flops(self) -> int:
        return 2 * TAPS * TAPS * self.n * self.height * self.width * self.c * self.o


@dataclass(frozen=True)
class Blocks:
    """A tile size, images in a block (all of them: no loop), and how much faster the model expects it to be."""

    tile: int
    images: int
    gain: float


def gradient_of(spec: Contraction) -> WeightGradient | None:
    """The contraction as the gradient for the weights of a 3x3 convolution of stride 1 in NHWC; None for any other."""
    if spec.panel or len(spec.a) != 4 or len(spec.b) != 4 or len(spec.c) != 4:
        return None
    result = [plain(x) for x in spec.c]
    if None in result or len(set(result)) != 4 or any(not isinstance(a.extent, int) for a in spec.axes) or len(spec.axes) != 7:
        return None
    for image, (x, dy) in enumerate(((spec.a, spec.b), (spec.b, spec.a))):
        n, i, j, o = (plain(t) for t in dy)
        c = plain(x[3])
        if None in (n, i, j, o, c) or plain(x[0]) != n or {n, i, j} & set(result):
            continue
        h, w = tap(x[1], i), tap(x[2], j)
        if {c, h, w, o} != set(result) or any(spec.axis(t).extent != TAPS for t in (h, w) if t):
            continue
        sizes = [as_int(spec.axis(t).extent) for t in (n, i, j, c, o) if t]
        places = [(c, h, w, o).index(t) for t in result]
        return WeightGradient(
            sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], image, (places[0], places[1], places[2], places[3])
        )
    return None


def choose_gradient(g: WeightGradient, target: Target) -> Blocks | None:
    """The best way by the model; None where channels are too few."""
    if min(g.c, g.o) < CHANNELS or not target.fma:
        return None
    direct = g.flops / FLOPS_NS
    options = [
        Blocks(tile, images, direct / _time(g, tile, images, target))
        for tile in TILES
        for images in range(1, g.n + 1)
        if g.n % images == 0
    ]
    return max(options, key=lambda b: b.gain, default=None)


def _time(g: WeightGradient, tile: int, images: int, target: Target) -> float:
    """Nanoseconds on one core."""
    points, blocks = (tile + 2) ** 2, g.n // images
    tiles = images * -(-g.height // tile) * -(-g.width // tile)
    work = 2 * points * tiles * g.c * g.o / FLOPS_NS
    between, sums = 4 * points * tiles * (g.c + g.o), 4 * points * g.c * g.o
    near = between <= target.l3 / 4
    moved = 2 * between / (CACHED / 2 if near else FAR)
    carried = (0 if blocks == 1 else 2 * sums / (CACHED if sums <= target.l2 else FAR)) + 2_000  # ... and a fork and join or two
    return blocks * (work + moved + carried) + sums / TRANSFORM


def rewrite_gradient(node: Node, g: WeightGradient, blocks: Blocks) -> Node:
    """The node by Winograd's method."""
    m, a = blocks.tile, blocks.tile + 2
    x, low, high = source(node.inputs[g.image])
    rows, columns = -(-g.height // m), -(-g.width // m)
    high[1] += rows * m - g.height
    high[2] += columns * m - g.width
    dy, more = node.inputs[1 - g.image], [0, rows * m - g.height, columns * m - g.width, 0]
    parts = turns(4 * a * a * g.c * g.o, g.c) if blocks.images == g.n else 1
    c = g.c // parts
    tiles = (Axis("n", blocks.images, "k"), Axis("y", rows, "k"), Axis("x", columns, "k"))
    spec = products(m, (Axis("c", c, "m"), Axis("o", g.o, "n"), *tiles), "nyxc", "nyxo", "co")

    def images(x: Node) -> Node:
        return make("winograd_input", padded(x, low, high), tile=m)

    def gradients(dy: Node) -> Node:
        return make("winograd_spread", padded(dy, [0] * 4, more), tile=m)

    def inputs(*shapes: tuple[object, ...]) -> list[Node]:
        return [input_node(f"p{k}", TensorType(f32, s)) for k, s in enumerate(shapes)]  # type: ignore[arg-type]

    if parts > 1:
        d, turned = gradients(dy), divided(padded(x, low, high), 3, parts)
        p0, p1 = inputs(turned.shape[1:], d.shape)
        each = make("contract", make("winograd_input", p0, tile=m), p1, spec=spec)
        body = Graph((p0, p1), (make("winograd_gather", each, tile=m),), name="channels")
        made = make("reshape", get(looped(body, [turned, d], parts, 1), 0), shape=(g.c, TAPS, TAPS, g.o))
    elif blocks.images == g.n:
        made = make("winograd_gather", make("contract", images(x), gradients(dy), spec=spec), tile=m)
    else:
        count = g.n // blocks.images
        xs, ys = (make("reshape", t, shape=(count, blocks.images, *t.shape[1:])) for t in (x, dy))
        zeros = full(0.0, TensorType(f32, (a, a, g.c, g.o)))
        p0, p1, p2 = inputs(zeros.shape, xs.shape[1:], ys.shape[1:])
        added = make("add", p0, make("contract", images(p1), gradients(p2), spec=spec))
        made = get(looped(Graph((p0, p1, p2), (added,), name="sum"), [zeros, xs, ys], count, 2, 1), 0)
        made = make("winograd_gather", made, tile=m)
    return made if g.order == (0, 1, 2, 3) else make("transpose", made, perm=g.order)
