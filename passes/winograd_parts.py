"""What Winograd's form of convolutions and that of their weight gradients share: costs, index maps, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..ir.contraction import Affine, Axis, Contraction, affine
from ..ir.graph import Graph, Node
from ..ir.op import make
from ..ir.padding import padding_of

TILES: Final = (4, 2)
TAPS: Final = 3
CHANNELS: Final = 16

# Of one core. Only ratios matter, and they are much alike on machines with wide vectors.
FLOPS_NS: Final = 110.0
CACHED: Final = 40.0  # bytes a nanosecond to and from L2
FAR: Final = 15.0  # ... beyond
STREAM: Final = 30.0  # ... of panels that are asked for ahead
SMALL: Final = 60.0  # ... of panels that take half of L2 at most
TRANSFORM: Final = 15.0  # ... written by the transform of weights
ROWS: Final = 1.0  # rows of a product by which a block's products are longer than its work is
PIECE: Final = 12 << 20  # bytes of transformed weights (or of their gradient) from which channels are done in turns


def plain(index: Affine) -> str | None:
    """The axis that an index is, if it is one as it stands."""
    return index.terms[0][0] if len(index.terms) == 1 and index.terms[0][1] == 1 and index.constant == 0 else None


def tap(index: Affine, pixel: str | None) -> str | None:
    """The axis t of an index pixel + t."""
    if index.constant or len(index.terms) != 2 or any(k != 1 for _, k in index.terms):
        return None
    others = [name for name, _ in index.terms if name != pixel]
    return others[0] if len(others) == 1 else None


def source(a: Node) -> tuple[Node, list[int], list[int]]:
    """What a padding by zeros pads, and by how much at both ends of each dimension; anything else is padded by nothing."""
    p = padding_of(a)
    if p is not None and p.value == 0 and not (p.low[0] or p.high[0] or p.low[3] or p.high[3]):
        return a.inputs[0], list(p.low), list(p.high)
    return a, [0] * 4, [0] * 4


def padded(x: Node, low: list[int], high: list[int]) -> Node:
    """x with zeros around; x itself where there are none."""
    if not any((*low, *high)):
        return x
    return make("pad", x, low=tuple(low), high=tuple(high), interior=(0, 0, 0, 0), value=0.0)


def looped(body: Graph, operands: list[Node], length: int, sequences: int, carries: int = 0) -> Node:
    """A loop over the leading axis of `sequences` of its operands; those before are carried, those behind stay as they are."""
    return make("scan", *operands, body=body, length=length, carries=carries, sequences=sequences)


def divided(x: Node, axis: int, parts: int) -> Node:
    """x[..., parts * k, ...] with that axis split and its parts in front: [parts, ..., k, ...]."""
    shape = x.tensor.static_shape
    x = make("reshape", x, shape=(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :]))
    if axis == 0:
        return x
    return make("transpose", x, perm=(axis, *(k for k in range(len(shape) + 1) if k != axis)))


def turns(nbytes: int, channels: int) -> int:
    """In how many turns channels are done so that what is transformed at once stays below PIECE; whole vectors each."""
    for n in (1, 2, 4, 8):
        if nbytes <= n * PIECE and channels % (n * CHANNELS) == 0:
            return n
    return 1


def products(tile: int, axes: Sequence[Axis], a: str, b: str, c: str) -> Contraction:
    """(tile + 2)^2 matrix products over these axes; `a`, `b`, `c` name the axes of the dimensions after the first two."""
    both = (Axis("p", tile + 2, "batch"), Axis("q", tile + 2, "batch"))

    def index(names: str) -> tuple[Affine, ...]:
        return tuple(affine(name) for name in f"pq{names}")

    return Contraction((*both, *axes), index(a), index(b), index(c))
