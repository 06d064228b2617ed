"""Which worker probably holds the base's KV of which prefix: hashed blocks of prompt bytes, no tokenizer.

A prefill worker's prefixes are shared by every decode module, since the base's KV is (paper §3.3): what the
planner's request put there is found by the coder's. A decode worker's are those of the prompts that it served. It
is a guess that only steers routing; the worker's own radix tree is the truth. SGLang's KV events could replace it
without changing the policy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import xxhash

BYTES_PER_TOKEN: Final = 4
"""Token ids are written as four bytes each; English text also has about four bytes a token."""


def chain_hashes(data: bytes, *, block_bytes: int) -> list[int]:
    """One hash for each full block of `data`, each depending on all bytes before it.

    Two inputs agree on the first k hashes iff they agree on the first k blocks (but for 64-bit collisions).
    """
    hashes: list[int] = []
    previous = 0
    view = memoryview(data)
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        previous = xxhash.xxh3_64_intdigest(view[start : start + block_bytes], seed=previous)
        hashes.append(previous)
    return hashes


class PrefixIndex:
    """Per worker, the block chains sent to it, least recently used forgotten first.

    Invariant: a worker's blocks are closed under prefixes, because a chain is touched from its end to its
    start, which leaves every block older than the one before it. So a match can be found by bisection.
    """

    def __init__(self, *, capacity_blocks: int) -> None:
        assert capacity_blocks > 0
        self._capacity_blocks = capacity_blocks
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def insert(self, worker: str, chain: Sequence[int]) -> None:
        """Remember that `worker` holds the prefix `chain`; of a chain longer than the bound, its start."""
        blocks = self._blocks.setdefault(worker, OrderedDict())
        for block in reversed(chain[: self._capacity_blocks]):
            blocks[block] = None
            blocks.move_to_end(block)
        while len(blocks) > self._capacity_blocks:
            blocks.popitem(last=False)

    def match(self, worker: str, chain: Sequence[int]) -> int:
        """How many leading blocks of `chain` the worker holds. Reading does not refresh them."""
        blocks = self._blocks.get(worker)
        if not blocks:
            return 0
        return bisect_left(chain, True, key=lambda block: block not in blocks)

    def drop(self, worker: str) -> None:
        """Forget a worker that lost its cache: restarted, flushed, or gone."""
        self._blocks.pop(worker, None)

    def block_count(self, worker: str) -> int:
        return len(self._blocks.get(worker, ()))
