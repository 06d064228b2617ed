"""`prefillshare up` on real servers: what is killed comes back, and answers as before."""

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

import psutil
import pytest
import yaml

from test.e2e.conftest import Models
from test.support.device import WORKER_ARGS
from test.support.models import sample_prompt
from test.support.servers import answers, greedy, post, session

PROMPT = sample_prompt(200, seed=42)
NEW_TOKENS = 8


class Up:
    """A running `prefillshare up`; what it says is in a file."""

    def __init__(self, folder: Path, models: Models) -> None:
        self._ready_file, self._said = folder / "ready.json", folder / "said.txt"
        self.log_dir = folder / "logs"
        topology = folder / "topology.yaml"
        described = {
            "base": {"model": str(models.base)},
            "decode": [{"name": name, "model": str(getattr(models, name))} for name in ("coder", "twin")],
            "args": dict(WORKER_ARGS),
        }
        topology.write_text(yaml.safe_dump(described))
        command = [sys.executable, "-m", "sglang_prefillshare.cli", "up", str(topology)]
        command += ["--json-ready", str(self._ready_file), "--log-dir", str(self.log_dir)]
        command += ["--interrupt-grace", "3", "--terminate-grace", "2"]
        with self._said.open("w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said)

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
            return (await post(client, url, greedy(PROMPT, NEW_TOKENS, model=module))).token_ids

    return asyncio.run(run())


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

    assert {module: answer(up, module) for module in ("coder", "twin")} == before
    assert {worker: up.pid(worker) for worker in pids if worker != name} == {
        worker: pid for worker, pid in pids.items() if worker != name
    }
    assert answers(f"{up.describe()['router_url']}/health")
    said = up.said[said_before:]
    assert f"[{name}]" in said and "of 3 in" in said and str(up.log_dir / f"{name}.log") in said
