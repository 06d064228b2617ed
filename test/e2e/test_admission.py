"""More load than a decode pool holds: it waits in the router, every request is answered, and nothing is retracted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.config import RouterSettings
from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.support.models import sample_prompt
from test.support.servers import Answer, deploy, greedy, metric_samples, post, session, topology, until_idle

POOL_TOKENS, PROMPT_TOKENS, NEW_TOKENS, QUEUE_SIZE = 1024, 100, 60, 14
FITTING = POOL_TOKENS // (PROMPT_TOKENS + NEW_TOKENS + 1)


@pytest.fixture(scope="module")
def small(models: Models) -> Iterator[Deployment]:
    """A decode worker with room for six requests, and less in reserve for each than an answer takes."""
    described = topology(
        models.base, {"coder": models.coder}, max_total_tokens=POOL_TOKENS, num_reserved_decode_tokens=8
    )
    router = RouterSettings(args={"queue-size": QUEUE_SIZE})
    with deploy(dataclasses.replace(described, router=router)) as running:
        yield running


async def room_of(client: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with client.get(f"{url}/prefill_share") as response:
        room: dict[str, Any] = json.loads(await response.text())["room"]
        return room


def test_a_burst_of_four_times_what_fits_is_answered_without_a_retraction(small: Deployment) -> None:
    async def run() -> tuple[list[Answer], float, dict[str, Any]]:
        async with session() as client:
            bodies = [
                greedy(sample_prompt(PROMPT_TOKENS, seed=9100 + i), NEW_TOKENS, model="coder")
                for i in range(4 * FITTING)
            ]
            answers = await asyncio.gather(*(post(client, f"{small.router_url}/generate", body) for body in bodies))
            await until_idle(client, small.workers)
            samples = await metric_samples(client, small.router_url)
            waiting = sum(s.value for s in samples if s.name == "prefillshare_router_queued_requests")
            return list(answers), waiting, await room_of(client, small.worker("coder").url)

    answers, waiting, room = asyncio.run(run())
    served = [answer for answer in answers if answer.status == 200]
    turned_away = [answer for answer in answers if answer.status == 429]
    assert len(served) + len(turned_away) == len(answers), answers
    assert len(served) >= FITTING + QUEUE_SIZE
    assert turned_away and all(int(answer.headers["retry-after"]) >= 1 for answer in turned_away)
    assert all(len(answer.token_ids) == NEW_TOKENS for answer in served)
    assert not any(answer.body["meta_info"].get("num_retractions") for answer in served)
    assert max(int(answer.headers["x-prefillshare-queue-ms"]) for answer in served) > 0
    assert waiting == 0
    assert (room["pool_tokens"], room["reserved_tokens"]) == (POOL_TOKENS, 8)


def test_a_worker_says_what_it_holds_and_what_its_cache_could_give_up(small: Deployment) -> None:
    """While it answers, and when it is done: what was said then stays in the cache of base KV."""

    async def run() -> None:
        async with session() as client:
            url = small.worker("coder").url
            body = greedy(sample_prompt(200, seed=9200), 300, model="coder")
            answer = asyncio.create_task(post(client, f"{small.router_url}/generate", body))
            while not (busy := await room_of(client, url))["running_requests"]:
                assert not answer.done(), "it was never seen to be running"
                await asyncio.sleep(0.01)
            assert busy["used_tokens"] >= 199
            assert (await answer).status == 200
            await until_idle(client, small.workers)
            idle = await room_of(client, url)
            for _ in range(100):  # it is written again when the scheduler comes to rest
                if not idle["used_tokens"]:
                    break
                await asyncio.sleep(0.1)
                idle = await room_of(client, url)
            assert idle["used_tokens"] == idle["running_requests"] == idle["waiting_requests"] == 0
            assert 199 <= idle["evictable_tokens"] <= POOL_TOKENS

    asyncio.run(run())
