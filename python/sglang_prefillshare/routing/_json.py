"""JSON for request bodies: orjson where SGLang brought it along, the standard library otherwise."""

from __future__ import annotations

import json
from typing import Any

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON; raises `ValueError` (its subclasses for bad JSON and bad UTF-8)."""
    if orjson is not None:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass  # the standard library takes a little more (huge integers, NaN) and words its errors better
    return json.loads(data.decode("utf-8"))


def dumps(value: Any) -> bytes:
    if orjson is not None:
        try:
            return orjson.dumps(value)
        except TypeError:
            pass  # integers beyond 64 bit, lone surrogates
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()
