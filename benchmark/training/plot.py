"""The picture of a summary of `figure2.py`: accuracy over the share of base KV, the task beside the one that fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sglang_prefillshare.training.sharing_curve import label_panel

STYLES: Final[dict[str, dict[str, Any]]] = {
    "full_ft": {"color": "tab:red", "marker": "s", "label": "full fine-tuning, naive sharing"},
    "prefillshare": {"color": "tab:blue", "marker": "o", "label": "prefillshare (eq. 7)"},
    "prefillshare_mixed": {"color": "tab:green", "marker": "^", "label": "prefillshare, random shares mixed in"},
}
TITLES: Final = {
    "code": "look up a key, write its value in a new way",
    "next_key": "limits: name the key that follows in the list",
}


def draw_curves(summary: Mapping[str, Any], target: Path) -> None:
    """Raises `ImportError` where matplotlib is not installed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shares = [100 * share for share in summary["shares"]]
    for panel, part in zip(panels, (summary, summary["limits"]), strict=True):
        for method, style in STYLES.items():
            panel.plot(shares, [100 * value for value in part[method]], **style)
            if "spread" in part:
                low, high = ([100 * value for value in part["spread"][method][end]] for end in ("min", "max"))
                panel.fill_between(shares, low, high, color=style["color"], alpha=0.15, linewidth=0)
        label_panel(panel, shares)
        panel.set_title(TITLES[part["task"]])
    panels[1].set_ylabel("")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    seeds = len(summary["per_seed"])
    told = "one seed" if seeds == 1 else f"mean of {seeds} seeds, bands from the lowest to the highest"
    figure.suptitle(f"A 0.9M-parameter base pretrained from scratch and its modules; {told}")
    figure.savefig(target, dpi=120)
