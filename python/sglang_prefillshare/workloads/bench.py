"""`prefillshare bench serving`: each topology in turn, every point on it, again; then the summary and the plots.

One topology runs at a time, since two would share the machine and neither would be measured. Repeats are interleaved,
so that a machine that slows down slows both. Between points caches are flushed and servers are not restarted: a start
takes minutes, and a flush leaves nothing that one would remove, since every worker is warmed up before its first point.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sglang_prefillshare.deployment import Deployment, Silent
from sglang_prefillshare.environment import PACKAGES, describe_environment
from sglang_prefillshare.errors import ConfigError, WorkerError
from sglang_prefillshare.workloads.arrivals import poisson_arrivals
from sglang_prefillshare.workloads.config import Benchmark, TopologyName, Workload
from sglang_prefillshare.workloads.driver import PointSamples, run_point
from sglang_prefillshare.workloads.models import prepare_models, token_id_range
from sglang_prefillshare.workloads.plot import draw
from sglang_prefillshare.workloads.presets import Shape, make_session, preset_shape
from sglang_prefillshare.workloads.report import Row, call_sample, point_row, summarise
from sglang_prefillshare.workloads.session import Session, Step, Words
from sglang_prefillshare.workloads.topologies import make_deployment, pin_workers, urls_by_agent
from sglang_prefillshare.workloads.trace import load_trace
from sglang_prefillshare.workloads.watch import Loads, Watch

logger = logging.getLogger(__name__)

RESULTS: Final = "results.jsonl"
SAMPLES: Final = "samples.jsonl"
SUMMARY: Final = "summary.json"
SGLANG_RESERVED_TOKENS: Final = 512
"""What decode workers keep free for new tokens unless --num-reserved-decode-tokens says otherwise."""

_WARM_UP_PROMPT_TOKENS: Final = 96
_WARM_UP_ANSWER_TOKENS: Final = 4


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to run on a topology."""

    workload: Workload
    arrival_rate: float
    max_sessions: int
    repeat: int

    @property
    def rate_label(self) -> float | str:
        """As JSON can hold it."""
        if self.workload.trace_arrivals:
            return "trace"
        return "inf" if math.isinf(self.arrival_rate) else self.arrival_rate


def sessions_of(
    workload: Workload, agents: Sequence[str], *, seed: int, repeat: int, token_ids: tuple[int, int]
) -> list[Session]:
    """The sessions of one repeat, as many as its largest point has: other sessions in each repeat, the same on every
    topology, and the first of them at every point."""
    words = Words(seed=seed * 1_000_003 + repeat, token_ids=token_ids)
    count = max(sessions for _, _, sessions in workload.points)
    if workload.trace is not None:
        return load_trace(workload.trace, agents=agents, words=words, length_scale=workload.length_scale, limit=count)
    shape = shape_of(workload, agents)
    return [make_session(shape, workload=workload.label, index=index, words=words) for index in range(count)]


def shape_of(workload: Workload, agents: Sequence[str]) -> Shape:
    """A preset's lengths, with what the benchmark changes of them, scaled."""
    assert workload.preset is not None
    shape = preset_shape(workload.preset, agents, turns=workload.turns, shares_prefix=workload.shares_prefix)
    return Shape(
        agents=shape.agents,
        turns=shape.turns,
        shared_prefix_tokens=_either(workload.shared_prefix_tokens, shape.shared_prefix_tokens),
        own_prefix_tokens=shape.own_prefix_tokens,
        answer_tokens=_either(workload.answer_tokens, shape.answer_tokens),
        observation_tokens=_either(workload.observation_tokens, shape.observation_tokens),
    ).scaled(workload.length_scale)


def _either(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def arrivals_of(point: Point, sessions: Sequence[Session], *, seed: int) -> list[float]:
    if point.workload.trace_arrivals:
        times = [session.arrival_s for session in sessions]
        if None in times:
            raise ConfigError(f"the trace {point.workload.trace} has no arrival_s. Leave trace_arrivals out.")
        return [time_s for time_s in times if time_s is not None]
    pattern = f"{seed}/{point.workload.label}/{point.repeat}"
    return poisson_arrivals(len(sessions), rate=point.arrival_rate, seed=pattern)


class Results:
    """The folder that a run writes: rows and samples as they come, the summary at the end."""

    def __init__(self, folder: Path, benchmark: Benchmark) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._about = {
            "config": benchmark.to_json(),
            "environment": describe_environment((*PACKAGES, "nixl", "uvloop")),
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
    return write_summary(folder, rows, {key: rows[0][key] for key in ("config", "environment")})


def _append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def run_benchmark(benchmark: Benchmark, *, console: Console | None = None) -> Path:
    """Run all of it; returns the summary's path. Ctrl-C ends every process, and what was finished is summarised.

    Raises `KeyboardInterrupt` after a Ctrl-C, `WorkerError` when a topology cannot be started or falls over.
    """
    console = console or Console(stderr=True, highlight=False)
    models = prepare_models(benchmark.models)
    token_ids = benchmark.token_ids or token_id_range(models["base"])
    results = Results(Path(benchmark.out), benchmark)
    try:
        with _progress(console, benchmark) as (progress, task):
            for name, repeats in turns_of(benchmark.topologies, benchmark.repeats):
                _TopologyRun(benchmark, name, models, token_ids, results, progress, task).run(repeats)
    finally:
        if results.rows:
            path = results.finish()
            console.print(f"written to {path}", soft_wrap=True)
    return results.folder / SUMMARY


def turns_of(topologies: Sequence[TopologyName], repeats: int) -> list[tuple[TopologyName, list[int]]]:
    """Which topology runs when, and which repeats before it is ended: A0, B0 B1, A1 A2, B2 for two and three repeats.

    Repeats alternate, and each second one has the order turned around, so that neither side is always first, and the
    side that is up need not start again.
    """
    turns: list[tuple[TopologyName, list[int]]] = []
    for repeat in range(repeats):
        for name in topologies if repeat % 2 == 0 else tuple(reversed(topologies)):
            if turns and turns[-1][0] == name:
                turns[-1][1].append(repeat)
            else:
                turns.append((name, [repeat]))
    return turns


@contextlib.contextmanager
def _progress(console: Console, benchmark: Benchmark) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    points = sum(len(workload.points) for workload in benchmark.workloads)
    with Progress(*columns, console=console) as progress:
        yield progress, progress.add_task("starting", total=points * benchmark.repeats * len(benchmark.topologies))


class _TopologyRun:
    """One topology, started, warmed, asked every point of some repeats, and ended."""

    def __init__(
        self,
        benchmark: Benchmark,
        name: TopologyName,
        models: Mapping[str, Path],
        token_ids: tuple[int, int],
        results: Results,
        progress: Progress,
        task: TaskID,
    ) -> None:
        self._benchmark = benchmark
        self._name = name
        self._models = models
        self._token_ids = token_ids
        self._results = results
        self._progress = progress
        self._task = task

    def run(self, repeats: Sequence[int]) -> None:
        benchmark = self._benchmark
        for workload in benchmark.workloads:
            self._check_room(workload, self._sessions(workload, repeats[0]))
        self._tell(f"{self._name}: starting servers")
        deployment = make_deployment(
            benchmark, self._name, self._models, log_dir=self._results.folder / "logs" / self._name, observer=Silent()
        )
        started = time.monotonic()
        with running(deployment):
            ready_s = time.monotonic() - started
            pin_workers(deployment, benchmark.workers)
            self._progress.console.print(
                f"{self._name}: {len(deployment.workers)} workers ready after {ready_s:.0f} s", style="dim"
            )
            asyncio.run(self._points(deployment, repeats, ready_s))
        self._tell(f"{self._name}: ended")

    def _sessions(self, workload: Workload, repeat: int) -> list[Session]:
        benchmark = self._benchmark
        return sessions_of(
            workload, benchmark.models.names, seed=benchmark.seed, repeat=repeat, token_ids=self._token_ids
        )

    async def _points(self, deployment: Deployment, repeats: Sequence[int], ready_s: float) -> None:
        benchmark = self._benchmark
        async with aiohttp.ClientSession() as client:
            watch = Watch(deployment, client)
            self._tell(f"{self._name}: warming up")
            await self._warm_up(deployment)
            for repeat, workload in itertools.product(repeats, benchmark.workloads):
                sessions = self._sessions(workload, repeat)
                for rate, cap, count in workload.points:
                    deployment.check()
                    await self._point(deployment, watch, Point(workload, rate, cap, repeat), sessions[:count], ready_s)

    async def _point(
        self, deployment: Deployment, watch: Watch, point: Point, sessions: Sequence[Session], ready_s: float
    ) -> None:
        benchmark = self._benchmark
        limits = benchmark.limits
        label = {
            "topology": self._name,
            "workload": point.workload.label,
            "request_rate": point.rate_label,
            "max_sessions": point.max_sessions,
            "repeat": point.repeat,
        }
        await watch.flush(limits.idle_s)
        before = await watch.counters()
        loads = Loads()
        polling = asyncio.create_task(watch.poll_loads(loads, benchmark.load_poll_s))
        started = time.monotonic()

        def show(samples: PointSamples, active: int) -> None:
            done = sum(session.ended_s is not None for session in samples.sessions)
            elapsed_s = max(time.monotonic() - started, 1e-9)
            tokens = sum(len(call.answer.token_ids) for call in samples.calls)
            failed = sum(not call.is_ok for call in samples.calls)
            self._tell(
                f"{_describe(label)}: {done}/{len(sessions)} sessions, {active} active, "
                f"{len(samples.calls)} calls, {tokens / elapsed_s:.1f} tok/s" + (f", {failed} FAILED" if failed else "")
            )

        show(PointSamples(), 0)
        try:
            samples = await run_point(
                sessions,
                arrivals_of(point, sessions, seed=benchmark.seed),
                urls=urls_by_agent(deployment, benchmark.models.names),
                max_sessions=point.max_sessions,
                request_timeout_s=limits.request_s,
                point_timeout_s=limits.point_s,
                on_progress=show,
            )
        finally:
            polling.cancel()
        deployment.check()
        await watch.until_idle(limits.idle_s)
        counters = (await watch.counters()).since(before)
        row = {
            **label,
            "backend": "sglang",
            "dataset_name": point.workload.label,
            "max_concurrency": point.max_sessions,
            **point_row(samples, counters, loads),
            "workers": [worker.describe() for worker in deployment.workers],
            "ready_s": round(ready_s, 1),
        }
        self._results.add(row, samples, label)
        self._progress.console.print(_line(row), soft_wrap=True)
        self._progress.advance(self._task)

    async def _warm_up(self, deployment: Deployment) -> None:
        """Every agent over every prefill worker: first requests compile, connect and shake hands."""
        agents = self._benchmark.models.names
        words = Words(seed=-1, token_ids=self._token_ids)
        count = 2 * max(2, len([w for w in deployment.workers if w.plan.module is None]))
        sessions = [
            Session(
                f"warm-up-{index}",
                words.draw(f"warm-up-{index}", _WARM_UP_PROMPT_TOKENS),
                0,
                (tuple(Step(agent, _WARM_UP_ANSWER_TOKENS) for agent in agents),),
            )
            for index in range(count)
        ]
        limits = self._benchmark.limits
        samples = await run_point(
            sessions,
            [0.0] * count,
            urls=urls_by_agent(deployment, agents),
            max_sessions=count,
            request_timeout_s=limits.request_s,
            point_timeout_s=limits.point_s,
        )
        errors = sorted({call.answer.error or "" for call in samples.calls if not call.is_ok})
        if errors or samples.is_cut:
            raise WorkerError(
                f"{self._name} does not answer: {'; '.join(errors)[:1000] or 'the warm-up took too long'}."
            )

    def _check_room(self, workload: Workload, sessions: Sequence[Session]) -> None:
        """A session that no pool can hold would be refused in its last calls."""
        args = self._benchmark.workers.flags
        room, reserved = args.get("max-total-tokens"), args.get("num-reserved-decode-tokens", SGLANG_RESERVED_TOKENS)
        longest = max(session.total_tokens for session in sessions)
        if isinstance(room, int) and isinstance(reserved, int) and longest + reserved > room:
            raise ConfigError(
                f"workload {workload.label} has sessions of {longest} tokens, and max-total-tokens is {room}, of which "
                f"decode workers keep {reserved} free. Give workers more, or make length_scale smaller."
            )

    def _tell(self, text: str) -> None:
        self._progress.update(self._task, description=text)


@contextlib.contextmanager
def running(deployment: Deployment) -> Iterator[None]:
    """Inside, all its servers are ready; after it, none is left.

    Ctrl-C, SIGTERM and SIGHUP end it, also while it starts, and `KeyboardInterrupt` comes out. While it ends they only
    hurry it, so that no process is forgotten.
    """
    is_ending = was_asked = False

    def stop(*_: Any) -> None:
        nonlocal is_ending, was_asked
        was_asked = True
        if is_ending:
            deployment.request_stop()
            return
        is_ending = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with deployment:
            try:
                yield
            finally:
                is_ending = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if was_asked:
        raise KeyboardInterrupt


def _describe(label: Mapping[str, Any]) -> str:
    return (
        f"{label['topology']}, {label['workload']}, {label['request_rate']} sessions/s, at most "
        f"{label['max_sessions']}, repeat {label['repeat']}"
    )


def _line(row: Row) -> str:
    """A finished point in one line."""

    def ms(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:.0f}"

    hit = "-" if row["hit_ratio"] is None else f"{100 * row['hit_ratio']:.0f}%"
    again = "-" if row["recompute_factor"] is None else f"{row['recompute_factor']:.2f}"
    trouble = f"  {row['failed']} failed" if row["failed"] else ""
    trouble += f"  {row['sessions_unfinished']} sessions unfinished" if row["sessions_unfinished"] else ""
    return (
        f"{row['topology']:<9} {row['workload']:<10} rate {row['request_rate']:<5} cap {row['max_sessions']:<3} "
        f"#{row['repeat']}: p95 {ms('p95_e2e_latency_ms'):>6} ms, TTFT p50 {ms('median_ttft_ms'):>6} ms, "
        f"{row['output_throughput']:6.1f} tok/s, hits {hit:>4}, recompute {again}{trouble}"
    )
