"""The first part of a net for a few images of a batch at a time, so that what lies between its layers stays in the caches.

    g(f(x)), x of 8 images   ->   g(reshape(scan(x in slices of 2; f(slice))))

f is a prefix of the graph in which every op treats the images each for itself; what it takes besides is the same for all and
stays outside the loop. Late layers, with small images and large weights, are better off with the whole batch. A model of the
traffic to memory says where to cut and how many images a slice has. Where there are many slices, the loop runs them on all
threads, each image from layer to layer on its own core, in the place of a fork and a join for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Final

from ..ir.build import get
from ..ir.dims import as_int, product
from ..ir.graph import Graph, Label, Node
from ..ir.graphs import closed, rebuild
from ..ir.op import make
from ..ir.ops.structural import CONSTANT
from ..ir.target import Target
from ..ir.types import TupleType
from .bodies import has_control
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts
from .images import fewer, separate, spread
from .labels import finish
from .winograd_parts import looped

# Of one core. Only ratios matter, and they are much alike on machines with wide vectors.
FLOPS_NS: Final = 110.0
SHARE: Final = 0.8  # of L2 that one kernel's operands and results may take to be found there by the next
SHARED: Final = 0.25  # ... of L3, which others use as well
RATES: Final = (60.0, 30.0, 12.0)  # bytes a nanosecond of activations: L2, L3, memory
WEIGHTS: Final = (30.0, 15.0)  # ... of weights, which are asked for ahead: L3, memory
OVERLAP: Final = 0.2  # part of the shorter of two things done at once that is seen
FORK_NS: Final = 8_000.0  # of both cores: a fork, a join, and a core that waits for the other
CALL_NS: Final = 300.0  # of a kernel without products, besides its traffic
ROWS: Final = 1.0  # rows of a product by which it is longer than its work is
LEAST_NS: Final = 200_000.0  # of all layers: in less, a loop on several threads costs what is gained
SAME: Final = 0.995  # of the best gain: what is as good, of which most layers are taken: the rest forks for each
NEAR: Final = 0.985  # ... of which the largest slices are taken: their products are longer
MANY: Final = 8  # slices from which on they run on all threads at once
GAIN: Final = 1.03  # by how much the model must say that it is faster


@dataclass(frozen=True)
class Layer:
    """What one kernel does for one image: bytes read and written, operations, rows of its product; and its weights' bytes."""

    node: Node
    traffic: int
    flops: int = 0
    rows: int = 1
    weights: int = 0


@dataclass(frozen=True)
class Prefix:
    """Nodes with images, in order; the batch; its inputs."""

    count: int
    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]


def prefix_of(graph: Graph, facts: Facts) -> Prefix | None:
    """Everything that treats the images of the data inputs each for itself, from the inputs on."""
    data = [i for i in graph.inputs if i.attrs["role"] == "data" and i.shape and isinstance(i.shape[0], int)]
    if not data or data[0].shape[0] < 2:  # type: ignore[operator]
        return None
    count = data[0].shape[0]
    assert isinstance(count, int)
    images = dict.fromkeys(i for i in data if i.shape[0] == count)
    inputs = tuple(images)
    nodes: list[Node] = []
    mixed: set[Node] = set()  # what may come from several images: it is not known before the loop
    for n in graph.nodes():
        moving = [k for k, i in enumerate(n.inputs) if i in images]
        if any(i in images or i in mixed for i in n.inputs):
            mixed.add(n)
        if not moving or any(i in mixed for i in n.inputs) or isinstance(n.type, TupleType) or not n.shape or n.shape[0] != count:
            continue
        if separate(n, moving, facts) and _with(n, {i: i for i in n.inputs if i in images}, count, facts) is not None:
            images[n] = None
            nodes.append(n)
            mixed.remove(n)
    return Prefix(count, inputs, tuple(nodes)) if nodes else None


def _with(node: Node, done: dict[Node, Node], count: int, facts: Facts) -> Node | None:
    """The node for `count` images: `done` has those of its operands that have images."""
    moving = [k for k, i in enumerate(node.inputs) if i in done]
    operands: list[Node] = []
    elementwise = spec_of(node, facts) is None and facts.elementwise(node)
    for i in node.inputs:
        new: Node | None = done.get(i, i)
        if i not in done and elementwise:
            new = spread(i, count, facts)
        if new is None:
            return None
        operands.append(new)
    return fewer(node, operands, moving, count, facts)


def layers(prefix: Prefix, facts: Facts) -> list[Layer]:
    """The kernels that the prefix will be, roughly: contractions, reductions and windows, each with what is fused to it."""
    found: list[Layer] = []
    images = {*prefix.inputs, *prefix.nodes}
    for n in prefix.nodes:
        moving = [i for i in n.inputs if i in images]
        each = sum(i.tensor.nbytes for i in moving) // prefix.count
        out = n.tensor.nbytes // prefix.count
        spec = spec_of(n, facts)
        if spec is not None:
            work = 2 * product([a.extent for a in spec.axes]) // prefix.count
            rows = as_int(spec.size("m")) // prefix.count or 1
            held = sum(i.tensor.nbytes for i in n.inputs if i not in images)
            found.append(Layer(n, each + out, as_int(work), rows, held))
        elif facts.kind(n) != "map":
            found.append(Layer(n, 0 if facts.kind(n) == "view" else each + out))
        else:
            more = each - max(i.tensor.nbytes for i in moving) // prefix.count if facts.elementwise(n) else 0
            found.append(Layer(n, more))
    return found


def _times(parts: Sequence[Layer], count: int, images: int, rate: float, target: Target) -> list[float]:
    """Nanoseconds of one core for the first 0, 1, ... layers done for `images` of `count` at a time, weights read at a rate."""
    slices = count // images
    each = [0.0]
    for p in parts:
        held = p.traffic * images
        level = 0 if held <= SHARE * target.l2 and slices >= MANY else 1 if held <= SHARED * target.l3 else 2
        product = p.flops * (images + ROWS / p.rows) / FLOPS_NS if p.flops else CALL_NS
        stream = p.weights / rate
        time = max(product, stream) + OVERLAP * min(product, stream) + held / RATES[level]
        each.append(each[-1] + time + (FORK_NS if p.flops and slices < MANY else 0.0))
    return [slices * t for t in each]


def _rate(weights: int, target: Target) -> float:
    """How fast weights of so many bytes in all are read again for each slice."""
    if weights <= SHARE / 2 * target.l2:
        return RATES[0]
    return WEIGHTS[0] if weights <= SHARED * target.l3 else WEIGHTS[1]


def choose(parts: Sequence[Layer], count: int, target: Target) -> tuple[int, int, float]:
    """(how many of the layers, images in a slice, by what factor all layers become faster); (0, 0, 1.0) for none."""
    together = _times(parts, count, count, WEIGHTS[1], target)
    whole = together[-1]
    none = (0, 0, 1.0)
    if whole < LEAST_NS or all(p.rows == 1 for p in parts):  # rows of a matrix are no images: one product is best whole
        return none
    found: list[tuple[int, int, float]] = []
    weights = [0, *accumulate(p.weights for p in parts)]
    rates = [_rate(w, target) for w in weights]
    for images in (k for k in range(1, count) if count % k == 0):
        each = [none]
        sliced = {rate: _times(parts, count, images, rate, target) for rate in set(rates)}
        for last in range(1, len(parts) + 1):
            if last == len(parts) or parts[last].flops:
                time = sliced[rates[last]][last] + whole - together[last]
                each.append((last, images, whole / time))
        most = max(c[2] for c in each)
        found.append(max((c for c in each if c[2] >= SAME * most), key=lambda c: c[0]))
    best = max(found, key=lambda c: c[2], default=none)
    many = best[1] and count // best[1] >= MANY
    near = [c for c in found if c[1] and c[2] >= NEAR * best[2] and (count // c[1] >= MANY) == many]
    return max(near, key=lambda c: c[1], default=best)


def rewrite(graph: Graph, prefix: Prefix, last: int, images: int, facts: Facts) -> Graph:
    """The graph with the first `last` nodes of the prefix in a loop over slices of `images`."""
    taken = prefix.nodes[:last]
    steps = prefix.count // images
    given = {
        i: make("input", name=f"slice{k}", role="data", dtype=i.dtype, shape=(images, *i.shape[1:]))
        for k, i in enumerate(prefix.inputs)
    }
    done = dict(given)
    for n in taken:
        new = _with(n, done, images, facts)
        assert new is not None
        done[n] = new
    inside = {*given, *taken}
    users = graph.users()
    results = [n for n in taken if n in graph.outputs or any(u not in inside for u in users[n])]
    labels = {**graph.labels, **{done[n]: graph.labels[n] for n in taken if n in graph.labels}}
    made = {*done.values()}
    fixed: dict[Node, None] = {}  # what the loop takes besides, the same for every slice
    stack = [done[n] for n in results]
    seen = set(stack)
    while stack:
        for i in stack.pop().inputs:
            if i in seen:
                continue
            seen.add(i)
            if i in made or facts.replicates(i):  # to repeat a value is no work, and fuses
                stack.append(i)
            elif i.op is not CONSTANT or i.shape:
                fixed[i] = None
    sequences = [i for i in prefix.inputs if given[i] in seen]
    body = closed([*(given[i] for i in sequences), *fixed], [done[n] for n in results], "images", labels)
    operands = [make("reshape", i, shape=(steps, images, *i.shape[1:])) for i in sequences]
    loop = looped(body, [*operands, *fixed], steps, len(sequences))
    after = {n: make("reshape", get(loop, k), shape=n.shape) for k, n in enumerate(results)}
    outputs = rebuild(graph.outputs, after)
    return finish(graph, outputs, {**graph.labels, **_moved(graph, after)})


def _moved(graph: Graph, after: Mapping[Node, Node]) -> dict[Node, Label]:
    """The labels of nodes above what is in the loop now."""
    labels: dict[Node, Label] = {}
    done = dict(after)
    for n in graph.nodes():
        if n not in done:
            done[n] = n.replace(tuple(done[i] for i in n.inputs))
            if n in graph.labels:
                labels.setdefault(done[n], graph.labels[n])
    return labels


def _has_pixels(graph: Graph, facts: Facts) -> bool:
    """Whether some product has more rows than the batch of its images, which `choose` asks for."""
    for n in graph.nodes():
        spec = spec_of(n, facts)
        if spec is not None and n.shape and spec.size("m") != n.shape[0]:
            return True
    return False


@dataclass(frozen=True)
class Slices(Pass):
    """Slices where the model expects `gain`; or of `images` for the first `last` nodes. Nothing without a target."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "contract_form"})
    gain: float = GAIN
    images: int = 0
    last: int = 0

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with its first layers in a loop over slices of the batch."""
        if ctx.target is None or has_control(graph) or ctx.invariants or graph.aliases:
            return graph
        if not self.images and not _has_pixels(graph, ctx.facts):
            return graph
        prefix = prefix_of(graph, ctx.facts)
        if prefix is None:
            return graph
        last, images = self.last, self.images
        if not images:
            last, images, gain = choose(layers(prefix, ctx.facts), prefix.count, ctx.target)
            if gain < self.gain:
                return graph
        last = min(last, len(prefix.nodes))
        if not last or prefix.count % images or not ctx.spend("slices", prefix.nodes[last - 1]):
            return graph
        return rewrite(graph, prefix, last, images, ctx.facts)
