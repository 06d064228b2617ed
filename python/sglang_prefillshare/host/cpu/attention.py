"""Attention on a CPU: over a cached prefix for the new tokens only, and in decode without copies of copies.

SGLang's `torch_native` backend pads the queries to the whole sequence and throws the prefix's rows away, so a prompt
whose first 2,500 tokens are in the radix tree pays for the attention of 2,500 tokens again. Here the queries stay as
many as there are new tokens. In decode, where a query is one token, gathering keys and values is most of the work: here
each row of the pool is copied once, and the heads that share it are multiplied with it together. The keys, values and
the arithmetic are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

_QUERY_BLOCK: Final = 512
"""Rows of the causal mask that are built at a time; bounds its memory for long prompts."""

_FOLDED_ROWS: Final = 128
"""From about three times as many new tokens on, folding heads into rows gains nothing."""


def run_sdpa_forward_extend(
    original: Callable[..., torch.Tensor],
    self: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """Hook on `TorchNativeAttnBackend._run_sdpa_forward_extend`; shapes as there.

    Causal self-attention only. Windows, encoders and cross-attention go to SGLang's own code.
    """
    has_window = sliding_window_size is not None and sliding_window_size > -1
    if not causal or is_cross_attn or encoder_lens is not None or has_window:
        return original(
            self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens,
            extend_seq_lens, encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
        )  # fmt: skip
    first = 0
    requests = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
    for row, kv_len, q_len in requests:
        slots = req_to_token[row, :kv_len]
        key, value = (_gathered(cache, slots).to(query.dtype) for cache in (k_cache, v_cache))
        block = q_len if q_len == kv_len else _QUERY_BLOCK
        for start in range(0, q_len, block):
            end = min(start + block, q_len)
            seen = kv_len - q_len + end  # keys that the block's last query may look at
            mask = None
            if q_len != kv_len:
                mask = torch.ones(end - start, seen, dtype=torch.bool).tril(diagonal=seen - (end - start))
            rows = slice(first + start, first + end)
            output[rows] = _attend(query[rows], key[:, :, :seen], value[:, :, :seen], mask, scaling, enable_gqa)
        first += q_len
    return output


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """query [rows, heads, dim], keys and values [1, kv_heads, seen, dim], mask bool [rows, seen] or None for a causal
    one; returns [rows, heads, dim].

    For few rows, preparing keys is what costs: then the heads of one group stand below one another as further rows, so
    that their keys are prepared once.
    """
    kv_heads, rows = key.shape[1], query.shape[0]
    if not enable_gqa or mask is None or rows > _FOLDED_ROWS:
        found = scaled_dot_product_attention(
            query.movedim(0, 1)[None], key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=enable_gqa,
            scale=scaling,
        )  # fmt: skip
        return found[0].movedim(1, 0)
    group = query.shape[1] // kv_heads
    folded = query.unflatten(1, (kv_heads, group)).movedim(0, 2).flatten(1, 2)
    found = scaled_dot_product_attention(folded[None], key, value, attn_mask=mask.repeat(group, 1), scale=scaling)
    return found[0].unflatten(1, (group, rows)).flatten(0, 1).movedim(1, 0)


def run_sdpa_forward_decode(
    original: Callable[..., torch.Tensor],
    self: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """Hook on `TorchNativeAttnBackend._run_sdpa_forward_decode`; shapes as there.

    query, output float [requests, heads, head_dim]; caches [slots, kv_heads, head_dim]. Windows, encoders,
    cross-attention and a pool of another dtype than the query's go to SGLang's own code.
    """
    has_window = sliding_window_size is not None and sliding_window_size > -1
    is_other = not (query.dtype == k_cache.dtype == v_cache.dtype)
    if causal or is_cross_attn or encoder_lens is not None or has_window or is_other:
        return original(
            self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, scaling,
            enable_gqa, causal, is_cross_attn, sliding_window_size,
        )  # fmt: skip
    kv_heads = k_cache.shape[1]
    grouped = query.unflatten(1, (kv_heads, -1))  # [requests, kv_heads, heads of each, head_dim]
    found = output.unflatten(1, (kv_heads, -1))
    for index, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[row, :length]
        key, value = (_gathered(cache, slots) for cache in (k_cache, v_cache))
        # All see all keys, so the heads of one group may stand where a prompt's tokens do.
        found[index] = scaled_dot_product_attention(grouped[None, index], key, value, scale=scaling)[0]
    return output


def _gathered(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The rows of a pool [slots, kv_heads, dim] as attention wants them, [1, kv_heads, rows, dim]; each copied once."""
    return cache.flatten(1).index_select(0, slots).unflatten(1, cache.shape[1:]).transpose(0, 1)[None]
