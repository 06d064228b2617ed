"""What a request may ask of a worker with a role, checked in the HTTP process before any work begins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeGuard

from sglang_prefillshare.host.roles.role import FAKE_BOOTSTRAP_HOST, is_fake_transfer, needs_no_base_kv
from sglang_prefillshare.identity.token_bytes import max_prompt_bytes
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.request_fields import (
    GENERATE,
    Limits,
    check_batch,
    check_fields,
    check_sampling_params,
    check_text,
    prompt_ids,
)
from sglang_prefillshare.settings import current_settings

LONG_TEXT_CHARS: Final = 16_384
"""A text from this length on is tokenized in a thread: it takes ten milliseconds and more, and everybody would wait."""


async def tokenize_texts(
    original: Callable[..., Awaitable[Any]], self: Any, texts: Any, is_cross_encoder: bool = False
) -> Any:
    """Refuse a text that cannot fit; tokenize long ones beside the event loop, as SGLang does for chats.

    (The tokenizer releases Python's lock.)
    """
    limits = limits_of(self)
    for text in texts if isinstance(texts, list) else [texts or ""]:
        check_text("the prompt", text, limits)
    length = sum(map(len, texts)) if isinstance(texts, list) else len(texts or "")
    if length < LONG_TEXT_CHARS or self.async_dynamic_batch_tokenizer is not None:
        return await original(self, texts, is_cross_encoder)
    return await asyncio.to_thread(asyncio.run, _awaited(original(self, texts, is_cross_encoder)))


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def prompts_of(obj: Any) -> tuple[list[Any], bool]:
    """The prompts of a request, and whether it is a batch; none of one that has neither text nor ids."""
    prompts = obj.text if obj.text is not None else obj.input_ids
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        return prompts, True
    return ([] if prompts is None else [prompts]), False


def check_lists(obj: Any) -> None:
    """Refuse a list that has not one value for each prompt: SGLang takes a batch apart before it validates anything,
    and hands a single request's list on as it is. Raises `ValueError`, which SGLang turns into a 400."""
    prompts, is_batch = prompts_of(obj)
    batch_size = len(prompts) if is_batch else None
    if batch_size is not None:
        check_batch("the request", batch_size)
    for name in ONE_FOR_EACH_PROMPT:
        value: Any = getattr(obj, name, None)
        if is_for_each_prompt(value, name) and len(value) != batch_size:
            wanted = "one" if batch_size is None else f"one, or {batch_size} of them"
            raise ValueError(f"{name} lists {len(value)} values, wanted {wanted}.")


def is_for_each_prompt(value: Any, name: str) -> TypeGuard[list[Any]]:
    """Whether a value is a list of such; of ids a list is one prompt's, a list of lists all's."""
    return isinstance(value, list) and (name != "token_ids_logprob" or any(isinstance(item, list) for item in value))


ONE_FOR_EACH_PROMPT: Final = (
    *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"),
    *("return_sampling_mask", "sampling_logprobs_mode", "return_hidden_states", "custom_logit_processor", "watermark"),
    *("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid", "lora_path", "extra_key", "cache_salt"),
)


def validate_one_request(self: Any, obj: Any, input_ids: Any) -> None:
    """Refuse what the split of base and decode module cannot answer rightly. SGLang turns `ValueError` into a 400.

    A prompt of one token needs nothing of the base: both sides see that for themselves, and wait for nobody.
    """
    limits = limits_of(self)
    settings = current_settings()
    has_adapters = settings is not None and settings.adapters
    # Health checks, which move no KV, too: whoever names their host could be anybody.
    fields = {name: getattr(obj, name, None) for name in GENERATE}
    if has_adapters:
        fields["lora_id"] = None  # SGLang has put its own there by now
    check_fields(GENERATE, fields, limits)
    check_sampling_params(obj.sampling_params, limits)
    if obj.input_embeds is not None:
        raise ValueError("input_embeds is not supported with PrefillShare: send text or input_ids.")
    if not input_ids:
        raise ValueError("the prompt has no token. Send at least one.")
    prompt_ids("the prompt", input_ids, limits)
    sampling = obj.sampling_params or {}
    if int(sampling.get("n") or 1) > 1:
        raise ValueError(f"n is {sampling['n']} for one request of several: it was taken apart before.")
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
    if settings is not None and settings.role is Role.UNIFIED:
        return
    if obj.lora_path and not has_adapters:
        raise ValueError("lora_path is not supported on this worker: each module is a decode worker of its own.")
    if needs_no_base_kv(input_ids) and not is_fake_transfer(obj):
        obj.bootstrap_host = FAKE_BOOTSTRAP_HOST


def limits_of(tokenizer_manager: Any) -> Limits:
    """What this worker can index and hold; worked out once."""
    found: Limits | None = getattr(tokenizer_manager, _LIMITS, None)
    if found is None:
        context_length = int(tokenizer_manager.context_len)
        found = Limits(
            vocab_size=int(tokenizer_manager.model_config.vocab_size),
            context_length=context_length,
            max_prompt_bytes=_max_prompt_bytes(tokenizer_manager.tokenizer, context_length),
        )
        setattr(tokenizer_manager, _LIMITS, found)
    return found


def _max_prompt_bytes(tokenizer: Any, context_length: int) -> int | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else max_prompt_bytes(json.loads(backend.to_str()), context_length)


_LIMITS: Final = "_prefill_share_limits"
_REFUSED_FIELDS: Final = {
    "return_hidden_states": "those of the prompt would be the base's.",
    "return_prompt_token_ids_logprob": "prompt log-probabilities would be the base's.",
    "session_params": "a session would keep generated KV as prompt. Send the whole context; its prefix is cached.",
    "session_id": "a session would keep generated KV as prompt. Send the whole context; its prefix is cached.",
    "image_data": "text models only for now.",
    "video_data": "text models only for now.",
    "audio_data": "text models only for now.",
    "positional_embed_overrides": "the base would cache embeddings that no token id names.",
}
