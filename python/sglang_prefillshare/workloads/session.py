"""A session: agents that are called in sequence, turn by turn, over one context that grows. Pure values, seeded.

    context of call 1   the first prompt: [0, shared) common to all sessions of the workload, the rest its own
    context of call k   that of call k-1, then the answer to it, then the observation that followed it

Prompts are token ids, so that lengths are exact and no tokenizer stands between the workload and the servers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Step:
    """One call of one agent: how long its answer is, and what the session observes after it."""

    agent: str
    answer_tokens: int
    observation: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Session:
    """`prompt` begins with `shared_prefix_tokens` that other sessions begin with too. `arrival_s` is a trace's own."""

    name: str
    prompt: tuple[int, ...] = field(repr=False)
    shared_prefix_tokens: int
    turns: tuple[tuple[Step, ...], ...]
    arrival_s: float | None = None

    @property
    def steps(self) -> Iterator[tuple[int, Step]]:
        """(turn, step) in the order of the calls."""
        for turn, steps in enumerate(self.turns):
            for step in steps:
                yield turn, step

    @property
    def call_count(self) -> int:
        return sum(len(steps) for steps in self.turns)

    @property
    def prompt_lengths(self) -> list[int]:
        """The prompt's length at each call, known before any answer, since answers have fixed lengths."""
        lengths = []
        length = len(self.prompt)
        for _, step in self.steps:
            lengths.append(length)
            length += step.answer_tokens + len(step.observation)
        return lengths

    @property
    def answer_tokens(self) -> int:
        return sum(step.answer_tokens for _, step in self.steps)

    @property
    def total_tokens(self) -> int:
        """The longest that a call's prompt and answer get together: what a worker's KV pool must have room for."""
        lengths = self.prompt_lengths
        return max(length + step.answer_tokens for length, (_, step) in zip(lengths, self.steps, strict=True))


class Words:
    """Token ids drawn by name: the same seed and name give the same ids, in any order of asking."""

    def __init__(self, *, seed: int, token_ids: tuple[int, int]) -> None:
        self._seed = seed
        self._low, self._high = token_ids

    def draw(self, name: str, count: int) -> tuple[int, ...]:
        """`count` ids from [low, high). A longer draw of the same name begins with the shorter one."""
        rng = random.Random(f"{self._seed}/{name}")
        return tuple(rng.randrange(self._low, self._high) for _ in range(count))


def unique_context_tokens(sessions: Sequence[tuple[Session, int]]) -> int:
    """How many prompt tokens a single cache that forgets nothing would have to compute for these sessions.

    Each comes with the longest prompt that was prefilled for it, 0 for none. What first prompts have in common at their
    beginning counts once; what a session appends is its own.
    """
    prefilled = sorted((session.prompt[:longest], longest) for session, longest in sessions if longest)
    total = 0
    before: tuple[int, ...] = ()
    for prompt, longest in prefilled:
        total += longest - _common_length(before, prompt)
        before = prompt
    return total


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
