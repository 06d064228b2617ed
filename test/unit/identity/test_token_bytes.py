"""The longest text that can fit a context, from what a tokenizer does to a text."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.identity.token_bytes import max_prompt_bytes
from test.support.models import make_tokenizer

TINY: dict[str, Any] = json.loads(make_tokenizer().backend_tokenizer.to_str())


@given(st.text(max_size=200))
def test_no_text_has_fewer_tokens_than_the_bound_says(text: str) -> None:
    tokens = make_tokenizer().encode(text, add_special_tokens=False)
    bound = max_prompt_bytes(TINY, len(tokens))
    assert bound is not None and len(text.encode()) <= bound


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"normalizer": {"type": "NFC"}}, 3),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}]}}, 1),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, 1),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}}, None),
        ({"normalizer": {"type": "Strip"}}, None),
        ({"normalizer": {"type": "Precompiled"}}, None),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, None),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated"}}, 1),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Removed"}}, None),
        ({"added_tokens": [{"content": "<a>", "lstrip": False, "rstrip": True}]}, None),
        ({"model": {**TINY["model"], "type": "Unigram"}}, None),
        ({"model": {**TINY["model"], "unk_token": "?", "fuse_unk": True}}, None),
    ],
)
def test_what_drops_text_leaves_no_bound(changes: dict[str, Any], factor: int | None) -> None:
    plain = max_prompt_bytes(TINY, 100)
    assert plain is not None
    found = max_prompt_bytes({**copy.deepcopy(TINY), **changes}, 100)
    assert found == (None if factor is None else factor * plain)
