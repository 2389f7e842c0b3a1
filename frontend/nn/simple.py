"""Layers without parameters: activations, pooling, dropout, shapes. PyTorch's names and arguments."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import AttributeValueError
from .. import activations, convolution, elementwise, movement, random, reductions
from ..core import TensorLike, as_tensor
from ..module import Module
from ..tensor import Tensor

Pair = int | Sequence[int]


class Identity(Module):
    """x."""

    def forward(self, x: TensorLike) -> Tensor:
        return as_tensor(x, what="Identity")


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: TensorLike) -> Tensor:
        return activations.relu(x)


class ReLU6(Module):
    """min(max(x, 0), 6)."""

    def forward(self, x: TensorLike) -> Tensor:
        return activations.relu6(x)


class LeakyReLU(Module):
    """x where positive, negative_slope * x elsewhere."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def forward(self, x: TensorLike) -> Tensor:
        return activations.leaky_relu(x, self.negative_slope)


class ELU(Module):
    """x where positive, alpha * (exp(x) - 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def forward(self, x: TensorLike) -> Tensor:
        return activations.elu(x, self.alpha)


class SELU(Module):
    """Scaled elu."""

    def forward(self, x: TensorLike) -> Tensor:
        return activations.selu(x)


class GELU(Module):
    """x * P(N(0, 1) <= x); approximate='tanh' for the cheaper formula."""

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate

    def forward(self, x: TensorLike) -> Tensor:
        return activations.gelu(x, self.approximate)


class SiLU(Module):
    """x * sigmoid(x)."""

    def forward(self, x: TensorLike) -> Tensor:
        return activations.silu(x)


class Softplus(Module):
    """log(1 + exp(beta * x)) / beta."""

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def forward(self, x: TensorLike) -> Tensor:
        return activations.softplus(x, self.beta)


class Hardswish(Module):
    """x * min(max(x / 6 + 1/2, 0), 1)."""

    def forward(self, x: TensorLike) -> Tensor:
        return activations.hard_swish(x)


class Tanh(Module):
    """tanh(x)."""

    def forward(self, x: TensorLike) -> Tensor:
        return elementwise.tanh(x)


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: TensorLike) -> Tensor:
        return elementwise.sigmoid(x)


class Softmax(Module):
    """Softmax along `dim`."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: TensorLike) -> Tensor:
        return reductions.softmax(x, self.dim)


class LogSoftmax(Module):
    """Log-softmax along `dim`."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: TensorLike) -> Tensor:
        return reductions.log_softmax(x, self.dim)


class Dropout(Module):
    """In training, each element zero with probability p and the others divided by 1 - p; otherwise x."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0.0 <= p < 1.0:
            raise AttributeValueError(f"Dropout: the probability p lies in [0, 1), not {p!r}")
        self.p = p

    def forward(self, x: TensorLike) -> Tensor:
        return random.dropout(x, self.p) if self.training else as_tensor(x, what="Dropout")

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class Flatten(Module):
    """Dimensions start_dim to end_dim merged into one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: TensorLike) -> Tensor:
        return movement.flatten(x, self.start_dim, self.end_dim)


class MaxPool2d(Module):
    """The largest value of each window."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, x: TensorLike) -> Tensor:
        return convolution.max_pool2d(x, self.kernel_size, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool2d(Module):
    """The average of each window."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, count_include_pad: bool = True) -> None:
        self.kernel_size, self.stride, self.padding, self.count_include_pad = kernel_size, stride, padding, count_include_pad

    def forward(self, x: TensorLike) -> Tensor:
        return convolution.avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.count_include_pad)

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AdaptiveAvgPool2d(Module):
    """Averages over output_size windows that share the image out evenly."""

    def __init__(self, output_size: Pair) -> None:
        self.output_size = output_size

    def forward(self, x: TensorLike) -> Tensor:
        return convolution.adaptive_avg_pool2d(x, self.output_size)

    def extra_repr(self) -> str:
        return f"{self.output_size}"
