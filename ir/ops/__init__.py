"""The op records. Importing this package registers them all."""

from . import (
    adaptive,
    barriers,
    binary,
    bits,
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
    resample,
    scatter,
    structural,
    unary,
    winograd,
)
from .common import sample_node

__all__ = [
    "adaptive", "barriers", "binary", "bits", "compare", "contract", "control", "conv", "depthwise", "indexing", "matmul",
    "movement", "order", "pool", "quantize", "random", "reduce", "resample", "sample_node", "scatter", "structural", "unary",
    "winograd",
]  # fmt: skip
