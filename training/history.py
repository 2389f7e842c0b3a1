"""What a training run reported: one row per epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..ir.errors import InputError, RuntimeUnavailableError

Row = dict[str, Any]


class History(list[Row]):
    """Rows of an epoch each: 'epoch', 'loss', the metrics, 'val_...' of both, 'learning_rate', 'seconds'.

    A list of dicts (`pandas.DataFrame(history)` takes it) with columns, a plot and JSON.
    """

    def column(self, name: str) -> list[Any]:
        """One value per epoch; None for epochs that did not report it. Raises InputError for a name that no epoch reports."""
        if not any(name in row for row in self):
            raise InputError(f"no epoch of the history reports {name!r}; there are {', '.join(self.names()) or 'no epochs'}")
        return [row.get(name) for row in self]

    def names(self) -> list[str]:
        """Everything that was reported, in the order it first appeared."""
        return list(dict.fromkeys(name for row in self for name in row))

    def best(self, name: str, mode: str | None = None) -> Row:
        """The row where `name` is best: smallest, or largest for accuracies and scores (`mode` 'min' or 'max' says so).

        Raises InputError where no epoch reports it.
        """
        sign = direction(name, mode)
        self.column(name)
        return min((r for r in self if r.get(name) is not None), key=lambda r: _rank(sign * r[name]))

    def to_json(self, path: str | Path | None = None) -> str:
        """The rows as JSON text, also written to `path` if given. Numbers that are not finite become null, as JSON has none."""
        text = json.dumps([{k: _plain(v) for k, v in row.items()} for row in self], indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path, names: tuple[str, ...] | list[str] | None = None) -> None:
        """Draws curves over epochs to a file (png, svg, pdf): one picture per metric, training and validation together.

        `names` are those without 'val_' (default: loss and all metrics that are numbers). Needs matplotlib: raises
        RuntimeUnavailableError without, InputError for an empty history or an unknown name.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise RuntimeUnavailableError(
                "history.plot draws with matplotlib, which is not installed: pip install 'tensorwright[train]'"
            ) from None
        if not self:
            raise InputError("the history holds no epoch to plot")
        numbers = [n for n in self.names() if all(isinstance(r.get(n, 0.0), (int, float)) for r in self)]
        base = [n for n in numbers if not n.startswith("val_") and n not in ("epoch", "seconds", "learning_rate")]
        chosen = base if names is None else list(names)
        figure = Figure(figsize=(4.8 * len(chosen), 3.6), layout="constrained")
        for place, name in enumerate(chosen, start=1):
            axes = figure.add_subplot(1, len(chosen), place)
            for column, label in ((name, "training"), (f"val_{name}", "validation")):
                if column == name or column in numbers:
                    values = self.column(column)
                    epochs = [r["epoch"] for r in self]
                    axes.plot(epochs, [math.nan if v is None else v for v in values], marker=".", label=label)
            axes.set_xlabel("epoch")
            axes.set_title(name)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path)


def direction(name: str, mode: str | None = None) -> float:
    """1.0 where less is better, -1.0 where more is. Raises InputError for a mode other than 'min' and 'max'."""
    if mode not in (None, "min", "max"):
        raise InputError(f"mode is 'min', 'max' or None (decided by the name), not {mode!r}")
    growing = ("accuracy", "precision", "recall", "f1", "auc", "top_")
    more = mode == "max" if mode is not None else any(word in name.lower() for word in growing)
    return -1.0 if more else 1.0


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
