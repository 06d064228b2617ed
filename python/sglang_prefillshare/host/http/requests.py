"""What a request may ask of a worker with a role, checked in the HTTP process before any work begins."""

from __future__ import annotations

from typing import Any, Final

from sglang_prefillshare.host.roles.role import MIN_PROMPT_TOKENS, is_fake_transfer


def validate_one_request(self: Any, obj: Any, input_ids: Any) -> None:
    """Refuse what the split of base and decode module cannot answer rightly. SGLang turns `ValueError` into a 400."""
    if is_fake_transfer(obj):
        return
    if obj.input_embeds is not None:
        raise ValueError("input_embeds is not supported with PrefillShare: send text or input_ids.")
    if len(input_ids) < MIN_PROMPT_TOKENS:
        raise ValueError(
            f"the prompt has {len(input_ids)} token(s), PrefillShare needs at least {MIN_PROMPT_TOKENS}: the base "
            "prefills all but the last one, which the decode module takes. Send a longer prompt."
        )
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
