"""What became of the handoffs of a soak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Tally:
    """`wrong`, `leaked` and `hung` say what was found, each with its circumstances; all three must stay empty."""

    handoffs: int = 0
    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.wrong or self.leaked or self.hung)

    def to_json(self) -> dict[str, Any]:
        counts = {"handoffs": self.handoffs, "ok": self.ok, "failed": dict(self.failed), "faults": dict(self.faults)}
        return {**counts, "wrong": self.wrong, "leaked": self.leaked, "hung": self.hung}

    def count_failure(self, reason: str) -> None:
        """Count a reason, without its numbers."""
        words = (
            "N" if any(character.isdigit() for character in word) else word
            for word in reason.replace("=", "= ").replace(":", ": ").split()
        )
        self.failed[" ".join(words)[:160]] += 1
