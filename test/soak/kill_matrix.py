"""What does a death cost, and how soon is it over? Each kind of process is killed at eight moments, under load.

Of a worker that is either what computes, or the process that answers HTTP: the router then sees its connections reset,
and new ones refused. Two prefill workers, two decode workers of one module, the router, and a supervisor that starts
again what died, as `prefillshare up` does. Four clients ask all the time. A request that is timed beforehand is sent
to die with: its moment decides when the process is killed. Every answer is compared with the oracle, token for token;
every other request is to end within ten seconds and to say why. Then all is waited for to be ready again. Writes
out/kill-matrix/summary.json; the exit status is 1 if anything was wrong, hung, or did not come back.

    python test/soak/kill_matrix.py
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import click
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sglang_prefillshare.deployment import Deployment, DeploymentOptions, StopRequestedError, Worker  # noqa: E402
from sglang_prefillshare.restarts import RestartPolicy  # noqa: E402
from test.support.models import make_base, make_decode_module  # noqa: E402
from test.support.oracle import Oracle, clear_prompt  # noqa: E402
from test.support.servers import GRACE, answers, greedy, session, topology  # noqa: E402

MODULE: Final = "coder"
CLIENTS: Final = 4
NEW_TOKENS: Final = 24
PROBE_TOKENS: Final = 1200
ENDS_WITHIN_S: Final = 10.0
RECOVERS_WITHIN_S: Final = 120.0
AFTER_S: Final = 2.0

VICTIMS: Final = ("prefill", "decode", "prefill HTTP", "decode HTTP", "router")
"""Of a worker what computes (scheduler and detokenizer), or its HTTP process alone; the whole router."""
MOMENTS: Final = {
    "idle": "the probe is not sent at all",
    "sent": "at the moment at which the probe is sent",
    "early prefill": "after a quarter of its time to the first token",
    "late prefill": "after three quarters of it",
    "handoff": "just before its first token",
    "first token": "when its first token came",
    "halfway": "when half of its tokens came",
    "last token": "when all but one came",
}

Question = tuple[list[int], list[int]]
"""Prompt, and the oracle's answer."""


@dataclass(slots=True)
class Case:
    """What one death did. Times in seconds."""

    victim: str
    moment: str
    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_failure_s: float = 0.0
    outage_s: float = 0.0
    """From the death to the last request that failed."""
    recovered_s: float | None = None
    """From the death until every worker was ready again."""

    @property
    def is_clean(self) -> bool:
        return not self.wrong and self.recovered_s is not None

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "failed": dict(self.failed)}


@click.command(help=__doc__)
@click.option("--victim", "victims", type=click.Choice(VICTIMS), multiple=True, default=VICTIMS, show_default=True)
@click.option("--moment", "moments", type=click.Choice(list(MOMENTS)), multiple=True, default=list(MOMENTS))
@click.option("--seed", default=1, show_default=True)
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(victims: Sequence[str], moments: Sequence[str], seed: int, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # Transformers' own bars
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = run(victims, moments, Path(folder), seed=seed, on_case=lambda case: console.print(_line(case)))
    Console().print(_table(cases))
    target = out / "kill-matrix" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    summary = {"command": " ".join(["python", *sys.argv]), "seed": seed, "cases": [case.to_json() for case in cases]}
    target.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(f"written to {target}")
    sys.exit(0 if all(case.is_clean for case in cases) else 1)


def run(
    victims: Sequence[str], moments: Sequence[str], folder: Path, *, seed: int, on_case: Callable[[Case], None]
) -> list[Case]:
    """Every victim at every moment, one after the other; `on_case` is told of each as it is over."""
    base = make_base(folder / "base", seed=41)
    module = make_decode_module(folder / MODULE, base, seed=5)
    oracle = Oracle(base, module)
    draw = random.Random(seed)
    questions = [_question(oracle, draw.randint(40, 400), draw.getrandbits(24)) for _ in range(24)]
    probes = [_question(oracle, PROBE_TOKENS, draw.getrandbits(24)) for _ in range(2 + len(victims) * len(moments))]
    described = topology(base, {MODULE: module})
    [decode] = described.decode
    described = dataclasses.replace(
        described,
        base=dataclasses.replace(described.base, workers=2),
        decode=(dataclasses.replace(decode, settings=dataclasses.replace(decode.settings, workers=2)),),
    )
    restarts = RestartPolicy(limit=len(victims) * len(moments) + 1, first_delay_s=0.1)
    options = DeploymentOptions(grace=GRACE, log_dir=folder / "logs", restarts=restarts)
    cases = []
    with Deployment(described, options=options) as deployment, _supervised(deployment):
        matrix = Matrix(deployment, questions, probes)
        for victim in victims:
            for moment in moments:
                case = asyncio.run(matrix.case(victim, moment))
                cases.append(case)
                on_case(case)
                if case.recovered_s is None:
                    return cases
    return cases


def _question(oracle: Oracle, tokens: int, seed: int) -> Question:
    prompt = clear_prompt(oracle, tokens, NEW_TOKENS, seed=seed)
    return prompt, oracle.generate(prompt, NEW_TOKENS).token_ids


class _supervised:
    """Inside, what dies is started again."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._thread = threading.Thread(target=self._wait, name="supervisor", daemon=True)

    def _wait(self) -> None:
        with suppress(StopRequestedError):
            self._deployment.wait()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._deployment.request_stop()
        self._thread.join(timeout=10.0)


class Matrix:
    """Asks a deployment, and kills parts of it."""

    def __init__(self, deployment: Deployment, questions: Sequence[Question], probes: Sequence[Question]) -> None:
        self._deployment = deployment
        self._questions = questions
        self._probes = list(probes)
        self._turns: Counter[str] = Counter()

    async def case(self, victim: str, moment: str) -> Case:
        case = Case(victim, moment)
        async with session() as client:
            first_token_s = await self._usual_ttft_s(client)
            async with self._load(client, case) as failures:
                await asyncio.sleep(0.5)
                worker = self._victim(victim)
                died_at = await self._kill_at(client, victim, worker, moment, first_token_s, case)
                case.recovered_s = await self._until_whole(died_at)
                await asyncio.sleep(AFTER_S)
            case.outage_s = max([at - died_at for at in failures if at > died_at], default=0.0)
        return case

    def _victim(self, kind: str) -> Worker:
        """Both workers of a kind in turn."""
        if kind == "router":
            assert self._deployment.router is not None
            return self._deployment.router
        self._turns[kind] += 1
        name = "base" if kind.startswith("prefill") else MODULE
        return self._deployment.worker(f"{name}.{self._turns[kind] % 2}")

    async def _usual_ttft_s(self, client: aiohttp.ClientSession) -> float:
        started = time.monotonic()
        prompt, _ = self._probes[0]
        self._probes[0] = ([*prompt[1:], prompt[0]], [])  # another prefix each time
        body = greedy(self._probes[0][0], NEW_TOKENS, model=MODULE, stream=True)
        async with client.post(f"{self._deployment.router_url}/generate", json=body) as response:
            await response.content.readany()
            found = time.monotonic() - started
            await response.content.read()
        return found

    async def _kill_at(
        self, client: aiohttp.ClientSession, victim: str, worker: Worker, moment: str, ttft_s: float, case: Case
    ) -> float:
        """Kill it at the probe's moment; returns when that was."""
        if moment == "idle":
            return _kill(worker, victim)
        probe = self._probes.pop()
        reached: dict[str, asyncio.Event] = {"first token": asyncio.Event(), "halfway": asyncio.Event()}
        reached["last token"] = asyncio.Event()
        asked = asyncio.create_task(self._ask(client, probe, case, reached))
        await asyncio.sleep(0)
        delays = {"sent": 0.0, "early prefill": ttft_s / 4, "late prefill": 3 * ttft_s / 4, "handoff": 0.95 * ttft_s}
        if moment in delays:
            await asyncio.sleep(delays[moment])
        else:
            waiting = asyncio.create_task(reached[moment].wait())
            await asyncio.wait([waiting, asked], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        died_at = _kill(worker, victim)
        await asked
        return died_at

    @asynccontextmanager
    async def _load(self, client: aiohttp.ClientSession, case: Case) -> AsyncIterator[list[float]]:
        """Clients that ask all the time; yields when requests failed, as they do."""
        failures: list[float] = []
        is_over = asyncio.Event()

        async def keep_asking(number: int) -> None:
            turn = number
            while not is_over.is_set():
                if not await self._ask(client, self._questions[turn % len(self._questions)], case):
                    failures.append(time.monotonic())
                    await asyncio.sleep(0.05)
                turn += CLIENTS + 1

        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(keep_asking(number))
            try:
                yield failures
            finally:
                is_over.set()

    async def _ask(
        self,
        client: aiohttp.ClientSession,
        question: Question,
        case: Case,
        reached: dict[str, asyncio.Event] | None = None,
    ) -> bool:
        """Whether it was answered. Streamed, so that it can be told how far an answer is."""
        prompt, wanted = question
        body = greedy(prompt, NEW_TOKENS, model=MODULE, stream=True)
        started = last_at = time.monotonic()
        ids: list[int] = []
        error, is_done = "the stream ended early", False
        try:
            async with asyncio.timeout(60.0):
                async with client.post(f"{self._deployment.router_url}/generate", json=body) as response:
                    if response.status != 200:
                        answer = await response.json(content_type=None)
                        error = f"{response.status} {answer['error']['type']}"
                    async for line in response.content:
                        last_at = time.monotonic()
                        if line.startswith(b"data: {"):
                            event = json.loads(line[6:])
                            if "error" in event:
                                error = f"event {event['error'].get('type')}"
                                break
                            ids = event["output_ids"]
                            _mark(reached, len(ids))
                        is_done = is_done or line.startswith(b"data: [DONE]")
        except aiohttp.ClientError as caught:
            error = f"the router's connection broke ({type(caught).__name__})"
        except TimeoutError:
            case.wrong.append(f"hung: a request of {len(prompt)} tokens did not end within 60 s")
            return False
        seconds = time.monotonic() - started
        if is_done:
            case.ok += 1
            if wanted and ids != wanted:
                case.wrong.append(f"{len(prompt)} tokens: {ids}, wanted {wanted}")
            return True
        case.failed[error] += 1
        # A request may wait for room as long as it likes; from its last sign of life on it must end soon.
        silent_s = min(seconds, time.monotonic() - last_at)
        case.slowest_failure_s = max(case.slowest_failure_s, silent_s)
        if silent_s > ENDS_WITHIN_S:
            case.wrong.append(f"{len(prompt)} tokens: failed only after {silent_s:.1f} s: {error}")
        return False

    async def _until_whole(self, died_at: float) -> float | None:
        """Until the router says that every worker is ready, and the process that died is another one."""
        url = f"{self._deployment.router_url}/workers"
        await asyncio.sleep(0.3)
        while time.monotonic() - died_at < RECOVERS_WITHIN_S:
            with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
                async with aiohttp.ClientSession() as client, client.get(url) as response:
                    workers = (await response.json())["workers"]
                    is_ready = all(worker["status"] == "ready" for worker in workers)
                    if is_ready and all(answers(f"{worker.url}/health") for worker in self._deployment.workers):
                        return time.monotonic() - died_at
            await asyncio.sleep(0.2)
        return None


def _mark(reached: dict[str, asyncio.Event] | None, count: int) -> None:
    if reached is not None:
        for name, wanted in (("first token", 1), ("halfway", NEW_TOKENS // 2), ("last token", NEW_TOKENS - 1)):
            if count >= wanted:
                reached[name].set()


def _kill(worker: Worker, victim: str) -> float:
    """SIGKILL what a worker's server has started, which computes, and which it outlives by a second at most; or that
    server itself, which answers HTTP; of the router, itself. Returns when."""
    assert worker.pid is not None
    root = psutil.Process(worker.pid)
    computing = [] if victim.endswith("HTTP") else root.children(recursive=True)
    for process in computing or [root]:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return time.monotonic()


def _line(case: Case) -> str:
    recovered = "NOT RECOVERED" if case.recovered_s is None else f"whole after {case.recovered_s:.1f} s"
    found = "".join(f"\n  WRONG: {line}" for line in case.wrong[:5])
    return (
        f"{case.victim}, {case.moment}: {case.ok} ok, {sum(case.failed.values())} failed {dict(case.failed)}, "
        f"outage {case.outage_s:.1f} s, {recovered}{found}"
    )


def _table(cases: Sequence[Case]) -> Table:
    view = Table(box=None, header_style="bold")
    for heading in ("killed", "at", "ok", "failed", "slowest failure, s", "last failure after, s", "whole after, s"):
        view.add_column(heading)
    for case in cases:
        view.add_row(
            case.victim,
            case.moment,
            str(case.ok),
            str(sum(case.failed.values())),
            f"{case.slowest_failure_s:.1f}",
            f"{case.outage_s:.1f}",
            "never" if case.recovered_s is None else f"{case.recovered_s:.1f}",
        )
    return view


if __name__ == "__main__":
    main()
