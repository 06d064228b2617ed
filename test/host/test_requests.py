"""What a worker's HTTP process looks at before SGLang takes a request apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_prefillshare.host.http.requests import check_lists
from sglang_prefillshare.host.http.routes import generate_request
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
