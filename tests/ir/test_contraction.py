"""Index maps of contractions: the strided view is the definition, and never leaves its array."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.ir.contraction import Axis, Contraction, affine, strided_view
from tensorwright.ir.errors import ShapeError


def test_a_view_reads_what_the_map_says():
    rng = np.random.default_rng(0)
    array = rng.standard_normal((9, 7)).astype(np.float32)
    axes = (Axis("y", 3, "m"), Axis("h", 2, "k"), Axis("o", 4, "n"), Axis("x", 7, "m"))
    view = strided_view(array[::1], (affine(("y", 3), "h", constant=1), affine(("x", -1), constant=6)), axes)
    assert view.shape == (3, 2, 4, 7) and not view.flags.writeable
    for y, h, o, x in np.ndindex(view.shape):
        assert view[y, h, o, x] == array[3 * y + h + 1, 6 - x]
    transposed = strided_view(array.T, (affine("x"), affine("y")), axes)
    assert transposed[2, 0, 0, 5] == array.T[5, 2]


@pytest.mark.parametrize("index", [affine("x"), affine("y", constant=8), affine("y", constant=-1), affine(("y", -1))])
def test_a_map_that_leaves_the_array_is_refused(index):
    with pytest.raises(ShapeError, match="runs from"):
        strided_view(np.zeros(9, np.float32), (index,), (Axis("y", 3, "m"), Axis("x", 10, "m")))


def test_empty_extents_and_sizes():
    axes = (Axis("m", 0, "m"), Axis("k", 3, "k"))
    assert strided_view(np.zeros(2), (affine("k"),), axes).shape == (0, 3)
    spec = Contraction(axes, (affine("m"), affine("k")), (affine("k"),), (affine("m"),))
    assert spec.flops == 0 and spec.size("k") == 3 and spec.size("n") == 1 and spec.axis("k").extent == 3
    assert Contraction((Axis("n", 70, "n"), Axis("k", 3, "k")), (), (), ()).packed_shape(32) == (3, 3, 32)
