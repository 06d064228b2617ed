"""The demo's program as values: who speaks when, what each is told, and what is kept of a call.

Two clients run it: `frontend.py` in SGLang's frontend language, `chat.py` through the `openai` package. In both, every
agent reads the whole conversation so far; its answer is appended, or what the script keeps of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from examples.demo.exercises import Request
from examples.demo.rounds import ROLES, SYSTEM, TOLD, Role, answer_to, kept_of

OnText = Callable[[str], None]
"""Is given each piece of an answer as it arrives."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call to make: whom, and with which new message."""

    turn: int
    model: str
    message: str


@dataclass(frozen=True, slots=True)
class Script:
    """One session: what every agent reads first, and the calls to make, one after another."""

    system: str
    steps: tuple[Step, ...]
    max_new_tokens: int = 48

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(step.model for step in self.steps))

    def kept(self, step: Step, answer: str, calls: Sequence[Call]) -> str:
        """What the conversation keeps of an answer, given the session's earlier calls; see `rounds.kept_of`."""
        return kept_of(step.model, answer, code=written_code(calls, step.turn))


def rounds_script(requests: Sequence[Request], *, max_new_tokens: int) -> Script:
    """A turn for each request, in which planner, coder and reviewer are asked."""
    steps = [
        Step(turn, role, TOLD[role].format(request=request.text))
        for turn, request in enumerate(requests, start=1)
        for role in ROLES
    ]
    return Script(SYSTEM, tuple(steps), max_new_tokens)


def is_right(call: Call, requests: Sequence[Request]) -> bool:
    """Whether an agent said what its request wants."""
    return call.answer.strip() == answer_to(_role(call.model), requests[call.turn - 1])


def written_code(calls: Sequence[Call], turn: int) -> str:
    """What the coder wrote in this turn, or nothing yet."""
    return next((call.answer for call in calls if (call.turn, call.model) == (turn, "coder")), "")


def _role(model: str) -> Role:
    (role,) = (role for role in ROLES if role == model)
    return role


@dataclass(frozen=True, slots=True)
class Call:
    """One call as its client saw it.

    `prompt_ids` and `answer_ids` are exact: what the workers read and chose. `log_probs` holds the module's
    log-probability of each chosen token, where the client was told. `rid` finds the call in the router's log.
    `cached_tokens` is what the answering server says it found of the prompt; `ttft_ms` and `e2e_ms` are by the client's
    clock.
    """

    client: str
    turn: int
    model: str
    rid: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer: str
    log_probs: tuple[float, ...] | None = None
    cached_tokens: int | None = None
    ttft_ms: float | None = None
    e2e_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "client": self.client,
            "turn": self.turn,
            "model": self.model,
            "rid": self.rid,
            "prompt_ids": list(self.prompt_ids),
            "answer_ids": list(self.answer_ids),
            "answer": self.answer,
            "log_probs": None if self.log_probs is None else list(self.log_probs),
        }


class Stopwatch:
    """Times one call, from its making."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self.ttft_ms: float | None = None

    def text_came(self) -> None:
        if self.ttft_ms is None:
            self.ttft_ms = self.elapsed_ms

    @property
    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self._began_s) * 1000


def play(script: Script, answers: Iterator[Call], *, on_step: Callable[[Step], None]) -> list[Call]:
    """Take a client's `answers` to the script; `on_step` is told before each call is made."""
    calls: list[Call] = []
    for step in script.steps:
        on_step(step)
        calls.append(next(answers))
    return calls
