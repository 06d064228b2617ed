"""A point that is cut, against workers that go on working after their clients have left: it leaves a row, and idle
workers; and the benchmark goes on. Only failures are faked here: `test/e2e/test_bench_serving.py` has real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.workloads import bench
from sglang_prefillshare.workloads.config import Benchmark, Limits, Models, RandomModel, Sweep, Workload
from sglang_prefillshare.workloads.display import line
from sglang_prefillshare.workloads.driver import PointSamples
from sglang_prefillshare.workloads.measure import Measurement, Servers, measure
from sglang_prefillshare.workloads.points import Point
from sglang_prefillshare.workloads.report import Row
from sglang_prefillshare.workloads.results import Results
from sglang_prefillshare.workloads.session import Session, Step
from sglang_prefillshare.workloads.watch import Watch

AGENTS = ("planner", "coder")
LIMITS = Limits(request_s=5, point_s=0.4, idle_s=2, stuck_s=5)


@dataclass
class Worker:
    """Answers like a stock server. A prompt of `heavy_tokens` or more it never finishes, and keeps when its client has
    left, until it is aborted and the forward pass of `pass_s` is over; one that is `deaf` keeps it for ever."""

    heavy_tokens: int = 100
    pass_s: float = 0.5
    is_deaf: bool = False
    has_ended: bool = False
    requests: int = 0
    aborts: int = 0
    flushes: int = 0
    url: str = ""
    busy_until: list[float] = field(default_factory=list)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, wanted = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        if len(prompt) >= self.heavy_tokens:
            self.requests += 1
            await asyncio.sleep(60)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        meta = {"prompt_tokens": len(prompt), "completion_tokens": wanted, "cached_tokens": 0}
        event = {"output_ids": [7] * wanted, "meta_info": meta}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def abort(self, request: web.Request) -> web.Response:
        assert await request.json() == {"abort_all": True}
        self.aborts += 1
        if not self.is_deaf:
            self.busy_until += [time.monotonic() + self.pass_s] * self.requests
            self.requests = 0
        return web.Response()

    async def loads(self, request: web.Request) -> web.Response:
        self.busy_until = [end for end in self.busy_until if end > time.monotonic()]
        running = self.requests + len(self.busy_until)
        load = {"num_running_reqs": running, "num_waiting_reqs": 0, "num_used_tokens": 10 * running, "token_usage": 0.1}
        return web.json_response({"loads": [load]})

    async def flush(self, request: web.Request) -> web.Response:
        assert not self.requests
        self.flushes += 1
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text="# TYPE sglang:evicted_tokens_total counter\nsglang:evicted_tokens_total 3\n")


class FakeDeployment:
    """Stands in for a deployment of one worker that serves every agent, without a router."""

    def __init__(self, worker: Worker) -> None:
        self._fake = worker
        self.router = None
        plan = SimpleNamespace(role=None, module="all")
        self.workers = [
            SimpleNamespace(name="all", url=worker.url, pid=os.getpid(), plan=plan, describe=lambda: {"name": "all"})
        ]

    def worker(self, name: str) -> Any:
        return self.workers[0]

    def check(self) -> None:
        if self._fake.has_ended:
            raise WorkerError("all ended while it served")


@contextlib.asynccontextmanager
async def serving(worker: Worker) -> AsyncIterator[Any]:
    app = web.Application()
    app.router.add_post("/generate", worker.generate)
    app.router.add_post("/abort_request", worker.abort)
    app.router.add_post("/flush_cache", worker.flush)
    app.router.add_get("/v1/loads", worker.loads)
    app.router.add_get("/metrics", worker.metrics)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    assert runner.addresses
    worker.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield FakeDeployment(worker)
    finally:
        await runner.cleanup()


def point(*prompt_lengths: int) -> Point:
    sessions = tuple(
        Session(f"s{index}", tuple(range(length)), 0, (tuple(Step(agent, 2) for agent in AGENTS),))
        for index, length in enumerate(prompt_lengths)
    )
    return Point("react", 1.0, 8, 0, sessions, (0.0,) * len(sessions))


def measured(worker: Worker, *points: Point, limits: Limits = LIMITS, waits: list[str] | None = None) -> Any:
    async def scenario() -> list[Measurement]:
        async with asyncio.timeout(20), serving(worker) as deployment, aiohttp.ClientSession() as client:
            servers = Servers(dict.fromkeys(AGENTS, worker.url), Watch(deployment, client))
            told = (lambda left: waits.append(left)) if waits is not None else (lambda left: None)
            return [await measure(one, servers, limits=limits, load_poll_s=0.05, on_drain=told) for one in points]

    return asyncio.run(scenario())


def test_a_point_whose_calls_all_end_aborts_nothing():
    worker = Worker()
    [found] = measured(worker, point(5, 6))
    assert not found.samples.is_cut and found.trouble is None and found.drain_s < 1
    assert len(found.samples.calls) == 4 and worker.aborts == 0


def test_what_a_cut_point_left_running_is_aborted_and_waited_for_and_the_next_point_runs():
    worker = Worker()
    waits: list[str] = []
    cut, after = measured(worker, point(5, 200, 300), point(5), waits=waits)
    assert cut.samples.is_cut and cut.trouble is None
    assert [one.is_complete for one in cut.samples.sessions] == [True, False, False]
    assert worker.aborts >= 1 and worker.requests == 0
    assert 0.4 <= cut.drain_s < 4, "a forward pass that is under way is waited for"
    assert waits[0] == "all: 2 requests, 20 KV tokens"
    assert not after.samples.is_cut and len(after.samples.calls) == 2
    assert worker.flushes == 2


def test_work_that_a_client_left_behind_is_aborted_after_a_while():
    worker = Worker()
    limits = Limits(request_s=0.2, point_s=5, idle_s=0.3, stuck_s=5)
    [found] = measured(worker, point(200), limits=limits)
    assert not found.samples.is_cut and found.samples.calls[0].answer.is_timeout
    assert worker.aborts >= 1 and worker.requests == 0 and found.drain_s >= 0.3


def test_a_cut_point_leaves_its_measurement_when_its_work_never_ends():
    limits = Limits(request_s=5, point_s=0.3, idle_s=1, stuck_s=0.6)
    [found] = measured(Worker(is_deaf=True), point(5, 200), limits=limits)
    assert found.samples.is_cut and len(found.samples.calls) == 2 and found.drain_s is None
    assert found.trouble == ("nothing has changed for 0.6 s, and there is still work: all: 1 requests, 10 KV tokens.")


def test_a_point_leaves_its_measurement_when_a_server_ended_meanwhile():
    async def scenario() -> Measurement:
        worker = Worker()
        async with asyncio.timeout(20), serving(worker) as deployment, aiohttp.ClientSession() as client:
            servers = Servers(dict.fromkeys(AGENTS, worker.url), Watch(deployment, client))

            def end(samples: PointSamples, active: int) -> None:
                worker.has_ended = bool(samples.calls)

            return await measure(point(5), servers, limits=LIMITS, load_poll_s=0.05, on_progress=end)

    found = asyncio.run(scenario())
    assert found.trouble == "all ended while it served" and len(found.samples.calls) == 2
    assert found.counters.by_side["colocated"]["evicted_tokens"] == 0


class Told:
    """Keeps what an observer is told."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.drains: list[str] = []

    def on_stage(self, text: str) -> None: ...

    def on_note(self, text: str) -> None: ...

    def on_progress(self, label: Mapping[str, Any], count: int, samples: PointSamples, active: int) -> None: ...

    def on_drain(self, label: Mapping[str, Any], left: str) -> None:
        self.drains.append(left)

    def on_row(self, row: Row) -> None:
        self.rows.append(row)


def asked(worker: Worker, folder: Path, limits: Limits) -> Told:
    """Two points of a workload whose sessions grow too long for the worker, and one whose sessions do not."""
    sweep = (Sweep(arrival_rates=(50.0, 100.0), max_sessions=(4,), sessions=2),)
    workloads = tuple(Workload(preset="react", name=f"x{s}", length_scale=s, sweeps=sweep) for s in (0.1, 0.01))
    benchmark = Benchmark(
        models=Models(agents=AGENTS, random=RandomModel()), workloads=workloads, limits=limits, load_poll_s=0.1
    )
    told = Told()
    run = bench.Run(benchmark, {}, (300, 400), Results(folder, benchmark), told)

    async def scenario() -> None:
        async with asyncio.timeout(20), serving(worker) as deployment:
            await bench._ask(run, "colocated", [0], deployment, 1.0)

    asyncio.run(scenario())
    return told


def test_a_cut_point_leaves_its_row_and_the_benchmark_goes_on(tmp_path: Path):
    worker = Worker(heavy_tokens=120, pass_s=0.3)
    told = asked(worker, tmp_path, LIMITS)
    kept = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["workload"], row["is_cut"]) for row in kept] == [
        ("x0.1", True), ("x0.1", True), ("x0.01", False), ("x0.01", False),
    ]  # fmt: skip
    first, *_, last = kept
    assert (first["sessions_completed"], first["sessions_unfinished"], first["trouble"]) == (0, 2, None)
    assert first["completed"] > 0 and first["p95_e2e_latency_ms"] > 0, "what finished is in the row"
    assert first["drain_s"] >= 0.3 and first["recompute_factor"] is None
    assert last["sessions_completed"] == 2 and last["drain_s"] < 0.3
    assert told.rows[0]["ready_s"] == 1.0 and told.drains
    assert "CUT after 0 s" in line(told.rows[0]) and "CUT" not in line(told.rows[-1])


def test_a_benchmark_whose_workers_cannot_be_emptied_ends_with_the_row_written(tmp_path: Path):
    limits = Limits(request_s=5, point_s=0.3, idle_s=1, stuck_s=0.5)
    with pytest.raises(WorkerError, match=r"colocated, x0\.1, 50\.0 sessions/s.*nothing has changed for 0\.5 s"):
        asked(Worker(heavy_tokens=120, is_deaf=True), tmp_path, limits)
    [row] = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["is_cut"] and row["drain_s"] is None and "there is still work" in row["trouble"]
