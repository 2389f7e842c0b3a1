"""Fourier transforms against numpy, at lengths that are small, composite, prime and even or odd."""

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.frontend.fft import dft, irdft
from tensorwright.ir.errors import ShapeError

LENGTHS = [1, 2, 7, 16, 33, 256, 257, 400, 521, 1024, 1200]


@pytest.mark.parametrize("n", LENGTHS)
def test_forward_and_inverse(n):
    rng = np.random.default_rng(n)
    z = (rng.normal(size=(3, n)) + 1j * rng.normal(size=(3, n))).astype(np.complex64)
    spec = tw.spec(3, n)
    for inverse, want in ((False, np.fft.fft(z)), (True, np.fft.ifft(z))):
        re, im = tw.compile(lambda a, b, inverse=inverse: dft(a, b, inverse=inverse), spec, spec)(z.real.copy(), z.imag.copy())
        # sums of n products in f32, at most three factors one after the other
        assert np.abs(re + 1j * im - want).max() <= 3e-6 * np.abs(want).max() * max(1, np.log2(n))


@pytest.mark.parametrize("n", [2, 7, 16, 257, 400])
def test_real_signals(n):
    x = np.random.default_rng(n).normal(size=(n, 2)).astype(np.float32)
    re, im = tw.compile(lambda a: dft(a, axis=0, onesided=True), tw.spec(n, 2))(x)
    want = np.fft.rfft(x, axis=0)
    assert np.abs(re + 1j * im - want).max() <= 3e-6 * np.abs(want).max() * max(1, np.log2(n))
    spec = tw.spec(*want.shape)
    back = tw.compile(lambda a, b: irdft(a, b, axis=0, length=n), spec, spec)(re, im)
    assert np.abs(back - x).max() <= 2e-5


def test_cut_and_filled():
    x = np.random.default_rng(0).normal(size=(2, 10)).astype(np.float32)
    for length in (4, 24):
        re, _ = tw.compile(lambda a, length=length: dft(a, length=length), tw.spec(2, 10))(x)
        assert np.abs(re - np.fft.fft(x, length).real).max() < 1e-5


def test_gradient_is_the_adjoint():
    x = np.random.default_rng(0).normal(size=12)
    got = tw.compile(tw.grad(lambda a: (dft(a)[0] ** 2).sum() + (dft(a)[1] ** 2).sum()), tw.spec(12, dtype="f64"))(x)
    assert np.allclose(got, 2 * 12 * x)  # Parseval: the sum of squares is n times that of x


def test_a_symbolic_length_is_refused():
    with pytest.raises(ShapeError, match="known when tracing"):
        tw.trace(lambda a: dft(a)[0], tw.spec(2, "n"))
