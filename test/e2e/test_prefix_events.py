"""What the router predicts from the workers' own events, against what they find: evictions, restarts, chat sessions."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.support.models import sample_prompt
from test.support.servers import deploy, greedy, post, session, topology, until_idle

POOL_TOKENS = 2048


@pytest.fixture(scope="module", params=[1, 16])
def publishing(models: Models, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Two prefill workers with small pools, which publish; pages of one token, and of 16."""
    described = topology(models.base, {"coder": models.coder}, args={"page-size": request.param})
    base = described.base
    args = {**base.args, "max-total-tokens": POOL_TOKENS, "kv-events-config": "auto"}
    with deploy(dataclasses.replace(described, base=dataclasses.replace(base, workers=2, args=args))) as running:
        asyncio.run(eventually(running, lambda workers: all(worker["is_current"] for worker in workers)))
        yield running


async def eventually(deployment: Deployment, is_so: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Wait until the router says so of the events of its prefill workers."""
    async with asyncio.timeout(60), session() as client:
        while True:
            async with client.get(f"{deployment.router_url}/workers") as response:
                workers = (await response.json())["workers"]
            events = [worker["events"] for worker in workers if worker["role"] == "prefill"]
            if all(events) and is_so(events):
                return
            await asyncio.sleep(0.1)


async def predictions(deployment: Deployment, send: Callable[[aiohttp.ClientSession], Awaitable[int]]) -> list[Any]:
    """(expected, found) of each of the calls that `send` makes, which says how many there were."""
    async with session() as client:
        count = await send(client)
        async with client.get(f"{deployment.router_url}/calls") as response:
            calls = (await response.json())["calls"][-count:]
    assert {call["matched_by"] for call in calls} == {"events"}
    return [(call["matched_tokens"], call["cached_tokens"]) for call in calls]


async def settled(client: aiohttp.ClientSession, deployment: Deployment) -> None:
    """A call's events are there a moment after its answer."""
    await until_idle(client, deployment.workers)
    await asyncio.sleep(0.15)


def test_token_ids_are_predicted_exactly_over_evictions(publishing: Deployment) -> None:
    """A crowd of prompts, several times what the pools hold: extended, repeated, and branching anywhere."""
    draw = random.Random(7)

    async def send(client: aiohttp.ClientSession) -> int:
        prompts = [sample_prompt(300, seed=900 + seed) for seed in range(3)]
        for number in range(60):
            context = draw.choice(prompts)
            kind = draw.random()
            if kind < 0.6:
                prompt = [*context, *sample_prompt(draw.randint(1, 90), seed=5000 + number)]
            elif kind < 0.8:
                prompt = [*context[: draw.randint(2, len(context))], *sample_prompt(50, seed=7000 + number)]
            else:
                prompt = context
            if len(prompt) < 900:
                prompts.append(prompt)
            answer = await post(client, f"{publishing.router_url}/generate", greedy(prompt, 2, model="coder"))
            assert answer.status == 200, answer
            await settled(client, publishing)
        return 60

    found = asyncio.run(predictions(publishing, send))
    assert [expected for expected, _ in found] == [cached for _, cached in found]
    assert sum(cached for _, cached in found) > 5000


def test_a_chat_that_goes_on_finds_what_is_predicted(publishing: Deployment) -> None:
    """Two sessions in turn; what the module answered and what the tools say are appended, as text."""

    async def send(client: aiohttp.ClientSession) -> int:
        messages = {
            name: [{"role": "user", "content": f"{name}: {'a tale of two prompts, ' * 12}"}] for name in ("one", "two")
        }
        for turn in range(5):
            for name, said in messages.items():
                body = {"model": "coder", "messages": said, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
                answer = await post(
                    client, f"{publishing.router_url}/v1/chat/completions", body, **{"X-SMG-Routing-Key": name}
                )
                assert answer.status == 200, answer
                content = answer.body["choices"][0]["message"]["content"]
                said += [
                    {"role": "assistant", "content": content},
                    {"role": "user", "content": f"and then, in turn {turn}? {'x' * turn}"},
                ]
                await settled(client, publishing)
        return 10

    found = asyncio.run(predictions(publishing, send))
    # Of text that goes on elsewhere, as the second session's does after the template's head, tokens are estimated.
    assert abs(found[1][0] - found[1][1]) <= 16
    assert [expected for expected, _ in found[2:]] == [cached for _, cached in found[2:]]
    assert sum(cached for _, cached in found) > 1000
