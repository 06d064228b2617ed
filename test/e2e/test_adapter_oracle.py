"""Adapters in full: 200 prompts of 2 to 1,500 tokens, eight at a time over three modules, asked in all ways.

In one server and on a decode worker, with pages of one token and of 16, and under pressure. What is particular to each
is in `test_unified.py` and `test_adapters.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import torch

from sglang_prefillshare.config import AdapterModule, Topology, WorkerSettings
from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.support.device import WORKER_ARGS
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import deploy, greedy, post, session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPTS: Final = 200
NEW_TOKENS: Final = 12
LONGEST: Final = 1500
FREQUENCY_PENALTY: Final = 0.7
POOL_TOKENS: Final = 6144
"""Eight of the longest prompts are 12,000 tokens: prompts are evicted, and what decodes is retracted."""


@pytest.fixture(scope="module", params=["unified-1", "unified-16", "decode-1", "decode-16"])
def served(request: pytest.FixtureRequest, models: Models, adapters: dict[str, Path]) -> Iterator[Deployment]:
    layout, _, page_size = request.param.partition("-")
    args = {"page-size": int(page_size), "chunked-prefill-size": 128, "max-total-tokens": POOL_TOKENS}
    base = WorkerSettings(str(models.base), args={**WORKER_ARGS, **args}, env={"SGLANG_TEST_RETRACT": "1"})
    modules = tuple(AdapterModule(name, str(folder)) for name, folder in adapters.items())
    with deploy(Topology(base, (), adapters=modules, is_unified=layout == "unified")) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Job:
    """A request, and what is right."""

    module: str
    prompt: list[int]
    wanted: list[int] | None
    """None: what a grammar allows."""
    sampling: dict[str, Any] = field(default_factory=dict)
    is_streamed: bool = False

    def body(self) -> dict[str, Any]:
        body = greedy(self.prompt, NEW_TOKENS, lora_path=self.module, stream=self.is_streamed, return_logprob=True)
        return {**body, "sampling_params": {**body["sampling_params"], **self.sampling}}


@pytest.fixture(scope="module")
def jobs(adapter_oracles: dict[str, Oracle]) -> list[Job]:
    """Drawn once: every length is as likely on a scale of powers, both ends are there, and every way to ask in turn."""
    draw = random.Random("adapters")
    lengths = [2, LONGEST, *(round(2 * (LONGEST / 2) ** draw.random()) for _ in range(PROMPTS - 2))]
    names = list(adapter_oracles)
    return [_job(adapter_oracles, names[place % 3], place, length) for place, length in enumerate(lengths)]


def _job(oracles: dict[str, Oracle], module: str, place: int, length: int) -> Job:
    oracle = oracles[module]
    prompt = clear_prompt(oracle, length, NEW_TOKENS, seed=7000 + place)
    plain = oracle.generate(prompt, NEW_TOKENS).token_ids
    is_streamed = place % 2 == 1
    match place % 8:
        case 3:
            stop = {"stop_token_ids": [plain[4]], "ignore_eos": False}
            return Job(module, prompt, plain[: plain.index(plain[4]) + 1], stop, is_streamed)
        case 5:
            generation = oracle.generate(prompt, NEW_TOKENS, adjust=_penalised)
            if generation.smallest_gap >= 3e-3:
                return Job(module, prompt, generation.token_ids, {"frequency_penalty": FREQUENCY_PENALTY}, is_streamed)
        case 6:
            return Job(module, prompt, None, {"regex": "[0-9]{4}", "ignore_eos": False}, is_streamed)
    return Job(module, prompt, plain, {}, is_streamed)


def _penalised(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
    counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=len(logits))
    return logits - FREQUENCY_PENALTY * counts


async def _answer(client: aiohttp.ClientSession, url: str, job: Job) -> dict[str, Any]:
    if not job.is_streamed:
        answer = await post(client, url, job.body())
        assert answer.status == 200, answer
        return dict(answer.body)
    last: dict[str, Any] = {}
    async with client.post(url, json=job.body()) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
    return last


def test_every_answer_equals_the_oracle(served: Deployment, jobs: list[Job]) -> None:
    async def run() -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(8)

        async def one(client: aiohttp.ClientSession, job: Job) -> dict[str, Any]:
            async with gate:
                return await _answer(client, f"{served.url}/generate", job)

        async with session() as client:
            return await asyncio.gather(*(one(client, job) for job in jobs))

    answers = asyncio.run(run())
    for job, answer in zip(jobs, answers, strict=True):
        told = f"{job.module}, {len(job.prompt)} tokens, {job.sampling}"
        if job.wanted is None:
            assert re.fullmatch("[0-9]{4}", answer["text"]), told
        else:
            assert answer["output_ids"] == job.wanted, told
        log_probs = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, *_ in log_probs] == answer["output_ids"], told
    assert any(answer["meta_info"].get("num_retractions") for answer in answers), "nothing was retracted"
