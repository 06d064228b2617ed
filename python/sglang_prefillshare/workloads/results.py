"""The folder that a benchmark writes: rows and samples as they come, the summary and its pictures at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sglang_prefillshare.environment import PACKAGES, describe_environment
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.config import Benchmark
from sglang_prefillshare.workloads.driver import PointSamples
from sglang_prefillshare.workloads.plot import draw
from sglang_prefillshare.workloads.report import Row, call_sample, summarise

logger = logging.getLogger(__name__)

RESULTS: Final = "results.jsonl"
SAMPLES: Final = "samples.jsonl"
SUMMARY: Final = "summary.json"


class Results:
    """The folder that a run writes: rows and samples as they come, the summary at the end."""

    def __init__(
        self,
        folder: Path,
        benchmark: Benchmark,
        *,
        dtype: str | None = None,
        budget: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._about = {
            "config": benchmark.to_json(),
            "environment": describe_environment((*PACKAGES, "nixl", "uvloop")),
            "dtype": dtype,
            "budget": budget,
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, SAMPLES):
            (folder / name).write_text("")

    def add(self, row: Row, samples: PointSamples, label: Mapping[str, Any]) -> None:
        self.rows.append(row)
        _append(self.folder / RESULTS, [{**row, **self._about}])
        _append(self.folder / SAMPLES, [{**label, **call_sample(call)} for call in samples.calls])

    def finish(self) -> Path:
        """Write the summary and draw the plots; of what there is, if the run was stopped."""
        return write_summary(self.folder, self.rows, self._about)


def write_summary(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> Path:
    """The summary and its pictures; without matplotlib the summary alone."""
    target = folder / SUMMARY
    summary = {**about, "workloads": summarise(rows)}
    target.write_text(json.dumps(summary, indent=2) + "\n")
    try:
        draw(summary, folder)
    except ImportError:
        logger.warning("matplotlib is not installed: no plots. `bench report %s` draws them later.", folder)
    return target


def report_again(folder: Path) -> Path:
    """Summary and plots from the rows that a run left."""
    path = folder / RESULTS
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Give the folder that `bench serving` wrote.") from error
    if not rows:
        raise ConfigError(f"{path} holds no rows: no point of that run was finished.")
    return write_summary(folder, rows, {key: rows[0].get(key) for key in ("config", "environment", "dtype", "budget")})


def _append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
