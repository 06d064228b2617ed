"""No request of one client ends, cuts or slows another's: what would have, against real servers, at both doors."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.bounded_http import MAX_HEAD_BYTES
from sglang_prefillshare.deployment import Deployment, Worker
from test.e2e.conftest import Models
from test.support.models import sample_prompt
from test.support.oracle import Oracle
from test.support.servers import greedy, pairing, post, processes, session, until_idle

pytestmark = pytest.mark.devices
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def oracle(models: Models) -> Oracle:
    return Oracle(models.base, models.coder)


def generate(**fields: Any) -> tuple[str, dict[str, Any]]:
    sampling = {"max_new_tokens": 4, "temperature": 0, **fields.pop("sampling_params", {})}
    return "/generate", {"input_ids": [70, 71, 72], "sampling_params": sampling, **fields}


def sampled(**params: Any) -> tuple[str, dict[str, Any]]:
    return generate(sampling_params=params)


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "hello there", "max_tokens": 4, **fields}


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "an id beyond the vocabulary": generate(input_ids=[5, 999999, 7]),
    "a negative id": generate(input_ids=[5, -1, 7]),
    "an id of 2^63": generate(input_ids=[5, 2**63, 7]),
    "a fraction for an id": generate(input_ids=[5, 6.5, 7]),
    "such an id in a batch": generate(input_ids=[[5, 6], [5, 999999]]),
    "such an id in a completion": completion(prompt=[5, 999999]),
    "such an id in a chat": chat(input_ids=[5, 999999]),
    "a prompt of no token": generate(input_ids=[]),
    "a batch of one such prompt": generate(input_ids=[[]]),
    "a stop id beyond the vocabulary": sampled(stop_token_ids=[99999999], min_new_tokens=3),
    "the same in a chat": chat(stop_token_ids=[99999999], min_tokens=3),
    "stop ids that leave no token": sampled(stop_token_ids=list(range(512)), min_new_tokens=3),
    "such stop ids in a chat": chat(stop_token_ids=list(range(512)), min_tokens=3),
    "a bias beyond the vocabulary": sampled(logit_bias={"999999": 1.0}),
    "a bias that is no number": sampled(logit_bias={"5": "x"}),
    "log-probabilities beyond the vocabulary": generate(return_logprob=True, token_ids_logprob=[999999]),
    "too many log-probabilities": generate(return_logprob=True, top_logprobs_num=10**9),
    "the same in a completion": completion(logprobs=10**9),
    "top_k of 2^63": sampled(top_k=2**63),
    "a seed of 2^64": sampled(sampling_seed=2**64),
    "a temperature below zero": sampled(temperature=-1),
    "a penalty out of range": sampled(frequency_penalty=1e9),
    "a fraction of a token": sampled(max_new_tokens=3.5),
    "more tokens than there are": sampled(max_new_tokens=2**62),
    "a pattern that never ends": sampled(stop_regex="(a+)+$"),
    "parameters inside parameters": sampled(custom_params={"a": {"b": {"c": [1]}}}),
    "a response format that is a list": chat(response_format=["False"]),
    "a rank that is not there": generate(disagg_prefill_dp_rank=7),
    "addresses of others": generate(encoder_urls=["http://127.0.0.1:9"]),
}


async def raw(client: aiohttp.ClientSession, url: str, data: bytes, **headers: str) -> tuple[int, Any]:
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    async with client.post(url, data=data, headers=headers) as response:
        text = await response.text()
        return response.status, json.loads(text) if text.startswith("{") else text


def test_what_would_end_a_worker_is_refused_at_both_doors(deployment: Deployment, oracle: Oracle) -> None:
    """Through the router, and at each worker, where a router of another version or a curious client may knock."""
    before = processes(deployment)
    prompt = sample_prompt(60, seed=8100)
    doors: list[tuple[str, Callable[[], dict[str, Any]]]] = [(deployment.router_url, lambda: {"model": "coder"})]
    base = deployment.worker("base")
    doors += [(deployment.worker(name).url, lambda: pairing(base)) for name in ("coder", "base")]
    # Health checks move no KV and pass other checks by: whoever names their host could be anybody.
    doors += [(base.url, lambda: {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0})]

    async def run() -> dict[str, Any]:
        wrong: dict[str, Any] = {}
        async with session() as client:
            for name, (path, body) in HOSTILE.items():
                for url, fields in doors:
                    more = fields()
                    batch = any(isinstance(item, list) for item in body.get("input_ids", ()))
                    if batch and "bootstrap_room" in more:
                        more = {key: [value] * len(body["input_ids"]) for key, value in more.items()}
                        more["bootstrap_room"] = [value + i for i, value in enumerate(more["bootstrap_room"])]
                    answer = await post(client, url + path, {**body, **more})
                    has_path = url == deployment.router_url and "/site-packages/" in str(answer.body)
                    if not (400 <= answer.status < 500) or has_path:
                        wrong[f"{name} at {url}"] = answer
            body = greedy(prompt, NEW_TOKENS, model="coder")
            last = await post(client, f"{deployment.router_url}/generate", body)
            oracle.check(prompt, last.token_ids, NEW_TOKENS)
            await until_idle(client, deployment.workers)
        return wrong

    assert asyncio.run(run()) == {}
    assert processes(deployment) == before


NO_TOKEN_LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "an empty grammar": sampled(ebnf="root ::= root", temperature=0.8),
    "the same, greedy": sampled(ebnf="root ::= root"),
    "the same with top_p, which sorts": sampled(ebnf="root ::= root", temperature=0.8, top_p=0.9),
    "the same in a completion": completion(ebnf="root ::= root", temperature=0.8),
    "a grammar that ends before it may": sampled(regex="[a-z]{2}", min_new_tokens=8, max_new_tokens=12),
    "the same in a chat": chat(regex="[a-z]{2}", min_tokens=8, max_tokens=12),
}


def test_a_grammar_that_leaves_no_token_ends_its_own_request_only(deployment: Deployment, oracle: Oracle) -> None:
    """Its row of logits is -inf everywhere: sampling from it ends the process that all requests share."""
    before = processes(deployment)
    prompt = sample_prompt(60, seed=8150)
    doors = [(deployment.router_url, {"model": "coder"})]
    doors += [(deployment.worker("coder").url, {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0})]

    async def run() -> list[Any]:
        async with session() as client:
            wrong = []
            for url, more in doors:
                body = greedy(prompt, 60, model="coder")
                beside = asyncio.create_task(post(client, f"{deployment.router_url}/generate", body))
                answers = await asyncio.gather(
                    *(post(client, url + path, {**body, **more}) for path, body in NO_TOKEN_LEFT.values())
                )
                for name, answer in zip(NO_TOKEN_LEFT, answers, strict=True):
                    if answer.status != 400 or "grammar" not in str(answer.body):
                        wrong.append((name, url, answer))
                oracle.check(prompt, (await beside).token_ids[:NEW_TOKENS], NEW_TOKENS)
            await until_idle(client, deployment.workers)
            return wrong

    assert asyncio.run(run()) == []
    assert processes(deployment) == before


def test_arrays_inside_arrays_and_encoded_bodies_are_refused_by_name(deployment: Deployment) -> None:
    nested = b'{"model": "coder", "messages": ' + b"[" * 3000 + b"]" * 3000 + b"}"

    async def run() -> None:
        async with session() as client:
            for url in (deployment.router_url, deployment.worker("coder").url):
                status, body = await raw(client, f"{url}/v1/chat/completions", nested)
                assert status == 400, (url, body)
            packed = gzip.compress(json.dumps({"model": "coder", "text": "hello"}).encode())
            status, body = await raw(client, f"{deployment.router_url}/generate", packed, content_encoding="gzip")
            assert status == 415 and "gzip" in body["error"]["message"]

    asyncio.run(run())


def test_a_head_without_an_end_is_refused_at_every_door(deployment: Deployment) -> None:
    async def refusal(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: r\r\nx-long: " + b"a" * (MAX_HEAD_BYTES + 1024))
        answer = await asyncio.wait_for(reader.read(), timeout=20)
        writer.close()
        return answer

    async def scenario() -> None:
        for url in (deployment.router_url, *(worker.url for worker in deployment.workers)):
            answer = await refusal(int(url.rpartition(":")[2]))
            assert answer.startswith(b"HTTP/1.1 431 "), (url, answer[:200])

    asyncio.run(scenario())


def test_ids_that_begin_alike_do_not_end_one_another(deployment: Deployment, oracle: Oracle) -> None:
    """One client's request is under way; another, whose id is how the first's begins, leaves."""
    prompt = sample_prompt(80, seed=8200)

    async def run() -> None:
        url = f"{deployment.router_url}/generate"
        async with session() as client:
            first = asyncio.create_task(post(client, url, greedy(prompt, 60, model="coder", rid="session-42-call-1")))
            await asyncio.sleep(0.3)
            with pytest.raises(asyncio.TimeoutError):
                body = greedy(sample_prompt(80, seed=8201), 2000, model="coder", rid="session-42")
                await asyncio.wait_for(post(client, url, body), timeout=0.3)
            answer = await first
            assert len(answer.token_ids) == 60 and answer.body["meta_info"]["id"] == "session-42-call-1"
            oracle.check(prompt, answer.token_ids[:NEW_TOKENS], NEW_TOKENS)
            await until_idle(client, deployment.workers)

    asyncio.run(run())


def test_two_requests_of_one_id_at_once_are_both_answered(deployment: Deployment, oracle: Oracle) -> None:
    prompts = [sample_prompt(90, seed=8300 + i) for i in range(2)]

    async def run() -> Any:
        url = f"{deployment.router_url}/generate"
        async with session() as client:
            bodies = [greedy(prompt, NEW_TOKENS, model="coder", rid="same") for prompt in prompts]
            return await asyncio.gather(*(post(client, url, body) for body in bodies))

    for prompt, answer in zip(prompts, asyncio.run(run()), strict=True):
        oracle.check(prompt, answer.token_ids, NEW_TOKENS)
        assert answer.body["meta_info"]["id"] == "same"


def test_requests_for_no_token_are_answered(deployment: Deployment) -> None:
    """Of a prompt of one token there is no KV either: such a request ends holding nothing."""
    before = processes(deployment)

    async def run() -> None:
        async with session() as client:
            for prompt in ([70], [70, 71, 72]):
                for stream in (False, True):
                    body = greedy(prompt, 0, model="coder", stream=stream)
                    async with client.post(f"{deployment.router_url}/generate", json=body) as response:
                        assert response.status == 200, await response.text()
                        assert b'"completion_tokens":0' in (await response.read()).replace(b" ", b"")
            await until_idle(client, deployment.workers)

    asyncio.run(run())
    assert processes(deployment) == before


def test_an_answer_that_is_aborted_is_an_error_and_not_a_shorter_one(deployment: Deployment) -> None:
    coder = deployment.worker("coder")

    async def run(stream: bool) -> tuple[int, bytes]:
        async with session() as client:
            body = greedy(sample_prompt(50, seed=8400), 3000, model="coder", stream=stream)

            async def ask() -> tuple[int, bytes]:
                async with client.post(f"{deployment.router_url}/generate", json=body) as response:
                    return response.status, await response.read()

            asked = asyncio.create_task(ask())
            await asyncio.sleep(0.7)
            async with client.post(f"{coder.url}/abort_request", json={"abort_all": True}):
                found = await asked
            async with client.get(f"{deployment.router_url}/calls") as response:
                assert (await response.json())["calls"][-1]["outcome"] == "worker_failed"
            await until_idle(client, deployment.workers)
            return found

    status, body = asyncio.run(run(stream=False))
    assert status >= 500 and "error" in json.loads(body)
    status, body = asyncio.run(run(stream=True))
    assert b"[DONE]" not in body and "error" in json.loads(body.strip().split(b"\n\n")[-1].removeprefix(b"data: "))


def test_a_text_that_cannot_fit_is_refused_at_once_and_others_do_not_wait(
    deployment: Deployment, oracle: Oracle
) -> None:
    """20 MB, at the router, and straight at both workers."""
    text = "all work and no play " * 1_000_000
    prompt = sample_prompt(40, seed=8500)

    async def timed(client: aiohttp.ClientSession) -> float:
        began = time.monotonic()
        answer = await post(client, f"{deployment.router_url}/generate", greedy(prompt, NEW_TOKENS, model="coder"))
        oracle.check(prompt, answer.token_ids, NEW_TOKENS)
        return time.monotonic() - began

    async def large(client: aiohttp.ClientSession, worker: Worker | None) -> float:
        began = time.monotonic()
        url = deployment.router_url if worker is None else worker.url
        more = {"model": "coder"} if worker is None else pairing(deployment.worker("base"))
        answer = await post(client, f"{url}/generate", {"text": text, "sampling_params": {"max_new_tokens": 4}, **more})
        assert answer.status == 400 and "context length" in str(answer.body), answer
        return time.monotonic() - began

    async def run() -> None:
        async with session() as client:
            alone = await timed(client)
            asked = [asyncio.create_task(large(client, None)) for _ in range(2)]
            asked += [asyncio.create_task(large(client, deployment.worker(name))) for name in ("base", "coder")]
            beside = [await timed(client) for _ in range(3)]
            assert max([await task for task in asked]) < 15.0  # tokenizing it takes half a minute
            assert max(beside) < alone + 10.0
            await until_idle(client, deployment.workers)

    asyncio.run(run())
