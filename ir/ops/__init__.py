"""The op records. Importing this package registers them all."""

from . import (
    adaptive,
    barriers,
    binary,
    compare,
    contract,
    control,
    conv,
    indexing,
    matmul,
    movement,
    pool,
    random,
    reduce,
    structural,
    unary,
    winograd,
)
from .common import sample_node

__all__ = [
    "adaptive", "barriers", "binary", "compare", "contract", "control", "conv", "indexing", "matmul", "movement", "pool",
    "random", "reduce", "sample_node", "structural", "unary", "winograd",
]  # fmt: skip
