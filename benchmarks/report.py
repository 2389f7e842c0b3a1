"""A comparison's report as Markdown tables and as a bar chart (matplotlib)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorwright.ir.errors import RuntimeUnavailableError

Row = Mapping[str, Any]
OURS = "tensorwright"


def markdown(report: Mapping[str, Any], command: str) -> str:
    """The tables: ratios and times, compile times, memory and size; where and when, with which command; what was skipped."""
    rows, host = report["rows"], report["machine"]
    peers = list(dict.fromkeys(p for r in rows for p in r["peers_ms"]))
    lines = [
        f"`{command}`: {host['cpu']} ({host['target']}), {host['threads']} of {host['cores']} cores, {host['date']}, Python "
        f"{host['python']}; {', '.join(f'{k} {v}' for k, v in host['versions'].items())}.",
        "",
        "Milliseconds a call, median of interleaved rounds; the ratio is best peer by ours (of first deciles in brackets).",
        "",
        *table(_times(peers), rows),
    ]
    if report.get("geomean_ratio"):
        lines += ["", f"Geometric mean: **{report['geomean_ratio']:.2f}x** of the best peer."]
    lines += [
        "",
        "Seconds to compile and make the first call, imports not counted; warm is ours from the cache in a new process.",
        "",
    ]
    lines += table(_compile(peers), rows)
    lines += ["", "Peak memory of each contestant's process in MB (in brackets: what its import takes).", ""]
    lines += table(_memory(peers), rows)
    lines += ["", "| contestant | import s | installed MB |", "|---|---|---|"]
    for c in (OURS, *peers):
        size = report.get("installed_bytes", {}).get(c)
        seconds = [r["facts"][c]["import"] for r in rows if c in r["facts"]]
        shown = f"{statistics.median(seconds):.2f}" if seconds else "–"
        lines.append(f"| {c} | {shown} | {'–' if size is None else f'{size / 1e6:.0f}'} |")
    lines += ["", *remarks(report)]
    return "\n".join(lines) + "\n"


Columns = Mapping[str, Callable[[Row], str]]


def table(columns: Columns, rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(f(r) for f in columns.values()) + " |" for r in rows]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _times(peers: Sequence[str]) -> Columns:
    def peer(name: str) -> Callable[[Row], str]:
        def show(r: Row) -> str:
            text = _ms(r["peers_ms"].get(name))
            return f"**{text}**" if r["best_peer"] == name else "wrong" if name in r["out"] else text

        return show

    def spread(r: Row) -> str:
        return " to ".join(_ms(t) for t in r["spread_ms"][OURS])

    def fraction(r: Row) -> str:
        if r["benchmark_error"]:
            return f"error: {r['fraction_of_peak']:.0%}"
        return f"{r['fraction_of_peak']:.0%} {'effective' if r['effective'] else r['bound']}"

    return {
        "workload": lambda r: r["name"],
        "ratio": lambda r: (
            f"**{r['ratio_to_best']:.2f}** ({r['ratio_undisturbed']:.2f}) {r['best_peer']}" if r["best_peer"] else "no peer"
        ),
        "ours": lambda r: _ms(r["ours_ms"]),
        "first to last decile": spread,
        **{p: peer(p) for p in peers},
        "GFLOP/s": lambda r: f"{r['gflops']:.1f}",
        "GB/s": lambda r: f"{r['gbps']:.1f}",
        "of the peak": fraction,
        "error": lambda r: f"{r['max_rel_error']:.0e}",
        "busy elsewhere": lambda r: f"{r['busy_elsewhere']:.2f}",
    }


def _compile(peers: Sequence[str]) -> Columns:
    def show(name: str) -> Callable[[Row], str]:
        return lambda r: f"{r['compile_seconds'][name]:.2f}" if name in r["compile_seconds"] else "–"

    return {
        "workload": lambda r: r["name"],
        "ours": show(OURS),
        "ours, warm": lambda r: f"{r['warm_seconds']:.3f}",
        **{p: show(p) for p in peers},
    }


def _memory(peers: Sequence[str]) -> Columns:
    def show(name: str) -> Callable[[Row], str]:
        def text(r: Row) -> str:
            f = r["facts"].get(name)
            return "–" if f is None else f"{f['peak_rss'] / 1e6:.0f} ({f['import_rss'] / 1e6:.0f})"

        return text

    return {"workload": lambda r: r["name"], "ours": show(OURS), **{p: show(p) for p in peers}}


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know besides: who did not take part and why, and what went wrong."""
    lines = [f"- {p} was skipped: {why}." for p, why in report["skipped"].items()]
    lines += [f"- {name} failed ({why})." for name, why in report.get("failed", {}).items()]
    aside: dict[tuple[str, str], list[str]] = {}
    for r in report["rows"]:
        for p, why in r["aside"].items():
            aside.setdefault((p, why), []).append(r["name"])
        lines += [f"- {r['name']}: {p} is out: {why}." for p, why in r["out"].items()]
        if r["benchmark_error"]:
            lines.append(f"- {r['name']}: BENCHMARK ERROR: {r['fraction_of_peak']:.2f} of the roofline.")
        if not all(r["bits_equal"].values()):
            lines.append(f"- {r['name']}: ERROR: bits depend on the number of threads: {r['bits_equal']}.")
    lines += [f"- {p} does not take part in {', '.join(names)}: {why}." for (p, why), names in aside.items()]
    if report.get("interrupted"):
        lines.append("- The run was interrupted: these are the rows that it had.")
    return lines


def chart(report: Mapping[str, Any], path: str | Path) -> None:
    """A bar per workload: how many times as fast as the best peer; a dot for each other peer. PNG, SVG or PDF by the suffix.

    Raises RuntimeUnavailableError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeUnavailableError("a chart needs matplotlib: pip install 'tensorwright[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in report["rows"] if r["best_peer"]]
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.34 * len(rows)), layout="constrained")
    places, ratios = range(len(rows)), [r["ratio_to_best"] for r in rows]
    colors = ["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios]
    axes.barh(places, ratios, color=colors, height=0.62, label="best peer's time / ours")
    peers = list(dict.fromkeys(p for r in rows for p in r["peers_ms"]))
    end = 4.0 if not ratios else max(4.0, 1.25 * max(ratios))
    for k, peer in enumerate(peers):
        points = [(r["ratios"][peer], i) for i, r in enumerate(rows) if r["ratios"].get(peer, end) < end]
        style: dict[str, Any] = {"s": 18, "marker": "osD^vPX*ph"[k % 10], "label": peer, "zorder": 3, "edgecolors": "white"}
        axes.scatter([x for x, _ in points], [y for _, y in points], linewidths=0.4, **style)
    for i, r in enumerate(rows):
        axes.annotate(
            f"{r['ratio_to_best']:.2f}x",
            (0, i),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="white",
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(places, [r["name"] for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    host, mean = report["machine"], report.get("geomean_ratio")
    axes.set_xlabel(f"times as fast as the peer (peers beyond {end:.1f} are not shown)")
    title = f"{host['cpu']}, {host['threads']} threads, {host['date']}"
    axes.set_title(f"{title}: geometric mean {mean:.2f}x of the best peer" if mean else title, fontsize=10)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06 - 1.2 / (2 + len(rows))), ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
