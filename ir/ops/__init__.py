"""The op records. Importing this package registers them all."""

from . import (
    adaptive,
    barriers,
    binary,
    bits,
    coded,
    compare,
    contract,
    control,
    conv,
    depthwise,
    indexing,
    matmul,
    movement,
    multiply_add,
    order,
    pool,
    quantize,
    random,
    reduce,
    resample,
    scatter,
    sparse,
    structural,
    unary,
    winograd,
)
from .common import sample_node

__all__ = [
    "adaptive", "barriers", "binary", "bits", "coded", "compare", "contract", "control", "conv", "depthwise", "indexing",
    "matmul", "movement", "multiply_add", "order", "pool", "quantize", "random", "reduce", "resample", "sample_node",
    "scatter", "sparse", "structural", "unary", "winograd",
]  # fmt: skip
