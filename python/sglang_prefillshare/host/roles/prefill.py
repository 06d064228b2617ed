"""The prefill half: the base computes KV for x1..x(n-1), once, for every decode module alike (contracts 1 and 2).

All functions here are hooks; `seams.py` says where each one goes and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_prefillshare.handoff.receipt import FIRST_SLOT, ROOM_MASK
from sglang_prefillshare.host.roles.provenance import Provenance
from sglang_prefillshare.host.roles.role import (
    NO_BASE,
    attach_role,
    check_handoff,
    is_fake_transfer,
    role_of,
)
from sglang_prefillshare.host.roles.tree import attach_tree, last_block
from sglang_prefillshare.host.transfer import metrics as handoff_metrics

REPORT_KEY = "prefill_share"
"""Key of a prefill leg's meta information; its one value is [cross_model_cached_tokens]."""

BLOCK_KEY = "prefill_share_block"
"""Likewise, where the worker publishes what its tree holds: [hash of the prompt's last complete block]."""


def init_disaggregation(original: Callable[..., None], self: Any) -> None:
    """Give the scheduler its role before the queues (whose handshake needs it) are built, then check the pool."""
    attach_role(self)
    handoff_metrics.prepare("prefill")
    self.tree_cache._prefill_share_provenance = Provenance(self.token_to_kv_pool_allocator.get_kvcache())
    attach_tree(self)
    original(self)
    self.disagg_metadata_buffers._prefill_share_scheduler = self
    check_handoff(self)


def create_generation_req(original: Callable[..., Any], self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
    """Cut the prompt to x1..x(n-1), drop all that only sampling needs, and key it by the base's identity."""
    rid, text, input_ids, _sampling = args
    if is_fake_transfer(recv_req):
        return original(
            self, recv_req, rid, text, input_ids, _neutral_sampling(self), **{**kwargs, "extra_key": NO_BASE}
        )
    recv_req.return_logprob = False
    recv_req.logprob_start_len = -1
    recv_req.return_sampling_mask = False
    kwargs.update(
        return_logprob=False,
        top_logprobs_num=0,
        token_ids_logprob=None,
        return_sampling_mask=False,
        stream=False,
        lora_id=None,
        custom_logit_processor=None,
        return_hidden_states=False,
        extra_key=role_of(self).namespace,
    )
    return original(self, recv_req, rid, text, input_ids[:-1], _neutral_sampling(self), **kwargs)


def num_pages_to_send(original: Callable[..., int], self: Any, req: Any, decode_prefix_len: int) -> int:
    """Refuse a decode worker that says it holds more of the prompt than the prompt has: SGLang would never send, and
    hold the request for ever."""
    if decode_prefix_len > len(req.origin_input_ids):
        req.disagg_kv_sender.kv_mgr.conclude_failure(
            bootstrap_room=req.bootstrap_room,
            failure_reason=f"prefill was given {len(req.origin_input_ids)} tokens of this prompt, decode holds "
            f"{decode_prefix_len} already. The two sides tokenized the prompt differently.",
        )
        return 0
    return original(self, req, decode_prefix_len)


def _neutral_sampling(scheduler: Any) -> Any:
    from sglang.srt.sampling.sampling_params import SamplingParams

    # What prefill samples is for nobody: greedy is the cheapest. No stop conditions, penalties or grammar.
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    sampling.normalize(scheduler.tokenizer)
    return sampling


def prepare_for_extend(original: Callable[..., None], self: Any) -> None:
    """Record, per KV slot, for which decode module it is computed, and count what is reused across modules."""
    before = [(req, req.already_computed, req.prefix_len) for req in self.reqs]
    original(self)
    rows = self.req_to_token_pool.req_to_token
    for req, already_computed, prefix_len in before:
        provenance = getattr(self.tree_cache, "_prefill_share_provenance", None)
        if provenance is None or req.kv.req_pool_idx is None:
            continue
        row = rows[req.kv.req_pool_idx]
        owner = provenance.module_id(req.routing_key)
        if not req.retracted_stain and prefix_len > already_computed:
            reused = provenance.count_foreign(row[already_computed:prefix_len], owner)
            req._prefill_share_cross_model = getattr(req, "_prefill_share_cross_model", 0) + reused
        provenance.record(row[prefix_len : req.extend_end], owner)


def set_buf(_result: None, self: Any, req: Any) -> None:
    """Write the receipt into the metadata that travels with the last chunk, whatever the transport."""
    scheduler = getattr(self, "_prefill_share_scheduler", None)
    if scheduler is None or is_fake_transfer(req):
        return
    import torch

    index = req.metadata_buffer_index
    cross_model = getattr(req, "_prefill_share_cross_model", 0)
    receipt = role_of(scheduler).receipt(req.origin_input_ids, cross_model_tokens=cross_model)
    self.cached_tokens[index, FIRST_SLOT:] = torch.tensor(receipt.to_words(), dtype=torch.int32)
    self.bootstrap_room[index, 0] = (req.bootstrap_room or 0) ^ ROOM_MASK
    req.customized_info = {REPORT_KEY: [cross_model]}
    if role_of(scheduler).settings.events is not None:
        req.customized_info[BLOCK_KEY] = [last_block(scheduler.tree_cache, req)]
