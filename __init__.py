"""Tensorwright: a deep-learning compiler. A model in Python becomes one native program, forward and training.

    import tensorwright as tw
    from tensorwright import nn

    exe = tw.compile(nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), tw.spec(1, 784))
    y = exe(x)

Names are imported when first used, so that `import tensorwright` stays fast.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compression.compress import compress as compress
    from .compression.pruning import prune as prune
    from .compression.quantize import quantize as quantize
    from .compression.quantize import quantize_aware as quantize_aware
    from .driver import compile as compile
    from .driver import load as load
    from .frontend.control import cond as cond
    from .frontend.control import scan as scan
    from .frontend.control import while_loop as while_loop
    from .frontend.functional import *  # noqa: F403
    from .frontend.gradients import functional_call as functional_call
    from .frontend.gradients import grad as grad
    from .frontend.gradients import jvp as jvp
    from .frontend.gradients import value_and_grad as value_and_grad
    from .frontend.gradients import vjp as vjp
    from .frontend.nn.init import seed as seed
    from .frontend.specs import spec as spec
    from .frontend.tracing import trace as trace
    from .ir.errors import TensorwrightError as TensorwrightError
    from .runtime.executable import Executable as Executable
    from .settings import config as config
    from .training.errors import CheckpointError as CheckpointError
    from .training.errors import CheckpointWarning as CheckpointWarning
    from .training.errors import NonFiniteLossError as NonFiniteLossError
    from .training.search import search as search
    from .training.trainer import Trainer as Trainer

__version__ = "0.1.0"

# public name -> the module that defines it; a name that is itself a module maps to that module with a trailing dot.
_WHERE = {
    "Graph": "ir.graph",
    "TensorwrightError": "ir.errors",
    "compile": "driver",
    "load": "driver",
    "Executable": "runtime.executable",
    "Trainer": "training.trainer",
    "CheckpointError": "training.errors",
    "CheckpointWarning": "training.errors",
    "NonFiniteLossError": "training.errors",
    "callbacks": "training.callbacks.",
    "search": "training.search",
    "compress": "compression.compress",
    "prune": "compression.pruning",
    "quantize": "compression.quantize",
    "quantize_aware": "compression.quantize",
    "compression": "compression.",
    "config": "settings",
    "spec": "frontend.specs",
    "trace": "frontend.tracing",
    "grad": "frontend.gradients",
    "value_and_grad": "frontend.gradients",
    "vjp": "frontend.gradients",
    "jvp": "frontend.gradients",
    "functional_call": "frontend.gradients",
    "scan": "frontend.control",
    "cond": "frontend.control",
    "while_loop": "frontend.control",
    "seed": "frontend.nn.init",
    "nn": "frontend.nn.",
    "losses": "frontend.losses.",
    "optim": "frontend.optim.",
    "schedules": "frontend.schedules.",
    "regularizers": "frontend.regularizers.",
    "metrics": "frontend.metrics.",
    "random": "frontend.random.",
    "errors": "ir.errors.",
    "onnx": "frontend.onnx.",
}
_FUNCTIONS = """
    Tensor abs absolute adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d add all amax amin
    any arange argmax argmin argsort astype avg_pool1d avg_pool2d batch_norm batch_norm_training bitwise_and bitwise_not
    bitwise_or bitwise_xor broadcast_to ceil celu channel_dropout clip concatenate conv1d conv2d conv_transpose1d
    conv_transpose2d cos cosine_similarity cumprod cumsum divide dot dropout einsum elu embedding equal erf exp expand_dims
    expm1 eye flatten flip floor floor_divide full full_like gelu glu greater greater_equal grid_sample group_norm
    hard_sigmoid hard_swish hardtanh instance_norm interpolate invert iota isfinite isinf isnan layer_norm leaky_relu left_shift
    less less_equal linear linspace log log10 log1p log2 log_sigmoid log_softmax logical_and logical_not logical_or logical_xor
    logsumexp matmul max max_pool1d max_pool2d maximum mean meshgrid min minimum mish mod moveaxis multiply negative norm
    not_equal one_hot ones ones_like outer pad permute_dims pow power prelu prod ravel reciprocal relu relu6 remainder
    repeat reshape resize right_shift rms_norm roll round rsqrt scaled_dot_product_attention scatter scatter_add selu sigmoid sign
    silu sin sinusoidal_positions softmax softplus softsign sort split sqrt square squeeze stack std stop_gradient subtract
    sum swapaxes swish take take_along_axis tan tanh tile top_k transpose tril triu true_divide trunc var where zeros
    zeros_like
"""
_WHERE |= dict.fromkeys(_FUNCTIONS.split(), "frontend.functional")


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'tensorwright' has no attribute {name!r}")
    if where.endswith("."):
        value = _import_module("." + where[:-1], __name__)
    else:
        value = getattr(_import_module("." + where, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
