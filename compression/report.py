"""What was done to each layer, and why: as text, JSON or a page of HTML."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .report_page import Cell, bars, page


@dataclass
class LayerReport:
    """One layer.

    choice        'int8', 'int4', 'float'; reason says why
    scale, zero   of what it reads, None where that is not quantised, or in each run
    low, high     the range that was seen of it
    bytes_before, bytes_after   of its weights
    weight_error  of the quantised weights: root of the mean squared error over that of the weights
    float_ms, int8_ms  measured, None where nobody measured
    """

    name: str
    op: str
    choice: str
    reason: str
    scale: float | None = None
    zero: int | None = None
    low: float | None = None
    high: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    weight_error: float = 0.0
    float_ms: float | None = None
    int8_ms: float | None = None


@dataclass
class Report:
    """What `tw.quantize(..., report=Report())` fills in."""

    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def totals(self) -> dict[str, Any]:
        """Layers by choice, and bytes of weights."""
        choices = sorted({x.choice for x in self.layers})
        return {
            "layers": {c: sum(x.choice == c for x in self.layers) for c in choices},
            "bytes_before": sum(x.bytes_before for x in self.layers),
            "bytes_after": sum(x.bytes_after for x in self.layers),
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "settings": self.settings,
            "layers": [asdict(x) for x in self.layers],
            "notes": self.notes,
            "totals": self.totals,
        }

    def __str__(self) -> str:
        wide = max([len(x.name) for x in self.layers] + [5])
        lines = [f"{'layer':{wide}}  choice  weights     error    reason"]
        for x in self.layers:
            lines.append(f"{x.name:{wide}}  {x.choice:6}  {x.bytes_after:>9,}  {x.weight_error:7.4f}  {x.reason}")
        t = self.totals
        counts = ", ".join(f"{n} {c}" for c, n in t["layers"].items()) or "no layers"
        lines.append(f"{counts}; weights {t['bytes_before']:,} -> {t['bytes_after']:,} bytes")
        return "\n".join([*lines, *self.notes])

    def save(self, path: str | Path) -> None:
        """Writes JSON, or a page of HTML where the name ends in .html."""
        p = Path(path)
        text = self.html() if p.suffix in (".html", ".htm") else json.dumps(self.as_dict(), indent=1) + "\n"
        p.write_text(text, encoding="utf-8")

    def html(self) -> str:
        """A page that needs nothing else: plots, and a table of the layers."""
        most = max([x.bytes_before for x in self.layers] + [1])
        worst = max([x.weight_error for x in self.layers] + [1e-9])
        rows: list[list[Cell]] = []
        for x in self.layers:
            seen = "" if x.low is None or x.high is None else f"{x.low:.4g} .. {x.high:.4g}"
            scale = "" if x.scale is None else f"{x.scale:.4g}, {x.zero}"
            times = "" if x.float_ms is None or x.int8_ms is None else f"{x.float_ms:.3f} / {x.int8_ms:.3f}"
            size = (f"{x.bytes_before:,} → {x.bytes_after:,}", x.bytes_before / most, x.bytes_after / most)
            error = (f"{x.weight_error:.4f}", x.weight_error / worst)
            rows.append([x.name, x.op, x.choice, x.reason, seen, scale, times, size, error])
        t = self.totals
        heads = (
            "layer", "op", "choice", "reason", "range seen", "scale, zero point", "ms float / int8", "bytes of weights", "error",
        )  # fmt: skip
        timed = [x for x in self.layers if x.float_ms is not None and x.int8_ms is not None]
        names = [x.name for x in self.layers]
        plots = [
            bars("Weights of each layer", names, {"before": [x.bytes_before / 1024 for x in self.layers],
                 "after": [x.bytes_after / 1024 for x in self.layers]}, "KiB"),
            bars("Error of the quantised weights", names, {"error": [x.weight_error for x in self.layers]}, "relative"),
            bars("Time of each layer alone", [x.name for x in timed], {"float": [x.float_ms or 0.0 for x in timed],
                 "int8": [x.int8_ms or 0.0 for x in timed]}, "ms"),
        ]  # fmt: skip
        settings = ", ".join(f"{k} = {v}" for k, v in self.settings.items())
        said = [settings, *self.notes, f"Weights: {t['bytes_before']:,} → {t['bytes_after']:,} bytes."]
        return page(f"{self.model}: quantised", said, heads, rows, plots)
