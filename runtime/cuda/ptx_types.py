"""PTX's fundamental types: how many bytes each has, how registers hold it, and as which numpy dtype its bits are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

WARP: Final = 32


@dataclass(frozen=True)
class PtxType:
    """`kind` is one of b (bits), u, s, f, p (predicate), x (two packed floats); `dtype` views `size` bytes of a register.

    bf16 and packed pairs have no numpy dtype of their own: they are read as bits.
    """

    name: str
    size: int
    kind: str
    dtype: np.dtype[Any]

    @property
    def bits(self) -> int:
        return self.size * 8

    @property
    def storage(self) -> np.dtype[Any]:
        """The dtype in which a register of this size is kept: bool for predicates, unsigned otherwise."""
        return np.dtype(np.bool_) if self.kind == "p" else UNSIGNED[self.size]


UNSIGNED: Final[dict[int, np.dtype[Any]]] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}


def _table() -> dict[str, PtxType]:
    rows: list[tuple[str, int, str, str]] = [
        *((f"{k}{n * 8}", n, k, f"{'i' if k == 's' else 'u'}{n}") for k in "bus" for n in (1, 2, 4, 8)),
        *((f"f{n * 8}", n, "f", f"f{n}") for n in (2, 4, 8)),
        ("bf16", 2, "f", "u2"), ("tf32", 4, "f", "f4"), ("pred", 1, "p", "?"), ("f16x2", 4, "x", "u4"), ("bf16x2", 4, "x", "u4"),
    ]  # fmt: skip
    return {name: PtxType(name, size, kind, np.dtype(dtype)) for name, size, kind, dtype in rows}


TYPES: Final = _table()
