"""resize and interpolate: against a direct definition in f64, PyTorch where it is there, gradients, and their fusion."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw

Array = np.ndarray


def call(f: object, x: Array, *args: object, **more: object) -> Array:
    """f(x, ...) compiled."""
    return tw.compile(lambda t: f(t, *args, **more), tw.spec(*x.shape, dtype=x.dtype.name))(x)


def place(i: int, n: int, out: int, scale: float, rule: str) -> float:
    """Where in n elements element i of the result lies, rule by rule."""
    if rule == "align_corners":
        return i * (n - 1) / (out - 1) if out > 1 else 0.0
    if rule == "asymmetric":
        return i / scale
    if rule == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if rule == "pytorch_half_pixel" and out == 1:
        return 0.0
    x = (i + 0.5) / scale - 0.5
    return x + n / 2 * (1 - out / (scale * n)) if rule == "half_pixel_symmetric" else x


def kernel(d: float, mode: str, a: float) -> float:
    d = abs(d)
    if mode == "linear":
        return max(0.0, 1 - d)
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0


def matrix(n: int, out: int, scale: float, mode: str, rule: str, a: float, antialias: bool, exclude: bool) -> Array:
    """The map of one axis as a dense matrix: every element that the filter reaches, those outside at the border."""
    m = np.zeros((out, n))
    narrow = min(scale, 1.0) if antialias else 1.0
    for i in range(out):
        x = place(i, n, out, scale, rule)
        for p in range(int(np.floor(x - 2 / narrow)) - 1, int(np.ceil(x + 2 / narrow)) + 2):
            if exclude and not 0 <= p < n:
                continue
            m[i, min(max(p, 0), n - 1)] += kernel((x - p) * narrow, mode, a)
        if exclude or narrow < 1:
            m[i] /= m[i].sum()
    return m


RULES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_filters_against_dense_matrices(mode: str, rule: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 7, 9)).astype(np.float32)
    for size, antialias, exclude in (((15, 4), False, False), ((1, 17), False, True), ((3, 5), True, None)):
        found = call(tw.resize, x, size, mode=mode, coordinates=rule, antialias=antialias, exclude_outside=exclude)
        rows, columns = (
            matrix(n, m, m / n, mode, rule, -0.75, antialias, antialias if exclude is None else exclude)
            for n, m in zip(x.shape[2:], size, strict=True)
        )
        wanted = np.einsum("ncyx,iy,jx->ncij", x.astype(np.float64), rows, columns)
        np.testing.assert_allclose(found, wanted, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("dtype", ["f32", "i32"])
def test_nearest_with_every_rounding(rounding: str, dtype: str) -> None:
    x = np.arange(2 * 5 * 4).reshape(1, 2, 5, 4).astype(tw.spec(1, dtype=dtype).dtype.numpy)
    pick = {
        "round_prefer_floor": lambda v: np.ceil(v - 0.5), "round_prefer_ceil": lambda v: np.floor(v + 0.5),
        "floor": np.floor, "ceil": np.ceil,
    }[rounding]  # fmt: skip
    for rule in RULES:
        found = call(tw.resize, x, (8, 2), coordinates=rule, rounding=rounding)
        at = [
            [int(min(max(pick(place(i, n, m, m / n, rule)), 0), n - 1)) for i in range(m)]
            for n, m in zip((5, 4), (8, 2), strict=True)
        ]
        assert np.array_equal(found, x[:, :, at[0]][:, :, :, at[1]])


def test_scales_axes_and_nothing_to_do() -> None:
    x = np.random.default_rng(1).normal(size=(1, 2, 6, 5)).astype(np.float32)
    y = tw.compile(lambda x: tw.resize(x, scale=(1.5, 1.0), mode="linear"), tw.spec(*x.shape))(x)
    assert y.shape == (1, 2, 9, 5)
    z = tw.compile(lambda x: tw.resize(x, scale=1.5, axes=(-2,), mode="linear"), tw.spec(*x.shape))(x)
    assert np.array_equal(y, z)
    assert np.array_equal(tw.compile(lambda x: tw.resize(x, (6, 5), mode="cubic") + 0.0, tw.spec(*x.shape))(x), x)
    assert tw.compile(lambda x: tw.resize(x, (0, 3), mode="linear"), tw.spec(*x.shape))(x).shape == (1, 2, 0, 3)


def test_taps_of_weight_zero_spread_no_infinity() -> None:
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    x[0, 0, 2] = np.inf
    y = tw.compile(lambda x: tw.resize(x, 4, scale=1.0, mode="linear", coordinates="align_corners") * 1.0, tw.spec(1, 1, 4))(x)
    assert np.array_equal(y, x)
    y = tw.compile(lambda x: tw.resize(x, 7, mode="linear", coordinates="align_corners"), tw.spec(1, 1, 4))(x)
    assert np.array_equal(y[0, 0], [0, 0.5, 1, np.inf, np.inf, np.inf, 3])


@pytest.mark.parametrize("mode,size", [("linear", (9, 3)), ("cubic", (4, 11)), ("nearest", (3, 12))])
def test_the_gradient_is_the_transposed_map(mode: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    x, g = rng.normal(size=(2, 3, 6, 5)), rng.normal(size=(2, 3, *size))
    f = tw.compile(lambda x: tw.resize(x, size, mode=mode), tw.spec(*x.shape, dtype="f64"))
    slope = tw.compile(
        lambda x, g: tw.grad(lambda x: (tw.resize(x, size, mode=mode) * g).sum())(x),
        tw.spec(*x.shape, dtype="f64"),
        tw.spec(*g.shape, dtype="f64"),
    )(x, g)
    v = rng.normal(size=x.shape)
    np.testing.assert_allclose((slope * v).sum(), (f(v) * g).sum(), rtol=1e-12)


def test_it_stays_channels_last_between_convolutions() -> None:
    rng = np.random.default_rng(3)
    x, k = rng.normal(size=(1, 8, 6, 6)).astype(np.float32), rng.normal(size=(8, 8, 3, 3)).astype(np.float32)

    def net(x: tw.Tensor, k: tw.Tensor) -> tw.Tensor:
        y = tw.conv2d(x, k, padding=1)
        return tw.conv2d(tw.relu(tw.resize(y, scale=2.0, mode="linear")), k, padding=1)

    exe = tw.compile(net, tw.spec(*x.shape), tw.spec(*k.shape))
    nodes = [k_.nodes for k_ in exe.profile(x, k, repeats=1).kernels]
    first, last = (
        next(j for j in order if "resample" in nodes[j]) for order in (range(len(nodes)), range(len(nodes) - 1, -1, -1))
    )
    assert not any("transpose" in n for n in nodes[first : last + 1])
    assert any("resample" in n and "where" in n for n in nodes)  # what follows is in its kernel


def test_errors_say_what_to_do() -> None:
    x = np.zeros((1, 2, 4, 4), np.float32)
    for wrong, words in (
        (tw.resize, "takes the new size, or scale"),
        (lambda t: tw.resize(t, 4, mode="area"), "mode is one of nearest, linear, cubic"),
        (lambda t: tw.resize(t, 4, axes=(1, 1)), "different axes"),
        (lambda t: tw.resize(t, scale=0.0), "positive number"),
        (lambda t: tw.resize(t.astype("i32"), 4, mode="linear"), "is for floats"),
        (lambda t: tw.interpolate(t, 4, 2.0), "either size or scale_factor"),
        (lambda t: tw.interpolate(t, 4, mode="nearest", align_corners=True), "align_corners means nothing"),
    ):
        with pytest.raises(tw.errors.AttributeValueError, match=words):
            tw.compile(wrong, tw.spec(*x.shape))


def test_interpolate_as_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="the bench extra")
    x = np.random.default_rng(4).normal(size=(2, 3, 7, 9)).astype(np.float32)
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
        for size, more in (((14, 18), {}), ((5, 4), {"antialias": True}), ((3, 20), {"align_corners": True})):
            if more and mode not in ("bilinear", "bicubic"):
                continue
            wanted = torch.nn.functional.interpolate(torch.tensor(x), size=size, mode=mode, **more).numpy()
            found = call(tw.interpolate, x, size, mode=mode, **more)
            # PyTorch computes coordinates in f32
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    wanted = torch.nn.functional.interpolate(torch.tensor(x), scale_factor=1.7, mode="bilinear").numpy()
    np.testing.assert_allclose(call(tw.interpolate, x, scale_factor=1.7, mode="bilinear"), wanted, atol=1e-5)
