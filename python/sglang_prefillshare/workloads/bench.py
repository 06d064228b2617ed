"""`prefillshare bench serving`: each topology in turn, every point on it, again; then the summary and the plots.

One topology runs at a time, since two would share the machine and neither would be measured. Repeats are interleaved,
so that a machine that slows down slows both. Between points caches are flushed and servers are not restarted: a start
takes minutes, and a flush leaves nothing that one would remove, since every worker is warmed up before its first point.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from msgspec.structs import replace
from rich.console import Console

from sglang_prefillshare.deployment import Deployment, Silent
from sglang_prefillshare.environment import has_accelerator
from sglang_prefillshare.errors import ConfigError, WorkerError
from sglang_prefillshare.plans import default_env
from sglang_prefillshare.preload import Preloader, preloader
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.workloads.budget import Budget, decide, told
from sglang_prefillshare.workloads.config import ADAPTER_TOPOLOGIES, Benchmark, TopologyName
from sglang_prefillshare.workloads.display import Observer, describe, terminal
from sglang_prefillshare.workloads.machine import measure_machine, read_config, worker_dtype
from sglang_prefillshare.workloads.measure import Measurement, Servers, measure, warm_up
from sglang_prefillshare.workloads.models import ModelFolders, prepare_models, token_id_range
from sglang_prefillshare.workloads.mps import cuda_mps
from sglang_prefillshare.workloads.points import Point, points_of, turns_of
from sglang_prefillshare.workloads.report import Row, point_row
from sglang_prefillshare.workloads.results import SUMMARY, Results
from sglang_prefillshare.workloads.topologies import make_deployment, pin_workers, running, urls_by_agent
from sglang_prefillshare.workloads.watch import Watch


@dataclass(frozen=True, slots=True)
class Run:
    """What all topologies of one benchmark have in common: what is asked, of which models, and who is told."""

    benchmark: Benchmark
    models: ModelFolders
    token_ids: tuple[int, int]
    results: Results
    observer: Observer
    preloader: Preloader | None = None


def run_benchmark(benchmark: Benchmark, *, console: Console | None = None, anyway: bool = False) -> Path:
    """Run all of it; returns the summary's path. Ctrl-C ends every process, and what was finished is summarised.

    A benchmark with `limits.total_s` measures a CPU first, and makes lengths shorter if it has to; `anyway` runs it as
    it is. Raises `KeyboardInterrupt` after a Ctrl-C, `WorkerError` when a topology cannot be started or falls over,
    `ConfigError` when the time does not do.
    """
    console = console or Console(stderr=True, highlight=False)
    models = prepare_models(benchmark)
    token_ids = benchmark.token_ids or token_id_range(models.base)
    budget: Budget | None = None
    dtype = None if has_accelerator() else worker_dtype(benchmark, read_config(models.base))
    if benchmark.limits.total_s is not None and not has_accelerator():
        console.print("measuring this machine: a few products, and one worker's start", style="dim")
        machine = measure_machine(benchmark, models.base, log_dir=Path(benchmark.out) / "logs" / "machine")
        benchmark, budget = decide(benchmark, machine, token_ids=token_ids, is_forced=anyway)
        console.print(_told(budget), soft_wrap=True)
    for workload in benchmark.workloads:
        check_room(benchmark, points_of(benchmark, workload, repeat=0, token_ids=token_ids))
    results = Results(Path(benchmark.out), benchmark, dtype=dtype, budget=None if budget is None else budget.describe())
    try:
        with (
            terminal(console, points=benchmark.point_count) as observer,
            _mps(benchmark, observer) as settled,
            _preloaded(settled) as preloaded,
        ):
            run = Run(settled, models, token_ids, results, observer, preloaded)
            for topology, repeats in turns_of(benchmark.topologies, benchmark.repeats):
                _run_topology(run, topology, repeats)
    finally:
        if results.rows:
            path = results.finish()
            console.print(f"written to {path}", soft_wrap=True)
    return results.folder / SUMMARY


@contextmanager
def _mps(benchmark: Benchmark, observer: Observer) -> Iterator[Benchmark]:
    """The benchmark, whose workers know of CUDA MPS where it is wanted and can be had."""
    workers = benchmark.workers
    if not workers.cuda_mps:
        yield benchmark
        return
    with cuda_mps() as (environ, told):
        observer.on_note(told)
        yield replace(benchmark, workers=replace(workers, env={**environ, **workers.env}))


@contextmanager
def _preloaded(benchmark: Benchmark) -> Iterator[Preloader | None]:
    """What the workers of all topologies are forked from, on a host without an accelerator."""
    made = preloader(default_env(os.environ, benchmark.workers.env))
    with nullcontext() if made is None else made:
        yield made


def _told(budget: Budget) -> str:
    until = f"{told(budget.machine)} The benchmark will take about {budget.estimate}"
    if budget.scale == 1:
        return f"{until}."
    return (
        f"{until}, with every length times {budget.scale:g}: as written it would be {budget.as_written}, "
        "which --anyway runs."
    )


def check_room(benchmark: Benchmark, points: Sequence[Point]) -> None:
    """Raise `ConfigError` for a session that no pool can hold: it would be refused in its last calls."""
    room, reserved = benchmark.workers.flags.get("max-total-tokens"), benchmark.workers.reserved_tokens
    if not isinstance(room, int):
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
    deployment = make_deployment(
        run.benchmark, topology, run.models.of(topology), log_dir=log_dir, observer=Silent(), preloader=run.preloader
    )
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
        servers = Servers(
            urls_by_agent(deployment, benchmark.models.names),
            Watch(deployment, client),
            are_adapters=topology in ADAPTER_TOPOLOGIES,
        )
        observer.on_stage(f"{topology}: warming up")
        prefill_count = sum(worker.plan.role is Role.PREFILL for worker in deployment.workers)
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
