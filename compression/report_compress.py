"""What `tw.compress` says: for each layer its kind and why, times as predicted and as measured, bytes, errors; totals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from .report_page import bars, page, points

NEAR: Final = 0.25  # by how much a predicted time may miss the measured one


@dataclass
class Option:
    """A kind that a layer could be: its time and bytes, and what the metric loses, and how far results move, where it alone is
    so (None: not asked, since it is no cheaper). `why`: the reason why it cannot be."""

    name: str
    ms: float | None = None
    bytes: int | None = None
    drop: float | None = None
    error: float | None = None
    why: str = ""


@dataclass
class Choice:
    """One layer.

    choice, reason  its kind, and why
    predicted_ms    in a model whose layers are all of that kind
    measured_ms, original_ms   in the model that was made, and in the original; all three took turns
    bytes_before, bytes_after  of its weights
    drop, error     what the metric lost and how far results moved where it alone was so
    options         all kinds that were looked at
    """

    name: str
    op: str
    shape: list[int] = field(default_factory=list)
    choice: str = "fp32"
    reason: str = ""
    predicted_ms: float = 0.0
    measured_ms: float = 0.0
    original_ms: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    drop: float = 0.0
    error: float = 0.0
    options: list[Option] = field(default_factory=list)

    @property
    def near(self) -> bool:
        """Whether the predicted time is within a quarter of the measured one."""
        return abs(self.predicted_ms - self.measured_ms) <= NEAR * self.measured_ms


@dataclass
class CompressReport:
    """What was done to a model.

    original_ms, measured_ms   a call of the original and of the compressed model, in rounds in which they took turns
    predicted_ms   what the layers' predicted times say, at the pace that the machine had in these rounds
    ratio       the compressed model's time over the original's, median of the rounds
    noise       by how much the original differed from itself in them
    error       root mean square difference of results, relative to the original's
    break_even  by pattern and layer, the share of zeros from which on its sparse kernel is as fast as the dense one (None: never)
    """

    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metric_before: float = 0.0
    metric_after: float = 0.0
    error: float = 0.0
    original_ms: float = 0.0
    predicted_ms: float = 0.0
    measured_ms: float = 0.0
    ratio: float = 1.0
    noise: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    break_even: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, Any]:
        """Layers by kind, and the figures of the whole model."""
        names = list(dict.fromkeys(x.choice for x in self.layers))
        timed = [x for x in self.layers if x.measured_ms]
        return {
            "layers": {n: sum(x.choice == n for x in self.layers) for n in names},
            "metric_before": self.metric_before, "metric_after": self.metric_after, "error": self.error,
            "original_ms": self.original_ms, "predicted_ms": self.predicted_ms, "measured_ms": self.measured_ms,
            "ratio": self.ratio, "noise": self.noise, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
            "predicted_within_a_quarter": sum(x.near for x in timed) / len(timed) if timed else 1.0,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model, "settings": self.settings, "layers": [asdict(x) for x in self.layers], "notes": self.notes,
            "totals": self.totals, "break_even": self.break_even,
        }  # fmt: skip

    def _said(self) -> list[str]:
        t = self.totals
        kinds = ", ".join(f"{n} {c}" for c, n in t["layers"].items()) or "no layers"
        faster = f"{1 / self.ratio:.2f}x as fast" if self.ratio > 0 else ""
        return [
            f"{kinds}.",
            f"Time: {self.original_ms:.4f} -> {self.measured_ms:.4f} ms ({faster}; predicted {self.predicted_ms:.4f} ms, "
            f"{t['predicted_within_a_quarter']:.0%} of layers within a quarter of it; noise {self.noise:.1%}).",
            f"Metric {self.settings.get('metric', '')}: {self.metric_before:.6g} -> {self.metric_after:.6g}; results moved by "
            f"{self.error:.3g} of their size.",
            f"Weights: {self.bytes_before:,} -> {self.bytes_after:,} bytes.",
            *(_even(pattern, layers) for pattern, layers in self.break_even.items()),
        ]

    def __str__(self) -> str:
        wide = max([len(x.name) for x in self.layers] + [5])
        kind = max([len(x.choice) for x in self.layers] + [6])
        lines = [f"{'layer':{wide}}  {'choice':{kind}}  predicted  measured  original ms      bytes     error  reason"]
        for x in self.layers:
            lines.append(
                f"{x.name:{wide}}  {x.choice:{kind}}  {x.predicted_ms:9.4f} {x.measured_ms:9.4f}    {x.original_ms:9.4f}  "
                f"{x.bytes_after:>9,}  {x.error:8.2g}  {x.reason}"
            )
        return "\n".join([*lines, *self._said(), *self.notes])

    def save(self, path: str | Path) -> None:
        """Writes JSON, or a page of HTML where the name ends in .html."""
        p = Path(path)
        text = self.html() if p.suffix in (".html", ".htm") else json.dumps(self.as_dict(), indent=1) + "\n"
        p.write_text(text, encoding="utf-8")

    def html(self) -> str:
        """A page that needs nothing else: totals, plots, and a table of the layers."""
        names = [x.name for x in self.layers]
        most = max([x.bytes_before for x in self.layers] + [1])
        slowest = max([x.original_ms for x in self.layers] + [1e-9])
        worst = max([x.error for x in self.layers] + [1e-9])
        rows = [
            (
                x.name, f"{x.op} {x.shape}", x.choice, x.reason,
                (f"{x.predicted_ms:.4f}", x.predicted_ms / slowest),
                (f"{x.original_ms:.4f} → {x.measured_ms:.4f}", x.original_ms / slowest, x.measured_ms / slowest),
                (f"{x.bytes_before:,} → {x.bytes_after:,}", x.bytes_before / most, x.bytes_after / most),
                (f"{x.error:.3g}", x.error / worst), f"{x.drop:.4g}", _table(x.options),
            )
            for x in self.layers
        ]  # fmt: skip
        heads = (
            "layer", "op", "choice", "reason", "predicted ms", "measured ms", "bytes of weights", "error alone", "drop alone",
            "all kinds",
        )  # fmt: skip
        times = {
            "original": [x.original_ms for x in self.layers],
            "predicted": [x.predicted_ms for x in self.layers],
            "measured": [x.measured_ms for x in self.layers],
        }
        sizes = {"before": [x.bytes_before / 1024 for x in self.layers], "after": [x.bytes_after / 1024 for x in self.layers]}
        even = {p: [layers.get(n) for n in names] for p, layers in self.break_even.items()}
        errors = {"error": [x.error for x in self.layers]}
        plots = [
            bars("Time of each layer", names, times, "ms"),
            bars("Weights of each layer", names, sizes, "KiB"),
            bars("How far results move where one layer alone is compressed", names, errors, "relative"),
            points("Share of zeros from which on a sparse kernel is as fast", names, even, "share of zeros"),
        ]
        settings = ", ".join(f"{k} = {v}" for k, v in self.settings.items())
        return page(f"{self.model}: compressed", [settings, *self._said(), *self.notes], heads, rows, plots)


def _table(options: Sequence[Option]) -> str:
    return "; ".join(
        f"{o.name}: " + (o.why or f"{o.ms:.4f} ms, {o.bytes:,} bytes" + ("" if o.drop is None else f", drop {o.drop:.3g}"))
        for o in options
    )


def _even(pattern: str, layers: dict[str, float | None]) -> str:
    reached = sorted(v for v in layers.values() if v is not None)
    if not reached:
        return f"Break-even, {pattern}: at no share of zeros."
    return (
        f"Break-even, {pattern}: {reached[len(reached) // 2]:.0%} zeros (median of {len(reached)} layers, {reached[0]:.0%} to "
        f"{reached[-1]:.0%}" + (f"; never for {len(layers) - len(reached)})." if len(reached) < len(layers) else ").")
    )
