"""Real servers for tests: topologies of tiny models, a plain SGLang server, and clients that make a pair."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import random
import sys
import threading
import time
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from sglang_prefillshare.config import DecodeModule, RouterSettings, Topology, WorkerSettings
from sglang_prefillshare.deployment import Deployment, DeploymentOptions, Worker
from sglang_prefillshare.plans import default_env
from sglang_prefillshare.ports import PortBlocks
from sglang_prefillshare.preload import Preloader, preloader
from sglang_prefillshare.process import StopGrace, SupervisedProcess
from test.support.device import WORKER_ARGS

GRACE = StopGrace(interrupt_s=3.0, terminate_s=2.0)
REQUEST_TIMEOUT_S = 90.0

OVERLAP_ON_A_CPU = {"PREFILLSHARE_CPU_OVERLAP": "1"}
"""Has a worker run SGLang's overlap loop, as it does on a GPU by default."""


def topology(
    base: Path,
    modules: Mapping[str, Path],
    *,
    args: Mapping[str, Any] | None = None,
    overlapped: Collection[str] = (),
    **decode_args: Any,
) -> Topology:
    """One base and one worker per decode module; `args` go to every worker, `decode_args` to decode only.

    The modules in `overlapped` are served with overlap scheduling on a CPU, too.
    """
    common = {**WORKER_ARGS, **(args or {})}
    decode = {name.replace("_", "-"): value for name, value in decode_args.items()}

    def module(name: str, path: Path) -> DecodeModule:
        env = OVERLAP_ON_A_CPU if name in overlapped else {}
        return DecodeModule(name, WorkerSettings(str(path), args={**common, **decode}, env=env))

    return Topology(
        base=WorkerSettings(str(base), args=common),
        decode=tuple(module(name, path) for name, path in modules.items()),
        router=RouterSettings(),
    )


@functools.cache
def shared_preloader() -> Preloader | None:
    """One for all servers of a test run: they import SGLang once."""
    made = preloader(default_env(os.environ), free=("PYTEST_CURRENT_TEST",))
    if made is not None:
        atexit.register(made.close)
    return made


def deploy(described: Topology, log_dir: Path | None = None) -> Deployment:
    options = DeploymentOptions(ready_timeout_s=240.0, grace=GRACE, log_dir=log_dir, preloader=shared_preloader())
    return Deployment(described, options=options)


@contextmanager
def launch_server(model: Path, args: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Iterator[str]:
    """A plain `python -m sglang.launch_server`; yields its URL when it answers `/health`."""
    ports = PortBlocks()
    port = ports.take()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    for name, value in WORKER_ARGS.items():
        command += [f"--{name}", str(value)]
    command += args
    ended = threading.Event()
    process = SupervisedProcess(
        "server",
        command,
        env={**default_env(os.environ), **(env or {})},
        on_line=lambda _line: None,
        on_exit=lambda _status: ended.set(),
        grace=GRACE,
        preloader=shared_preloader(),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240.0
        while not answers(f"{url}/health"):
            if ended.is_set() or time.monotonic() > deadline:
                raise AssertionError("the server did not become ready:\n" + "\n".join(process.tail(30)))
            time.sleep(0.5)
        yield url
    finally:
        process.stop()
        process.wait(GRACE.total_s + 10.0)
        ports.release()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer: status, headers, and its JSON or text."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def token_ids(self) -> list[int]:
        assert self.status == 200, self
        return list(self.body["output_ids"])


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S))


async def post(client: aiohttp.ClientSession, url: str, body: Mapping[str, Any], **headers: str) -> Answer:
    async with client.post(url, json=dict(body), headers=headers) as response:
        is_json = response.content_type == "application/json"
        return Answer(response.status, response.headers, await (response.json() if is_json else response.text()))


def pairing(prefill: Worker) -> dict[str, Any]:
    """The fields that make two legs a pair."""
    port = prefill.plan.bootstrap_port
    return {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": random.getrandbits(62) + 1}


async def post_pair(
    client: aiohttp.ClientSession, prefill: Worker, decode: Worker, path: str, body: Mapping[str, Any]
) -> tuple[Answer, Answer]:
    """What a client does without our router: both legs at once; (prefill's answer, decode's answer)."""
    legs = {**body, **pairing(prefill)}
    both = await asyncio.gather(
        post(client, prefill.url + path, {**legs, "stream": False}), post(client, decode.url + path, legs)
    )
    return both[0], both[1]


def greedy(prompt: Sequence[int], max_new_tokens: int, **more: Any) -> dict[str, Any]:
    """A `/generate` body that asks for exactly `max_new_tokens` greedy tokens."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling, **more}


def processes(deployment: Deployment) -> set[tuple[int, float]]:
    """Every process of every worker, by number and start; one that is gone is not among them."""
    found = set()
    for worker in deployment.workers:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(worker.pid)
            found |= {(process.pid, process.create_time()) for process in (root, *root.children(recursive=True))}
    return found


async def used_tokens(client: aiohttp.ClientSession, worker: Worker) -> tuple[int, int]:
    """(KV tokens held by requests, requests in any queue) of a worker right now."""
    async with client.get(f"{worker.url}/v1/loads") as response:
        load = (await response.json())["loads"][0]
    queued = sum(value for name, value in load["disaggregation"].items() if name.endswith("_reqs"))
    return load["num_used_tokens"], load["num_running_reqs"] + load["num_waiting_reqs"] + queued


async def until_idle(client: aiohttp.ClientSession, workers: Sequence[Worker], *, timeout_s: float = 20.0) -> None:
    """Wait until no worker holds KV or requests; fail with what is left if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = {worker.name: await used_tokens(client, worker) for worker in workers}
        if all(held == (0, 0) for held in left.values()):
            return
        assert time.monotonic() < deadline, f"after {timeout_s} s still held (KV tokens, requests): {left}"
        await asyncio.sleep(0.2)


@dataclass(frozen=True, slots=True)
class HandoffCounts:
    """What one worker has counted of its handoffs since it started."""

    by_outcome: Mapping[str, int]
    held_tokens: int
    moved_tokens: int
    moved_bytes: int
    pages_leased: int

    def since(self, earlier: HandoffCounts) -> HandoffCounts:
        outcomes = {name: n - earlier.by_outcome.get(name, 0) for name, n in self.by_outcome.items()}
        return HandoffCounts(
            by_outcome={name: n for name, n in outcomes.items() if n},
            held_tokens=self.held_tokens - earlier.held_tokens,
            moved_tokens=self.moved_tokens - earlier.moved_tokens,
            moved_bytes=self.moved_bytes - earlier.moved_bytes,
            pages_leased=self.pages_leased,
        )


async def handoff_counts(client: aiohttp.ClientSession, worker: Worker) -> HandoffCounts:
    """Read a worker's `/metrics`; handoffs that ended well only, but for `by_outcome`."""
    samples = await metric_samples(client, worker.url)

    def total(name: str, **labels: str) -> int:
        found = (s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
        return int(sum(found))

    outcomes = {s.labels["outcome"] for s in samples if s.name == "prefillshare_handoffs_total"}
    return HandoffCounts(
        by_outcome={name: n for name in outcomes if (n := total("prefillshare_handoffs_total", outcome=name))},
        held_tokens=total("prefillshare_handoff_tokens_total", source="held", outcome="ok"),
        moved_tokens=total("prefillshare_handoff_tokens_total", source="moved", outcome="ok"),
        moved_bytes=total("prefillshare_handoff_bytes_total", source="moved", outcome="ok"),
        pages_leased=total("prefillshare_pages_leased"),
    )


async def metric_samples(client: aiohttp.ClientSession, url: str) -> list[Any]:
    """What a worker or the router shows at `/metrics`."""
    async with client.get(f"{url}/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    return [sample for family in families for sample in family.samples]
