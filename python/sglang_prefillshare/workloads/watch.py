"""What the servers of a topology say of themselves around and during a point: counters, loads, processor time.

Counters are read before and after, since a page of metrics costs a worker milliseconds; loads are polled while the
point runs, since what counts is their peak.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from sglang_prefillshare.deployment import Deployment, Worker
from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.protocol import Role

logger = logging.getLogger(__name__)

_TIMEOUT: Final = aiohttp.ClientTimeout(total=15.0)
_LOOK_EVERY_S: Final = 0.2
_ABORT_EVERY_S: Final = 5.0

_WORKER_SAMPLES: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "evicted_tokens": ("sglang:evicted_tokens_total", {}),
    "retracted_requests": ("sglang:num_retracted_requests_total", {}),
    "transfer_failures": ("sglang:num_transfer_failed_reqs_total", {}),
    "sglang_transfers": ("sglang:kv_transfer_total_mb_count", {}),
    "sglang_transfer_mib": ("sglang:kv_transfer_total_mb_sum", {}),
    "sglang_transfer_ms": ("sglang:kv_transfer_latency_ms_sum", {}),
    "handoffs": ("prefillshare_handoffs_total", {"side": "decode", "outcome": "ok"}),
    "handoff_bytes": ("prefillshare_handoff_bytes_total", {"side": "decode", "source": "moved", "outcome": "ok"}),
    "handoff_s": ("prefillshare_handoff_seconds_sum", {"side": "decode", "outcome": "ok"}),
}
STAGE: Final = "stage/"
"""Counters of a worker's stages are named STAGE, the stage, and "/s" (seconds) or "/n" (how often)."""
_STAGES: Final[Mapping[str, tuple[str, str]]] = {
    "sglang:per_stage_req_latency_seconds_sum": ("stage", "s"),
    "sglang:per_stage_req_latency_seconds_count": ("stage", "n"),
    "sglang:queue_time_seconds_sum": ("queue", "s"),
    "sglang:queue_time_seconds_count": ("queue", "n"),
}
_ROUTER_SAMPLES: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "prompt_tokens": ("prefillshare_router_prefill_tokens_total", {}),
    "cached_tokens": ("prefillshare_router_cached_tokens_total", {}),
    "cross_model_cached_tokens": ("prefillshare_router_cross_model_cached_tokens_total", {}),
    "router_overhead_s": ("prefillshare_router_overhead_seconds_sum", {}),
    "predicted_tokens": ("prefillshare_router_predicted_tokens_total", {}),
    "found_tokens": ("prefillshare_router_found_tokens_total", {}),
    "prediction_error_tokens": ("prefillshare_router_prediction_error_tokens_total", {}),
    "router_calls": ("prefillshare_router_overhead_seconds_count", {}),
}

PREFILL: Final = "prefill"
DECODE: Final = "decode"
COLOCATED: Final = "colocated"


def side_of(worker: Worker) -> str:
    """Which work a worker does."""
    if worker.plan.role is Role.PREFILL:
        return PREFILL
    return DECODE if worker.plan.role is Role.DECODE else COLOCATED


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums over workers since they started: by side, and the router's. `cpu_s` is by side, `router` among them."""

    by_side: Mapping[str, Mapping[str, float]]
    router: Mapping[str, float]
    cpu_s: Mapping[str, float]

    def since(self, earlier: Counters) -> Counters:
        return Counters(
            by_side={side: _minus(values, earlier.by_side[side]) for side, values in self.by_side.items()},
            router=_minus(self.router, earlier.router),
            cpu_s=_minus(self.cpu_s, earlier.cpu_s),
        )


def _minus(later: Mapping[str, float], earlier: Mapping[str, float]) -> dict[str, float]:
    return {name: value - earlier.get(name, 0.0) for name, value in later.items()}


@dataclass(slots=True)
class Loads:
    """The highest that was seen of each worker: KV tokens that running requests held, and their share of the pool."""

    peak_tokens: dict[str, int] = field(default_factory=dict)
    peak_usage: dict[str, float] = field(default_factory=dict)
    polls: int = 0
    misses: int = 0

    def note(self, worker: str, tokens: int, usage: float) -> None:
        self.peak_tokens[worker] = max(tokens, self.peak_tokens.get(worker, 0))
        self.peak_usage[worker] = max(usage, self.peak_usage.get(worker, 0.0))


class Watch:
    """Looks at one running deployment."""

    def __init__(self, deployment: Deployment, client: aiohttp.ClientSession) -> None:
        self._deployment = deployment
        self._client = client

    async def counters(self) -> Counters:
        """Raises `WorkerError` when a worker does not show its metrics."""
        deployment = self._deployment
        pages = await asyncio.gather(*(self._samples(worker.url) for worker in deployment.workers))
        by_side: dict[str, dict[str, float]] = {}
        for worker, page in zip(deployment.workers, pages, strict=True):
            sums = by_side.setdefault(side_of(worker), dict.fromkeys(_WORKER_SAMPLES, 0.0))
            for name, value in (_pick(page, _WORKER_SAMPLES) | stages(page)).items():
                sums[name] = sums.get(name, 0.0) + value
        router = {}
        if deployment.router is not None:
            router = _pick(await self._samples(deployment.router_url), _ROUTER_SAMPLES)
        return Counters(by_side, router, self._cpu_s())

    def _cpu_s(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for worker in self._deployment.workers:
            found[side_of(worker)] = found.get(side_of(worker), 0.0) + cpu_seconds(worker.pid)
        if self._deployment.router is not None:
            found["router"] = cpu_seconds(self._deployment.router.pid)
        found["client"] = sum(psutil.Process().cpu_times()[:2])
        return found

    async def _samples(self, url: str) -> list[Any]:
        try:
            async with self._client.get(f"{url}/metrics", timeout=_TIMEOUT) as response:
                response.raise_for_status()
                page = await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise WorkerError(f"{url} does not show its metrics: {str(error) or type(error).__name__}.") from error
        wanted = ("sglang:", "prefillshare_")
        lines = [line for line in page.split("\n") if line.startswith(wanted) and "_bucket{" not in line]
        return [sample for family in text_string_to_metric_families("\n".join(lines)) for sample in family.samples]

    async def poll_loads(self, loads: Loads, interval_s: float) -> None:
        """Until cancelled."""
        while True:
            await asyncio.gather(*(self._note_load(loads, worker) for worker in self._deployment.workers))
            await asyncio.sleep(interval_s)

    async def _note_load(self, loads: Loads, worker: Worker) -> None:
        loads.polls += 1
        try:
            tokens, usage, _ = await self._load(worker)
            loads.note(worker.name, tokens, usage)
        except (aiohttp.ClientError, TimeoutError, OSError, KeyError, IndexError, ValueError):
            loads.misses += 1  # a scheduler deep in a forward pass may be late

    async def _load(self, worker: Worker) -> tuple[int, float, int]:
        """KV tokens that requests hold, their share of the pool, and requests anywhere in the worker."""
        async with self._client.get(f"{worker.url}/v1/loads", timeout=_TIMEOUT) as response:
            response.raise_for_status()
            load = (await response.json())["loads"][0]
        queued = sum(value for name, value in load.get("disaggregation", {}).items() if name.endswith("_reqs"))
        requests = load["num_running_reqs"] + load["num_waiting_reqs"] + queued
        return int(load["num_used_tokens"]), float(load.get("token_usage") or 0.0), int(requests)

    def check(self) -> None:
        """Raise `WorkerError` if a server has ended."""
        self._deployment.check()

    async def until_idle(self, timeout_s: float) -> None:
        """Wait until no worker holds a request. Raises `WorkerError` naming what is left when that takes too long."""
        deadline = time.monotonic() + timeout_s
        while left := await self._left():
            if time.monotonic() >= deadline:
                raise WorkerError(f"after {timeout_s:g} s there is still work: {_listed(left)}.")
            await asyncio.sleep(_LOOK_EVERY_S)

    async def drain(
        self, *, grace_s: float, stuck_s: float, on_wait: Callable[[str], None] = lambda left: None
    ) -> float:
        """Wait until no worker holds a request, however long it takes; returns how long it took, in seconds.

        What is left after `grace_s` is aborted, and again every few seconds: there are moments of a handoff in which
        a request cannot be found, and a forward pass is not interrupted. Raises `WorkerError` when nothing of what is
        left has changed for `stuck_s`, or when a server has ended.
        """
        started = changed = time.monotonic()
        aborted: float | None = None
        before: Mapping[str, str] = {}
        while left := await self._left():
            self.check()
            now = time.monotonic()
            if left != before:
                before, changed = left, now
            if now - changed >= stuck_s:
                raise WorkerError(f"nothing has changed for {stuck_s:g} s, and there is still work: {_listed(left)}.")
            if now - started >= grace_s and (aborted is None or now - aborted >= _ABORT_EVERY_S):
                await self._abort_all()
                aborted = now
            on_wait(_listed(left))
            await asyncio.sleep(_LOOK_EVERY_S)
        return time.monotonic() - started

    async def _left(self) -> dict[str, str]:
        """By worker, what it still has to do, or why it does not say so."""
        workers = self._deployment.workers
        found = await asyncio.gather(*(self._left_of(worker) for worker in workers))
        return {worker.name: left for worker, left in zip(workers, found, strict=True) if left is not None}

    async def _left_of(self, worker: Worker) -> str | None:
        try:
            tokens, _, requests = await self._load(worker)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return str(error) or type(error).__name__
        return f"{requests} requests, {tokens} KV tokens" if tokens or requests else None

    async def _abort_all(self) -> None:
        """Ask every worker to abort all it has. One that does not answer is asked again later."""

        async def abort(worker: Worker) -> None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self._client.post(
                    f"{worker.url}/abort_request", json={"abort_all": True}, timeout=_TIMEOUT
                ) as response:
                    if response.status != 200:
                        logger.warning("%s does not abort: %d %s", worker.url, response.status, await response.text())

        await asyncio.gather(*(abort(worker) for worker in self._deployment.workers))

    async def flush(self, timeout_s: float) -> None:
        """Empty every cache, and the router's memory of them. Raises `WorkerError` if that takes too long."""
        deployment = self._deployment
        await self.until_idle(timeout_s)
        targets = [w.url for w in deployment.workers] if deployment.router is None else [deployment.router_url]
        deadline = time.monotonic() + timeout_s
        for url in targets:
            while True:
                status, text = 0, ""
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    async with self._client.post(f"{url}/flush_cache", timeout=_TIMEOUT) as response:
                        status, text = response.status, await response.text()
                if status == 200:
                    break
                if time.monotonic() >= deadline:
                    raise WorkerError(f"{url} did not flush its cache within {timeout_s:g} s: {status} {text[:300]}")
                await asyncio.sleep(0.3)


def _listed(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in left.items())


def cpu_seconds(pid: int | None) -> float:
    """Of a process and all below it; 0 for one that is gone."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:2])
    return total


def stages(samples: Sequence[Any]) -> dict[str, float]:
    """SGLang's own account of where a request's time went in a worker: its stages, and `queue`, what it waited there
    before its first forward pass."""
    found: dict[str, float] = {}
    for sample in samples:
        if sample.name in _STAGES:
            stage, unit = _STAGES[sample.name]
            key = f"{STAGE}{sample.labels.get('stage', stage)}/{unit}"
            found[key] = found.get(key, 0.0) + sample.value
    return found


def _pick(samples: Sequence[Any], wanted: Mapping[str, tuple[str, Mapping[str, str]]]) -> dict[str, float]:
    """The sum of the samples of each wanted name and labels."""
    return {
        key: sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
        for key, (name, labels) in wanted.items()
    }
