"""Products of 8-bit integers of imported models: to the bit those of numpy's integers, as contractions of bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import tensorwright as tw  # noqa: E402
from onnx_graphs import model, node  # noqa: E402
from tensorwright.frontend.core import apply  # noqa: E402

Array = np.ndarray[Any, Any]
KINDS = {"u": (np.uint8, 0), "i": (np.int8, -128)}


def octets(rng: np.random.Generator, kind: str, *shape: int) -> Array:
    dtype, low = KINDS[kind]
    return rng.integers(low, low + 256, shape).astype(dtype)


def ours(op: str, given: dict[str, Array], out: Any, fixed: tuple[str, ...] = (), **attrs: Any) -> tuple[Array, str]:
    """The result of a model of one node, whose inputs `fixed` are initialisers; and its graph before fusion."""
    free = [k for k in given if k not in fixed]
    m = model(
        [node(op, list(given), ["y"], **attrs)], [(k, given[k].dtype, given[k].shape) for k in free], [("y", out, None)],
        {k: given[k] for k in fixed},
    )  # fmt: skip
    exe = tw.compile(tw.onnx.Model(m))
    return exe(*(given[k] for k in free)), exe.text("graph")


def centred(x: Array, zero: Array, axis: int = -1) -> Array:
    shape = [1] * x.ndim
    if zero.size > 1:
        shape[axis] = zero.size
    return x.astype(np.int64) - zero.astype(np.int64).reshape(shape)


@pytest.mark.parametrize("kinds", ["uu", "ui", "iu", "ii"])
@pytest.mark.parametrize("fixed", [True, False], ids=["weights", "inputs"])
def test_products_with_zero_points(kinds: str, fixed: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = octets(rng, kinds[0], 5, 17, 33), octets(rng, kinds[1], 33, 31)
    for zero_of_b in (octets(rng, kinds[1], 31), np.array(128 if kinds[1] == "u" else 0, b.dtype)):
        given = {"a": a, "b": b, "za": octets(rng, kinds[0]), "zb": zero_of_b}
        found, text = ours("MatMulInteger", given, np.int32, ("b", "zb") if fixed else ())
        wanted = centred(a, given["za"]) @ centred(b, given["zb"])
        assert found.dtype == np.int32 and np.array_equal(found, wanted)
        assert "i32" in text and "f64" not in text and "f32" not in text
    assert np.array_equal(ours("MatMulInteger", {"a": a, "b": b}, np.int32)[0], a.astype(np.int32) @ b.astype(np.int32))


def rows_of_windows(x: Array, w: Array, stride: int, groups: int) -> Array:
    """The convolution of integers, padded already."""
    n, _, h, width = x.shape
    o, each, kh, kw = w.shape
    oh, ow = (h - kh) // stride + 1, (width - kw) // stride + 1
    y = np.zeros((n, o, oh, ow), np.int64)
    for g in range(groups):
        part, out = x[:, g * each : (g + 1) * each], slice(g * (o // groups), (g + 1) * (o // groups))
        for i in range(kh):
            for j in range(kw):
                seen = part[:, :, i : i + (oh - 1) * stride + 1 : stride, j : j + (ow - 1) * stride + 1 : stride]
                y[:, out] += np.einsum("nchw,oc->nohw", seen, w[out, :, i, j])
    return y


CONVOLUTIONS = [  # kinds, x, w, zero point of w, pads, stride, groups
    ("ui", (2, 8, 9, 7), (17, 8, 3, 3), "none", (1, 1, 1, 1), 1, 1),
    ("uu", (1, 3, 9, 8), (16, 3, 3, 3), "128", (1, 0, 0, 1), 2, 1),
    ("uu", (1, 5, 9, 8), (7, 5, 3, 2), "each", (1, 1, 1, 1), 1, 1),
    ("ii", (1, 8, 6, 6), (8, 4, 3, 3), "each", (1, 1, 1, 1), 1, 2),
    ("iu", (1, 6, 5, 5), (6, 1, 3, 3), "each", (1, 1, 1, 1), 1, 6),  # depthwise
    ("ui", (2, 4, 1, 1), (9, 4, 1, 1), "none", (0, 0, 0, 0), 1, 1),
]


@pytest.mark.parametrize("known", [True, False], ids=["known", "computed"])
def test_convolutions_with_zero_points(known: bool) -> None:
    """Around the picture stands its zero point, also where only a run knows it."""
    rng = np.random.default_rng(2)
    for kinds, x_shape, w_shape, kind, pads, stride, groups in CONVOLUTIONS:
        x, w, zx = octets(rng, kinds[0], *x_shape), octets(rng, kinds[1], *w_shape), octets(rng, kinds[0])
        zw = {"none": np.zeros((), w.dtype), "128": np.array(128, np.uint8), "each": octets(rng, kinds[1], w_shape[0])}[
            kind if kind != "128" else "128"
        ]
        given = {"x": x, "w": w, "zx": zx, "zw": zw}
        fixed = ("w", "zw", *(("zx",) if known else ()))
        found, _ = ours("ConvInteger", given, np.int32, fixed, pads=list(pads), strides=[stride, stride], group=groups)
        padded = np.pad(centred(x, zx), ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        assert np.array_equal(found, rows_of_windows(padded, centred(w, zw, 0), stride, groups)), (kinds, kind, groups)


def test_a_window_of_four_bytes() -> None:
    """All terms of a sum in one step: there is no loop over terms left to run lanes along."""
    x, w = np.arange(2, 11, dtype=np.uint8).reshape(1, 1, 3, 3), np.ones((1, 1, 2, 2), np.uint8)
    found, _ = ours("ConvInteger", {"x": x, "w": w, "zx": np.array(1, np.uint8)}, np.int32)
    assert np.array_equal(found, rows_of_windows(centred(x, np.array(1)), w.astype(np.int64), 1, 1))


def test_sums_beyond_i32() -> None:
    """Of 66,000 steps the sum passes 2^31: MatMulInteger's i32 is modulo 2^32; what is requantised from it is exact."""
    a, b = np.full((1, 66_000), 255, np.uint8), np.full((66_000, 2), 255, np.uint8)
    b[:, 1] = 1
    sums = a.astype(np.int64) @ b.astype(np.int64)
    assert sums[0, 0] >= 2**31
    found, text = ours("MatMulInteger", {"a": a, "b": b}, np.int32)
    assert np.array_equal(found, sums.astype(np.int32)) and "f64" not in text
    one, none = np.array(1.0, np.float32), np.array(0, np.uint8)
    scale = np.array(2.0**25, np.float32)
    given = {"a": a, "as": one, "az": none, "b": b, "bs": one, "bz": none, "ys": scale, "yz": none}
    found, text = ours("QLinearMatMul", given, np.uint8, ("as", "az", "bs", "bz", "ys", "yz"))
    assert np.array_equal(found, np.clip(np.rint(sums / 2.0**25), 0, 255).astype(np.uint8)) and found[0, 0] == 128
    assert "f64" in text


def test_requantised_products() -> None:
    """QLinearMatMul and QLinearConv with a bias, extremes among the bytes."""
    rng = np.random.default_rng(6)
    f = np.float32
    x, w = octets(rng, "u", 1, 8, 6, 5), octets(rng, "i", 9, 8, 3, 3)
    x[0, :6], w[:3], w[3] = 255, -128, 127
    bias = rng.integers(-50_000, 50_000, 9).astype(np.int32)
    zx, zy, xs, ys = np.array(119, np.uint8), np.array(7, np.uint8), f(0.02), f(0.75)
    ws = (rng.random(9) * 0.02 + 0.01).astype(f)
    given = {
        "x": x,
        "xs": np.array(xs),
        "xz": zx,
        "w": w,
        "ws": ws,
        "wz": np.zeros(9, np.int8),
        "ys": np.array(ys),
        "yz": zy,
        "b": bias,
    }
    found, _ = ours("QLinearConv", given, np.uint8, tuple(k for k in given if k != "x"), pads=[1, 1, 1, 1])
    sums = rows_of_windows(np.pad(centred(x, zx), ((0, 0), (0, 0), (1, 1), (1, 1))), w.astype(np.int64), 1, 1) + bias.reshape(
        1, -1, 1, 1
    )
    wanted = np.clip(np.rint(sums.astype(f) * (xs * ws / ys).reshape(1, -1, 1, 1)) + 7, 0, 255).astype(np.uint8)
    assert np.array_equal(found, wanted) and {0, 255} <= set(found.ravel().tolist())


def test_exported_as_integer_products() -> None:
    rng = np.random.default_rng(1)
    a, b, x, w = (octets(rng, k, *s) for k, s in (("u", (3, 9)), ("i", (9, 4)), ("u", (1, 4, 5, 5)), ("i", (6, 4, 3, 3))))
    geometry = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": "NCHW"}

    def both(a: Any, b: Any, x: Any, w: Any) -> tuple[Any, Any]:
        return tw.matmul(a, b), apply("conv2d", x, w, **geometry)

    graph = tw.trace(both, *(tw.spec(*v.shape, dtype=str(v.dtype)) for v in (a, b, x, w)))
    written = tw.onnx.save(graph)
    assert [n.op_type for n in written.graph.node if n.op_type != "Identity"] == ["MatMulInteger", "ConvInteger"]
    again = tw.compile(tw.onnx.Model(written))(a, b, x, w)
    assert np.array_equal(again[0], a.astype(np.int32) @ b.astype(np.int32))
    assert np.array_equal(again[1], rows_of_windows(x.astype(np.int64), w.astype(np.int64), 1, 1))
