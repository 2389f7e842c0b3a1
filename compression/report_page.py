"""The page of HTML that reports on compressed models are: a table, plots inside it, nothing to load."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

NO_PLOTS: Final = "There are no plots: matplotlib is not installed (pip install 'tensorwright[train]')."
_COLOURS: Final = ("#9fb0c7", "#3568b0", "#d9822b", "#5a9e6f")
_STYLE: Final = (
    "body{font:14px sans-serif;margin:2em;max-width:100em}table{border-collapse:collapse}td,th{padding:3px 9px;border-bottom:1px "
    "solid #ddd;text-align:left;vertical-align:top}.n{text-align:right;white-space:nowrap}.b{height:5px;background:#cdd6e4;"
    "margin-top:3px}.b>i{display:block;height:5px;background:#3568b0}.p{display:flex;flex-wrap:wrap;gap:1em}svg{max-width:100%;"
    "height:auto}"
)
Cell = str | tuple[str, float] | tuple[str, float, float]


def page(
    title: str, said: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[Cell]], plots: Sequence[str] | None = None
) -> str:
    """A page with paragraphs, plots and a table.

    A cell is a text, or (text, share) with a bar under it, of which with (text, share, inner) a part is dark.
    `plots` are as `bars` and `points` give them.
    """
    body = "".join(f"<p>{html.escape(s)}</p>" for s in said if s)
    drawn = [p for p in plots or () if p]
    if plots and not drawn:
        body += f"<p>{html.escape(NO_PLOTS)}</p>"
    body += f'<div class="p">{"".join(drawn)}</div>' if drawn else ""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    lines = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    name = html.escape(title)
    return (
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style><h1>{name}</h1>{body}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>\n"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    text, share, *inner = cell
    width = 100 * min(max(share, 0.0), 1.0)
    within = 100 * min(inner[0] / share, 1.0) if inner and share > 0 else 100.0
    bar = f'<div class="b" style="width:{width:.1f}%"><i style="width:{within:.1f}%"></i></div>'
    return f'<td class="n">{html.escape(text)}{bar}</td>'


def bars(title: str, names: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    """Bars side by side for each name, one for each series, as SVG; '' without matplotlib, or anything to show."""
    if not names or not any(any(v) for v in series.values()):
        return ""
    figure = _figure(7.5, 1.2 + 0.16 * len(names) * max(len(series), 2))
    if figure is None:
        return ""
    axes = figure.subplots()
    thick = 0.8 / len(series)
    for k, (label, values) in enumerate(series.items()):
        at = [n - 0.4 + thick * (k + 0.5) for n in range(len(names))]
        axes.barh(at, values, height=thick, label=label, color=_COLOURS[k % len(_COLOURS)])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    return _finished(figure, axes, title, unit, len(series) > 1)


def points(title: str, names: Sequence[str], series: Mapping[str, Sequence[float | None]], unit: str) -> str:
    """One point for each name and series that has one, as SVG; '' without matplotlib, or anything to show."""
    if not any(v is not None for values in series.values() for v in values):
        return ""
    figure = _figure(7.5, 1.2 + 0.3 * len(names))
    if figure is None:
        return ""
    axes = figure.subplots()
    for k, (label, values) in enumerate(series.items()):
        found = [(v, n) for n, v in enumerate(values) if v is not None]
        axes.scatter([v for v, _ in found], [n for _, n in found], label=label, color=_COLOURS[(k + 1) % len(_COLOURS)], zorder=3)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="#eee")
    return _finished(figure, axes, title, unit, True)


def _figure(width: float, height: float) -> Any:
    """A matplotlib Figure, None where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _finished(figure: Any, axes: Any, title: str, unit: str, legend: bool) -> str:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
