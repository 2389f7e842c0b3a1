"""Layers without parameters: activations, dropout, shapes. PyTorch's names and arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from ...ir.errors import AttributeValueError, ShapeError
from .. import activations, elementwise, movement, random, reductions
from ..context import error
from ..core import TensorLike, as_tensor, normalize_axis
from ..module import Module
from ..tensor import Tensor


class Identity(Module):
    """x, whatever arguments it was made with."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def forward(self, x: TensorLike) -> Tensor:
        return as_tensor(x, what="Identity")


class _Activation(Module):
    """A function of one Tensor without settings."""

    function: ClassVar[Callable[..., Tensor]]

    def forward(self, x: TensorLike) -> Tensor:
        return type(self).function(x)


class ReLU(_Activation):
    """max(x, 0)."""

    function = staticmethod(activations.relu)


class ReLU6(_Activation):
    """min(max(x, 0), 6)."""

    function = staticmethod(activations.relu6)


class SELU(_Activation):
    """Scaled elu."""

    function = staticmethod(activations.selu)


class SiLU(_Activation):
    """x * sigmoid(x)."""

    function = staticmethod(activations.silu)


class Mish(_Activation):
    """x * tanh(softplus(x))."""

    function = staticmethod(activations.mish)


class Hardswish(_Activation):
    """x * min(max(x / 6 + 1/2, 0), 1)."""

    function = staticmethod(activations.hard_swish)


class Hardsigmoid(_Activation):
    """min(max(x / 6 + 1/2, 0), 1)."""

    function = staticmethod(activations.hard_sigmoid)


class Softsign(_Activation):
    """x / (1 + |x|)."""

    function = staticmethod(activations.softsign)


class LogSigmoid(_Activation):
    """log(sigmoid(x))."""

    function = staticmethod(activations.log_sigmoid)


class Tanh(_Activation):
    """tanh(x)."""

    function = staticmethod(elementwise.tanh)


class Sigmoid(_Activation):
    """1 / (1 + exp(-x))."""

    function = staticmethod(elementwise.sigmoid)


class LeakyReLU(Module):
    """x where positive, negative_slope * x elsewhere."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def forward(self, x: TensorLike) -> Tensor:
        return activations.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope:g}"


class ELU(Module):
    """x where positive, alpha * (exp(x) - 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def forward(self, x: TensorLike) -> Tensor:
        return activations.elu(x, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class CELU(ELU):
    """x where positive, alpha * (exp(x / alpha) - 1) elsewhere."""

    def forward(self, x: TensorLike) -> Tensor:
        return activations.celu(x, self.alpha)


class GELU(Module):
    """x * P(N(0, 1) <= x); approximate='tanh' for the cheaper formula."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise AttributeValueError(f"GELU: approximate is 'none' or 'tanh', not {approximate!r}")
        self.approximate = approximate

    def forward(self, x: TensorLike) -> Tensor:
        return activations.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Softplus(Module):
    """log(1 + exp(beta * x)) / beta. PyTorch's threshold, beyond which it returns x, is not needed: ours is exact there."""

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def forward(self, x: TensorLike) -> Tensor:
        return activations.softplus(x, self.beta)


class Hardtanh(Module):
    """x limited to [min_val, max_val]."""

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0) -> None:
        self.min_val, self.max_val = min_val, max_val

    def forward(self, x: TensorLike) -> Tensor:
        return activations.hardtanh(x, self.min_val, self.max_val)

    def extra_repr(self) -> str:
        return f"{self.min_val:g}, {self.max_val:g}"


class Softmax(Module):
    """Softmax along `dim`: the last unless given."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: TensorLike) -> Tensor:
        return reductions.softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogSoftmax(Softmax):
    """Log-softmax along `dim`: the last unless given."""

    def forward(self, x: TensorLike) -> Tensor:
        return reductions.log_softmax(x, self.dim)


class GLU(Module):
    """The first half along `dim` times the sigmoid of the second."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: TensorLike) -> Tensor:
        return activations.glu(x, self.dim)


class CosineSimilarity(Module):
    """x1 . x2 / (|x1| |x2|) along `dim`, each norm taken as eps at least."""

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        self.dim, self.eps = dim, eps

    def forward(self, x1: TensorLike, x2: TensorLike) -> Tensor:
        return reductions.cosine_similarity(x1, x2, self.dim, self.eps)


class Dropout(Module):
    """In training, each element zero with probability p and the others divided by 1 - p; otherwise x."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0.0 <= p <= 1.0:
            raise AttributeValueError(f"{type(self).__name__}: the probability p lies in [0, 1], not {p!r}")
        self.p = p

    def forward(self, x: TensorLike) -> Tensor:
        return random.dropout(x, self.p) if self.training else as_tensor(x, what="Dropout")

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class Dropout1d(Dropout):
    """Dropout of whole channels of (N, C, L)."""

    rank: ClassVar[int] = 3

    def forward(self, x: TensorLike) -> Tensor:
        t = as_tensor(x, what=type(self).__name__)
        if t.ndim != self.rank:
            raise error(ShapeError, f"{type(self).__name__} takes {self.rank} dimensions, (N, C, ...), not {t.ndim}", x=t)
        return random.channel_dropout(t, self.p) if self.training else t


class Dropout2d(Dropout1d):
    """Dropout of whole channels of (N, C, H, W)."""

    rank = 4


class Flatten(Module):
    """Dimensions start_dim to end_dim merged into one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: TensorLike) -> Tensor:
        return movement.flatten(x, self.start_dim, self.end_dim)


class Unflatten(Module):
    """Dimension `dim` split into several; one of them may be -1."""

    def __init__(self, dim: int, unflattened_size: Sequence[int]) -> None:
        self.dim, self.unflattened_size = dim, tuple(unflattened_size)

    def forward(self, x: TensorLike) -> Tensor:
        t = as_tensor(x, what="Unflatten")
        a = normalize_axis(self.dim, t.ndim, "Unflatten")
        return movement.reshape(t, (*t.shape[:a], *self.unflattened_size, *t.shape[a + 1 :]))
