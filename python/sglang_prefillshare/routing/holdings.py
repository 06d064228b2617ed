"""What our legs hold on a worker, in tokens of KV: a prefix that several of them share counts once, as it is kept once.

Prefixes are known by the block hashes of `prefix_index`; what fills no block, and what is still to be generated, is a
leg's own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Hold:
    """What a leg holds: the blocks of its prompts, and `own_tokens` beside them."""

    chains: Sequence[Sequence[int]]
    own_tokens: int
    answer_tokens: int = 0
    """Of `own_tokens`, what its answer will have in the end; 0 where that is not one answer."""


NOTHING: Final = Hold((), 0)


class Holdings:
    """The sum of what is held. Blocks count as `block_tokens` each."""

    def __init__(self, *, block_tokens: int) -> None:
        assert block_tokens > 0
        self._block_tokens = block_tokens
        self._blocks: Counter[int] = Counter()
        self._own_tokens = 0

    @property
    def tokens(self) -> int:
        return len(self._blocks) * self._block_tokens + self._own_tokens

    def need(self, hold: Hold) -> int:
        """Tokens that `hold` would add; a prefix that its own prompts share counts for each."""
        missing = sum(len(chain) - self.held_blocks(chain) for chain in hold.chains)
        return missing * self._block_tokens + hold.own_tokens

    def size(self, hold: Hold) -> int:
        """Tokens of `hold`, whatever is held already."""
        return sum(map(len, hold.chains)) * self._block_tokens + hold.own_tokens

    def has_block(self, block: int) -> bool:
        return block in self._blocks

    def take(self, hold: Hold) -> None:
        for chain in hold.chains:
            self._blocks.update(chain)
        self._own_tokens += hold.own_tokens

    def give_back(self, hold: Hold) -> None:
        """Once for each `take`."""
        for chain in hold.chains:
            for block in chain:
                left = self._blocks[block] - 1
                if left:
                    self._blocks[block] = left
                else:
                    del self._blocks[block]
        self._own_tokens -= hold.own_tokens
        assert self._own_tokens >= 0

    def held_blocks(self, chain: Sequence[int]) -> int:
        """How many blocks of `chain` are held: those before a held one are, too."""
        return bisect_left(chain, True, key=lambda block: block not in self._blocks)
