"""The demo's program as values: who speaks when, what each is told, and what is kept of a call.

Two clients run it: `frontend.py` in SGLang's frontend language, `chat.py` through the `openai` package. In both, every
agent reads the whole conversation so far, and appends its answer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

OnText = Callable[[str], None]
"""Is given each piece of an answer as it arrives."""


@dataclass(frozen=True, slots=True)
class Agent:
    """A decode module's part: what it is asked in the first turn, and in every later one."""

    model: str
    task: str
    task_again: str


AGENTS: Final = (
    Agent(
        "planner",
        "You are the planner. Which function of heapq solves this problem? Answer in two sentences.",
        "You are the planner. Improve the plan. Answer in two sentences.",
    ),
    Agent(
        "coder",
        "You are the coder. Write the function in Python.",
        "You are the coder. Write the improved function in Python.",
    ),
    Agent(
        "reviewer",
        "You are the reviewer. Is this code right? Answer in two sentences.",
        "You are the reviewer. Is the improved code right? Answer in two sentences.",
    ),
)


@dataclass(frozen=True, slots=True)
class Script:
    """One session: a document and a problem that every agent reads, and `turns` rounds of all agents in order."""

    document: str
    problem: str
    turns: int = 2
    agents: tuple[Agent, ...] = AGENTS
    max_new_tokens: int = 40

    @property
    def system(self) -> str:
        return f"A planner, a coder and a reviewer solve a problem together, using this document.\n\n{self.document}"

    def steps(self) -> Iterator[Step]:
        for turn in range(1, self.turns + 1):
            for agent in self.agents:
                told = agent.task if turn == 1 else agent.task_again
                is_first = turn == 1 and agent is self.agents[0]
                yield Step(turn, agent.model, f"The problem:\n\n{self.problem}\n\n{told}" if is_first else told)


@dataclass(frozen=True, slots=True)
class Step:
    """One call to make: whom, and with which new message."""

    turn: int
    model: str
    message: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call as its client saw it.

    `prompt_ids` and `answer_ids` are exact: what the workers read and chose. `log_probs` holds the module's
    log-probability of each chosen token, where the client was told. `rid` finds the call in the router's log.
    """

    client: str
    turn: int
    model: str
    rid: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer: str
    log_probs: tuple[float, ...] | None = None

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


def play(script: Script, answers: Iterator[Call], *, on_step: Callable[[Step], None]) -> list[Call]:
    """Take a client's `answers` to the script; `on_step` is told before each call is made."""
    calls: list[Call] = []
    for step in script.steps():
        on_step(step)
        calls.append(next(answers))
    return calls
