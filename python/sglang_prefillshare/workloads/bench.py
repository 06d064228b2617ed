"""`prefillshare bench serving`: each topology in turn, every point on it, again; then the summary and the plots.

One topology runs at a time, since two would share the machine and neither would be measured. Repeats are interleaved,
so that a machine that slows down slows both. Between points caches are flushed and servers are not restarted: a start
takes minutes, and a flush leaves nothing that one would remove, since every worker is warmed up before its first point.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console

from sglang_prefillshare.deployment import Deployment, Silent
from sglang_prefillshare.errors import ConfigError, WorkerError
from sglang_prefillshare.workloads.config import Benchmark, TopologyName
from sglang_prefillshare.workloads.display import Observer, describe, terminal
from sglang_prefillshare.workloads.measure import Measurement, Servers, measure, warm_up
from sglang_prefillshare.workloads.models import prepare_models, token_id_range
from sglang_prefillshare.workloads.points import Point, points_of
from sglang_prefillshare.workloads.report import Row, point_row
from sglang_prefillshare.workloads.results import SUMMARY, Results
from sglang_prefillshare.workloads.topologies import make_deployment, pin_workers, urls_by_agent
from sglang_prefillshare.workloads.watch import Watch

SGLANG_RESERVED_TOKENS: Final = 512
"""What decode workers keep free for new tokens unless --num-reserved-decode-tokens says otherwise."""


@dataclass(frozen=True, slots=True)
class Run:
    """What all topologies of one benchmark have in common: what is asked, of which models, and who is told."""

    benchmark: Benchmark
    models: Mapping[str, Path]
    token_ids: tuple[int, int]
    results: Results
    observer: Observer


def run_benchmark(benchmark: Benchmark, *, console: Console | None = None) -> Path:
    """Run all of it; returns the summary's path. Ctrl-C ends every process, and what was finished is summarised.

    Raises `KeyboardInterrupt` after a Ctrl-C, `WorkerError` when a topology cannot be started or falls over.
    """
    console = console or Console(stderr=True, highlight=False)
    models = prepare_models(benchmark.models)
    token_ids = benchmark.token_ids or token_id_range(models["base"])
    for workload in benchmark.workloads:
        check_room(benchmark, points_of(benchmark, workload, repeat=0, token_ids=token_ids))
    results = Results(Path(benchmark.out), benchmark)
    try:
        with terminal(console, points=benchmark.point_count) as observer:
            run = Run(benchmark, models, token_ids, results, observer)
            for topology, repeats in turns_of(benchmark.topologies, benchmark.repeats):
                _run_topology(run, topology, repeats)
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


def check_room(benchmark: Benchmark, points: Sequence[Point]) -> None:
    """Raise `ConfigError` for a session that no pool can hold: it would be refused in its last calls."""
    args = benchmark.workers.flags
    room, reserved = args.get("max-total-tokens"), args.get("num-reserved-decode-tokens", SGLANG_RESERVED_TOKENS)
    if not isinstance(room, int) or not isinstance(reserved, int):
        return
    for point in points:
        longest = max(session.total_tokens for session in point.sessions)
        if longest + reserved > room:
            raise ConfigError(
                f"workload {point.workload} has sessions of {longest} tokens, and max-total-tokens is {room}, of which "
                f"decode workers keep {reserved} free. Give workers more, or make length_scale smaller."
            )


def _run_topology(run: Run, topology: TopologyName, repeats: Sequence[int]) -> None:
    """Start it, warm it up, ask it every point of these repeats, and end it."""
    run.observer.on_stage(f"{topology}: starting servers")
    log_dir = run.results.folder / "logs" / topology
    deployment = make_deployment(run.benchmark, topology, run.models, log_dir=log_dir, observer=Silent())
    started = time.monotonic()
    with running(deployment):
        ready_s = time.monotonic() - started
        pin_workers(deployment, run.benchmark.workers)
        run.observer.on_note(f"{topology}: {len(deployment.workers)} workers ready after {ready_s:.0f} s")
        asyncio.run(_ask(run, topology, repeats, deployment, ready_s))
    run.observer.on_stage(f"{topology}: ended")


async def _ask(
    run: Run, topology: TopologyName, repeats: Sequence[int], deployment: Deployment, ready_s: float
) -> None:
    benchmark, observer = run.benchmark, run.observer
    async with aiohttp.ClientSession() as client:
        servers = Servers(urls_by_agent(deployment, benchmark.models.names), Watch(deployment, client))
        observer.on_stage(f"{topology}: warming up")
        prefill_count = sum(worker.plan.module is None for worker in deployment.workers)
        try:
            await warm_up(
                servers, session_count=2 * max(2, prefill_count), token_ids=run.token_ids, limits=benchmark.limits
            )
        except WorkerError as error:
            raise WorkerError(f"{topology}: {error}") from error
        about = {"workers": [worker.describe() for worker in deployment.workers], "ready_s": round(ready_s, 1)}
        for repeat, workload in itertools.product(repeats, benchmark.workloads):
            for point in points_of(benchmark, workload, repeat=repeat, token_ids=run.token_ids):
                label = label_of(topology, point)
                found = await measure(
                    point,
                    servers,
                    limits=benchmark.limits,
                    load_poll_s=benchmark.load_poll_s,
                    on_progress=partial(observer.on_progress, label, len(point.sessions)),
                    on_drain=partial(observer.on_drain, label),
                )
                row = row_of(label, point, found) | about
                run.results.add(row, found.samples, label)
                observer.on_row(row)
                if found.trouble is not None:
                    raise WorkerError(f"{describe(label)}: {found.trouble}")


def label_of(topology: TopologyName, point: Point) -> dict[str, Any]:
    """What names a point in every file."""
    return {
        "topology": topology,
        "workload": point.workload,
        "request_rate": point.request_rate,
        "max_sessions": point.max_sessions,
        "repeat": point.repeat,
    }


def row_of(label: Mapping[str, Any], point: Point, found: Measurement) -> Row:
    """A point as results keep it."""
    return {
        **label,
        "backend": "sglang",
        "dataset_name": point.workload,
        "max_concurrency": point.max_sessions,
        **point_row(found.samples, found.counters, found.loads),
        "drain_s": None if found.drain_s is None else round(found.drain_s, 1),
        "trouble": found.trouble,
    }


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
