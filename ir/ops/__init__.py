"""The op records. Importing this package registers them all."""

from . import (
    barriers,
    binary,
    compare,
    contract,
    conv,
    indexing,
    matmul,
    movement,
    pool,
    random,
    reduce,
    structural,
    unary,
)
from .common import sample_node

__all__ = [
    "barriers", "binary", "compare", "contract", "conv", "indexing", "matmul", "movement", "pool", "random", "reduce",
    "sample_node", "structural", "unary",
]  # fmt: skip
