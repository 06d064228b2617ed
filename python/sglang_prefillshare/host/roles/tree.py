"""A scheduler's picture of its radix tree: `TreeMirror`, told of what passes through, and asked by the HTTP process.

Each time that SGLang puts a request into the tree costs one look at the nodes on its way; an eviction, one look into a
dictionary. Nothing is looked at on a timer. All functions here but `attach_tree` are hooks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from sglang_prefillshare.host.roles.blocks import BlockNames
from sglang_prefillshare.host.roles.role import role_of
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.tree import Path, TreeMirror

logger = logging.getLogger(__name__)

DESCRIBE: Final = "prefill_share_tree"
"""The method that the HTTP process asks for, in the one of SGLang's control messages that has room for an answer."""

HELD: Final = "_prefill_share_held"
"""On a decode worker's request: how many of its tokens were in the tree when it came."""

_ATTRIBUTE: Final = "_prefill_share_tree"


class _Tree:
    """One scheduler's mirror, and what it needs of SGLang to keep it."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._namespace = role_of(scheduler).namespace
        self._role = role_of(scheduler).settings.role
        self._has_adapters = role_of(scheduler).settings.adapters
        self.mirror = TreeMirror(self._path_to, page_size=scheduler.page_size)
        self.blocks: BlockNames | None = None
        if role_of(scheduler).settings.events is not None:
            self.blocks = BlockNames(self._path_to, page_size=scheduler.page_size, namespace=self._namespace)
        self.failure: str | None = None

    def observe(self, req: Any) -> None:
        if req.extra_key != self._namespace or not isinstance(req.last_node, int):
            return
        path = self._path_to(req.last_node)
        tokens = req.full_untruncated_fill_ids
        found = getattr(req, HELD, 0) if self._role is Role.DECODE else req.cached_tokens
        self.mirror.observe(path, tokens, module=self._module_of(req), found=found, now_s=time.monotonic())

    def forget(self, node_id: int) -> None:
        self.mirror.forget(node_id)
        if self.blocks is not None:
            self.blocks.forget(node_id)

    def clear(self) -> None:
        self.mirror.clear()
        if self.blocks is not None:
            self.blocks.clear()

    def describe(self, limit: int) -> dict[str, Any]:
        started = time.perf_counter()
        scheduler = self._scheduler
        cache = scheduler.tree_cache
        evictable, protected = cache.full_evictable_size(), cache.full_protected_size()
        tree = self.mirror.describe(
            limit=limit, leased=_nodes_of(self._on_loan()), locked=_nodes_of(self._live()), now_s=time.monotonic()
        )
        pool = {
            "failure": self.failure,
            "pool_tokens": scheduler.max_total_num_tokens,
            "free_tokens": scheduler.token_to_kv_pool_allocator.available_size(),
            "tree_tokens": evictable + protected,
            "evictable_tokens": evictable,
            "unseen_tokens": max(0, evictable + protected - self.mirror.tokens),
            "cost_ms": round((time.perf_counter() - started) * 1000, 3),
        }
        return {"pool": pool, "tree": tree}

    def guarded(self, tell: Callable[..., None], *args: Any) -> None:
        """What is only there to be looked at must not end the worker."""
        if self.failure is not None:
            return
        try:
            tell(*args)
        except Exception as error:
            logger.exception("the picture of the radix tree is not kept any more")
            self.failure = f"it is not kept any more: {error!r}"
            self.clear()

    def _path_to(self, node_id: int) -> Path:
        try:
            path: Path = self._scheduler.tree_cache.tree_core.collect_path_info([node_id])[0]
        except KeyError:
            return ()
        return path

    def _module_of(self, req: Any) -> str | None:
        if self._role is Role.PREFILL:
            name: str | None = req.routing_key
        elif not self._has_adapters:
            from sglang.srt.runtime_context import get_serving

            name = get_serving().served_model_name
        else:
            refs = self._scheduler.tp_worker.model_runner.lora_manager.lora_refs
            name = refs[req.lora_id].lora_name if req.lora_id in refs else None
        return name

    def _on_loan(self) -> Iterable[Any]:
        """Prefill's requests whose pages wait for decode to have copied them."""
        return self._scheduler.disagg_prefill_inflight_queue if self._role is Role.PREFILL else ()

    def _live(self) -> Iterator[Any]:
        scheduler = self._scheduler
        yield from self._on_loan()
        yield from scheduler.collect_inflight_reqs()
        yield from scheduler.waiting_queue
        if scheduler.chunked_req is not None:
            yield scheduler.chunked_req
        if self._role is Role.DECODE:
            for queue in (scheduler.disagg_decode_prealloc_queue, scheduler.disagg_decode_transfer_queue):
                yield from (decode_req.req for decode_req in queue.queue)


def _nodes_of(reqs: Iterable[Any]) -> Iterator[int]:
    return (req.lock.node for req in reqs if req.lock is not None)


def attach_tree(scheduler: Any) -> None:
    """Begin the picture of a scheduler's tree, which is empty; its role must be attached. Other caches have none."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    if isinstance(scheduler.tree_cache, UnifiedRadixCache) and not scheduler.tree_cache.disable:
        setattr(scheduler.tree_cache, _ATTRIBUTE, _Tree(scheduler))


def last_block(tree_cache: Any, req: Any) -> int | None:
    """What the worker's events call the last whole block of a request that is in the tree; None where it has none
    there, or where nobody is told of events."""
    tree = getattr(tree_cache, _ATTRIBUTE, None)
    found: list[int | None] = []
    if tree is not None and tree.blocks is not None and isinstance(req.last_node, int):
        tree.guarded(lambda: found.append(tree.blocks.last(req.last_node, req.origin_input_ids)))
    return found[0] if found else None


def checkpoint(_result: None, self: Any, req: Any, *, up_to: int, **kwargs: Any) -> None:
    """A request was put into the tree."""
    if (tree := getattr(self, _ATTRIBUTE, None)) is not None:
        tree.guarded(tree.observe, req)


def evict_device_leaf(self: Any, node_id: int, tracker: Any) -> None:
    if (tree := getattr(self, _ATTRIBUTE, None)) is not None:
        tree.guarded(tree.forget, node_id)


def reset(_result: None, self: Any) -> None:
    if (tree := getattr(self, _ATTRIBUTE, None)) is not None:
        tree.clear()


def handle_dumper_control(original: Callable[..., None], self: Any, recv_req: Any) -> None:
    """Answer the HTTP process, where it asks for the tree."""
    if recv_req.method != DESCRIBE:
        original(self, recv_req)
        return
    from sglang.srt.managers.io_struct import DumperControlReqOutput

    tree = getattr(self.tree_cache, _ATTRIBUTE, None)
    described, error = [], "this worker keeps no radix tree of SGLang's default kind"
    if tree is not None:
        try:
            described = [tree.describe(recv_req.body["limit"])]
        except Exception as failure:
            logger.exception("the radix tree could not be described")
            error = f"the radix tree could not be described: {failure!r}"
    answer = DumperControlReqOutput(success=bool(described), response=described, error="" if described else error)
    self.send_control_output(answer, recv_req)
