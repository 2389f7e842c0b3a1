"""Contractions to test: index maps of products and convolutions, references in f64, and a way to run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tensorwright.codegen.contraction import Epilogue, Operand, Scheduled, schedule
from tensorwright.codegen.loop_ir import Module
from tensorwright.ir.contraction import Affine, Axis, Contraction, affine, strided_view
from tensorwright.ir.dtypes import as_dtype
from tensorwright.ir.target import Target

from ..codegen.helpers import Loaded, aligned, emit_kernel

Array = np.ndarray[Any, Any]
POISON = ((7777777, np.int32), (np.nan, np.float32))  # of a workspace: of integers, of numbers


def matmul(
    m: int, n: int, k: int, *, ta: bool = False, tb: bool = False, batch: Sequence[int] = (), broadcast_b: bool = False
) -> Contraction:
    """C[..., m, n] = A[..., m, k] B[..., k, n]; ta, tb: the operand lies transposed; broadcast_b: B has no batch axes."""
    names = [f"b{i}" for i in range(len(batch))]
    axes = [Axis(x, e, "batch") for x, e in zip(names, batch, strict=True)]
    axes += [Axis("m", m, "m"), Axis("n", n, "n"), Axis("k", k, "k")]
    lead = [affine(x) for x in names]
    a = [affine("k"), affine("m")] if ta else [affine("m"), affine("k")]
    b = [affine("n"), affine("k")] if tb else [affine("k"), affine("n")]
    return Contraction(tuple(axes), (*lead, *a), (*([] if broadcast_b else lead), *b), (*lead, affine("m"), affine("n")))


def conv(
    n: int,
    c: int,
    size: int,
    o: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    layout: str = "NHWC",
    width: int = 0,
) -> Contraction:
    """A convolution of an image that is padded already: `size` (and `width`) are those of the output."""
    width = width or size
    lead = [Axis("g", groups, "batch")] if groups > 1 else []
    cg, og = c // groups, o // groups
    axes = [*lead, Axis("n", n, "m"), Axis("y", size, "m"), Axis("x", width, "m"), Axis("o", og, "n")]
    axes += [Axis("h", kernel, "k"), Axis("w", kernel, "k"), Axis("c", cg, "k")]
    channel = affine("c", ("g", cg)) if lead else affine("c")
    out = affine("o", ("g", og)) if lead else affine("o")
    y, x = affine(("y", stride), ("h", dilation)), affine(("x", stride), ("w", dilation))
    a = (affine("n"), y, x, channel) if layout == "NHWC" else (affine("n"), channel, y, x)
    cc = (affine("n"), affine("y"), affine("x"), out) if layout == "NHWC" else (affine("n"), out, affine("y"), affine("x"))
    return Contraction(tuple(axes), a, (out, affine("c"), affine("h"), affine("w")), cc)


def weight_grad(n: int, c: int, size: int, o: int, kernel: int, *, stride: int = 1, layout: str = "NHWC") -> Contraction:
    """dW[o, c, h, w] = sum over n, y, x of X[n, y+h, x+w, c] dY[n, y, x, o]."""
    axes = [Axis("c", c, "m"), Axis("h", kernel, "m"), Axis("w", kernel, "m"), Axis("o", o, "n")]
    axes += [Axis("n", n, "k"), Axis("y", size, "k"), Axis("x", size, "k")]
    y, x = affine(("y", stride), "h"), affine(("x", stride), "w")
    a = (affine("n"), y, x, affine("c")) if layout == "NHWC" else (affine("n"), affine("c"), y, x)
    b = tuple(map(affine, "nyxo")) if layout == "NHWC" else tuple(map(affine, "noyx"))
    return Contraction(tuple(axes), a, b, tuple(map(affine, "ochw")))


def shape_of(spec: Contraction, maps: tuple[Affine, ...]) -> tuple[int, ...]:
    """The least shape that holds every index."""
    return tuple(1 + m.constant + sum(max(0, k) * (spec.axis(a).extent - 1) for a, k in m.terms) for m in maps)  # type: ignore[operator]


def pack(b: Array, spec: Contraction, panel: int) -> Array:
    """B in panels, as spec.panel says."""
    view = strided_view(b, spec.b, tuple(x for kind in ("batch", "n", "k") for x in spec.of_kind(kind)))
    batch = tuple(int(x.extent) for x in spec.of_kind("batch"))  # type: ignore[arg-type]
    n, k = int(spec.size("n")), int(spec.size("k"))  # type: ignore[arg-type]
    wide = np.zeros((*batch, -(-n // panel) * panel, k), b.dtype)
    wide[..., :n, :] = view.reshape(*batch, n, k)
    return np.ascontiguousarray(wide.reshape(*batch, -1, panel, k).swapaxes(-1, -2))


def reference(spec: Contraction, a: Array, b: Array) -> Array:
    """The sum in f64 (integers: in their own dtype)."""
    kind = np.float64 if np.issubdtype(a.dtype, np.floating) or a.dtype.kind == "V" else a.dtype
    letters = {x.name: chr(97 + i) for i, x in enumerate(spec.axes)}
    of = {s: tuple(x for x in spec.axes if _moves(m, x.name)) for s, m in (("a", spec.a), ("b", spec.b), ("c", spec.c))}
    views = [strided_view(v.astype(kind), m, of[s]) for v, m, s in ((a, spec.a, "a"), (b, spec.b, "b"))]
    ins = ["".join(letters[x.name] for x in of[s]) for s in "ab"]
    out = "".join(letters[x.name] for x in of["c"])
    total = np.einsum(f"{ins[0]},{ins[1]}->{out}", *views, optimize=True)
    c = np.zeros(shape_of(spec, spec.c), kind)
    if c.size == 0:
        return c
    grid = np.meshgrid(*[np.arange(x.extent) for x in of["c"]], indexing="ij")
    where = dict(zip([x.name for x in of["c"]], grid, strict=True))
    c[tuple(m.constant + sum(k * where[n] for n, k in m.terms) if m.terms else m.constant for m in spec.c)] = total
    return c


def _moves(maps: tuple[Affine, ...], axis: str) -> bool:
    return any(n == axis for m in maps for n, _ in m.terms)


@dataclass
class Case:
    """A contraction with random operands, scheduled for a target; `run` gives C."""

    spec: Contraction
    target: Target
    dtype: Any = np.float32
    panel: int = 0
    epilogue: Any = None
    extra: tuple[Array, ...] = ()
    seed: int = 0
    scheduled: Scheduled = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.a, self.b = (self._values(rng, shape_of(self.spec, m)) for m in (self.spec.a, self.spec.b))
        self.c_shape = shape_of(self.spec, self.spec.c)
        spec, b = self.spec, self.b
        if self.panel:
            b = pack(b, spec, self.panel)
            spec = spec.packed(self.panel, self.b.shape)
        self.operand_b = b
        dtype = as_dtype(np.dtype(self.dtype))

        def operand(x: Array) -> Operand:
            return Operand(as_dtype(x.dtype), tuple(s // x.itemsize for s in x.strides), 64)

        c = np.zeros(self.c_shape, self.dtype)
        epilogue = None if self.epilogue is None else Epilogue(tuple(operand(x) for x in self.extra), self.epilogue)
        self.scheduled = schedule(
            spec,
            operand(self.a),
            operand(b),
            Operand(dtype, operand(c).strides, 64),
            epilogue,
            self.target,
            threads=2,
            name="root",
        )
        self.module = Module(self.scheduled.kernels)

    def _values(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        if np.dtype(self.dtype).kind in "iu":
            return rng.integers(-9 if np.dtype(self.dtype).kind == "i" else 0, 10, shape).astype(self.dtype)
        return rng.standard_normal(shape).astype(self.dtype)

    def arrays(self) -> list[Array]:
        """The root's buffers; C and the workspace hold NaN (or a large integer)."""
        poison = np.nan if np.dtype(self.dtype).kind not in "iu" else 77777
        c = np.full(self.c_shape, poison, self.dtype)
        out = [aligned(x) for x in (self.a, self.operand_b, c, *self.extra)]
        if self.scheduled.workspace:
            work = self.module["root"].buffers[-1]
            out.append(aligned(np.full(work.shape, poison, work.dtype.numpy)))
        return out

    def loaded(self, checked: bool = False) -> Loaded:
        emitted = emit_kernel(self.module, "root", self.target, checked=checked)
        self.emitted = emitted
        return Loaded(emitted)

    def run(self, threads: int = 1, checked: bool = False) -> Array:
        arrays = self.arrays()
        code = self.loaded(checked)([x.ctypes.data for x in arrays], threads)
        assert code == 0, self.emitted.checks[code - 1]
        return arrays[2]

    def expected(self) -> Array:
        return reference(self.spec, self.a, self.b)


class NarrowCase:
    """What runs a contraction of narrow numbers with wider results, once a subclass has scheduled it."""

    a: Array
    operand_b: Array
    target: Target
    scheduled: Scheduled
    module: Module
    blank: Array  # C before the kernel runs

    def arrays(self) -> list[Array]:
        """The root's buffers, each as its parameter sees the memory."""
        given = [self.a, self.operand_b, self.blank]
        if self.scheduled.workspace:
            given.append(np.full(self.scheduled.workspace // 4, *POISON[int(self.blank.dtype.kind == "f")]))
        return [
            aligned(x).reshape(-1).view(b.dtype.numpy)[: max(b.span, 1)]
            for x, b in zip(given, self.module["root"].buffers, strict=True)
        ]

    def run(self, threads: int = 1, checked: bool = False) -> Array:
        arrays = self.arrays()
        emitted = emit_kernel(self.module, "root", self.target, checked=checked)
        code = Loaded(emitted)([x.ctypes.data for x in arrays], threads)
        assert code == 0, emitted.checks[code - 1]
        return arrays[2].reshape(self.blank.shape)


def error(y: Array, ref: Array) -> float:
    """max |y - ref| / max |ref|."""
    if ref.size == 0:
        return 0.0
    return float(np.abs(y.astype(np.float64) - ref).max() / max(float(np.abs(ref).max()), 1e-30))
