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
    rows = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
    for row, kv_len, q_len in rows:
        slots = req_to_token[row, :kv_len]
        key, value = (_gathered(cache, slots).to(query.dtype) for cache in (k_cache, v_cache))
        block = q_len if q_len == kv_len else _QUERY_BLOCK
        for start in range(0, q_len, block):
            end = min(start + block, q_len)
            seen = kv_len - q_len + end  # keys that the block's last query may look at
            mask = None
            if q_len != kv_len:
                mask = torch.ones(end - start, seen, dtype=torch.bool).tril(diagonal=seen - (end - start))
            found = scaled_dot_product_attention(
                query[first + start : first + end].movedim(0, 1).unsqueeze(0),
                key[:, :, :seen],
                value[:, :, :seen],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=enable_gqa,
                scale=scaling,
            )
            output[first + start : first + end] = found.squeeze(0).movedim(1, 0)
        first += q_len
    return output


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
