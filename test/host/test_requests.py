"""What a worker's HTTP process looks at before SGLang takes a request apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_prefillshare.host.http import routes
from sglang_prefillshare.host.http.requests import check_lists
from sglang_prefillshare.host.http.routes import LegMiddleware, generate_request
from sglang_prefillshare.host.roles.prefill import REPORT_KEY
from sglang_prefillshare.protocol import (
    ADAPTER_HEADER,
    CACHED_TOKENS_HEADER,
    CROSS_MODEL_HEADER,
    MODULE_HEADER,
    PROMPT_TOKENS_HEADER,
    RID_HEADER,
    Role,
)
from sglang_prefillshare.request_fields import (
    GENERATE,
    MAX_BATCH,
    NO_LIMITS,
    check_fields,
    check_sampling_params,
)

ONE = {"input_ids": [5, 6]}
TWO = {"text": ["a", "b"]}


@pytest.mark.parametrize(
    "fields",
    [
        ONE,
        TWO,
        {**ONE, "sampling_params": {}, "token_ids_logprob": [1, 2, 3]},
        {**TWO, "sampling_params": [{}, {}], "token_ids_logprob": [[1], [2, 3]], "return_logprob": [True, False]},
        {**TWO, "sampling_params": {}, "token_ids_logprob": [1, 2, 3], "rid": ["x", "y"]},
    ],
)
def test_lists_with_one_value_for_each_prompt_pass(fields: dict[str, Any]) -> None:
    check_lists(GenerateReqInput(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**ONE, "sampling_params": []}, "sampling_params lists 0 values, wanted one."),
        ({**ONE, "return_logprob": [True]}, "return_logprob lists 1 values, wanted one."),
        ({**TWO, "sampling_params": [{}]}, "sampling_params lists 1 values, wanted one, or 2 of them."),
        ({**TWO, "bootstrap_room": [1, 2, 3]}, "bootstrap_room lists 3 values"),
        ({**TWO, "token_ids_logprob": [[1]]}, "token_ids_logprob lists 1 values"),
        ({"input_ids": [[1]] * (MAX_BATCH + 1)}, f"wanted at most {MAX_BATCH}"),
    ],
)
def test_other_lists_are_refused_before_sglang_sees_them(fields: dict[str, Any], message: str) -> None:
    seen = []

    async def original(self: Any, obj: Any) -> AsyncIterator[Any]:
        seen.append(obj)
        yield {}

    async def ask() -> None:
        async for _ in generate_request(original, None, GenerateReqInput(**fields)):
            pass

    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        asyncio.run(ask())
    assert not seen


def test_what_sglangs_own_endpoints_set_passes() -> None:
    """Between SGLang's OpenAI endpoints and our hook a request gets fields that no client sent."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    chat = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], max_tokens=4)
    check_sampling_params(chat.to_sampling_params([], {}, None), NO_LIMITS)
    check_fields(GENERATE, {"received_time": 1795752000.5, "routed_dp_rank": None}, NO_LIMITS)


async def nothing_said(self: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
    yield {"meta_info": {}}


async def asked(
    middleware_options: dict[str, Any],
    path: str,
    headers: dict[str, str],
    obj: Any,
    *,
    original: Callable[..., AsyncIterator[Any]] = nothing_said,
    manager: Any = None,
) -> list[Any]:
    """What a client is sent by a worker whose endpoint generates for `obj`."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async for _ in generate_request(original, manager, obj):
            await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    await LegMiddleware(app, **middleware_options)(scope, None, send)
    return sent


def test_a_leg_is_called_what_its_headers_say_where_its_api_has_no_name() -> None:
    headers = {RID_HEADER: "leg", MODULE_HEADER: "coder", ADAPTER_HEADER: "coder-é"}
    for fields, wanted in (
        ({}, ("leg", "coder", "coder-é")),
        ({"rid": "own", "routing_key": "own", "lora_path": "own"}, ("own", "own", "own")),
    ):
        obj = GenerateReqInput(text="a", **fields)
        asyncio.run(asked({}, "/v1/messages", headers, obj))
        assert (obj.rid, obj.routing_key, obj.lora_path) == wanted


@pytest.mark.parametrize("count", [1, 3])
def test_a_prompt_counts_once_however_many_answers_it_gets(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(routes, "current_settings", lambda: SimpleNamespace(role=Role.PREFILL))
    tokens = {"a": 100, "b": 7}
    seen: set[str] = set()

    async def prefill(self: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
        """As the base: the first of each prompt is computed, all but the last token of the others is found."""
        told = []
        for text in obj.text:
            found = tokens[text] - 1 if text in seen else 10 * (text == "a")
            seen.add(text)
            told.append(
                {"meta_info": {"prompt_tokens": tokens[text], "cached_tokens": found, REPORT_KEY: [found // 2]}}
            )
        yield told

    obj = GenerateReqInput(text=["a", "b"], sampling_params={"n": count}, rid=[f"r{i}" for i in range(2 * count)])
    manager = SimpleNamespace(incremental_streaming_output=False)
    start, *_ = asyncio.run(asked({}, "/generate", {}, obj, original=prefill, manager=manager))
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert headers[PROMPT_TOKENS_HEADER] == "107"
    assert (headers[CACHED_TOKENS_HEADER], headers[CROSS_MODEL_HEADER]) == ("10", "5")


def test_responses_that_sglang_has_turned_off_are_refused_with_what_is_missing() -> None:
    start, body = asyncio.run(asked({"has_responses": lambda: False}, "/v1/responses", {}, None))
    assert start["status"] == 501 and b"openai-harmony" in body["body"]
