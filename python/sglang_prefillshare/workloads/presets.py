"""The workloads `react` and `reflexion`: sessions of several agents with the token lengths of Kim et al., HotpotQA.

PrefillShare's serving experiments take their lengths from Kim et al., "The Cost of Dynamic Reasoning" (2025), and do
not print them (paper §4.1, B.1). What Kim et al. measured for Llama-3.1-8B, as read off their figures (about 1% off):

    mean of a call        input   answer   of the input: instruction   few-shot   question   calls per request
    react                 1,628       46                         233        543         23                 6.2
    reflexion             2,249       73                         255        543         23                10.4

Theirs is one agent that calls one model. Inferred by us, for `agents` models that are called in turn:

- turns: as many as make the number of calls closest to theirs, but enough for the hit ratio that PrefillShare's paper
  reports for `react` (Figure 4, 89%) to be possible at all. With 4 agents these are 3 turns, 12 calls, for both: of
  2 turns of `react` no cache can hold more than 87.1%;
- the observation after each call: as long as makes the mean input that of theirs. With 12 calls these are 105 and
  187 tokens;
- instruction and few-shot examples are the same text in every session, so they are the prefix that sessions share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.session import Session, Step, Words

PresetName = Literal["react", "reflexion"]


@dataclass(frozen=True, slots=True)
class Measured:
    """Kim et al.'s numbers: mean tokens of a call, and calls of a request."""

    input_tokens: int
    answer_tokens: int
    instruction_tokens: int
    few_shot_tokens: int
    question_tokens: int
    calls: float


MEASURED: Final[dict[PresetName, Measured]] = {
    "react": Measured(1628, 46, 233, 543, 23, 6.2),
    "reflexion": Measured(2249, 73, 255, 543, 23, 10.4),
}


PAPER_HIT_RATIO: Final = 0.89
"""PrefillShare's, Figure 4."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of every session of a workload, in tokens."""

    agents: tuple[str, ...]
    turns: int
    shared_prefix_tokens: int
    own_prefix_tokens: int
    answer_tokens: int
    observation_tokens: int

    def __post_init__(self) -> None:
        if not self.agents:
            raise ConfigError("agents is empty, wanted at least one.")
        for name in ("turns", "answer_tokens", "own_prefix_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, wanted 1 or more.")
        for name in ("shared_prefix_tokens", "observation_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, wanted 0 or more.")

    def scaled(self, scale: float) -> Shape:
        """Every length times `scale`, and 1 at least where it was not 0; agents and turns stay."""

        def of(tokens: int) -> int:
            return max(1, round(tokens * scale)) if tokens else 0

        return Shape(
            self.agents,
            self.turns,
            of(self.shared_prefix_tokens),
            of(self.own_prefix_tokens),
            of(self.answer_tokens),
            of(self.observation_tokens),
        )


def preset_shape(
    name: PresetName, agents: Sequence[str], *, turns: int | None = None, shares_prefix: bool = True
) -> Shape:
    """The preset for these agents; with `shares_prefix` false every session has instruction and examples of its own."""
    measured = MEASURED[name]
    turns = turns or _turns(measured, len(agents))
    calls = turns * len(agents)
    common = measured.instruction_tokens + measured.few_shot_tokens
    first = common + measured.question_tokens
    # The mean of first, first + grown, ..., first + (calls - 1) * grown is to be the measured input.
    grown = (measured.input_tokens - first) / ((calls - 1) / 2) if calls > 1 else 0.0
    return Shape(
        agents=tuple(agents),
        turns=turns,
        shared_prefix_tokens=common if shares_prefix else 0,
        own_prefix_tokens=measured.question_tokens + (0 if shares_prefix else common),
        answer_tokens=measured.answer_tokens,
        observation_tokens=max(0, round(grown) - measured.answer_tokens),
    )


def _turns(measured: Measured, agents: int) -> int:
    first = measured.instruction_tokens + measured.few_shot_tokens + measured.question_tokens
    turns = max(1, round(measured.calls / agents))
    while True:
        calls = turns * agents
        # A cache of everything misses the question, and what a call adds: twice what the mean has above the first.
        missed = measured.question_tokens + 2 * (measured.input_tokens - first)
        if 1 - missed / (calls * measured.input_tokens) >= PAPER_HIT_RATIO:
            return turns
        turns += 1


def make_session(shape: Shape, *, workload: str, index: int, words: Words) -> Session:
    """The session `index` of a workload: its own but for the shared prefix."""
    name = f"{workload}-{index}"
    shared = words.draw(f"{workload}/shared", shape.shared_prefix_tokens)
    own = words.draw(f"{name}/own", shape.own_prefix_tokens)
    turns = tuple(
        tuple(
            Step(
                agent=agent,
                answer_tokens=shape.answer_tokens,
                observation=words.draw(f"{name}/{turn}/{place}", shape.observation_tokens),
            )
            for place, agent in enumerate(shape.agents)
        )
        for turn in range(shape.turns)
    )
    return Session(name, shared + own, shape.shared_prefix_tokens, turns)
