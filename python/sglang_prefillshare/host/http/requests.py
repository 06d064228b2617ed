"""What a request may ask of a worker with a role, checked in the HTTP process before any work begins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from sglang_prefillshare.host.roles.role import FAKE_BOOTSTRAP_HOST, is_fake_transfer, needs_no_base_kv

LONG_TEXT_CHARS: Final = 16_384
"""A text from this length on is tokenized in a thread: it takes ten milliseconds and more, and everybody would wait."""


async def tokenize_texts(
    original: Callable[..., Awaitable[Any]], self: Any, texts: Any, is_cross_encoder: bool = False
) -> Any:
    """Tokenize long texts beside the event loop, as SGLang does for chats. (The tokenizer releases Python's lock.)"""
    length = sum(map(len, texts)) if isinstance(texts, list) else len(texts or "")
    if length < LONG_TEXT_CHARS or self.async_dynamic_batch_tokenizer is not None:
        return await original(self, texts, is_cross_encoder)
    return await asyncio.to_thread(asyncio.run, _awaited(original(self, texts, is_cross_encoder)))


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def validate_one_request(self: Any, obj: Any, input_ids: Any) -> None:
    """Refuse what the split of base and decode module cannot answer rightly. SGLang turns `ValueError` into a 400.

    A prompt of one token needs nothing of the base: both sides see that for themselves, and wait for nobody.
    """
    if is_fake_transfer(obj):
        return
    if obj.input_embeds is not None:
        raise ValueError("input_embeds is not supported with PrefillShare: send text or input_ids.")
    if not len(input_ids):
        raise ValueError("the prompt has no token. Send at least one.")
    sampling = obj.sampling_params or {}
    if int(sampling.get("n") or 1) > 1:
        raise ValueError(
            f"n is {sampling['n']}, PrefillShare answers one sample per request. Send the request n times: "
            "all of them share one prefill."
        )
    if sampling.get("beam_width") or sampling.get("use_beam_search"):
        raise ValueError("beam search is not supported with PrefillShare: use temperature and top_p.")
    if obj.return_logprob and obj.logprob_start_len not in (None, -1):
        raise ValueError(
            f"logprob_start_len is {obj.logprob_start_len}: log-probabilities of prompt tokens (also echo with "
            "logprobs, and select() in SGLang's frontend) would be the base's, not the decode module's. "
            "Ask for output log-probabilities only."
        )
    for name, reason in _REFUSED_FIELDS.items():
        if getattr(obj, name, None):
            raise ValueError(f"{name} is not supported with PrefillShare: {reason}")
    if needs_no_base_kv(input_ids):
        obj.bootstrap_host = FAKE_BOOTSTRAP_HOST


_REFUSED_FIELDS: Final = {
    "return_hidden_states": "those of the prompt would be the base's.",
    "return_prompt_token_ids_logprob": "prompt log-probabilities would be the base's.",
    "session_params": "a session would keep generated KV as prompt. Send the whole context; its prefix is cached.",
    "session_id": "a session would keep generated KV as prompt. Send the whole context; its prefix is cached.",
    "lora_path": "serve each adapter as a decode module of its own (merge it into the weights).",
    "image_data": "text models only for now.",
    "video_data": "text models only for now.",
    "audio_data": "text models only for now.",
    "positional_embed_overrides": "the base would cache embeddings that no token id names.",
}
