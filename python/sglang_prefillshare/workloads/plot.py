"""The pictures of a summary, in the form of the paper's Figures 3 and 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

FIGURE_3: Final = "figure3.png"
FIGURE_4: Final = "figure4.png"

STYLES: Final[dict[str, dict[str, Any]]] = {
    "shared": {"color": "tab:blue", "marker": "o"},
    "isolated": {"color": "tab:orange", "marker": "s"},
    "colocated": {"color": "0.45", "marker": "^", "linestyle": "--"},
    "unified": {"color": "tab:green", "marker": "D"},
    "shared_lora": {"color": "tab:purple", "marker": "v"},
    "stock_lora": {"color": "tab:red", "marker": "x"},
}
NAMES: Final = {
    "shared": "shared prefill (ours)",
    "isolated": "isolated pairs (stock)",
    "colocated": "colocated (stock)",
    "unified": "one server (ours)",
    "shared_lora": "shared prefill, adapters (ours)",
    "stock_lora": "--enable-lora (stock)",
}

Series = Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]
"""By topology: (x, what the summary has of it there)."""


def draw(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what the summary has points for; returns the files. Raises `ImportError` without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for target, make in ((folder / FIGURE_3, _figure_3), (folder / FIGURE_4, _figure_4)):
        figure = make(summary)
        if figure is not None:
            figure.savefig(target, dpi=130)
            drawn.append(target)
    return drawn


def _figure_3(summary: Mapping[str, Any]) -> Any:
    """p95 latency, throughput and TTFT against the arrival rate; a row for each workload, the best cap at each rate."""
    rows = {name: _by_rate(found) for name, found in summary["workloads"].items()}
    rows = {name: series for name, series in rows.items() if any(len(points) > 1 for points in series.values())}
    if not rows:
        return None
    columns: list[tuple[str, str, float, bool]] = [
        ("p95 latency of a call, s", "p95_e2e_latency_ms", 1000.0, True),
        ("throughput, output tokens/s", "output_throughput", 1.0, False),
        ("median TTFT, s", "median_ttft_ms", 1000.0, True),
    ]
    figure, panels = _panels(len(rows), len(columns))
    for (workload, series), line in zip(rows.items(), panels, strict=True):
        for panel, (label, field, unit, is_log) in zip(line, columns, strict=True):
            _lines(panel, series, field, unit)
            panel.set_ylabel(label)
            panel.set_xlabel("arrival rate, sessions/s")
            panel.set_title(workload, loc="left", fontsize="medium", fontweight="bold")
            if is_log:
                panel.set_yscale("log")
                _plain_log(panel.yaxis)
            else:
                panel.set_ylim(bottom=0)
            panel.set_xlim(left=0)
    return _finished(figure, panels, summary)


def _figure_4(summary: Mapping[str, Any]) -> Any:
    """Hit ratio and throughput against the cap on concurrent sessions; a column for each workload, one arrival rate."""
    columns = {}
    for name, found in summary["workloads"].items():
        rate, series = _by_cap(found)
        if any(len(points) > 1 for points in series.values()):
            columns[name] = (rate, series)
    if not columns:
        return None
    figure, panels = _panels(2, len(columns))
    for place, (workload, (rate, series)) in enumerate(columns.items()):
        hits, throughput = panels[0][place], panels[1][place]
        _lines(hits, series, "hit_ratio", 0.01)
        hits.set_ylim(0, 100)
        hits.set_ylabel("prefix hit ratio, %")
        hits.set_title(f"{workload}, {_when(rate)}", loc="left", fontsize="medium", fontweight="bold")
        _lines(throughput, series, "output_throughput", 1.0)
        throughput.set_ylim(bottom=0)
        throughput.set_ylabel("throughput, output tokens/s")
        caps = sorted({cap for points in series.values() for cap, _ in points})
        for panel in (hits, throughput):
            panel.set_xscale("log", base=2)
            panel.set_xticks(caps, [f"{cap:g}" for cap in caps])
            panel.minorticks_off()
            panel.set_xlabel("max concurrent sessions")
    return _finished(figure, panels, summary)


def _when(rate: Any) -> str:
    if isinstance(rate, str):
        return {"inf": "all sessions at once", "trace": "arrivals of the trace"}[rate]
    return f"{rate:g} sessions/s"


def _by_rate(found: Mapping[str, Any]) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    series: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for point in found["by_rate"]:
        if isinstance(point["request_rate"], str):
            continue
        for topology, values in point["topologies"].items():
            series.setdefault(topology, []).append((point["request_rate"], values))
    return {topology: sorted(points, key=lambda point: point[0]) for topology, points in series.items()}


def _by_cap(found: Mapping[str, Any]) -> tuple[Any, dict[str, list[tuple[float, Mapping[str, Any]]]]]:
    """At the arrival rate that has most caps; of several the highest."""
    rates = [point["request_rate"] for point in found["points"]]
    rate = max(
        dict.fromkeys(rates), key=lambda rate: (rates.count(rate), float("inf") if rate == "trace" else float(rate))
    )
    series: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for point in found["points"]:
        if point["request_rate"] == rate:
            for topology, values in point["topologies"].items():
                series.setdefault(topology, []).append((point["max_sessions"], values))
    return rate, {topology: sorted(points, key=lambda point: point[0]) for topology, points in series.items()}


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4.3 * columns, 3.2 * rows + 0.7), layout="constrained", squeeze=False
    )
    return figure, panels


def _scaled(found: Mapping[str, Any], field: str, unit: float) -> tuple[float, float, float] | None:
    """(median, min, max) in another unit; `None` where there is no such value."""
    value = found.get(field)
    return None if value is None else (value["median"] / unit, value["min"] / unit, value["max"] / unit)


def _lines(panel: Any, series: Series, field: str, unit: float) -> None:
    """A line for each topology: medians, and a band from the smallest to the largest."""
    for topology, style in STYLES.items():
        points = [
            (x, value) for x, found in series.get(topology, ()) if (value := _scaled(found, field, unit)) is not None
        ]
        if not points:
            continue
        at = [x for x, _ in points]
        median, low, high = ([value[index] for _, value in points] for index in range(3))
        panel.plot(at, median, label=NAMES[topology], **style)
        panel.fill_between(at, low, high, color=style["color"], alpha=0.18, linewidth=0)
    panel.grid(alpha=0.25)


def _plain_log(axis: Any) -> None:
    """0.2, 1, 5 instead of powers of ten: a panel often spans less than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _finished(figure: Any, panels: Any, summary: Mapping[str, Any]) -> Any:
    from matplotlib import pyplot

    found = {label: handle for row in panels for panel in row
             for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), frameon=False)
    config, device = summary["config"], summary["environment"]["device"]
    agents, repeats = len(config["models"]["agents"]), config["repeats"]
    band = f"; median of {repeats} repeats, band min to max" if repeats > 1 else ""
    figure.suptitle(f"{agents} models; {device['name']}, {device['cpu_count']} cores{band}", fontsize="small")
    pyplot.close(figure)  # out of pyplot's hands; it can still be saved
    return figure
