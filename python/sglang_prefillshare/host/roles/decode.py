"""The decode half: the module takes xn as its first input and computes y1 and everything after it (contract 1).

SGLang's decode side expects prefill to have sampled y1. The hooks here let a request start with no output instead:
KV for n-1 tokens, xn waiting as the next input, and nothing to stream, penalise, match or accept yet. From its first
decode step on, a request is an ordinary one. `seams.py` says where each hook goes and why.

Overlap scheduling prepares a step before the token of the step before it is known. So a request that awaits its first
token does so for two steps then, and what counts tokens must not take the second for another first.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.receipt import FIRST_SLOT, ROOM_MASK, Receipt
from sglang_prefillshare.host.roles.adapters import try_adapters
from sglang_prefillshare.host.roles.grammar import blame_request
from sglang_prefillshare.host.roles.penalties import rows_kept, tell_again
from sglang_prefillshare.host.roles.role import (
    NO_BASE,
    attach_role,
    check_handoff,
    is_fake_transfer,
    needs_no_base_kv,
    role_of,
)
from sglang_prefillshare.host.roles.tree import HELD, attach_tree
from sglang_prefillshare.host.transfer import metrics as handoff_metrics

_TOLD: Final = "_prefill_share_told"
"""On a request in a batch: how many of its tokens the penalties have been told of; None before its first step there."""


def awaits_first_token(req: Any) -> bool:
    """A request that holds x1..x(n-1) and has generated nothing: xn is its next input. Of one token it holds none."""
    is_ours = not is_fake_transfer(req) or needs_no_base_kv(req.origin_input_ids)
    return is_ours and len(req.output_ids) == 0


def init_disaggregation(original: Callable[..., None], self: Any) -> None:
    attach_role(self)
    attach_tree(self)
    handoff_metrics.prepare("decode")
    original(self)
    check_handoff(self)
    if role_of(self).settings.adapters:
        try_adapters(self.tp_worker.model_runner.lora_manager)
    manager = self.disagg_decode_prealloc_queue.kv_manager
    if getattr(manager, "on_cuda", False):
        manager.forward_stream = self.forward_stream


def create_generation_req(original: Callable[..., Any], self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
    """Key the request by the base's identity, as prefill does; a client's own `extra_key` has no say in it.

    What moves no KV has none of the base's, and must not be able to say that it has. An adapter has no say in it
    either, to whose id SGLang would extend the key: the worker computes with it what follows x1..x(n-1), and nothing of
    that enters the cache of base KV, which is one for all adapters.
    """
    lora_id = kwargs.pop("lora_id", None)
    namespace = NO_BASE if is_fake_transfer(recv_req) else role_of(self).namespace
    req = original(self, recv_req, *args, **{**kwargs, "lora_id": None, "extra_key": namespace})
    req.lora_id = lora_id
    return req


def pre_alloc_fill_len(original: Callable[..., int], req: Any) -> int:
    """How many KV slots to allocate before decoding: n-1 for a request without output, SGLang's count otherwise."""
    return len(req.origin_input_ids) - 1 if awaits_first_token(req) else original(req)


def exceeds_kv_capacity(original: Callable[..., bool], self: Any, req: Any) -> bool:
    """Refuse a request that an empty pool has no room for: SGLang would let it wait for ever.

    It admits a request only if its prompt and the tokens it may generate (up to an estimate that it clips), or those
    that it reserves for every request, fit.
    """
    if original(self, req):
        return True
    if is_fake_transfer(req):
        return False
    from sglang.srt.disaggregation.decode import CLIP_MAX_NEW_TOKEN
    from sglang.srt.disaggregation.utils import prepare_abort

    prompt_tokens = len(req.origin_input_ids) - 1
    page_size = self.token_to_kv_pool_allocator.page_size
    in_pages = -(-prompt_tokens // page_size) * page_size
    expected = prompt_tokens + min(req.sampling_params.max_new_tokens, CLIP_MAX_NEW_TOKEN)
    needed = max(in_pages + self.num_reserved_decode_tokens, expected)
    if needed <= self.max_total_num_tokens:
        return False
    message = (
        f"the request needs room for {needed} tokens of KV, the pool of this decode worker has "
        f"{self.max_total_num_tokens}. Send a shorter prompt, or start the worker with a larger --max-total-tokens or "
        "a smaller --num-reserved-decode-tokens."
    )
    prepare_abort(req, message, status_code=HTTPStatus.BAD_REQUEST)
    self.scheduler.output_streamer.stream_output([req], req.return_logprob)
    return True


def match_prefix_and_lock(original: Callable[..., Any], self: Any, req: Any) -> Any:
    """Look for x1..x(n-1) only in the cache of base KV: xn is the module's own input, whatever another prompt held."""
    with _swapped([req], "origin_input_ids", lambda req: req.origin_input_ids[:-1]):
        match = original(self, req)
    setattr(req, HELD, match.l1_prefix_len)
    return match


def commit_transfer_to_req(original: Callable[..., None], self: Any, decode_req: Any) -> None:
    """Check the receipt, then let SGLang commit the handoff without the token that prefill sampled."""
    req = decode_req.req
    if not awaits_first_token(req):
        original(self, decode_req)
        return
    buffers, index = self.metadata_buffers, decode_req.metadata_buffer_index
    if needs_no_base_kv(req.origin_input_ids):
        buffers.cached_tokens[index] = 0  # nobody wrote into this row: it is another request's
        _commit_without_token(original, self, decode_req)
        return
    try:
        receipt = Receipt.from_words(buffers.cached_tokens[index, FIRST_SLOT:].tolist())
        receipt.check(role_of(self.scheduler).receipt(req.origin_input_ids[:-1], cross_model_tokens=0))
    except HandoffError as error:
        _count(self, decode_req, "refused")
        _abort(decode_req, str(error))
        return
    _count(self, decode_req, "ok")
    buffers.bootstrap_room[index, 0] = int(buffers.bootstrap_room[index, 0]) ^ ROOM_MASK
    _commit_without_token(original, self, decode_req)


def _commit_without_token(original: Callable[..., None], self: Any, decode_req: Any) -> None:
    req = decode_req.req
    # SGLang's replay of a known token skips everything that belongs to a token sampled by prefill: its log-probability,
    # its sampling mask and its place in a reasoning section. xn is such a token, and then it is taken off again.
    was_rebootstrap, decode_req.is_rebootstrap = decode_req.is_rebootstrap, True
    req.pd_rebootstrap_forced_output_id = req.origin_input_ids[-1]
    try:
        original(self, decode_req)
    finally:
        decode_req.is_rebootstrap = was_rebootstrap
        req.pd_rebootstrap_forced_output_id = None
    if len(req.output_ids):
        req.output_ids.pop()


def abort_failed_transfer(original: Callable[..., None], self: Any, decode_req: Any) -> None:
    """Count a handoff that failed; SGLang passes every one of them through here."""
    original(self, decode_req)
    if not is_fake_transfer(decode_req.req):
        was_told_to = isinstance(decode_req.req.to_finish or decode_req.req.finished_reason, _finish_abort())
        _count(self, decode_req, "aborted" if was_told_to else "failed")


def _count(queue: Any, decode_req: Any, outcome: str) -> None:
    """Count a handoff where it ends, whatever the transport; the time is known of our own only."""
    manager = queue.scheduler.disagg_decode_prealloc_queue.kv_manager
    page_size, page_bytes = manager.kv_args.page_size, sum(manager.kv_args.kv_item_lens)
    needed = len(decode_req.req.origin_input_ids) - 1
    held = decode_req.prefix_match.l1_prefix_len if decode_req.prefix_match is not None else 0
    take_handoff_s = getattr(manager, "take_handoff_s", None)
    handoff_metrics.observe(
        "decode",
        outcome,
        held_tokens=held,
        held_bytes=held // page_size * page_bytes,
        moved_tokens=needed - held,
        moved_bytes=-(-(needed - held) // page_size) * page_bytes,
        seconds=take_handoff_s(decode_req.req.bootstrap_room) if take_handoff_s is not None else None,
    )


def _finish_abort() -> type:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return FINISH_ABORT  # type: ignore[no-any-return]


def _abort(decode_req: Any, message: str) -> None:
    from sglang.srt.disaggregation.utils import prepare_abort

    prepare_abort(decode_req.req, f"KV handoff refused: {message}", status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
    decode_req.kv_receiver.clear()
    decode_req.kv_receiver = None


def prepare_for_prebuilt(original: Callable[..., None], self: Any) -> None:
    """Let SGLang build the batch over x1..x(n-1), the tokens whose KV is there.

    `cached_tokens` stays what prefill found: what decode held itself saved a copy, not a computation.
    """
    for req in self.reqs:
        if awaits_first_token(req):
            req.already_computed = max(req.already_computed, req.prefix_len)
    with _swapped(self.reqs, "origin_input_ids", lambda req: req.origin_input_ids[:-1]):
        original(self)
    for req in self.reqs:
        setattr(req, _TOLD, None)
    # But for each one's last token: its first step does that.
    tell_again(self, [list(req.output_ids[:-1]) for req in self.reqs])


def process_prebuilt(original: Callable[..., None], self: Any, future_map: Any) -> None:
    """Relay xn as the next input; a grammar must not see it; what is generated must never enter a radix tree.

    SGLang publishes [0, n-1), floored to whole pages, in this call: the base's KV, which later prompts may find. From
    then on the request is barred from the tree, so that its end, a retraction or a resumption adds nothing to it.
    """
    fresh = [req for req in self.reqs if awaits_first_token(req)]
    with (
        _swapped(fresh, "grammar", lambda _req: None),
        _swapped(fresh, "output_ids", lambda req: array("q", [req.origin_input_ids[-1]])),
    ):
        original(self, future_map)
    for req in self.reqs:
        blame_request(req)
    for req in fresh:
        req.skip_radix_cache_insert = True  # contract 2


def release_kv_cache(original: Callable[..., None], req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    """Give back the row of a request of one token that ends before its first step: it holds no KV, only the row.

    SGLang's asserts that a row without KV cannot be.
    """
    if not (req.kv.holds_kv and req.kv.is_kv_released):
        original(req, tree_cache, checkpoint=checkpoint)
        return
    tree_cache.unlock(req.lock)
    req.lock = None
    tree_cache.on_release(req, checkpointed=False)
    tree_cache.req_to_token_pool.free(req)


def process_batch_result_prebuilt(original: Callable[..., None], self: Any, batch: Any) -> None:
    """Stream and finish only requests that have something to say: no empty first chunk, no stop check on nothing."""
    everyone = batch.reqs
    silent: list[Any] = []
    batch.reqs = []
    for req in everyone:
        (silent if awaits_first_token(req) and not _is_over(req) else batch.reqs).append(req)
    try:
        original(self, batch)
    finally:
        batch.reqs = everyone
    for req in silent:
        req.time_stats.set_decode_prebuilt_finish_time()


def _is_over(req: Any) -> bool:
    return req.to_finish is not None or req.sampling_params.max_new_tokens == 0


def cumulate_penalty_output_tokens(original: Callable[..., None], self: Any) -> None:
    """Count every y once and xn never: for the penalties when it is known, for `min_new_tokens` when it is computed.

    Before each step SGLang counts the last token that it knows. Before the first step of a request without output that
    is xn. Before the second under overlap scheduling it is the same token again, since what the first step chooses is
    still being computed: `min_new_tokens`, which asks only how many there are, counts that one; the penalties wait.
    """
    from sglang.srt.sampling.penaltylib import BatchedMinNewTokensPenalizer

    first, nothing_new = [], []
    for row, req in enumerate(self.reqs):
        told = getattr(req, _TOLD, None)
        if told is None and not len(req.output_ids):
            first.append(row)
        if (told or 0) == len(req.output_ids):
            nothing_new.append(row)
        setattr(req, _TOLD, len(req.output_ids))
    penalizers = self.sampling_info.penalizer_orchestrator.penalizers
    with rows_kept(self, dict.fromkeys(penalizers, nothing_new) | {BatchedMinNewTokensPenalizer: first}):
        original(self)


@contextmanager
def _swapped(reqs: list[Any], name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of the requests that await their first token for the time of one call into SGLang."""
    chosen = [(req, getattr(req, name)) for req in reqs if awaits_first_token(req)]
    for req, _ in chosen:
        setattr(req, name, replacement(req))
    try:
        yield
    finally:
        for req, value in chosen:
            setattr(req, name, value)
