"""The table of request fields: what passes, what does not, and that a refusal says what was found and wanted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.request_fields import (
    GENERATE,
    MAX_DEPTH,
    OPENAI,
    SAMPLING_PARAMS,
    FieldError,
    Limits,
    check_depth,
    check_fields,
    check_sampling_params,
    check_text,
    prompt_ids,
)

LIMITS = Limits(vocab_size=512, context_length=4096, max_prompt_bytes=40_000)
NAN, INFINITY = float("nan"), float("inf")

GOOD: list[dict[str, Any]] = [
    {},
    {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.0, "max_new_tokens": 16, "min_new_tokens": 2},
    {"stop": ["\n", "END"], "stop_token_ids": [0, 511], "logit_bias": {"511": -100, "0": 1.5}},
    {"frequency_penalty": -2, "presence_penalty": 2.0, "repetition_penalty": 1.2, "sampling_seed": -(2**63)},
    {"regex": "[a-z]+", "json_schema": '{"type": "object"}', "ignore_eos": True, "skip_special_tokens": False, "n": 8},
    {"stop_regex": "x*", "custom_params": {"a": 1, "b": ["x", None, 0.5], "c": {"d": True}}},
    {"stop_regex": [r"\d{1,4}\.", "a|b"]},
    {"temperature": None, "stop": None, "logit_bias": None},
]


@pytest.mark.parametrize("params", GOOD)
def test_what_clients_send_passes(params: dict[str, Any]) -> None:
    check_sampling_params(params, LIMITS)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"stop_token_ids": [99999999]}, "a token id from 0 to 511"),
    ({"stop_token_ids": [-1]}, "a token id from 0 to 511"),
    ({"stop_token_ids": [3.0]}, "wanted a token id"),
    ({"stop_token_ids": [True]}, "wanted a token id"),
    ({"stop_token_ids": "5"}, "a list of token ids"),
    ({"stop_token_ids": [1] * 2000}, "at most 1024"),
    ({"logit_bias": {"512": 1}}, "a token id from 0 to 511"),
    ({"logit_bias": {"-1": 1}}, "a token id from 0 to 511"),
    ({"logit_bias": {"²": 1}}, "a token id from 0 to 511"),
    ({"logit_bias": {"5": NAN}}, "a number from -100 to 100"),
    ({"logit_bias": [5]}, "an object"),
    ({"top_k": 2**31}, "a whole number from -1 to 2147483647"),
    ({"top_k": 2.5}, "a whole number"),
    ({"temperature": NAN}, "a number from 0"),
    ({"temperature": -0.1}, "a number from 0"),
    ({"temperature": INFINITY}, "a number from 0"),
    ({"temperature": "1"}, "a number from 0"),
    ({"top_p": 0}, "a number above 0"),
    ({"min_p": 1.5}, "a number from 0 to 1"),
    ({"repetition_penalty": 0}, "a number from 0.01 to 2"),
    ({"frequency_penalty": -3}, "a number from -2 to 2"),
    ({"max_new_tokens": -1}, "a whole number from 0"),
    ({"max_new_tokens": 2**63}, "a whole number from 0"),
    ({"max_new_tokens": 3.5}, "a whole number from 0"),
    ({"max_new_tokens": 4, "min_new_tokens": 5}, "over sampling_params.max_new_tokens"),
    ({"sampling_seed": 2**63}, "a whole number from"),
    ({"n": 129}, "a whole number from 1 to 128"),
    ({"repetition_penalty": 1e-50}, "a number from 0.01 to 2"),
    ({"unheard_of": 1}, "is 'unheard_of', wanted one of SGLang's"),
    ({"use_beam_search": True}, "beam search is not supported"),
    ({"stop": ["x"] * 33}, "at most 32"),
    ({"stop": "x" * 2000}, "at most 1024"),
    ({"stop": [5]}, "a string, or a list of strings"),
    ({"stop_regex": "(a+)+$"}, "holds up everybody"),
    ({"stop_regex": "a?" * 20}, "holds up everybody"),
    ({"stop_regex": ".*b"}, "holds up everybody"),
    ({"stop_regex": "("}, "no regular expression"),
    ({"json_schema": "[" * 500}, "deep"),
    ({"regex": 5}, "a string"),
    ({"ignore_eos": "yes"}, "true or false"),
    ({"custom_params": {"a": {"b": [1]}}}, "a plain value"),
    ({"custom_params": {"a": [2**63]}}, "a plain value"),
    ({"stop_str_max_len": 5}, "between themselves"),
]


@pytest.mark.parametrize(("params", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_no_worker_may_see_is_refused_with_the_reason(params: dict[str, Any], words: str) -> None:
    with pytest.raises(FieldError) as refused:
        check_sampling_params(params, LIMITS)
    assert words in str(refused.value) and len(str(refused.value)) < 400


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("fields", [SAMPLING_PARAMS, GENERATE, OPENAI], ids=["sampling_params", "generate", "openai"])
@given(data=st.data())
def test_any_value_passes_or_is_refused_and_nothing_else(fields: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(fields)))
    try:
        check_fields(fields, {name: data.draw(anything)}, LIMITS)
    except FieldError as error:
        assert name in str(error)


def test_prompts_are_held_against_vocabulary_and_context() -> None:
    prompt_ids("input_ids", [0, 511] * 2048, LIMITS)
    with pytest.raises(FieldError, match=r"input_ids\[1\] is 999999, wanted a token id from 0 to 511"):
        prompt_ids("input_ids", [5, 999999, 7], LIMITS)
    with pytest.raises(FieldError, match="has 4097 tokens, longer than the model's context length of 4096"):
        prompt_ids("input_ids", [5] * 4097, LIMITS)
    check_text("text", "x" * 40_000, LIMITS)
    with pytest.raises(FieldError, match="has 40002 bytes"):
        check_text("text", "é" * 20_001, LIMITS)


def test_depth_is_bounded_whatever_the_shape() -> None:
    def nested(depth: int) -> Any:
        value: Any = 1
        for level in range(depth):
            value = [value] if level % 2 else {"a": value}
        return value

    check_depth(json.dumps(nested(MAX_DEPTH)).encode(), nested(MAX_DEPTH))
    with pytest.raises(FieldError, match="deep"):
        check_depth(json.dumps(nested(MAX_DEPTH + 2)).encode(), nested(MAX_DEPTH + 2))
    flat = [[1] for _ in range(1000)]
    check_depth(json.dumps(flat).encode(), flat)
