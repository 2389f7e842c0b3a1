"""Depthwise convolutions and their input gradients as the op `depthwise`, which has code of its own: vectors along channels.

    contract(pad(x), k; y[n, i, j, g] = sum over h, w of x[n, i*s + h*d + c, j*s' + w*d' + c', g] * k[g, h, w])
        ->  depthwise(x, k' [h, w, g])

The padding becomes pixels of a known value, so that no padded copy is made; a cast from bytes is left to the op, which reads the
bytes. k' is a small movement of weights, which the prepare graph does once in inference. A dimension of x or y that stands
elsewhere is transposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import as_int
from ..ir.dtypes import f32, f64, i8, u8
from ..ir.graph import Graph, Node
from ..ir.op import Trait, make
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts
from .pack_weights import matrix
from .rewrite import Miss, Outcome, apply_rules, rule_on


@dataclass(frozen=True)
class _Line:
    """One dimension of the image: the pixel of tap t of output i is stride * i + dilation * t + origin."""

    out: Axis | None
    tap: Axis | None
    stride: int
    dilation: int
    origin: int

    @property
    def size(self) -> int:
        return 1 if self.out is None else as_int(self.out.extent)

    @property
    def taps(self) -> int:
        return 1 if self.tap is None else as_int(self.tap.extent)


def _whole(line: _Line | None, size: object, low: int) -> bool:
    """Whether a dimension of A is read as it is, element by element."""
    plain = line is not None and line.tap is None and line.stride == 1
    return plain and line is not None and (line.size, line.origin, low) == (size, 0, 0)


def _terms(index: Affine, spec: Contraction) -> list[tuple[Axis, int]]:
    return [(spec.axis(name), c) for name, c in index.terms if spec.axis(name).extent != 1]


def _line(index: Affine, spec: Contraction) -> _Line | None:
    """The dimension of A with this index, if it has at most one axis of C and one that is summed, both walked forwards."""
    out, tap, stride, dilation = None, None, 1, 1
    for axis, c in _terms(index, spec):
        if c < 1 or (axis.kind == "k" and tap is not None) or (axis.kind != "k" and out is not None):
            return None
        if axis.kind == "k":
            tap, dilation = axis, c
        elif axis.kind == "m":
            out, stride = axis, c
        else:
            return None
    return _Line(out, tap, stride, dilation, index.constant)


def _unpadded(x: Node, facts: Facts) -> tuple[Node, tuple[int, ...], float]:
    """What a padding pads, how many elements it puts before each dimension, and of which value; of an image of bytes under the
    cast to f32, if it is one. (A padding with -0 is left alone: the sum of nothing but outside is 0.)"""
    scalar = facts.scalar(x) if x.inputs else None
    if scalar is not None and scalar.op == "cast" and x.inputs[0].dtype in (i8, u8):
        x = x.inputs[0]
    attrs = x.attrs
    nothing = (x, (0,) * len(x.shape), 0.0)
    if not (x.inputs and x.op.has(Trait.MOVEMENT) and {"low", "high", "interior", "value"} <= set(attrs)):
        return nothing
    value = float(attrs["value"])
    whole = x.dtype in (i8, u8) or (value == 0 and math.copysign(1.0, value) > 0)
    plain = whole and not any(attrs["interior"]) and all(isinstance(n, int) for n in attrs["low"])
    return (x.inputs[0], tuple(as_int(n) for n in attrs["low"]), value) if plain else nothing


def _transposed(x: Node, order: Sequence[int]) -> Node:
    return x if list(order) == list(range(len(order))) else make("transpose", x, perm=tuple(order))


@rule_on("contract")
def to_depthwise(node: Node, facts: Facts) -> Outcome:
    """contract(pad(x), k) -> depthwise(x, k') where it is one (see the module)."""
    spec = spec_of(node, facts)
    if spec is None or spec.panel or "spec" not in node.attrs:
        return Miss("not an unpacked contract node", node)
    if node.dtype not in (f32, f64) or any(i.dtype is not node.dtype for i in node.inputs):
        return Miss("not of one floating type", node)
    if not all(isinstance(x.extent, int) and x.extent > 0 for x in spec.axes) or len(node.inputs[0].shape) != 4:
        return Miss("sizes are not known, or A is no image", node)
    channels = [x for x in spec.of_kind("batch") if x.extent != 1]
    if len(channels) != 1 or any(x.extent != 1 for x in spec.of_kind("n")):
        return Miss("not each channel for itself", node)
    (g,) = channels
    x, low, fill = _unpadded(node.inputs[0], facts)
    lines = [_line(m, spec) for m in spec.a]
    at = [d for d, m in enumerate(spec.a) if _terms(m, spec) == [(g, 1)] and m.constant == low[d] == 0]
    if len(at) != 1 or x.shape[at[0]] != g.extent:
        return Miss("the channels are no dimension of A of their own", node)
    others = [d for d in range(4) if d != at[0]]
    chosen = [lines[d] for d in others]
    if any(line is None for line in chosen):
        return Miss("a dimension of A is no line of pixels", node)
    # The batch of images is a dimension without taps, read as it is; the outermost such one.
    batch = next((k for k, d in enumerate(others) if _whole(lines[d], x.shape[d], low[d])), None)
    if batch is None:
        return Miss("A has no dimension of images", node)
    order = [others[batch], *(d for k, d in enumerate(others) if k != batch), at[0]]
    n, rows, columns = (lines[d] for d in order[:3])
    assert n is not None and rows is not None and columns is not None
    summed = [a for a in spec.of_kind("k") if a.extent != 1]
    if {a.name for a in summed} != {a.name for a in (rows.tap, columns.tap) if a is not None}:
        return Miss("something else than taps is summed", node)
    result = [a for m in spec.c for a, _ in _terms(m, spec)]
    made = [a for a in (n.out, rows.out, columns.out, g) if a is not None]
    if sorted(a.name for a in result) != sorted(a.name for a in made):
        return Miss("C has other axes", node)
    weights = matrix(node.inputs[1], spec)
    if weights is None:
        return Miss("B is indexed in a way that has no plain order", node.inputs[1])
    k = make("reshape", weights, shape=(g.extent, *(a.extent for a in summed)))
    if summed == [columns.tap, rows.tap]:
        k = make("transpose", k, perm=(0, 2, 1))
    k = make("transpose", make("reshape", k, shape=(g.extent, rows.taps * columns.taps)), perm=(1, 0))
    k = make("reshape", k, shape=(rows.taps, columns.taps, g.extent))
    y = make(
        "depthwise",
        _transposed(x, order),
        k,
        size=(rows.size, columns.size),
        stride=(rows.stride, columns.stride),
        dilation=(rows.dilation, columns.dilation),
        origin=(rows.origin - low[order[1]], columns.origin - low[order[2]]),
        fill=fill,
    )
    if [a.name for a in result] != [a.name for a in made]:
        y = make("reshape", y, shape=tuple(a.extent for a in made))
        y = make("transpose", y, perm=tuple([m.name for m in made].index(a.name) for a in result))
    return y if y.shape == node.shape else make("reshape", y, shape=node.shape)


def _fewer(before: Node, after: Node, facts: Facts) -> bool:
    """The order: fewer contractions."""
    return spec_of(before, facts) is not None and spec_of(after, facts) is None


@dataclass(frozen=True)
class Depthwise(Pass):
    """Depthwise convolutions in a form of their own."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with `depthwise` nodes."""
        if not any("spec" in n.attrs for n in graph.nodes()):
            return graph
        return apply_rules(graph, (to_depthwise,), ctx, _fewer)
