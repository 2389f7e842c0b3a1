"""The gradient of a convolution for its image, which is also transposed convolution, without multiplying by zeros.

    dx[n, p, q, c] = sum over h, w, o of  dy[n, (p - h*d) / s, (q - w*d) / s, o] * k[o, c, h, w]   where both divide

With a stride s, the pixels p of one remainder modulo s (a phase) meet the same taps, so dx is s*s small convolutions of dy
whose results interleave. (Spreading dy by s - 1 zeros and convolving once would be s*s times the work.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from ..contraction import Affine, Axis, Contraction, affine
from ..dims import Dim, as_int
from ..graph import Node
from ..op import make
from ..types import TensorType
from . import common as c
from .conv_geometry import Geometry, channel_of, group_axis, image, join, of_input_grad, split, taps_of


def input_grad(node: Node) -> Node:
    """The decomposition of `conv2d_input_grad`."""
    g = of_input_grad([x.tensor for x in node.inputs], node.attrs)
    if 0 in (g.n, *g.out, *g.size):
        return c.full(0.0, node.tensor)  # nothing to add up, or nowhere to put it
    even = all(s == 1 or (d == 1 and as_int(k) % s == 0) for s, d, k in zip(g.stride, g.dilation, g.kernel, strict=True))
    return _interleaved_columns(node, g) if even and g.stride != (1, 1) else _interleaved_phases(node, g)


@dataclass(frozen=True)
class _Phase:
    """The pixels p = stride * t + phase of one dimension of dx, t = 0, 1, ...: each is a sum over j < taps of

    dy[t + low + j * dilation] * k[first + (taps - 1 - j) * step]
    """

    low: int
    taps: int
    first: int
    step: int
    dilation: int


def _phases(g: Geometry, d: int) -> list[_Phase]:
    """The phases of dimension d. Tap h meets pixel p where P = p + padding, P - h * dilation = i * stride for some i.

    With P = stride * t + r, the taps of remainder r are those with h * dilation = r modulo stride, every
    (stride / gcd)-th from the first on, each of them dilation / gcd pixels of dy before the last.
    """
    stride, dilation, kernel, before = g.stride[d], g.dilation[d], as_int(g.kernel[d]), g.padding[d][0]
    shared = gcd(stride, dilation)
    step, apart = stride // shared, dilation // shared
    found = []
    for phase in range(stride):
        quotient, r = divmod(phase + before, stride)
        first = next((h for h in range(min(step, kernel)) if h * dilation % stride == r), kernel)
        taps = len(range(first, kernel, step))
        newest = quotient - (first * dilation - r) // stride
        found.append(_Phase(newest - (taps - 1) * apart, taps, first, step, apart))
    return found


def _backward_phase(g: Geometry, y: _Phase, x: _Phase, border: tuple[int, int], size: tuple[Dim, Dim]) -> Contraction:
    """z (dy with `border` pixels before it), k -> the pixels of dx of one phase in each dimension: r and q have extent 1."""
    pixels = (Axis("n", g.n, "m"), Axis("y", size[0], "m"), Axis("x", size[1], "m"))
    phases = [Axis(name, 1, "m") for name in _phase_names(g)]
    rows, columns = (
        affine(name, *([phase] if s > 1 else []), (tap, p.dilation), constant=p.low + b)
        for name, phase, tap, p, s, b in zip("yx", "rq", "hw", (y, x), g.stride, border, strict=True)
    )
    taps = tuple(affine((name, -p.step), constant=p.first + (p.taps - 1) * p.step) for name, p in (("h", y), ("w", x)))
    small = replace(g, kernel=(y.taps, x.taps))
    return Contraction(
        (*group_axis(g), *pixels, *phases, Axis("c", g.c, "n"), *taps_of(small, Axis("o", g.o, "k"))),
        image(g, channel_of("o", g.o, g), rows, columns),
        (channel_of("o", g.o, g), affine("c"), *taps),
        _interleaved(g),
    )


def _backward_even(g: Geometry, border: tuple[int, int], first: tuple[int, int], count: tuple[Dim, Dim]) -> Contraction:
    """All phases at once, where each has as many taps: they are columns, and C holds them interleaved.

    dx[stride * t + r - padding] is a sum over j of dy[t - (taps - 1) + j] * k[r + stride * (taps - 1 - j)], `count` of the t
    from `first` on.
    """
    taps = [as_int(k) // s if s > 1 else as_int(k) for k, s in zip(g.kernel, g.stride, strict=True)]
    pixels = (Axis("n", g.n, "m"), Axis("y", count[0], "m"), Axis("x", count[1], "m"))
    phases = [Axis(name, s, "n") for name, s in zip("rq", g.stride, strict=True) if s > 1]
    apart = [1 if s > 1 else d for s, d in zip(g.stride, g.dilation, strict=True)]
    rows, columns = (
        affine(p, (h, a), constant=f - (n - 1) * a + b)
        for p, h, a, f, n, b in zip("yx", "hw", apart, first, taps, border, strict=True)
    )
    kernel = [
        affine(*([phase] if s > 1 else []), (h, -s), constant=s * (n - 1))
        for phase, h, s, n in zip("rq", "hw", g.stride, taps, strict=True)
    ]
    small = replace(g, kernel=(taps[0], taps[1]))
    return Contraction(
        (*group_axis(g), *pixels, *phases, Axis("c", g.c, "n"), *taps_of(small, Axis("o", g.o, "k"))),
        image(g, channel_of("o", g.o, g), rows, columns),
        (channel_of("o", g.o, g), affine("c"), *kernel),
        _interleaved(g),
    )


def _bordered(dy: Node, g: Geometry, low: Sequence[int], last: Sequence[Dim]) -> tuple[Node, tuple[int, int]]:
    """dy with zeros around it, so that it holds pixels `low` to `last` of each dimension; and how many stand before it."""
    before = [max(0, -at) for at in low]
    after: list[Dim] = []
    for at, out in zip(last, g.out, strict=True):
        missing = at - (out - 1)
        after.append(max(0, missing) if isinstance(missing, int) else missing)
    lows, highs = join(0, 0, before[0], before[1], g.layout), join(0, 0, after[0], after[1], g.layout)
    if any(lows) or any(h != 0 for h in highs):
        dy = make("pad", dy, low=lows, high=highs, interior=(0, 0, 0, 0), value=0.0)
    return dy, (before[0], before[1])


def _interleaved_columns(node: Node, g: Geometry) -> Node:
    """The contraction of all phases, then what padding had added cut off."""
    taps = [as_int(k) // s if s > 1 else as_int(k) for k, s in zip(g.kernel, g.stride, strict=True)]
    apart = [1 if s > 1 else d for s, d in zip(g.stride, g.dilation, strict=True)]
    first = [pad[0] // s for pad, s in zip(g.padding, g.stride, strict=True)]
    stop = [(pad[0] + size - 1) // s + 1 for pad, size, s in zip(g.padding, g.size, g.stride, strict=True)]
    count = [b - a for a, b in zip(first, stop, strict=True)]
    low = [a - (n - 1) * d for a, n, d in zip(first, taps, apart, strict=True)]
    z, border = _bordered(node.inputs[0], g, low, [b - 1 for b in stop])
    spec = _backward_even(g, border, (first[0], first[1]), (count[0], count[1]))
    sizes = [n * s for n, s in zip(count, g.stride, strict=True)]
    channels = g.c * g.groups
    whole = c.reshaped(make("contract", z, node.inputs[1], spec=spec), join(g.n, channels, sizes[0], sizes[1], g.layout))
    starts = [pad[0] - a * s for pad, a, s in zip(g.padding, first, g.stride, strict=True)]
    stops = [a + size for a, size in zip(starts, g.size, strict=True)]
    return _cut(whole, g, starts, stops)


def _interleaved_phases(node: Node, g: Geometry) -> Node:
    """A contraction for each phase of both dimensions that has taps; their results side by side, zeros for the others."""
    rows, columns = _phases(g, 0), _phases(g, 1)
    size = [(n + s - 1) // s for n, s in zip(g.size, g.stride, strict=True)]  # of a phase, the longest
    used = [[p for p in phases if p.taps] for phases in (rows, columns)]
    low = [min(p.low for p in phases) for phases in used]
    last = [n - 1 + max(p.low + (p.taps - 1) * p.dilation for p in phases) for n, phases in zip(size, used, strict=True)]
    z, border = _bordered(node.inputs[0], g, low, last)

    def part(y: _Phase, x: _Phase, size: Sequence[Dim]) -> Node:
        spec = _backward_phase(g, y, x, border, (size[0], size[1]))
        if y.taps and x.taps:
            return make("contract", z, node.inputs[1], spec=spec)
        extent = {a.name: a.extent for a in spec.axes}
        return c.full(0.0, TensorType(node.dtype, tuple(extent[m.terms[0][0]] for m in spec.c)))

    channels = g.c * g.groups
    if len(used[0]) == len(used[1]) == 1:
        at = [p.index(u[0]) for p, u in zip((rows, columns), used, strict=True)]
        exact = [(n - k + s - 1) // s for n, k, s in zip(g.size, at, g.stride, strict=True)]
        if 0 in exact:
            return c.full(0.0, node.tensor)  # an image smaller than the stride, no pixel of which is met
        one = c.reshaped(part(used[0][0], used[1][0], exact), join(g.n, channels, exact[0], exact[1], g.layout))
        return _spread(one, g, at, exact)

    def stacked(parts: Sequence[Node], name: str) -> Node:
        return parts[0] if len(parts) == 1 else make("concat", *parts, axis=_interleaved(g).index(affine(name)))

    whole = stacked([stacked([part(y, x, size) for x in columns], "q") for y in rows], "r")
    height, width = (n * s for n, s in zip(size, g.stride, strict=True))
    return _cut(c.reshaped(whole, join(g.n, channels, height, width, g.layout)), g, (0, 0), g.size)


def _spread(x: Node, g: Geometry, phase: Sequence[int], size: Sequence[Dim]) -> Node:
    """The one phase that has taps, with zeros between its pixels: a 1x1 kernel meets every s-th pixel only."""
    if g.stride == (1, 1):
        return x
    rest = [n - (at + (count - 1) * s + 1) for n, at, count, s in zip(g.size, phase, size, g.stride, strict=True)]
    lows, highs = join(0, 0, phase[0], phase[1], g.layout), join(0, 0, rest[0], rest[1], g.layout)
    interior = join(0, 0, g.stride[0] - 1, g.stride[1] - 1, g.layout)
    return make("pad", x, low=lows, high=highs, interior=interior, value=0.0)


def _cut(x: Node, g: Geometry, starts: Sequence[Dim], stops: Sequence[Dim]) -> Node:
    """Pixels `starts` to `stops` of both dimensions of an image."""
    n, channels, height, width = split(x.shape, g.layout)
    if all(a == 0 for a in starts) and tuple(stops) == (height, width):
        return x
    low, high = join(0, 0, starts[0], starts[1], g.layout), join(n, channels, stops[0], stops[1], g.layout)
    return make("slice", x, starts=low, stops=high, steps=(1, 1, 1, 1))


def _phase_names(g: Geometry) -> list[str]:
    """The axes of phases: r of rows, q of columns, where the stride makes any."""
    return [name for name, s in zip("rq", g.stride, strict=True) if s > 1]


def _interleaved(g: Geometry) -> tuple[Affine, ...]:
    """The index of dx with each pixel dimension followed by that of its phase, and the group before the channel."""
    group, phases = () if g.groups == 1 else ("g",), _phase_names(g)
    pixels = [name for pixel, phase in (("y", "r"), ("x", "q")) for name in (pixel, phase) if name == pixel or phase in phases]
    return tuple(map(affine, ("n", *group, "c", *pixels) if g.layout == "NCHW" else ("n", *pixels, *group, "c")))
