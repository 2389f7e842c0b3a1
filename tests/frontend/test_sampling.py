"""grid_sample against scipy's interpolation and, where it is there, against torch."""

from itertools import product

import numpy as np
import pytest
import tensorwright as tw
from scipy import ndimage
from tensorwright.frontend.sampling import MODES, PADDINGS
from tensorwright.ir.errors import AttributeValueError, ShapeError

X = np.random.default_rng(0).normal(size=(2, 3, 7, 9)).astype(np.float32)
GRID = np.random.default_rng(1).uniform(-1.4, 1.4, size=(2, 4, 5, 2)).astype(np.float32)


def sampled(**options):
    return tw.compile(lambda x, g: tw.grid_sample(x, g, **options), tw.spec(*X.shape), tw.spec(*GRID.shape))(X, GRID)


@pytest.mark.parametrize(("padding", "mode"), [("zeros", "grid-constant"), ("border", "nearest"), ("reflection", "mirror")])
def test_linear_is_scipys_map_coordinates(padding, mode):
    got = sampled(padding_mode=padding, align_corners=True)
    places = [(GRID[..., 1] + 1) / 2 * 6, (GRID[..., 0] + 1) / 2 * 8]
    for n in range(2):
        for c in range(3):
            want = ndimage.map_coordinates(X[n, c].astype(np.float64), [p[n] for p in places], order=1, mode=mode)
            assert np.abs(got[n, c] - want).max() < 3e-6  # coordinates in f32: an error of 1e-6 of a slope of about 3


def test_nearest_at_the_elements_is_the_image():
    rows, columns = np.meshgrid(np.linspace(-1, 1, 7), np.linspace(-1, 1, 9), indexing="ij")
    grid = np.stack([columns, rows], -1)[None].repeat(2, 0).astype(np.float32)
    exe = tw.compile(lambda x, g: tw.grid_sample(x, g, "nearest", align_corners=True), tw.spec(*X.shape), tw.spec(*grid.shape))
    assert np.array_equal(exe(X, grid), X)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(("mode", "padding"), [c for c in product(MODES, PADDINGS) if c != ("cubic", "border")])
def test_all_modes_agree_with_torch(mode, padding, align):
    """But cubic with border: we clamp the point, as ONNX defines it, torch the elements around it."""
    torch = pytest.importorskip("torch", reason="the bench extra")
    word = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    want = torch.nn.functional.grid_sample(torch.from_numpy(X), torch.from_numpy(GRID), word, padding, align).numpy()
    assert np.abs(sampled(mode=mode, padding_mode=padding, align_corners=align) - want).max() < 1e-5


def test_gradient_of_the_image_is_the_weights():
    grad = tw.compile(tw.grad(lambda x, g: tw.grid_sample(x, g).sum()), tw.spec(*X.shape), tw.spec(*GRID.shape))(X, GRID)
    assert np.isclose((grad * X).sum(), sampled().sum(), rtol=1e-4)  # it is linear in the image


def test_bad_input():
    with pytest.raises(ShapeError, match="a grid"):
        tw.trace(tw.grid_sample, tw.spec(2, 3, 7, 9), tw.spec(2, 4, 5, 3))
    with pytest.raises(AttributeValueError, match="padding_mode is one of"):
        tw.trace(lambda x, g: tw.grid_sample(x, g, padding_mode="wrap"), tw.spec(2, 3, 7, 9), tw.spec(2, 4, 5, 2))
