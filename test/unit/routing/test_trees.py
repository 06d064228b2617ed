"""A worker's tree is shown only if it can be."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.routing.trees import parse_tree
from test.unit.routing.routing_harness import described_tree


def test_a_tree_is_passed_on_without_what_is_not_known_here() -> None:
    described = described_tree([{"id": 1, "tokens": 5, "token_ids": [1, 2]}], text="secret")
    found = parse_tree(json.dumps(described).encode(), source="it")
    assert msgspec.to_builtins(found) == described_tree([{"id": 1, "tokens": 5}])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"nodes": [{"id": 1}]}, "cannot be read"),
        ({"pool_tokens": -1}, "cannot be read"),
        ({"pool_tokens": 2**60}, "cannot be read"),
        ({"modules": ["x"] * 64}, "cannot be read"),
        ({"modules": ["x" * 600]}, "cannot be read"),
        ({"modules": []}, "module 0 of 0"),
        ({"other": {"nodes": 1, "tokens": 1, "computed_for": [[7, 1]]}}, "module 7 of 2"),
    ],
)
def test_what_is_no_tree_is_refused_with_the_reason(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(WorkerError, match=says):
        parse_tree(json.dumps(described_tree([{"id": 1, "tokens": 5}]) | changes).encode(), source="it")


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b'{"a":', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(WorkerError, match="cannot be read"):
        parse_tree(body, source="it")
