"""The transforms of Winograd's convolution and of its weight gradient, F(m x m, 3 x 3) with m = 2 or 4, channels last.

A convolution of stride 1 with 3x3 weights g over tiles d of (m + 2) x (m + 2) pixels, which overlap by 2 (Lavin and Gray 2016):

    U = G g G'        winograd_weight   [C, 3, 3, O]  -> [a, a, C, O]               a = m + 2
    V = B' d B        winograd_input    [n, h, w, C]  -> [a, a, n, h / m, w / m, C] h, w: those of y, whole tiles
    M = V * U         a * a matrix products over the channels
    y = A' M A        winograd_output   [a, a, n, h / m, w / m, O] -> [n, h, w, O]

The gradient for g is the same bilinear form read the other way, so that its transforms are transposes of these:

    D = A dy A'       winograd_spread   [n, h, w, O]  -> [a, a, n, h / m, w / m, O] h, w: whole tiles
    S = V * D         a * a matrix products over the tiles of all images
    dg = G' S G       winograd_gather   [a, a, C, O]  -> [C, 3, 3, O]

The points of interpolation are 0, +-1 and infinity for m = 2; 0, +-sqrt(1/2), +-sqrt(2) and infinity for m = 4, which err less
than the usual 0, +-1, +-2: products of the transforms' largest entries are smaller (Barabasz et al. 2020 on such choices).
The passes make these ops once gradients are expanded: they have none of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..dtypes import DType, f32
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, const, eq, fma, select
from ..graph import Attrs, Node
from ..lowering import Load, Map
from ..op import REQUIRED, Array, NotDifferentiable, Op, Sample, register
from ..types import TensorType, Type
from . import common as c

TAPS: Final = 3
POINTS: Final = {2: (1.0, 0.0), 4: (math.sqrt(0.5), math.sqrt(2.0))}
Fma = Callable[[float, Any, Any], Any]
"""c * x + y for a number c."""


def _fma(scale: float, x: Any, y: Any) -> Any:
    if isinstance(x, Expr):
        return fma(const(scale, x.dtype), x, y)
    return scale * x + y


def weight_line(m: int, g: Sequence[Any]) -> list[Any]:
    """G g for one line of three taps."""
    p, q = POINTS[m]
    points = [0.0, p, -p] + ([q, -q] if m == 4 else [])
    rows: list[Any] = []
    for t in points:
        scale = 1.0 / math.prod(t - u for u in points if u != t)
        if t == 0.0:
            rows.append(g[0] * scale)
        elif t > 0.0:  # -t has the same scale, as the points lie symmetrically
            even = _fma(t * t * scale, g[2], g[0] * scale)
            rows += [_fma(t * scale, g[1], even), _fma(-t * scale, g[1], even)]
    return [*rows, g[2]]


def input_line(m: int, x: Sequence[Any]) -> list[Any]:
    """B' x for one line of m + 2 pixels."""
    p, q = POINTS[m]
    pp, qq = p * p, q * q
    if m == 2:
        return [x[2] - x[0], x[1] + x[2], x[2] - x[1], x[3] - x[1]]
    even, odd = _fma(-qq, x[2], x[4]), _fma(-qq, x[1], x[3])
    even2, odd2 = _fma(-pp, x[2], x[4]), _fma(-pp, x[1], x[3])
    first, last = _fma(-(pp + qq), x[2], x[0] + x[4]), _fma(-(pp + qq), x[3], x[1] + x[5])
    return [first, _fma(p, odd, even), _fma(-p, odd, even), _fma(q, odd2, even2), _fma(-q, odd2, even2), last]


def output_line(m: int, x: Sequence[Any]) -> list[Any]:
    """A' x for one line of m + 2 products."""
    p, q = POINTS[m]
    s, d = x[1] + x[2], x[1] - x[2]
    if m == 2:
        return [x[0] + s, d + x[3]]
    s2, d2 = x[3] + x[4], x[3] - x[4]
    return [x[0] + s + s2, _fma(p, d, d2 * q), _fma(p * p, s, s2 * (q * q)), _fma(p**3, d, _fma(q**3, d2, x[5]))]


def spread_line(m: int, y: Sequence[Any]) -> list[Any]:
    """A y for one line of m pixels: the polynomial with these coefficients at the points."""
    p, q = POINTS[m]
    if m == 2:
        return [y[0], y[0] + y[1], y[0] - y[1], y[1]]
    rows = [y[0]]
    for t in (p, q):
        even, odd = _fma(t * t, y[2], y[0]), _fma(t**3, y[3], y[1] * t)
        rows += [even + odd, even - odd]
    return [*rows, y[3]]


def gather_line(m: int, u: Sequence[Any]) -> list[Any]:
    """G' u for one line of m + 2 sums."""
    points = [0.0, *(s * t for t in POINTS[m][: m // 2] for s in (1, -1))]
    scales = [1.0 / math.prod(t - o for o in points if o != t) for t in points]
    taps = [u[0] * scales[0], None, u[m + 1]]
    for k in range(1, m, 2):  # t and -t have the same scale
        t, scale = points[k], scales[k]
        s, d = u[k] + u[k + 1], u[k] - u[k + 1]
        taps = [
            _fma(scale, s, taps[0]),
            d * (t * scale) if taps[1] is None else _fma(t * scale, d, taps[1]),
            _fma(t * t * scale, s, taps[2]),
        ]
    return taps


def both_ways(line: Callable[[int, Sequence[Any]], list[Any]], m: int, x: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """A line's transform applied to the columns of x[i][j], then to the rows."""
    columns = [line(m, [row[j] for row in x]) for j in range(len(x[0]))]
    return [line(m, [column[i] for column in columns]) for i in range(len(columns[0]))]


def _choose(index: Expr, values: Sequence[Expr]) -> Expr:
    """values[index]."""
    result = values[-1]
    for k in range(len(values) - 2, -1, -1):
        result = select(eq(index, const(k)), values[k], result)
    return result


def _pick(i: Expr, j: Expr, table: Sequence[Sequence[Expr]]) -> Expr:
    return _choose(i, [_choose(j, row) for row in table])


# --- winograd_weight ------------------------------------------------------------------------------------------------


def _tile(op: str, attrs: Attrs) -> int:
    m = attrs["tile"]
    if m not in POINTS or isinstance(m, bool):
        raise AttributeValueError(f"tile of {op} is 2 or 4, not {m!r}")
    return int(m)


def _float(op: str, types: Sequence[TensorType]) -> DType:
    if types[0].dtype is not f32:
        raise DTypeError(f"operand 0 of {op} has dtype {types[0].dtype}, expected f32")
    return types[0].dtype


def _weight_type(types: Sequence[TensorType], attrs: Attrs) -> Type:
    m, (k,) = _tile("winograd_weight", attrs), types
    if len(k.shape) != 4 or k.shape[1:3] != (TAPS, TAPS):
        raise ShapeError(f"operand 0 of winograd_weight has shape {c.show(k.shape)}, expected [C, 3, 3, O]")
    channels, _, _, outputs = c.static(k.shape)
    panel, backwards = attrs["panel"], attrs["reverse"]
    if isinstance(panel, bool) or not isinstance(panel, int) or panel < 0 or (panel and outputs % panel):
        raise AttributeValueError(f"panel of winograd_weight is 0 or divides the {outputs} output channels, not {panel!r}")
    if not isinstance(backwards, bool):
        raise AttributeValueError(f"reverse of winograd_weight is true or false, not {backwards!r}")
    shape = (outputs // panel, channels, panel) if panel else (channels, outputs)
    return TensorType(_float("winograd_weight", types), (m + 2, m + 2, *shape))


def _weight_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    (k,), panel = arrays, attrs["panel"]
    taps = k.transpose(1, 2, 0, 3)
    if attrs["reverse"]:
        taps = taps[::-1, ::-1]
    with np.errstate(all="ignore"):
        u = np.array(both_ways(weight_line, attrs["tile"], list(taps))).astype(k.dtype)
    if panel:
        u = u.reshape(*u.shape[:3], u.shape[3] // panel, panel).swapaxes(2, 3)
    return np.ascontiguousarray(u)


def _weight_lower(node: Node) -> Map:
    m, panel, backwards = node.attrs["tile"], node.attrs["panel"], node.attrs["reverse"]

    def value(at: tuple[Expr, ...], load: Load) -> Expr:
        channel, output = (at[3], at[2] * panel + at[4]) if panel else (at[2], at[3])
        order = range(TAPS - 1, -1, -1) if backwards else range(TAPS)
        taps = [[load(0, (channel, h, w, output)) for w in order] for h in order]
        return _pick(at[0], at[1], both_ways(weight_line, m, taps))

    return Map(value, together=(m + 2) ** 2)


# --- winograd_input -------------------------------------------------------------------------------------------------


def _input_type(types: Sequence[TensorType], attrs: Attrs) -> Type:
    m, (x,) = _tile("winograd_input", attrs), types
    if len(x.shape) != 4:
        raise ShapeError(f"operand 0 of winograd_input has shape {c.show(x.shape)}, expected [n, h + 2, w + 2, C]")
    n, height, width, channels = c.static(x.shape)
    if min(height, width) < 2 or (height - 2) % m or (width - 2) % m:
        raise ShapeError(
            f"operand 0 of winograd_input has shape {c.show(x.shape)}, "
            f"expected [n, h + 2, w + 2, C] with multiples of {m} h and w; pad it"
        )
    return TensorType(_float("winograd_input", types), (m + 2, m + 2, n, (height - 2) // m, (width - 2) // m, channels))


def _input_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    (x,), m = arrays, attrs["tile"]
    rows, columns = (x.shape[1] - 2) // m, (x.shape[2] - 2) // m
    tiles = [
        [x[:, i : i + (rows - 1) * m + 1 : m, j : j + (columns - 1) * m + 1 : m] for j in range(m + 2)] for i in range(m + 2)
    ]
    if not rows * columns:
        return np.zeros((m + 2, m + 2, x.shape[0], rows, columns, x.shape[3]), x.dtype)
    with np.errstate(all="ignore"):
        return np.array(both_ways(input_line, m, tiles)).astype(x.dtype)


def _input_lower(node: Node) -> Map:
    m = node.attrs["tile"]

    def value(at: tuple[Expr, ...], load: Load) -> Expr:
        i, j, n, y, x, channel = at
        pixels = [[load(0, (n, y * m + h, x * m + w, channel)) for w in range(m + 2)] for h in range(m + 2)]
        return _pick(i, j, both_ways(input_line, m, pixels))

    return Map(value, together=(m + 2) ** 2)


# --- winograd_output ------------------------------------------------------------------------------------------------


def _output_type(types: Sequence[TensorType], attrs: Attrs) -> Type:
    m, (x,) = _tile("winograd_output", attrs), types
    height, width = c.check_ints("winograd_output", "size", attrs["size"], 2, 0)
    n, rows, columns, outputs = c.static(x.shape[2:]) if len(x.shape) == 6 else (0, 0, 0, 0)
    if len(x.shape) != 6 or x.shape[:2] != (m + 2, m + 2) or (-(-height // m), -(-width // m)) != (rows, columns):
        wanted = f"[{m + 2}, {m + 2}, n, {-(-height // m)}, {-(-width // m)}, O] for images of {height} x {width}"
        raise ShapeError(f"operand 0 of winograd_output has shape {c.show(x.shape)}, expected {wanted}")
    return TensorType(_float("winograd_output", types), (n, height, width, outputs))


def _output_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    (x,), m, (height, width) = arrays, attrs["tile"], attrs["size"]
    n, rows, columns, outputs = x.shape[2:]
    with np.errstate(all="ignore"):
        y = np.array(both_ways(output_line, m, list(x))).astype(x.dtype)
    whole = y.transpose(2, 3, 0, 4, 1, 5).reshape(n, rows * m, columns * m, outputs)
    return np.ascontiguousarray(whole[:, :height, :width])


def _output_lower(node: Node) -> Map:
    m = node.attrs["tile"]

    def value(at: tuple[Expr, ...], load: Load) -> Expr:
        n, y, x, channel = at
        products = [[load(0, (h, w, n, y // m, x // m, channel)) for w in range(m + 2)] for h in range(m + 2)]
        return _pick(y % m, x % m, both_ways(output_line, m, products))

    return Map(value, together=m * m)


# --- winograd_spread ------------------------------------------------------------------------------------------------


def _spread_type(types: Sequence[TensorType], attrs: Attrs) -> Type:
    m, (y,) = _tile("winograd_spread", attrs), types
    n, height, width, outputs = c.static(y.shape) if len(y.shape) == 4 else (0, 1, 1, 0)
    if len(y.shape) != 4 or height % m or width % m:
        raise ShapeError(
            f"operand 0 of winograd_spread has shape {c.show(y.shape)}, "
            f"expected [n, h, w, O] with multiples of {m} h and w; pad it"
        )
    return TensorType(_float("winograd_spread", types), (m + 2, m + 2, n, height // m, width // m, outputs))


def _spread_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    (y,), m = arrays, attrs["tile"]
    tiles = [[y[:, i::m, j::m] for j in range(m)] for i in range(m)]
    with np.errstate(all="ignore"):
        return np.array(both_ways(spread_line, m, tiles)).astype(y.dtype)


def _spread_lower(node: Node) -> Map:
    m = node.attrs["tile"]

    def value(at: tuple[Expr, ...], load: Load) -> Expr:
        i, j, n, y, x, channel = at
        pixels = [[load(0, (n, y * m + h, x * m + w, channel)) for w in range(m)] for h in range(m)]
        return _pick(i, j, both_ways(spread_line, m, pixels))

    return Map(value, together=(m + 2) ** 2)


# --- winograd_gather ------------------------------------------------------------------------------------------------


def _gather_type(types: Sequence[TensorType], attrs: Attrs) -> Type:
    m, (s,) = _tile("winograd_gather", attrs), types
    if len(s.shape) != 4 or s.shape[:2] != (m + 2, m + 2):
        raise ShapeError(f"operand 0 of winograd_gather has shape {c.show(s.shape)}, expected [{m + 2}, {m + 2}, C, O]")
    return TensorType(_float("winograd_gather", types), (s.shape[2], TAPS, TAPS, s.shape[3]))


def _gather_value(arrays: Sequence[Array], attrs: Attrs) -> Array:
    (s,), m = arrays, attrs["tile"]
    with np.errstate(all="ignore"):
        g = np.array(both_ways(gather_line, m, list(s))).astype(s.dtype)
    return np.ascontiguousarray(g.transpose(2, 0, 1, 3))


def _gather_lower(node: Node) -> Map:
    m = node.attrs["tile"]

    def value(at: tuple[Expr, ...], load: Load) -> Expr:
        channel, y, x, output = at
        sums = [[load(0, (h, w, channel, output)) for w in range(m + 2)] for h in range(m + 2)]
        return _pick(y, x, both_ways(gather_line, m, sums))

    return Map(value, together=TAPS * TAPS)


# --- records --------------------------------------------------------------------------------------------------------

_NONE: Final = NotDifferentiable("the winograd pass makes it after gradients are expanded")
REASON: Final = "sums of up to 36 terms with factors of up to 8, one rounding each"


Case = tuple[tuple[int, ...], dict[str, Any]]


def _record(
    name: str,
    infer: c.Infer,
    reference: c.Reference,
    lower: Callable[[Node], Map],
    doc: str,
    cases: Callable[[int], Sequence[Case]],
    **attrs: Any,
) -> Op:
    def samples() -> list[Sample]:
        return [
            Sample(c.uniform(shape), {"tile": m, **more}, budget=5e-6, reason=REASON, gradient=False)
            for m in POINTS
            for shape, more in cases(m)
        ]

    return register(Op(name, infer, reference, lower, _NONE, doc, arity=1, attrs={"tile": REQUIRED, **attrs}, samples=samples))


winograd_weight = _record(
    "winograd_weight",
    _weight_type,
    _weight_value,
    _weight_lower,
    "Winograd's transform of 3x3 weights [C, 3, 3, O], the taps in `reverse` or not, for output tiles of `tile` x `tile`: "
    "[tile + 2, tile + 2, C, O], or [tile + 2, tile + 2, O / panel, C, panel].",
    lambda m: [((5, 3, 3, 17), {"reverse": True}), ((5, 3, 3, 16), {"panel": 8}), ((0, 3, 3, 4), {})],
    reverse=False,
    panel=0,
)
winograd_input = _record(
    "winograd_input",
    _input_type,
    _input_value,
    _input_lower,
    "Winograd's transform of the tiles of images [n, h + 2, w + 2, C]: [tile + 2, tile + 2, n, h / tile, w / tile, C].",
    lambda m: [((2, 2 * m + 2, m + 2, 5), {}), ((1, m + 2, 3 * m + 2, 33), {}), ((2, 2, m + 2, 3), {})],
)
winograd_output = _record(
    "winograd_output",
    _output_type,
    _output_value,
    _output_lower,
    "Winograd's transform back: products [tile + 2, tile + 2, n, h / tile, w / tile, O], tiles rounded up, to images of `size`.",
    lambda m: [
        ((m + 2, m + 2, 2, 2, 1, 5), {"size": (2 * m, m)}),
        ((m + 2, m + 2, 1, 2, 4, 33), {"size": (2 * m - 1, 3 * m + 1)}),
        ((m + 2, m + 2, 1, 0, 2, 3), {"size": (0, 2 * m)}),
    ],
    size=REQUIRED,
)
winograd_spread = _record(
    "winograd_spread",
    _spread_type,
    _spread_value,
    _spread_lower,
    "The transpose of winograd_output, for the tiles of [n, h, w, O]: [tile + 2, tile + 2, n, h / tile, w / tile, O].",
    lambda m: [((2, 2 * m, m, 5), {}), ((1, m, 3 * m, 33), {}), ((2, 0, m, 3), {})],
)
winograd_gather = _record(
    "winograd_gather",
    _gather_type,
    _gather_value,
    _gather_lower,
    "The transpose of winograd_weight: sums over tiles [tile + 2, tile + 2, C, O] to weights' gradients [C, 3, 3, O].",
    lambda m: [((m + 2, m + 2, 5, 17), {}), ((m + 2, m + 2, 16, 32), {}), ((m + 2, m + 2, 0, 4), {})],
)

__all__ = ["POINTS", "TAPS"]
