"""The op records. Importing this package registers them all."""

from . import (
    adaptive,
    attention,
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
    tf32,
    unary,
    winograd,
)
from .common import sample_node

__all__ = [
    "adaptive", "attention", "barriers", "binary", "bits", "coded", "compare", "contract", "control", "conv", "depthwise",
    "indexing", "matmul", "movement", "multiply_add", "order", "pool", "quantize", "random", "reduce", "resample",
    "sample_node", "scatter", "sparse", "structural", "tf32", "unary", "winograd",
]  # fmt: skip
