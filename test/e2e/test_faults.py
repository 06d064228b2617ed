"""Requests that end badly leave nothing behind, and the next request is answered rightly."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.deployment import Deployment, Worker
from test.e2e.conftest import Models
from test.support.models import sample_prompt
from test.support.oracle import Oracle
from test.support.servers import answers, deploy, greedy, pairing, post, post_pair, session, topology, until_idle

pytestmark = pytest.mark.devices
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def oracle(models: Models) -> Oracle:
    return Oracle(models.base, models.coder)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return sample_prompt(200, seed=42)


async def assert_next_request_succeeds(
    client: aiohttp.ClientSession, deployment: Deployment, oracle: Oracle, prompt: list[int]
) -> None:
    await until_idle(client, deployment.workers)
    answer = await post(client, f"{deployment.router_url}/generate", greedy(prompt, NEW_TOKENS, model="coder"))
    oracle.check(prompt, answer.token_ids, NEW_TOKENS)


Fault = Callable[[aiohttp.ClientSession, Deployment, list[int]], Awaitable[None]]


async def client_leaves_mid_stream(client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]) -> None:
    body = greedy(prompt, 2000, model="coder", stream=True)
    async with client.post(f"{deployment.router_url}/generate", json=body) as response:
        await response.content.readany()
        await response.content.readany()


async def client_leaves_before_the_answer(
    client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]
) -> None:
    body = greedy(prompt, 3000, model="coder")
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(post(client, f"{deployment.router_url}/generate", body), timeout=0.5)


async def decode_leg_without_prefill_leg(
    client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]
) -> None:
    body = {**greedy(prompt, 4, stream=True), **pairing(deployment.worker("base"))}
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(post(client, f"{deployment.worker('coder').url}/generate", body), timeout=0.5)


async def prefill_leg_without_decode_leg(
    client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]
) -> None:
    prefill = deployment.worker("base")
    leg = asyncio.create_task(
        post(client, f"{prefill.url}/generate", greedy(prompt, 4, rid="lonely") | pairing(prefill))
    )
    await asyncio.sleep(0.3)
    await abort(client, prefill, "lonely")
    assert (await leg).status == 500


async def prefill_gives_up_before_decode_asks(
    client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]
) -> None:
    await one_side_gives_up(client, deployment.worker("base"), deployment.worker("coder"), prompt)


async def decode_gives_up_before_prefill_hears_of_it(
    client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]
) -> None:
    await one_side_gives_up(client, deployment.worker("coder"), deployment.worker("base"), prompt)


async def one_side_gives_up(client: aiohttp.ClientSession, first: Worker, second: Worker, prompt: list[int]) -> None:
    prefill = first if first.plan.bootstrap_port else second
    rid = f"given-up-{random.getrandbits(32)}"
    body = {**greedy(prompt, 4), **pairing(prefill)}
    leg = asyncio.create_task(post(client, f"{first.url}/generate", {**body, "rid": rid}))
    await asyncio.sleep(0.3)
    await abort(client, first, rid)
    assert (await leg).status == 500
    started = time.monotonic()
    late = await post(client, f"{second.url}/generate", body)
    assert late.status == 500 and "gave the request up" in str(late.body)
    assert time.monotonic() - started < 5.0


async def legs_with_other_tokens(client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]) -> None:
    """Equal length, one token changed: only the digest can tell."""
    other = [*prompt[:50], prompt[50] ^ 1, *prompt[51:]]
    _, decode = await mismatched(client, deployment, prompt, other)
    assert decode.status == 500 and "disagree about the 199 prompt tokens" in str(decode.body)


async def legs_of_other_length(client: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]) -> None:
    prefill, decode = await mismatched(client, deployment, prompt, prompt[:150])
    assert (prefill.status, decode.status) == (500, 500)
    assert "tokenized the prompt differently" in str(decode.body)


async def mismatched(
    client: aiohttp.ClientSession, deployment: Deployment, prefill_ids: list[int], decode_ids: list[int]
) -> Any:
    prefill, decode = deployment.worker("base"), deployment.worker("coder")
    fields = pairing(prefill)
    return await asyncio.gather(
        post(client, f"{prefill.url}/generate", greedy(prefill_ids, 4) | fields),
        post(client, f"{decode.url}/generate", greedy(decode_ids, 4) | fields),
    )


async def abort(client: aiohttp.ClientSession, worker: Worker, rid: str) -> None:
    async with client.post(f"{worker.url}/abort_request", json={"rid": rid}) as response:
        assert response.status == 200


FAULTS: tuple[Fault, ...] = (
    client_leaves_mid_stream,
    client_leaves_before_the_answer,
    decode_leg_without_prefill_leg,
    prefill_leg_without_decode_leg,
    prefill_gives_up_before_decode_asks,
    decode_gives_up_before_prefill_hears_of_it,
    legs_with_other_tokens,
    legs_of_other_length,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_pools_return_and_the_next_request_succeeds(
    deployment: Deployment, oracle: Oracle, prompt: list[int], fault: Fault
) -> None:
    async def run() -> None:
        async with session() as client:
            await fault(client, deployment, prompt)
        async with session() as client:
            await assert_next_request_succeeds(client, deployment, oracle, prompt)

    asyncio.run(run())


@pytest.fixture(scope="module")
def expendable(models: Models) -> Iterator[Deployment]:
    """Servers for the tests that kill them, in this order: first the coder, then the base."""
    with deploy(topology(models.base, {"coder": models.coder, "twin": models.twin})) as running:
        yield running


def kill(worker: Worker) -> None:
    """SIGKILL the SGLang server of a worker (its scheduler dies with it), as the kernel would when memory runs out."""
    import psutil

    assert worker.pid is not None
    supervisor = psutil.Process(worker.pid)
    victims = [process for process in supervisor.children(recursive=True) if process.is_running()]
    for process in victims or [supervisor]:
        os.kill(process.pid, signal.SIGKILL)


def test_a_killed_decode_worker_frees_its_pages_and_others_go_on(
    expendable: Deployment, oracle: Oracle, prompt: list[int]
) -> None:
    base, coder, twin = (expendable.worker(name) for name in ("base", "coder", "twin"))

    async def run() -> None:
        async with session() as client:
            body = greedy(prompt, 3000, model="coder", stream=True)
            async with client.post(f"{expendable.router_url}/generate", json=body) as response:
                await response.content.readany()
                kill(coder)
                started = time.monotonic()
                rest = await response.content.read()
                assert b'"error"' in rest and b"[DONE]" not in rest
            refused = await post(client, f"{expendable.router_url}/generate", greedy(prompt, 4, model="coder"))
            assert refused.status in (502, 503) and "coder" in str(refused.body)
            assert time.monotonic() - started < 10.0
            await until_idle(client, [base, twin])
            prefill, decode = await post_pair(client, base, twin, "/generate", greedy(prompt, NEW_TOKENS))
            assert prefill.status == 200 and len(decode.token_ids) == NEW_TOKENS
            # The server's HTTP process outlives its scheduler by up to a second, and answers polls in it.
            deadline = time.monotonic() + 10.0
            while answers(f"{expendable.router_url}/health"):
                assert time.monotonic() < deadline, "the router still takes the killed worker for ready"
                await asyncio.sleep(0.1)

    asyncio.run(run())


def test_a_killed_prefill_worker_fails_its_requests_at_once(expendable: Deployment, prompt: list[int]) -> None:
    base, twin = expendable.worker("base"), expendable.worker("twin")

    async def run() -> None:
        async with session() as client:
            # A decode leg that waits for its KV when prefill dies ...
            await post_pair(client, base, twin, "/generate", greedy(prompt, 2))
            waiting = asyncio.create_task(post(client, f"{twin.url}/generate", greedy(prompt, 4) | pairing(base)))
            await asyncio.sleep(0.5)
            kill(base)
            started = time.monotonic()
            answer = await waiting
            # ... fails at once, by the peer's death and not by a time-out.
            assert answer.status == 500 and time.monotonic() - started < 5.0, answer
            refused = await post(client, f"{expendable.router_url}/generate", greedy(prompt, 4, model="twin"))
            assert refused.status in (502, 503), refused
            assert time.monotonic() - started < 12.0
            await until_idle(client, [twin])

    asyncio.run(run())
