"""A decode module with the base's own weights answers as a plain SGLang server does, whatever a request asks for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sglang_prefillshare.deployment import Deployment
from test.support.servers import Answer, post, session

TEXT = "A planner splits the question into steps, a coder writes a function for each step, and a reviewer"
SCHEMA = {"type": "object", "properties": {"prime": {"type": "integer"}}, "required": ["prime"]}
MESSAGES = [{"role": "system", "content": "You are a planner."}, {"role": "user", "content": TEXT}]


def generate(*, top: dict[str, Any] | None = None, **sampling: Any) -> tuple[str, dict[str, Any]]:
    defaults = {"temperature": 0, "max_new_tokens": 24}
    return "/generate", {"text": TEXT, "sampling_params": {**defaults, **sampling}, **(top or {})}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": TEXT, "temperature": 0, "max_tokens": 12, **fields}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": generate(),
    "one new token": generate(max_new_tokens=1),
    "no new token": generate(max_new_tokens=0),
    "min_new_tokens": generate(min_new_tokens=20),
    "frequency penalty": generate(frequency_penalty=1.5),
    "presence penalty": generate(presence_penalty=1.5),
    "repetition penalty": generate(repetition_penalty=1.8),
    "all penalties": generate(frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.3, min_new_tokens=9),
    "logit bias": generate(logit_bias={"70": 40.0}),
    "stop tokens": generate(stop_token_ids=list(range(200, 400))),
    "stop strings": generate(stop=["e", "a"]),
    "stop regex that matches nothing": generate(stop_regex="x*"),
    "ignore_eos": generate(ignore_eos=True),
    "top_k 1": generate(temperature=0.7, top_k=1),
    "regex": generate(regex="(planner|coder) [0-9]{3}"),
    "json schema": generate(json_schema=json.dumps(SCHEMA), max_new_tokens=40),
    "output log-probabilities": generate(top={"return_logprob": True, "top_logprobs_num": 3}),
    "stream": generate(top={"stream": True}, max_new_tokens=6),
    "stream of a batch": (
        "/generate",
        {"text": [TEXT, TEXT[:40]], "sampling_params": {"temperature": 0, "max_new_tokens": 5}},
    ),
    "chat": chat(),
    "chat, log-probabilities": chat(logprobs=True, top_logprobs=2),
    "chat, stream with usage": chat(stream=True, stream_options={"include_usage": True}),
    "chat, json_schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}, max_tokens=40
    ),
    "completion": completion(),
    "completion, log-probabilities": completion(logprobs=2),
    "completion, echo": completion(echo=True, max_tokens=4),
    "completion, two prompts": completion(prompt=[TEXT, TEXT[:50]], max_tokens=4),
}

# What tells one server or moment from another, and what a decode worker does not say (the prompt's log-probabilities).
_IGNORED = {
    "id", "created", "model", "cached_tokens", "cached_tokens_details", "prompt_tokens_details",
    "input_token_logprobs", "input_top_logprobs", "system_fingerprint",
    "api_server_dispatch_finish_ts", "decode_throughput", "e2e_latency", "first_token_latency", "forward_entry_time",
    "prefill_finished_time", "queue_time", "request_finished_ts", "request_received_ts", "response_sent_to_client_ts",
    "storage_prefetch_wait", "storage_staging_wait",
}  # fmt: skip


def comparable(value: Any) -> Any:
    if isinstance(value, str) and "data: " in value:
        return joined_stream([line.removeprefix("data: ") for line in value.splitlines() if line])
    if isinstance(value, dict):
        return {key: comparable(inner) for key, inner in value.items() if key not in _IGNORED}
    if isinstance(value, list):
        return [comparable(inner) for inner in value]
    return round(value, 3) if isinstance(value, float) else value


def joined_stream(events: list[str]) -> dict[str, Any]:
    """A stream's text in one piece, its last event before [DONE], its usage: how it was cut into chunks is timing."""
    assert events[-1] == "[DONE]"
    chunks = [comparable(json.loads(event)) for event in events[:-1]]
    deltas = [choice.get("delta", {}) for chunk in chunks for choice in chunk.get("choices", ())]
    return {
        "content": "".join(delta.get("content") or "" for delta in deltas),
        "finish_reasons": [
            c["finish_reason"] for chunk in chunks for c in chunk.get("choices", ()) if c["finish_reason"]
        ],
        "last": chunks[-1],
    }


@pytest.mark.parametrize("name", CASES)
def test_the_twin_answers_as_a_plain_server(deployment: Deployment, plain_server: str, name: str) -> None:
    path, body = CASES[name]

    async def run() -> list[Answer]:
        async with session() as client:
            twin = post(client, deployment.router_url + path, {**body, "model": "twin"})
            plain = post(client, plain_server + path, {**body, "model": "plain"})
            return list(await asyncio.gather(twin, plain))

    twin, plain = asyncio.run(run())
    assert (twin.status, plain.status) == (200, 200), (twin, plain)
    assert comparable(twin.body) == comparable(plain.body)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prompt": ("/generate", {"text": "", "sampling_params": {"max_new_tokens": 4}}, "empty"),
    "two samples": (*generate(n=2), "n times"),
    "prompt log-probabilities": (*generate(top={"return_logprob": True, "logprob_start_len": 0}), "base's"),
    "echo with log-probabilities": (*completion(echo=True, logprobs=1), "base's"),
    "too long": ("/generate", {"input_ids": [70] * 5000, "sampling_params": {"max_new_tokens": 4}}, "context length"),
    "a grammar that is none": (*generate(json_schema="{not json"), "grammar"),
    "a session": (*generate(top={"session_params": {"id": "abc"}}), "session"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_gets_a_clear_error(deployment: Deployment, name: str) -> None:
    path, body, words = REFUSED[name]

    async def run() -> Answer:
        async with session() as client:
            return await post(client, deployment.router_url + path, {**body, "model": "coder"})

    answer = asyncio.run(run())
    assert answer.status == 400, answer
    assert words in json.dumps(answer.body)


@pytest.mark.parametrize("path", ["/update_weights_from_disk", "/open_session", "/pause_generation"])
def test_endpoints_that_would_break_a_contract_are_closed(deployment: Deployment, path: str) -> None:
    async def run() -> Answer:
        async with session() as client:
            return await post(client, deployment.worker("coder").url + path, {})

    answer = asyncio.run(run())
    assert answer.status == 400, answer
    assert "not supported on a worker with a PrefillShare role" in json.dumps(answer.body)
