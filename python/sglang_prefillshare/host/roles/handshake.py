"""Identity in SGLang's own handshake, for every transfer backend: a pair of different bases never gets connected.

Prefill publishes its KV layout to its bootstrap server and decode compares it before the first request. SGLang leaves
the layout empty for ordinary models; ours is the base's runtime fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sglang_prefillshare.host.roles.role import role_of
from sglang_prefillshare.host.transfer import pool_device

LAYOUT_PREFIX = "prefillshare:"


def init_kv_manager(original: Callable[..., Any], self: Any) -> Any:
    """Hook on both queues' `_init_kv_manager`: put the fingerprint where SGLang puts the KV layout.

    Our own backend's manager learns meanwhile where the pool is and which heads it holds: nothing that SGLang passes
    it says so on both sides.
    """
    from sglang.srt.disaggregation import decode, prefill

    layout = LAYOUT_PREFIX + role_of(self.scheduler).fingerprint
    modules = (decode, prefill)
    kept = [module.get_pd_kv_layout for module in modules]
    for module in modules:
        module.get_pd_kv_layout = lambda _pool: layout
    try:
        total_heads = self.scheduler.model_config.get_total_num_kv_heads()
        with pool_device.stated_by(self.token_to_kv_pool, total_heads=total_heads):
            return original(self)
    finally:
        for module, function in zip(modules, kept, strict=True):
            module.get_pd_kv_layout = function


def try_ensure_parallel_info(original: Callable[..., bool], self: Any, bootstrap_addr: str) -> bool:
    """Hook on decode's first look at a prefill worker: a mismatch becomes a refusal instead of a crash.

    SGLang raises inside the scheduler loop, which would take the whole decode worker down. The reason is kept for
    `ensure_prefill_info`, which fails the requests that named this prefill worker; the next request looks again.
    """
    try:
        if not original(self, bootstrap_addr):
            return False
        found = self.prefill_info_table[bootstrap_addr].kv_layout
        reason = _why_refused(found, self.kv_layout, bootstrap_addr)
    except RuntimeError as error:
        reason = _in_our_words(str(error), self.kv_layout, bootstrap_addr)
    if reason is None:
        return True
    self.prefill_info_table.pop(bootstrap_addr, None)
    _refusals(self)[bootstrap_addr] = reason
    return False


def _why_refused(found: str | None, wanted: str, bootstrap_addr: str) -> str | None:
    if found == wanted:
        return None
    return (
        f"prefill worker {bootstrap_addr} runs without --prefill-share-role prefill: its KV would end with a token "
        "sampled by the base. Start it with the role."
    )


def _in_our_words(error: str, wanted: str, bootstrap_addr: str) -> str:
    """SGLang's reason, but for layouts that are fingerprints: it would advise flags that have nothing to do with it."""
    found = re.search(rf"kv_layout={LAYOUT_PREFIX}([\w-]+), but decode", error)
    if found is None:
        return error
    return (
        f"prefill worker {bootstrap_addr} serves base {found[1]}, this decode module was fine-tuned on "
        f"{wanted.removeprefix(LAYOUT_PREFIX)}. Point it at a prefill worker of its own base."
    )


def ensure_prefill_info(original: Callable[..., Any], self: Any, addr_to_reqs: dict[str, list[Any]]) -> Any:
    """Hook on decode's queue: fail the requests of a refused prefill worker at once and with the reason."""
    ready, remaining = original(self, addr_to_reqs)
    refusals = _refusals(self.kv_manager)
    for bootstrap_addr in [addr for addr in addr_to_reqs if addr in refusals]:
        reason = refusals.pop(bootstrap_addr)
        self._ensure_retry_count.pop(bootstrap_addr, None)
        self._ensure_last_attempt_time.pop(bootstrap_addr, None)
        for decode_req in addr_to_reqs[bootstrap_addr]:
            _fail(self.kv_manager, decode_req, f"the handshake with its prefill worker was refused: {reason}")
        refused = {id(decode_req) for decode_req in addr_to_reqs[bootstrap_addr]}
        remaining = [decode_req for decode_req in remaining if id(decode_req) not in refused]
    return ready, remaining


def _fail(manager: Any, decode_req: Any, reason: str) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    receiver = decode_req.kv_receiver
    if receiver is not None:
        manager.record_failure(receiver.bootstrap_room, reason)
        manager.update_status(receiver.bootstrap_room, KVPoll.Failed)


def _refusals(manager: Any) -> dict[str, str]:
    found: dict[str, str] | None = getattr(manager, "_prefill_share_refusals", None)
    if found is None:
        found = manager._prefill_share_refusals = {}
    return found
