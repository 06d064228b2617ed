"""Whether a request had better wait for a prefix that another one is having computed now (pure).

Sessions that begin at once would have their common prefix computed once each: none finds it in the tree yet. The first
has it computed, and the others wait for that as long as it is shorter than to compute it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_MIN_WAIT_S: Final = 0.005
"""Less is not worth a wait: the messages there and back take as long."""

_USUAL_TOKENS_PER_S: Final = 2000.0
"""Of a worker of which nothing is known yet."""

_BEST_KEPT: Final = 0.99
"""Of the best rate, with each leg."""

_OVERDUE: Final = 2.0
"""A leg that takes so many times as long as expected is held up by something else."""


class ComputeRate:
    """How fast a prefill worker computes: a moving average over its legs that computed `min_tokens` or more, since what
    a shorter one takes is mostly something else."""

    def __init__(self, *, min_tokens: int = 256, weight: float = 0.3) -> None:
        self._min_tokens = min_tokens
        self._weight = weight
        self.tokens_per_s: float | None = None
        """`None` until a leg was long enough."""
        self.best_tokens_per_s: float | None = None
        """Of the legs of late, that of which the least was waiting."""

    def seconds_for(self, tokens: int) -> float:
        """How long it would take to compute so many."""
        return tokens / (self.best_tokens_per_s or _USUAL_TOKENS_PER_S)

    def note(self, tokens: int, elapsed_s: float) -> None:
        """A leg computed `tokens` in `elapsed_s`, its waits included."""
        if tokens < self._min_tokens or elapsed_s <= 0:
            return
        found = tokens / elapsed_s
        known = self.tokens_per_s
        self.tokens_per_s = found if known is None else known + self._weight * (found - known)
        self.best_tokens_per_s = max(found, _BEST_KEPT * (self.best_tokens_per_s or 0.0))


def common_blocks(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading blocks two chains share; blocks that are equal have equal ones before them."""
    # [0, low) equal, [high, len) not equal
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high) // 2
        if one[middle] == other[middle]:
            low = middle + 1
        else:
            high = middle
    return low


def wait_for_prefix_s(
    *, pending_tokens: int, leg_tokens: int, elapsed_s: float, tokens_per_s: float | None, min_tokens: int
) -> float | None:
    """How long a request waits at most for a leg that began `elapsed_s` ago and computes `leg_tokens`, of which
    `pending_tokens` are of the request's prefix, too: no longer than to compute them again. `None` is not at all.
    """
    if tokens_per_s is None or pending_tokens < min_tokens:
        return None
    again_s, leg_s = pending_tokens / tokens_per_s, leg_tokens / tokens_per_s
    if again_s < _MIN_WAIT_S or elapsed_s > _OVERDUE * leg_s or leg_s - elapsed_s > again_s:
        return None
    return again_s
