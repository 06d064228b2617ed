"""A decode module with the base's own weights answers as a plain SGLang server does, whatever a request asks for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from sglang_prefillshare.deployment import Deployment
from test.support.servers import Answer, HandoffCounts, handoff_counts, post, session

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


def messages(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/messages", {"messages": MESSAGES[1:], "temperature": 0, "max_tokens": 12, **fields}


def responses(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/responses", {"input": TEXT, "temperature": 0, "max_output_tokens": 12, **fields}


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
    "n answers": generate(n=3),
    "chat, n answers in a stream": chat(n=2, stream=True, stream_options={"include_usage": True}),
    "completion, n answers to two prompts": completion(prompt=[TEXT, TEXT[:50]], max_tokens=4, n=2, logprobs=1),
    "messages": messages(),
    "messages, stream": messages(stream=True, system=[{"type": "text", "text": "Be brief."}]),
    "responses": responses(),
    "responses, stream": responses(stream=True, instructions="Be brief."),
}

# What tells one server or moment from another, and what a decode worker does not say (the prompt's log-probabilities).
_IGNORED = {
    "id", "created", "model", "cached_tokens", "cached_tokens_details", "prompt_tokens_details",
    "input_token_logprobs", "input_top_logprobs", "system_fingerprint",
    "api_server_dispatch_finish_ts", "decode_throughput", "e2e_latency", "first_token_latency", "forward_entry_time",
    "prefill_finished_time", "queue_time", "request_finished_ts", "request_received_ts", "response_sent_to_client_ts",
    "storage_prefetch_wait", "storage_staging_wait", "created_at", "item_id", "sequence_number",
    "input_tokens", "cache_read_input_tokens", "input_tokens_details",
}  # fmt: skip


def comparable(value: Any) -> Any:
    if isinstance(value, str) and "data: " in value:
        return joined_stream([line.removeprefix("data: ") for line in value.splitlines() if line.startswith("data: ")])
    if isinstance(value, dict):
        return {key: comparable(inner) for key, inner in value.items() if key not in _IGNORED}
    if isinstance(value, list):
        return [comparable(inner) for inner in value]
    return round(value, 3) if isinstance(value, float) else value


def joined_stream(events: list[str]) -> dict[str, Any]:
    """A stream's text in one piece, of each answer, its last event before [DONE], its usage: how it was cut into chunks
    is timing. Anthropic's and OpenAI's newer streams have no [DONE], and name their events."""
    chunks = [comparable(json.loads(event)) for event in events if event != "[DONE]"]
    assert (events[-1] == "[DONE]") != ("type" in chunks[0])
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    said: dict[int, str] = {}
    for choice in choices:
        said[choice["index"]] = said.get(choice["index"], "") + (choice.get("delta", {}).get("content") or "")
    return {
        "content": said,
        "deltas": "".join(str(chunk["delta"]) for chunk in chunks if "text_delta" in str(chunk.get("type"))),
        "types": sorted({chunk["type"] for chunk in chunks if "type" in chunk}),
        "finish_reasons": sorted((c["index"], c["finish_reason"]) for c in choices if c["finish_reason"]),
        "last": chunks[-1],
    }


@pytest.mark.parametrize("name", CASES)
def test_the_twin_answers_as_a_plain_server(deployment: Deployment, plain_server: str, name: str) -> None:
    path, body = CASES[name]

    async def run() -> list[Answer]:
        async with session() as client:
            async with client.get(f"{plain_server}/v1/models") as response:  # /v1/responses wants its very name
                name = (await response.json())["data"][0]["id"]
            twin = post(client, deployment.router_url + path, {**body, "model": "twin"})
            plain = post(client, plain_server + path, {**body, "model": name})
            return list(await asyncio.gather(twin, plain))

    twin, plain = asyncio.run(run())
    assert (twin.status, plain.status) == (200, 200), (twin, plain)
    assert comparable(twin.body) == comparable(plain.body)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prompt": ("/generate", {"text": "", "sampling_params": {"max_new_tokens": 4}}, "empty"),
    "too many answers": (*generate(n=129), "from 1 to 128"),
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


def test_n_answers_cost_one_prefill_and_one_handoff(deployment: Deployment) -> None:
    """The prompt is new to everybody: what computing and moving it costs is counted where it happens."""
    text = f"Once more, and new: {TEXT} {TEXT[::-1]}"
    body = {"model": "twin", "text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 6}}

    async def run() -> tuple[Answer, Answer, Mapping[str, Any], HandoffCounts]:
        async with session() as client:
            before = await handoff_counts(client, deployment.worker("twin"))
            url = deployment.router_url + "/generate"
            several = await post(client, url, {**body, "sampling_params": {**body["sampling_params"], "n": 4}})
            async with client.get(f"{deployment.router_url}/calls?limit=1") as response:
                (call,) = (await response.json())["calls"]
            after = await handoff_counts(client, deployment.worker("twin"))
            return several, await post(client, url, body), call, after.since(before)

    several, one, call, handoffs = asyncio.run(run())
    assert [answer["output_ids"] for answer in several.body] == [one.body["output_ids"]] * 4
    prompt_tokens = one.body["meta_info"]["prompt_tokens"]
    held = prompt_tokens - 1
    assert call["prefill_tokens"] == held, "the prompt counts once"
    assert 0 <= call["cached_tokens"] < held, "it was new"
    assert handoffs.by_outcome == {"ok": 4}
    assert handoffs.moved_tokens <= held + 3 < 2 * held


def test_a_response_goes_on_from_another(deployment: Deployment) -> None:
    """What the second is told to go on from is what it would be told in full."""
    first = {"model": "coder", "input": TEXT, "temperature": 0, "max_output_tokens": 8}

    async def run() -> tuple[Answer, Answer, Answer, list[Mapping[str, Any]]]:
        async with session() as client:
            url = deployment.router_url + "/v1/responses"
            begun = await post(client, url, first)
            assert begun.status == 200, begun
            then = {**first, "input": "And now?"}
            kept = await post(client, url, {**then, "previous_response_id": begun.body["id"]})
            user = {"role": "user", "content": TEXT}
            whole = [user, *begun.body["output"], {"role": "user", "content": "And now?"}]
            told = await post(client, url, {**then, "input": whole})
            async with client.get(f"{deployment.router_url}/calls?limit=3") as response:
                return begun, kept, told, (await response.json())["calls"]

    begun, kept, told, calls = asyncio.run(run())
    assert begun.body["id"].startswith("resp_") and kept.body["id"] != begun.body["id"]
    assert kept.body["output"][0]["content"] == told.body["output"][0]["content"]
    assert (
        kept.body["usage"]["input_tokens"] == told.body["usage"]["input_tokens"] > begun.body["usage"]["input_tokens"]
    )
    assert calls[1]["decision"] == calls[1]["decode_decision"] == "session"
    assert calls[1]["cached_tokens"] > 0


def test_openais_own_client_reads_what_the_router_says(deployment: Deployment) -> None:
    openai = pytest.importorskip("openai", reason="waits for SGLang's dependencies: run `make setup`")
    ask = {"model": "coder", "input": TEXT, "temperature": 0, "max_output_tokens": 8}
    with openai.OpenAI(base_url=f"{deployment.router_url}/v1", api_key="none", max_retries=0) as client:
        whole = client.responses.create(**ask)
        events = list(client.responses.create(**ask, stream=True))
        said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert said == whole.output_text and events[-1].type in ("response.completed", "response.incomplete")
        kept = client.responses.retrieve(events[-1].response.id)
        assert kept.output_text == said
        client.responses.delete(kept.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(kept.id)
        with pytest.raises(openai.BadRequestError, match="max_output_tokens"):
            client.responses.create(**{**ask, "max_output_tokens": 1})
        with pytest.raises(openai.NotFoundError, match="coder"):
            client.responses.create(**{**ask, "model": "nobody"})
        several = client.chat.completions.create(
            model="coder", messages=[{"role": "user", "content": TEXT}], n=2, max_tokens=4, temperature=0
        )
        assert [choice.index for choice in several.choices] == [0, 1]
        assert len({choice.message.content for choice in several.choices}) == 1
