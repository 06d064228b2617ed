"""What a deployment answers equals the oracle, token for token in float32; see `Oracle.check` for bfloat16."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import greedy, post, post_pair, session

pytestmark = pytest.mark.devices
NEW_TOKENS = 16
LENGTHS = (1, 2, 3, 17, 64, 255, 700, 1500)


@pytest.fixture(scope="module")
def oracles(models: Models) -> dict[str, Oracle]:
    return {"planner": Oracle(models.base, models.planner), "coder": Oracle(models.base, models.coder)}


async def streamed_ids(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[int]:
    """Token ids of a streamed `/generate`; each chunk must carry exactly the tokens so far, none before the first."""
    ids: list[int] = []
    async with client.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert chunk["output_ids"], "a chunk without tokens came before the first token"
                assert chunk["meta_info"]["completion_tokens"] == len(ids) + len(chunk["output_ids"][len(ids) :])
                ids = chunk["output_ids"]
    return ids


def test_answers_equal_the_oracle_eight_at_a_time(deployment: Deployment, oracles: dict[str, Oracle]) -> None:
    jobs = [(name, clear_prompt(oracles[name], n, NEW_TOKENS, seed=n)) for n in LENGTHS for name in oracles]

    async def run() -> list[list[int]]:
        gate = asyncio.Semaphore(8)
        async with session() as client:

            async def ask(index: int, model: str, prompt: list[int]) -> list[int]:
                async with gate:
                    body = greedy(prompt, NEW_TOKENS, model=model)
                    if index % 2:
                        return await streamed_ids(client, f"{deployment.router_url}/generate", {**body, "stream": True})
                    return (await post(client, f"{deployment.router_url}/generate", body)).token_ids

            return await asyncio.gather(*(ask(i, model, prompt) for i, (model, prompt) in enumerate(jobs)))

    for (model, prompt), found in zip(jobs, asyncio.run(run()), strict=True):
        oracles[model].check(prompt, found, NEW_TOKENS)


def test_a_repeated_prompt_answers_the_same_from_the_cache(deployment: Deployment, oracles: dict[str, Oracle]) -> None:
    prompt = clear_prompt(oracles["coder"], 333, NEW_TOKENS, seed=5)

    async def run() -> list[Any]:
        prefill, decode = deployment.worker("base"), deployment.worker("coder")
        async with session() as client:
            return [await post_pair(client, prefill, decode, "/generate", greedy(prompt, NEW_TOKENS)) for _ in range(3)]

    answers = [decode for _, decode in asyncio.run(run())]
    for answer in answers:
        oracles["coder"].check(prompt, answer.token_ids, NEW_TOKENS)
    assert [answer.body["meta_info"]["cached_tokens"] for answer in answers[1:]] == [331, 331]
    assert {answer.body["meta_info"]["prompt_tokens"] for answer in answers} == {333}


def test_swapping_modules_changes_the_answer(deployment: Deployment, oracles: dict[str, Oracle]) -> None:
    """The tests above can fail: each module has an answer of its own to one prompt."""
    prompt = clear_prompt(oracles["coder"], 64, NEW_TOKENS, seed=9)
    wanted = {name: oracle.generate(prompt, NEW_TOKENS).token_ids for name, oracle in oracles.items()}
    assert wanted["planner"] != wanted["coder"]
