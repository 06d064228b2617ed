"""What a person sees of a benchmark that runs: a bar of its points, and a line for each that is finished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sglang_prefillshare.workloads.driver import PointSamples
from sglang_prefillshare.workloads.report import Row


class Observer(Protocol):
    """Is told what a benchmark does. `label` names a point as its row does: topology, workload, rate, cap, repeat."""

    def on_stage(self, text: str) -> None:
        """What is going on from now on."""

    def on_note(self, text: str) -> None:
        """Worth keeping."""

    def on_progress(self, label: Mapping[str, Any], count: int, samples: PointSamples, active: int) -> None:
        """A call or a session of the point ended; `active` of its `count` sessions are under way."""

    def on_drain(self, label: Mapping[str, Any], left: str) -> None:
        """The point is over, and this is still running."""

    def on_row(self, row: Row) -> None:
        """A point is finished."""


class Terminal:
    """A bar on the console, whose description follows the calls."""

    def __init__(self, progress: Progress, *, points: int) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=points)
        self._started: tuple[Mapping[str, Any], float] | None = None

    def on_stage(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def on_note(self, text: str) -> None:
        self._progress.console.print(text, style="dim", soft_wrap=True)

    def on_progress(self, label: Mapping[str, Any], count: int, samples: PointSamples, active: int) -> None:
        if self._started is None or self._started[0] != label:
            self._started = (label, time.monotonic())
        elapsed_s = max(time.monotonic() - self._started[1], 1e-9)
        done = sum(session.ended_s is not None for session in samples.sessions)
        tokens = sum(len(call.answer.token_ids) for call in samples.calls)
        failed = sum(not call.is_ok for call in samples.calls)
        self.on_stage(
            f"{describe(label)}: {done}/{count} sessions, {active} active, {len(samples.calls)} calls, "
            f"{tokens / elapsed_s:.1f} tok/s" + (f", {failed} FAILED" if failed else "")
        )

    def on_drain(self, label: Mapping[str, Any], left: str) -> None:
        self.on_stage(f"{describe(label)}: waiting for {left}")

    def on_row(self, row: Row) -> None:
        self._progress.console.print(line(row), soft_wrap=True)
        self._progress.advance(self._task)


@contextlib.contextmanager
def terminal(console: Console, *, points: int) -> Iterator[Terminal]:
    """Inside, the bar is shown."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Terminal(progress, points=points)


def describe(label: Mapping[str, Any]) -> str:
    return (
        f"{label['topology']}, {label['workload']}, {label['request_rate']} sessions/s, at most "
        f"{label['max_sessions']}, repeat {label['repeat']}"
    )


def line(row: Row) -> str:
    """A finished point in one line."""

    def ms(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:.0f}"

    hit = "-" if row["hit_ratio"] is None else f"{100 * row['hit_ratio']:.0f}%"
    again = "-" if row["recompute_factor"] is None else f"{row['recompute_factor']:.2f}"
    trouble = f"  CUT after {row['duration']:.0f} s" if row["is_cut"] else ""
    trouble += f"  {row['failed']} failed" if row["failed"] else ""
    trouble += f"  {row['sessions_unfinished']} sessions unfinished" if row["sessions_unfinished"] else ""
    return (
        f"{row['topology']:<9} {row['workload']:<10} rate {row['request_rate']:<5} cap {row['max_sessions']:<3} "
        f"#{row['repeat']}: p95 {ms('p95_e2e_latency_ms'):>6} ms, TTFT p50 {ms('median_ttft_ms'):>6} ms, "
        f"{row['output_throughput']:6.1f} tok/s, hits {hit:>4}, recompute {again}{trouble}"
    )
