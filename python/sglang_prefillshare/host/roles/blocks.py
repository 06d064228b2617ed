"""What a worker's KV events (of the dynamo format) call the blocks of a prompt: so the router knows whose they are.

SGLang chains these hashes along its tree and keeps them to itself, so they are computed again, once for each node: a
third of a microsecond for each token with pages of one, 0.02 with pages of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang_prefillshare.tree import Path


class BlockNames:
    """For each node of a tree, by SGLang's ids, the chain's hash at its end, which a split leaves as it is."""

    def __init__(self, path_to: Callable[[int], Path], *, page_size: int, namespace: str) -> None:
        from sglang.srt.disaggregation.kv_events import kv_event_namespace_seed

        self._path_to = path_to
        self._page_size = page_size
        self._seed = kv_event_namespace_seed(extra_key=namespace, cache_salt=None)
        self._ends: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def last(self, node_id: int, tokens: Sequence[int]) -> int | None:
        """The name of the last whole block of `tokens` (an `array('q')`), whose way through the tree ends at a node;
        None where it does not."""
        from sglang.srt.disaggregation.kv_events import namespaced_block_hash
        from sglang.srt.mem_cache.utils import hash_str_to_int64

        path = self._path_to(node_id)
        if not path or path[-1].path_end != len(tokens) // self._page_size * self._page_size:
            return None
        known = next((place for place in range(len(path), 0, -1) if path[place - 1].node_id in self._ends), 0)
        chained = self._ends[path[known - 1].node_id] if known else None
        for node in path[known:]:
            chained = self._ends[node.node_id] = self._hashed(tokens[node.path_start : node.path_end], chained)
        if chained is None:
            return None
        return int(namespaced_block_hash(hash_str_to_int64(chained), namespace_seed=self._seed))

    def forget(self, node_id: int) -> None:
        """SGLang evicts this leaf."""
        self._ends.pop(node_id, None)

    def clear(self) -> None:
        """SGLang's tree is empty."""
        self._ends.clear()

    def _hashed(self, tokens: Any, before: str | None) -> str:
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.utils import get_hash_str

        return str(get_hash_str(RadixKey(tokens), before, page_size=self._page_size)[-1])
