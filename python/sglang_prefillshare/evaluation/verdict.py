"""What a benchmark says of one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right; if not, the benchmark's kind of error and, where it has one, its explanation."""

    is_right: bool
    error: str | None = None
    why: str | None = None
