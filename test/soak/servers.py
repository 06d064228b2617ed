"""Hundreds of requests through real servers, with injected failures, clients that leave, and workers that are killed.

Two prefill workers, two decode workers of one module and one of another, and the router. Every answer that comes is
compared with the oracle, token for token; every other request ends in time with an error that says why; in the end the
workers that are left hold nothing and answer rightly.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from sglang_prefillshare.deployment import Deployment, Worker
from test.soak.tally import Tally
from test.support.models import make_base, make_decode_module, sample_prompt
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import deploy, greedy, handoff_counts, session, topology, until_idle

NEW_TOKENS: Final = 8
PROMPTS_PER_MODULE: Final = 30
CONCURRENCY: Final = 6
LEAVING_SHARE: Final = 0.05
DEADLINE_S: Final = 60.0
FAILURE_PROBABILITY: Final = 0.004
"""Of one look of SGLang's scheduler at one handoff, of which a request sees a dozen: some 5% of the requests fail."""

Question = tuple[str, list[int], list[int]]
"""Module, prompt, and the oracle's answer."""


def run(requests: int, folder: Path, *, seed: int, on_progress: Callable[[int], None]) -> Tally:
    """Serve, ask, and see what was left; `on_progress` is told how many requests have ended."""
    base = make_base(folder / "base", seed=41)
    modules = {name: make_decode_module(folder / name, base, seed=len(name)) for name in ("coder", "planner")}
    rng = random.Random(seed)
    questions = [
        question
        for number, (name, path) in enumerate(modules.items())
        for question in _questions(name, Oracle(base, path), seed=1000 * seed + 100 * number)
    ]
    tally = Tally()
    with deploy(_topology(base, modules)) as deployment:
        asyncio.run(_ask_all(deployment, questions, requests, rng, tally, on_progress))
    return tally


def _topology(base: Path, modules: dict[str, Path]) -> Any:
    described = topology(base, modules)
    env = {"SGLANG_TEST_DISAGG_FAILURE_PROB": str(FAILURE_PROBABILITY)}
    coder, planner = described.decode
    return dataclasses.replace(
        described,
        base=dataclasses.replace(described.base, workers=2, env=env),
        decode=(
            dataclasses.replace(coder, settings=dataclasses.replace(coder.settings, workers=2, env=env)),
            dataclasses.replace(planner, settings=dataclasses.replace(planner.settings, env=env)),
        ),
    )


def _questions(name: str, oracle: Oracle, *, seed: int) -> list[Question]:
    """Prompts of 2 to 600 tokens; every third one continues the one before by its answer and some more tokens."""
    rng = random.Random(seed)
    found: list[Question] = []
    while len(found) < PROMPTS_PER_MODULE:
        if len(found) % 3 == 2:
            _, prompt, answer = found[-1]
            prompt = [*prompt, *answer, *sample_prompt(20, seed=seed + len(found))]
            generation = oracle.generate(prompt, NEW_TOKENS)
            if generation.smallest_gap < 3e-3:
                found.pop()
                continue
        else:
            prompt = clear_prompt(oracle, rng.randint(2, 600), NEW_TOKENS, seed=rng.getrandbits(24))
            generation = oracle.generate(prompt, NEW_TOKENS)
        found.append((name, prompt, generation.token_ids))
    return found


async def _ask_all(
    deployment: Deployment,
    questions: list[Question],
    requests: int,
    rng: random.Random,
    tally: Tally,
    on_progress: Callable[[int], None],
) -> None:
    gate = asyncio.Semaphore(CONCURRENCY)
    killed: list[Worker] = []
    # Near the end, since nobody starts workers again here: the rest must be served by those that are left.
    doomed = {int(requests * 0.7): "coder.1", int(requests * 0.85): "base.1"}
    async with session() as client:

        async def one(number: int) -> None:
            async with gate:
                if number in doomed:
                    killed.append(deployment.worker(doomed[number]))
                    tally.faults[f"{doomed[number]} killed"] += 1
                    _kill(killed[-1])
                await _ask(client, deployment, rng.choice(questions), rng.random(), tally)
                on_progress(tally.handoffs)

        await asyncio.gather(*(one(number) for number in range(requests)))
        left = [worker for worker in deployment.workers if worker not in killed]
        try:
            await until_idle(client, left, timeout_s=DEADLINE_S)
        except AssertionError as error:
            tally.leaked.append(str(error))
        for worker in left:
            if (pages := (await handoff_counts(client, worker)).pages_leased) != 0:
                tally.leaked.append(f"{worker.name} has {pages} pages leased")
        for question in questions[:3] + questions[-3:]:
            for _ in range(10):  # failures are still injected
                before = tally.ok
                await _ask(client, deployment, question, 1.0, tally)
                if tally.ok > before:
                    break
            else:
                tally.wrong.append(f"{question[0]} does not answer any more")


async def _ask(
    client: aiohttp.ClientSession, deployment: Deployment, question: Question, dice: float, tally: Tally
) -> None:
    """One request; `dice` below LEAVING_SHARE makes its client leave after some milliseconds."""
    name, prompt, wanted = question
    tally.handoffs += 1
    body = greedy(prompt, NEW_TOKENS, model=name)
    started = time.monotonic()
    try:
        async with asyncio.timeout(dice / LEAVING_SHARE * 0.15 if dice < LEAVING_SHARE else DEADLINE_S):
            async with client.post(f"{deployment.router_url}/generate", json=body) as response:
                answer = await response.json(content_type=None)
    except TimeoutError:
        if dice < LEAVING_SHARE:
            tally.faults["client left"] += 1
        else:
            tally.hung.append(f"a request of {len(prompt)} tokens to {name} did not end within {DEADLINE_S} s")
        return
    except aiohttp.ClientError as error:
        tally.wrong.append(f"the router broke the connection after {time.monotonic() - started:.1f} s: {error}")
        return
    if response.status == 200:
        tally.ok += 1
        if answer["output_ids"] != wanted:
            tally.wrong.append(f"{name}, {len(prompt)} tokens: {answer['output_ids']}, wanted {wanted}")
        return
    # SGLang's form, or the router's.
    message = answer.get("message") or answer.get("error", {}).get("message") if isinstance(answer, dict) else None
    if not message:
        tally.wrong.append(f"{name}: status {response.status} without a reason: {answer}")
        return
    tally.count_failure(message)


def _kill(worker: Worker) -> None:
    """SIGKILL the server and all that belongs to it, as when memory runs out."""
    assert worker.pid is not None
    for process in psutil.Process(worker.pid).children(recursive=True):
        os.kill(process.pid, signal.SIGKILL)
