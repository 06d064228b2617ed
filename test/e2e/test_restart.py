"""`prefillshare up` on real servers: what is killed comes back, and answers as before; on SIGHUP others come and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml

from test.e2e.conftest import Models
from test.support.device import WORKER_ARGS
from test.support.models import sample_prompt
from test.support.servers import answers, greedy, post, session

PROMPT = sample_prompt(200, seed=42)
NEW_TOKENS = 8
STREAMED = 3800
"""Tokens of an answer that takes about as long as a worker takes to start."""
STREAM_TIMEOUT_S = 300.0


class Up:
    """A running `prefillshare up`; what it says is in a file."""

    def __init__(self, folder: Path, models: Models) -> None:
        self._ready_file, self._said = folder / "ready.json", folder / "said.txt"
        self.log_dir = folder / "logs"
        self._topology, self._models = folder / "topology.yaml", models
        self.write("coder", "twin")
        command = [sys.executable, "-m", "sglang_prefillshare.cli", "up", str(self._topology)]
        command += ["--json-ready", str(self._ready_file), "--log-dir", str(self.log_dir)]
        command += ["--interrupt-grace", "3", "--terminate-grace", "2"]
        with self._said.open("w") as said:
            # In a session of its own it has no terminal whose loss a SIGHUP could mean.
            self.process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)

    def write(self, *modules: str) -> None:
        """The topology with these decode modules."""
        described = {
            "base": {"model": str(self._models.base), "args": {"kv-events-config": "auto"}},
            "decode": [{"name": name, "model": str(getattr(self._models, name))} for name in modules],
            "args": dict(WORKER_ARGS),
        }
        self._topology.write_text(yaml.safe_dump(described))

    def pids(self) -> dict[str, int]:
        return {worker["name"]: worker["pid"] for worker in self.describe()["workers"]}

    @property
    def said(self) -> str:
        return self._said.read_text()

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self._ready_file.read_text())
        return described

    def pid(self, name: str) -> int:
        (pid,) = (worker["pid"] for worker in self.describe()["workers"] if worker["name"] == name)
        return int(pid)

    def wait_for(self, condition: Any, *, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.2)

    def wait_ready(self) -> None:
        self.wait_for(self._ready_file.exists)


@pytest.fixture(scope="module")
def up(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up"), models)
    try:
        running.wait_ready()
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.process.send_signal(signal.SIGINT)
        running.process.wait(60)


def answer(up: Up, module: str) -> list[int]:
    async def run() -> list[int]:
        async with session() as client:
            url = f"{up.describe()['router_url']}/generate"
            tokens = (await post(client, url, greedy(PROMPT, NEW_TOKENS, model=module))).token_ids
            await asyncio.sleep(0.3)  # what the base publishes of it comes
            return tokens

    return asyncio.run(run())


def ask_router(up: Up, path: str) -> Any:
    async def run() -> Any:
        async with session() as client, client.get(f"{up.describe()['router_url']}{path}") as response:
            return await response.json()

    return asyncio.run(run())


def calls(up: Up) -> list[dict[str, Any]]:
    return list(ask_router(up, "/calls")["calls"])


def events_of_base(up: Up) -> dict[str, Any]:
    (events,) = (w["events"] for w in ask_router(up, "/workers")["workers"] if w["role"] == "prefill")
    return dict(events)


def health(up: Up) -> str:
    """What the router says is missing; empty if nothing is."""

    async def run() -> str:
        async with session() as client, client.get(f"{up.describe()['router_url']}/health") as response:
            body = await response.json()
            return "" if response.status == 200 else str(body["missing"])

    return asyncio.run(run())


def scheduler_of(pid: int) -> int:
    (scheduler,) = (p.pid for p in psutil.Process(pid).children() if "scheduler" in " ".join(p.cmdline()))
    return scheduler


# Who, and which of its processes: SGLang's main process ends by itself some time after its scheduler.
KILLS = [("coder", scheduler_of), ("base", scheduler_of), ("base", lambda pid: pid)]


@pytest.mark.parametrize(("name", "victim_of"), KILLS, ids=["decode-scheduler", "prefill-scheduler", "prefill-main"])
def test_a_killed_worker_comes_back_and_answers_as_before(up: Up, name: str, victim_of: Any) -> None:
    before = {module: answer(up, module) for module in ("coder", "twin")}
    pids = {worker: up.pid(worker) for worker in ("base", "coder", "twin")}
    said_before = len(up.said)

    os.kill(victim_of(pids[name]), signal.SIGKILL)
    killed_at = time.monotonic()
    up.wait_for(lambda: health(up) != "", timeout_s=20.0)
    missing = health(up)
    assert ("'coder'" in missing) if name == "coder" else ("no prefill worker" in missing), missing
    if name == "coder":
        assert answer(up, "twin") == before["twin"]  # while coder is away
    up.wait_for(lambda: "restart" in up.said[said_before:], timeout_s=30.0)
    told_s = time.monotonic() - killed_at
    up.wait_for(lambda: up.pid(name) != pids[name] and health(up) == "")
    print(f"{name}: death told after {told_s:.1f} s, whole after {time.monotonic() - killed_at:.1f} s")

    if name == "base":
        up.wait_for(lambda: events_of_base(up)["is_current"], timeout_s=10.0)
        assert events_of_base(up)["blocks"] < 100, "the blocks of the process that died"
    assert {module: answer(up, module) for module in ("coder", "twin")} == before
    if name == "base":
        predicted = [(call["matched_by"], call["matched_tokens"], call["cached_tokens"]) for call in calls(up)[-2:]]
        assert predicted == [("events", 0, 0), ("events", len(PROMPT) - 2, len(PROMPT) - 2)]
    assert {worker: up.pid(worker) for worker in pids if worker != name} == {
        worker: pid for worker, pid in pids.items() if worker != name
    }
    assert answers(f"{up.describe()['router_url']}/health")
    said = up.said[said_before:]
    assert f"[{name}]" in said and "of 3 in" in said and str(up.log_dir / f"{name}.log") in said


async def stream(client: aiohttp.ClientSession, up: Up, module: str, tokens: int, begun: asyncio.Event) -> list[int]:
    """The tokens of a stream that came to its end, which `[DONE]` is; it sets `begun` at the first."""
    last: dict[str, Any] = {}
    url, is_done = f"{up.describe()['router_url']}/generate", False
    body = greedy(PROMPT, tokens, model=module, stream=True)
    async with client.post(url, json=body, timeout=aiohttp.ClientTimeout(total=STREAM_TIMEOUT_S)) as response:
        assert response.status == 200
        async for raw in response.content:
            line = raw.decode().strip().removeprefix("data: ")
            is_done = line == "[DONE]"
            if line and not is_done:
                begun.set()
                last = json.loads(line)
                assert "error" not in last, last
            elif is_done:
                break
    assert is_done, last
    return [int(token) for token in last["output_ids"]]


@pytest.mark.slow  # a minute and more of streams, which must outlast a worker's start
def test_on_sighup_a_module_comes_another_goes_and_a_third_does_not_notice(up: Up) -> None:
    """Streams of the module that stays and of the one that goes are under way all the time."""
    before, said_before = up.pids(), len(up.said)
    answered = answer(up, "coder")
    router = up.describe()["router"]

    async def scenario() -> None:
        begun = {"coder": asyncio.Event(), "twin": asyncio.Event()}
        async with session() as client:
            streams = {name: asyncio.create_task(stream(client, up, name, STREAMED, begun[name])) for name in begun}
            for event in begun.values():
                await asyncio.wait_for(event.wait(), 60.0)
            up.write("coder", "planner")
            up.process.send_signal(signal.SIGHUP)
            began = time.monotonic()
            while "planner" not in up.pids():
                assert up.process.poll() is None and time.monotonic() - began < 240.0, up.said
                await asyncio.sleep(0.1)
            print(f"reloaded after {time.monotonic() - began:.1f} s; ", end="")
            assert streams["twin"].done(), "it ended before its worker did"
            for name, task in streams.items():
                assert len(await task) == STREAMED, name
        print(f"streams after {time.monotonic() - began:.1f} s")

    asyncio.run(scenario())
    after = up.pids()
    assert list(after) == ["base", "coder", "planner"]
    assert (after["base"], after["coder"]) == (before["base"], before["coder"])
    assert up.describe()["router"] == router
    assert not psutil.pid_exists(before["twin"])
    assert "added planner, removed twin; 2 as they were" in up.said[said_before:]
    assert health(up) == "" and answer(up, "coder") == answered

    async def asked(module: str) -> tuple[int, Any]:
        async with session() as client:
            url = f"{up.describe()['router_url']}/generate"
            told = await post(client, url, greedy(PROMPT, NEW_TOKENS, model=module))
            return told.status, told.body

    assert asyncio.run(asked("planner"))[0] == 200
    status, body = asyncio.run(asked("twin"))
    assert status == 404 and "coder, planner" in str(body)
