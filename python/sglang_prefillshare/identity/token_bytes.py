"""How long a text can be and still fit a context: what can be said without tokenizing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

_GROWTH: Final[Mapping[str, int]] = {"NFC": 3, "NFD": 1, "ByteLevel": 1, "Prepend": 1}
"""Normalizers that shorten a text by no more than this factor (NFC: Unicode's Annex 15). Others may drop any part."""

_KEEPS_ALL: Final = frozenset({"ByteLevel", "Metaspace", "Digits", "Punctuation"})
"""Pre-tokenizers that cut a text up and drop nothing. A `Split` does as it says."""


def max_prompt_bytes(tokenizer: Mapping[str, Any], context_length: int) -> int | None:
    """Bytes of UTF-8 that `context_length` tokens can hold at most, of a tokenizer as `tokenizer.json` describes it.

    None where a tokenizer may drop parts of a text, or join any number of characters into one token: then a text's
    length says nothing.
    """
    shrinks = 1
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Replace":
            pattern = step.get("pattern", {}).get("String")
            if pattern is None or len(step.get("content", "").encode()) < len(pattern.encode()):
                return None
        elif step["type"] not in _GROWTH:
            return None
        shrinks *= _GROWTH.get(step["type"], 1)
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] not in _KEEPS_ALL and (step["type"] != "Split" or step.get("behavior") == "Removed"):
            return None
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or (
        model.get("fuse_unk") and model.get("unk_token") and not model.get("byte_fallback")
    ):
        return None
    added = tokenizer.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None
    longest = _longest([*model["vocab"], *(token["content"] for token in added)])
    return context_length * longest * shrinks


def _steps(described: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    if described is None:
        return
    if described["type"] == "Sequence":
        for step in described[name]:
            yield from _steps(step, name)
    else:
        yield described


def _longest(tokens: Iterable[str]) -> int:
    """An upper bound: a byte-level token spells each byte as one letter, of one byte or two."""
    return max(len(token.encode("utf-8", "surrogatepass")) for token in tokens)
