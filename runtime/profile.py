"""Where the time of a run goes: one row per kernel, against what the machine can do."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import InputError
from .buffers import Array, address_of

if TYPE_CHECKING:
    from .binding import Binding

# GFLOP/s of fused multiply-adds that `threads` threads reach, measured; handed in, because measuring needs a compiler
Peak = Callable[[int], float]


@dataclass(frozen=True)
class KernelTime:
    """One kernel: its time, its rates, and `fraction_of_peak`, its GFLOP/s over the measured peak (None: not measured).

    `weights` are the parameters that it reads, and what was prepared from them, by name."""

    name: str
    milliseconds: float
    share: float
    gflops: float
    gbps: float
    fraction_of_peak: float | None
    parallel: bool
    nodes: tuple[str, ...]
    note: str
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """The medians of `repeats` runs. `print()` shows it, `to_json()` keeps it."""

    name: str
    threads: int
    repeats: int
    milliseconds: float
    peak_gflops: float | None
    kernels: tuple[KernelTime, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def table(self, limit: int | None = None) -> Any:
        """A rich Table, kernels in the order in which they run; `limit` keeps the slowest ones."""
        from rich.table import Table

        peak = "" if self.peak_gflops is None else f", peak {self.peak_gflops:.0f} GFLOP/s"
        count = f"{self.threads} thread" + ("" if self.threads == 1 else "s")
        table = Table(title=f"{self.name}: {self.milliseconds:.3f} ms, {count}{peak}", title_justify="left")
        for column in ("kernel", "ms", "share", "GFLOP/s", "GB/s", "of peak", "stands for"):
            table.add_column(
                column, justify="left" if column in ("kernel", "stands for") else "right", no_wrap=column != "stands for"
            )
        slowest = sorted(range(len(self.kernels)), key=lambda i: -self.kernels[i].milliseconds)
        kept = set(slowest[:limit])
        for i, k in enumerate(self.kernels):
            if i in kept:
                fraction = "-" if k.fraction_of_peak is None else f"{k.fraction_of_peak:.1%}"
                nodes = " ".join(k.nodes[:6]) + (f" (+{len(k.nodes) - 6})" if len(k.nodes) > 6 else "")
                table.add_row(
                    k.name, f"{k.milliseconds:.4f}", f"{k.share:.1%}", f"{k.gflops:.1f}", f"{k.gbps:.1f}", fraction, nodes
                )
        if len(kept) < len(self.kernels):
            rest = [k for i, k in enumerate(self.kernels) if i not in kept]
            table.add_row(
                f"... {len(rest)} more", f"{sum(k.milliseconds for k in rest):.4f}", f"{sum(k.share for k in rest):.1%}"
            )
        return table

    def print(self, limit: int | None = None) -> None:
        """Shows the table in the terminal."""
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=160)).print(self.table(limit))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, file=io.StringIO())
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]


def measure(binding: Binding, inputs: Sequence[Array], repeats: int, peak: Peak | None) -> Profile:
    """The profile of a binding on contiguous inputs; one run first, unmeasured, warms caches and threads. Before it the weights'
    pages become huge, as they do in the course of calls: profiles of one program, new or old, are the same.

    Raises InputError if `repeats` is no integer of at least 1.
    """
    if type(repeats) is not int or repeats < 1:
        raise InputError(f"repeats: expected an integer of at least 1, got {repeats!r}")
    infos, threads = binding.program.kernels, binding.threads_now
    binding.settle_now()
    ticks = np.zeros((repeats + 1, len(infos) + 1), np.int64)
    addresses = [address_of(a) for a in inputs]
    binding.timed(inputs, addresses, ticks)
    spans = np.diff(ticks[1:], axis=1)
    seconds = np.median(spans, axis=0) * 1e-9
    total = float(np.median(spans.sum(axis=1))) * 1e-9
    peaks = {} if peak is None else {n: peak(n) for n in {1, threads}}
    rows = []
    for info, s in zip(infos, seconds.tolist(), strict=True):
        rate = 1e-9 / s if s > 0 else 0.0
        best = peaks.get(threads if info.parallel else 1)
        gflops = info.flops * rate
        rows.append(
            KernelTime(
                name=info.name,
                milliseconds=s * 1e3,
                share=s / total if total else 0.0,
                gflops=gflops,
                gbps=info.bytes * rate,
                fraction_of_peak=None if best is None else gflops / best,
                parallel=info.parallel,
                nodes=info.nodes,
                note=info.note,
                weights=info.weights,
            )
        )
    return Profile(binding.program.name, threads, repeats, total * 1e3, peaks.get(threads), tuple(rows))
