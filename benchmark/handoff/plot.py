"""The picture of a summary: bandwidth over prompt length, one panel per layout of the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from benchmark.handoff.cases import LAYOUTS
from benchmark.handoff.methods import COPY_LIMIT, INDEX_COPY, NIXL, OUR_COPY, OURS, STAGING

TITLES: Final = {"contiguous": "contiguous pages", "runs": "runs of 32 pages", "random": "random pages"}
STYLES: Final[dict[str, dict[str, Any]]] = {
    COPY_LIMIT: {"color": "0.45", "linestyle": "--"},
    OUR_COPY: {"color": "tab:blue", "linestyle": ":"},
    OURS: {"color": "tab:blue", "marker": "o"},
    NIXL: {"color": "tab:orange", "marker": "s"},
    INDEX_COPY: {"color": "tab:green", "marker": "^"},
    STAGING: {"color": "tab:red", "marker": "v"},
}


def draw(summary: dict[str, Any], target: Path) -> None:
    """Raises `ImportError` where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, panels = pyplot.subplots(1, len(LAYOUTS), figsize=(13, 4.6), sharey=True, layout="constrained")
    for panel, layout in zip(panels, LAYOUTS, strict=True):
        for method, style in STYLES.items():
            rows = [r for r in summary["rows"] if r["layout"] == layout and r["method"] == method and r["median_s"]]
            if not rows:
                continue
            tokens = [row["tokens"] for row in rows]
            fast, slow = ([row["bytes"] / row[key] / 1e9 for row in rows] for key in ("p10_s", "p90_s"))
            panel.plot(tokens, [row["bandwidth_bytes_per_s"] / 1e9 for row in rows], label=method, **style)
            panel.fill_between(tokens, slow, fast, color=style["color"], alpha=0.15, linewidth=0)
        sizes = sorted({row["tokens"] for row in summary["rows"]})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, ha="right")
        panel.set_title(TITLES[layout])
        panel.set_xlabel("prompt, tokens")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("GB/s handed over: median, p10 to p90")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    device = summary["device"]
    figure.suptitle(f"KV of {summary['config']['bytes_per_token'] / 1024:.1f} KiB per token; {device['name']}")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
