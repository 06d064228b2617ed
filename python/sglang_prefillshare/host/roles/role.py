"""The role as one scheduler process runs it: namespace, fingerprint and the words that travel with every handoff."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sglang_prefillshare.errors import HandoffError, SeamError
from sglang_prefillshare.handoff.proof import UntriedError, explain
from sglang_prefillshare.handoff.receipt import Receipt
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.settings import BACKEND_NAME, RoleSettings, current_settings

logger = logging.getLogger(__name__)

FAKE_BOOTSTRAP_HOST: Final = "2.2.2.2"
"""SGLang's own health checks and warm-up name this host: they move no KV. So does a prompt of one token, which needs
none of the base's (`needs_no_base_kv`); everything else that names it is left as it is."""

NO_BASE: Final = "prefillshare:none"
"""The radix namespace of such requests: it holds nobody's KV that anybody may use."""

_ATTRIBUTE: Final = "_prefill_share_role"


def is_fake_transfer(request: Any) -> bool:
    return bool(request.bootstrap_host == FAKE_BOOTSTRAP_HOST)


def needs_no_base_kv(prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt is x1 alone: the base computes the KV of x1..x(n-1), which is nothing (contract 1)."""
    return len(prompt_ids) == 1


@dataclass(frozen=True, slots=True)
class SchedulerRole:
    """A scheduler's role with what is known only after the model was loaded."""

    settings: RoleSettings
    kv_dtype: str
    fingerprint: str
    """`BaseIdentity.runtime_fingerprint` of the base whose KV this worker writes or reads, in its KV dtype."""
    handoff_failure: str | None = None
    """Why this worker can hand no KV over: it serves nothing then, and says so."""
    pool_place: Mapping[str, Any] = field(default_factory=dict)
    """Where its pool is, in the fields of `WorkerInfo` that say so; empty with other backends than ours."""

    @property
    def namespace(self) -> str:
        return self.settings.namespace(self.kv_dtype)

    def receipt(self, prompt_ids: Any, *, cross_model_tokens: int) -> Receipt:
        """What prefill states about a handoff; `prompt_ids` are x1..x(n-1) as `array('q')`."""
        return Receipt.of(prompt_ids, fingerprint=self.fingerprint, cross_model_tokens=cross_model_tokens)


def attach_role(scheduler: Any) -> SchedulerRole:
    """Work out the role of a scheduler whose model is loaded and whose queues are not built yet."""
    settings = current_settings()
    assert settings is not None, "a role hook ran in a process without a role"
    kv_dtype = str(scheduler.tp_worker.model_runner.kv_cache_dtype).removeprefix("torch.")
    role = SchedulerRole(settings, kv_dtype, settings.identity.runtime_fingerprint(kv_dtype))
    setattr(scheduler, _ATTRIBUTE, role)
    return role


def role_of(scheduler: Any) -> SchedulerRole:
    role = getattr(scheduler, _ATTRIBUTE, None)
    if not isinstance(role, SchedulerRole):
        raise SeamError(
            "this scheduler has no PrefillShare role although its hooks are active. "
            "Run `prefillshare doctor` and report its output."
        )
    return role


def check_pool(pool: Any, *, state_types: Sequence[Any]) -> None:
    """Raise `HandoffError` for a model whose KV is more than one K and one V per token and layer."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if not isinstance(pool, MHATokenToKVPool) or state_types:
        raise HandoffError(
            f"this model keeps its KV in a {type(pool).__name__} with extra state {list(state_types)}; PrefillShare "
            "shares multi-head and grouped-query attention caches (Llama, Qwen3, …). Serve it without a role."
        )


def check_handoff(scheduler: Any) -> None:
    """Stop a worker whose KV is more than one K and one V per token and layer: x1..x(n-1) would not be all of it.

    With our own backend a page is handed over once, with a process of our own. A worker that cannot do that stays up,
    to say so: `SchedulerRole.handoff_failure`.
    """
    role = role_of(scheduler)
    queue = (
        scheduler.disagg_prefill_bootstrap_queue
        if role.settings.role is Role.PREFILL
        else scheduler.disagg_decode_prealloc_queue
    )
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    check_pool(pool, state_types=list(queue.kv_manager.kv_args.state_types or ()))
    if role.settings.transfer_backend != BACKEND_NAME:
        return  # it has registered the pool by now, or has ended the worker
    started = time.monotonic()
    try:
        role = replace(role, pool_place=queue.kv_manager.place())
        queue.kv_manager.prove()
        logger.info("A page was handed over with a process of our own, in %.2f s", time.monotonic() - started)
    except Exception as error:  # of the driver, of the kernel's compiler: each means that no request can be served
        reason = explain(error)
        if isinstance(reason, UntriedError):
            logger.warning("Whether KV can be handed over was not tried: %s", reason)
        else:
            logger.error("No KV can be handed over: %s", reason, exc_info=not isinstance(error, HandoffError))
            role = replace(role, handoff_failure=str(reason))
    setattr(scheduler, _ATTRIBUTE, role)
