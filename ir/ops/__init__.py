"""The op records. Importing this package registers them all."""

from . import (
    adaptive,
    barriers,
    binary,
    compare,
    contract,
    control,
    conv,
    depthwise,
    indexing,
    matmul,
    movement,
    order,
    pool,
    quantize,
    random,
    reduce,
    scatter,
    shift,
    structural,
    unary,
    winograd,
)
from .common import sample_node

__all__ = [
    "adaptive", "barriers", "binary", "compare", "contract", "control", "conv", "depthwise", "indexing", "matmul",
    "movement", "order", "pool", "quantize", "random", "reduce", "sample_node", "scatter", "shift", "structural", "unary",
    "winograd",
]  # fmt: skip
